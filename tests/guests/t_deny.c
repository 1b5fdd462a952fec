/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Every right that can be denied: which accesses are, what fault and what event that makes, and that nothing of them happens. */
#include "guest.h"

static const u8 return_42[] = { 0xb8, 42, 0, 0, 0, 0xc3 };	/* mov $42, %eax; ret */
static u64 violations;		/* that there should have been */
static struct config at_start;

void deny_begin(void)
{
	guard_open();
	need(DENY_ALL, 0);
	at_start = guard_config();
	violations = 0;
}

/* The next event is this one.  rip: 0 if it cannot be known here. */
bool deny_told(const char *what, u32 access, const void *gpa, u64 gva, u64 rip, u32 times)
{
	struct event e;
	u32 len, action = !inject && access == A_WRITE ? ACT_DROP : ACT_INJECT;
	bool ok;

	violations += times;
	if (!check(next_event(&e, &len, 10000000000ull), "%s: no event", what))
		return false;
	ok = check(e.type == 1 && e.access == access, "%s: type %u, access %u, not %u", what, e.type, e.access, access);
	ok &= check(e.source == this_cpu() || n_cpus > 1, "%s: source %u", what, e.source);
	ok &= check(e.gpa == (u64)gpa && e.gva == gva, "%s: gpa 0x%lx gva 0x%lx, not 0x%lx 0x%lx", what, e.gpa, e.gva, (u64)gpa, gva);
	if (rip)
		ok &= check(e.rip == rip, "%s: rip 0x%lx in the event, not 0x%lx", what, e.rip, rip);
	ok &= check(e.action == action, "%s: action %u, not %u", what, e.action, action);
	ok &= check(e.times == times, "%s: %u times, not %u", what, e.times, times);
	return ok;
}

u32 deny_drain(void)
{
	struct event e;
	u32 len, n = 0;

	while (next_event(&e, &len, 100000000ull))
		n += e.times;
	violations += n;
	return n;
}

static u64 trap_rip(void)
{
	return trap_of(0)->count ? trap_of(0)->rip : 0;
}

/* Both: the fault and the event of an attempt just made. */
static void denied(const char *what, u32 access, u64 gva, u32 cpl, const void *gpa)
{
	faulted(what, access, gva, cpl);
	deny_told(what, access, gpa, gva, trap_rip(), 1);
}

/* Nothing was told that should not have been, and nothing twice. */
void deny_end(void)
{
	struct config c;
	struct event e;
	u32 len;

	while (next_event(&e, &len, 100000000ull))
		check(false, "one event more: access %u gpa 0x%lx gva 0x%lx rip 0x%lx times %u action %u", e.access, e.gpa, e.gva, e.rip,
		      e.times, e.action);
	c = guard_config();
	check(c.violations - at_start.violations == violations, "%lu violations counted, not %lu",
	      c.violations - at_start.violations, violations);
	pass_or_fail(test_name);
}

static void nx(bool on)
{
	write_msr(0xc0000080, (read_msr(0xc0000080) & ~0x800ul) | (on ? 0x800 : 0));
}

