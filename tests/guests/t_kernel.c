/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * PROTECT_KERNEL: a page for each kind of mapping, and the proof, by stores and by running it, that each got what the
 * specification says and nothing more.  The expectations are written down here, not worked out.
 */
#include "guest.h"

#define BASE	0xffff900000000000ul	/* the upper half has nothing else of ours */
#define LAST	(BASE + (1ul << 30) - 1)
#define MARK	0x800u			/* where pages are attacked; they begin with code */

enum { MAPPED = 1, WRITTEN = 2, EXECUTED = 4 };

enum {
	READ_ONLY, DATA, ALIAS, CODE, BOTH, BOTH_BY_TWO, NOT_THERE, NOT_PRESENT, RESERVED, USER_DATA, USER_CODE, BELOW_RO, ALSO_BELOW_RO,
	BELOW_XD, ALSO_BELOW_XD, SHARED, PAGES
};

static const struct { const char *what; u8 rights; } kinds[PAGES] = {
	[READ_ONLY]	= { "read-only", MAPPED },
	[DATA]		= { "written", MAPPED | WRITTEN },
	[ALIAS]		= { "read-only here and written there", MAPPED | WRITTEN },
	[CODE]		= { "code", MAPPED | EXECUTED },
	[BOTH]		= { "written and executed", MAPPED | WRITTEN | EXECUTED },
	[BOTH_BY_TWO]	= { "written here and executed there", MAPPED | WRITTEN | EXECUTED },
	[NOT_THERE]	= { "without mapping", 0 },
	[NOT_PRESENT]	= { "in an entry that is not present", 0 },
	[RESERVED]	= { "below an entry with a reserved bit", 0 },
	[USER_DATA]	= { "user data", MAPPED | WRITTEN },
	[USER_CODE]	= { "user code", MAPPED | EXECUTED },
	[BELOW_RO]	= { "writable below an entry that is not", MAPPED },
	[ALSO_BELOW_RO]	= { "the same with another way", MAPPED | WRITTEN },
	[BELOW_XD]	= { "code below an entry with XD", MAPPED },
	[ALSO_BELOW_XD]	= { "the same with another way", MAPPED | EXECUTED },
	[SHARED]	= { "in a sub-tree with three ways", MAPPED },
};

/* Counted in the table above and in map_area(). */
enum {
	N_UNMAPPED = 3, N_NOT_WRITTEN = 7, N_NOT_EXECUTED = 8, N_WRITE_EXEC = 2, N_EXECUTED = 5, N_DATA = 4, N_MAPPINGS = 21, N_TABLES = 9,
};

static u8 *area;		/* PAGES pages, one before them and two after */
static u8 *user[PAGES];		/* what CPL 3 sees of them, from before all requests */

static u64 gfn(int kind)
{
	return gfn_of(area) + kind;
}

/* mov $42, %eax; ret */
static void fill_area(void)
{
	static const u8 code[] = { 0xb8, 42, 0, 0, 0, 0xc3 };

	area = (u8 *)alloc_pages(PAGES + 5) + 2 * PAGE;
	for (u32 i = 0; i < PAGES; i++) {
		memset(area + i * PAGE, 0, PAGE);
		memcpy(area + i * PAGE, code, sizeof(code));
		user[i] = user_page(area + i * PAGE);
	}
}

static void leaf(u64 *root, u32 levels, u32 slot, int kind, u64 flags)
{
	put_entry(root, levels, BASE + slot * PAGE, 1, gfn(kind) << 12 | flags);
}

/* A table of level 1 that maps one page. */
static u64 table_of(u32 kind, u64 flags)
{
	u64 *t = new_table();

	t[0] = gfn(kind) << 12 | flags;
	return (u64)t;
}

static void big_entry(u64 *root, u32 levels, u32 n, u64 entry)
{
	put_entry(root, levels, BASE + ((u64)n << 21), 2, entry);
}

