/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * PROTECT_KERNEL (docs/device.md): requests on the walk queue, and page tables to name in them, which may be those that this
 * program runs on.  With fake=1 each request "succeeds" and nothing is protected, as in guard.c.
 */
#include "guest.h"

#define EFER_NXE	0x800ull

static struct kernel_request *request;
static struct kernel_response *response;
static bool fake;

static u64 read_cr4(void)
{
	u64 v;

	asm volatile("movq %%cr4, %0" : "=r"(v));
	return v;
}

static void cpuid(u32 leaf, u32 *a, u32 *d)
{
	u32 b, c;

	asm volatile("cpuid" : "=a"(*a), "=b"(b), "=c"(c), "=d"(*d) : "a"(leaf), "c"(0));
}

u64 loaded_root(void)
{
	u64 v;

	asm volatile("movq %%cr3, %0" : "=r"(v));
	return v & -PAGE;
}

void kernel_open(void)
{
	fake = opt_num("fake", 0);
	guard_open();
	if (!guard_has(F_KERNEL))
		skip("this host reads no page tables: features 0x%lx", guard.dev.offered);
	kernel_buffer();
	response = alloc_pages((sizeof(*response) + 2 * MAX_TOLD * sizeof(struct range) + PAGE - 1) / PAGE);
	write_msr(EFER, read_msr(EFER) | EFER_NXE);
}

u64 kernel_deny(void)
{
	return guard_config().deny_bits & (NOWRITE | NOEXEC_KERNEL);
}

struct kernel_request *kernel_buffer(void)
{
	if (!request)
		request = alloc_pages((sizeof(*request) + (MAX_REQ + 1) * sizeof(struct range) + PAGE - 1) / PAGE);
	return request;
}

struct kernel_request *kernel_begin(u64 root, u64 va_start, u64 va_end)
{
	struct kernel_request *r = kernel_buffer();
	u32 a, d;

	*r = (struct kernel_request) { .type = PROTECT_KERNEL, .root = root, .va_start = va_start, .va_end = va_end, .levels = 4 };
	cpuid(0x80000008, &a, &d);
	r->physical_bits = a;
	cpuid(0x80000001, &a, &d);
	r->control = (read_msr(EFER) & EFER_NXE ? C_NXE : 0) | (read_cr0() & 0x10000 ? C_WP : 0) |
		     (read_cr4() & 1 << 20 ? C_SMEP : 0) | (d & 1 << 26 ? C_GIB : 0);
	return r;
}

void kernel_entry(u64 first, u64 last, u64 attr)
{
	request->ranges[request->count++] = (struct range) { first, last, attr };
}

u32 kernel_bytes(void)
{
	return sizeof(*request) + request->count * sizeof(request->ranges[0]);
}

u32 walk_add(const struct sg *sg, u32 n)
{
	int sent;

	if (fake)
		fail("needs a guard device");
	sent = vq_add(&guard.walk, sg, n);
	if (sent < 0)
		fail("walk queue full");
	return sent;
}

u32 walk_send_sg(const struct sg *sg, u32 n)
{
	u32 head, len, sent = walk_add(sg, n);

	vq_kick(&guard.walk);
	if (!vq_wait(&guard.walk, &head, &len, reply_ns))
		fail("no answer on the walk queue in %lu s", reply_ns / 1000000000);
	if (head != sent)
		fail("answer for descriptor %u of the walk queue, sent was %u", head, sent);
	return len;
}

const struct kernel_response *kernel_ask(u32 room)
{
	struct sg sg[2] = { { (u64)request, kernel_bytes(), false },
			    { (u64)response, sizeof(*response) + room * sizeof(response->ranges_told[0]), true } };
	u32 used, want;

	if (fake) {
		*response = (struct kernel_response) { .index = NO_INDEX, .value = guard_config().generation };
		return response;
	}
	memset(response, 0xee, sizeof(*response) + room * sizeof(response->ranges_told[0]));
	used = walk_send_sg(sg, 2);
	want = sizeof(*response) + MIN(response->told, room) * sizeof(response->ranges_told[0]);
	check(used == want, "used length %u of an answer with status %u that tells %lu ranges, room for %u", used, response->status,
	      response->told, room);
	return response;
}

u64 *new_table(void)
{
	return memset(alloc_page(), 0, PAGE);
}

void put_entry(u64 *root, u32 levels, u64 va, u32 level, u64 entry)
{
	u64 *table = root, *slot;

	for (u32 at = levels; ; at--) {
		slot = &table[va >> (12 + 9 * (at - 1)) & 511];
		if (at == level)
			break;
		if (!(*slot & F_P))
			*slot = (u64)new_table() | F_P | F_W | F_U;
		table = (u64 *)(*slot & 0xffffffffff000ull);
	}
	WRITE_ONCE(*slot, entry);
}

/*
 * No two frames that follow each other in memory are mapped one after the other, so that all has to be sorted.  The frames are
 * above this machine's memory: a page that is mapped need not be RAM.
 */
u64 *slow_tables(u32 n)
{
	u64 *root = new_table(), frame = 0, frames = n * 512ul;

	for (u32 i = 0; i < n; i++) {
		u64 *table = alloc_page();

		for (u32 j = 0; j < 512; j++) {
			table[j] = (1ul << 36) + (frame << 12) + (F_P | F_W);
			/* Odd, so prime to a power of two. */
			frame = (frame + 40503) & (frames - 1);
		}
		put_entry(root, 4, (u64)i << 21, 2, (u64)table | F_P | F_W);
	}
	return root;
}

void kernel_alive(const char *what)
{
	static u64 *root, page;
	const struct kernel_response *r;
	struct response c;
	u32 used;

	if (!root) {
		root = new_table();
		page = (u64)alloc_page();
		put_entry(root, 4, 0, 1, page | F_P);
	}
	kernel_begin((u64)root, 0, PAGE - 1)->flags = K_DRY_RUN | K_LOCK;
	kernel_entry(page >> 12, page >> 12, NOWRITE);
	r = kernel_ask(0);
	check(r->status == 0 && r->given == 1 && r->mappings == 1, "%s: then a good walk: status %u, %lu given, %lu mappings", what,
	      r->status, r->given, r->mappings);
	c = guard_query(page >> 12, page >> 12, NULL, 0, &used);
	check(c.status == 0 && c.value <= 1, "%s: then QUERY: status %u, %lu entries", what, c.status, c.value);
}