void t_deny_rights(void)
{
	static char what[] = "deny ? CPL ? access ?";
	u8 *page, *user;

	deny_begin();
	page = alloc_lone_page();
	user = user_page(page);
	for (u32 i = 0; i < 2 * DENY_ALL && !failures; i++) {
		u64 deny = i % DENY_ALL + 1, r;

		nx(i & 1);
		must_protect(page, 0);
		fill(page, 100 + i);
		memcpy(page, return_42, sizeof(return_42));
		/* In the TLB, with all rights that there are. */
		attempt(op_inc, page + 0x200, 0, NULL, 0);
		not_faulted("a free page");
		check(call_code(page, 0, 0) == 42 && call_code(user, 0, 3) == 42, "code on a free page");
		must_protect(page, deny);
		for (u32 cpl = 0; cpl <= 3; cpl += 3) {
			u8 *va = cpl ? user : page;

			what[5] = deny < 10 ? '0' + deny : 'a' + deny - 10;
			what[11] = '0' + cpl;
			what[20] = 'W';
			attempt(op_mov64, va + 0x100 + cpl * 8, SPOIL, NULL, cpl);
			if (deny & NOWRITE)
				denied(what, A_WRITE, (u64)va + 0x100 + cpl * 8, cpl, page + 0x100 + cpl * 8);
			else
				not_faulted(what);
			what[20] = 'R';
			r = attempt(op_load, va + 0x300, 0, NULL, cpl);
			if (deny & NOREAD) {
				denied(what, A_READ, (u64)va + 0x300, cpl, page + 0x300);
				check(r == 0, "%s: a denied load gave 0x%lx", what, r);
			} else {
				not_faulted(what);
				check(r == *(u64 *)(page + 0x300), "%s: a load gave 0x%lx", what, r);
			}
			what[20] = 'X';
			r = call_code(va, 0, cpl);
			if (deny & NOEXEC || (deny & NOEXEC_KERNEL && !cpl)) {
				denied(what, A_FETCH, (u64)va, cpl, page);
				check(r == FETCH_FAULT, "%s: code that was denied returned 0x%lx", what, r);
				check(!trap_of(0)->count || trap_of(0)->rip == (u64)va, "%s: rip 0x%lx", what, trap_of(0)->rip);
			} else {
				not_faulted(what);
				check(r == 42, "%s: code returned 0x%lx", what, r);
			}
		}
		must_protect(page, 0);
		for (u32 cpl = 0; cpl <= 3; cpl += 3) {
			u64 got = *(volatile u64 *)(page + 0x100 + cpl * 8);

			check((got == SPOIL) == !(deny & NOWRITE), "deny 0x%lx: a store at CPL %u left 0x%lx", deny, cpl, got);
		}
		writable("free again", page);
	}
	nx(false);
	deny_end();
}

/* Three views of the same code that begins `before` bytes ahead of the edge; what lies ahead of it on the page stays. */
static void place(u8 *first, u8 *second, u32 before)
{
	for (u32 i = 0; i < sizeof(return_42); i++)
		if (i < before)
			first[PAGE - before + i] = return_42[i];
		else
			second[i - before] = return_42[i];
}

void t_deny_fetch(void)
{
	u8 *base, *p[3];

	deny_begin();
	base = alloc_pages(5);
	for (u32 i = 0; i < 3; i++)
		p[i] = base + (i + 1) * PAGE;
	for (u32 cpl = 0; cpl <= 3; cpl += 3)
		for (u32 kind = 0; kind < 2; kind++) {
			u64 noexec = kind ? NOEXEC_KERNEL : NOEXEC, flags = F_P | F_W | (cpl ? F_U : 0);
			bool deny = !(kind && cpl);
			/* One after the other for the CPU, not in memory. */
			u8 *va = map_page((u64)p[0], flags);

			map_page((u64)p[2], flags);
			if (failures)
				break;
			for (u32 before = 1; before < 5; before++) {
				u8 *at = va + PAGE - before;

				place(p[0], p[2], before);
				check(call_code(at, 0, cpl) == 42, "code over the edge does not run");
				must_protect(p[2], noexec);
				if (deny) {
					check(call_code(at, 0, cpl) == FETCH_FAULT, "code that ends on a denied page has run");
					check(trap_of(0)->rip == (u64)at, "rip 0x%lx, the instruction is at 0x%lx", trap_of(0)->rip, (u64)at);
					denied("the end of an instruction", A_FETCH, (u64)va + PAGE, cpl, p[2]);
				} else {
					check(call_code(at, 0, cpl) == 42, "CPL 3 cannot run what the kernel may not");
				}
				must_protect(p[2], 0);
				must_protect(p[0], noexec);
				if (deny) {
					check(call_code(at, 0, cpl) == FETCH_FAULT, "code that begins on a denied page has run");
					denied("the beginning of an instruction", A_FETCH, (u64)at, cpl, p[0] + PAGE - before);
				} else {
					check(call_code(at, 0, cpl) == 42, "CPL 3 cannot run what the kernel may not");
				}
				must_protect(p[0], 0);
				check(call_code(at, 0, cpl) == 42, "code on pages that are free again does not run");
			}
			/* The edge between two instructions: the first one is carried out. */
			place(p[0], p[2], 5);
			must_protect(p[2], noexec);
			if (deny) {
				check(call_code(va + PAGE - 5, 0, cpl) == FETCH_FAULT, "a ret on a denied page has run");
				check(trap_of(0)->rip == (u64)va + PAGE, "rip 0x%lx, not the second instruction", trap_of(0)->rip);
				denied("the second instruction", A_FETCH, (u64)va + PAGE, cpl, p[2]);
			}
			/* Execute-only, over the edge. */
			place(p[0], p[2], 3);
			must_protect(p[2], NOREAD | NOWRITE);
			must_protect(p[0], NOREAD | NOWRITE);
			check(call_code(va + PAGE - 3, 0, cpl) == 42, "execute-only code does not run");
			must_protect(p[2], 0);
			must_protect(p[0], 0);
		}
	deny_end();
}