/* All of `kinds`, and pages on both sides of the area that no request is about. */
static void map_area(u64 *root, u32 levels)
{
	u64 t;

	leaf(root, levels, 0, READ_ONLY, F_P | F_XD);
	leaf(root, levels, 1, DATA, F_P | F_W | F_XD);
	leaf(root, levels, 2, ALIAS, F_P | F_XD);
	leaf(root, levels, 3, ALIAS, F_P | F_W | F_XD);
	leaf(root, levels, 4, CODE, F_P);
	leaf(root, levels, 5, BOTH, F_P | F_W);
	leaf(root, levels, 6, BOTH_BY_TWO, F_P | F_W | F_XD);
	leaf(root, levels, 7, BOTH_BY_TWO, F_P);
	leaf(root, levels, 8, NOT_PRESENT, F_W);
	leaf(root, levels, 9, USER_DATA, F_P | F_W | F_U | F_XD);
	leaf(root, levels, 10, USER_CODE, F_P | F_U);
	leaf(root, levels, 510, -1, F_P | F_XD);
	leaf(root, levels, 511, PAGES, F_P | F_XD);
	big_entry(root, levels, 1, table_of(BELOW_RO, F_P | F_W | F_XD) | F_P | F_U);
	t = table_of(ALSO_BELOW_RO, F_P | F_W | F_XD);
	big_entry(root, levels, 2, t | F_P);
	big_entry(root, levels, 3, t | F_P | F_W);
	big_entry(root, levels, 4, table_of(BELOW_XD, F_P) | F_P | F_W | F_XD);
	t = table_of(ALSO_BELOW_XD, F_P);
	big_entry(root, levels, 5, t | F_P | F_XD);
	big_entry(root, levels, 6, t | F_P);
	t = table_of(SHARED, F_P | F_XD);
	for (u32 i = 7; i < 10; i++)
		big_entry(root, levels, i, t | F_P | F_W);
	/* A 2 MiB page that is not aligned. */
	big_entry(root, levels, 511, gfn(RESERVED) << 12 | 0x2000 | F_P | F_LARGE);
}

static struct kernel_request *begin(u64 root, u32 flags)
{
	struct kernel_request *r = kernel_begin(root, BASE, LAST);

	r->flags = flags;
	kernel_entry(gfn(0), gfn(PAGES - 1), kernel_deny());
	return r;
}

static u64 denied(u32 rights)
{
	u64 deny = 0;

	if (!(rights & MAPPED))
		return 0;
	if (!(rights & WRITTEN))
		deny |= NOWRITE;
	if (!(rights & EXECUTED))
		deny |= NOEXEC_KERNEL;
	return deny & kernel_deny();
}

/* Every count of the answer about map_area(). */
static void check_counts(const char *what, const struct kernel_response *r, u64 given, u64 ranges, u32 more_tables)
{
#define COUNT(field, want)	check(r->field == (want), "%s: " #field " %lu, not %lu", what, (u64)r->field, (u64)(want))
	COUNT(status, 0);
	COUNT(index, NO_INDEX);
	COUNT(value, guard_config().generation);
	COUNT(pages, PAGES);
	COUNT(unmapped, N_UNMAPPED);
	COUNT(not_written, N_NOT_WRITTEN);
	COUNT(not_executed, N_NOT_EXECUTED);
	COUNT(write_exec, N_WRITE_EXEC);
	COUNT(given, given);
	COUNT(elsewhere, 2);
	COUNT(ranges, ranges);
	COUNT(mappings, N_MAPPINGS);
	COUNT(reserved, 1);
	COUNT(outside, 0);
#undef COUNT
	/* A table that gives more rights by another way is read again. */
	check(r->tables >= N_TABLES + more_tables && r->tables <= (N_TABLES + more_tables) * 32, "%s: %lu tables", what, r->tables);
}

/* A store that must be refused, or must land. */
static void try_store(const char *what, const char *by, u8 *va, u32 cpl, const u8 *page, bool lands)
{
	volatile u64 *word = (volatile u64 *)(page + MARK);
	u64 before = *word;

	attempt(op_mov64, va + MARK, before + SPOIL, NULL, cpl);
	if (lands) {
		check(!trap_of(this_cpu())->count && *word == before + SPOIL, "%s: a store at CPL %u %s: %lu exceptions, %s", what, cpl, by,
		      trap_of(this_cpu())->count, *word == before ? "it did not land" : "it landed");
		return;
	}
	check_trap(what, cpl);
	check(*word == before, "%s: a store at CPL %u %s landed", what, cpl, by);
}

