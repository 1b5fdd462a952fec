/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Stores by instructions that KVM's emulator lacks, so that KVM can only say that it failed.  They go to a locked page, and the
 * policy decides as for any other store; or to a watched page, and go through.
 *
 * Where CPL 0 is interpreted by that same emulator these instructions do not run there at all: refusing them can be tried
 * (the default; cpl0=0 leaves it out), having them go through cannot (cpl0=1 where the CPU runs CPL 0 itself).
 */
#include "guest.h"

#define OP(name, insn)					\
	asm(".pushsection .user, \"ax\"\n"		\
	    ".balign 16\n"				\
	    ".globl op_" #name "\n"			\
	    "op_" #name ":\n"				\
	    insn					\
	    "ret\n"					\
	    ".popsection");				\
	extern op_fn op_##name
#define TRY(insn)					\
	    "771: " insn "\n"				\
	    "772:\n"					\
	    ".pushsection .extable, \"a\"\n"		\
	    ".quad 771b, 772b\n"			\
	    ".popsection\n"

OP(e_cx16, "pushq %rbx\n movq (%rdi), %rax\n movq 8(%rdi), %rdx\n movq %rsi, %rbx\n movq %rsi, %rcx\n"
	   TRY("lock cmpxchg16b (%rdi)")
	   "popq %rbx\n");
OP(e_fxsave, TRY("fxsave (%rdi)"));
OP(e_fxsave_sib, "movl $4, %ecx\n" TRY("fxsave64 -0x200(%rdi,%rcx,8)"));
OP(e_fistp, TRY("fistpll (%rdi)"));
OP(e_fstp80, TRY("fstpt 0x7(%rdi)"));
OP(e_fnstenv, TRY("fnstenv -0x40(%rdi)"));
OP(e_pextrb, TRY("pextrb $3, %xmm0, 0x11(%rdi)"));
OP(e_maskmov, "pcmpeqd %xmm1, %xmm1\n" TRY("maskmovdqu %xmm1, %xmm0"));
OP(e_vmovdqu, TRY("vmovdqu %ymm0, 0x21(%rdi)"));
OP(e_xsave, "movl $7, %eax\n xorl %edx, %edx\n" TRY("xsave (%rdi)"));
/* Not stores: registers that the others store. */
OP(e_fpu, "fninit\n fld1\n movq %rsi, %xmm0\n");

#define AVX	1
#define FIP	2	/* stores where the last x87 instruction was, which an exit may change */

static const struct { const char *name; op_fn *fn; int at; u32 flags; } cases[] = {
	{ "cmpxchg16b", op_e_cx16, 0, 0 }, { "fxsave", op_e_fxsave, 0, 0 }, { "fxsave64 with SIB", op_e_fxsave_sib, 32 - 0x200, 0 },
	{ "fistp", op_e_fistp, 0, 0 }, { "fstp m80", op_e_fstp80, 7, 0 }, { "fnstenv", op_e_fnstenv, -0x40, FIP },
	{ "pextrb", op_e_pextrb, 0x11, 0 }, { "maskmovdqu", op_e_maskmov, 0, 0 }, { "vmovdqu", op_e_vmovdqu, 0x21, AVX },
	{ "xsave", op_e_xsave, 0, AVX },
};

static u64 avx;

static void set_up(void)
{
	avx = opt_num("avx", 0);
	if (avx) {
		u32 a = 1, b, c, d, lo = 7;
		u64 cr4;

		asm volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d) : "c"(0));
		if ((c >> 26 & 5) != 5)
			fail("avx=1, and CPUID 1 has ECX 0x%x", c);
		asm volatile("movq %%cr4, %0" : "=r"(cr4));
		asm volatile("movq %0, %%cr4" :: "r"(cr4 | 1 << 18));
		asm volatile("xsetbv" :: "a"(lo), "d"(0), "c"(0));
	}
}

