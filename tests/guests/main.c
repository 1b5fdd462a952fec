/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The command line, the list of tests, and two tests that need no lock: the machine itself, and the device's face. */
#include "guest.h"

struct start_info {		/* hvm_start_info of the PVH boot protocol */
	u32 magic, version, flags, nr_modules;
	u64 modlist, cmdline, rsdp, memmap;
	u32 memmap_entries, reserved;
};

static const struct test { const char *name; void (*run)(void); const char *what; } tests[] = {
	{ "demo", t_demo, "a lock and attacks from all CPUs, for people" },
	{ "machine", t_machine, "exceptions, CPL 3, the other CPUs, virtio-rng: what the tests stand on; no guard device" },
	{ "probe", t_probe, "device found, features, configuration space" },
	{ "lock-cpl0", t_lock_cpl0, "stores at CPL 0" },
	{ "lock-cpl3", t_lock_cpl3, "stores at CPL 3" },
	{ "lock-alias", t_lock_alias, "second mappings, from before and after the lock" },
	{ "lock-pagetable", t_lock_pagetable, "accessed and dirty bits in a locked page table" },
	{ "lock-unemulated", t_lock_unemulated, "stores that KVM cannot emulate" },
	{ "lock-covered", t_lock_covered, "the chipset maps something else over the page; the VM must not go on" },
	{ "lock-device-reset", t_lock_device_reset, "a reset of the virtio device" },
	{ "mmio-noise", t_mmio_noise, "registers of virtio-mmio at random; rounds=" },
	{ "lock-dma", t_lock_dma, "virtio-rng writes into the page; needs virtio-rng-pci" },
	{ "lock-fwcfg", t_lock_fwcfg, "fw_cfg DMA" },
	{ "lock-balloon", t_lock_balloon, "virtio-balloon takes the page; needs virtio-balloon-pci" },
	{ "lock-busy", t_lock_busy, "DMA under way: EBUSY; needs virtio-blk-pci on null-co with latency-ns" },
	{ "lock-ring", t_lock_ring, "another device's used ring; needs virtio-rng-pci" },
	{ "lock-companion", t_lock_companion, "the guard device's own buffers and rings" },
	{ "read-disk", t_read_disk, "a disk writes what the page holds; needs virtio-blk-pci on a file, and NOREAD" },
	{ "read-busy", t_read_busy, "a disk write under way: EBUSY; needs virtio-blk-pci on null-co with latency-ns, and NOREAD" },
	{ "read-ring", t_read_ring, "another device's descriptors and available ring; needs virtio-rng-pci, and NOREAD" },
	{ "race", t_race, "OK against stores of another CPU; rounds=, stores=, seconds=; needs -smp 2" },
	{ "deny-rights", t_deny_rights, "each deny bit, CPL and kind of access: the fault and the event" },
	{ "deny-fetch", t_deny_fetch, "instructions that begin or end on a page without execution" },
	{ "deny-cross", t_deny_cross, "accesses of 8, 10, 16 and 512 bytes over the edge of a page" },
	{ "deny-smc", t_deny_smc, "code that changes itself on pages without a right" },
	{ "deny-rep", t_deny_rep, "rep movs, stos, lods into a denied page: progress up to the edge" },
	{ "deny-walk", t_deny_walk, "page tables on denied pages" },
	{ "deny-push", t_deny_push, "exception delivery to a stack on a denied page" },
	{ "deny-atomic", t_deny_atomic, "locked and 16-byte read-modify-writes" },
	{ "deny-running", t_deny_running, "execution denied where another CPU runs; needs -smp 2" },
	{ "deny-toggle", t_deny_toggle, "rights come and go below atomic operations; rounds=; needs -smp 2" },
	{ "deny-nested", t_deny_nested, "accesses and page walks of a nested guest (SVM)" },
	{ "protect", t_protect, "PROTECT: set, changed, taken back, refused where immutable" },
	{ "seal", t_seal, "SEAL" },
	{ "query", t_query, "QUERY" },
	{ "watch", t_watch, "watched accesses go through and are counted" },
	{ "audit", t_audit, "watched stores to RAM, one by one: carried out once, and told; -smp 2" },
	{ "emul", t_emul, "stores that KVM cannot emulate, to a locked page; avx=1, cpl0=0" },
	{ "emul-other", t_emul_other, "what KVM cannot emulate for another reason" },
	{ "emul-audit", t_emul_audit, "stores that KVM cannot emulate, to a watched page; avx=1, cpl0=1; -smp 2" },
	{ "many", t_many, "n= disjoint ranges, default 8192" },
	{ "nospc", t_nospc, "until ENOSPC" },
	{ "atomic", t_atomic, "one bad entry of 4096; bad=index for one more place" },
	{ "errors", t_errors, "each error that a guest can produce, a line per case" },
	{ "events", t_events, "fields of violation events" },
	{ "events-lost", t_events_lost, "more violations than are stored; n= pages" },
	{ "flood", t_flood, "n= violations and more (seconds=) of one CPU while another one's requests are timed; msr=1; needs -smp 2" },
	{ "msr-actions", t_msr_actions, "each action on reads and writes of MSRs; -smp 2, as all of these" },
	{ "msr-pin", t_msr_pin, "pins of all bits and of some" },
	{ "msr-kept", t_msr_kept, "what a CPU that was started again may write to its pinned MSRs" },
	{ "msr-checks", t_msr_checks, "accesses that are carried out for the CPU, as the CPU would" },
	{ "msr-race", t_msr_race, "OK against accesses of another CPU; rounds=, tries=, seconds=" },
	{ "msr-toggle", t_msr_toggle, "rules come and go below another CPU's accesses; rounds=, seconds=" },
	{ "msr-errors", t_msr_errors, "each error of requests about MSRs, a line per case" },
	{ "msr-protect", t_msr_protect, "rules set, changed, taken back, sealed, refused where immutable" },
	{ "msr-query", t_msr_query, "MSR_QUERY" },
	{ "msr-bitmap", t_msr_bitmap, "MSR_BITMAP" },
	{ "msr-nospc", t_msr_nospc, "until ENOSPC: ranges, pins, KVM's filter" },
	{ "msr-many", t_msr_many, "n= rules, default 4096, in one request" },
	{ "msr-hold", t_msr_hold, "obeys the serial line, a line at a time" },
	{ "kernel-lock", t_kernel_lock, "PROTECT_KERNEL of each kind of mapping: what is denied, and what is not" },
	{ "kernel-self", t_kernel_self, "this program locks all of itself by the page tables that it runs on" },
	{ "kernel-dry-run", t_kernel_dry_run, "the same answer, and nothing set; 5 levels" },
	{ "kernel-protect", t_kernel_protect, "mappings change, and what they need is asked for again" },
	{ "kernel-policy", t_kernel_policy, "pages without mapping, and those written and executed: leave, report, refuse, deny" },
	{ "kernel-errors", t_kernel_errors, "each error of PROTECT_KERNEL, a line per case" },
	{ "kernel-hostile", t_kernel_hostile, "page tables that are none; with -smp 2 also some that change meanwhile" },
	{ "kernel-meanwhile", t_kernel_meanwhile, "control requests are answered during a walk" },
	{ "kernel-reset", t_kernel_reset, "resets of the virtio device during walks" },
	{ "kernel-model", t_kernel_model, "cases with answers, loaded at 128 MiB; waits for a byte on the serial line at the end" },
	{ "kernel-hold", t_kernel_hold, "obeys the serial line: b c q; burst= walks of tables= tables" },
	{ "hold", t_hold, "obeys the serial line: w l b c r q; burst= requests" },
	{ "bench-msr", t_bench_msr, "what rules for MSRs cost" },
	{ "bench", t_bench, "latency of lock requests; n= ranges only, runs=, held=" },
};

