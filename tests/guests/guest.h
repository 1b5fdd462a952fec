/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * All that the parts of the bare-metal guest say to each other, from the bottom up: printing, CPU, memory, PCI, virtio, the
 * guard device, attacks, tests.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))
#define PAGE		4096ul
#define MIN(a, b)	((a) < (b) ? (a) : (b))
#define barrier()	asm volatile("" ::: "memory")
#define mb()		asm volatile("lock; addl $0, -8(%%rsp)" ::: "memory", "cc")
#define READ_ONCE(x)	(*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

static inline void outb(u16 port, u8 v) { asm volatile("outb %0, %1" :: "a"(v), "Nd"(port) : "memory"); }
static inline void outl(u16 port, u32 v) { asm volatile("outl %0, %1" :: "a"(v), "Nd"(port) : "memory"); }
static inline void outw(u16 port, u16 v) { asm volatile("outw %0, %1" :: "a"(v), "Nd"(port) : "memory"); }
static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u64 rdtsc(void) { u32 a, d; asm volatile("rdtsc" : "=a"(a), "=d"(d)); return ((u64)d << 32) | a; }

/*
 * For loops that wait.  Nothing here needs the I/O, but in the lab, where TCG emulates SVM for the hypervisor below, a guest
 * has been seen to run with the global interrupt flag clear: only an exit, which this makes every now and then, gives the CPU
 * back to the host.
 */
static inline void relax(void)
{
	static u32 n;
	u16 cs;

	asm volatile("pause");
	if (++n % 1024)
		return;
	asm("mov %%cs, %0" : "=r"(cs));
	if (!(cs & 3))
		outb(0x80, 0);
}