/* Registers to be stored.  They stay as they are on the way from CPL 3, where any KVM runs this. */
static void fpu(void)
{
	run_user(op_e_fpu, NULL, SPOIL, NULL);
	trap_of(0)->count = 0;
	barrier();
}

static void refused_at(u32 i, u8 *page, u8 *va, u32 cpl)
{
	const char *name = cases[i].name;
	struct trap *t = trap_of(0);
	struct event e;
	u64 first = (u64)va + cases[i].at, rip;

	fpu();
	diag("%s at CPL %u", name, cpl);
	if (cpl)
		run_user(cases[i].fn, va, SPOIL, NULL);
	else
		cases[i].fn(va, SPOIL, NULL);
	barrier();
	check_trap(name, cpl);
	if (inject)
		check(t->rip == t->start, "%s: rip 0x%lx, not at the store 0x%lx", name, t->rip, t->start);
	rip = t->start;
	check(intact(page, 12), "%s at CPL %u changed the locked page", name, cpl);
	if (!check(next_event_on(page, &e, 10000000000ull), "%s at CPL %u: no event", name, cpl))
		return;
	check(e.type == 1 && e.access == A_WRITE && e.source == 0 && e.times == 1 && e.action == (inject ? ACT_INJECT : opt_num(
	      "action", ACT_DROP)), "%s: type %u access %u source %u times %u action %u", name, e.type, e.access, e.source, e.times,
	      e.action);
	check(e.gpa == (u64)page + (first & 0xfff), "%s: gpa 0x%lx, not 0x%lx", name, e.gpa, (u64)page + (first & 0xfff));
	if (accel == ACCEL_KVM) {
		check(e.gva == first, "%s: gva 0x%lx, not 0x%lx", name, e.gva, first);
		check(e.size == 0 && e.value == 0, "%s: size %u, value 0x%lx, that nobody knows", name, e.size, e.value);
	}
	if (inject)
		check(e.rip == rip, "%s: rip 0x%lx in the event, the store is at 0x%lx", name, e.rip, rip);
}

void t_emul(void)
{
	u8 *page, *user;
	struct event e;
	u64 edge;

	guard_open();
	set_up();
	page = (u8 *)alloc_pages(4) + PAGE;
	fill(page, 12);
	user_page(page - PAGE);
	user = user_page(page);
	must_lock(page);
	for (u32 i = 0; i < ARRAY_SIZE(cases); i++) {
		if (cases[i].flags & AVX && !avx)
			continue;
		refused_at(i, page, user + 0x400, 3);
		/* maskmovdqu's mask comes from an instruction that the emulator may not know. */
		if (opt_num("cpl0", 1) && cases[i].fn != op_e_maskmov)
			refused_at(i, page, page + 0x400, 0);
	}
	/* From an ordinary page into the locked one. */
	fill(page - PAGE, 13);
	fpu();
	run_user(op_e_fxsave, user - 0x100, SPOIL, NULL);
	check_trap("fxsave over the edge", 3);
	check(intact(page, 12), "fxsave over the edge changed the locked page");
	edge = accel == ACCEL_KVM ? (u64)user : 0;
	if (check(next_event_on(page, &e, 10000000000ull), "fxsave over the edge: no event"))
		check(e.gpa == (u64)page && (!edge || e.gva == edge), "fxsave over the edge: gpa 0x%lx gva 0x%lx", e.gpa, e.gva);
	still_locked("after all that", page, 12);
	writable("the page before", page - PAGE);
	pass_or_fail(test_name);
}