static char cmdline[1024];

/* The value of the nth word `key=value`, or NULL; ends at a space. */
static const char *opt_nth(const char *key, u32 nth)
{
	for (const char *p = cmdline; *p; ) {
		const char *k = key;

		while (*k && *p == *k)
			p++, k++;
		if (!*k && *p == '=' && nth-- == 0)
			return p + 1;
		while (*p && *p != ' ')
			p++;
		while (*p == ' ')
			p++;
	}
	return NULL;
}

static const char *opt(const char *key)
{
	return opt_nth(key, 0);
}

bool opt_is(const char *key, const char *value)
{
	const char *p = opt(key);

	if (!p)
		return false;
	while (*value && *p == *value)
		p++, value++;
	return !*value && (!*p || *p == ' ');
}

u64 opt_num(const char *key, u64 fallback)
{
	const char *p = opt(key);
	u64 n = 0;

	if (!p || *p < '0' || *p > '9')
		return fallback;
	while (*p >= '0' && *p <= '9')
		n = n * 10 + *p++ - '0';
	return n;
}

/* A number as Linux takes it, 0x and K, and what follows it. */
static const char *number(const char *p, u64 *n)
{
	u32 base = 10, digit;

	if (p[0] == '0' && p[1] == 'x') {
		base = 16;
		p += 2;
	}
	for (*n = 0; ; p++) {
		digit = *p >= '0' && *p <= '9' ? *p - '0' : (*p | 0x20) >= 'a' && (*p | 0x20) <= 'f' ? (*p | 0x20) - 'a' + 10 : 99;
		if (digit >= base)
			break;
		*n = *n * base + digit;
	}
	if (*p != 'K' && *p != 'k')
		return p;
	*n <<= 10;
	return p + 1;
}

