/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* A locked page against vCPU stores: every mapping, every privilege level, many pages, the limits. */
#include "guest.h"

static void check_readable(void *va, u64 seed, void *page)
{
	trap_of(0)->count = 0;
	barrier();
	check(op_load(va, 0, NULL) == *(volatile u64 *)page && !trap_of(0)->count, "a load at CPL 0 was refused");
	check(intact(page, seed), "reading a locked page gives something else");
}

static void check_neighbours(u8 *page)
{
	writable("the page before", page - PAGE);
	writable("the page after", page + PAGE);
}

/* An 8-byte store over the edge: its unlocked half may or may not land on KVM, the locked half may not. */
static void crossing(const char *what, u8 *va, u8 *half, u64 value, u32 cpl, u8 *locked, u64 seed)
{
	u64 old = *(u64 *)half;		/* the unlocked eight bytes next to the edge */

	trap_of(0)->count = 0;
	barrier();
	if (cpl)
		run_user(op_mov64, va, value, NULL);
	else
		op_mov64(va, value, NULL);
	barrier();
	check_trap(what, cpl);
	check(intact(locked, seed), "%s at CPL %u changed the locked page", what, cpl);
	if (accel == ACCEL_TCG && inject)
		check(*(u64 *)half == old, "%s: half of a store that faulted has landed", what);
	*(volatile u64 *)half = old;
}

static void crossings(u8 *va, u32 cpl, u8 *page, u64 seed)
{
	crossing("a store that ends in the locked page", va - 4, page - 8, SPOIL, cpl, page, seed);
	crossing("a store that begins in the locked page", va + PAGE - 4, page + PAGE, SPOIL, cpl, page, seed);
}

void t_lock_cpl0(void)
{
	u8 *page, *small;

	guard_open();
	page = alloc_lone_page();
	fill(page - PAGE, 1);
	fill(page, 2);
	fill(page + PAGE, 3);
	writable("before the lock", page);
	must_lock(page);
	refused_by_all("a 2 MiB mapping", page + 0x100, 0, page, 2);
	map_page((u64)page - PAGE, F_P | F_W);
	small = map_page((u64)page, F_P | F_W);
	map_page((u64)page + PAGE, F_P | F_W);
	refused_by_all("a 4 KiB mapping", small, 0, page, 2);
	refused_by_all("the end of the page", small + PAGE - 16, 0, page, 2);
	crossings(page, 0, page, 2);
	crossings(small, 0, page, 2);
	write_cr0(read_cr0() & ~0x10000ul);
	refused("CR0.WP clear", op_mov64, page + 0x200, 0, page, 2);
	refused("CR0.WP clear, read-only PTE", op_mov64, (u8 *)map_page((u64)page, F_P) + 0x200, 0, page, 2);
	write_cr0(read_cr0() | 0x10000ul);
	check_readable(page, 2, page);
	check_neighbours(page);
	pass_or_fail(test_name);
}

void t_lock_cpl3(void)
{
	static const u8 code[] = { 0xb8, 42, 0, 0, 0, 0xc3 };	/* mov $42, %eax; ret */
	u8 *page, *va, saved[sizeof(code)];

	guard_open();
	page = alloc_lone_page();
	user_page(page - PAGE);
	va = user_page(page);
	user_page(page + PAGE);
	fill(page - PAGE, 4);
	fill(page, 5);
	fill(page + PAGE, 6);
	run_user(op_mov64, va + 0x10, SPOIL, NULL);
	check(*(volatile u64 *)(page + 0x10) == SPOIL, "CPL 3 cannot write before the lock");
	fill(page, 5);
	must_lock(page);
	refused_by_all("a 4 KiB mapping", va + 0x100, 3, page, 5);
	refused_by_all("the end of the page", va + PAGE - 16, 3, page, 5);
	refused_by_all("a 2 MiB mapping", (u8 *)map_large((u64)page, F_P | F_W | F_U) + 0x300, 3, page, 5);
	crossings(va, 3, page, 5);
	check(run_user(op_load, va, 0, NULL) == *(u64 *)page, "a load at CPL 3 gives something else");
	check_readable(page, 5, page);
	check_neighbours(page);
	run_user(op_mov64, va - PAGE, SPOIL, NULL);
	check(*(volatile u64 *)(page - PAGE) == SPOIL, "CPL 3 can no longer write the page before");
	/* Execution is not touched. */
	page = alloc_lone_page();
	memcpy(page, code, sizeof(code));
	memcpy(saved, page, sizeof(code));
	va = user_page(page);
	must_lock(page);
	check(run_user_at((u64)va) == 42, "code in a locked page does not run at CPL 3");
	pass_or_fail(test_name);
}

