/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Descriptor tables, exceptions, CPL 3, the other CPUs, time.  An exception at a TRY (ops.S) is recorded and skipped; an #UD at
 * user_exit is the way back from CPL 3 (an exception, because not every KVM brings int or syscall back from there); any other
 * ends the test.
 */
#include "guest.h"

struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct tss { u32 reserved; u64 rsp[3], reserved2, ist[7], reserved3; u32 iomap; } __attribute__((packed));
struct gate { u16 lo, cs, flags, mid; u32 hi, reserved; };
struct tableptr { u16 limit; u64 base; } __attribute__((packed));

static struct cpu {
	u64 gdt[7];
	struct tss tss;
	struct trap trap;
	u64 user_return;
	u64 code_start, code_end;	/* a fault of a fetch from here is expected */
	bool stack_fault;		/* #DF is */
	volatile bool online;
	void (*volatile work)(void *);
	void *arg;
} cpus[MAX_CPUS];

extern u64 boot_gdt[7], trap_stubs[32];
extern u8 tramp_start[], tramp_end[], user_exit[], user_start[], user_end[];
extern u64 ap_stack;
extern struct { u64 start, end; } extable_start[], extable_end[];
u64 enter_user(u64 *saved_rsp, u64 rip, u64 rsp, u64 a0, u64 a1, u64 a2);
void leave_user(u64 saved_rsp, u64 result) __attribute__((noreturn));

enum accel accel = ACCEL_OTHER;
bool inject = true;
bool page_faults;
u32 n_cpus = 1;
static struct gate idt[32];
static u64 tsc_start, tsc_per_ms;

u32 this_cpu(void)
{
	u64 sp;

	asm volatile("movq %%rsp, %0" : "=r"(sp));
	return (sp - (u64)stacks) / STACK_SIZE;
}

struct trap *trap_of(u32 cpu)
{
	return &cpus[cpu].trap;
}

u64 read_cr0(void)
{
	u64 v;

	asm volatile("movq %%cr0, %0" : "=r"(v));
	return v;
}

void write_cr0(u64 v)
{
	asm volatile("movq %0, %%cr0" :: "r"(v) : "memory");
}

void write_cr2(u64 v)
{
	asm volatile("movq %0, %%cr2" :: "r"(v) : "memory");
}

u64 read_msr(u32 msr)
{
	u32 a, d;

	asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(msr));
	return (u64)d << 32 | a;
}

void write_msr(u32 msr, u64 v)
{
	asm volatile("wrmsr" :: "a"((u32)v), "d"((u32)(v >> 32)), "c"(msr) : "memory");
}

void shut(u8 code)
{
	for (;;) {
		outb(0xf4, code);
		asm volatile("hlt");
	}
}

void trap(struct frame *f)
{
	struct cpu *c = &cpus[this_cpu()];
	bool user = f->cs & 3;
	/* CPL 3 runs the second mapping of .user: think in linked addresses. */
	u64 shift = user ? (u64)user_alias(user_start) - (u64)user_start : 0;
	u64 rip = f->rip - shift, cr2;

	asm volatile("movq %%cr2, %0" : "=r"(cr2));
	if (user && f->vector == 6 && rip == (u64)user_exit)
		leave_user(c->user_return, f->rax);
	if (f->rip - c->code_start < c->code_end - c->code_start) {
		c->trap = (struct trap) {
			.count = c->trap.count + 1, .vector = f->vector, .error = f->error, .cr2 = cr2,
			.start = f->rip, .end = f->rip, .rip = f->rip, .cpl = f->cs & 3,
		};
		/* As if the code returned. */
		f->rip = *(u64 *)f->rsp;
		f->rsp += 8;
		f->rax = FETCH_FAULT;
		return;
	}
	if (c->stack_fault && f->vector == 8) {
		c->trap = (struct trap) {
			.count = c->trap.count + 1, .vector = f->vector, .error = f->error, .cr2 = cr2,
			.start = f->rip, .end = f->rip, .rip = f->rip, .cpl = f->cs & 3,
		};
		leave_user(c->user_return, FETCH_FAULT);
	}
	for (typeof(&extable_start[0]) e = extable_start; e < extable_end; e++) {
		if (rip < e->start || rip > e->end)
			continue;
		c->trap = (struct trap) {
			.count = c->trap.count + 1, .vector = f->vector, .error = f->error, .cr2 = cr2,
			.start = e->start + shift, .end = e->end + shift, .rip = f->rip, .cpl = f->cs & 3,
		};
		f->rip = e->end + shift;
		return;
	}
	fail("unexpected exception %lu, error 0x%lx, rip 0x%lx, cr2 0x%lx, cs 0x%lx, rsp 0x%lx, cpu %u",
	     f->vector, f->error, f->rip, cr2, f->cs, f->rsp, this_cpu());
}