static const struct cross {
	const char *name;
	op_fn *op;
	u32 access, before;
} crosses[] = {
	{ "mov64", op_mov64, A_WRITE, 4 }, { "mov64 by a byte", op_mov64, A_WRITE, 1 },
	{ "mov16", op_mov16, A_WRITE, 1 }, { "movups", op_movups, A_WRITE, 8 },
	{ "movups by a byte", op_movups, A_WRITE, 15 }, { "movups by 3", op_movups, A_WRITE, 3 },
	{ "fstpt by 3", op_fstp80, A_WRITE, 3 }, { "fstpt by 9", op_fstp80, A_WRITE, 9 },
	{ "fxsave", op_fxsave, A_WRITE, 256 }, { "vmovdqu", op_mov256, A_WRITE, 16 }, { "vmovdqu by 3", op_mov256, A_WRITE, 3 },
	{ "load", op_load, A_READ, 4 }, { "load128", op_load128, A_READ, 8 },
	{ "load128 by a byte", op_load128, A_READ, 1 }, { "fldt", op_fld80, A_READ, 3 },
	{ "fldt by 9", op_fld80, A_READ, 9 },
};

void t_deny_cross(void)
{
	u8 *base, *p[3];
	bool avx;

	deny_begin();
	base = alloc_pages(5);
	for (u32 i = 0; i < 3; i++)
		p[i] = base + (i + 1) * PAGE;
	avx = start_avx();
	for (u32 i = 0; i < ARRAY_SIZE(crosses) && !failures; i++)
		for (u32 half = 0; half < 3; half++) {
			const struct cross *c = &crosses[i];
			u64 deny = c->access == A_WRITE ? NOWRITE : NOREAD;
			u8 *va = user_page(p[0]), *at = va + PAGE - c->before, *lock = half == 1 ? p[2] : half ? p[1] : p[0];

			if (c->op == op_mov256 && !avx)
				continue;
			user_page(p[2]);
			for (u32 j = 0; j < 3; j++)
				fill(p[j], 200 + j);
			must_protect(lock, deny);
			attempt(c->op, at, SPOIL, NULL, 3);
			if (half == 2) {
				/* What is denied lies next in memory, but not next for the CPU. */
				not_faulted(c->name);
			} else {
				denied(c->name, c->access, half ? (u64)va + PAGE : (u64)at, 3, half ? p[2] : p[0] + PAGE - c->before);
			}
			must_protect(lock, 0);
			if (c->access == A_WRITE && half == 2)
				check(!intact(p[0], 200) && !intact(p[2], 202), "%s has not landed on both pages", c->name);
			check(intact(lock, 200 + (lock - p[0]) / PAGE), "%s changed the denied page", c->name);
			if (half < 2)
				check(intact(p[0], 200) && intact(p[2], 202), "%s: a part of it has landed", c->name);
		}
	deny_end();
}

/* movb $43, 1(%rip); mov $42, %eax; ret */
static const u8 changes_itself[] = { 0xc6, 0x05, 1, 0, 0, 0, 43, 0xb8, 42, 0, 0, 0, 0xc3 };