/* What fails for another reason is to a user what it is without the guard: no such instruction. */
void t_emul_other(void)
{
	struct config c;
	u8 *page, *registers;

	guard_open();
	page = alloc_lone_page();
	fill(page, 15);
	registers = map_page(0xfee00000, F_P | F_W | F_U);
	must_lock(page);
	c = guard_config();
	trap_of(0)->count = 0;
	run_user(op_e_fxsave, registers + 0xa00, 0, NULL);
	check(trap_of(0)->count == 1 && trap_of(0)->vector == 6 && trap_of(0)->rip == trap_of(0)->start,
	      "fxsave to the APIC: %lu exceptions, vector %lu, rip 0x%lx", trap_of(0)->count, trap_of(0)->vector, trap_of(0)->rip);
	wait_ns(100000000);
	check(guard_config().violations == c.violations, "that was a violation");
	still_locked("after that", page, 15);
	pass_or_fail(test_name);
}

static void goes_through(u32 i, u8 *page, u8 *va, u8 *ordinary, u8 *ordinary_va, u32 cpl)
{
	const char *name = cases[i].name;
	u64 before = guard_config().violations;
	struct event e;

	for (u32 k = 0; k < 2; k++) {
		fpu();
		if (cpl)
			run_user(cases[i].fn, k ? va : ordinary_va, SPOIL, NULL);
		else
			cases[i].fn(k ? page + 0x400 : ordinary + 0x400, SPOIL, NULL);
		barrier();
		check(!trap_of(0)->count, "%s at CPL %u: exception %lu", name, cpl, trap_of(0)->vector);
	}
	check(!intact(ordinary, 14), "%s does nothing", name);
	for (u32 o = 0; o < PAGE; o += 8)
		if (!check(*(volatile u64 *)(page + o) == *(volatile u64 *)(ordinary + o),
			   "%s at CPL %u: offset 0x%x holds 0x%lx, on an ordinary page 0x%lx", name, cpl, o,
			   *(volatile u64 *)(page + o), *(volatile u64 *)(ordinary + o)))
			break;
	if (check(next_event_on(page, &e, 10000000000ull), "%s at CPL %u: no event", name, cpl)) {
		check(e.access == A_WRITE && e.source == 0 && e.times == 1 && e.action == ACT_AUDIT,
		      "%s: access %u source %u times %u action %u", name, e.access, e.source, e.times, e.action);
		check(e.gpa == (u64)page + 0x400 + cases[i].at, "%s: gpa 0x%lx, not 0x%lx", name, e.gpa,
		      (u64)page + 0x400 + cases[i].at);
	}
	check(guard_config().violations == before + 1, "%s: counted %lu times", name, guard_config().violations - before);
	trap_of(0)->count = 0;
}

static struct race shared __attribute__((aligned(4096)));

static void writer(void *word)
{
	op_race(word, (u64)&shared, NULL);
}

static void writer_user(void *word)
{
	run_user(op_race, word, (u64)user_page(&shared), NULL);
}