bool opt_mmio(u32 nth, u64 *at, u64 *size)
{
	const char *p = opt_nth("virtio_mmio.device", nth);

	if (!p)
		return false;
	p = number(p, size);
	*at = 0;
	if (*p == '@')
		number(p + 1, at);
	return true;
}

bool machine_mmio(void)
{
	return opt("virtio_mmio.device") != NULL;
}

static volatile u32 called;

static void count_call(void *arg)
{
	called++;
	*(volatile u32 *)arg = this_cpu();
	/* Exceptions and CPL 3 there too. */
	op_mov64(map_page(0, 0), 1, NULL);
	run_user(op_mov64, map_page(0, F_P), 1, NULL);
}

void t_machine(void)
{
	u8 *page = alloc_lone_page(), *va;
	struct trap *t = trap_of(0);
	struct vdev rng;
	struct vq q;
	u64 ns = now_ns();
	u32 head, len;

	fill(page, 80);
	check(intact(page, 80), "memory");
	op_mov64(page, SPOIL, NULL);
	check(!intact(page, 80), "intact() sees no difference");

	va = map_page((u64)page, F_P);
	t->count = 0;
	op_mov64(va + 8, 1, NULL);
	check(t->count == 1 && t->vector == 14 && t->error == 3 && t->cr2 == (u64)va + 8 && t->rip == t->start && t->cpl == 0,
	      "#PF at CPL 0: %lu, vector %lu, error 0x%lx, cr2 0x%lx", t->count, t->vector, t->error, t->cr2);
	/* Over the edge of a page: CR2 is in the page at fault; no half lands (KVM's emulator does let one). */
	va = map_page((u64)alloc_page(), F_P | F_W);
	map_page((u64)page, F_P);
	*(u64 *)(va + PAGE - 8) = 0;
	t->count = 0;
	op_mov64(va + PAGE - 4, SPOIL, NULL);
	check(t->count == 1 && (accel == ACCEL_KVM || *(volatile u64 *)(va + PAGE - 8) == 0),
	      "a store over the edge: %lu exceptions, 0x%lx landed", t->count, *(volatile u64 *)(va + PAGE - 8));
	check(t->cr2 == (u64)va + PAGE, "a store over the edge at 0x%lx: CR2 0x%lx", (u64)va + PAGE - 4, t->cr2);
	t->count = 0;
	op_mov64((void *)0x8000000000000000ul, 1, NULL);
	check(t->count == 1 && t->vector == 13 && t->error == 0, "#GP at CPL 0: vector %lu", t->vector);
	t->count = 0;
	run_user(op_mov64, map_page((u64)page, F_P | F_U) + 16, 1, NULL);
	check(t->count == 1 && t->vector == 14 && t->error == 7 && t->rip == t->start && t->cpl == 3,
	      "#PF at CPL 3: %lu, vector %lu, error 0x%lx", t->count, t->vector, t->error);
	t->count = 0;
	run_user(op_mov64, page, 1, NULL);
	check(t->count == 1 && t->error == 7, "CPL 3 reaches a supervisor page");
	t->count = 0;
	va = user_page(page);
	run_user(op_mov64, va, 0x1234, NULL);
	check(t->count == 0 && *(volatile u64 *)page == 0x1234, "a store at CPL 3");
	check(run_user(op_load, va, 0, NULL) == 0x1234, "a load at CPL 3");
	run_user(op_movups, va, SPOIL, NULL);
	check(t->count == 0 && *(volatile u64 *)page == SPOIL, "an SSE store at CPL 3");
	check(*(volatile u64 *)map_large((u64)page, F_P) == SPOIL, "a 2 MiB mapping");
	t->count = 0;
	va = map_through((u64 *)memset(alloc_page(), 0, PAGE), (u64)page);
	check(op_load(va, 0, NULL) == SPOIL && !t->count, "a mapping through a page table of its own");
	diag("%u MiB, exceptions and CPL 3 took %lu us", (u32)(ram_end >> 20), (now_ns() - ns) / 1000);

	if (!start_cpus())
		check(false, "CPU %u does not start", n_cpus);
	for (u32 i = 1; i < n_cpus; i++) {
		volatile u32 seen = 0;

		cpu_call(i, count_call, (void *)&seen);
		for (u64 start = now_ns(); cpu_busy(i) && now_ns() - start < 10000000000ull; )
			relax();
		check(!cpu_busy(i) && called == i && seen == i, "CPU %u does not run what it is given", i);
		check(trap_of(i)->count == 2, "CPU %u: %lu exceptions, not 2", i, trap_of(i)->count);
	}
	diag("%u CPUs of %u", n_cpus, cpus_there());

	if (vdev_find(&rng, 4, 0)) {
		struct sg sg = { (u64)page, 64, true };

		fill(page, 81);
		vdev_reset(&rng);
		check(vdev_negotiate(&rng, F_VERSION_1) && rng.features, "virtio-rng: features 0x%lx", rng.offered);
		vq_setup(&q, &rng, 0, NULL);
		vdev_ok(&rng);
		vq_add(&q, &sg, 1);
		vq_kick(&q);
		check(vq_wait(&q, &head, &len, 5000000000ull) && len == 64, "virtio-rng does not answer");
		check(!intact(page, 81), "virtio-rng has written nothing");
		diag("virtio-rng: %u bytes", len);
	} else {
		diag("no virtio-rng");
	}
	pass_or_fail(test_name);
}

