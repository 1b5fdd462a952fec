/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* PROTECT, SEAL, QUERY, and accesses that are only watched. */
#include "guest.h"

static void expect(const char *what, struct response r, u32 status, u32 index)
{
	check(r.status == status && r.index == index, "%s: status %u, index 0x%x, not %u, 0x%x", what, r.status, r.index, status,
	      index);
}

static void in_force(const char *what, u32 n)
{
	u32 got = guard_config().ranges_in_force;

	check(got == n, "%s: %u ranges in force, not %u", what, got, n);
}

void t_protect(void)
{
	u8 *base, *a, *b;
	struct config c;
	struct range *r;

	guard_open();
	base = alloc_pages(6);
	a = base + PAGE;
	b = base + 3 * PAGE;
	c = guard_config();
	for (u32 i = 0; i < 3; i++) {
		fill(a, 300 + i);
		must_protect(a, NOWRITE);
		in_force("set", 1);
		still_locked("PROTECT", a, 300 + i);
		refused("from CPL 3", op_mov64, user_page(a), 3, a, 300 + i);
		writable("the page after", a + PAGE);
		must_protect(a, NOWRITE);
		in_force("set twice", 1);
		must_protect(a, 0);
		in_force("taken back", 0);
		writable("taken back", a);
		attempt(op_xadd, a + 0x20, 1, NULL, 0);
		not_faulted("taken back, lock xadd");
	}
	/* A hole in a range, and one range of two. */
	fill(b, 310);
	fill(b + PAGE, 311);
	must_protect(a, 0);
	expect("three pages", guard_protect(b - PAGE, 3, NOWRITE), 0, NO_INDEX);
	in_force("three pages", 1);
	must_protect(b, 0);
	in_force("a hole", 2);
	writable("the hole", b);
	still_locked("beside the hole", b + PAGE, 311);
	must_protect(b, NOWRITE);
	in_force("the hole closed", 1);
	fill(b + 2 * PAGE, 312);

	/* What is locked stays: by itself, in the middle of others, and all or nothing. */
	must_lock(b);
	expect("loosen a locked page", guard_protect(b, 1, 0), EPERM, 0);
	expect("loosen it with others", guard_protect(b - PAGE, 3, 0), EPERM, 0);
	still_locked("nothing was loosened", b + PAGE, 311);
	r = request_buffer()->ranges;
	r[0] = (struct range) { gfn_of(b + PAGE), gfn_of(b + PAGE), 0 };
	r[1] = (struct range) { gfn_of(a), gfn_of(a), NOWRITE };
	r[2] = (struct range) { gfn_of(b) - 1, gfn_of(b) + 1, 0 };
	expect("the third entry", guard_request(PROTECT, 3), EPERM, 2);
	still_locked("nothing was loosened", b + PAGE, 311);
	writable("nothing was set", a);
	/* Last of overlapping entries, and it is as before. */
	r = request_buffer()->ranges;
	r[0] = (struct range) { gfn_of(b), gfn_of(b), 0 };
	r[1] = (struct range) { gfn_of(b), gfn_of(b), NOWRITE };
	expect("the last entry counts", guard_request(PROTECT, 2), 0, NO_INDEX);
	expect("no loosening", guard_protect(b, 1, NOWRITE), 0, NO_INDEX);
	expect("the neighbours are mutable", guard_protect(b + PAGE, 1, 0), 0, NO_INDEX);
	writable("a mutable neighbour", b + PAGE);
	/* A lock that is refused locks nothing. */
	r = request_buffer()->ranges;
	r[0] = (struct range) { gfn_of(a), gfn_of(a), NOWRITE };
	r[1] = (struct range) { 0xfee00, 0xfee00, NOWRITE };
	expect("not RAM", guard_request(PROTECT, 2), EINVAL, 1);
	writable("nothing was set", a);
	check(guard_config().generation == c.generation, "the generation has changed");
	pass_or_fail(test_name);
}

