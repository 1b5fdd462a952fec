/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A page that is NOREAD against devices that read memory: what virtio-blk writes to its disk, and other devices' rings.  A CPU
 * does not load from the page here either, so nothing in it is touched once it is locked.
 */
#include "guest.h"

#define SECTOR	512u
enum { BLK_IN, BLK_OUT };
struct blk_header { u32 type, reserved; u64 sector; };

static struct vdev blk;
static struct vq blk_q;
static struct blk_header *header;

static void need_noread(u64 more)
{
	u64 want = F_NOWRITE | F_NOREAD | more;

	guard_open();
	guard_start(F_VERSION_1 | want, true, NULL, NULL);
	if ((guard.dev.features & want) != want)
		skip("this host does not offer NOREAD%s: 0x%lx", more ? " and AUDIT" : "", guard.dev.offered);
}

static struct response lock_as(const void *page, u64 attr)
{
	request_buffer()->ranges[0] = (struct range) { gfn_of(page), gfn_of(page), attr };
	return guard_lock_ranges(1);
}

static void must_lock_as(const void *page, u64 attr)
{
	struct response r = lock_as(page, attr);

	if (r.status)
		fail("lock of gpa 0x%lx as 0x%lx: status %u, index 0x%x", (u64)page, attr, r.status, r.index);
}

static void device_event(const char *what, const void *page, u32 access, u32 action)
{
	struct event e;

	if (!check(next_event_on(page, &e, 5000000000ull), "%s: no event", what))
		return;
	check(e.source == SOURCE_DMA, "%s: event source 0x%x, not a device", what, e.source);
	check(e.type == 1 && e.access == access, "%s: event type %u, access %u", what, e.type, e.access);
	check(e.action == action, "%s: action %u, not %u", what, e.action, action);
	check(e.rip == UNKNOWN && e.gva == UNKNOWN, "%s: a device has rip 0x%lx, gva 0x%lx", what, e.rip, e.gva);
}

static void dma_read_event(const char *what, const void *page, u32 action)
{
	device_event(what, page, 3, action);
}

static void blk_start(void)
{
	if (!blk.common && !vdev_find(&blk, 2, 0))
		skip("no virtio-blk-pci");
	vdev_reset(&blk);
	if (!vdev_negotiate(&blk, F_VERSION_1))
		fail("virtio-blk: FEATURES_OK refused");
	vq_setup(&blk_q, &blk, 0, NULL);
	vdev_ok(&blk);
	if (!header)
		header = alloc_page();
}

static void blk_send(u32 type, u64 sector, void *buffer, u32 len)
{
	volatile u8 *status = (u8 *)(header + 1);
	struct sg sg[3] = {
		{ (u64)header, sizeof(*header), false }, { (u64)buffer, len, type == BLK_IN }, { (u64)status, 1, true },
	};

	*header = (struct blk_header) { type, 0, sector };
	*status = 0xff;
	if (vq_add(&blk_q, sg, 3) < 0)
		fail("virtio-blk: queue full");
	vq_kick(&blk_q);
}

/* Whether the disk did it.  A device that has given up is started anew. */
static bool blk_io(u32 type, u64 sector, void *buffer, u32 len)
{
	u32 head, used;

	blk_send(type, sector, buffer, len);
	for (u64 t = now_ns(); now_ns() - t < 30000000000ull; relax()) {
		if (vq_pop(&blk_q, &head, &used))
			return *(volatile u8 *)(header + 1) == 0;
		if (vdev_status(&blk) & ST_NEEDS_RESET) {
			blk_start();
			return false;
		}
	}
	fail("virtio-blk does not complete a request");
}

static void pattern(u8 *at, u32 len, u8 seed)
{
	for (u32 i = 0; i < len; i++)
		at[i] = seed + i * 7 + (i >> 8);
}

