/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* One CPU stores to a locked page, or writes MSRs that it may not, as fast as it can; what do another one's requests have to wait for? */
#include "guest.h"

#define MAX_RUNS	512
#define IDLE_RUNS	20
#define FLOODED		0x40000000u	/* MSRs that nobody has */
#define FLOODED_N	512u

static u64 flood_n, flood_ns;
static volatile u64 flood_done;

/* More addresses than anybody stores events for. */
static void flood(void *page)
{
	u64 start = now_ns();

	for (u64 i = 0; i < flood_n || (i % 256) || now_ns() - start < flood_ns; flood_done = ++i)
		if (page)
			op_mov64((u8 *)page + i % (PAGE / 8) * 8, SPOIL, NULL);
		else
			op_wrmsr((void *)(u64)(FLOODED + i % FLOODED_N), i, NULL);
}

/* One after the other: what is in force stays one range, and QEMU's table small. */
static u64 lock_next(void)
{
	static u8 *next, *end;
	u64 t;

	if (next == end) {
		next = alloc_pages(MAX_RUNS + IDLE_RUNS);
		end = next + (MAX_RUNS + IDLE_RUNS) * PAGE;
	}
	t = now_ns();
	must_lock(next);
	next += PAGE;
	return now_ns() - t;
}

void t_flood(void)
{
	u64 idle = 0, worst = 0, sum = 0, start, ns, drained;
	u32 runs = 0;
	bool msrs = opt_num("msr", 0);
	struct config c0, c1;
	u8 *page;

	flood_n = opt_num("n", 100000);
	flood_ns = opt_num("seconds", 2) * 1000000000ull;
	guard_open();
	if (!start_cpus() || n_cpus < 2)
		skip("needs -smp 2");
	page = alloc_lone_page();
	fill(page, 80);
	must_lock(page);
	if (msrs) {
		if (!guard_has(F_MSR))
			skip("this host does not enforce rules for MSRs");
		check(!msr_ask(MSR_LOCK, FLOODED, FLOODED + FLOODED_N - 1, M_WRITE, M_DENY, 0).status, "the rule is refused");
	}
	for (u32 i = 0; i < IDLE_RUNS; i++) {
		ns = lock_next();
		idle = ns > idle ? ns : idle;
	}
	c0 = guard_config();
	print("FLOOD begins\n");
	start = now_ns();
	cpu_call(1, flood, msrs ? NULL : page);
	while (cpu_busy(1)) {
		if (runs < MAX_RUNS) {
			ns = lock_next();
			worst = ns > worst ? ns : worst;
			sum += ns;
			runs++;
			wait_ns(2000000);
		}
		relax();
	}
	ns = now_ns() - start;
	check(intact(page, 80), "the page has changed");
	check(runs > 0, "no request was made meanwhile");
	print("FLOOD n=%lu ns=%lu requests=%u worst=%lu mean=%lu idle_worst=%lu\n", flood_done, ns, runs, worst, runs ? sum / runs : 0, idle);
	/* The harness looks at QEMU and the companion, and says when it has. */
	while (serial_rx() < 0)
		relax();
	/* Each is told, or counted as lost; the last lost ones with the next event. */
	for (drained = now_ns(); now_ns() - drained < 500000000; ) {
		struct event e;
		u32 len;

		next_event(&e, &len, 100000000);
	}
	still_locked("after the flood", page, 80);
	for (start = now_ns(); (c1 = guard_config()).violations - c0.violations != flood_done + 1 && now_ns() - start < 5000000000ull; )
		wait_ns(10000000);
	check(c1.violations - c0.violations == flood_done + 1, "%lu violations are counted, not %lu", c1.violations - c0.violations,
	      flood_done + 1);
	check(c1.events_lost > c0.events_lost, "no event was lost");
	pass_or_fail(test_name);
}
