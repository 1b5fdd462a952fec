/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Requests of PROTECT_KERNEL that must be refused, with which errno and which index: the rows of docs/device.md in their order,
 * some of them together with what a later row is about.
 */
#include "guest.h"

#define ROOM	(sizeof(struct kernel_response))

static struct kernel_response *answer;
static u64 *root;
static u64 page;		/* a frame that is mapped read-only, the next two are W+X and not mapped */
static u32 n_cases, n_failed, in_force;

static void verdict(const char *name, bool ok, u32 used)
{
	n_cases++;
	if (guard_config().ranges_in_force != in_force) {
		diag("%u ranges in force, not %u", guard_config().ranges_in_force, in_force);
		ok = false;
	}
	if (ok) {
		print("PASS kernel-errors/%s\n", name);
		return;
	}
	n_failed++;
	print("FAIL kernel-errors/%s: used length %u, status %u, index 0x%x, value %lu, pages %lu\n", name, used, answer->status,
	      answer->index, answer->value, answer->pages);
}

static void expect_sg(const char *name, const struct sg *sg, u32 n, u32 status, u32 index)
{
	u32 used;
	bool ok, counted;

	memset(answer, 0xee, PAGE);
	used = walk_send_sg(sg, n);
	ok = used == ROOM + answer->told * sizeof(struct range) && answer->status == status && answer->index == index &&
	     answer->value == (status ? 0 : guard_config().generation);
	/* Counts are told of what is found by the walk and after it.  EFAULT and EOVERFLOW can be either: see there. */
	counted = status == 0 || status == EACCES || status == EPERM;
	if (!counted && status != EFAULT && status != EOVERFLOW)
		ok = ok && !answer->pages && !answer->mappings && !answer->tables && !answer->ranges && !answer->told;
	if (counted)
		ok = ok && answer->pages && answer->tables;
	verdict(name, ok, used);
}

/* The request in the buffer, the first `len` bytes of it. */
static void expect_len(const char *name, u32 len, u32 status, u32 index)
{
	struct sg sg[2] = { { (u64)kernel_buffer(), len, false }, { (u64)answer, ROOM, true } };

	expect_sg(name, len ? sg : sg + 1, len ? 2 : 1, status, index);
}

static void expect(const char *name, u32 status, u32 index)
{
	expect_len(name, kernel_bytes(), status, index);
}

static void expect_malformed(const char *name, const struct sg *sg, u32 n)
{
	u64 before = guard_config().malformed;
	u32 used;

	memset(answer, 0xee, PAGE);
	used = walk_send_sg(sg, n);
	verdict(name, used == 0 && guard_config().malformed == before + 1 && answer->status == 0xeeeeeeee, used);
}

/* One that gets OK: three entries, the same page. */
static struct kernel_request *good(void)
{
	struct kernel_request *r = kernel_begin((u64)root, 0, (1ul << 30) - 1);

	r->flags = K_DRY_RUN;
	for (u32 i = 0; i < 3; i++)
		kernel_entry(page, page, NOWRITE);
	return r;
}

/* The same with its third entry changed: index 2. */
static void expect_entry(const char *name, u64 first, u64 last, u64 attr, u32 status)
{
	struct kernel_request *r = good();

	r->ranges[2] = (struct range) { first, last, attr };
	expect(name, status, status ? 2 : NO_INDEX);
}

static void types(void)
{
	static const u16 others[] = { 0, LOCK, PROTECT, SEAL, QUERY, MSR_LOCK, MSR_QUERY, PROTECT_KERNEL + 1, 0x109, 0xffff };
	static const char *const name[] = { "type-0", "lock", "protect", "seal", "query", "msr-lock", "msr-query", "type-10", "type-265",
					    "type-65535" };
	struct kernel_request *r;
	struct response c;

	for (u32 i = 0; i < ARRAY_SIZE(others); i++) {
		good()->type = others[i];
		expect(name[i], EOPNOTSUPP, NO_INDEX);
	}
	r = good();
	r->type = LOCK;
	r->flags = 0xfff0;
	r->count = 0;
	expect_len("type-before-flags", 8, EOPNOTSUPP, NO_INDEX);
	good();
	guard_send(r, kernel_bytes(), &c);
	check(c.status == EOPNOTSUPP && c.index == NO_INDEX, "on the control queue: status %u, index 0x%x", c.status, c.index);
}