/* print.c */
void serial_init(void);
void print(const char *fmt, ...) __attribute__((format(printf, 1, 2)));	/* %s %c %d %u %x %lx %lu %ld %% only */
void vprint(const char *fmt, va_list ap);
int serial_rx(void);			/* a byte, or -1 */
void *memcpy(void *d, const void *s, size_t n);
void *memset(void *d, int c, size_t n);
int memcmp(const void *a, const void *b, size_t n);
bool streq(const char *a, const char *b);
extern u32 failures;
void diag(const char *fmt, ...) __attribute__((format(printf, 1, 2)));	/* "# ..." */
bool check(bool ok, const char *fmt, ...) __attribute__((format(printf, 2, 3)));	/* not ok: the test will fail */
void pass_or_fail(const char *name) __attribute__((noreturn));		/* by what check() saw */
void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));	/* now */
void skip(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
extern const char *test_name;

/* main.c: the command line */
bool opt_is(const char *key, const char *value);
u64 opt_num(const char *key, u64 fallback);
bool opt_mmio(u32 nth, u64 *at, u64 *size);	/* virtio_mmio.device=SIZE@ADDRESS:... */
bool machine_mmio(void);		/* are there any? Such a machine has no PCI, fw_cfg, PIT, ROM */

/* cpu.c */
#define MAX_CPUS	4
#define STACK_SIZE	0x8000ul
extern u8 stacks[];

struct trap {				/* what the last refused TRY met */
	u64 count, vector, error, cr2, start, end, rip, cpl;
};

enum accel { ACCEL_TCG, ACCEL_KVM, ACCEL_OTHER };
extern enum accel accel;
extern bool inject;			/* policy: a refused store raises an exception */
extern bool page_faults;		/* fault=pf: that is #PF, not #GP */
extern u32 n_cpus;			/* running, 1 to MAX_CPUS */
u32 cpus_there(void);			/* what the machine has */

void cpu_init(void);
u32 this_cpu(void);
struct trap *trap_of(u32 cpu);
u64 now_ns(void);
void wait_ns(u64 ns);
bool start_cpus(void);			/* all that the machine has; false if one does not answer */
void cpu_call(u32 cpu, void (*fn)(void *), void *arg);	/* starts fn there */
bool cpu_busy(u32 cpu);
void cpu_run(u32 cpu, void (*fn)(void *), void *arg);	/* runs fn there, or here if that is this CPU */
void cpu_stop(u32 cpu);			/* INIT, whatever it does */
bool cpu_start(u32 cpu);		/* the start-up IPI after it; false if it does not come up */
u64 run_user(u64 (*op)(void *, u64, const void *), void *address, u64 value, const void *source);
u64 run_user_at(u64 rip);
u64 call_code(void *code, u64 arg, u32 cpl);	/* runs what may not be run; a fault of the fetch is recorded and returns FETCH_FAULT */
#define FETCH_FAULT	0xfe7c4fa017ull
u64 run_user_stack(u64 rsp0, u32 *vector);	/* a trip to CPL 3, the way back over another stack; vector 8 if that leads to #DF */
bool start_avx(void);
u64 read_msr(u32 msr);
void write_msr(u32 msr, u64 v);
void write_cr2(u64 v);
void invlpg(const void *va);
u64 read_cr0(void);
void write_cr0(u64 v);
void shut(u8 code) __attribute__((noreturn));

/* mem.c */
#define F_P	1ul
#define F_W	2ul
#define F_U	4ul
#define F_LARGE	0x80ul
extern u64 ram_end;			/* guest-physical, below 4 GiB */
struct memory { u64 start, size; u32 type, reserved; };	/* hvm_memmap_table_entry; type 1 is RAM */
void mem_init(const struct memory *map, u32 n);
u16 fw_cfg_u16(u16 key);
void *alloc_pages(u32 n);		/* identity mapped; ends the test with SKIP when memory is short */
void *alloc_page(void);
void *alloc_lone_page(void);		/* its neighbours are nobody's: they stay writable */
u64 pages_left(void);
void *map_page(u64 pa, u64 flags);	/* at a new virtual address, 4 KiB */
void *map_large(u64 pa, u64 flags);	/* through a new 2 MiB mapping that contains pa */
void *map_through(u64 *table, u64 pa);	/* `table` is used as a page table, its entry 0 maps pa, accessed and dirty clear */
void *user_alias(const void *linked);	/* where CPL 3 sees something of the .user section */
void *user_page(void *page);		/* CPL 3 mapping of an identity mapped page */
static inline u64 gfn_of(const void *p) { return (u64)p >> 12; }

/* pci.c */
struct pci { u8 bus, devfn; };
u32 pci_read(struct pci d, u8 reg);
void pci_write(struct pci d, u8 reg, u32 v);
bool pci_find_virtio(u16 virtio_id, u32 nth, struct pci *d);
u64 pci_bar(struct pci d, u32 bar);
void pci_setup(struct pci d);

/* virtio.c */
#define DESC_NEXT	1
#define DESC_WRITE	2
#define DESC_INDIRECT	4
#define ST_NEEDS_RESET	0x40
#define F_INDIRECT_DESC	(1ull << 28)
#define F_EVENT_IDX	(1ull << 29)
#define F_VERSION_1	(1ull << 32)
#define QMAX		64

struct desc { u64 addr; u32 len; u16 flags, next; };
struct used_elem { u32 id, len; };
struct used { u16 flags, idx; struct used_elem ring[QMAX]; };
struct avail { u16 flags, idx, ring[QMAX]; };

struct vdev;
struct vq {
	struct vdev *dev;
	u16 index, size, n_free, free_head, last_used;
	struct desc *desc;
	struct avail *avail;
	volatile struct used *used;
	volatile u8 *notify;
	u64 inflight;		/* heads that the device has */
	u32 strays;		/* completions of heads that it did not have */
};

struct vdev {
	bool mmio;		/* or else PCI */
	struct pci pci;
	volatile u8 *common, *config;
	u8 *notify_base;
	u32 notify_mult, config_len;
	u64 offered, features;
};

struct sg { u64 addr; u32 len; bool write; };

bool vdev_find(struct vdev *v, u16 virtio_id, u32 nth);
void vdev_reset(struct vdev *v);
bool vdev_negotiate(struct vdev *v, u64 wanted);	/* up to FEATURES_OK; takes what of `wanted` is offered */
void vq_setup(struct vq *q, struct vdev *v, u16 index, void *used_page);	/* used_page: or NULL for a new one */
void vq_announce(struct vq *q);		/* to the device; vq_setup() does it */
void vdev_ok(struct vdev *v);
u8 vdev_status(struct vdev *v);
u64 vdev_config(struct vdev *v, u32 offset, u32 size);
int vq_prepare(struct vq *q, const struct sg *sg, u32 n);	/* head, or -1: full; the device does not see it yet */
int vq_prepare_indirect(struct vq *q, struct desc *table, const struct sg *sg, u32 n);
int vq_publish(struct vq *q, int head);			/* makes it available; -1 stays -1 */
int vq_add(struct vq *q, const struct sg *sg, u32 n);	/* both */
int vq_add_indirect(struct vq *q, struct desc *table, const struct sg *sg, u32 n);
void vq_kick(struct vq *q);
bool vq_pop(struct vq *q, u32 *head, u32 *len);
bool vq_wait(struct vq *q, u32 *head, u32 *len, u64 timeout_ns);

/* guard.c */
#define GUARD_ID	63
#define F_NOWRITE	1ull
#define F_NOEXEC	2ull
#define F_NOREAD	4ull
#define F_NOEXEC_KERNEL	8ull
#define F_AUDIT		16ull
#define F_MSR		32ull
#define F_KERNEL	64ull
#define F_GUARD		0x7full
#define NOWRITE		1ull
#define NOEXEC		2ull
#define NOREAD		4ull
#define NOEXEC_KERNEL	8ull
#define DENY_ALL	15ull
#define AUDIT(deny)	((deny) << 8)
#define IMMUTABLE	(1ull << 63)
enum { LOCK = 1, PROTECT, SEAL, QUERY, MSR_LOCK, MSR_PROTECT, MSR_BITMAP, MSR_QUERY, PROTECT_KERNEL };
enum { A_WRITE = 1, A_FETCH, A_READ };
enum { ACT_INJECT = 1, ACT_DROP, ACT_PAUSE, ACT_SHUTDOWN, ACT_AUDIT };
#define NO_INDEX	0xffffffffu
#define MAX_REQ		4096u
#define UNKNOWN		(~0ull)
#define SOURCE_DMA	0xffffffffu
enum { EPERM = 1, EIO = 5, E2BIG = 7, EACCES = 13, EFAULT = 14, EBUSY = 16, EINVAL = 22, ENOSPC = 28, EOVERFLOW = 75,
       EOPNOTSUPP = 95, ESTALE = 116 };

enum { M_ALLOW = 0, M_LOG = 1, M_PIN = 2, M_DENY = 4, M_EMULATE = 8 };	/* action */
enum { M_READ = 1, M_WRITE, M_BOTH };					/* access */
#define M_IMMUTABLE	(1u << 31)

struct range { u64 start, end, attr; };
struct msr_rule { u32 first, last; u16 access, action; u32 flags; u64 mask; };
struct request { u16 type, flags; u32 count; struct range ranges[]; };
struct response { u32 status, index; u64 value; };
struct event {
	u16 type, access; u32 source; u64 gpa, gva, rip, value; u32 size, times; u64 lost; u32 action, reserved;
};
struct config {
	u32 version, page_size; u64 deny_bits; u32 max_request_ranges, max_ranges; u64 generation; u32 ranges_in_force, reserved;
	u64 violations, events_lost, malformed, audit_bits; u32 max_msr_ranges, msr_ranges_in_force;
};
_Static_assert(sizeof(struct event) == 64 && sizeof(struct config) == 80 && sizeof(struct msr_rule) == sizeof(struct range),
	       "as in docs/device.md");

struct guard { struct vdev dev; struct vq control, events, walk; };	/* walk: if F_KERNEL was negotiated */
extern struct guard guard;
extern u64 reply_ns;			/* how long an answer may take */

void guard_open(void);			/* finds and starts it, or ends the test */
void guard_start(u64 features, bool post_events, void *control_used, void *events_used);	/* reset and set up again */
struct config guard_config(void);
bool guard_has(u64 feature);		/* was it negotiated? */
struct request *request_buffer(void);	/* room for MAX_REQ + 1 entries */
/* Sends the readable part and waits.  Returns the used length. */
u32 guard_send(const void *req, u32 len, struct response *resp);
u32 guard_send_sg(const struct sg *sg, u32 n);
struct response guard_lock_ranges(u32 n);	/* what is in request_buffer() */
struct response guard_lock(const void *page, u32 pages);
void must_lock(const void *page);
void need(u64 deny, u64 audit);		/* ends the test with SKIP if the host does not offer these bits */
struct response guard_request(u16 type, u32 n);	/* the first n of what is in request_buffer(), no answer but the header */
struct response guard_protect(const void *page, u32 pages, u64 attr);
void must_protect(const void *page, u64 attr);
struct response guard_seal(void);
struct response guard_query(u64 first, u64 last, struct range *to, u32 room, u32 *used_len);
struct response guard_msr_query(struct msr_rule of, struct msr_rule *to, u32 room, u32 *used_len);
void post_event(void *buffer, u32 len);
void post_events(u32 n);
bool next_event(struct event *e, u32 *used_len, u64 timeout_ns);
bool next_event_on(const void *page, struct event *e, u64 timeout_ns);	/* drops events about other pages */

/* kernel.c: PROTECT_KERNEL, and page tables to ask about */
#define F_XD		(1ull << 63)
enum { K_LOCK = 1, K_DRY_RUN };						/* flags */
enum { U_LEAVE, U_REPORT, U_REFUSE, U_DENY };				/* unmapped; write_exec has the first three */
enum { C_NXE = 1, C_WP = 2, C_SMEP = 4, C_SHADOW = 8, C_GIB = 16 };	/* control */
#define T_WRITE_EXEC	1ull		/* attributes of what is told */
#define T_UNMAPPED	2ull
#define MAX_TOLD	4096u		/* of either */
#define UPPER_HALF	0xffff800000000000ull

struct kernel_request {
	u16 type, flags; u32 count; u64 root, va_start, va_end; u8 levels, physical_bits, unmapped, write_exec; u32 control;
	struct range ranges[];
};
struct kernel_response {
	u32 status, index;
	u64 value, pages, unmapped, not_written, not_executed, write_exec, given, elsewhere, ranges, mappings, reserved, outside, tables,
	    told;
	struct range ranges_told[];
};
_Static_assert(sizeof(struct kernel_request) == 40 && sizeof(struct kernel_response) == 120, "as in docs/device.md");

void kernel_open(void);			/* guard_open(); ends the test with SKIP without F_KERNEL, turns on EFER.NXE */
u64 kernel_deny(void);			/* what of NOWRITE and NOEXEC_KERNEL the host has */
u64 loaded_root(void);			/* CR3 */
struct kernel_request *kernel_buffer(void);	/* room for MAX_REQ + 1 entries */
/* A request in that buffer without entries, as this CPU is now, 4 levels, no flags, everything left that is in question. */
struct kernel_request *kernel_begin(u64 root, u64 va_start, u64 va_end);
void kernel_entry(u64 first, u64 last, u64 attr);	/* one more, frames */
u32 kernel_bytes(void);			/* the request's length */
u32 walk_add(const struct sg *sg, u32 n);	/* the head; without notification */
u32 walk_send_sg(const struct sg *sg, u32 n);	/* and waits: the used length */
const struct kernel_response *kernel_ask(u32 room);	/* room for so many told ranges, up to 2 * MAX_TOLD */
u64 *new_table(void);
/* Puts `entry` in the table of `level` for this address; tables on the way that are missing are made, with all rights. */
void put_entry(u64 *root, u32 levels, u64 va, u32 level, u64 entry);
u64 *slow_tables(u32 n);		/* so many tables of level 1, which take long to add up */
void kernel_alive(const char *what);	/* both queues answer as they should */

/* attack.c */
typedef u64 op_fn(void *address, u64 value, const void *source);
#define SPOIL	0x5a5a5a5a5a5a5a5aull	/* what an attack writes */
extern op_fn op_mov64, op_mov32, op_mov16, op_mov8, op_load, op_push, op_movups, op_cmpxchg16b, op_fxsave, op_fistp,
	op_xadd, op_inc, op_load8, op_load128, op_mov256, op_cas16, op_fstp80, op_fld80, op_copy, op_set, op_scan, op_vmload, op_vmsave;
struct race { volatile u64 tries, stop; };
extern op_fn op_rdmsr, op_wrmsr;	/* the address is the MSR's number */
extern op_fn op_race, op_race_xadd;
void fill(void *page, u64 seed);
bool intact(const void *page, u64 seed);
/* Runs `op` at `cpl` on `va`, and checks that it was refused as the policy says: exception, page intact. */
bool refused(const char *what, op_fn *op, void *va, u32 cpl, const void *page, u64 seed);
bool refused_by_all(const char *what, void *va, u32 cpl, const void *page, u64 seed);
bool still_locked(const char *what, void *page, u64 seed);	/* the quick one: one store at CPL 0 */
bool writable(const char *what, void *page);			/* a store lands, at CPL 0 */
void check_trap(const char *what, u32 cpl);
u64 attack_source(bool user);
/* Runs `op` as it is told to, and forgets what was trapped before. */
u64 attempt(op_fn *op, void *va, u64 value, const void *source, u32 cpl);
/* The last attempt on this CPU met exactly the fault that a denied access gets, or with `drop` a store none. */
bool faulted(const char *what, u32 access, u64 gva, u32 cpl);
bool not_faulted(const char *what);

/* t_deny.c: a test of denied accesses, and what it must be told of them */
void deny_begin(void);
bool deny_told(const char *what, u32 access, const void *gpa, u64 gva, u64 rip, u32 times);	/* the next event; rip 0: any */
u32 deny_drain(void);			/* events that are not looked at, how often */
void deny_end(void) __attribute__((noreturn));	/* nothing else was told */

/* msr.c: rules for MSRs, accesses of any CPU, and what must come of them */
#define EFER		0xc0000080u
#define STAR		0xc0000081u
#define LSTAR		0xc0000082u
#define CSTAR		0xc0000083u
#define SFMASK		0xc0000084u
#define FS_BASE		0xc0000100u
#define GS_BASE		0xc0000101u
#define KERNEL_GS_BASE	0xc0000102u
#define SYSENTER_CS	0x174u
#define SYSENTER_ESP	0x175u
#define SYSENTER_EIP	0x176u
#define PAT		0x277u
void msr_begin(void);			/* opens the device, starts the CPUs; ends the test with SKIP without F_MSR or -smp 2 */
void msr_end(void) __attribute__((noreturn));	/* nothing was told but what was waited for */
struct msr_rule *msr_rules(void);	/* the entries of request_buffer() */
struct response msr_ask(u16 type, u32 first, u32 last, u16 access, u16 action, u64 mask);	/* a request of one entry */
void must_msr(u16 type, u32 msr, u16 access, u16 action, u64 mask);	/* the same for one MSR, or fail() */
void msr_free(u32 first, u32 last);	/* takes back what is not immutable */
bool msr_try(u32 cpu, u32 msr, bool write, u64 *value);	/* false if it faulted: trap_of(cpu) */
bool msr_exists(u32 msr);		/* can be read, when no rule is in the way */
/* Each returns whether all was right. `what` begins the messages. */
bool msr_reads(const char *what, u32 cpu, u32 msr, u64 value);	/* not reported */
bool msr_writes(const char *what, u32 cpu, u32 msr, u64 value);	/* not reported, and it is what the MSR has then */
bool msr_denied(const char *what, u32 cpu, u32 msr, u32 access, u64 value);	/* the fault that the policy says, and the event */
bool msr_logged(const char *what, u32 cpu, u32 msr, u32 access, u64 value);	/* carried out or skipped, and the event */
bool msr_faults(const char *what, u32 cpu);	/* what msr_try() met was #GP(0), exactly there */
bool msr_told(const char *what, u32 cpu, u32 msr, u32 access, u64 value, u32 action);	/* the next event */

/* tests */
void t_probe(void), t_machine(void);
void t_lock_cpl0(void), t_lock_cpl3(void), t_lock_alias(void), t_lock_device_reset(void), t_lock_covered(void), t_lock_pagetable(void),
	t_lock_unemulated(void), t_many(void), t_nospc(void);
void t_lock_dma(void), t_lock_fwcfg(void), t_lock_balloon(void), t_lock_busy(void), t_lock_ring(void), t_lock_companion(void);
void t_race(void);
void t_deny_rights(void), t_deny_fetch(void), t_deny_cross(void), t_deny_smc(void), t_deny_rep(void), t_deny_walk(void),
	t_deny_push(void), t_deny_atomic(void), t_deny_running(void), t_deny_toggle(void);
void t_deny_nested(void);
void t_protect(void), t_seal(void), t_query(void), t_watch(void);
void t_audit(void), t_emul(void), t_emul_other(void), t_emul_audit(void);
void t_atomic(void), t_errors(void);
void t_events(void), t_events_lost(void), t_flood(void);
void t_read_disk(void), t_read_busy(void), t_read_ring(void);
void t_hold(void), t_bench(void), t_demo(void), t_mmio_noise(void);
void t_msr_actions(void), t_msr_pin(void), t_msr_kept(void), t_msr_checks(void), t_msr_race(void), t_msr_toggle(void);
void t_msr_errors(void), t_msr_protect(void), t_msr_query(void), t_msr_bitmap(void), t_msr_nospc(void), t_msr_many(void);
void t_msr_hold(void), t_bench_msr(void);
void t_kernel_lock(void), t_kernel_self(void), t_kernel_dry_run(void), t_kernel_protect(void), t_kernel_policy(void),
	t_kernel_errors(void), t_kernel_hostile(void), t_kernel_meanwhile(void), t_kernel_reset(void), t_kernel_hold(void), t_kernel_model(void);

#endif
