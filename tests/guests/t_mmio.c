/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The registers of virtio-mmio, written and read as no driver does it. */
#include "guest.h"

#define WINDOW	0x180
#define SEED	77

static u64 noise(void)
{
	static u64 x = 88172645463325252ull;

	x ^= x << 13;
	x ^= x >> 7;
	return x ^= x << 17;
}

/* Queues begin outside of memory, where nothing may begin, in a page of zeros, or in the locked page: nobody's data is hit. */
static u32 address_part(u32 at, const void *zeros, const void *locked)
{
	u64 places[] = { (u64)zeros, (u64)zeros, (u64)locked, (u64)zeros + 1, (u64)zeros + PAGE - 2, ram_end - 16, ram_end, 0xffffffff };

	if (at & 4)
		return noise() % 8 ? 0 : noise();
	return places[noise() % ARRAY_SIZE(places)];
}

static void access(u8 *at, u64 value, u32 size)
{
	bool store = noise() % 4;

	if (size == 8)
		store ? (*(volatile u64 *)at = value) : *(volatile u64 *)at;
	else if (size == 4)
		store ? (*(volatile u32 *)at = value) : *(volatile u32 *)at;
	else if (size == 2)
		store ? (*(volatile u16 *)at = value) : *(volatile u16 *)at;
	else
		store ? (*(volatile u8 *)at = value) : *(volatile u8 *)at;
}

void t_mmio_noise(void)
{
	static const u32 often[] = { 0, 1, 2, 3, 4, 7, 8, 11, 15, 64, 256, 65535, 65536, 0x7fffffff, 0xffffffff };
	static const u8 counts[] = { 0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4 };
	u32 rounds = opt_num("rounds", 40), accesses = 0;
	u8 *locked, *zeros;
	struct response r;

	if (!machine_mmio())
		skip("needs virtio-mmio");
	guard_open();
	locked = alloc_lone_page();
	zeros = alloc_page();
	fill(locked, SEED);
	must_lock(locked);
	for (u32 round = 0; round < rounds; round++) {
		u8 *window = (u8 *)guard.dev.common;
		u32 in_force = guard_config().ranges_in_force;

		memset(zeros, 0, PAGE);
		for (u32 i = 0; i < 300; i++, accesses++) {
			u32 at = noise() % 2 ? counts[noise() % ARRAY_SIZE(counts)] : noise() % (WINDOW - 8);
			u32 size = noise() % 4 ? 4 : 1 << noise() % 4;
			u64 value = noise() % 4 ? often[noise() % ARRAY_SIZE(often)] : noise();

			/* Of any size: some of it may be taken for an address. */
			if (at >= 0x78 && at < 0xa8) {
				at &= ~3;
				size = 4;
				value = address_part(at, zeros, locked);
			}
			access(window + at, value, size);
		}
		/* Another driver finds the device in order, and the page locked. */
		guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
		check(guard_config().ranges_in_force == in_force, "%u ranges in force, not %u", guard_config().ranges_in_force, in_force);
		must_lock(alloc_lone_page());
		if (!still_locked("after noise", locked, SEED))
			break;
	}
	/* What was mapped of a queue that could not start has been let go of. */
	for (u64 t = now_ns(); (r = guard_lock(zeros, 1)).status == EBUSY && now_ns() - t < 5000000000ull; )
		wait_ns(10000000);
	check(!r.status, "status %u for the page where queues were", r.status);
	diag("%u accesses", accesses);
	pass_or_fail(test_name);
}