void t_lock_alias(void)
{
	u8 *page, *before, *user_before;

	guard_open();
	page = alloc_lone_page();
	fill(page, 7);
	/* Two mappings that are in the TLB, writable and dirty, when the lock comes ... */
	before = map_page((u64)page, F_P | F_W);
	user_before = user_page(page);
	op_mov64(before, *(u64 *)page, NULL);
	run_user(op_mov64, user_before, *(u64 *)page, NULL);
	check(intact(page, 7), "stores of the same value changed the page");
	must_lock(page);
	refused("an alias from before the lock", op_mov64, before, 0, page, 7);
	refused("a CPL 3 alias from before the lock", op_mov64, user_before, 3, page, 7);
	refused_by_all("an alias from before the lock", before + 0x40, 0, page, 7);
	/* ... and some that are made after it. */
	refused_by_all("an alias from after the lock", (u8 *)map_page((u64)page, F_P | F_W) + 0x80, 0, page, 7);
	refused_by_all("a CPL 3 alias from after the lock", (u8 *)map_page((u64)page, F_P | F_W | F_U) + 0x80, 3, page, 7);
	refused_by_all("a 2 MiB alias", (u8 *)map_large((u64)page, F_P | F_W) + 0x80, 0, page, 7);
	check_neighbours(page);
	pass_or_fail(test_name);
}

/*
 * RCBA of the ICH9's LPC bridge maps 16 KiB of registers, which hold what they are told to, over any RAM below 4 GiB.  Nobody
 * writes to the locked page then, and yet it reads as the attacker likes.
 */
void t_lock_covered(void)
{
	struct pci lpc = { 0, 0xf8 };
	volatile u64 *word = (u64 *)(((u64)alloc_pages(8) + 0x3fff) & -0x4000ul);

	if (pci_read(lpc, 0) != 0x29188086)
		skip("needs -M q35");
	guard_open();
	fill((void *)word, 14);
	must_lock((void *)word);
	print("COVERING\n");
	pci_write(lpc, 0xf0, (u32)(u64)word | 1);
	/* The answer is that there is none: QEMU shuts the VM down. */
	wait_ns(5000000000ull);
	fail("the VM goes on, and the locked page reads 0x%lx", *word);
}

void t_lock_device_reset(void)
{
	u8 *a, *b;
	struct config c, d;

	guard_open();
	a = alloc_lone_page();
	b = alloc_lone_page();
	fill(a, 8);
	fill(b, 9);
	must_lock(a);
	c = guard_config();
	still_locked("before the reset", a, 8);
	vdev_reset(&guard.dev);
	still_locked("while the device is reset", a, 8);
	guard_start(F_VERSION_1 | F_NOWRITE, true, NULL, NULL);
	still_locked("after the reset", a, 8);
	writable("the second page", b);
	d = guard_config();
	check(d.generation == c.generation, "a device reset changed the generation, %lu to %lu", c.generation, d.generation);
	check(d.ranges_in_force == c.ranges_in_force, "ranges in force %u, then %u", c.ranges_in_force, d.ranges_in_force);
	must_lock(b);
	must_lock(a);			/* twice is no error */
	still_locked("the first page", a, 8);
	still_locked("the second page", b, 9);
	check(guard_config().ranges_in_force == 2, "%u ranges in force, not 2", guard_config().ranges_in_force);
	pass_or_fail(test_name);
}

/* The MMU sets accessed and dirty bits: a store by the CPU that no instruction makes. */
void t_lock_pagetable(void)
{
	u64 *table, *data;
	u8 *va;

	guard_open();
	table = alloc_lone_page();
	data = alloc_lone_page();
	fill(table, 10);
	fill(data, 11);
	va = map_through(table, (u64)data);
	for (u32 i = 1; i < 512; i++)
		table[i] = 0;
	must_lock(table);
	trap_of(0)->count = 0;
	op_load(va, 0, NULL);
	diag("load through the locked table: %lu exceptions", trap_of(0)->count);
	check(table[0] == ((u64)data | F_P | F_W), "the accessed bit was set in a locked page: 0x%lx", table[0]);
	trap_of(0)->count = 0;
	op_mov64(va + 8, SPOIL, NULL);
	diag("store through the locked table: %lu exceptions", trap_of(0)->count);
	check(table[0] == ((u64)data | F_P | F_W), "the dirty bit was set in a locked page: 0x%lx", table[0]);
	writable("the data page", data);
	pass_or_fail(test_name);
}

/* Instructions that KVM's emulator does not know; more of that in t_emul.c. */
void t_lock_unemulated(void)
{
	static const struct { const char *name; op_fn *fn; u32 at; } cases[] = {
		{ "cmpxchg16b", op_cmpxchg16b, 0x40 }, { "fxsave", op_fxsave, 0x400 }, { "fistp", op_fistp, 0x80 },
	};
	u8 *page, *va;

	guard_open();
	page = alloc_lone_page();
	fill(page, 12);
	va = user_page(page);
	must_lock(page);
	for (u32 i = 0; i < ARRAY_SIZE(cases); i++) {
		diag("trying %s", cases[i].name);
		trap_of(0)->count = 0;
		run_user(cases[i].fn, va + cases[i].at, SPOIL, NULL);
		/* fxsave stores field by field on TCG, the first one faults. */
		check_trap(cases[i].name, 3);
		check(intact(page, 12), "%s changed the locked page", cases[i].name);
	}
	pass_or_fail(test_name);
}

