/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * "OK means enforced", for MSRs: one CPU accesses an MSR as fast as it can while another one asks for a rule. Once the OK was seen, no
 * access that begins later does what the rule forbids. And rules that change all the time do not disturb those that nobody forbids.
 */
#include "guest.h"

static struct {
	u32 msr;
	bool read;
	u64 base;		/* writes are of base + n */
	volatile u64 n, stop, ok;	/* accesses made; end; the OK has been seen */
	volatile u64 late;	/* that began after it and went through */
	volatile u64 after;	/* that began after it */
	volatile u64 first, last;	/* what the MSR had after the first of those, and after the last */
} job;

static void writer(void *arg)
{
	struct trap *t = trap_of(this_cpu());

	for (u64 n = 1; !job.stop; n++) {
		bool ok = job.ok;
		u64 value = job.base + n, now, faults = t->count;

		if (job.read) {
			now = op_rdmsr((void *)(u64)job.msr, 0, NULL);
			if (ok && (now || t->count == faults))
				job.late++;
		} else {
			op_wrmsr((void *)(u64)job.msr, value, NULL);
			now = op_rdmsr((void *)(u64)job.msr, 0, NULL);
			if (ok && now == value)
				job.late++;
		}
		if (ok) {
			if (!job.after)
				job.first = now;
			job.last = now;
			job.after++;
		}
		job.n = n;
		if (!(n % 64))
			relax();
	}
}

static void wait_for(volatile u64 *what, u64 n)
{
	for (u64 t = now_ns(); *what < n; relax())
		if (now_ns() - t > 60000000000ull)
			fail("the other CPU stopped at %lu of %lu accesses", *what, n);
}

static void begin(u32 msr, bool read, u64 base)
{
	job.msr = msr;
	job.read = read;
	job.base = base;
	job.n = job.stop = job.ok = job.late = job.after = job.first = job.last = 0;
	cpu_call(1, writer, NULL);
	wait_for(&job.n, 20);
}

static void end(void)
{
	job.stop = 1;
	for (u64 t = now_ns(); cpu_busy(1); relax())
		if (now_ns() - t > 30000000000ull)
			fail("the other CPU does not stop");
}

void t_msr_race(void)
{
	static const struct { const char *name; u32 msr; bool read; u16 access, action; u64 mask; } kinds[] = {
		{ "pin of LSTAR", LSTAR, false, M_WRITE, M_PIN, ~0ull },
		{ "deny of writes of LSTAR", LSTAR, false, M_WRITE, M_DENY, 0 },
		{ "deny of reads of LSTAR", LSTAR, true, M_READ, M_DENY, 0 },
		{ "pin of all but the lowest bits of LSTAR", LSTAR, false, M_WRITE, M_PIN, ~3ull },
		{ "pin of SYSENTER_EIP, and log", SYSENTER_EIP, false, M_WRITE, M_PIN | M_LOG, ~0ull },
	};
	u32 rounds = opt_num("rounds", 200), done = 0;
	u64 tries = opt_num("tries", 100), total = 0, after = 0, t0, limit = opt_num("seconds", 30) * 1000000000ull, now = 0;

	msr_begin();
	t0 = now_ns();
	for (; done < rounds && now_ns() - t0 < limit && !failures; done++) {
		u32 k = done % ARRAY_SIZE(kinds);
		const char *what = kinds[k].name;
		u64 step = kinds[k].mask == ~3ull ? 4 : 1;

		must_msr(MSR_PROTECT, kinds[k].msr, M_BOTH, M_ALLOW, 0);
		begin(kinds[k].msr, kinds[k].read, 0x10000000ull * step);
		/* The last time for good. */
		must_msr(done + ARRAY_SIZE(kinds) >= rounds ? MSR_LOCK : MSR_PROTECT, kinds[k].msr, kinds[k].access, kinds[k].action, kinds[k].mask);
		job.ok = 1;
		wait_for(&job.after, tries);
		end();
		if (step == 1)
			check(!job.late, "%s: %lu of %lu accesses after OK went through", what, job.late, job.after);
		check(job.first / step == job.last / step, "%s: the MSR went on after OK, from 0x%lx to 0x%lx", what, job.first, job.last);
		if (inject && step == 1)
			check(trap_of(1)->count >= job.after, "%s: %lu exceptions for %lu accesses after OK", what, trap_of(1)->count, job.after);
		if (!kinds[k].read) {
			msr_try(1, kinds[k].msr, false, &now);
			check(now / step == job.last / step, "%s: it is 0x%lx later, not 0x%lx", what, now, job.last);
			check(kinds[k].action & M_DENY || msr_try(1, kinds[k].msr, true, &now), "%s: the value of the OK cannot be written", what);
		}
		total += job.n;
		after += job.after;
		if (done + ARRAY_SIZE(kinds) >= rounds)
			break;
	}
	diag("%u rounds, %lu accesses, %lu of them after OK", done, total, after);
	if (!failures && done < MIN(rounds, ARRAY_SIZE(kinds)))
		fail("only %u rounds in the time", done);
	pass_or_fail(test_name);
}

