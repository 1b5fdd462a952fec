/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Requests that must be refused, with which errno and which index, and that nothing of a refused one is applied. */
#include "guest.h"

static void every_other(u8 *base, u32 n)
{
	struct request *r = request_buffer();

	for (u32 i = 0; i < n; i++) {
		u64 gfn = gfn_of(base) + 2 * i;

		r->ranges[i] = (struct range) { gfn, gfn, NOWRITE };
	}
}

static void writable_at(u8 *base, u32 i)
{
	writable("an entry of a refused request", base + 2ul * i * PAGE);
}

void t_atomic(void)
{
	static const struct { const char *name; struct range range; } bad[] = {
		{ "start after end", { 5, 4, NOWRITE } },
		{ "not RAM", { 0xfee00, 0xfee00, NOWRITE } },
		{ "no attributes", { 0x1000, 0x1000, 0 } },
	};
	u32 n = opt_num("n", MAX_REQ), at[5], n_at = 0;
	struct response r;
	u8 *base;

	guard_open();
	request_buffer();
	base = alloc_pages(2 * n + 1);
	if (opt_num("bad", UNKNOWN) != UNKNOWN)
		at[n_at++] = opt_num("bad", 0);
	at[n_at++] = 0;
	at[n_at++] = n / 2;
	at[n_at++] = n - 1;
	at[n_at++] = (rdtsc() >> 4) * 2654435761u % n;
	for (u32 k = 0; k < ARRAY_SIZE(bad); k++)
		for (u32 i = 0; i < n_at; i++) {
			u32 b = at[i];

			if (b >= n)
				fail("bad=%u, but there are %u entries", b, n);
			every_other(base, n);
			request_buffer()->ranges[b] = bad[k].range;
			r = guard_lock_ranges(n);
			check(r.status == EINVAL, "%s at %u of %u: status %u", bad[k].name, b, n, r.status);
			check(r.index == b, "%s at %u of %u: index 0x%x", bad[k].name, b, n, r.index);
			check(guard_config().ranges_in_force == 0, "%s at %u: %u ranges in force", bad[k].name, b,
			      guard_config().ranges_in_force);
			for (u32 j = 0; j < n; j += n / 32 + 1)
				writable_at(base, j);
			writable_at(base, b ? b - 1 : 0);
			writable_at(base, b);
			writable_at(base, MIN(b + 1, n - 1));
			writable_at(base, n - 1);
		}
	/* The same without a bad entry. */
	every_other(base, n);
	fill(base + (n / 2) * 2ul * PAGE, 50);
	r = guard_lock_ranges(n);
	check(!r.status, "the good request: status %u, index 0x%x", r.status, r.index);
	check(guard_config().ranges_in_force == n, "%u ranges in force, not %u", guard_config().ranges_in_force, n);
	still_locked("the good request", base + (n / 2) * 2ul * PAGE, 50);
	pass_or_fail(test_name);
}

static struct config config;
static struct response *answer;
static u32 n_cases, n_failed;

static void verdict(const char *name, bool ok, u32 used, u32 status, u32 index)
{
	struct config c = guard_config();

	n_cases++;
	if (c.ranges_in_force != config.ranges_in_force) {
		diag("%u ranges in force, not %u", c.ranges_in_force, config.ranges_in_force);
		ok = false;
	}
	config = c;
	if (ok) {
		print("PASS errors/%s\n", name);
		return;
	}
	n_failed++;
	print("FAIL errors/%s: used length %u, status %u, index 0x%x\n", name, used, status, index);
}

static void expect_sg(const char *name, const struct sg *sg, u32 n, u32 status, u32 index)
{
	u32 used;

	memset(answer, 0xee, sizeof(*answer));
	used = guard_send_sg(sg, n);
	verdict(name, used == 16 && answer->status == status && answer->index == index &&
		answer->value == (status ? 0 : config.generation), used, answer->status, answer->index);
}

