/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Stores that must not land: the table of them, and the proof that each was refused as the policy says. */
#include "guest.h"

#define OP(n, bytes, only_user) { #n, op_##n, bytes, only_user }

extern op_fn op_xadd, op_xchg, op_cmpxchg, op_inc, op_or, op_bts, op_movnti, op_movsb, op_stosb, op_stosq;

static const struct op {
	const char *name;
	op_fn *fn;
	u32 bytes;
	bool only_user;
} ops[] = {
	OP(mov64, 8, false), OP(mov32, 4, false), OP(mov16, 2, false), OP(mov8, 1, false), OP(xadd, 8, false),
	OP(xchg, 8, false), OP(cmpxchg, 8, false), OP(inc, 8, false), OP(or, 8, false), OP(bts, 8, false),
	OP(movnti, 8, false), OP(movsb, 16, false), OP(stosb, 16, false), OP(stosq, 16, false), OP(push, 8, true),
	OP(movups, 16, true),
};

static u64 mix(u64 seed, u64 i)
{
	/* No value that an attack writes, and bits clear for `or` and `bts` to set. */
	return (seed * 0x9e3779b97f4a7c15ull + i * 0x100000001b3ull) & 0x7fff7fff7fff7fffull;
}

void fill(void *page, u64 seed)
{
	u64 *p = page;

	for (u32 i = 0; i < PAGE / 8; i++)
		p[i] = mix(seed, i);
}

bool intact(const void *page, u64 seed)
{
	const volatile u64 *p = page;

	for (u32 i = 0; i < PAGE / 8; i++)
		if (p[i] != mix(seed, i)) {
			diag("gpa 0x%lx holds 0x%lx, not 0x%lx", (u64)(p + i), p[i], mix(seed, i));
			return false;
		}
	return true;
}

u64 attack_source(bool user)
{
	static u64 source[2] __attribute__((aligned(4096))) = { SPOIL, SPOIL };
	static void *seen_by_user;

	if (user && !seen_by_user)
		seen_by_user = map_page((u64)source, F_P | F_U);
	return user ? (u64)seen_by_user : (u64)source;
}

/* What a refused store must have raised on this CPU; count is reset before the store. */
void check_trap(const char *what, u32 cpl)
{
	struct trap *t = trap_of(this_cpu());

	if (!inject) {
		check(!t->count, "%s: exception %lu although the policy is drop", what, t->vector);
		return;
	}
	if (!check(t->count == 1, "%s: %lu exceptions, not 1", what, t->count))
		return;
	check(t->cpl == cpl, "%s: exception at CPL %lu", what, t->cpl);
	if (page_faults)
		check(t->vector == 14 && t->error == (cpl ? 7 : 3), "%s: exception %lu error 0x%lx, not #PF", what, t->vector, t->error);
	else
		check(t->vector == 13 && t->error == 0, "%s: exception %lu error 0x%lx, not #GP(0)", what, t->vector, t->error);
	if (accel == ACCEL_TCG)
		check(t->rip == t->start, "%s: rip 0x%lx, not at the store 0x%lx", what, t->rip, t->start);
	else
		/* A rep store traps per element, with RIP still on it. */
		check(t->rip == t->end || t->rip == t->start, "%s: rip 0x%lx, store is 0x%lx-0x%lx", what, t->rip, t->start,
		      t->end);
}

#define CR2_BEFORE	0x123456789000ull

u64 attempt(op_fn *op, void *va, u64 value, const void *source, u32 cpl)
{
	u64 r;

	trap_of(this_cpu())->count = 0;
	write_cr2(CR2_BEFORE);
	barrier();
	r = cpl ? run_user(op, va, value, source) : op(va, value, source);
	barrier();
	return r;
}

bool not_faulted(const char *what)
{
	struct trap *t = trap_of(this_cpu());

	return check(!t->count, "%s: exception %lu, error 0x%lx", what, t->vector, t->error);
}

bool faulted(const char *what, u32 access, u64 gva, u32 cpl)
{
	struct trap *t = trap_of(this_cpu());
	u64 error = 0, cr2 = CR2_BEFORE, vector = 13;

	if (!inject && access == A_WRITE)
		return not_faulted(what);
	if (page_faults) {
		vector = 14;
		cr2 = gva;
		/* I/D only where something can be not executable: EFER.NXE (CR4.SMEP is off). */
		error = 1 | (access == A_WRITE ? 2 : 0) | (cpl ? 4 : 0) |
			(access == A_FETCH && (read_msr(0xc0000080) & 0x800) ? 16 : 0);
	}
	if (!check(t->count == 1, "%s: %lu exceptions, not 1", what, t->count))
		return false;
	return check(t->cpl == cpl, "%s: exception at CPL %lu", what, t->cpl) &
	       check(t->vector == vector && t->error == error, "%s: exception %lu error 0x%lx, not %lu 0x%lx", what, t->vector,
		     t->error, vector, error) &
	       check(t->cr2 == cr2, "%s: CR2 0x%lx, not 0x%lx", what, t->cr2, cr2) &
	       check(t->rip == t->start, "%s: rip 0x%lx, not 0x%lx", what, t->rip, t->start);
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
}

bool refused(const char *what, op_fn *op, void *va, u32 cpl, const void *page, u64 seed)
{
	u32 before = failures;

	run(op, va, SPOIL, cpl);
	check_trap(what, cpl);
	check(intact(page, seed), "%s at CPL %u changed the locked page 0x%lx", what, cpl, (u64)page);
	return failures == before;
}

/* `page` is the locked page (identity mapped), `va` an address at least 16 bytes from its end that maps into it. */
bool refused_by_all(const char *what, void *va, u32 cpl, const void *page, u64 seed)
{
	u32 before = failures;

	for (u32 i = 0; i < ARRAY_SIZE(ops); i++) {
		if (ops[i].only_user && !cpl)
			continue;
		if (!refused(ops[i].name, ops[i].fn, va, cpl, page, seed))
			diag("that was %s with %s", what, ops[i].name);
	}
	return failures == before;
}

bool still_locked(const char *what, void *page, u64 seed)
{
	return refused(what, op_mov64, (u8 *)page + 0x7f8, 0, page, seed);
}

bool writable(const char *what, void *page)
{
	volatile u64 *word = (u64 *)((u8 *)page + 0x10);
	u64 old = *word, new = old ^ SPOIL;
	bool ok;

	trap_of(this_cpu())->count = 0;
	barrier();
	op_mov64((void *)word, new, NULL);
	ok = check(!trap_of(this_cpu())->count, "%s: exception %lu on the unlocked page 0x%lx", what,
		   trap_of(this_cpu())->vector, (u64)page) &&
	     check(*word == new, "%s: a store to the unlocked page 0x%lx did not land", what, (u64)page);
	op_mov64((void *)word, old, NULL);
	return ok;
}
