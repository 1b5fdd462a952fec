/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * kernel-model: cases that QEMU has loaded into memory, each with the answer that a model of the harness has worked out
 * (tests/functional/kernel_model.py writes them, and knows why).  All numbers are 64 bits wide:
 *
 *	magic, cases, address of 16 pages for tables; then of each case
 *	frame of the 32 pages it is about, slots, entries, ranges, whether to try stores,
 *	flags, root, first and last address, levels, physical bits, unmapped, write_exec, control,
 *	slots: table, slot, value; entries: first, last, attributes,
 *	status, index, whether there are counts, the first 11 of them, least tables, whether told ranges are looked at, most tables,
 *	a bit for each page that is told as written and executed, and as without mapping,
 *	ranges: what QUERY tells then; a bit for each page where stores land
 */
#include "guest.h"

#define CASES	0x8000000ul		/* 128 MiB */
#define MAGIC	0x6c656e72656b6776ull
#define TABLES	16u
#define PAGES	32u
#define SHOWN	5u			/* failed cases that are told of */

static const u64 *next;
static u64 number;
static bool good;

static u64 take(void)
{
	return *next++;
}

static void same(const char *what, u64 got, u64 want)
{
	if (got == want)
		return;
	if (failures < SHOWN)
		diag("case %lu: %s is 0x%lx, not 0x%lx", number, what, got, want);
	good = false;
}

static void compare_told(const struct kernel_response *r, u64 first, bool compare, u64 both, u64 unmapped)
{
	u64 seen[3] = { 0 }, last_attr = 0, last_end = 0;

	if (!compare)
		return;
	for (u32 i = 0; i < r->told; i++) {
		struct range t = r->ranges_told[i];

		if (t.attr < 1 || t.attr > 2 || t.start < first || t.end >= first + PAGES || t.start > t.end || t.attr < last_attr ||
		    (t.attr == last_attr && t.start <= last_end)) {
			same("told", t.start, last_end);
			return;
		}
		for (u64 p = t.start; p <= t.end; p++)
			seen[t.attr] |= 1ull << (p - first);
		last_attr = t.attr;
		last_end = t.end;
	}
	same("told, written and executed", seen[T_WRITE_EXEC], both);
	same("told, unmapped", seen[T_UNMAPPED], unmapped);
}

static void compare_answer(const struct kernel_response *r, u64 first, u64 generation)
{
	static const char *const name[] = { "pages", "unmapped", "not_written", "not_executed", "write_exec", "given", "elsewhere",
					    "ranges", "mappings", "reserved", "outside" };
	const u64 *counts = &r->pages;
	u64 status = take(), both, unmapped, least, most;
	bool told;

	same("status", r->status, status);
	same("index", r->index, take());
	same("value", r->value, status ? 0 : generation);
	if (take()) {
		for (u32 i = 0; i < ARRAY_SIZE(name); i++)
			same(name[i], counts[i], take());
		least = take();
		told = take();
		most = take();
		if (r->tables < least || r->tables > most)
			same("tables", r->tables, least);
	} else {
		next += 14;
		told = false;
		for (u32 i = 0; i < 13; i++)
			same("a count", counts[i], 0);
	}
	both = take();
	unmapped = take();
	compare_told(r, first, told, both, unmapped);
}

static void compare_query(u64 first, u32 n)
{
	static struct range got[PAGES] __attribute__((aligned(64)));
	u32 used;
	struct response r = guard_query(first, first + PAGES - 1, got, PAGES, &used);

	same("QUERY's value", r.value, n);
	for (u32 i = 0; i < n; i++) {
		same("QUERY's first", got[i].start, take());
		same("QUERY's last", got[i].end, take());
		same("QUERY's attributes", got[i].attr, take());
	}
}

/* One store to each page, and which landed.  Even numbers: as page tables, the pages stay without entries. */
static u64 stores(u64 first)
{
	struct event e;
	u64 landed = 0;
	u32 len;

	for (u32 i = 0; i < PAGES; i++) {
		volatile u64 *word = (volatile u64 *)((first + i) << 12);
		u64 before = *word;

		attempt(op_mov64, (void *)word, before + 2, NULL, 0);
		landed |= (u64)(*word != before) << i;
	}
	while (next_event(&e, &len, 0))
		;
	return landed;
}

static void run_case(u64 *tables, u64 generation)
{
	u64 first = take(), slots = take(), entries = take(), ranges = take(), try = take();
	struct kernel_request *r = kernel_begin(0, 0, 0);
	const u64 *used;

	r->flags = take();
	r->root = take();
	r->va_start = take();
	r->va_end = take();
	r->levels = take();
	r->physical_bits = take();
	r->unmapped = take();
	r->write_exec = take();
	r->control = take();
	used = next;
	for (u64 i = 0; i < slots; i++, next += 3)
		tables[next[0] % TABLES * 512 + next[1] % 512] = next[2];
	for (u64 i = 0; i < entries; i++, next += 3)
		kernel_entry(next[0], next[1], next[2]);
	compare_answer(kernel_ask(64), first, generation);
	for (u64 i = 0; i < slots; i++, used += 3)
		tables[used[0] % TABLES * 512 + used[1] % 512] = 0;
	compare_query(first, ranges);
	if (try)
		same("the stores that landed", stores(first), take());
	else
		next++;
}

void t_kernel_model(void)
{
	u64 cases, *tables, generation, bad = 0;

	kernel_open();
	next = (const u64 *)CASES;
	if (ram_end < CASES + 0x1000000 || take() != MAGIC)
		fail("no cases at 0x%lx", CASES);
	generation = guard_config().generation;
	cases = take();
	tables = (u64 *)take();
	for (number = 0; number < cases; number++) {
		good = true;
		run_case(tables, generation);
		bad += !check(good, "case %lu", number);
		if (failures > SHOWN)
			break;
	}
	print("CASES done=%lu bad=%lu generation=%lu\n", number, bad, generation);
	while (serial_rx() < 0)
		relax();
	pass_or_fail(test_name);
}