static bool is_pattern(const u8 *at, u32 len, u8 seed)
{
	for (u32 i = 0; i < len; i++)
		if (at[i] != (u8)(seed + i * 7 + (i >> 8)))
			return false;
	return true;
}

static bool is_zero(const u8 *at, u32 len)
{
	while (len && !*at)
		at++, len--;
	return !len;
}

/* Writes `len` bytes from `from`, and reads what is on the disk then to `back`, where something else was before. */
static bool through_disk(const char *what, u8 *from, u32 len, u8 *back)
{
	bool done;

	pattern(back, len, 0xc3);
	if (!blk_io(BLK_OUT, 8, back, len))
		fail("%s: virtio-blk does not work", what);
	done = blk_io(BLK_OUT, 8, from, len);
	memset(back, 0xee, len);
	if (!blk_io(BLK_IN, 8, back, len))
		fail("%s: virtio-blk no longer works", what);
	diag("%s: %s", what, done ? "written" : "refused");
	return done;
}

void t_read_disk(void)
{
	u8 *page, *watched, *back;
	struct config c;

	need_noread(F_AUDIT);
	blk_start();
	page = alloc_lone_page();
	watched = alloc_lone_page();
	back = alloc_pages(4);
	pattern(page, PAGE, 1);
	pattern(page - SECTOR, SECTOR, 2);
	pattern(page + PAGE, SECTOR, 3);
	pattern(watched, PAGE, 4);
	if (!through_disk("before the lock", page, SECTOR, back) || !is_pattern(back, SECTOR, 1))
		fail("what is written to the disk does not come back");
	must_lock_as(page, NOREAD);
	must_lock_as(watched, AUDIT(NOREAD));

	/* What the device got are zeros: not the page, and not what was in the device's own memory. */
	if (through_disk("a sector from the locked page", page, SECTOR, back))
		check(is_zero(back, SECTOR), "the disk has something else than zeros");
	else
		check(is_pattern(back, SECTOR, 0xc3), "the disk has changed");
	check(!is_pattern(back, SECTOR, 1), "the disk has what the locked page holds");
	dma_read_event("a sector", page, 2);

	if (through_disk("half a sector before it and half in it", page - SECTOR / 2, SECTOR, back)) {
		check(!memcmp(back, page - SECTOR / 2, SECTOR / 2), "what is before the locked page did not reach the disk");
		check(is_zero(back + SECTOR / 2, SECTOR / 2), "what is in the locked page reached the disk");
	}
	dma_read_event("half a sector before it", page, 2);
	if (through_disk("half a sector in it and half after it", page + PAGE - SECTOR / 2, SECTOR, back)) {
		check(is_zero(back, SECTOR / 2), "what is in the locked page reached the disk");
		check(!memcmp(back + SECTOR / 2, page + PAGE, SECTOR / 2), "what is after the locked page did not reach the disk");
	}
	dma_read_event("half a sector after it", page, 2);
	if (through_disk("three pages around it", page - PAGE, 3 * PAGE, back))
		check(is_zero(back + PAGE, PAGE), "what is in the locked page reached the disk");
	for (u32 i = 0; i < 3 * PAGE; i += SECTOR)
		check(!is_pattern(back + i, SECTOR, 1), "sector %u has what the locked page holds", i / SECTOR);
	dma_read_event("three pages", page, 2);

	/* Watched: it goes through, and is told. */
	c = guard_config();
	check(through_disk("a sector from the watched page", watched, SECTOR, back) && is_pattern(back, SECTOR, 4),
	      "a page that is only watched does not reach the disk");
	dma_read_event("a watched sector", watched, 5);
	must_lock_as(watched, AUDIT(NOWRITE));
	check(blk_io(BLK_IN, 8, watched, SECTOR), "a disk read into a watched page failed");
	device_event("a sector into the watched page", watched, 1, 5);
	check(blk_io(BLK_OUT, 8, watched, SECTOR) && is_pattern(watched, SECTOR, 4), "a disk read did not land in a watched page");
	dma_read_event("a watched sector again", watched, 5);
	check(guard_config().violations > c.violations, "what was watched is not counted");

	/* Writing there by DMA is not denied. */
	check(blk_io(BLK_IN, 8, page, SECTOR), "a disk read into a page that is only NOREAD failed");
	pass_or_fail(test_name);
}