void t_deny_smc(void)
{
	u8 *page, *user;

	deny_begin();
	page = alloc_lone_page();
	user = user_page(page);
	for (u32 cpl = 0; cpl <= 3; cpl += 3)
		for (u32 i = 0; i < 4; i++) {
			static const u64 attr[] = { 0, NOREAD, NOWRITE, NOWRITE | NOREAD };
			u8 *va = cpl ? user : page;
			u64 r;

			must_protect(page, 0);
			memcpy(page, changes_itself, sizeof(changes_itself));
			must_protect(page, attr[i]);
			r = call_code(va, 0, cpl);
			if (!(attr[i] & NOWRITE)) {
				not_faulted("code that changes itself");
				check(r == 43, "attributes 0x%lx: code that changed itself returned %lu", attr[i], r);
			} else {
				check(r == (inject ? FETCH_FAULT : 42), "attributes 0x%lx: code that may not returned 0x%lx", attr[i], r);
				denied("code that may not change itself", A_WRITE, (u64)va + 8, cpl, page + 8);
			}
			must_protect(page, 0);
			check(page[8] == (attr[i] & NOWRITE ? 42 : 43), "attributes 0x%lx: the code has become %u", attr[i], page[8]);
			/* It is no longer code when another store changes it. */
			page[8] = 44;
			must_protect(page, NOEXEC | NOREAD);
			check(call_code(va + 7, 0, cpl) == FETCH_FAULT, "denied code has run");
			denied("changed code", A_FETCH, (u64)va + 7, cpl, page + 7);
			must_protect(page, NOREAD);
			check(call_code(va + 7, 0, cpl) == 44, "changed code is not what runs");
		}
	deny_end();
}

static bool bytes(const u8 *p, u32 n, u8 v)
{
	for (u32 i = 0; i < n; i++)
		if (p[i] != v)
			return false;
	return true;
}

void t_deny_rep(void)
{
	u8 *base, *a, *b, *source;

	deny_begin();
	base = alloc_pages(4);
	a = base + PAGE;
	b = base + 2 * PAGE;
	source = alloc_pages(1);
	memset(source, 0x5a, PAGE);
	for (u32 cpl = 0; cpl <= 3; cpl += 3) {
		u8 *va = map_page((u64)a, F_P | F_W | F_U), *vs;
		u64 left;

		map_page((u64)b, F_P | F_W | F_U);
		vs = map_page((u64)source, F_P | F_W | F_U);
		for (u32 i = 0; i < 2; i++) {
			memset(a, 0, PAGE);
			fill(b, 210);
			must_protect(b, NOWRITE);
			left = attempt(i ? op_copy : op_set, va + PAGE - 100, 200, vs, cpl);
			if (inject) {
				check(left == 100, "rep %s: %lu bytes left, not 100", i ? "movs" : "stos", left);
				denied("rep to a denied page", A_WRITE, (u64)va + PAGE, cpl, b);
			} else {
				struct event e;

				not_faulted("rep to a denied page");
				check(left == 0, "rep %s: %lu bytes left, not 0", i ? "movs" : "stos", left);
				while (next_event_on(b, &e, 100000000ull))
					;
				violations += 100;
			}
			check(bytes(a + PAGE - 100, 100, 0x5a) && bytes(a, PAGE - 100, 0), "rep did not get as far as the edge");
			check(intact(b, 210), "rep changed the denied page");
			must_protect(b, 0);
		}
		memset(a, 0x5a, PAGE);
		memset(b, 0x77, PAGE);
		memset(source, 0, PAGE);
		must_protect(b, NOREAD);
		left = attempt(op_copy, vs, 200, va + PAGE - 100, cpl);
		check(left == 100, "rep movs from: %lu bytes left, not 100", left);
		denied("rep from a denied page", A_READ, (u64)va + PAGE, cpl, b);
		check(bytes(source, 100, 0x5a) && bytes(source + 100, PAGE - 100, 0), "rep movs did not read as far as the edge");
		left = attempt(op_scan, va + PAGE - 100, 200, NULL, cpl);
		check(left == 100, "rep lods: %lu bytes left, not 100", left);
		denied("rep lods", A_READ, (u64)va + PAGE, cpl, b);
		must_protect(b, 0);
		memset(source, 0x5a, PAGE);
	}
	deny_end();
}

