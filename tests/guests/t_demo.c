/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What this is all about, in a few lines for people: a page, a lock, attacks from all CPUs, and what became of the page. */
#include "guest.h"

#define SEED	99

static struct { void *page, *mapping; u32 cpl; } target;

static void attack(void *arg)
{
	bool held = refused("a store", op_mov64, target.mapping, target.cpl, target.page, SEED);

	diag("CPU %u, CPL %u: a store by %s mapping: %s; the page is %s", this_cpu(), target.cpl,
	     target.mapping == target.page ? "the first" : "another", trap_of(this_cpu())->count ? "#GP" : "no fault",
	     held ? "as it was" : "NOT AS IT WAS");
}

void t_demo(void)
{
	u64 told = 0;
	struct event e;
	u32 len;

	guard_open();
	if (!start_cpus())
		fail("CPU %u does not start", n_cpus);
	target.page = alloc_lone_page();
	fill(target.page, SEED);
	if (writable("before the lock", target.page))
		diag("page 0x%lx: a store lands", (u64)target.page);
	must_lock(target.page);
	diag("page 0x%lx: the guest asks for a lock, and the device says OK", (u64)target.page);
	for (u32 cpu = 0; cpu < n_cpus; cpu++) {
		target.mapping = target.page;
		target.cpl = 0;
		cpu_run(cpu, attack, NULL);
		target.mapping = map_page((u64)target.page, F_P | F_W | F_U);
		target.cpl = 3;
		cpu_run(cpu, attack, NULL);
	}
	diag("CPU 0 asks to have it unlocked: errno %u", guard_protect(target.page, 1, 0).status);
	check(still_locked("a store after that", target.page, SEED), "it was unlocked");
	if (writable("the page after it", (u8 *)target.page + PAGE))
		diag("page 0x%lx: a store lands", (u64)target.page + PAGE);
	while (told < 2 * n_cpus + 1 && next_event(&e, &len, reply_ns))
		told += e.times;
	diag("the device has told the guest of %lu violations", told);
	check(told == 2 * n_cpus + 1, "%lu violations told, not %u", told, 2 * n_cpus + 1);
	pass_or_fail(test_name);
}
