/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A locked page against everything that writes memory without a store instruction: virtio-rng (random bytes into any buffer),
 * fw_cfg DMA, virtio-balloon, virtio-blk, and the companion's own rings.  Each device is optional; without it: SKIP.
 */
#include "guest.h"

enum outcome { USED, BROKEN, SILENT };
static const char *const outcome_name[] = { "completed", "device asks for reset", "no completion" };

static struct vdev rng;
static struct vq rng_q;

static void rng_start(void *used_page)
{
	if (!rng.common && !vdev_find(&rng, 4, 0))
		skip("no virtio-rng");
	vdev_reset(&rng);
	if (!vdev_negotiate(&rng, F_VERSION_1) || !rng.features)
		fail("virtio-rng: FEATURES_OK refused");
	vq_setup(&rng_q, &rng, 0, used_page);
	vdev_ok(&rng);
}

static enum outcome finish(struct vdev *v, struct vq *q, u64 timeout_ns)
{
	u32 head, len;

	vq_kick(q);
	for (u64 t = now_ns(); now_ns() - t < timeout_ns; relax()) {
		if (vq_pop(q, &head, &len))
			return USED;
		if (vdev_status(v) & ST_NEEDS_RESET)
			return BROKEN;
	}
	return SILENT;
}

static enum outcome rng_write(void *to, u32 len)
{
	struct sg sg = { (u64)to, len, true };

	if (vq_add(&rng_q, &sg, 1) < 0)
		fail("virtio-rng: queue full");
	return finish(&rng, &rng_q, 2000000000ull);
}

static void rng_works(const char *when, u8 *page)
{
	u64 *p = (u64 *)page, any = 0;

	memset(page, 0, 64);
	check(rng_write(page, 64) == USED, "%s: virtio-rng does not complete a request", when);
	for (u32 i = 0; i < 8; i++)
		any |= READ_ONCE(p[i]);
	check(any != 0, "%s: virtio-rng has written nothing", when);
}

static void dma_event(const char *what, u8 *page)
{
	struct event e;

	if (!check(next_event_on(page, &e, 5000000000ull), "%s: no event", what))
		return;
	check(e.source == SOURCE_DMA, "%s: event source 0x%x, not a device", what, e.source);
	check(e.type == 1 && e.access == 1, "%s: event type %u, access %u", what, e.type, e.access);
	check(e.rip == UNKNOWN && e.gva == UNKNOWN, "%s: a device has rip 0x%lx, gva 0x%lx", what, e.rip, e.gva);
}

void t_lock_dma(void)
{
	u8 *page, *other;
	enum outcome o;

	guard_open();
	rng_start(NULL);
	other = alloc_lone_page();
	page = alloc_lone_page();
	rng_works("before the lock", page);
	fill(page, 20);
	must_lock(page);

	o = rng_write(page + 0x100, 64);
	diag("64 bytes into the locked page: %s", outcome_name[o]);
	check(intact(page, 20), "virtio-rng has written into the locked page");
	dma_event("64 bytes", page);
	rng_start(NULL);
	rng_works("after the refused write and a reset", other);

	o = rng_write(page - 32, 64);
	diag("32 bytes before the locked page and 32 in it: %s", outcome_name[o]);
	check(intact(page, 20), "a buffer that ends in the locked page was written there");
	rng_start(NULL);
	o = rng_write(page + PAGE - 32, 64);
	diag("32 bytes in the locked page and 32 after it: %s", outcome_name[o]);
	check(intact(page, 20), "a buffer that begins in the locked page was written there");
	rng_start(NULL);
	o = rng_write(page - PAGE, 3 * PAGE);
	diag("three pages, the locked one in the middle: %s", outcome_name[o]);
	check(intact(page, 20), "a buffer around the locked page was written there");
	rng_start(NULL);
	rng_works("at the end", other);
	rng_works("at the end, next to the locked page", page + PAGE);
	pass_or_fail(test_name);
}

struct fw_cfg_dma { u32 control, length; u64 address; };

static u32 fw_cfg_dma(struct fw_cfg_dma *d)
{
	outl(0x514, 0);
	outl(0x518, __builtin_bswap32((u32)(u64)d));
	for (u64 t = now_ns(); now_ns() - t < 1000000000ull && (READ_ONCE(d->control) & ~__builtin_bswap32(1)); )
		relax();
	return __builtin_bswap32(d->control);
}

static void fw_cfg_order(struct fw_cfg_dma *d, void *to, u32 len)
{
	/* Select the file directory (0x19) and read it. */
	*d = (struct fw_cfg_dma) { __builtin_bswap32(0x19 << 16 | 8 | 2), __builtin_bswap32(len), __builtin_bswap64((u64)to) };
}