void t_deny_walk(void)
{
	bool was_inject = inject;
	u64 *table;
	u8 *data, *va;

	deny_begin();
	table = memset(alloc_lone_page(), 0, PAGE);
	data = alloc_lone_page();
	fill(data, 220);
	memcpy(data, return_42, sizeof(return_42));
	va = map_through(table, (u64)data);

	must_protect(table, NOWRITE);
	check(attempt(op_load, va + 0x80, 0, NULL, 0) == *(u64 *)(data + 0x80), "a load through a table that cannot be written");
	not_faulted("a load through a table that cannot be written");
	attempt(op_mov64, va + 0x100, SPOIL, NULL, 0);
	not_faulted("a store through a table that cannot be written");
	check(*(volatile u64 *)(data + 0x100) == SPOIL, "a store through a table that cannot be written has not landed");
	check(call_code(va, 0, 0) == 42, "code through a table that cannot be written");
	check(table[0] == ((u64)data | F_P | F_W), "the MMU has changed a table that cannot be written: 0x%lx", table[0]);

	/* Not walked: a load is denied that no instruction makes, and so faults whatever the policy. */
	must_protect(table, NOREAD);
	inject = true;
	check(attempt(op_load, va + 0x80, 0, NULL, 0) == 0, "a load through a table that cannot be read");
	faulted("a load through a table that cannot be read", A_READ, (u64)va + 0x80, 0);
	deny_told("a load through a table that cannot be read", A_READ, table, (u64)va + 0x80, trap_rip(), 1);
	attempt(op_mov64, va + 0x108, SPOIL, NULL, 0);
	faulted("a store through a table that cannot be read", A_WRITE, (u64)va + 0x108, 0);
	deny_told("a store through a table that cannot be read", A_READ, table, (u64)va + 0x108, trap_rip(), 1);
	check(call_code(va, 0, 0) == FETCH_FAULT, "code through a table that cannot be read");
	faulted("code through a table that cannot be read", A_FETCH, (u64)va, 0);
	deny_told("code through a table that cannot be read", A_READ, table, (u64)va, trap_rip(), 1);
	attempt(op_load, va + 0x80, 0, NULL, 3);
	faulted("a load at CPL 3 through a table that cannot be read", A_READ, (u64)va + 0x80, 3);
	deny_told("a load at CPL 3 through a table that cannot be read", A_READ, table, (u64)va + 0x80, trap_rip(), 1);
	inject = was_inject;

	must_protect(table, NOREAD | NOWRITE);
	attempt(op_load, va + 0x80, 0, NULL, 0);
	faulted("a load through a table that can be neither read nor written", A_READ, (u64)va + 0x80, 0);
	deny_told("a load through a table that can be neither read nor written", A_READ, table, (u64)va + 0x80, trap_rip(), 1);

	must_protect(table, 0);
	check(table[0] == ((u64)data | F_P | F_W), "the MMU has changed a table that was denied: 0x%lx", table[0]);
	check(*(volatile u64 *)(data + 0x108) != SPOIL, "a store through a table that cannot be read has landed");
	attempt(op_mov64, va + 0x110, SPOIL, NULL, 0);
	not_faulted("a store through a table that is free again");
	check((table[0] & 0x60) == 0x60, "accessed and dirty are not set in a table that is free again: 0x%lx", table[0]);
	/* Watching concerns instructions, not the MMU. */
	table[0] &= ~0x60ull;
	must_protect(table, AUDIT(NOREAD | NOWRITE));
	attempt(op_mov64, va + 0x118, SPOIL, NULL, 0);
	not_faulted("a store through a watched table");
	must_protect(table, 0);
	check((table[0] & 0x60) == 0x60, "accessed and dirty are not set in a watched table: 0x%lx", table[0]);
	deny_end();
}

/*
 * An #UD at CPL 3 finds no stack: the push faults, and so does that of the fault's own delivery, which makes a #DF.  (#UD is
 * benign, #GP and #PF are not.)
 */
void t_deny_push(void)
{
	/* Of this CPU's stacks, below the one for exceptions and above that for #DF. */
	u8 *page = stacks + STACK_SIZE / 4;
	u32 vector, times = 0, len;
	u64 top = (u64)page + PAGE;
	struct event e;

	deny_begin();
	if (!inject)
		skip("a frame that is dropped leaves nothing to return to");
	fill(page, 230);
	write_cr2(0x1000);
	run_user_stack(top, &vector);
	check(vector == 6 && !intact(page, 230), "the exception does not use the stack: vector %u", vector);
	fill(page, 230);
	must_protect(page, NOWRITE);
	write_cr2(0x1000);
	check(run_user_stack(top, &vector) == FETCH_FAULT && vector == 8, "vector %u, not #DF", vector);
	check(trap_of(0)->error == 0 && trap_of(0)->cpl == 3, "#DF: error 0x%lx, CPL %lu", trap_of(0)->error, trap_of(0)->cpl);
	check(trap_of(0)->cr2 == (page_faults ? top - 8 : 0x1000), "#DF: CR2 0x%lx", trap_of(0)->cr2);
	while (times < 2 && check(next_event(&e, &len, 5000000000ull), "%u events, not 2", times)) {
		check(e.access == A_WRITE && e.gpa == top - 8 && e.gva == top - 8 && e.rip == trap_of(0)->rip && e.action == ACT_INJECT,
		      "access %u, gpa 0x%lx, gva 0x%lx, rip 0x%lx, action %u", e.access, e.gpa, e.gva, e.rip, e.action);
		times += e.times;
	}
	violations += 2;
	check(intact(page, 230), "exception delivery changed the denied page");
	must_protect(page, 0);
	run_user_stack(top, &vector);
	check(vector == 6, "vector %u when the stack is free again", vector);
	deny_end();
}

