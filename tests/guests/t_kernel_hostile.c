/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * PROTECT_KERNEL of page tables that are none, or change while they are read, and resets in the middle.  Which answer comes is
 * mostly not said here, but one must, and the device goes on.
 */
#include "guest.h"

#define LOWER_END	((1ul << 47) - 1)
#define SLOW		(accel == ACCEL_TCG ? 2048u : 256u)

static u64 mine;		/* a page to ask about, mapped by nobody */

static struct kernel_request *about(u64 root, u32 flags, u32 levels)
{
	struct kernel_request *r = kernel_begin(root, 0, levels == 5 ? (1ul << 56) - 1 : LOWER_END);

	r->flags = flags;
	r->levels = levels;
	kernel_entry(mine, mine, NOWRITE);
	return r;
}

/* As a PROTECT, a LOCK and a dry run, of 4 levels and 5.  Returns the answer of the dry run of 4. */
static const struct kernel_response *survive(const char *what, u64 root)
{
	static struct kernel_response last;
	const struct kernel_response *r = NULL;

	for (u32 levels = 5; levels >= 4; levels--)
		for (u32 flags = 0; flags <= K_DRY_RUN; flags++) {
			about(root, flags, levels);
			r = kernel_ask(0);
			/* EPERM: by other tables it could be locked. */
			check(r->status == 0 || r->status == EFAULT || r->status == EOVERFLOW || r->status == EPERM,
			      "%s, %u levels, flags %u: status %u", what, levels, flags, r->status);
			check(r->status != 0 || flags == K_DRY_RUN || !r->outside, "%s: OK with %lu tables outside", what, r->outside);
		}
	last = *r;
	kernel_alive(what);
	return &last;
}

static u64 every_entry(u64 *table, u64 entry)
{
	for (u32 i = 0; i < 512; i++)
		table[i] = entry;
	return (u64)table;
}

static void strange_places(void)
{
	u64 bar = (u64)guard.dev.common & -PAGE, *through = new_table();
	const struct { const char *what; u64 at; bool outside; } places[] = {
		{ "the local APIC", 0xfee00000, true }, { "the I/O APIC", 0xfec00000, true }, { "this device", bar, true },
		{ "the end of memory", ram_end, true }, { "ROM below 4 GiB", 0xfffff000, false }, { "ROM below 1 MiB", 0xff000, false },
		{ "a PAM area", 0xc0000, false }, { "another PAM area", 0xe8000, false }, { "the screen", 0xa0000, false },
		{ "the first page", 0, false }, { "the EBDA", 0x9f000, false }, { "the last page of memory", ram_end - PAGE, false },
		{ "these instructions", (u64)strange_places & -PAGE, false }, { "this stack", (u64)__builtin_frame_address(0) & -PAGE, false },
		{ "the used ring", (u64)guard.walk.used, false }, { "the request", (u64)kernel_buffer(), false },
		{ "memory above 4 GiB", 1ull << 32, true }, { "a far place", (1ull << 36) - PAGE, true },
	};

	for (u32 i = 0; i < ARRAY_SIZE(places); i++) {
		const struct kernel_response *r = survive(places[i].what, places[i].at);

		if (places[i].outside)
			check(r->status == EFAULT, "%s as the root: status %u", places[i].what, r->status);
		every_entry(through, places[i].at | F_P | F_W);
		r = survive(places[i].what, (u64)through);
		if (places[i].outside)
			check(r->status == 0 && r->outside == 256, "%s as all tables: status %u, %lu outside", places[i].what, r->status,
			      r->outside);
	}
}

static void check_loop(const char *what, const struct kernel_response *r, u64 pages)
{
	check(r->status == 0 && r->mappings == 1ull << 35 && r->elsewhere == pages, "%s: status %u, %lu mappings, %lu elsewhere", what,
	      r->status, r->mappings, r->elsewhere);
}