void t_seal(void)
{
	u8 *base, *a, *b;

	guard_open();
	base = alloc_pages(6);
	a = base + PAGE;
	b = base + 3 * PAGE;
	expect("seal nothing", guard_seal(), 0, NO_INDEX);
	fill(a, 320);
	fill(b, 321);
	must_protect(a, NOWRITE);
	expect("seal", guard_seal(), 0, NO_INDEX);
	expect("seal twice", guard_seal(), 0, NO_INDEX);
	expect("loosen what is sealed", guard_protect(a, 1, 0), EPERM, 0);
	still_locked("sealed", a, 320);
	expect("the same again", guard_protect(a, 1, NOWRITE), 0, NO_INDEX);
	/* What comes later is mutable. */
	must_protect(b, NOWRITE);
	still_locked("set after the seal", b, 321);
	must_protect(b, 0);
	writable("set after the seal, and taken back", b);
	still_locked("sealed", a, 320);
	guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
	expect("loosen what is sealed after a device reset", guard_protect(a, 1, 0), EPERM, 0);
	if (guard_config().deny_bits & NOEXEC && guard_config().audit_bits & NOREAD) {
		expect("grow", guard_protect(a, 1, NOWRITE | NOEXEC | AUDIT(NOREAD)), 0, NO_INDEX);
		expect("from watched to denied", guard_protect(a, 1, NOWRITE | NOEXEC | NOREAD), 0, NO_INDEX);
		expect("from denied to watched", guard_protect(a, 1, NOWRITE | NOEXEC | AUDIT(NOREAD)), EPERM, 0);
		expect("from denied to another bit", guard_protect(a, 1, NOWRITE | NOEXEC_KERNEL | NOREAD), EPERM, 0);
	} else {
		diag("only NOWRITE is enforced here");
	}
	pass_or_fail(test_name);
}

static void query_is(const char *what, u64 first, u64 last, const struct range *want, u32 n)
{
	static struct range got[8] __attribute__((aligned(64)));
	u32 used;
	struct response r;

	memset(got, 0xee, sizeof(got));
	r = guard_query(first, last, got, ARRAY_SIZE(got), &used);
	check(r.status == 0 && r.value == n, "%s: status %u, %lu entries, not %u", what, r.status, r.value, n);
	check(used == 16 + n * 24, "%s: used length %u, not %u", what, used, 16 + n * 24);
	for (u32 i = 0; i < n && !failures; i++)
		check(got[i].start == want[i].start && got[i].end == want[i].end && got[i].attr == want[i].attr,
		      "%s: entry %u is 0x%lx-0x%lx 0x%lx, not 0x%lx-0x%lx 0x%lx", what, i, got[i].start, got[i].end, got[i].attr,
		      want[i].start, want[i].end, want[i].attr);
}

void t_query(void)
{
	u64 g = gfn_of(alloc_pages(16)) + 1;
	u8 *p = (u8 *)(g << 12);
	struct range one[1];
	struct response r;
	u32 used;

	guard_open();
	query_is("nothing", g, g + 9, NULL, 0);
	must_protect(p, NOWRITE);
	must_protect(p + PAGE, NOWRITE);
	query_is("one range of two", g, g + 9, (struct range[]) { { g, g + 1, NOWRITE } }, 1);
	query_is("cut to what was asked", g + 1, g + 9, (struct range[]) { { g + 1, g + 1, NOWRITE } }, 1);
	must_lock(p + PAGE);
	must_protect(p + 4 * PAGE, NOWRITE);
	query_is("locked and not", g - 1, g + 9, (struct range[]) {
		{ g, g, NOWRITE }, { g + 1, g + 1, NOWRITE | IMMUTABLE }, { g + 4, g + 4, NOWRITE } }, 3);
	r = guard_query(g, g + 9, one, 1, &used);
	check(r.status == 0 && r.value == 3 && used == 16 + 24, "room for one: status %u, value %lu, used %u", r.status, r.value, used);
	r = guard_query(g, g + 9, one, 0, &used);
	check(r.status == 0 && r.value == 3 && used == 16, "room for none: status %u, value %lu, used %u", r.status, r.value, used);
	if (guard_config().audit_bits & NOREAD) {
		must_protect(p + 4 * PAGE, NOWRITE | AUDIT(NOWRITE | NOREAD));
		query_is("denied, so not watched", g + 2, g + 9, (struct range[]) { { g + 4, g + 4, NOWRITE | AUDIT(NOREAD) } }, 1);
	}
	must_protect(p + 4 * PAGE, 0);
	expect("seal", guard_seal(), 0, NO_INDEX);
	query_is("sealed", g, g + 9, (struct range[]) { { g, g + 1, NOWRITE | IMMUTABLE } }, 1);
	/* Not RAM is no error here. */
	query_is("nowhere", 0xfee00, 0xfeeff, NULL, 0);
	pass_or_fail(test_name);
}