void t_deny_atomic(void)
{
	static const struct { const char *name; op_fn *op; u32 at; } rmw[] = {
		{ "inc", op_inc, 0x80 }, { "lock xadd", op_xadd, 0x80 }, { "lock xadd, not aligned", op_xadd, 0x83 },
		{ "lock cmpxchg16b", op_cas16, 0x80 },
	};
	u8 *page, *user;

	deny_begin();
	page = alloc_lone_page();
	user = user_page(page);
	user_page(page + PAGE);
	for (u32 i = 0; i < ARRAY_SIZE(rmw); i++)
		for (u32 cpl = 0; cpl <= 3; cpl += 3) {
			u8 *at = (cpl ? user : page) + rmw[i].at;

			fill(page, 240);
			must_protect(page, NOWRITE);
			attempt(rmw[i].op, at, SPOIL, NULL, cpl);
			denied(rmw[i].name, A_WRITE, (u64)at, cpl, page + rmw[i].at);
			check(intact(page, 240), "%s changed a page that cannot be written", rmw[i].name);
			must_protect(page, NOREAD);
			attempt(rmw[i].op, at, SPOIL, NULL, cpl);
			denied(rmw[i].name, A_READ, (u64)at, cpl, page + rmw[i].at);
			must_protect(page, 0);
			check(intact(page, 240), "%s changed a page that cannot be read", rmw[i].name);
			attempt(rmw[i].op, at, SPOIL, NULL, cpl);
			not_faulted(rmw[i].name);
		}
	/* Over the edge, out of the free page and into it. */
	fill(page, 241);
	fill(page + PAGE, 242);
	must_protect(page + PAGE, NOWRITE);
	attempt(op_xadd, user + PAGE - 3, SPOIL, NULL, 3);
	denied("lock xadd into a denied page", A_WRITE, (u64)user + PAGE, 3, page + PAGE);
	check(intact(page, 241) && intact(page + PAGE, 242), "half of a lock xadd has landed");
	must_protect(page + PAGE, NOREAD);
	attempt(op_xadd, user + PAGE - 3, SPOIL, NULL, 3);
	denied("lock xadd from a denied page", A_READ, (u64)user + PAGE, 3, page + PAGE);
	must_protect(page + PAGE, 0);
	check(intact(page, 241) && intact(page + PAGE, 242), "half of a lock xadd has landed");
	deny_end();
}

/* 1: incq (%rdi); cmpq $0, 8(%rdi); je 1b; ret */
static const u8 loop[] = { 0x48, 0xff, 7, 0x48, 0x83, 0x7f, 8, 0, 0x74, 0xf6, 0xc3 };
static struct race spin __attribute__((aligned(4096)));
static void *spin_user;
static struct { void *code; u32 cpl; u64 result; } runner;

static void run_loop(void *arg)
{
	runner.result = call_code(runner.code, runner.cpl ? (u64)spin_user : (u64)&spin, runner.cpl);
}

static bool reaches(volatile u64 *word, u64 value)
{
	for (u64 t = now_ns(); *word < value; relax())
		if (now_ns() - t > 5000000000ull)
			return false;
	return true;
}

static bool ends(u32 cpu)
{
	for (u64 t = now_ns(); cpu_busy(cpu); relax())
		if (now_ns() - t > 5000000000ull)
			return false;
	return true;
}