static void loops(void)
{
	u64 *a = new_table(), *b = new_table(), *c = new_table();
	const struct kernel_response *r;

	/* 256 * 512^3 ways, all to the table itself. */
	check_loop("a table of itself", survive("a table of itself", every_entry(a, (u64)a | F_P | F_W)), 1);
	every_entry(a, (u64)b | F_P | F_W);
	check_loop("two of each other", survive("two of each other", every_entry(b, (u64)a | F_P | F_W | F_U)), 1);
	/* Each entry takes other rights away, so that every way is another. */
	for (u32 i = 0; i < 512; i++) {
		u64 *to[] = { a, b, c };

		for (u32 t = 0; t < 3; t++)
			to[t][i] = (u64)to[(i + t) % 3] | F_P | (i & 4 ? F_W : 0) | (i & 8 ? F_U : 0) | (i & 16 ? F_XD : 0);
	}
	check_loop("three of each other", survive("three of each other", (u64)a), 3);
	/* One of itself beside one path to a page, on all levels at once. */
	memset(a, 0, PAGE);
	put_entry(a, 4, 0, 1, mine << 12 | F_P);
	a[1] = (u64)a | F_P | F_W;
	r = survive("one entry of itself", (u64)a);
	check(r->status == 0 && r->mappings == 5 && r->given == 1 && r->elsewhere == 4,
	      "one entry of itself: status %u, %lu mappings, %lu given, %lu elsewhere", r->status, r->mappings, r->given, r->elsewhere);
	every_entry(a, ~0ull);
	survive("all ones", (u64)a);
	every_entry(a, F_P);
	survive("present and nothing else", (u64)a);
	every_entry(a, F_P | F_LARGE);
	survive("large and nothing else", (u64)a);
	every_entry(a, 0xffffffffff000ull | F_P | F_W);
	survive("the highest address", (u64)a);
}

static u64 noise(void)
{
	static u64 x = 88172645463325252ull;

	x ^= x << 13;
	x ^= x >> 7;
	return x ^= x << 17;
}

/* What a table is full of that nobody has written as one; the low bits of an address stay near. */
static void random_tables(void)
{
	u64 *t[4];

	for (u32 i = 0; i < 4; i++)
		t[i] = new_table();
	for (u32 round = 0; round < 8; round++) {
		for (u32 i = 0; i < 4; i++)
			for (u32 j = 0; j < 512; j++)
				t[i][j] = round & 1 ? noise() : (u64)t[noise() & 3] | (noise() & 0x8000000000000fffull);
		survive("noise", (u64)t[round & 3]);
	}
}

struct mess { u64 *t[4]; volatile bool stop; volatile u64 changes; };

static void make_mess(void *arg)
{
	struct mess *m = arg;

	while (!m->stop) {
		u64 *table = m->t[noise() & 3], to = noise() & 7;

		WRITE_ONCE(table[noise() & 511], (to < 4 ? (u64)m->t[to] : to == 4 ? 0xfee00000 : to == 5 ? ram_end : mine << 12) |
			   (noise() & (F_XD | F_LARGE | F_U | F_W | F_P)) | F_P);
		m->changes++;
	}
}

static void changing_tables(void)
{
	static struct mess m;
	u32 n = opt_num("rounds", 60);

	if (!start_cpus() || n_cpus < 2) {
		diag("no other CPU: tables do not change meanwhile");
		return;
	}
	for (u32 i = 0; i < 4; i++)
		m.t[i] = new_table();
	cpu_call(1, make_mess, &m);
	while (m.changes < 1000)
		relax();
	for (u32 i = 0; i < n; i++)
		survive("tables that change", (u64)m.t[0]);
	m.stop = true;
	while (cpu_busy(1))
		relax();
	diag("%lu changes during %u rounds of walks", m.changes, n);
}

void t_kernel_hostile(void)
{
	kernel_open();
	mine = gfn_of(alloc_lone_page());
	strange_places();
	loops();
	random_tables();
	changing_tables();
	if (guard_config().deny_bits & NOREAD) {
		/* The MMU does not walk these either. */
		u64 *root = new_table();
		const struct kernel_response *r;

		mine = gfn_of(alloc_lone_page());
		put_entry(root, 4, 0, 1, mine << 12 | F_P);
		must_protect((void *)(root[0] & -PAGE), NOREAD);
		r = survive("a table without reads", (u64)root);
		check(r->status == 0 && r->outside == 1 && !r->mappings, "a table without reads: status %u, %lu outside", r->status,
		      r->outside);
		must_protect(root, NOREAD);
		r = survive("a root without reads", (u64)root);
		check(r->status == EFAULT, "a root without reads: status %u", r->status);
	}
	pass_or_fail(test_name);
}