void t_read_busy(void)
{
	struct response r;
	u32 head, len;
	u8 *page;

	need_noread(0);
	blk_start();
	page = alloc_lone_page();
	pattern(page, SECTOR, 1);
	blk_send(BLK_OUT, 0, page, SECTOR);
	wait_ns(50000000);
	if (vq_pop(&blk_q, &head, &len))
		skip("the disk answers at once: latency-ns is needed");
	r = lock_as(page, NOREAD);
	if (vq_pop(&blk_q, &head, &len))
		skip("the disk answered before the lock: give it more latency");
	check(r.status == EBUSY, "status %u for a page that a disk is reading, not EBUSY", r.status);
	check(r.index == 0, "index 0x%x, not 0", r.index);
	check(guard_config().ranges_in_force == 0, "EBUSY, and yet %u ranges in force", guard_config().ranges_in_force);
	/* The disk does not write to it. */
	r = lock_as(page, NOWRITE);
	check(!r.status, "status %u for NOWRITE on a page that is only read", r.status);
	check(vq_wait(&blk_q, &head, &len, 30000000000ull) && *(volatile u8 *)(header + 1) == 0, "the write did not end well");
	for (u64 t = now_ns(); (r = lock_as(page, NOREAD)).status == EBUSY && now_ns() - t < 5000000000ull; )
		wait_ns(10000000);
	check(!r.status, "status %u after the write has ended", r.status);
	pass_or_fail(test_name);
}

static struct vdev rng;
static struct vq rng_q;

static void rng_start(void)
{
	if (!rng.common && !vdev_find(&rng, 4, 0))
		skip("no virtio-rng-pci");
	vdev_reset(&rng);
	if (!vdev_negotiate(&rng, F_VERSION_1 | F_INDIRECT_DESC))
		fail("virtio-rng: FEATURES_OK refused");
}

static bool rng_answers(u64 *buffer, u64 timeout_ns)
{
	u64 any = 0;
	u16 seen = rng_q.last_used;

	for (u64 t = now_ns(); now_ns() - t < timeout_ns && rng_q.used->idx == seen && !(vdev_status(&rng) & ST_NEEDS_RESET); )
		relax();
	for (u32 i = 0; i < 8; i++)
		any |= READ_ONCE(buffer[i]);
	return any;
}

static void rng_works(const char *when)
{
	u64 *buffer = alloc_page();
	struct sg sg = { (u64)buffer, 64, true };

	memset(buffer, 0, 64);
	rng_start();
	vq_setup(&rng_q, &rng, 0, NULL);
	vdev_ok(&rng);
	vq_add(&rng_q, &sg, 1);
	vq_kick(&rng_q);
	check(rng_answers(buffer, 10000000000ull), "%s: virtio-rng does not work", when);
}

enum part { DESC, AVAIL, INDIRECT };

