/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* kernel-hold: walks while the harness kills the companion, stops the VM or resets it; one byte a command, as for `hold`. */
#include "guest.h"

/* Fills the walk queue with walks that take long, each about a page of its own, and waits for all answers. */
static void burst(u32 n)
{
	static u64 *root;
	static struct desc desc[QMAX][2] __attribute__((aligned(4096)));
	struct { struct kernel_request req; struct range entry; } *reqs = alloc_page();
	struct kernel_response *resps = alloc_pages((n * sizeof(*resps) + PAGE - 1) / PAGE);
	u8 *at = alloc_pages(2 * n);
	u32 head, len, answered = 0, ok = 0, other = 0, unlocked = 0, strays = guard.walk.strays;
	u64 limit = opt_num("timeout", 60) * 1000000000ull, t;

	if (!root)
		root = slow_tables(opt_num("tables", 256));
	memset(resps, 0xee, n * sizeof(*resps));
	for (u32 i = 0; i < n; i++) {
		struct sg sg[2] = { { (u64)&reqs[i], sizeof(reqs[i]), false }, { (u64)&resps[i], sizeof(resps[i]), true } };
		struct kernel_request *r = kernel_begin((u64)root, 0, (1ul << 47) - 1);

		r->unmapped = U_DENY;
		r->flags = K_LOCK;
		kernel_entry(gfn_of(at + 2 * i * PAGE), gfn_of(at + 2 * i * PAGE), NOWRITE);
		memcpy(&reqs[i], r, sizeof(reqs[i]));
		*(u64 *)(at + 2 * i * PAGE) = i;
		if (vq_add_indirect(&guard.walk, desc[i], sg, 2) < 0)
			fail("walk queue full at %u", i);
	}
	print("WALKS sent n=%u\n", n);
	vq_kick(&guard.walk);
	for (t = now_ns(); answered < n && now_ns() - t < limit; relax())
		if (vq_pop(&guard.walk, &head, &len) && guard.walk.strays == strays)
			answered++;
	/* A second answer to the same chain would come before that to a later one. */
	kernel_alive("walks");
	for (u32 i = 0; i < n; i++) {
		volatile u64 *word = (volatile u64 *)(at + 2 * i * PAGE);

		if (resps[i].status == 0 && resps[i].given == 1) {
			ok++;
			op_mov64((void *)word, SPOIL, NULL);
			unlocked += *word != i;
		} else if (resps[i].status != 0xeeeeeeee) {
			diag("walk %u: status %u, %lu given", i, resps[i].status, resps[i].given);
			other++;
		}
	}
	print("WALKS ok=%u dup=%u missing=%u other=%u unlocked=%u\n", ok, guard.walk.strays - strays, n - answered, other, unlocked);
}

void t_kernel_hold(void)
{
	u32 n = MIN(opt_num("burst", 16), 32);
	struct config c;

	kernel_open();
	reply_ns = ~0ull;
	c = guard_config();
	print("READY generation=%lu features=0x%lx\n", c.generation, guard.dev.features);
	for (;;) {
		int command = serial_rx();

		relax();
		switch (command) {
		case 'b':
			burst(n);
			break;
		case 'c':
			c = guard_config();
			print("CONFIG generation=%lu ranges=%u malformed=%lu\n", c.generation, c.ranges_in_force, c.malformed);
			break;
		case 'q':
			pass_or_fail(test_name);
		}
	}
}