void t_probe(void)
{
	struct config c, d;

	guard_open();
	c = guard_config();
	diag("offered 0x%lx; version %u, page size %u, deny bits 0x%lx, max %u per request, %u in all", guard.dev.offered, c.version,
	     c.page_size, c.deny_bits, c.max_request_ranges, c.max_ranges);
	diag("generation %lu, %u ranges in force, %lu violations, %lu lost, %lu malformed", c.generation, c.ranges_in_force,
	     c.violations, c.events_lost, c.malformed);
	if (!guard.dev.mmio)
		check(pci_read(guard.dev.pci, 0) >> 16 == 0x107f, "PCI device ID 0x%x", pci_read(guard.dev.pci, 0) >> 16);
	check(guard.dev.offered & F_INDIRECT_DESC, "INDIRECT_DESC not offered");
	check(guard.dev.offered & F_EVENT_IDX, "EVENT_IDX not offered");
	check(!(guard.dev.offered & 0xffffff & ~F_GUARD), "feature bits offered that version 1 does not have");
	check((guard.dev.offered & DENY_ALL) == c.deny_bits, "features 0x%lx, and deny bits 0x%lx", guard.dev.offered, c.deny_bits);
	check(!(guard.dev.offered & F_AUDIT) == !c.audit_bits, "features 0x%lx, and audit bits 0x%lx", guard.dev.offered,
	      c.audit_bits);
	check(guard.control.size == QMAX && guard.events.size == QMAX, "queue sizes %u and %u", guard.control.size,
	      guard.events.size);
	check(c.version == 1 && c.page_size == 4096, "version %u, page size %u", c.version, c.page_size);
	if (accel == ACCEL_TCG)
		check(c.deny_bits == DENY_ALL && c.audit_bits == DENY_ALL, "deny bits 0x%lx, audit bits 0x%lx", c.deny_bits,
		      c.audit_bits);
	else
		check(c.deny_bits == NOWRITE && !(c.audit_bits & ~NOWRITE), "deny bits 0x%lx, audit bits 0x%lx", c.deny_bits,
		      c.audit_bits);
	check(c.max_request_ranges == MAX_REQ, "max_request_ranges %u", c.max_request_ranges);
	check(c.max_ranges >= 8192, "max_ranges %u", c.max_ranges);
	check(c.ranges_in_force == 0, "%u ranges in force at boot", c.ranges_in_force);
	check(c.reserved == 0, "reserved field 0x%x", c.reserved);
	check(!(guard.dev.offered & F_MSR) == !c.max_msr_ranges, "features 0x%lx, and %u ranges of MSRs", guard.dev.offered,
	      c.max_msr_ranges);
	check(guard.dev.offered & F_KERNEL, "F_KERNEL is not offered");
	check(c.msr_ranges_in_force == 0, "%u ranges of MSRs in force at boot", c.msr_ranges_in_force);
	if (accel == ACCEL_TCG)
		check(guard.dev.offered & F_MSR, "F_MSR is not offered");
	/* Writes are ignored. */
	for (u32 i = 0; i < sizeof(c); i += 4)
		*(volatile u32 *)(guard.dev.config + i) = 0x5a5a5a5a;
	d = guard_config();
	check(!memcmp(&c, &d, sizeof(c)), "the configuration space can be written");
	/* QEMU takes FEATURES_OK without VERSION_1 from any device, so this is only told. */
	vdev_reset(&guard.dev);
	diag("FEATURES_OK without VERSION_1: %s", vdev_negotiate(&guard.dev, F_NOWRITE) ? "taken" : "refused");
	guard_start(F_VERSION_1 | F_NOWRITE, true, NULL, NULL);
	must_lock(alloc_lone_page());
	check(guard_config().ranges_in_force == 1, "%u ranges in force, not 1", guard_config().ranges_in_force);
	pass_or_fail(test_name);
}

void main(struct start_info *info)
{
	bool pvh = info->magic == 0x336ec578;

	serial_init();
	if (pvh && info->cmdline)
		for (u32 i = 0; i < sizeof(cmdline) - 1 && ((char *)info->cmdline)[i]; i++)
			cmdline[i] = ((char *)info->cmdline)[i];
	cpu_init();
	mem_init((const struct memory *)info->memmap, pvh && info->version ? info->memmap_entries : 0);
	if (opt_is("test", "list")) {
		for (u32 i = 0; i < ARRAY_SIZE(tests); i++)
			print("%s: %s\n", tests[i].name, tests[i].what);
		shut(0x10);
	}
	for (u32 i = 0; i < ARRAY_SIZE(tests); i++)
		if (opt_is("test", tests[i].name)) {
			test_name = tests[i].name;
			diag("%s on %s, policy %s", test_name, accel == ACCEL_TCG ? "TCG" : accel == ACCEL_KVM ? "KVM" : "unknown",
			     inject ? page_faults ? "inject, #PF" : "inject" : "drop");
			tests[i].run();
		}
	fail("no such test in \"%s\"; test=list prints them", cmdline);
}