/*
 * A device that does one thing after the other could be slow to begin with the walk and answer one request before it, hardly
 * several, each sent after the answer to the one before.  A walk may be over before: then another try.
 */
void t_kernel_meanwhile(void)
{
	enum { WANTED = 3, TRIES = 20 };
	u64 *root;
	u32 seen = 0, try, head, len, used;

	kernel_open();
	mine = gfn_of(alloc_lone_page());
	root = slow_tables(SLOW);
	for (try = 0; try < TRIES && seen < WANTED; try++) {
		struct kernel_response *answer = alloc_page();
		struct sg sg[2] = { { (u64)kernel_buffer(), 0, false }, { (u64)answer, sizeof(*answer), true } };
		bool done = false;

		about((u64)root, 0, 4);
		sg[0].len = kernel_bytes();
		answer->status = 0xee;
		walk_add(sg, 2);
		vq_kick(&guard.walk);
		for (seen = 0; !done; ) {
			struct response r = guard_query(mine, mine, NULL, 0, &used);

			check(r.status == 0, "QUERY during a walk: status %u", r.status);
			done = vq_pop(&guard.walk, &head, &len);
			seen += !done;
			if (seen == WANTED) {
				check(vq_wait(&guard.walk, &head, &len, reply_ns), "no answer to the walk");
				done = true;
			}
		}
		check(answer->status == 0 && answer->mappings == SLOW * 512ul, "the walk: status %u, %lu mappings", answer->status,
		      answer->mappings);
	}
	check(seen >= WANTED, "the control queue waits for the walk queue, or walks are too short: %u answers", seen);
	diag("%u requests answered during a walk, at try %u", seen, try);
	kernel_alive("meanwhile");
	pass_or_fail(test_name);
}

void t_kernel_reset(void)
{
	u32 n = opt_num("rounds", 12), status;
	struct kernel_response *answers;
	u64 *root;

	kernel_open();
	mine = gfn_of(alloc_lone_page());
	root = slow_tables(SLOW);
	for (u32 i = 0; i < n; i++) {
		struct sg sg[2] = { { (u64)kernel_buffer(), 0, false } };
		u64 before = mine;

		answers = alloc_page();
		mine = gfn_of(alloc_lone_page());
		fill((void *)(mine << 12), 400);
		about((u64)root, 0, 4)->unmapped = U_DENY;
		sg[0].len = kernel_bytes();
		memset(answers, 0xee, PAGE);
		for (u32 k = 0; k < 1 + i % 4; k++) {
			sg[1] = (struct sg) { (u64)&answers[k], sizeof(*answers), true };
			walk_add(sg, 2);
		}
		vq_kick(&guard.walk);
		/* At once, or after some other thing has been done. */
		for (u32 k = 0; k < i / 4; k++)
			guard_config();
		guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
		status = READ_ONCE(answers[0].status);
		kernel_alive("reset");
		check(READ_ONCE(answers[0].status) == status, "an answer after the reset: status %u", answers[0].status);
		check(status == 0 || status == 0xeeeeeeee, "status %u before the reset", status);
		if (status == 0)
			still_locked("answered before the reset", (void *)(mine << 12), 400);
		/* Without an answer nobody knows. */
		must_protect((void *)(mine << 12), 0);
		writable("the page before", (void *)(before << 12));
	}
	mine = gfn_of(alloc_lone_page());
	fill((void *)(mine << 12), 401);
	about((u64)root, 0, 4)->unmapped = U_DENY;
	check(kernel_ask(0)->status == 0, "a new driver's walk");
	still_locked("a new driver's walk", (void *)(mine << 12), 401);
	pass_or_fail(test_name);
}