static void cpu_tables(u32 n)
{
	struct cpu *c = &cpus[n];
	u64 tss = (u64)&c->tss;
	struct tableptr p = { sizeof(c->gdt) - 1, (u64)c->gdt };

	memcpy(c->gdt, boot_gdt, sizeof(c->gdt));
	c->gdt[5] = (sizeof(c->tss) - 1) | (tss & 0xffffff) << 16 | 0x89ull << 40 | (tss >> 24 & 0xff) << 56;
	c->gdt[6] = tss >> 32;
	/* Exceptions from CPL 3 take the lower half of the stack, what called run_user() keeps the upper. */
	c->tss.rsp[0] = (u64)stacks + n * STACK_SIZE + STACK_SIZE / 2;
	c->tss.ist[0] = c->tss.rsp[0] - STACK_SIZE / 4;
	c->tss.iomap = sizeof(c->tss) << 16;
	asm volatile("lgdt %0" :: "m"(p));
	asm volatile("ltr %w0" :: "r"(0x28));
	p = (struct tableptr) { sizeof(idt) - 1, (u64)idt };
	asm volatile("lidt %0" :: "m"(p));
}

static void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c, u32 *d)
{
	asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "a"(leaf), "c"(0));
}

/* 10 ms of the PIT's channel 2. */
static void calibrate(void)
{
	u64 t;

	/* Without a PIT it is told, or taken for a fast one. */
	tsc_per_ms = opt_num("tsc_mhz", machine_mmio() ? 4000 : 0) * 1000;
	if (tsc_per_ms)
		return;
	outb(0x61, (inb(0x61) & ~2) | 1);
	outb(0x43, 0xb0);
	outb(0x42, 11932 & 0xff);
	/* The count starts with the next write, which may take long: a clock that is slow makes no time-out too short. */
	t = rdtsc();
	outb(0x42, 11932 >> 8);
	while (!(inb(0x61) & 0x20) && rdtsc() - t < 2000000000ull)
		;
	tsc_per_ms = (rdtsc() - t) / 10;
	if (tsc_per_ms < 1000)
		tsc_per_ms = 1000000;
}

bool start_avx(void)
{
	u32 a, b, c, d;
	u64 cr4;

	cpuid(1, &a, &b, &c, &d);
	if (!(c & 1 << 28) || !(c & 1 << 26))
		return false;
	asm volatile("movq %%cr4, %0" : "=r"(cr4));
	asm volatile("movq %0, %%cr4" :: "r"(cr4 | 0x40000));
	asm volatile("xsetbv" :: "a"(7), "d"(0), "c"(0));
	return true;
}

u64 now_ns(void)
{
	u64 cycles = rdtsc() - tsc_start;

	return cycles / tsc_per_ms * 1000000 + cycles % tsc_per_ms * 1000000 / tsc_per_ms;
}

void wait_ns(u64 ns)
{
	u64 t = now_ns();

	while (now_ns() - t < ns)
		relax();
}

void cpu_init(void)
{
	u32 a, b, c, d;

	for (u32 i = 0; i < 32; i++)
		idt[i] = (struct gate) {
			.lo = trap_stubs[i], .mid = trap_stubs[i] >> 16, .hi = trap_stubs[i] >> 32, .cs = 8, .flags = 0x8e00,
		};
	idt[8].flags |= 1;	/* #DF on a stack of its own */
	cpu_tables(0);
	cpuid(1, &a, &b, &c, &d);
	if (c >> 31) {
		cpuid(0x40000000, &a, &b, &c, &d);
		if (b == 0x54474354)		/* "TCGT" */
			accel = ACCEL_TCG;
		else if (b == 0x4b4d564b)	/* "KVMK" */
			accel = ACCEL_KVM;
	}
	if (opt_is("accel", "tcg"))
		accel = ACCEL_TCG;
	if (opt_is("accel", "kvm"))
		accel = ACCEL_KVM;
	inject = !opt_is("policy", "drop");
	page_faults = opt_is("fault", "pf");
	calibrate();
	tsc_start = rdtsc();
}

