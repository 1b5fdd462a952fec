/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Watched stores: each is carried out, once, and told. */
#include "guest.h"

extern op_fn op_xchg, op_cmpxchg, op_or, op_bts, op_movnti, op_movsb, op_stosb, op_stosq;

#define OP(n, events, only_user) { #n, op_##n, events, only_user }

static const struct { const char *name; op_fn *fn; u32 events; bool only_user; } ops[] = {
	OP(mov64, 1, false), OP(mov32, 1, false), OP(mov16, 1, false), OP(mov8, 1, false), OP(xadd, 1, false), OP(xchg, 1, false),
	OP(cmpxchg, 1, false), OP(inc, 1, false), OP(or, 1, false), OP(bts, 1, false), OP(movnti, 1, false), OP(movsb, 16, false),
	OP(stosb, 16, false), OP(stosq, 2, false), OP(push, 1, true), OP(movups, 1, true),
};

static u64 seen;

/* So many more violations are counted than at the last call, and not more. */
static void counted(const char *what, u64 n)
{
	u64 want = seen + n;

	for (u64 t = now_ns(); (seen = guard_config().violations) < want && now_ns() - t < 10000000000ull; )
		relax();
	check(seen == want, "%s: %lu accesses were counted, not %lu", what, seen + n - want, n);
}

static void run(op_fn *op, void *va, u64 value, u32 cpl)
{
	trap_of(this_cpu())->count = 0;
	barrier();
	if (cpl)
		run_user(op, va, value, (void *)attack_source(true));
	else
		op(va, value, (void *)attack_source(false));
	barrier();
	check(!trap_of(this_cpu())->count, "a watched store raised exception %lu", trap_of(this_cpu())->vector);
}

static void same(const char *what, u32 cpl, const u8 *page, const u8 *ordinary)
{
	for (u32 i = 0; i < PAGE; i += 8)
		if (!check(*(volatile u64 *)(page + i) == *(volatile u64 *)(ordinary + i),
			   "%s at CPL %u: offset 0x%x holds 0x%lx, on an ordinary page 0x%lx", what, cpl, i,
			   *(volatile u64 *)(page + i), *(volatile u64 *)(ordinary + i)))
			return;
}

static void all_kinds(void)
{
	u8 *page = alloc_lone_page(), *ordinary = alloc_lone_page();
	u8 *user = user_page(page), *ordinary_user = user_page(ordinary);

	must_protect(page, AUDIT(NOWRITE));
	for (u32 i = 0; i < ARRAY_SIZE(ops); i++)
		for (u32 cpl = ops[i].only_user ? 3 : 0; cpl <= 3; cpl += 3) {
			fill(ordinary, i);
			must_protect(page, 0);
			fill(page, i);
			must_protect(page, AUDIT(NOWRITE));
			run(ops[i].fn, (cpl ? ordinary_user : ordinary) + 0x180, SPOIL, cpl);
			check(!intact(ordinary, i), "%s does nothing", ops[i].name);
			run(ops[i].fn, (cpl ? user : page) + 0x180, SPOIL, cpl);
			same(ops[i].name, cpl, page, ordinary);
			counted(ops[i].name, ops[i].events);
		}
}

static void expect_event(const char *what, const void *page, u64 gpa, u64 value, u32 size, u32 action)
{
	struct event e;

	if (!check(next_event_on(page, &e, 10000000000ull), "%s: no event", what))
		return;
	check(e.type == 1 && e.access == A_WRITE && e.source == this_cpu() && e.gpa == gpa && e.times == 1 && e.action == action,
	      "%s: type %u access %u source %u gpa 0x%lx times %u action %u", what, e.type, e.access, e.source, e.gpa, e.times,
	      e.action);
	if (accel == ACCEL_KVM)
		check(e.size == size && e.value == value, "%s: size %u value 0x%lx, not %u and 0x%lx", what, e.size, e.value, size,
		      value);
}

/* Eight bytes over the edge between two pages. */
static void over_the_edge(const char *what, u64 first, u64 second)
{
	u8 *pages = (u8 *)alloc_pages(4) + PAGE, *at = pages + PAGE - 4;
	bool denied[2] = { first & NOWRITE, second & NOWRITE };

	fill(pages, 1);
	fill(pages + PAGE, 2);
	if (first)
		must_protect(pages, first);
	if (second)
		must_protect(pages + PAGE, second);
	trap_of(0)->count = 0;
	barrier();
	op_mov64(at, SPOIL, NULL);
	barrier();
	if (denied[0] || denied[1])
		check_trap(what, 0);
	else
		check(!trap_of(0)->count && *(volatile u64 *)at == SPOIL, "%s: 0x%lx, %lu exceptions", what, *(volatile u64 *)at,
		      trap_of(0)->count);
	for (u32 i = 0; i < 2; i++) {
		if (denied[i]) {
			check(intact(pages + i * PAGE, i + 1), "%s: the denied page has changed", what);
			expect_event(what, pages + i * PAGE, (u64)at + 4 * i, (u32)SPOIL, 4, inject ? ACT_INJECT : ACT_DROP);
			seen++;
		} else if ((i ? second : first) && !(i && (denied[0] || first))) {
			/* One event for an instruction; what comes after a refused part is refused, too. */
			expect_event(what, pages + i * PAGE, (u64)at + 4 * i, (u32)SPOIL, 4, ACT_AUDIT);
			seen++;
		}
		if (i && accel == ACCEL_KVM && denied[0])
			check(intact(pages + PAGE, 2), "%s: the watched page has changed", what);
	}
	counted(what, 0);
}

