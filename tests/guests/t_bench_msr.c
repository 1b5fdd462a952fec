/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What rules for MSRs cost: accesses that no rule speaks of, with rules in force and without, accesses that one does speak
 * of, and putting a set of rules in force.  Round after round, so that what else the machine does hits all alike.
 */
#include "guest.h"

#define ROUNDS	31
#define BATCH	200

enum { FREE_READ, FREE_WRITE, GUARDED_READ, GUARDED_WRITE, BENCH_OPS };

static const char *const op_names[BENCH_OPS] = { "rdmsr-unlisted", "wrmsr-unlisted", "rdmsr-listed", "wrmsr-listed" };

static void sort(u64 *v, u32 n)
{
	for (u32 i = 1; i < n; i++)
		for (u32 j = i; j && v[j - 1] > v[j]; j--) {
			u64 t = v[j];

			v[j] = v[j - 1];
			v[j - 1] = t;
		}
}

static void line(const char *set, const char *what, const char *when, u64 *v)
{
	sort(v, ROUNDS);
	print("BENCH msr set=%s what=%s rules=%s ns=%lu min=%lu max=%lu runs=%u\n", set, what, when, v[ROUNDS / 2], v[0],
	      v[ROUNDS - 1], ROUNDS);
}

/* ns of BATCH accesses: of KERNEL_GS_BASE, which no rule here speaks of, or of LSTAR.  Writes change nothing. */
static u64 batch(u32 op)
{
	u32 msr = op == FREE_READ || op == FREE_WRITE ? KERNEL_GS_BASE : LSTAR;
	bool write = op == FREE_WRITE || op == GUARDED_WRITE;
	u64 value = read_msr(msr), start = now_ns();

	for (u32 i = 0; i < BATCH; i++) {
		if (write)
			write_msr(msr, value);
		else
			read_msr(msr);
	}
	return now_ns() - start;
}

/* Entries of a request: what the driver pins by default, or of that and as many windows of a filter as fit beside it. */
static u32 fill_rules(struct msr_rule *rules, bool wide, bool on)
{
	static const struct { u32 first, last; } pins[] = {
		{ SYSENTER_CS, SYSENTER_EIP }, { PAT, PAT }, { EFER, EFER }, { STAR, SFMASK },
	};
	u32 n = 0;

	for (u32 i = 0; i < ARRAY_SIZE(pins); i++)
		rules[n++] = (struct msr_rule) {
			.first = pins[i].first, .last = pins[i].last, .access = M_WRITE, .action = on ? M_PIN : M_ALLOW,
			.mask = !on ? 0 : pins[i].first == EFER ? 0x901 : ~0ull,
		};
	for (u32 i = 1; wide && i < 13; i++)
		rules[n++] = (struct msr_rule) {
			.first = i << 24, .last = (i << 24) + 0x2fff, .access = M_WRITE, .action = on ? M_DENY : M_ALLOW,
		};
	return n;
}

static u64 ask(bool wide, bool on)
{
	struct request *q = request_buffer();
	u32 n = fill_rules((struct msr_rule *)q->ranges, wide, on);
	struct response r;
	u64 start;

	q->type = MSR_PROTECT;
	q->count = n;
	start = now_ns();
	guard_send(q, 8 + 24 * n, &r);
	start = now_ns() - start;
	if (r.status)
		fail("a set of %u rules: status %u index %u", n, r.status, r.index);
	return start;
}

void t_bench_msr(void)
{
	static u64 without[BENCH_OPS][ROUNDS], with[BENCH_OPS][ROUNDS], install[ROUNDS], remove[ROUNDS];

	guard_open();
	if (!guard_has(F_MSR))
		skip("this host does not offer F_MSR");
	for (u32 wide = 0; wide < 2; wide++) {
		const char *set = wide ? "wide" : "pins";

		for (u32 k = 0; k < ROUNDS; k++) {
			for (u32 op = 0; op < BENCH_OPS; op++)
				without[op][k] = batch(op) / BATCH;
			install[k] = ask(wide, true);
			for (u32 op = 0; op < BENCH_OPS; op++)
				with[op][k] = batch(op) / BATCH;
			remove[k] = ask(wide, false);
		}
		for (u32 op = 0; op < BENCH_OPS; op++) {
			line(set, op_names[op], "no", without[op]);
			line(set, op_names[op], "yes", with[op]);
		}
		line(set, "install", "yes", install);
		line(set, "remove", "no", remove);
	}
	pass_or_fail(test_name);
}