/* How often accesses of this kind are told until there have been `n`, and some time after that. */
static u64 seen(u32 access, u64 n, const u8 *page, u32 *action)
{
	struct event e;
	u64 times = 0;
	u32 len;

	while (next_event(&e, &len, times < n ? 5000000000ull : 30000000ull)) {
		if (e.access == access && e.gpa >> 12 == gfn_of(page)) {
			times += e.times;
			*action = e.action;
		} else {
			check(false, "access %u of gpa 0x%lx, rip 0x%lx, times %u, action %u while waiting for %u", e.access, e.gpa, e.rip,
			      e.times, e.action, access);
		}
	}
	return times;
}

static void counted(const char *what, u32 access, u64 n, const u8 *page)
{
	u32 action = ACT_AUDIT;
	u64 times = seen(access, n, page, &action);

	check(times == n, "%s: told %lu times, not %lu", what, times, n);
	check(action == ACT_AUDIT, "%s: action %u", what, action);
}

/* Several accesses to one place are one event or a few; two kinds of them are told apart. */
static void counted_both(const char *what, u64 reads, u64 writes, const u8 *page)
{
	struct event e;
	u64 r = 0, w = 0;
	u32 len;

	while (next_event(&e, &len, r + w < reads + writes ? 5000000000ull : 30000000ull)) {
		check(e.action == ACT_AUDIT && e.gpa >> 12 == gfn_of(page), "%s: action %u, gpa 0x%lx", what, e.action, e.gpa);
		if (e.access == A_READ)
			r += e.times;
		if (e.access == A_WRITE)
			w += e.times;
	}
	check(r == reads && w == writes, "%s: %lu reads and %lu writes told, not %lu and %lu", what, r, w, reads, writes);
}

