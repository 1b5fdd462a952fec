/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Rights that are denied to the guest of this guest.  Level 2 is this same program: it has our page tables, and nested ones
 * that map memory to itself, runs one of the functions of ops.S and calls us, or takes a fault that we intercept.
 */
#include "guest.h"

#define EXIT_FAULT(vector)	(0x40u + (vector))
#define EXIT_VMMCALL		0x81u
#define CR2_BEFORE		0x123456789000ull

struct vmcb_seg { u16 selector, attributes; u32 limit; u64 base; };

static u8 *vmcb;
static u64 *npt_pd, *npt_pt;

extern u8 l2_exit[];
asm(".text\nl2_exit: vmmcall\n");

static u64 *field(u32 offset)
{
	return (u64 *)(vmcb + offset);
}

static void set_segment(u32 offset, u16 selector, u16 attributes, u64 base, u32 limit)
{
	*(struct vmcb_seg *)(vmcb + offset) = (struct vmcb_seg) { selector, attributes, limit, base };
}

static u64 read_cr3(void)
{
	u64 v;

	asm volatile("movq %%cr3, %0" : "=r"(v));
	return v;
}

static u64 read_cr4(void)
{
	u64 v;

	asm volatile("movq %%cr4, %0" : "=r"(v));
	return v;
}

/* Runs code at level 2; returns the exit code. */
static u64 level2(void *code, void *va, u64 value)
{
	static u64 stack[256] __attribute__((aligned(16)));
	struct { u16 limit; u64 base; } __attribute__((packed)) gdt, idt;
	u64 a0 = (u64)va, a1 = value;

	asm volatile("sgdt %0" : "=m"(gdt));
	asm volatile("sidt %0" : "=m"(idt));
	stack[200] = (u64)l2_exit;
	memset(vmcb, 0, PAGE);
	*(u32 *)(vmcb + 0x08) = 1 << 13 | 1 << 14;	/* exceptions */
	*(u32 *)(vmcb + 0x10) = 3;			/* VMRUN, VMMCALL */
	*(u32 *)(vmcb + 0x58) = 1;			/* ASID */
	*(vmcb + 0x5c) = 1;				/* flush */
	*field(0x90) = 1;				/* nested paging */
	*field(0xb0) = (u64)(npt_pd - 2 * 512);
	for (u32 s = 0x400; s < 0x440; s += 0x10)
		set_segment(s, 0x10, 0xc93, 0, 0xffffffff);
	set_segment(0x410, 0x08, 0xa9b, 0, 0xffffffff);
	set_segment(0x460, 0, 0, gdt.base, gdt.limit);
	set_segment(0x480, 0, 0, idt.base, idt.limit);
	*field(0x4d0) = read_msr(0xc0000080);
	*field(0x548) = read_cr4();
	*field(0x550) = read_cr3();
	*field(0x558) = read_cr0();
	*field(0x560) = 0x400;
	*field(0x568) = 0xffff0ff0;
	*field(0x570) = 2;
	*field(0x578) = (u64)code;
	*field(0x5d8) = (u64)&stack[200];
	*field(0x640) = CR2_BEFORE;
	*field(0x668) = 0x0007040600070406ull;
	asm volatile("pushq %%rbp\n\tvmrun %%rax\n\tstgi\n\tpopq %%rbp"
		     : "+D"(a0), "+S"(a1) : "a"(vmcb) : "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
		     "memory", "cc");
	return *field(0x70);
}

static bool exits(const char *what, u64 exit, u32 access, void *va, u64 *rip)
{
	u64 want = EXIT_FAULT(13), error = 0, address = CR2_BEFORE;

	*rip = *field(0x578);
	if (page_faults) {
		want = EXIT_FAULT(14);
		error = 1 | (access == A_WRITE ? 2 : 0);
		address = (u64)va;
	}
	return check(exit == want && *field(0x78) == error, "%s: exit code 0x%lx, info 0x%lx, 0x%lx, not 0x%lx, 0x%lx", what, exit,
		     *field(0x78), *field(0x80), want, error) &&
	       check(!page_faults || *field(0x80) == address, "%s: address 0x%lx, not 0x%lx", what, *field(0x80), address);
}

