/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Physical pages to lock (never given back: a lock lasts until reset) and virtual windows onto them.  Everything below 4 GiB
 * is mapped to itself by boot.S; the windows lie at WINDOW, in tables of their own.
 */
#include "guest.h"

#define POOL		0x1000000ul	/* 16 MiB */
#define WINDOW		0x4000000000ul	/* 256 GiB: PDPT entry 256 */
#define SMALL_TABLES	4u

extern u64 pdpt[512];
extern u8 user_start[], user_end[];

static u64 pd[512] __attribute__((aligned(4096)));
static u64 pt[SMALL_TABLES][512] __attribute__((aligned(4096)));
static u32 next_small, next_pd = SMALL_TABLES;
static u64 pool_next = POOL, pool_end;
u64 ram_end;

static void fw_cfg_read(u16 key, void *to, u32 n)
{
	outw(0x510, key);
	for (u8 *p = to; n--; p++)
		*p = inb(0x511);
}

u16 fw_cfg_u16(u16 key)
{
	u16 v;

	fw_cfg_read(key, &v, sizeof(v));
	return v;
}

static void *user_map;

void mem_init(const struct memory *map, u32 n)
{
	/* Firmware takes from the memory map what it keeps, so fw_cfg knows better. */
	if (!machine_mmio())
		fw_cfg_read(3, &ram_end, sizeof(ram_end));
	else
		for (u32 i = 0; i < n; i++)
			if (map[i].type == 1 && POOL - map[i].start < map[i].size)
				ram_end = map[i].start + map[i].size;
	ram_end = MIN(ram_end, 0x80000000ul);
	/* Firmware may keep tables in the last MiB. */
	pool_end = ram_end - 0x100000;
	if (ram_end < POOL + 0x400000)
		fail("needs at least 32 MiB of memory, has 0x%lx", ram_end);
	pdpt[WINDOW >> 30] = (u64)pd | F_P | F_W | F_U;
	for (u32 i = 0; i < SMALL_TABLES; i++)
		pd[i] = (u64)pt[i] | F_P | F_W | F_U;
	for (u64 p = (u64)user_start; p < (u64)user_end; p += PAGE) {
		void *v = map_page(p, F_P | F_U);

		if (!user_map)
			user_map = v;
	}
}

void *user_alias(const void *linked)
{
	return (u8 *)user_map + ((u64)linked - (u64)user_start);
}

u64 pages_left(void)
{
	return (pool_end - pool_next) / PAGE;
}

void *alloc_pages(u32 n)
{
	void *p = (void *)pool_next;

	if (n > pages_left())
		skip("needs more memory: %u pages, 0x%lx left of 0x%lx bytes", n, pool_end - pool_next, ram_end);
	pool_next += n * PAGE;
	return p;
}

void *alloc_page(void)
{
	return alloc_pages(1);
}

void *alloc_lone_page(void)
{
	return (u8 *)alloc_pages(3) + PAGE;
}

void invlpg(const void *va)
{
	asm volatile("invlpg (%0)" :: "r"(va) : "memory");
}

void *map_page(u64 pa, u64 flags)
{
	u32 n = __atomic_fetch_add(&next_small, 1, __ATOMIC_SEQ_CST);
	u8 *va = (u8 *)WINDOW + n * PAGE;

	if (n >= SMALL_TABLES * 512)
		fail("out of virtual windows");
	pt[n / 512][n % 512] = (pa & -PAGE) | flags;
	invlpg(va);
	return va + pa % PAGE;
}

static u8 *map_pd(u64 entry)
{
	u32 n = next_pd++;
	u8 *va = (u8 *)WINDOW + ((u64)n << 21);

	if (n >= 512)
		fail("out of virtual windows");
	pd[n] = entry;
	invlpg(va);
	return va;
}

void *map_large(u64 pa, u64 flags)
{
	return map_pd((pa & -(1ul << 21)) | flags | F_LARGE) + pa % (1ul << 21);
}

void *map_through(u64 *table, u64 pa)
{
	table[0] = pa | F_P | F_W;
	return map_pd((u64)table | F_P | F_W | F_U);
}

void *user_page(void *page)
{
	return map_page((u64)page, F_P | F_W | F_U);
}