/* Each access has one of the outcomes that some rule of the loop allows; those of MSRs without a rule always the same. */
static struct { volatile u64 stop, n, refused, wrong; volatile u32 msr; } toggle;

static void accesses(void *arg)
{
	static const u32 unfiltered[] = { CSTAR, SYSENTER_CS + 1, KERNEL_GS_BASE, PAT };
	struct trap *t = trap_of(this_cpu());
	u64 held[ARRAY_SIZE(unfiltered)], lstar = 0;	/* 0: not known */

	for (u32 i = 0; i < ARRAY_SIZE(unfiltered); i++)
		held[i] = op_rdmsr((void *)(u64)unfiltered[i], 0, NULL);
	for (u64 n = 1; !toggle.stop; n++) {
		u32 i = n % ARRAY_SIZE(unfiltered), msr = unfiltered[i];
		u64 faults, now;

		faults = t->count;
		if (msr != PAT)
			held[i] = n * 16;
		op_wrmsr((void *)(u64)msr, held[i], NULL);
		now = op_rdmsr((void *)(u64)msr, 0, NULL);
		if (now != held[i] || t->count != faults) {
			toggle.wrong++;
			toggle.msr = msr;
		}
		/* A write lands or is refused; the read after it is of the one or the other value, or refused. */
		op_wrmsr((void *)(u64)LSTAR, 0x1000 + n * 16, NULL);
		faults = t->count;
		now = op_rdmsr((void *)(u64)LSTAR, 0, NULL);
		if (t->count != faults) {
			/* A write may have landed that we cannot see. */
			toggle.refused++;
			lstar = 0;
		} else if (lstar && now != lstar && now != 0x1000 + n * 16) {
			toggle.wrong++;
			toggle.msr = LSTAR;
		} else {
			lstar = now;
		}
		toggle.n = n;
		if (!(n % 64))
			relax();
	}
}

void t_msr_toggle(void)
{
	static const struct { u16 access, action; u64 mask; } rules[] = {
		{ M_WRITE, M_PIN, ~0ull }, { M_BOTH, M_DENY, 0 }, { M_READ, M_LOG, 0 }, { M_WRITE, M_PIN | M_LOG, 0xff0 }, { M_BOTH, M_ALLOW, 0 },
		{ M_WRITE, M_DENY, 0 }, { M_WRITE, M_LOG, 0 }, { M_READ, M_DENY, 0 },
	};
	u32 rounds = opt_num("rounds", 300), done = 0;
	u64 t0, limit = opt_num("seconds", 30) * 1000000000ull, last = 0;

	msr_begin();
	cpu_call(1, accesses, NULL);
	t0 = now_ns();
	for (; done < rounds && now_ns() - t0 < limit && !toggle.wrong; done++) {
		u32 k = done % ARRAY_SIZE(rules);

		must_msr(MSR_PROTECT, LSTAR, rules[k].access, rules[k].action, rules[k].mask);
		/* One that is far away, so that what KVM is told gets another shape each time. */
		must_msr(MSR_PROTECT, 0x40000000 + done % 64 * 0x100, M_BOTH, done & 64 ? M_ALLOW : M_DENY, 0);
		/* At least one round of them with each rule. */
		last = toggle.n;
		wait_for(&toggle.n, last + 2);
	}
	wait_for(&toggle.n, last + 20);
	toggle.stop = 1;
	for (u64 t = now_ns(); cpu_busy(1); relax())
		if (now_ns() - t > 30000000000ull)
			fail("the other CPU does not stop");
	check(toggle.refused, "no read was refused");
	check(!toggle.wrong, "%lu accesses had another outcome than any rule has, the last of MSR 0x%x", toggle.wrong, toggle.msr);
	diag("%u changes of the rules, %lu rounds of accesses, %lu reads refused", done, toggle.n, toggle.refused);
	if (!failures && done < MIN(rounds, 32))
		fail("only %u changes in the time", done);
	pass_or_fail(test_name);
}