static void try_run(const char *what, u8 *page, u8 *by_user, bool runs)
{
	u64 got = call_code(page, 0, 0);

	if (runs) {
		check(got == 42, "%s: does not run", what);
	} else {
		check(got == FETCH_FAULT, "%s: runs", what);
		faulted(what, A_FETCH, (u64)page, 0);
	}
	/* NOEXEC_KERNEL is about the kernel. */
	check(call_code(by_user, 0, 3) == 42, "%s: does not run at CPL 3", what);
}

/* By mappings from before the request, and by new ones. */
static void attack_page(const char *what, u8 *page, u8 *by_user, u64 deny)
{
	bool lands = !(deny & NOWRITE);

	try_store(what, "by an old mapping", page, 0, page, lands);
	try_store(what, "by an old mapping", by_user, 3, page, lands);
	try_store(what, "by a new mapping", map_page((u64)page, F_P | F_W), 0, page, lands);
	try_store(what, "by a new mapping", user_page(page), 3, page, lands);
	try_run(what, page, by_user, !(deny & NOEXEC_KERNEL));
}

static void attack_area(const u64 *deny)
{
	for (u32 i = 0; i < PAGES; i++)
		attack_page(kinds[i].what, area + i * PAGE, user[i], deny[i]);
	writable("the page before", area - PAGE);
	writable("the page after", area + PAGES * PAGE);
	check(call_code(memcpy(area - PAGE, area, 8), 0, 0) == 42, "the page before does not run");
}

/* QUERY says this of the area, page by page. */
static void query_area(const char *what, const u64 *attr)
{
	static struct range got[PAGES + 2] __attribute__((aligned(64)));
	struct response r;
	u32 used;

	r = guard_query(gfn(0) - 1, gfn(PAGES), got, ARRAY_SIZE(got), &used);
	check(r.status == 0 && r.value <= ARRAY_SIZE(got), "%s: QUERY: status %u, %lu entries", what, r.status, r.value);
	for (u32 i = 0; i < PAGES + 2; i++) {
		u64 page = gfn(0) - 1 + i, want = i && i <= PAGES ? attr[i - 1] : 0, held = 0;

		for (u32 n = 0; n < MIN(r.value, ARRAY_SIZE(got)); n++)
			if (got[n].start <= page && page <= got[n].end)
				held = got[n].attr;
		check(held == want, "%s: QUERY of %s: 0x%lx, not 0x%lx", what, i && i <= PAGES ? kinds[i - 1].what : "a neighbour", held,
		      want);
	}
}

static u32 runs_of(const u64 *attr)
{
	u32 n = 0;

	for (u32 i = 0; i < PAGES; i++)
		n += attr[i] && (!i || attr[i - 1] != attr[i]);
	return n;
}

static u32 count_of(const u64 *attr)
{
	u32 n = 0;

	for (u32 i = 0; i < PAGES; i++)
		n += attr[i] != 0;
	return n;
}

void t_kernel_lock(void)
{
	u64 deny[PAGES], held[PAGES];

	kernel_open();
	fill_area();
	map_area((u64 *)loaded_root(), 4);
	check(*(volatile u8 *)(BASE + 4 * PAGE) == 0xb8, "the mappings are not those that are loaded");
	for (u32 i = 0; i < PAGES; i++) {
		deny[i] = denied(kinds[i].rights);
		held[i] = deny[i] ? deny[i] | IMMUTABLE : 0;
		*(volatile u64 *)(area + i * PAGE + MARK) = i;
	}
	begin(loaded_root(), K_LOCK);
	check_counts("LOCK", kernel_ask(0), count_of(deny), runs_of(deny), 0);
	attack_area(deny);
	query_area("LOCK", held);
	check(guard_config().ranges_in_force == runs_of(deny), "%u ranges in force, not %u", guard_config().ranges_in_force,
	      runs_of(deny));
	/* Twice is once. */
	begin(loaded_root(), K_LOCK);
	check_counts("LOCK again", kernel_ask(0), count_of(deny), runs_of(deny), 0);
	query_area("LOCK again", held);
	/* No mapping of the kernel's own and no new tables bring a right back. */
	put_entry((u64 *)loaded_root(), 4, BASE, 1, gfn(READ_ONLY) << 12 | F_P | F_W);
	invlpg((void *)BASE);
	try_store("read-only", "by the kernel's mapping, made writable", (u8 *)BASE, 0, area + READ_ONLY * PAGE, false);
	guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
	attack_area(deny);
	pass_or_fail(test_name);
}