void t_watch(void)
{
	static const u8 code[] = { 0xb8, 42, 0, 0, 0, 0xc3 };
	/* movb $43, 1(%rip); mov $42, %eax; ret */
	static const u8 changes_itself[] = { 0xc6, 0x05, 1, 0, 0, 0, 43, 0xb8, 42, 0, 0, 0, 0xc3 };
	u8 *page, *user, *two;
	u32 action = 0;

	guard_open();
	need(DENY_ALL, DENY_ALL);
	page = alloc_lone_page();
	user = user_page(page);
	user_page(page + PAGE);
	for (u32 cpl = 0; cpl <= 3; cpl += 3) {
		u8 *va = cpl ? user : page;
		struct event e;
		u32 len;

		fill(page, 340);
		must_protect(page, AUDIT(NOWRITE));
		attempt(op_mov64, va + 0x48, SPOIL, NULL, cpl);
		check(*(volatile u64 *)(page + 0x48) == SPOIL, "a watched store did not land");
		check(next_event(&e, &len, 5000000000ull) && e.access == A_WRITE && e.action == ACT_AUDIT && e.gpa == (u64)page + 0x48 &&
		      e.gva == (u64)va + 0x48 && e.times == 1 && e.source == 0,
		      "event: access %u, action %u, gpa 0x%lx, gva 0x%lx, times %u", e.access, e.action, e.gpa, e.gva, e.times);
		for (u32 i = 0; i < 50; i++)
			attempt(op_mov64, va + 0x50, i, NULL, cpl);
		counted("50 stores", A_WRITE, 50, page);
		check(*(volatile u64 *)(page + 0x50) == 49, "watched stores did not land");
		for (u32 i = 0; i < 20; i++)
			attempt(op_load, va + 0x50, 0, NULL, cpl);
		for (u32 i = 0; i < 20; i++)
			attempt(op_xadd, va + 0x58, 1, NULL, cpl);
		counted("20 lock xadd, writes watched", A_WRITE, 20, page);
		attempt(op_movups, va + 0x58, SPOIL, NULL, cpl);
		attempt(op_movups, va + 0x58, SPOIL, NULL, cpl);
		counted("2 movups", A_WRITE, 2, page);
		attempt(op_fxsave, va + 0x100, 0, NULL, cpl);
		counted("fxsave", A_WRITE, 1, page);
		attempt(op_set, va + 0x800, 12, NULL, cpl);
		counted("rep stos of 12 bytes", A_WRITE, 12, page);

		must_protect(page, AUDIT(NOREAD));
		for (u32 i = 0; i < 50; i++)
			check(attempt(op_load, va + 0x50, 0, NULL, cpl) == 49, "a watched load gave something else");
		counted("50 loads", A_READ, 50, page);
		for (u32 i = 0; i < 20; i++)
			attempt(op_mov64, va + 0x60, 1, NULL, cpl);
		attempt(op_load128, va + 0x60, 0, NULL, cpl);
		counted("load128", A_READ, 1, page);
		for (u32 i = 0; i < 10; i++) {
			*(volatile u64 *)(page + 0x60) = 5;
			attempt(op_xadd, va + 0x60, 2, NULL, cpl);
		}
		counted("10 lock xadd, reads watched", A_READ, 10, page);
		attempt(op_load, va + PAGE - 3, 0, NULL, cpl);
		counted("a load over the edge", A_READ, 1, page);

		must_protect(page, AUDIT(NOREAD | NOWRITE));
		for (u32 i = 0; i < 10; i++)
			attempt(op_xadd, va + 0x68, 1, NULL, cpl);
		counted_both("10 lock xadd", 10, 10, page);
		for (u32 i = 0; i < 10; i++)
			attempt(op_inc, va + 0x68, 0, NULL, cpl);
		counted_both("10 inc", 10, 10, page);
		attempt(op_xadd, va + 0x6b, 1, NULL, cpl);
		counted_both("lock xadd, not aligned", 1, 1, page);
		attempt(op_cas16, va + 0x70, 0, NULL, cpl);
		counted_both("lock cmpxchg16b", 1, 1, page);

		/* Fetches count when they are looked up. */
		must_protect(page, 0);
		memcpy(page, code, sizeof(code));
		must_protect(page, AUDIT(NOEXEC));
		/* Being in the TLB for something else does not count. */
		attempt(op_load, va + 0x50, 0, NULL, cpl);
		for (u32 i = 0; i < 5; i++) {
			check(call_code(va, 0, cpl) == 42, "watched code does not run");
			invlpg(va);
		}
		counted("code that is looked up 5 times", A_FETCH, 5, page);
		for (u32 i = 0; i < 1000; i++)
			call_code(va, 0, cpl);
		counted("code that runs 1000 times", A_FETCH, 1, page);
		attempt(op_mov64, va + 0x50, 1, NULL, cpl);
		attempt(op_load, va + 0x50, 0, NULL, cpl);
		must_protect(page, AUDIT(NOEXEC_KERNEL));
		check(call_code(va, 0, cpl) == 42, "watched code does not run");
		if (cpl)
			invlpg(va);
		else
			counted("kernel code", A_FETCH, 1, page);

		/* A store into its own code is made once, though the instruction is begun twice. */
		must_protect(page, 0);
		memcpy(page, changes_itself, sizeof(changes_itself));
		must_protect(page, AUDIT(NOWRITE));
		check(call_code(va, 0, cpl) == 43, "code that changes itself");
		counted("code that changes itself", A_WRITE, 1, page);

		/* Mixed: one right denied, one watched. */
		must_protect(page, NOWRITE | AUDIT(NOREAD));
		attempt(op_mov64, va + 0x50, SPOIL, NULL, cpl);
		faulted("a store to a page whose loads are watched", A_WRITE, (u64)va + 0x50, cpl);
		check(seen(A_WRITE, 1, page, &action) == 1 && action == (inject ? ACT_INJECT : ACT_DROP), "action %u", action);
		attempt(op_load, va + 0x50, 0, NULL, cpl);
		counted("a load of a page that cannot be written", A_READ, 1, page);
		must_protect(page, NOREAD | AUDIT(NOWRITE));
		attempt(op_mov64, va + 0x50, SPOIL, NULL, cpl);
		not_faulted("a watched store to a page that cannot be read");
		counted("a store to a page that cannot be read", A_WRITE, 1, page);
		check(attempt(op_load, va + 0x50, 0, NULL, cpl) == 0, "a load from a page that cannot be read");
		faulted("a load from a page whose stores are watched", A_READ, (u64)va + 0x50, cpl);
		check(seen(A_READ, 1, page, &action) == 1 && action == ACT_INJECT, "action %u", action);
		must_protect(page, 0);
		check(*(volatile u64 *)(page + 0x50) == SPOIL, "a watched store did not land");
	}
	/* Over the edge of two watched pages: one for each. */
	two = page + PAGE;
	guard_protect(page, 2, AUDIT(NOWRITE));
	attempt(op_mov64, user + PAGE - 3, SPOIL, NULL, 3);
	{
		struct event e;
		u32 len, n = 0;

		while (next_event(&e, &len, n < 2 ? 5000000000ull : 30000000ull))
			check(e.gpa == (n++ ? (u64)two : (u64)page + PAGE - 3), "gpa 0x%lx", e.gpa);
		check(n == 2, "%u events", n);
	}
	guard_protect(page, 2, 0);
	check(guard_config().events_lost == 0, "%lu events lost", guard_config().events_lost);
	pass_or_fail(test_name);
}