/* The readable part is the first `len` bytes of request_buffer(). */
static void expect(const char *name, u32 len, u32 status, u32 index)
{
	struct sg sg[2] = { { (u64)request_buffer(), len, false }, { (u64)answer, sizeof(*answer), true } };

	expect_sg(name, len ? sg : sg + 1, len ? 2 : 1, status, index);
}

static void expect_malformed(const char *name, const struct sg *sg, u32 n)
{
	u64 before = guard_config().malformed;
	u32 used;

	memset(answer, 0xee, sizeof(*answer));
	used = guard_send_sg(sg, n);
	verdict(name, used == 0 && guard_config().malformed == before + 1 && answer->status == 0xeeeeeeee, used, answer->status,
		answer->index);
}

static void header(u16 type, u16 flags, u32 count)
{
	struct request *r = request_buffer();

	r->type = type;
	r->flags = flags;
	r->count = count;
}

static u64 good_gfn;

static void good_entries(u32 n)
{
	struct request *r = request_buffer();

	for (u32 i = 0; i < n; i++)
		r->ranges[i] = (struct range) { good_gfn, good_gfn, NOWRITE };
}

/* Three entries, the last one in question: index 2. */
static void expect_entry(const char *name, u64 start, u64 end, u64 attr, u32 status)
{
	header(1, 0, 3);
	good_entries(3);
	request_buffer()->ranges[2] = (struct range) { start, end, attr };
	expect(name, 8 + 3 * 24, status, 2);
}

static void framing(void)
{
	header(1, 0, 1);
	good_entries(MAX_REQ + 1);
	expect("no-readable-bytes", 0, EINVAL, NO_INDEX);
	expect("1-readable-byte", 1, EINVAL, NO_INDEX);
	expect("7-readable-bytes", 7, EINVAL, NO_INDEX);
	expect("header-only", 8, EINVAL, NO_INDEX);
	expect("entry-one-byte-short", 8 + 23, EINVAL, NO_INDEX);
	expect("entry-one-byte-long", 8 + 25, EINVAL, NO_INDEX);
	expect("more-entries-than-count", 8 + 48, EINVAL, NO_INDEX);
	header(1, 0, 2);
	expect("fewer-entries-than-count", 8 + 24, EINVAL, NO_INDEX);
	header(1, 0, 0);
	expect("count-0", 8, EINVAL, NO_INDEX);
	expect("count-0-with-an-entry", 8 + 24, EINVAL, NO_INDEX);
	header(1, 0, MAX_REQ + 1);
	expect("count-4097", 8 + 24 * (MAX_REQ + 1), E2BIG, NO_INDEX);
	expect("count-4097-one-entry", 8 + 24, E2BIG, NO_INDEX);
	header(1, 0, 0xffffffff);
	expect("count-all-ones", 8 + 24, E2BIG, NO_INDEX);
	header(1, 0, 0xaaaaaaab);	/* times 24 is 8 in 32 bits */
	expect("count-wraps-in-32-bits", 8 + 8, E2BIG, NO_INDEX);
	header(1, 0, 1);
	expect("count-1-bytes-of-4097", 8 + 24 * (MAX_REQ + 1), E2BIG, NO_INDEX);
}

static void types(void)
{
	static const u16 unknown[] = { 0, 5, 8, 9, 0x100, 0x101, 0xffff };	/* 5 to 8 without F_MSR */
	static const char *const name[] = { "type-0", "type-5", "type-8", "type-9", "type-256", "type-257", "type-65535" };

	for (u32 i = 0; i < ARRAY_SIZE(unknown); i++) {
		header(unknown[i], 0, 1);
		good_entries(1);
		expect(name[i], 8 + 24, EOPNOTSUPP, NO_INDEX);
	}
	header(5, 1, 1);
	expect("unknown-type-before-flags", 8 + 24, EOPNOTSUPP, NO_INDEX);
	header(1, 1, 1);
	expect("flags-1", 8 + 24, EINVAL, NO_INDEX);
	header(1, 0x8000, 1);
	expect("flags-0x8000", 8 + 24, EINVAL, NO_INDEX);
	header(1, 1, MAX_REQ + 1);
	expect("flags-before-count", 8 + 24, EINVAL, NO_INDEX);
}