static void framing(void)
{
	struct kernel_request *r = good();

	expect("good", 0, NO_INDEX);
	expect_len("no-readable-bytes", 0, EINVAL, NO_INDEX);
	expect_len("7-readable-bytes", 7, EINVAL, NO_INDEX);
	r = good();
	r->flags = 4;
	expect("flags-4", EINVAL, NO_INDEX);
	r->flags = 0x8000;
	expect("flags-0x8000", EINVAL, NO_INDEX);
	good();
	expect_len("8-readable-bytes", 8, EINVAL, NO_INDEX);
	expect_len("39-readable-bytes", 39, EINVAL, NO_INDEX);
	expect_len("header-only", 40, EINVAL, NO_INDEX);
	expect_len("one-byte-short", 40 + 3 * 24 - 1, EINVAL, NO_INDEX);
	expect_len("one-byte-long", 40 + 3 * 24 + 1, EINVAL, NO_INDEX);
	expect_len("fewer-entries-than-count", 40 + 2 * 24, EINVAL, NO_INDEX);
	expect_len("more-entries-than-count", 40 + 4 * 24, EINVAL, NO_INDEX);
	r->count = 0;
	expect_len("count-0", 40, EINVAL, NO_INDEX);
	r->levels = 9;
	r->root = 1;
	expect_len("count-0-before-levels", 40, EINVAL, NO_INDEX);
	r = good();
	r->count = MAX_REQ + 1;
	expect("count-4097", E2BIG, NO_INDEX);
	r->count = 0xffffffff;
	expect_len("count-all-ones", 40 + 24, E2BIG, NO_INDEX);
	r = good();
	r->count = 0;
	for (u32 i = 0; i < MAX_REQ; i++)
		kernel_entry(page, page, NOWRITE);
	expect("4096-entries", 0, NO_INDEX);
}

static void entries(void)
{
	u64 top = ram_end >> 12;
	struct kernel_request *r;

	expect_entry("end-2^52", page, 1ull << 52, NOWRITE, EINVAL);
	expect_entry("start-all-ones", ~0ull, ~0ull, NOWRITE, EINVAL);
	expect_entry("start-after-end", page + 1, page, NOWRITE, EINVAL);
	expect_entry("noexec", page, page, NOEXEC, EINVAL);
	expect_entry("noread", page, page, NOREAD | NOWRITE, EINVAL);
	expect_entry("audit-noread", page, page, AUDIT(NOREAD), EINVAL);
	expect_entry("bit-4", page, page, NOWRITE | 1 << 4, EINVAL);
	expect_entry("bit-63", page, page, NOWRITE | IMMUTABLE, EINVAL);
	expect_entry("bit-12", page, page, 1 << 12, EINVAL);
	expect_entry("left-alone", page + 1, page + 1, 0, 0);
	expect_entry("no-memory-left-alone", 1ull << 40, 1ull << 40, 0, 0);
	expect_entry("noexec-kernel-not-negotiated", page, page, NOEXEC_KERNEL, EOPNOTSUPP);
	expect_entry("audit-not-negotiated", page, page, AUDIT(NOWRITE), EOPNOTSUPP);
	expect_entry("apic", 0xfee00, 0xfee00, NOWRITE, EINVAL);
	expect_entry("above-memory", 1ull << 32, 1ull << 32, NOWRITE, EINVAL);
	expect_entry("last-frame", (1ull << 52) - 1, (1ull << 52) - 1, NOWRITE, EINVAL);
	expect_entry("first-frame-after-memory", top, top, NOWRITE, EINVAL);
	expect_entry("half-memory", top - 1, top, NOWRITE, EINVAL);
	expect_entry("everything", 0, (1ull << 52) - 1, NOWRITE, EINVAL);
	r = good();
	r->ranges[1].start = r->ranges[1].end = 0xfee00;
	r->ranges[2].attr = NOREAD;
	expect("not-ram-then-noread", EINVAL, 2);
	r = good();
	r->ranges[2].attr = NOEXEC_KERNEL;
	r->levels = 3;
	expect("not-negotiated-before-levels", EOPNOTSUPP, 2);
	r = good();
	r->ranges[1].start = r->ranges[1].end = 0xfee00;
	r->levels = 3;
	expect("levels-before-not-ram", EINVAL, NO_INDEX);
	r = good();
	r->ranges[1].start = r->ranges[1].end = 0xfee00;
	r->root = ram_end;
	expect("not-ram-before-root", EINVAL, 1);
}