void t_deny_running(void)
{
	u8 *base, *p[2];

	deny_begin();
	if (!start_cpus() || n_cpus < 2)
		skip("needs -smp 2");
	spin_user = user_page(&spin);
	base = alloc_pages(4);
	p[0] = base + PAGE;
	p[1] = base + 2 * PAGE;
	for (u32 i = 0; i < 24 && !failures; i++) {
		/* All of it on one page; the first instruction over the edge; the jump on the second page. */
		static const u32 before[] = { 100, 2, 8 };
		u32 b = before[i % 3], kind = i / 3 % 2, cpl = i / 6 % 2 ? 3 : 0;
		bool first = b == 100 || i >= 12;
		u8 *denied_page = first ? p[0] : p[1], *va = map_page((u64)p[0], F_P | F_W | (cpl ? F_U : 0)), *code = va + PAGE - b;
		u64 seen;

		map_page((u64)p[1], F_P | F_W | (cpl ? F_U : 0));
		for (u32 j = 0; j < sizeof(loop); j++)
			*(j < b ? p[0] + PAGE - b + j : p[1] + j - b) = loop[j];
		spin.tries = spin.stop = 0;
		runner.code = code;
		runner.cpl = cpl;
		cpu_call(1, run_loop, NULL);
		if (!reaches(&spin.tries, 1000))
			fail("the loop does not run");
		must_protect(denied_page, kind ? NOEXEC_KERNEL : NOEXEC);
		mb();
		seen = spin.tries;
		if (kind && cpl) {
			check(reaches(&spin.tries, seen + 1000), "CPL 3 does not go on where only the kernel may not");
			spin.stop = 1;
			check(ends(1) && !trap_of(1)->count, "CPL 3 was stopped");
		} else {
			wait_ns(5000000);
			check(spin.tries == seen, "the loop went on after OK, from %lu to %lu", seen, spin.tries);
			if (!check(ends(1), "the loop was not stopped"))
				break;
			check(runner.result == FETCH_FAULT && trap_of(1)->count == 1, "%lu faults", trap_of(1)->count);
			{
				struct event e;
				u32 len;

				violations++;
				check(next_event(&e, &len, 5000000000ull) && e.access == A_FETCH && e.source == 1 && e.times == 1 &&
				      e.rip == trap_of(1)->rip && e.gpa >> 12 == gfn_of(denied_page),
				      "event: access %u, source %u, rip 0x%lx (0x%lx), gpa 0x%lx", e.access, e.source, e.rip, trap_of(1)->rip, e.gpa);
			}
		}
		must_protect(denied_page, 0);
	}
	deny_end();
}

static void add_up(void *word)
{
	op_race_xadd(word, (u64)&spin, NULL);
}

/* Rights that come and go while another CPU needs them; nothing to see but that all is well in the end. */
void t_deny_toggle(void)
{
	static const u64 attr[] = { NOREAD, 0, NOWRITE, NOREAD | NOWRITE, 0, AUDIT(NOREAD), NOREAD, AUDIT(NOREAD | NOWRITE), NOEXEC };
	u32 rounds = opt_num("rounds", 1000);
	u64 seen, tries;
	volatile u64 *word;

	deny_begin();
	need(DENY_ALL, DENY_ALL);
	if (!start_cpus() || n_cpus < 2)
		skip("needs -smp 2");
	/* Nobody takes the events. */
	guard_start(F_VERSION_1 | F_GUARD, false, NULL, NULL);
	word = (u64 *)((u8 *)alloc_lone_page() + 0x40);
	*word = 0;
	spin.tries = spin.stop = 0;
	cpu_call(1, add_up, (void *)word);
	check(reaches(&spin.tries, 1000), "the other CPU does not run");
	for (u32 i = 0; i < rounds && !failures; i++)
		must_protect((void *)((u64)word & -PAGE), attr[i % ARRAY_SIZE(attr)]);
	must_protect((void *)((u64)word & -PAGE), 0);
	seen = *word;
	tries = spin.tries;
	check(reaches(&spin.tries, tries + 1000), "the other CPU does not go on");
	spin.stop = 1;
	check(ends(1), "the other CPU does not stop");
	check(*word >= seen + 1000, "free again, and yet the word went from %lu to %lu only", seen, *word);
	check(*word + trap_of(1)->count == spin.tries || !inject, "%lu additions and %lu faults are not %lu tries", *word,
	      trap_of(1)->count, spin.tries);
	diag("%lu tries, %lu of them refused", spin.tries, trap_of(1)->count);
	pass_or_fail(test_name);
}