/*
 * The whole program, on the page tables it runs on: code is read-only, all else does not execute.  The mapping of the first 2 MiB
 * is cut into pages for that.
 */
void t_kernel_self(void)
{
	extern u8 user_end[];
	extern u64 pdpt[512];
	u64 first = 0x100000 >> 12, last = (ram_end >> 12) - 1, text = gfn_of(user_end) - first, *pt = new_table(), deny;
	u8 *page = alloc_lone_page(), *code = (u8 *)((u64)put_entry & -PAGE);
	const struct kernel_response *r;

	kernel_open();
	deny = kernel_deny();
	memcpy(memset(page, 0, PAGE), (u8[]) { 0xb8, 42, 0, 0, 0, 0xc3 }, 6);
	if (first + text > 512)
		fail("the code ends above 2 MiB");
	for (u32 i = 0; i < 512; i++)
		pt[i] = (u64)i << 12 | F_P | (i >= first && i < first + text ? 0 : F_W | F_XD);
	for (u32 i = 0; i < 2048; i++) {
		u64 *pd = (u64 *)(pdpt[i / 512] & -PAGE);

		pd[i % 512] = i ? pd[i % 512] | F_XD : (u64)pt | F_P | F_W;
	}
	asm volatile("movq %0, %%cr3" :: "r"(loaded_root()) : "memory");

	kernel_begin(loaded_root(), 0, 0xffffffff)->flags = K_LOCK;
	kernel_entry(first, last, deny);
	r = kernel_ask(0);
	check(r->status == 0 && r->pages == last - first + 1 && r->unmapped == 0 && r->write_exec == 0,
	      "status %u, index 0x%x, %lu pages, %lu unmapped, %lu written and executed", r->status, r->index, r->pages, r->unmapped,
	      r->write_exec);
	check(r->not_written == text && r->not_executed == r->pages - text, "%lu not written, %lu not executed, of %lu; code has %lu",
	      r->not_written, r->not_executed, r->pages, text);
	check(r->elsewhere == 0x100000 - r->pages && r->reserved == 0 && r->outside == 0 && r->mappings == 512 + 2047,
	      "%lu elsewhere, %lu reserved, %lu outside, %lu mappings", r->elsewhere, r->reserved, r->outside, r->mappings);
	check(guard_config().ranges_in_force == (deny & NOEXEC_KERNEL ? 2 : 1), "%u ranges in force", guard_config().ranges_in_force);
	/* And it still runs. */
	try_store("its own code", "by a new mapping", map_page((u64)code, F_P | F_W), 0, code, false);
	try_store("its own code", "by a new mapping", user_page(code), 3, code, false);
	writable("its data", page);
	try_run("its data", map_page((u64)page, F_P | F_W), user_page(page), !(deny & NOEXEC_KERNEL));
	must_lock(page);
	kernel_alive("all locked");
	pass_or_fail(test_name);
}