/* A good request, a part of which lies in a NOREAD page when the device looks: it must not be carried out. */
static void hidden_part(const char *what, enum part part)
{
	u8 *page = alloc_lone_page();
	u64 *buffer = alloc_page();
	struct sg sg = { (u64)buffer, 64, true };
	struct response r;
	int head = -1;

	memset(page, 0, PAGE);
	memset(buffer, 0, 64);
	rng_start();
	vq_setup(&rng_q, &rng, 0, NULL);
	if (part == DESC) {
		memcpy(page, rng_q.desc, rng_q.size * sizeof(*rng_q.desc));
		rng_q.desc = (struct desc *)page;
	} else if (part == AVAIL) {
		memcpy(page, rng_q.avail, sizeof(*rng_q.avail));
		rng_q.avail = (struct avail *)page;
	}
	vq_announce(&rng_q);
	vdev_ok(&rng);
	if (part != INDIRECT) {
		/* In use: QEMU has it mapped. */
		r = lock_as(page, NOREAD);
		check(r.status == EBUSY && r.index == 0, "%s: status %u, index 0x%x while in use", what, r.status, r.index);
		vdev_reset(&rng);
		vq_add(&rng_q, &sg, 1);
	} else {
		/* Not made available: a device looks without being notified, too. */
		head = vq_prepare_indirect(&rng_q, (struct desc *)page, &sg, 1);
	}
	for (u64 t = now_ns(); (r = lock_as(page, NOREAD)).status == EBUSY && now_ns() - t < 5000000000ull; )
		wait_ns(10000000);
	check(!r.status, "%s: status %u when it is not in use", what, r.status);
	if (part != INDIRECT) {
		rng_start();
		vq_announce(&rng_q);
		vdev_ok(&rng);
	} else {
		vq_publish(&rng_q, head);
	}
	vq_kick(&rng_q);
	check(!rng_answers(buffer, 500000000), "%s: the device has read it", what);
	diag("%s: device status 0x%x", what, vdev_status(&rng));
	dma_read_event(what, page, 2);
	rng_works(what);
}

/* The same with the guard device's own, which QEMU has mapped for the companion. */
static void hidden_guard_ring(void)
{
	struct vq hidden = guard.control;
	u64 answer[2] = { ~0ull, ~0ull };
	struct request *req = request_buffer();
	u8 *page = alloc_lone_page();
	struct sg sg[2] = { { (u64)req, 8 + 24, false }, { (u64)answer, sizeof(answer), true } };
	struct response r = lock_as(hidden.desc, NOREAD);

	check(r.status == EBUSY && r.index == 0, "own descriptor table: status %u, index 0x%x", r.status, r.index);
	req->ranges[0] = (struct range) { gfn_of(page), gfn_of(page), NOWRITE };
	guard_start(F_VERSION_1 | F_NOWRITE | F_NOREAD, true, NULL, NULL);
	hidden.last_used = hidden.used->idx;
	hidden.inflight = 0;
	vq_publish(&hidden, vq_prepare_indirect(&hidden, alloc_page(), sg, 2));
	for (u64 t = now_ns(); (r = lock_as(hidden.desc, NOREAD)).status == EBUSY && now_ns() - t < 5000000000ull; )
		wait_ns(10000000);
	check(!r.status, "own descriptor table: status %u when it is no longer in use", r.status);
	vdev_reset(&guard.dev);
	vdev_negotiate(&guard.dev, F_VERSION_1 | F_NOWRITE | F_NOREAD | F_INDIRECT_DESC);
	vq_announce(&hidden);
	vdev_ok(&guard.dev);
	vq_kick(&hidden);
	wait_ns(500000000);
	check(READ_ONCE(answer[0]) == ~0ull, "a request in a ring that cannot be read was answered: 0x%lx", answer[0]);
	guard_start(F_VERSION_1 | F_NOWRITE | F_NOREAD, true, NULL, NULL);
	writable("the page of that request", page);
	must_lock_as(page, NOWRITE);
}

void t_read_ring(void)
{
	struct response r;

	need_noread(0);
	rng_works("at the beginning");
	/* Its flags are read by the device that writes it. */
	r = lock_as((const void *)rng_q.used, NOREAD);
	check(r.status == EBUSY && r.index == 0, "used ring in use: status %u, index 0x%x", r.status, r.index);
	hidden_part("descriptor table", DESC);
	hidden_part("available ring", AVAIL);
	hidden_part("indirect table", INDIRECT);
	hidden_guard_ring();
	pass_or_fail(test_name);
}