static void values(void)
{
	static const u8 bad_levels[] = { 0, 3, 6, 255 }, bad_bits[] = { 0, 31, 53, 255 };
	struct kernel_request *r;

#define BAD(name, set, status)	do { r = good(); set; expect(name, status, NO_INDEX); } while (0)
	for (u32 i = 0; i < 4; i++) {
		BAD("levels", r->levels = bad_levels[i], EINVAL);
		BAD("physical-bits", r->physical_bits = bad_bits[i], EINVAL);
	}
	BAD("unmapped-4", r->unmapped = 4, EINVAL);
	BAD("unmapped-255", r->unmapped = 255, EINVAL);
	BAD("write-exec-3", r->write_exec = 3, EINVAL);
	BAD("control-32", r->control |= 32, EINVAL);
	BAD("control-bit-31", r->control |= 1u << 31, EINVAL);
	BAD("root-not-aligned", r->root |= 8, EINVAL);
	BAD("root-with-pcid", r->root |= 0xfff, EINVAL);
	BAD("root-beyond-physical-bits", (r->physical_bits = 40, r->root = 1ull << 40), EINVAL);
	BAD("root-with-bit-63", r->root |= 1ull << 63, EINVAL);
	BAD("va-start-after-end", (r->va_start = PAGE, r->va_end = PAGE - 1), EINVAL);
	BAD("va-start-in-a-page", r->va_start = 8, EINVAL);
	BAD("va-end-in-a-page", r->va_end -= 1, EINVAL);
	BAD("va-end-is-a-page", r->va_end += 1, EINVAL);
	BAD("va-start-not-canonical", (r->va_start = 1ull << 47, r->va_end = ~0ull), EINVAL);
	BAD("va-end-not-canonical", r->va_end = 1ull << 47 | 0xfff, EINVAL);
	BAD("va-4-levels-of-5", (r->va_start = 0xff00ull << 48, r->va_end = r->va_start + 0xfff), EINVAL);
	BAD("va-of-both-halves", r->va_end = ~0ull, 0);
	BAD("root-after-memory", r->root = ram_end, EFAULT);
	BAD("root-in-mmio", r->root = 0xfee00000, EFAULT);
	BAD("root-high", (r->physical_bits = 52, r->root = (1ull << 52) - PAGE), EFAULT);
#undef BAD
}