void t_kernel_dry_run(void)
{
	u64 nothing[PAGES] = { 0 }, held[PAGES] = { 0 }, deny[PAGES], *root5 = new_table(), *upper;
	const struct kernel_response *r;
	struct kernel_request *q;

	kernel_open();
	fill_area();
	for (u32 i = 0; i < PAGES; i++)
		deny[i] = denied(kinds[i].rights);
	map_area((u64 *)loaded_root(), 4);
	begin(loaded_root(), K_DRY_RUN);
	check_counts("dry run", kernel_ask(0), count_of(deny), runs_of(deny), 0);
	begin(loaded_root(), K_DRY_RUN | K_LOCK);
	check_counts("dry run of a LOCK", kernel_ask(0), count_of(deny), runs_of(deny), 0);
	query_area("dry run", nothing);
	attack_area(nothing);
	check(guard_config().ranges_in_force == 0, "%u ranges in force", guard_config().ranges_in_force);
	/* What holds is neither loosened nor told of. */
	must_protect(area + DATA * PAGE, NOWRITE);
	held[DATA] = NOWRITE;
	begin(loaded_root(), K_DRY_RUN);
	check_counts("dry run beside a PROTECT", kernel_ask(0), count_of(deny), runs_of(deny), 0);
	query_area("dry run beside a PROTECT", held);
	must_lock(area + DATA * PAGE);
	held[DATA] |= IMMUTABLE;
	begin(loaded_root(), K_DRY_RUN);
	r = kernel_ask(0);
	check(r->status == EPERM && r->index == 0, "dry run of what may not be loosened: status %u, index 0x%x", r->status, r->index);
	begin(loaded_root(), K_DRY_RUN | K_LOCK);
	check_counts("dry run of a LOCK beside a LOCK", kernel_ask(0), count_of(deny), runs_of(deny), 0);
	query_area("dry run beside a LOCK", held);

	/* The same with the processor's other settings, which need not be this one's. */
	q = begin(loaded_root(), K_DRY_RUN | K_LOCK);
	q->control |= C_SMEP;
	r = kernel_ask(0);
	check(r->status == 0 && r->not_executed == N_NOT_EXECUTED + 1 && r->not_written == N_NOT_WRITTEN, "SMEP: %lu not executed",
	      r->not_executed);
	q = begin(loaded_root(), K_DRY_RUN | K_LOCK);
	q->control &= ~C_WP;
	r = kernel_ask(0);
	check(r->status == 0 && r->not_written == 0 && r->write_exec == N_EXECUTED, "without WP: status %u, %lu not written, %lu both",
	      r->status, r->not_written, r->write_exec);
	q = begin(loaded_root(), K_DRY_RUN | K_LOCK);
	q->control &= ~C_NXE;
	r = kernel_ask(0);
	check(r->status == 0 && r->reserved > 1 && r->unmapped > N_UNMAPPED, "without NXE: status %u, %lu reserved, %lu unmapped",
	      r->status, r->reserved, r->unmapped);
	/* Dirty, not writable: what a shadow stack is. */
	put_entry((u64 *)loaded_root(), 4, BASE, 1, gfn(READ_ONLY) << 12 | F_P | F_XD | 0x40);
	q = begin(loaded_root(), K_DRY_RUN | K_LOCK);
	q->control |= C_SHADOW;
	r = kernel_ask(0);
	check(r->status == 0 && r->not_written == N_NOT_WRITTEN - 1, "shadow stacks: %lu not written", r->not_written);
	put_entry((u64 *)loaded_root(), 4, BASE, 1, gfn(READ_ONLY) << 12 | F_P | F_XD);

	/* Five levels, the fifth above those that are loaded, and at an address that four do not have. */
	root5[511] = loaded_root() | F_P | F_W;
	q = begin((u64)root5, K_DRY_RUN | K_LOCK);
	q->levels = 5;
	check_counts("5 levels", kernel_ask(0), count_of(deny), runs_of(deny), 1);
	root5[300] = root5[511];
	root5[511] = 0;
	upper = (u64 *)(loaded_root() + 8 * (BASE >> 39 & 511));
	check(*upper & F_P, "no table there");
	q = begin((u64)root5, K_DRY_RUN | K_LOCK);
	q->levels = 5;
	q->va_start = 0xff00000000000000ul | 300ul << 48 | (BASE & 0xffffffffffff);
	q->va_end = q->va_start + (1ul << 30) - 1;
	check_counts("5 levels, elsewhere", kernel_ask(0), count_of(deny), runs_of(deny), 1);
	query_area("after all dry runs", held);
	pass_or_fail(test_name);
}

