/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * hold: a guest that does what the harness says on the serial line, one byte a command, so that the harness can kill the
 * companion, stop the VM or reset it in between.  bench: what a lock request and a refused store cost.
 */
#include "guest.h"

#define DRAIN_NS	300000000ull

static void drain_events(void)
{
	struct event e;
	u32 len;

	while (next_event(&e, &len, 0))
		;
}

/* Fills the control queue with requests, each for a page of its own, and waits for all answers, however long that takes. */
static void burst(u32 n)
{
	static struct desc tables[QMAX][2] __attribute__((aligned(4096)));
	struct { struct request req; struct range range; } *reqs = alloc_pages((n * 40 + PAGE - 1) / PAGE);
	struct response *resps = alloc_page();
	u8 *pages = alloc_pages(2 * n);
	u32 head, len, answered = 0, ok = 0, other = 0, lost = 0, strays = guard.control.strays;
	u64 limit = opt_num("timeout", 60) * 1000000000ull, t;

	memset(resps, 0xee, PAGE);
	for (u32 i = 0; i < n; i++) {
		u8 *at = pages + 2 * i * PAGE;
		struct sg sg[2] = { { (u64)&reqs[i], 32, false }, { (u64)&resps[i], 16, true } };

		*(u64 *)at = i;
		reqs[i].req = (struct request) { 1, 0, 1 };
		reqs[i].range = (struct range) { gfn_of(at), gfn_of(at), NOWRITE };
		if (vq_add_indirect(&guard.control, tables[i], sg, 2) < 0)
			fail("control queue full at %u", i);
	}
	print("BURST sent n=%u\n", n);
	vq_kick(&guard.control);
	for (t = now_ns(); answered < n && now_ns() - t < limit; relax())
		if (vq_pop(&guard.control, &head, &len) && guard.control.strays == strays)
			answered++;
	/* A second answer to the same chain would come now. */
	for (t = now_ns(); now_ns() - t < DRAIN_NS; relax())
		if (vq_pop(&guard.control, &head, &len) && guard.control.strays == strays)
			answered++;
	for (u32 i = 0; i < n; i++) {
		volatile u64 *at = (u64 *)(pages + 2 * i * PAGE);

		if (resps[i].status == 0) {
			ok++;
			op_mov64((void *)at, SPOIL, NULL);
			lost += *at != i;
		} else if (resps[i].status != 0xeeeeeeee) {
			other++;
		}
	}
	print("BURST ok=%u dup=%u missing=%u other=%u unlocked=%u\n", ok, guard.control.strays - strays, n - answered, other, lost);
}

/* A load and a fetch that are denied: they cannot be dropped. */
static void print_denied(void)
{
	static const u8 code[] = { 0xb8, 42, 0, 0, 0, 0xc3 };
	u8 *page = alloc_lone_page();
	u64 loaded, ran;

	guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
	memcpy(page, code, sizeof(code));
	must_protect(page, NOREAD | NOEXEC);
	loaded = attempt(op_load, page, 0, NULL, 0);
	check(faulted("a denied load", A_READ, (u64)page, 0), "no fault for a load");
	ran = call_code(page, 0, 0);
	check(faulted("a denied fetch", A_FETCH, (u64)page, 0), "no fault for a fetch");
	print("DENIED load=0x%lx fetch=0x%lx failures=%u\n", loaded, ran, failures);
}

void t_hold(void)
{
	u32 n = 0, m = opt_num("burst", QMAX);
	struct config c;
	u8 *page, *more;
	struct response r;
	bool held;

	guard_open();
	reply_ns = ~0ull;		/* no request is ever lost, says the specification */
	guard_start(F_VERSION_1 | F_NOWRITE | F_INDIRECT_DESC, true, NULL, NULL);
	page = alloc_lone_page();
	fill(page, 60);
	must_lock(page);
	c = guard_config();
	print("LOCKED gpa=0x%lx generation=%lu ranges=%u\n", (u64)page, c.generation, c.ranges_in_force);
	for (;;) {
		int command = serial_rx();

		relax();
		drain_events();
		switch (command) {
		case 'w':
			held = still_locked("the held page", page, 60);
			print("%s %u\n", held ? "HELD" : "LOST", ++n);
			break;
		case 'l':
			more = alloc_lone_page();
			fill(more, 61);
			r = guard_lock(more, 1);
			print("LOCK %u%s\n", r.status, r.status ? "" : still_locked("the new page", more, 61) ? " held" : " LOST");
			break;
		case 'b':
			burst(MIN(m, guard.dev.features & F_INDIRECT_DESC ? guard.control.size : guard.control.size / 2));
			break;
		case 'c':
			c = guard_config();
			print("CONFIG generation=%lu ranges=%u violations=%lu lost=%lu malformed=%lu\n", c.generation,
			      c.ranges_in_force, c.violations, c.events_lost, c.malformed);
			break;
		case 'd':
			print_denied();
			break;
		case 'r':
			guard_start(F_VERSION_1 | F_NOWRITE | F_INDIRECT_DESC, true, NULL, NULL);
			print("RESET done\n");
			break;
		case 'q':
			pass_or_fail(test_name);
		}
	}
}