static void faults(void)
{
	u64 beyond = 1ull << 40;
	struct sg out = { (u64)answer, sizeof(*answer), true };
	struct sg all[] = { { beyond, 32, false }, out };
	struct sg mmio[] = { { 0xfee00000, 32, false }, out };
	struct sg edge[] = { { ram_end - 16, 32, false }, out };
	struct sg wrap[] = { { ~0ull - 15, 32, false }, out };
	struct sg tail[] = { { (u64)request_buffer(), 8, false }, { beyond, 24, false }, out };
	struct sg no_write[] = { { (u64)request_buffer(), 32, false } };
	struct sg write_beyond[] = { { (u64)request_buffer(), 32, false }, { beyond, 16, true } };
	struct sg write_edge[] = { { (u64)request_buffer(), 32, false }, { ram_end - 8, 16, true } };
	struct sg write_short[] = { { (u64)request_buffer(), 32, false }, { (u64)answer, 15, true } };
	struct sg write_8[] = { { (u64)request_buffer(), 32, false }, { (u64)answer, 8, true } };
	struct sg read_late[] = { { (u64)request_buffer(), 8, false }, out, { (u64)request_buffer() + 8, 24, false } };
	struct sg read_last[] = { out, { (u64)request_buffer(), 32, false } };

	expect_sg("readable-outside-memory", all, 2, EFAULT, NO_INDEX);
	expect_sg("readable-in-mmio", mmio, 2, EFAULT, NO_INDEX);
	expect_sg("readable-over-the-end-of-memory", edge, 2, EFAULT, NO_INDEX);
	expect_sg("readable-wraps", wrap, 2, EFAULT, NO_INDEX);
	header(1, 0, 1);
	good_entries(1);
	expect_sg("entries-outside-memory", tail, 3, EFAULT, NO_INDEX);
	header(7, 0, 1);
	expect_sg("fault-before-unknown-type", tail, 3, EFAULT, NO_INDEX);
	header(1, 0, 1);
	expect_malformed("no-response", no_write, 1);
	expect_malformed("response-outside-memory", write_beyond, 2);
	expect_malformed("response-over-the-end-of-memory", write_edge, 2);
	expect_malformed("response-of-15-bytes", write_short, 2);
	expect_malformed("response-of-8-bytes", write_8, 2);
	expect_malformed("readable-after-writable", read_late, 3);
	expect_malformed("writable-first", read_last, 2);
}