void t_kernel_protect(void)
{
	u64 held[PAGES], *root = (u64 *)loaded_root();
	const struct kernel_response *r;

	kernel_open();
	fill_area();
	map_area(root, 4);
	for (u32 i = 0; i < PAGES; i++)
		held[i] = denied(kinds[i].rights);
	begin((u64)root, 0);
	check_counts("PROTECT", kernel_ask(0), count_of(held), runs_of(held), 0);
	query_area("PROTECT", held);
	attack_area(held);

	/* One is written now, one no longer, one is no longer mapped. */
	leaf(root, 4, 0, READ_ONLY, F_P | F_W | F_XD);
	leaf(root, 4, 1, DATA, F_P | F_XD);
	big_entry(root, 4, 1, 0);
	held[READ_ONLY] &= ~NOWRITE;
	held[DATA] |= NOWRITE;
	held[BELOW_RO] = 0;
	begin((u64)root, 0);
	r = kernel_ask(0);
	check(r->status == 0 && r->given == count_of(held) && r->unmapped == N_UNMAPPED + 1,
	      "asked again: status %u, %lu given, %lu unmapped", r->status, r->given, r->unmapped);
	query_area("asked again", held);
	attack_area(held);

	/* What is locked stays, and nothing else of that request happens. */
	must_lock(area + CODE * PAGE);
	held[CODE] |= IMMUTABLE;
	leaf(root, 4, 4, CODE, F_P | F_W);
	leaf(root, 4, 1, DATA, F_P | F_W | F_XD);
	kernel_begin((u64)root, BASE, LAST);
	kernel_entry(gfn(0), gfn(ALIAS), kernel_deny());
	kernel_entry(gfn(CODE), gfn(PAGES - 1), kernel_deny());
	r = kernel_ask(0);
	check(r->status == EPERM && r->index == 1, "loosen what is locked: status %u, index 0x%x", r->status, r->index);
	query_area("all or nothing", held);
	try_store("all or nothing", "to a page that is mapped writable now", area + DATA * PAGE, 0, area + DATA * PAGE, false);
	/* The last entry counts: one with 0 leaves the page alone, whatever holds there. */
	begin((u64)root, 0);
	kernel_entry(gfn(CODE), gfn(CODE), 0);
	r = kernel_ask(0);
	held[DATA] &= ~NOWRITE;
	check(r->status == 0 && r->pages == PAGES - 1 && r->elsewhere == 3, "a page left alone: status %u, %lu pages, %lu elsewhere",
	      r->status, r->pages, r->elsewhere);
	query_area("a page left alone", held);
	/* As a LOCK, what gets nothing is left as it is. */
	begin((u64)root, K_LOCK);
	r = kernel_ask(0);
	for (u32 i = 0; i < PAGES; i++)
		held[i] |= held[i] ? IMMUTABLE : 0;
	check(r->status == 0, "LOCK of what is locked and written: status %u, index 0x%x", r->status, r->index);
	query_area("LOCK", held);
	attack_area(held);

	if (guard_config().audit_bits & NOWRITE) {
		/* One page more is watched, and then no longer. */
		static struct range one[2] __attribute__((aligned(64)));
		u64 page = gfn(PAGES) + 1;
		struct response q;
		struct event e;
		u32 len;

		put_entry(root, 4, BASE + 20 * PAGE, 1, page << 12 | F_P);
		kernel_begin((u64)root, BASE, LAST);
		kernel_entry(page, page, AUDIT(NOWRITE));
		r = kernel_ask(0);
		check(r->status == 0 && r->given == 1, "AUDIT: status %u, %lu given", r->status, r->given);
		q = guard_query(page, page, one, 2, &len);
		check(q.value == 1 && one[0].attr == AUDIT(NOWRITE), "AUDIT: QUERY: %lu entries, attributes 0x%lx", q.value, one[0].attr);
		while (next_event(&e, &len, 30000000ull))
			;
		try_store("watched", "by an old mapping", (u8 *)(page << 12), 0, (u8 *)(page << 12), true);
		check(next_event_on((void *)(page << 12), &e, 5000000000ull) && e.action == ACT_AUDIT, "a watched store is not told");
		put_entry(root, 4, BASE + 20 * PAGE, 1, page << 12 | F_P | F_W);
		kernel_begin((u64)root, BASE, LAST);
		kernel_entry(page, page, AUDIT(NOWRITE));
		r = kernel_ask(0);
		check(r->status == 0 && r->given == 0, "AUDIT of a written page: status %u, %lu given", r->status, r->given);
	}
	pass_or_fail(test_name);
}

