/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What the events queue says of refused stores. */
#include "guest.h"

static u8 *pages[MAX_CPUS];

static void violate(void *arg)
{
	op_mov64((u8 *)arg + 0x128, 0x1122334455667788ull, NULL);
}

static void check_event(const struct event *e, u64 gpa, u32 cpu, const struct trap *t, u64 value, u32 size)
{
	check(e->type == 1 && e->access == 1, "type %u, access %u", e->type, e->access);
	check(e->source == cpu, "source %u, not vCPU %u", e->source, cpu);
	check(e->gpa == gpa, "gpa 0x%lx, not 0x%lx", e->gpa, gpa);
	check(e->gva == gpa || e->gva == UNKNOWN, "gva 0x%lx, not 0x%lx or unknown", e->gva, gpa);
	if (accel == ACCEL_TCG) {
		if (inject)
			check(e->rip == t->start || e->rip == UNKNOWN, "rip 0x%lx, the store is at 0x%lx", e->rip, t->start);
		check(e->size == 0 && e->value == 0, "TCG does not know size %u and value 0x%lx", e->size, e->value);
	} else {
		if (inject)
			check(e->rip == t->end || e->rip == UNKNOWN, "rip 0x%lx, after the store is 0x%lx", e->rip, t->end);
		check(e->size == size && e->value == value, "size %u, value 0x%lx, not %u and 0x%lx", e->size, e->value, size, value);
	}
	check(e->times == 1, "times %u, not 1", e->times);
	check(e->action == (inject ? 1 : 2), "action %u", e->action);
	check(e->reserved == 0, "reserved field 0x%x", e->reserved);
}

/* Sum of `times` of all events about this page that come until it is quiet. */
static u64 told(const u8 *page, u64 quiet_ns, u32 *events)
{
	struct event e;
	u64 n = 0;

	*events = 0;
	while (next_event_on(page, &e, quiet_ns)) {
		n += e.times;
		++*events;
	}
	return n;
}

void t_events(void)
{
	static const struct { const char *name; op_fn *op; u32 size; } sizes[] = {
		{ "mov8", op_mov8, 1 }, { "mov16", op_mov16, 2 }, { "mov32", op_mov32, 4 }, { "mov64", op_mov64, 8 },
	};
	struct config c0, c1;
	struct event e;
	u8 *page;
	u32 len, n;
	u64 times;

	guard_open();
	if (!start_cpus())
		diag("the second CPU does not start: events of vCPU 0 only");
	c0 = guard_config();
	for (u32 i = 0; i < n_cpus; i++) {
		page = pages[i] = alloc_lone_page();
		fill(page, 30 + i);
		must_lock(page);
		trap_of(i)->count = 0;
		if (i) {
			cpu_call(i, violate, page);
			for (u64 t = now_ns(); cpu_busy(i); relax())
				if (now_ns() - t > 30000000000ull)
					fail("vCPU %u does not come back", i);
		} else {
			violate(page);
		}
		check(intact(page, 30 + i), "the page has changed");
		if (!check(next_event(&e, &len, 10000000000ull), "no event for vCPU %u", i))
			break;
		check(len == 64, "used length %u, not 64", len);
		check_event(&e, (u64)page + 0x128, i, trap_of(i), 0x1122334455667788ull, 8);
	}
	diag("events of %u vCPUs", n_cpus);

	/* Sizes, from CPL 3, through another mapping. */
	for (u32 i = 0; i < ARRAY_SIZE(sizes) && !failures; i++) {
		u8 *va;

		page = alloc_lone_page();
		fill(page, 40);
		va = user_page(page);
		must_lock(page);
		trap_of(0)->count = 0;
		run_user(sizes[i].op, va + 0x208, SPOIL, NULL);
		check(intact(page, 40), "the page has changed");
		if (!check(next_event(&e, &len, 10000000000ull), "no event for %s", sizes[i].name))
			break;
		if (e.gva == (u64)va + 0x208)
			e.gva = UNKNOWN;
		check_event(&e, (u64)page + 0x208, 0, trap_of(0), sizes[i].size == 8 ? SPOIL : SPOIL & ((1ull << sizes[i].size * 8) - 1),
			    sizes[i].size);
	}

	/* Repetition: ten stores without a buffer posted, told once or a few times, ten in all. */
	guard_start(F_VERSION_1 | F_NOWRITE, false, NULL, NULL);
	page = alloc_lone_page();
	fill(page, 41);
	must_lock(page);
	for (u32 i = 0; i < 10; i++)
		still_locked("ten times", page, 41);
	wait_ns(200000000);
	post_events(16);
	times = told(page, 2000000000ull, &n);
	diag("10 stores, told as %lu times in %u events", times, n);
	check(times == 10, "10 stores, told as %lu times in %u events", times, n);
	check(n <= 3, "%u events for one page, access and source: they do not coalesce", n);

	/* They wait through a device reset. */
	guard_start(F_VERSION_1 | F_NOWRITE, false, NULL, NULL);
	still_locked("before a device reset", page, 41);
	wait_ns(200000000);
	guard_start(F_VERSION_1 | F_NOWRITE, true, NULL, NULL);
	check(told(page, 2000000000ull, &n) == 1, "an event is lost by a device reset");

	c1 = guard_config();
	check(c1.violations - c0.violations == n_cpus + ARRAY_SIZE(sizes) + 11, "violations went from %lu to %lu, not by %lu",
	      c0.violations, c1.violations, n_cpus + ARRAY_SIZE(sizes) + 11);
	check(c1.events_lost == c0.events_lost, "events_lost went from %lu to %lu", c0.events_lost, c1.events_lost);
	pass_or_fail(test_name);
}

/* More pages than anybody stores events for, and no buffer: events are lost, counted, and nothing else happens. */
void t_events_lost(void)
{
	u32 n = opt_num("n", 600), len, events = 0;
	u64 times = 0, lost_before = 0, newest_lost = 0;
	struct config c0, c1;
	struct event e;
	u8 *base;

	guard_open();
	guard_start(F_VERSION_1 | F_NOWRITE, false, NULL, NULL);
	base = alloc_pages(n);
	for (u32 i = 0; i < n; i++)
		*(u64 *)(base + i * PAGE) = i;
	if (guard_lock(base, n).status)
		fail("lock of %u pages in one range failed", n);
	c0 = guard_config();
	lost_before = c0.events_lost;
	for (u32 i = 0; i < n; i++) {
		op_mov64(base + i * PAGE, SPOIL, NULL);
		check(*(volatile u64 *)(base + i * PAGE) == i, "page %u has changed", i);
	}
	wait_ns(500000000);
	post_events(16);
	while (next_event(&e, &len, 2000000000ull)) {
		check(len == 64 && e.times >= 1, "event of %u bytes, %u times", len, e.times);
		times += e.times;
		newest_lost = e.lost;
		events++;
	}
	c1 = guard_config();
	diag("%u violations: %u events, %lu times, %lu lost, last event says %lu lost, %lu violations counted", n, events, times,
	     c1.events_lost - lost_before, newest_lost, c1.violations - c0.violations);
	check(c1.events_lost > lost_before, "none of %u events was lost", n);
	check(events > 0, "no event at all");
	check(times + c1.events_lost - lost_before == n, "%lu told and %lu lost of %u", times, c1.events_lost - lost_before, n);
	check(c1.violations - c0.violations == n, "%lu violations counted, not %u", c1.violations - c0.violations, n);
	pass_or_fail(test_name);
}