/* Locks n pages, every other one from `base`, in requests of up to `chunk`. */
static u32 lock_every_other(u8 *base, u32 n, u32 chunk, struct response *last)
{
	u32 done = 0;

	while (done < n) {
		u32 now = MIN(n - done, chunk);
		struct request *r = request_buffer();

		for (u32 i = 0; i < now; i++) {
			u64 gfn = gfn_of(base) + 2 * (done + i);

			r->ranges[i] = (struct range) { gfn, gfn, NOWRITE };
		}
		*last = guard_lock_ranges(now);
		if (last->status)
			break;
		done += now;
	}
	return done;
}

static void prepare(u8 *base, u32 n)
{
	/* Filled where it is looked at, that is enough: an interpreter of CPL 0 code takes its time for 64 MiB. */
	for (u32 i = 0; i < n; i++) {
		*(u64 *)(base + 2 * i * PAGE + 0x100) = i;
		*(u64 *)(base + (2 * i + 1) * PAGE + 0x100) = i;
	}
}

static void spot_check(u8 *base, u32 i, bool locked)
{
	u64 *word = (u64 *)(base + 2 * i * PAGE + 0x100), old = *word;

	trap_of(0)->count = 0;
	op_mov64(word, SPOIL, NULL);
	if (locked) {
		check_trap("a store to one of many locked pages", 0);
		check(*(volatile u64 *)word == old && old == i, "locked page %u has changed", i);
		writable("between two of many", base + (2 * i + 1) * PAGE);
	} else {
		check(!trap_of(0)->count, "page %u is not locked, and yet exception %lu", i, trap_of(0)->vector);
		check(*(volatile u64 *)word == SPOIL, "page %u is not locked, and yet the store did not land", i);
		*(volatile u64 *)word = old;
	}
}

static void spot_checks(u8 *base, u32 n, bool locked)
{
	u32 step = n > 64 ? n / 61 : 1;

	for (u32 i = 0; i < n; i += step)
		spot_check(base, i, locked);
	spot_check(base, n - 1, locked);
}

void t_many(void)
{
	u32 n = opt_num("many", opt_num("n", 8192)), done, before;
	struct response r = { 0, 0, 0 };
	struct config c;
	u64 t;
	u8 *base;

	guard_open();
	c = guard_config();
	if (c.max_ranges < n)
		fail("max_ranges is %u, fewer than %u", c.max_ranges, n);
	request_buffer();
	base = alloc_pages(2 * n + 1);
	prepare(base, n);
	before = c.ranges_in_force;
	t = now_ns();
	done = lock_every_other(base, n, MAX_REQ, &r);
	check(done == n, "only %u of %u ranges locked: status %u", done, n, r.status);
	c = guard_config();
	diag("%u ranges in %lu us, %u in force, max %u", done, (now_ns() - t) / 1000, c.ranges_in_force, c.max_ranges);
	check(c.ranges_in_force == before + done, "%u ranges in force, not %u", c.ranges_in_force, before + done);
	if (done)
		spot_checks(base, done, true);
	pass_or_fail(test_name);
}

void t_nospc(void)
{
	struct response r = { 0, 0, 0 };
	u32 room, done = 0, chunk = MAX_REQ;
	struct config c;
	u8 *base;

	guard_open();
	c = guard_config();
	request_buffer();
	diag("max_ranges %u, %lu pages of memory", c.max_ranges, pages_left());
	room = (pages_left() - 64) / 2;
	if (room <= c.max_ranges)
		skip("needs more memory: %u ranges of two pages to exceed max_ranges", c.max_ranges);
	room = c.max_ranges + MIN(MAX_REQ, room - c.max_ranges);
	base = alloc_pages(2 * room + 1);
	prepare(base, room);
	/* Big requests until one does not fit, then smaller ones, until a single range does not fit. */
	for (;;) {
		u32 now = MIN(chunk, room - done);
		u32 got = lock_every_other(base + 2ul * done * PAGE, now, chunk, &r);

		if (got) {
			done += got;
			if (done == room)
				fail("%u ranges locked, max_ranges is %u", done, c.max_ranges);
			continue;
		}
		if (!check(r.status == ENOSPC, "status %u at %u ranges, not ENOSPC", r.status, done))
			break;
		check(r.index == NO_INDEX, "ENOSPC with index 0x%x", r.index);
		diag("ENOSPC at %u + %u ranges", done, now);
		check(guard_config().ranges_in_force == done, "%u ranges in force after ENOSPC, not %u",
		      guard_config().ranges_in_force, done);
		spot_checks(base + 2ul * done * PAGE, now, false);
		if (chunk == 1)
			break;
		chunk = now > 64 ? 64 : 1;
	}
	check(done > 0 && done <= c.max_ranges, "%u ranges fit, max_ranges is %u", done, c.max_ranges);
	if (done)
		spot_checks(base, done, true);
	/* Closing a gap needs no range more: it makes one of two. */
	if (done > 1) {
		r = guard_lock(base + PAGE, 1);
		check(!r.status, "locking the page between two locked ones when full: status %u", r.status);
		check(guard_config().ranges_in_force == done - 1, "%u ranges in force after two became one, not %u",
		      guard_config().ranges_in_force, done - 1);
	}
	pass_or_fail(test_name);
}