void t_lock_fwcfg(void)
{
	struct fw_cfg_dma *d;
	u8 *page, *control;
	u32 c;

	if (machine_mmio())
		skip("no fw_cfg");
	guard_open();
	d = alloc_page();
	page = alloc_lone_page();
	control = alloc_lone_page();
	fill(page, 21);
	fw_cfg_order(d, page, 64);
	c = fw_cfg_dma(d);
	check(c == 0 && !intact(page, 21), "fw_cfg DMA does not work before the lock: control 0x%x", c);
	fill(page, 21);
	fill(control, 22);
	fw_cfg_order((struct fw_cfg_dma *)control, page + PAGE, 8);
	must_lock(page);
	fw_cfg_order(d, page + 0x100, 64);
	diag("control afterwards: 0x%x", fw_cfg_dma(d));
	check(intact(page, 21), "fw_cfg DMA has written into the locked page");
	dma_event("fw_cfg DMA", page);
	/* The answer goes where the order lies. */
	must_lock(control);
	diag("control in a locked page afterwards: 0x%x", fw_cfg_dma((struct fw_cfg_dma *)control));
	check(*(u32 *)control == __builtin_bswap32(0x19 << 16 | 8 | 2), "fw_cfg has answered into the locked page");
	fw_cfg_order(d, page + PAGE, 64);
	check(fw_cfg_dma(d) == 0, "fw_cfg DMA no longer works elsewhere");
	pass_or_fail(test_name);
}

void t_lock_balloon(void)
{
	struct vdev v;
	struct vq q, deflate;
	u8 *page;
	u32 *pfns;
	struct sg sg;
	enum outcome o;

	guard_open();
	if (!vdev_find(&v, 5, 0))
		skip("no virtio-balloon-pci");
	vdev_reset(&v);
	if (!vdev_negotiate(&v, F_VERSION_1))
		fail("virtio-balloon: FEATURES_OK refused");
	vq_setup(&q, &v, 0, NULL);
	vq_setup(&deflate, &v, 1, NULL);
	vdev_ok(&v);
	page = alloc_lone_page();
	pfns = alloc_page();
	fill(page, 23);
	must_lock(page);
	pfns[0] = gfn_of(page);
	sg = (struct sg) { (u64)pfns, 4, false };
	vq_add(&q, &sg, 1);
	o = finish(&v, &q, 2000000000ull);
	diag("inflating by the locked page: %s", outcome_name[o]);
	check(intact(page, 23), "the balloon took the locked page away");
	still_locked("after the balloon", page, 23);
	pass_or_fail(test_name);
}

/* A disk with a latency (null-co) holds its buffer mapped for the time of a read. */
void t_lock_busy(void)
{
	struct vdev v;
	struct vq q;
	u8 *page;
	struct { u32 type, reserved; u64 sector; } *header;
	volatile u8 *status;
	struct sg sg[3];
	struct response r;
	u32 head, len;

	guard_open();
	if (!vdev_find(&v, 2, 0))
		skip("no virtio-blk-pci (on null-co with latency-ns)");
	vdev_reset(&v);
	if (!vdev_negotiate(&v, F_VERSION_1))
		fail("virtio-blk: FEATURES_OK refused");
	vq_setup(&q, &v, 0, NULL);
	vdev_ok(&v);
	page = alloc_lone_page();
	header = alloc_page();
	status = (u8 *)header + 64;
	memset(header, 0, 64);
	*status = 0xff;
	fill(page, 24);
	sg[0] = (struct sg) { (u64)header, 16, false };
	sg[1] = (struct sg) { (u64)page, 512, true };
	sg[2] = (struct sg) { (u64)status, 1, true };
	vq_add(&q, sg, 3);
	vq_kick(&q);
	wait_ns(50000000);		/* an iothread may take it up */
	if (vq_pop(&q, &head, &len))
		skip("the disk answers at once: latency-ns is needed");
	request_buffer()->ranges[0] = (struct range) { gfn_of(header) + 64, gfn_of(header) + 64, NOWRITE };
	request_buffer()->ranges[1] = (struct range) { gfn_of(page), gfn_of(page), NOWRITE };
	r = guard_lock_ranges(2);
	if (vq_pop(&q, &head, &len))
		skip("the disk answered before the lock: give it more latency");
	check(r.status == EBUSY, "status %u for a page with DMA under way, not EBUSY", r.status);
	check(r.index == 1, "index 0x%x, not 1", r.index);
	check(guard_config().ranges_in_force == 0, "EBUSY, and yet %u ranges in force", guard_config().ranges_in_force);
	writable("while busy", page + PAGE / 2);
	check(vq_wait(&q, &head, &len, 30000000000ull) && *status == 0, "the disk's read did not end well: %u", *status);
	check(!intact(page, 24), "the read that was under way did not land");
	fill(page, 24);
	for (u64 t = now_ns(); (r = guard_lock(page, 1)).status == EBUSY && now_ns() - t < 5000000000ull; )
		wait_ns(10000000);
	check(!r.status, "status %u after the read has ended", r.status);
	still_locked("after the read", page, 24);
	*status = 0xff;
	vq_add(&q, sg, 3);
	diag("a read into the locked page: %s, status %u", outcome_name[finish(&v, &q, 30000000000ull)], *status);
	check(intact(page, 24), "a disk read into the locked page has landed");
	pass_or_fail(test_name);
}