/* A request about all pages and one lone page before them, which is mapped as data. */
static struct kernel_request *with_policy(u64 lone, u32 flags, u32 unmapped, u32 write_exec)
{
	struct kernel_request *r = kernel_begin(loaded_root(), BASE, LAST);

	r->flags = flags;
	r->unmapped = unmapped;
	r->write_exec = write_exec;
	kernel_entry(lone, lone, kernel_deny());
	kernel_entry(gfn(0), gfn(PAGES - 1), kernel_deny());
	return r;
}

void t_kernel_policy(void)
{
	static const char *const name[] = { "leave", "report", "refuse", "deny" };
	const struct range both = { 0, 0, T_WRITE_EXEC }, without = { 0, 0, T_UNMAPPED };
	u64 nothing[PAGES] = { 0 }, held[PAGES], lone;
	const struct kernel_response *r;

	kernel_open();
	fill_area();
	map_area((u64 *)loaded_root(), 4);
	lone = gfn_of(alloc_lone_page());
	put_entry((u64 *)loaded_root(), 4, BASE + 30 * PAGE, 1, lone << 12 | F_P | F_W | F_XD);
	for (u32 u = 0; u < 4; u++)
		for (u32 w = 0; w < 3; w++)
			for (u32 room = 0; room <= 8; room += room ? 7 : 1) {
				struct range want[2];
				u32 n = 0, status = u == U_REFUSE || w == U_REFUSE ? EACCES : 0;

				if (w == U_REPORT) {
					want[n] = both;
					want[n].start = gfn(BOTH);
					want[n++].end = gfn(BOTH_BY_TWO);
				}
				if (u == U_REPORT) {
					want[n] = without;
					want[n].start = gfn(NOT_THERE);
					want[n++].end = gfn(RESERVED);
				}
				with_policy(lone, K_DRY_RUN, u, w);
				r = kernel_ask(room);
				check(r->status == status && r->index == (status ? 1 : NO_INDEX),
				      "unmapped %s, write_exec %s: status %u, index 0x%x", name[u], name[w], r->status, r->index);
				check(r->unmapped == N_UNMAPPED && r->write_exec == N_WRITE_EXEC && r->pages == PAGES + 1,
				      "unmapped %s, write_exec %s: counted %lu, %lu of %lu", name[u], name[w], r->unmapped, r->write_exec,
				      r->pages);
				if (status)
					continue;
				check(r->told == n, "unmapped %s, write_exec %s: %lu told, not %u", name[u], name[w], r->told, n);
				for (u32 i = 0; i < MIN(n, room); i++)
					check(!memcmp(&r->ranges_told[i], &want[i], sizeof(want[i])),
					      "unmapped %s, write_exec %s: told 0x%lx-0x%lx %lu, not 0x%lx-0x%lx %lu", name[u], name[w],
					      r->ranges_told[i].start, r->ranges_told[i].end, r->ranges_told[i].attr, want[i].start,
					      want[i].end, want[i].attr);
			}
	query_area("dry runs", nothing);
	/* In earnest: refused as a whole, then denied what nobody maps. */
	with_policy(lone, K_LOCK, U_REFUSE, U_LEAVE);
	r = kernel_ask(0);
	check(r->status == EACCES && r->index == 1, "refuse: status %u, index 0x%x", r->status, r->index);
	query_area("refuse", nothing);
	attack_area(nothing);
	with_policy(lone, 0, U_DENY, U_REPORT);
	r = kernel_ask(4);
	/* The lone page is data. */
	check(r->status == 0 && r->given == PAGES + 1 - N_WRITE_EXEC - (kernel_deny() & NOEXEC_KERNEL ? 0 : N_DATA + 1),
	      "deny: status %u, %lu given", r->status, r->given);
	for (u32 i = 0; i < PAGES; i++)
		held[i] = kinds[i].rights ? denied(kinds[i].rights) : kernel_deny();
	query_area("deny", held);
	attack_area(held);
	pass_or_fail(test_name);
}