void t_emul_audit(void)
{
	u8 *pages, *page, *user, *ordinary, *ordinary_user;
	u64 before;

	guard_open();
	need(NOWRITE, NOWRITE);
	set_up();
	for (u32 i = 0; i < ARRAY_SIZE(cases); i++) {
		for (u32 cpl = opt_num("cpl0", 0) ? 0 : 3; cpl <= 3; cpl += 3) {
			if (cases[i].flags & FIP || (cases[i].flags & AVX && !avx))
				continue;
			page = alloc_lone_page();
			ordinary = alloc_lone_page();
			user = user_page(page);
			ordinary_user = user_page(ordinary);
			fill(page, 14);
			fill(ordinary, 14);
			must_protect(page, AUDIT(NOWRITE));
			goes_through(i, page, user + 0x400, ordinary, ordinary_user + 0x400, cpl);
			/* And the page is watched as before. */
			before = guard_config().violations;
			op_mov64(page, SPOIL, NULL);
			check(*(volatile u64 *)page == SPOIL, "after %s: a store does not land", cases[i].name);
			for (u64 t = now_ns(); guard_config().violations == before && now_ns() - t < 10000000000ull; )
				relax();
			if (!check(guard_config().violations == before + 1, "after %s the page is not watched", cases[i].name))
				pass_or_fail(test_name);
			must_lock(page);
			*(volatile u64 *)ordinary = SPOIL;
			op_mov64(page, 1, NULL);
			check_trap("locked in the end", 0);
			check(!memcmp(page, ordinary, PAGE), "after %s: the locked page changed", cases[i].name);
		}
	}

	/* Two watched pages in the middle of a watched range, and the code and a locked page next to them. */
	pages = alloc_pages(8);
	for (u32 i = 0; i < 8; i++)
		fill(pages + i * PAGE, 20 + i);
	for (u32 i = 0; i < 8; i++)
		user = i ? (user_page(pages + i * PAGE), user) : user_page(pages);
	if (guard_protect(pages, 7, AUDIT(NOWRITE)).status)
		fail("PROTECT of 7 pages");
	must_lock(pages + 7 * PAGE);
	fpu();
	run_user(op_e_fxsave, user + 4 * PAGE - 0x100, SPOIL, NULL);
	check(!trap_of(0)->count, "fxsave over the edge of watched pages: exception %lu", trap_of(0)->vector);
	check(!intact(pages + 3 * PAGE, 23) && *(volatile u32 *)(pages + 4 * PAGE - 0x100 + 24) == 0x1f80,
	      "fxsave over the edge: MXCSR is 0x%x", *(volatile u32 *)(pages + 4 * PAGE - 0x100 + 24));
	for (u32 i = 0; i < 8; i++)
		if (i != 3 && i != 4)
			check(intact(pages + i * PAGE, 20 + i), "fxsave over the edge changed page %u", i);
	fpu();
	run_user(op_e_fxsave, user + 7 * PAGE - 0x100, SPOIL, NULL);
	check_trap("fxsave from a watched page into a locked one", 3);
	check(intact(pages + 7 * PAGE, 27), "fxsave from a watched page changed the locked one");
	check(intact(pages + 6 * PAGE, 26), "fxsave that was refused changed the watched page");
	still_locked("the locked page", pages + 7 * PAGE, 27);

	/* Another CPU stores to the same page all the time: no store of either is lost. */
	if (start_cpus() && n_cpus >= 2)
		for (u32 cpl = 0; cpl <= 3; cpl += 3) {
			volatile u64 *word;

			page = alloc_lone_page();
			memset(page, 0, PAGE);
			user = user_page(page);
			word = (u64 *)(page + 0x100);
			must_protect(page, AUDIT(NOWRITE));
			shared.tries = shared.stop = 0;
			cpu_call(1, cpl ? writer_user : writer, cpl ? user + 0x100 : (void *)word);
			for (u32 k = 0; k < 40; k++) {
				u64 tries = shared.tries;

				*(volatile u32 *)(page + 0x400 + 24) = 0;
				fpu();
				run_user(op_e_fxsave, user + 0x400, SPOIL, NULL);
				check(!trap_of(0)->count, "fxsave and another CPU: exception %lu", trap_of(0)->vector);
				check(*(volatile u32 *)(page + 0x400 + 24) == 0x1f80, "fxsave and another CPU: MXCSR is 0x%x",
				      *(volatile u32 *)(page + 0x400 + 24));
				for (u64 t = now_ns(); shared.tries == tries; relax())
					if (now_ns() - t > 30000000000ull)
						fail("the other CPU stands still at %lu stores", tries);
			}
			shared.stop = 1;
			for (u64 t = now_ns(); cpu_busy(1); relax())
				if (now_ns() - t > 30000000000ull)
					fail("the other CPU does not stop");
			check(*word == shared.tries, "a store of the other CPU is lost: %lu of %lu", *word, shared.tries);
			check(!trap_of(1)->count, "the other CPU took exception %lu", trap_of(1)->vector);
			diag("40 times fxsave beside %lu stores from CPL %u", shared.tries, cpl);
		}
	pass_or_fail(test_name);
}