static void found(void)
{
	static const struct { const char *name; u64 table; } no_tables[] = {
		{ "table-after-memory", 1ull << 33 }, { "table-in-mmio", 0xfee00000 }, { "table-at-the-end", 0x7ffffff000ull },
	};
	struct kernel_request *r;
	u64 *many = new_table(), base;

	for (u32 i = 0; i < ARRAY_SIZE(no_tables); i++) {
		u64 *bad = new_table();

		*bad = root[0];
		bad[1] = no_tables[i].table | F_P;
		r = good();
		r->root = (u64)bad;
		r->va_end = (1ul << 47) - 1;
		r->flags = 0;
		memset(answer, 0, PAGE);
		expect(no_tables[i].name, EFAULT, NO_INDEX);
		check(answer->pages == 1 && answer->told == 0 && answer->outside == 1 && answer->mappings == 2,
		      "%s: %lu pages, %lu outside, %lu mappings", no_tables[i].name, answer->pages, answer->outside, answer->mappings);
		r->ranges[2].start = r->ranges[2].end = page + 2;
		r->unmapped = U_REFUSE;
		expect("table-outside-before-unmapped", EFAULT, NO_INDEX);
		r->flags = K_DRY_RUN;
		expect("table-outside-and-unmapped", EACCES, 2);
		r->unmapped = U_LEAVE;
		expect(no_tables[i].name, 0, NO_INDEX);
		/* Not in the range, not read. */
		r->flags = K_DRY_RUN | K_LOCK;
		r->va_end = (1ul << 39) - 1;
		expect(no_tables[i].name, 0, NO_INDEX);
		check(answer->outside == 0, "%lu outside of the range", answer->outside);
	}
	r = good();
	r->ranges[1].start = r->ranges[1].end = page + 1;
	r->write_exec = U_REFUSE;
	expect("written-and-executed", EACCES, 1);
	r = good();
	r->ranges[2].start = r->ranges[2].end = page + 2;
	r->unmapped = U_REFUSE;
	expect("unmapped", EACCES, 2);

	/* Written and not, in turn: more ranges than can be set.  That is found before what may not be loosened. */
	base = gfn_of(alloc_pages(2 * MAX_REQ + 2));
	for (u64 i = 0; i < 2 * MAX_REQ + 2; i++)
		put_entry(many, 4, i * PAGE, 1, (base + i) << 12 | F_P | (i & 1 ? F_W : 0));
	must_lock((void *)(page << 12));
	in_force = 1;
	r = good();
	r->root = (u64)many;
	r->ranges[2] = (struct range) { base, base + 2 * MAX_REQ + 1, NOWRITE };
	r->flags = 0;
	expect("4097-ranges", EOVERFLOW, NO_INDEX);
	check(answer->ranges == MAX_REQ + 1 && answer->told == 0, "%lu ranges, %lu told", answer->ranges, answer->told);
	r->flags = K_LOCK;
	expect("4097-ranges-lock", EOVERFLOW, NO_INDEX);
	r->flags = K_DRY_RUN | K_LOCK;
	expect("4097-ranges-dry-run", 0, NO_INDEX);
	check(answer->ranges == MAX_REQ + 1, "%lu ranges", answer->ranges);
	/* Not mapped there, so it would be freed. */
	r->ranges[2].end -= 4;
	r->flags = 0;
	expect("loosened", EPERM, 1);
	r->ranges[0] = r->ranges[1] = r->ranges[2];
	r->ranges[1].start = r->ranges[1].end = page;
	r->ranges[2].start = r->ranges[2].end = page;
	expect("loosened-by-the-last", EPERM, 2);
	writable("nothing was set", (void *)(base << 12));
}

/* Beyond all measure: 2^20 ranges of frames that can be used for one thing, and one more. */
static void too_much(void)
{
	u64 *all = new_table();

	for (u64 i = 0; i <= 2048; i++) {
		u64 *table = alloc_page();

		for (u64 j = 0; j < 512; j++)
			table[j] = ((i << 9) + j) << 12 | F_P | (j & 1 ? F_W : 0);
		if (i == 2048)
			memset(table + 1, 0, PAGE - 8);
		put_entry(all, 4, i << 21, 2, (u64)table | F_P | F_W);
	}
	kernel_begin((u64)all, 0, (1ul << 33) - 1)->flags = K_DRY_RUN | K_LOCK;
	kernel_entry(page, page, NOWRITE);
	expect("more-than-2^20-ranges", EOVERFLOW, NO_INDEX);
	check(answer->pages == 0 && answer->mappings == 0, "%lu pages, %lu mappings", answer->pages, answer->mappings);
	kernel_buffer()->va_end = (2048ul << 21) - 1;
	expect("2^20-ranges", 0, NO_INDEX);
}

