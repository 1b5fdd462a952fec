/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * "OK means enforced": while one CPU stores to a page as fast as it can, another locks it.  What the word holds when the
 * answer was seen is what it holds for ever, however many stores follow.  With watched=1 the page is watched before.
 */
#include "guest.h"

static struct race shared __attribute__((aligned(4096)));
static struct { op_fn *op; u32 cpl; void *va; } job;
static void *shared_user;

static void writer(void *arg)
{
	if (job.cpl)
		run_user(job.op, job.va, (u64)shared_user, NULL);
	else
		job.op(job.va, (u64)&shared, NULL);
}

static bool progress_to(u64 tries, volatile u64 *word, u64 frozen, const char *what)
{
	u64 t = now_ns();

	while (shared.tries < tries) {
		if (word && !check(*word == frozen, "%s: the word went on after OK, from %lu to %lu", what, frozen, *word))
			return false;
		if (now_ns() - t > 60000000000ull)
			fail("%s: the writer stopped at %lu of %lu stores", what, shared.tries, tries);
		relax();
	}
	return true;
}

void t_race(void)
{
	static const struct { const char *name; op_fn *op; u32 cpl; } kinds[] = {
		{ "mov at CPL 0", op_race, 0 }, { "mov at CPL 3", op_race, 3 },
		{ "lock xadd at CPL 0", op_race_xadd, 0 }, { "lock xadd at CPL 3", op_race_xadd, 3 },
	};
	u32 rounds = opt_num("rounds", 100), done = 0;
	u64 stores = opt_num("stores", 200), total = 0, refusals = 0;
	u64 t0, limit = opt_num("seconds", 30) * 1000000000ull;

	guard_open();
	if (!start_cpus())
		skip("the second CPU does not start");
	if (n_cpus < 2)
		skip("needs -smp 2");
	shared_user = user_page(&shared);
	t0 = now_ns();
	for (; done < rounds && now_ns() - t0 < limit; done++) {
		u32 k = done % ARRAY_SIZE(kinds);
		volatile u64 *word = (u64 *)((u8 *)alloc_lone_page() + 0x40);
		u64 at_ok;

		memset((void *)((u64)word & -PAGE), 0, PAGE);
		shared.tries = shared.stop = 0;
		job.op = kinds[k].op;
		job.cpl = kinds[k].cpl;
		job.va = job.cpl ? user_page((void *)word) : (void *)word;
		if (opt_num("watched", 0))
			must_protect((void *)word, AUDIT(NOWRITE));
		cpu_call(1, writer, NULL);
		progress_to(100, NULL, 0, kinds[k].name);
		check(*word != 0, "%s: no store landed before the lock", kinds[k].name);
		must_lock((void *)word);
		mb();
		at_ok = *word;
		progress_to(shared.tries + stores, word, at_ok, kinds[k].name);
		shared.stop = 1;
		for (u64 t = now_ns(); cpu_busy(1); relax())
			if (now_ns() - t > 30000000000ull)
				fail("%s: the writer does not stop", kinds[k].name);
		check(*word == at_ok, "%s: the word went on after OK, from %lu to %lu", kinds[k].name, at_ok, *word);
		check(shared.tries > at_ok, "%s: the writer did not go on", kinds[k].name);
		if (inject)
			check(trap_of(1)->count >= stores - 1, "%s: %lu exceptions for %lu stores after OK", kinds[k].name,
			      trap_of(1)->count, stores);
		else
			check(!trap_of(1)->count, "%s: exceptions although the policy is drop", kinds[k].name);
		total += shared.tries;
		refusals += shared.tries - at_ok;
		if (failures)
			break;
	}
	diag("%u pages, %lu stores, about %lu of them refused", done, total, refusals);
	if (!failures && done < MIN(rounds, 4))
		fail("only %u rounds in the time", done);
	pass_or_fail(test_name);
}