static void entries(void)
{
	u64 top = ram_end >> 12;

	expect_entry("end-2^52", good_gfn, 1ull << 52, NOWRITE, EINVAL);
	expect_entry("start-and-end-2^52", 1ull << 52, 1ull << 52, NOWRITE, EINVAL);
	expect_entry("start-all-ones", ~0ull, ~0ull, NOWRITE, EINVAL);
	expect_entry("end-all-ones", 0, ~0ull, NOWRITE, EINVAL);
	expect_entry("start-after-end", good_gfn + 1, good_gfn, NOWRITE, EINVAL);
	expect_entry("attributes-0", good_gfn, good_gfn, 0, EINVAL);
	expect_entry("attribute-bit-4", good_gfn, good_gfn, 1 << 4, EINVAL);
	expect_entry("attribute-nowrite-and-bit-4", good_gfn, good_gfn, 1 << 4 | NOWRITE, EINVAL);
	expect_entry("attribute-bit-63", good_gfn, good_gfn, 1ull << 63 | NOWRITE, EINVAL);
	expect_entry("noexec", good_gfn, good_gfn, 2, EOPNOTSUPP);
	expect_entry("noread", good_gfn, good_gfn, 4, EOPNOTSUPP);
	expect_entry("noexec-kernel", good_gfn, good_gfn, 8, EOPNOTSUPP);
	expect_entry("nowrite-and-noexec", good_gfn, good_gfn, 3, EOPNOTSUPP);
	expect_entry("apic", 0xfee00, 0xfee00, NOWRITE, EINVAL);
	expect_entry("ioapic", 0xfec00, 0xfec00, NOWRITE, EINVAL);
	if (!machine_mmio())
		expect_entry("rom", 0xfffff, 0xfffff, NOWRITE, EINVAL);
	expect_entry("above-memory", 1ull << 32, 1ull << 32, NOWRITE, EINVAL);
	expect_entry("last-frame", (1ull << 52) - 1, (1ull << 52) - 1, NOWRITE, EINVAL);
	expect_entry("everything", 0, (1ull << 52) - 1, NOWRITE, EINVAL);
	expect_entry("first-frame-after-memory", top, top, NOWRITE, EINVAL);
	expect_entry("half-memory", top - 1, top, NOWRITE, EINVAL);
	if (guard.dev.common) {
		u64 at = (u64)guard.dev.common >> 12;

		expect_entry("this-device", at, at, NOWRITE, EINVAL);
	}
	/* The first of two. */
	header(1, 0, 4);
	good_entries(4);
	request_buffer()->ranges[1].attr = 0;
	request_buffer()->ranges[3].attr = 0;
	expect("first-of-two-bad-entries", 8 + 4 * 24, EINVAL, 1);
	/* Entry after entry, not check after check ... */
	good_entries(4);
	request_buffer()->ranges[1].attr = 2;
	request_buffer()->ranges[3].attr = 0;
	expect("noexec-then-no-attributes", 8 + 4 * 24, EOPNOTSUPP, 1);
	/* ... and what the VM finds comes last. */
	good_entries(4);
	request_buffer()->ranges[0].start = request_buffer()->ranges[0].end = 0xfee00;
	request_buffer()->ranges[2].attr = 2;
	expect("not-ram-then-noexec", 8 + 4 * 24, EOPNOTSUPP, 2);
}

/* Bends the chain that starts at `d` before the device may see it, and back before it is taken off the ring. */
static void expect_bent(const char *name, u16 d, struct desc bent)
{
	struct vq *q = &guard.control;
	struct desc good = q->desc[d];
	u64 before = guard_config().malformed, t;
	u32 head, len = ~0u;
	bool ok;

	q->desc[d] = bent;
	vq_publish(q, d);
	vq_kick(q);
	for (t = now_ns(); q->used->idx == q->last_used && now_ns() - t < 5000000000ull; )
		relax();
	q->desc[d] = good;
	ok = vq_pop(q, &head, &len) && len == 0 && guard_config().malformed == before + 1;
	verdict(name, ok, len, 0, 0);
}

static void endless_chains(void)
{
	struct sg sg[2] = { { (u64)request_buffer(), 32, false }, { (u64)answer, 16, true } };
	static struct desc table[2] __attribute__((aligned(16)));
	struct desc d;
	u16 head;

	guard_start(F_VERSION_1 | F_NOWRITE | F_INDIRECT_DESC, true, NULL, NULL);
	header(1, 0, 1);
	good_entries(1);
	head = vq_prepare(&guard.control, sg, 2);
	d = guard.control.desc[head];
	d.next = head;
	expect_bent("chain-loops", head, d);
	head = vq_prepare(&guard.control, sg, 2);
	d = guard.control.desc[head];
	d.next = 0x1000;
	expect_bent("next-beyond-the-queue", head, d);
	head = vq_prepare_indirect(&guard.control, table, sg, 2);
	d = guard.control.desc[head];
	d.addr = 1ull << 40;
	expect_bent("indirect-table-outside-memory", head, d);
}