static void l2_denied(const char *what, void *code, u32 access, void *va, u32 kind, const void *gpa)
{
	u64 exit = level2(code, va, SPOIL), rip = 0;

	if (!inject && kind == A_WRITE)
		check(exit == EXIT_VMMCALL, "%s: exit code 0x%lx, although the policy is drop", what, exit);
	else
		exits(what, exit, access, va, &rip);
	if (access == A_FETCH && rip)
		check(rip == (u64)code, "%s: rip 0x%lx, not 0x%lx", what, rip, (u64)code);
	deny_told(what, kind, gpa, (u64)va, rip, 1);
}

static void l2_free(const char *what, void *code, void *va)
{
	u64 exit = level2(code, va, SPOIL);

	check(exit == EXIT_VMMCALL, "%s: exit code 0x%lx, info 0x%lx, 0x%lx, rip 0x%lx", what, exit, *field(0x78), *field(0x80),
	      *field(0x578));
}

void t_deny_nested(void)
{
	static const u8 code[] = { 0xb8, 42, 0, 0, 0, 0xc3 };
	u64 *npt, *table;
	u8 *page, *va, *other;
	u32 a, b, c, d, n;

	asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(0x80000001), "c"(0));
	if (!(c & 4))
		skip("the CPU has no SVM");
	asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(0x8000000a), "c"(0));
	if (!(d & 1))
		skip("the CPU has no nested paging");
	deny_begin();
	need(DENY_ALL, DENY_ALL);
	write_msr(0xc0000080, read_msr(0xc0000080) | 0x1000);
	write_msr(0xc0010117, (u64)alloc_page());
	vmcb = alloc_page();
	/* Level 4, level 3, one level 2, and one level 1 for the 2 MiB that `page` is in. */
	npt = memset(alloc_pages(4), 0, 4 * PAGE);
	npt_pd = npt + 2 * 512;
	npt_pt = npt + 3 * 512;
	table = memset(alloc_page(), 0, PAGE);
	other = alloc_lone_page();
	page = (u8 *)(((u64)alloc_pages(1024) + 0x1fffff) & -0x200000ul) + PAGE;
	npt[0] = (u64)(npt + 512) | 7;
	npt[512] = (u64)npt_pd | 7;
	for (u64 i = 1; i < 4; i++)
		npt[512 + i] = i << 30 | 0x87;
	for (u64 i = 0; i < 512; i++) {
		npt_pd[i] = i << 21 | 0x87;
		npt_pt[i] = ((u64)page & -0x200000ul) + i * PAGE + 7;
	}
	npt_pd[(u64)page >> 21] = (u64)npt_pt | 7;
	va = map_through(table, (u64)page);
	fill(page, 400);
	memcpy(page, code, sizeof(code));

	l2_free("a store", op_mov64, va + 0x100);
	check(*(u64 *)(page + 0x100) == SPOIL, "a store of level 2 did not land");
	*(u64 *)(page + 0x100) = 0;
	l2_free("code", va, va);

	must_protect(page, NOWRITE);
	l2_denied("a store", op_mov64, A_WRITE, va + 0x100, A_WRITE, page + 0x100);
	l2_denied("lock xadd", op_xadd, A_WRITE, va + 0x100, A_WRITE, page + 0x100);
	l2_free("a load of a page that cannot be written", op_load, va + 0x100);
	l2_free("code on a page that cannot be written", va, va);
	must_protect(page, NOREAD);
	l2_denied("a load", op_load, A_READ, va + 0x100, A_READ, page + 0x100);
	l2_free("code on a page that cannot be read", va, va);
	must_protect(page, NOEXEC);
	l2_denied("code", va, A_FETCH, va, A_FETCH, page);
	l2_free("a load of a page that cannot be executed", op_load, va + 0x100);
	must_protect(page, NOEXEC_KERNEL);
	l2_denied("kernel code", va, A_FETCH, va, A_FETCH, page);
	must_protect(page, 0);
	check(*(u64 *)(page + 0x100) == 0, "a denied store of level 2 has landed");
	l2_free("a store to a page that is free again", op_mov64, va + 0x100);

	/* A page table of level 2. */
	must_protect(table, NOREAD);
	l2_denied("a table of level 2 that cannot be read", op_load, A_READ, va + 0x100, A_READ, table);
	must_protect(table, 0);
	table[0] &= ~0x60ull;
	must_protect(table, NOWRITE);
	l2_free("a table of level 2 that cannot be written", op_mov64, va + 0x100);
	check(!(table[0] & 0x60), "the MMU has changed a table of level 2: 0x%lx", table[0]);
	must_protect(table, 0);

	/* One of the nested: no nested page fault, nothing is wrong with it. */
	must_protect(npt_pt, NOREAD);
	l2_denied("a nested table that cannot be read", op_load, A_READ, va + 0x100, A_READ, &npt_pt[1]);
	must_protect(npt_pt, 0);
	npt_pt[1] &= ~0x60ull;
	must_protect(npt_pt, NOWRITE);
	l2_free("a nested table that cannot be written", op_mov64, va + 0x100);
	check(!(npt_pt[1] & 0x60), "the MMU has changed a nested table: 0x%lx", npt_pt[1]);
	must_protect(npt_pt, 0);
	/* And a real nested page fault is still one. */
	npt_pt[1] = 0;
	check(level2(op_load, va + 0x100, 0) == 0x400 && *field(0x80) == (u64)page + 0x100, "no nested page fault: 0x%lx", *field(0x70));
	npt_pt[1] = (u64)page | 7;

	must_protect(page, AUDIT(NOREAD));
	l2_free("a watched load", op_load, va + 0x100);
	n = deny_drain();
	check(n == 1, "a watched load of level 2 was told %u times", n);
	must_protect(page, AUDIT(NOWRITE));
	l2_free("a watched store", op_mov64, va + 0x108);
	n = deny_drain();
	check(n == 1 && *(u64 *)(page + 0x108) == SPOIL, "a watched store of level 2 was told %u times", n);
	must_protect(page, 0);

	/* Stores by SVM are dropped, and its loads fault. */
	fill(other, 410);
	must_protect(other, NOWRITE);
	attempt(op_vmsave, other, 0, NULL, 0);
	not_faulted("vmsave");
	check(deny_drain() > 0, "vmsave was not told");
	check(intact(other, 410), "vmsave changed the denied page");
	must_protect(other, 0);
	attempt(op_vmsave, other, 0, NULL, 0);
	check(!intact(other, 410), "vmsave does not store");
	must_protect(other, NOREAD);
	attempt(op_vmload, other, 0, NULL, 0);
	check(trap_of(0)->count == 1 && trap_of(0)->vector == 13 && trap_of(0)->rip == trap_of(0)->start,
	      "vmload: %lu exceptions, %lu", trap_of(0)->count, trap_of(0)->vector);
	check(deny_drain() == 1, "vmload was not told once");
	must_protect(other, 0);
	attempt(op_vmload, other, 0, NULL, 0);
	not_faulted("vmload of a page that is free again");

	/* What the MMU was given to walk a table is not for SVM. */
	must_protect(table, NOWRITE);
	op_load(va + 0x100, 0, NULL);
	memcpy(other, table, PAGE);
	attempt(op_vmsave, table, 0, NULL, 0);
	check(!memcmp(other, table, PAGE), "vmsave changed a denied table that was walked");
	check(deny_drain() > 1, "not all of vmsave's stores were told");
	must_protect(table, NOREAD);
	attempt(op_load, va + 0x100, 0, NULL, 0);
	check(trap_of(0)->count == 1 && deny_drain() == 1, "a table that cannot be read was walked");
	attempt(op_vmload, table, 0, NULL, 0);
	check(trap_of(0)->count == 1, "vmload reads a denied table after a walk");
	check(deny_drain() == 1, "vmload was not told once");
	must_protect(table, 0);
	deny_end();
}