static void comes_and_goes(void)
{
	u8 *page = alloc_lone_page();
	volatile u64 *word = (u64 *)(page + 0x7f8);

	fill(page, 3);
	must_protect(page, NOWRITE);
	still_locked("denied by PROTECT", page, 3);
	must_protect(page, AUDIT(NOWRITE));
	op_mov64((void *)word, 1, NULL);
	check(*word == 1, "watched after denied: no store lands");
	counted("denied, then watched", 2);
	must_protect(page, 0);
	op_mov64((void *)word, 2, NULL);
	check(*word == 2, "freed after watched: no store lands");
	wait_ns(100000000);
	counted("freed", 0);
	must_protect(page, AUDIT(NOWRITE));
	op_mov64((void *)word, 3, NULL);
	check(*word == 3, "watched again: no store lands");
	counted("watched again", 1);
	fill(page, 4);
	counted("a page of words", PAGE / 8);
	must_lock(page);
	still_locked("locked after watched", page, 4);
	counted("locked after watched", 1);
	check(guard_protect(page, 1, AUDIT(NOWRITE)).status == EPERM, "a locked page can be watched instead");
	still_locked("still locked", page, 4);
	counted("still locked", 1);
}

static volatile u64 *watched, ordinary_flag;

static void stores_in_order(void *arg)
{
	for (u64 i = 1; i <= 300; i++) {
		op_mov64((void *)watched, i, NULL);
		ordinary_flag = i;
		op_xadd((void *)(watched + 1), 1, NULL);
	}
}

static void two_cpus(void)
{
	u64 flag, added = 0;
	u8 *page;

	if (!start_cpus() || n_cpus < 2) {
		diag("one CPU only");
		return;
	}
	page = alloc_lone_page();
	watched = (u64 *)(page + 0x40);
	fill(page, 5);
	watched[0] = watched[1] = watched[2] = 0;
	must_protect(page, AUDIT(NOWRITE));
	seen = guard_config().violations;
	cpu_call(1, stores_in_order, NULL);
	while (cpu_busy(1)) {
		flag = ordinary_flag;
		mb();
		if (!check(*watched >= flag, "after %lu stores in order another CPU reads %lu", flag, *watched))
			break;
		if (added < 300) {
			op_xadd((void *)(watched + 2), 1, NULL);
			added++;
		}
		relax();
	}
	check(watched[0] == 300 && watched[1] == 300, "the other CPU's words are %lu and %lu, not 300", watched[0], watched[1]);
	check(watched[2] == added, "locked additions of this CPU: %lu of %lu", watched[2], added);
	counted("two CPUs", 600 + added);
}

void t_audit(void)
{
	struct event e;
	u32 len;
	u8 *page;

	guard_open();
	need(NOWRITE, NOWRITE);
	seen = guard_config().violations;

	page = alloc_lone_page();
	fill(page, 6);
	must_protect(page, AUDIT(NOWRITE));
	run(op_mov32, page + 0x204, 0x12345678, 0);
	check(*(volatile u32 *)(page + 0x204) == 0x12345678, "a watched store did not land");
	expect_event("mov32", page, (u64)page + 0x204, 0x12345678, 4, ACT_AUDIT);
	counted("mov32", 1);

	over_the_edge("watched|free", AUDIT(NOWRITE), 0);
	over_the_edge("free|watched", 0, AUDIT(NOWRITE));
	over_the_edge("watched|watched", AUDIT(NOWRITE), AUDIT(NOWRITE));
	over_the_edge("watched|denied", AUDIT(NOWRITE), NOWRITE);
	over_the_edge("denied|watched", NOWRITE, AUDIT(NOWRITE));

	if (opt_num("kinds", 1))
		all_kinds();
	while (next_event(&e, &len, 100000000))
		check(e.action == ACT_AUDIT && e.gpa >> 12 != gfn_of(page), "an event with action %u", e.action);
	comes_and_goes();
	two_cpus();
	pass_or_fail(test_name);
}