static u64 user_call(u64 rip, u64 a0, u64 a1, u64 a2)
{
	static u8 user_stacks[MAX_CPUS][PAGE] __attribute__((aligned(4096)));
	static void *user_map[MAX_CPUS];
	u32 n = this_cpu();
	u64 top = PAGE - 64;

	if (!user_map[n])
		user_map[n] = map_page((u64)user_stacks[n], F_P | F_W | F_U);
	*(u64 *)(user_stacks[n] + top) = (u64)user_alias(user_exit);
	return enter_user(&cpus[n].user_return, rip, (u64)user_map[n] + top, a0, a1, a2);
}

u64 run_user(op_fn *op, void *address, u64 value, const void *source)
{
	return user_call((u64)user_alias(op), (u64)address, value, (u64)source);
}

u64 run_user_at(u64 rip)
{
	return user_call(rip, 0, 0, 0);
}

u64 call_code(void *code, u64 arg, u32 cpl)
{
	struct cpu *c = &cpus[this_cpu()];
	u64 r;

	c->trap.count = 0;
	c->code_start = (u64)code & -PAGE;
	c->code_end = c->code_start + 2 * PAGE;
	write_cr2(0x123456789000ull);
	barrier();
	if (cpl)
		r = user_call((u64)code, arg, 0, 0);
	else
		r = ((u64 (*)(u64))code)(arg);
	barrier();
	c->code_start = c->code_end = 0;
	return r;
}

u64 run_user_stack(u64 rsp0, u32 *vector)
{
	struct cpu *c = &cpus[this_cpu()];
	u64 old = c->tss.rsp[0], r;

	c->trap.count = 0;
	c->stack_fault = true;
	c->tss.rsp[0] = rsp0;
	barrier();
	/* Straight to the #UD. */
	r = user_call((u64)user_alias(user_exit), 0, 0, 0);
	barrier();
	c->tss.rsp[0] = old;
	c->stack_fault = false;
	*vector = c->trap.count ? c->trap.vector : 6;
	return r;
}

void ap_main(void)
{
	struct cpu *c = &cpus[this_cpu()];

	cpu_tables(this_cpu());
	c->online = true;
	for (;;) {
		if (c->work) {
			c->work(c->arg);
			mb();
			c->work = NULL;
		}
		relax();
	}
}

void cpu_call(u32 n, void (*fn)(void *), void *arg)
{
	cpus[n].arg = arg;
	cpus[n].trap.count = 0;
	mb();
	cpus[n].work = fn;
}

bool cpu_busy(u32 n)
{
	return cpus[n].work != NULL;
}

void cpu_run(u32 n, void (*fn)(void *), void *arg)
{
	if (n == this_cpu()) {
		cpus[n].trap.count = 0;
		fn(arg);
		return;
	}
	cpu_call(n, fn, arg);
	for (u64 t = now_ns(); cpu_busy(n); relax())
		if (now_ns() - t > 30000000000ull)
			fail("CPU %u does not come back", n);
}

static volatile u32 *const apic = (volatile u32 *)0xfee00000ul;

/* INIT and start-up IPI through the xAPIC, one CPU after the other. */
static void ipi(u32 apic_id, u32 command)
{
	apic[0x310 / 4] = apic_id << 24;
	apic[0x300 / 4] = command;
	for (u32 i = 0; i < 1000 && (apic[0x300 / 4] & 0x1000); i++)
		relax();
}

void cpu_stop(u32 n)
{
	ipi(n, 0x4500);
	wait_ns(2000000);
	cpus[n].online = false;
	cpus[n].work = NULL;
}

bool cpu_start(u32 n)
{
	memcpy((void *)0x8000ul, tramp_start, tramp_end - tramp_start);
	ap_stack = (u64)stacks + (n + 1) * STACK_SIZE;
	mb();
	for (u32 try = 0; try < 2 && !cpus[n].online; try++) {
		ipi(n, 0x4600 | 0x8000 >> 12);
		for (u64 t = now_ns(); now_ns() - t < (try ? 3000000000ull : 50000000ull) && !cpus[n].online; )
			relax();
	}
	return cpus[n].online;
}

u32 cpus_there(void)
{
	return machine_mmio() ? opt_num("cpus", 1) : fw_cfg_u16(5);
}

bool start_cpus(void)
{
	u32 have = MIN(cpus_there(), MAX_CPUS);

	/* An INIT needs no APIC that is enabled, but KVM may first see then that the last vCPU is there. */
	apic[0xf0 / 4] |= 0x100;
	for (; n_cpus < have; n_cpus++) {
		cpu_stop(n_cpus);
		if (!cpu_start(n_cpus))
			return false;
	}
	return true;
}