/* Another device's used ring, which QEMU maps once and keeps. */
void t_lock_ring(void)
{
	u8 *ring, *buffer, *copy;
	struct response r;

	guard_open();
	ring = alloc_lone_page();
	buffer = alloc_lone_page();
	copy = alloc_page();
	memset(ring, 0, PAGE);
	rng_start(ring);
	rng_works("before the lock", buffer);
	r = guard_lock(ring, 1);
	diag("lock of a used ring in use: status %u", r.status);
	check(r.status == 0 || (r.status == EBUSY && r.index == 0), "status %u, index 0x%x", r.status, r.index);
	if (r.status == EBUSY) {
		rng_works("after EBUSY", buffer);
		vdev_reset(&rng);
		/* QEMU lets go of a mapping a little later (RCU). */
		for (u64 t = now_ns(); (r = guard_lock(ring, 1)).status == EBUSY && now_ns() - t < 5000000000ull; )
			wait_ns(10000000);
		check(!r.status, "status %u when the ring is no longer in use", r.status);
	}
	memcpy(copy, ring, PAGE);
	diag("a request with the used ring locked: %s", outcome_name[rng_write(buffer, 64)]);
	check(!memcmp(copy, ring, PAGE), "a locked used ring was written");
	if (!vdev_find(&rng, 4, 0))
		fail("virtio-rng is gone");
	rng_start(ring);
	diag("the same after a new set-up: %s", outcome_name[rng_write(buffer, 64)]);
	check(!memcmp(copy, ring, PAGE), "a used ring set up on a locked page was written");
	rng_start(NULL);
	rng_works("with a ring elsewhere", buffer);
	pass_or_fail(test_name);
}

/* The companion maps guest memory too: its answers, events and used rings must not become a way round. */
void t_lock_companion(void)
{
	struct request *req;
	struct event e;
	struct config c;
	struct sg sg[3];
	u8 *page, *good;
	u32 len, head;

	guard_open();
	page = alloc_lone_page();
	good = alloc_lone_page();
	fill(page, 25);
	must_lock(page);
	req = request_buffer();
	req->ranges[0] = (struct range) { gfn_of(good), gfn_of(good), NOWRITE };
	sg[0] = (struct sg) { (u64)req, 8 + 24, false };

	c = guard_config();
	sg[1] = (struct sg) { (u64)page + 0x100, 16, true };
	len = guard_send_sg(sg, 2);
	check(len == 0, "used length %u for a response buffer in a locked page", len);
	check(intact(page, 25), "the answer was written into the locked page");
	check(guard_config().malformed == c.malformed + 1, "not counted as malformed");
	sg[1] = (struct sg) { (u64)page - 8, 16, true };
	len = guard_send_sg(sg, 2);
	check(len == 0, "used length %u for a response buffer that ends in a locked page", len);
	check(intact(page, 25), "half of the answer was written into the locked page");
	writable("the page of a request that had no room for an answer", good);

	guard_start(F_VERSION_1 | F_NOWRITE, false, NULL, NULL);
	c = guard_config();
	post_event(page + 0x200, 64);
	post_events(4);
	still_locked("with an event buffer in the locked page", page, 25);
	check(vq_wait(&guard.events, &head, &len, 5000000000ull) && len == 0,
	      "an event buffer in a locked page did not come back empty");
	check(next_event(&e, &len, 5000000000ull) && len == 64 && e.gpa >> 12 == gfn_of(page), "no event in the next buffer");
	check(intact(page, 25), "the event was written into the locked page");
	check(guard_config().malformed == c.malformed + 1, "the event buffer was not counted as malformed");

	guard_start(F_VERSION_1 | F_NOWRITE, false, NULL, page);
	post_events(4);
	still_locked("with the events' used ring in the locked page", page, 25);
	wait_ns(500000000);
	check(intact(page, 25), "the events' used ring was written into the locked page");

	guard_start(F_VERSION_1 | F_NOWRITE, false, page, NULL);
	sg[1] = (struct sg) { (u64)good + 0x100, 16, true };
	vq_add(&guard.control, sg, 2);
	vq_kick(&guard.control);
	wait_ns(500000000);
	check(intact(page, 25), "the control queue's used ring was written into the locked page");

	guard_start(F_VERSION_1 | F_NOWRITE, true, NULL, NULL);
	must_lock(good);
	still_locked("at the end", page, 25);
	pass_or_fail(test_name);
}