/* Sorts, so that the ends are minimum and maximum, and prints. */
static void bench_line(const char *what, u32 what_n, u64 *v, u32 n)
{
	for (u32 i = 1; i < n; i++)
		for (u32 j = i; j && v[j - 1] > v[j]; j--) {
			u64 t = v[j];

			v[j] = v[j - 1];
			v[j - 1] = t;
		}
	print("BENCH %s%u ns=%lu min=%lu max=%lu runs=%u in_force=%u\n", what, what_n, v[n / 2], v[0], v[n - 1], n,
	      guard_config().ranges_in_force);
}

/* Locks every fourth page of these, n in all. */
static void lock_every_fourth(u8 *pages, u32 n)
{
	for (u32 done = 0, now; done < n; done += now) {
		struct request *q = request_buffer();
		struct response r;

		now = MIN(n - done, MAX_REQ);
		for (u32 i = 0; i < now; i++) {
			u64 gfn = gfn_of(pages) + 4 * (done + i) + 5;

			q->ranges[i] = (struct range) { gfn, gfn, NOWRITE };
		}
		r = guard_lock_ranges(now);
		check(!r.status, "%u ranges of %u before: status %u", now, n, r.status);
	}
}

/* One range more when n are in force: pages between two that are locked, spread over all of them. */
static void bench_one_more(u32 n, u32 runs)
{
	static u64 v[64];
	u8 *pages = alloc_pages(4 * n + 8);

	runs = MIN(runs, MIN(n, ARRAY_SIZE(v)));
	lock_every_fourth(pages, n);
	for (u32 k = 0; k < runs; k++) {
		u64 gfn = gfn_of(pages) + 4 * (k * n / runs) + 3, t;
		struct response r;

		request_buffer()->ranges[0] = (struct range) { gfn, gfn, NOWRITE };
		t = now_ns();
		r = guard_lock_ranges(1);
		v[k] = now_ns() - t;
		check(!r.status, "one more than %u: status %u", n, r.status);
	}
	bench_line("more n=", n, v, runs);
}

void t_bench(void)
{
	static const struct { u32 n, runs; } sizes[] = { { 1, 31 }, { 16, 31 }, { 256, 7 }, { 4096, 3 } };
	static u64 v[64];
	u32 only = opt_num("n", 0), runs_wanted = opt_num("runs", 0);
	struct response r = { 0, 0, 0 };
	struct config c;
	u8 *page;

	guard_open();
	request_buffer();
	if (opt_num("held", 0)) {
		bench_one_more(opt_num("held", 0), runs_wanted ? runs_wanted : 15);
		pass_or_fail(test_name);
	}
	page = alloc_lone_page();
	fill(page, 70);
	for (u32 s = 0; s < ARRAY_SIZE(sizes); s++) {
		u32 n = sizes[s].n, runs = runs_wanted ? MIN(runs_wanted, ARRAY_SIZE(v)) : sizes[s].runs, done = 0;

		if (only && only != n)
			continue;
		for (u32 k = 0; k < runs && !r.status; k++) {
			struct request *q = request_buffer();
			u8 *base;
			u64 t;

			c = guard_config();
			if (c.ranges_in_force + n > c.max_ranges || pages_left() < 2 * n + 16)
				break;
			base = alloc_pages(2 * n);
			for (u32 i = 0; i < n; i++)
				q->ranges[i] = (struct range) { gfn_of(base) + 2 * i, gfn_of(base) + 2 * i, NOWRITE };
			t = now_ns();
			r = guard_lock_ranges(n);
			v[done++] = now_ns() - t;
			check(!r.status, "request of %u ranges: status %u", n, r.status);
		}
		if (done)
			bench_line("n=", n, v, done);
		else
			diag("n=%u: no room left for a run", n);
	}
	if (!only) {
		r = guard_lock(page, 1);
		check(!r.status, "lock of the page to attack: status %u", r.status);
		for (u32 k = 0; k < ARRAY_SIZE(v); k++) {
			u64 t = now_ns();

			op_mov64(page, SPOIL, NULL);
			v[k] = now_ns() - t;
		}
		check(intact(page, 70), "the page has changed");
		bench_line("refused-store bytes=", 8, v, ARRAY_SIZE(v));
	}
	pass_or_fail(test_name);
}