static void chains(void)
{
	static struct desc table[257] __attribute__((aligned(16)));
	static struct sg sg[257];
	struct request *r = request_buffer();
	u8 *bytes = (u8 *)r;
	u32 head, len, n = 0;

	/* Cut into single bytes, answer too: how is of no importance.  A second lock of a page changes nothing. */
	guard_start(F_VERSION_1 | F_NOWRITE | F_INDIRECT_DESC, true, NULL, NULL);
	header(1, 0, 1);
	good_entries(1);
	check(guard_lock(r->ranges[0].start * PAGE + (u8 *)0, 1).status == 0, "the good entry does not lock");
	config = guard_config();
	for (u32 i = 0; i < 32; i++)
		sg[n++] = (struct sg) { (u64)bytes + i, 1, false };
	for (u32 i = 0; i < 16; i++)
		sg[n++] = (struct sg) { (u64)answer + i, 1, true };
	expect_sg("ok-in-single-bytes", sg, n, 0, NO_INDEX);
	sg[0] = (struct sg) { (u64)bytes, 32, false };
	sg[1] = (struct sg) { (u64)answer, 64, true };
	expect_sg("ok-with-a-long-response-buffer", sg, 2, 0, NO_INDEX);
	if (!(guard.dev.features & F_INDIRECT_DESC)) {
		verdict("indirect-offered", false, 0, 0, 0);
		return;
	}
	/* 10 entries: 248 readable descriptors of one byte, and enough writable ones. */
	for (u32 total = 256; total <= 257; total++) {
		header(1, 0, 10);
		good_entries(10);
		memset(answer, 0xee, sizeof(*answer));
		for (u32 i = 0; i < total; i++)
			sg[i] = i < 248 ? (struct sg) { (u64)bytes + i, 1, false } :
				(struct sg) { (u64)answer + (i - 248) * 2, 2, true };
		if (vq_add_indirect(&guard.control, table, sg, total) < 0)
			fail("control queue full");
		vq_kick(&guard.control);
		if (!vq_wait(&guard.control, &head, &len, reply_ns))
			fail("no answer for an indirect chain of %u descriptors", total);
		verdict(total == 256 ? "ok-in-256-descriptors" : "257-descriptors",
			len == 16 && answer->status == (total == 256 ? 0 : EINVAL) && answer->index == NO_INDEX, len, answer->status,
			answer->index);
	}
}

void t_errors(void)
{
	u8 *buffer;
	u32 used, head;

	guard_open();
	/* All other bits: not offered, or at least not negotiated. */
	guard_start(F_VERSION_1 | F_NOWRITE, true, NULL, NULL);
	answer = alloc_page();
	buffer = alloc_page();
	good_gfn = gfn_of(alloc_lone_page());
	config = guard_config();
	check(config.max_request_ranges == MAX_REQ, "max_request_ranges is %u", config.max_request_ranges);

	framing();
	types();
	faults();
	entries();
	writable("the good entry of all those refused requests", (void *)(good_gfn * PAGE));

	/* Not negotiated: not to be had. */
	guard_start(F_VERSION_1, true, NULL, NULL);
	header(1, 0, 1);
	good_entries(1);
	expect("nowrite-not-negotiated", 8 + 24, EOPNOTSUPP, 0);
	writable("nowrite not negotiated", (void *)(good_gfn * PAGE));

	endless_chains();
	chains();

	/* An event buffer that is too short comes back empty, at the latest when there is an event. */
	guard_start(F_VERSION_1 | F_NOWRITE, false, NULL, NULL);
	post_event(buffer, 63);
	op_mov64((void *)(good_gfn * PAGE), SPOIL, NULL);
	used = ~0u;
	verdict("event-buffer-of-63-bytes",
		vq_wait(&guard.events, &head, &used, 5000000000ull) && used == 0, used, 0, 0);
	check(failures == 0, "see above");
	if (n_failed)
		check(false, "%u of %u cases", n_failed, n_cases);
	diag("%u cases, %u failed", n_cases, n_failed);
	pass_or_fail(test_name);
}