static void chains(void)
{
	static struct desc table[257] __attribute__((aligned(16)));
	static struct sg sg[258];
	struct sg out = { (u64)answer, ROOM, true };
	struct kernel_request *r = good();
	u8 *bytes = (u8 *)r;
	u32 len = kernel_bytes(), n = 0, head, used;
	u64 beyond = 1ull << 40;

	sg[0] = (struct sg) { (u64)r, len, false };
	sg[1] = (struct sg) { (u64)answer, ROOM - 1, true };
	expect_malformed("room-for-119", sg, 2);
	sg[1].len = 16;
	expect_malformed("room-for-16", sg, 2);
	expect_malformed("no-room", sg, 1);
	sg[1] = (struct sg) { beyond, ROOM, true };
	expect_malformed("answer-outside-memory", sg, 2);
	sg[1] = (struct sg) { ram_end - ROOM + 1, ROOM, true };
	expect_malformed("answer-over-the-end-of-memory", sg, 2);
	sg[2] = sg[0];
	sg[1] = out;
	expect_malformed("readable-after-writable", sg, 3);
	sg[0] = (struct sg) { beyond, len, false };
	expect_sg("readable-outside-memory", sg, 2, EFAULT, NO_INDEX);
	sg[0] = (struct sg) { (u64)r, len - 24, false };
	sg[1] = (struct sg) { beyond, 24, false };
	sg[2] = out;
	expect_sg("entry-outside-memory", sg, 3, EFAULT, NO_INDEX);
	/* Cut anywhere, and single bytes. */
	sg[2] = (struct sg) { (u64)answer, 5, true };
	sg[3] = (struct sg) { (u64)answer + 5, ROOM - 5, true };
	for (u32 cut = 1; cut < 64; cut += 7) {
		sg[0] = (struct sg) { (u64)r, cut, false };
		sg[1] = (struct sg) { (u64)r + cut, len - cut, false };
		expect_sg("ok-cut-in-two", sg, 4, 0, NO_INDEX);
	}
	if (!(guard.dev.features & F_INDIRECT_DESC)) {
		verdict("indirect-offered", false, 0);
		return;
	}
	for (n = 0; n < len; n++)
		sg[n] = (struct sg) { (u64)bytes + n, 1, false };
	for (u32 total = 256; total <= 257; total++) {
		for (u32 i = len; i < total; i++)
			sg[i] = (struct sg) { (u64)answer + i - len, 1, true };
		memset(answer, 0xee, PAGE);
		if (vq_add_indirect(&guard.walk, table, sg, total) < 0)
			fail("walk queue full");
		vq_kick(&guard.walk);
		if (!vq_wait(&guard.walk, &head, &used, reply_ns))
			fail("no answer to an indirect chain of %u descriptors", total);
		verdict(total == 256 ? "ok-in-256-descriptors" : "257-descriptors",
			used == ROOM && answer->status == (total == 256 ? 0 : EINVAL) && answer->index == NO_INDEX, used);
	}
}

/* Only what was negotiated; NOWRITE and KERNEL here. */
static void start(u64 more)
{
	guard_start(F_VERSION_1 | F_NOWRITE | F_INDIRECT_DESC | more, true, NULL, NULL);
}

void t_kernel_errors(void)
{
	struct response c;

	kernel_open();
	start(F_KERNEL);
	answer = alloc_page();
	root = new_table();
	page = gfn_of(alloc_pages(5)) + 1;
	put_entry(root, 4, 0, 1, page << 12 | F_P);
	put_entry(root, 4, PAGE, 1, (page + 1) << 12 | F_P | F_W);
	types();
	framing();
	entries();
	values();
	chains();
	found();
	/* An interpreter takes seconds to write the tables. */
	if (accel == ACCEL_TCG)
		too_much();

	/* Without its feature there is no such request; the queue is there all the same. */
	vdev_reset(&guard.dev);
	vdev_negotiate(&guard.dev, F_VERSION_1 | F_NOWRITE);
	vq_setup(&guard.control, &guard.dev, 0, NULL);
	vq_setup(&guard.events, &guard.dev, 1, NULL);
	vq_setup(&guard.walk, &guard.dev, 2, NULL);
	vdev_ok(&guard.dev);
	good();
	expect("not-negotiated", EOPNOTSUPP, NO_INDEX);
	good()->type = QUERY;
	expect("not-negotiated-query", EOPNOTSUPP, NO_INDEX);
	good();
	guard_send(kernel_buffer(), kernel_bytes(), &c);
	check(c.status == EOPNOTSUPP, "on the control queue, not negotiated: status %u", c.status);
	start(F_KERNEL);
	kernel_alive("errors");
	check(failures == 0, "see above");
	if (n_failed)
		check(false, "%u of %u cases", n_failed, n_cases);
	diag("%u cases, %u failed", n_cases, n_failed);
	pass_or_fail(test_name);
}
