/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Requests about MSRs: what they change, what they tell, and each error with its index; and that a refused one changes nothing. */
#include "guest.h"

#define DEADLINE	0x6e0u
#define FAR		0x40000000u	/* MSRs that nobody here has; 0x3000 of them are one range of KVM's */
#define ANY_INDEX	0xfffffffeu

struct bitmap { u32 flags, nmsrs, base, pad; u8 bits[]; };

static struct config before;
static u32 n_cases, n_failed;

/* Nothing of a refused request is applied. */
static void verdict(const char *name, struct response r, u32 status, u32 index)
{
	struct config c = guard_config();
	bool ok = r.status == status && (r.index == index || index == ANY_INDEX) && (status || r.value == c.generation);

	if (status && c.msr_ranges_in_force != before.msr_ranges_in_force) {
		diag("%u ranges in force, not %u", c.msr_ranges_in_force, before.msr_ranges_in_force);
		ok = false;
	}
	before = c;
	n_cases++;
	n_failed += !ok;
	if (ok)
		print("PASS %s/%s\n", test_name, name);
	else
		print("FAIL %s/%s: status %u, not %u; index 0x%x, not 0x%x\n", test_name, name, r.status, status, r.index, index);
}

static void verdicts(void)
{
	if (n_failed)
		check(false, "%u of %u cases", n_failed, n_cases);
	diag("%u cases, %u failed", n_cases, n_failed);
}

static struct msr_rule rule(u32 first, u32 last, u16 access, u16 action, u64 mask)
{
	return (struct msr_rule) { first, last, access, action, 0, mask };
}

static const struct msr_rule good = { LSTAR, LSTAR, M_WRITE, M_DENY, 0, 0 };

/* Three entries, the last one in question. */
static void entry(const char *name, u16 type, struct msr_rule bad, u32 status)
{
	msr_rules()[0] = msr_rules()[1] = good;
	msr_rules()[2] = bad;
	verdict(name, guard_request(type, 3), status, status ? 2 : NO_INDEX);
}

static void bad_entries(u16 type)
{
	struct msr_rule flags = good;

	entry("first-after-last", type, rule(LSTAR + 1, LSTAR, M_WRITE, M_DENY, 0), EINVAL);
	entry("access-0", type, rule(LSTAR, LSTAR, 0, M_DENY, 0), EINVAL);
	entry("access-4", type, rule(LSTAR, LSTAR, 4, M_DENY, 0), EINVAL);
	entry("access-7", type, rule(LSTAR, LSTAR, 7, M_DENY, 0), EINVAL);
	entry("action-emulate", type, rule(LSTAR, LSTAR, M_READ, M_EMULATE, 0), EINVAL);
	entry("action-bit-15", type, rule(LSTAR, LSTAR, M_READ, 0x8000, 0), EINVAL);
	entry("deny-and-log", type, rule(LSTAR, LSTAR, M_WRITE, M_DENY | M_LOG, 0), EINVAL);
	entry("deny-and-pin", type, rule(LSTAR, LSTAR, M_WRITE, M_DENY | M_PIN, 1), EINVAL);
	flags.flags = 1;
	entry("flags-1", type, flags, EINVAL);
	flags.flags = M_IMMUTABLE;
	entry("flags-immutable", type, flags, EINVAL);
	entry("pin-of-reads", type, rule(LSTAR, LSTAR, M_READ, M_PIN, 1), EINVAL);
	entry("pin-of-both", type, rule(LSTAR, LSTAR, M_BOTH, M_PIN, 1), EINVAL);
	entry("pin-of-nothing", type, rule(LSTAR, LSTAR, M_WRITE, M_PIN, 0), EINVAL);
	entry("mask-of-deny", type, rule(LSTAR, LSTAR, M_WRITE, M_DENY, 1), EINVAL);
	entry("mask-of-allow", type, rule(LSTAR, LSTAR, M_WRITE, M_ALLOW, 1), EINVAL);
	entry("mask-of-log", type, rule(LSTAR, LSTAR, M_WRITE, M_LOG, 1), EINVAL);
	entry("x2apic", type, rule(0x800, 0x800, M_WRITE, M_DENY, 0), EOPNOTSUPP);
	entry("x2apic-last", type, rule(0x8ff, 0x8ff, M_READ, M_DENY, 0), EOPNOTSUPP);
	entry("x2apic-among-others", type, rule(0x7ff, 0x900, M_BOTH, M_LOG, 0), EOPNOTSUPP);
	entry("x2apic-among-all", type, rule(0, ~0u, M_BOTH, M_DENY, 0), EOPNOTSUPP);
	entry("tsc-deadline-deny", type, rule(DEADLINE, DEADLINE, M_WRITE, M_DENY, 0), EOPNOTSUPP);
	entry("tsc-deadline-log", type, rule(DEADLINE, DEADLINE, M_BOTH, M_LOG, 0), EOPNOTSUPP);
	entry("tsc-deadline-pin", type, rule(DEADLINE - 1, DEADLINE + 1, M_WRITE, M_PIN, ~0ull), EOPNOTSUPP);
	if (accel == ACCEL_KVM) {
		/* What QEMU could not carry out to the letter. */
		entry("log-not-plain", type, rule(0x1a0, 0x1a0, M_WRITE, M_LOG, 0), EOPNOTSUPP);
		entry("log-not-plain-read", type, rule(0x1a0, 0x1a0, M_READ, M_LOG, 0), EOPNOTSUPP);
		entry("log-partly-plain", type, rule(0xc0000080, 0xc0000085, M_WRITE, M_LOG, 0), EOPNOTSUPP);
		entry("pin-of-some-not-plain", type, rule(0x1a0, 0x1a0, M_WRITE, M_PIN, 1), EOPNOTSUPP);
		entry("pin-and-log-not-plain", type, rule(0x1a0, 0x1a0, M_WRITE, M_PIN | M_LOG, ~0ull), EOPNOTSUPP);
		entry("pin-of-what-nobody-has", type, rule(0x1234, 0x1234, M_WRITE, M_PIN, ~0ull), EOPNOTSUPP);
	}
	/* Entry by entry. */
	msr_rules()[0] = good;
	msr_rules()[1] = rule(0x800, 0x800, M_WRITE, M_DENY, 0);
	msr_rules()[2] = rule(LSTAR, LSTAR, 0, M_DENY, 0);
	verdict("the-first-of-two", guard_request(type, 3), EOPNOTSUPP, 1);
}

static struct response *answer;

static struct response raw(u16 type, u16 flags, u32 count, u32 len)
{
	struct request *r = request_buffer();
	struct response resp;

	r->type = type;
	r->flags = flags;
	r->count = count;
	check(guard_send(r, len, &resp) == sizeof(resp), "used length");
	return resp;
}

void t_msr_errors(void)
{
	static const char *const unknown[] = { "lock-not-negotiated", "protect-not-negotiated", "bitmap-not-negotiated",
		"query-not-negotiated" };

	msr_begin();
	answer = alloc_page();
	before = guard_config();
	bad_entries(MSR_PROTECT);
	bad_entries(MSR_LOCK);
	entry("lock-allow", MSR_LOCK, rule(LSTAR, LSTAR, M_WRITE, M_ALLOW, 0), EINVAL);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
	for (u16 type = MSR_LOCK; type <= MSR_QUERY; type++) {
		msr_rules()[0] = rule(LSTAR, LSTAR, M_WRITE, M_ALLOW, 0);
		verdict("flags-of-the-request", raw(type, 1, 1, 32), EINVAL, NO_INDEX);
		verdict("count-0", raw(type, 0, 0, 8), EINVAL, NO_INDEX);
		if (type == MSR_BITMAP)
			continue;
		verdict("one-byte-short", raw(type, 0, 1, 31), EINVAL, NO_INDEX);
		verdict("one-byte-long", raw(type, 0, 1, 33), EINVAL, NO_INDEX);
		verdict("count-4097", raw(type, 0, MAX_REQ + 1, 32), E2BIG, NO_INDEX);
	}
	msr_rules()[1] = msr_rules()[0] = rule(0, ~0u, M_BOTH, 0, 0);
	verdict("query-two", raw(MSR_QUERY, 0, 2, 56), EINVAL, NO_INDEX);
	msr_rules()[0].action = M_DENY;
	verdict("query-an-action", raw(MSR_QUERY, 0, 1, 32), EINVAL, 0);
	msr_rules()[0] = rule(0, ~0u, M_BOTH, 0, 1);
	verdict("query-a-mask", raw(MSR_QUERY, 0, 1, 32), EINVAL, 0);
	msr_rules()[0] = rule(0, ~0u, 0, 0, 0);
	verdict("query-no-access", raw(MSR_QUERY, 0, 1, 32), EINVAL, 0);
	msr_rules()[0] = rule(2, 1, M_BOTH, 0, 0);
	verdict("query-first-after-last", raw(MSR_QUERY, 0, 1, 32), EINVAL, 0);
	/* These may be asked for. */
	verdict("tsc-deadline-reads", msr_ask(MSR_PROTECT, DEADLINE, DEADLINE, M_READ, M_DENY, 0), 0, NO_INDEX);
	verdict("tsc-deadline-allow", msr_ask(MSR_PROTECT, DEADLINE, DEADLINE, M_BOTH, M_ALLOW, 0), 0, NO_INDEX);
	verdict("around-x2apic", msr_ask(MSR_PROTECT, 0x7ff, 0x7ff, M_BOTH, M_DENY, 0), 0, NO_INDEX);
	verdict("around-x2apic", msr_ask(MSR_PROTECT, 0x900, 0x900, M_BOTH, M_DENY, 0), 0, NO_INDEX);
	msr_free(0x7ff, 0x7ff);
	msr_free(0x900, 0x900);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
	msr_writes("after all those refused requests", 1, LSTAR, 0x1000);

	/* The order of checks, with what is immutable. */
	must_msr(MSR_LOCK, LSTAR, M_WRITE, M_DENY, 0);
	before = guard_config();
	msr_rules()[0] = rule(LSTAR, LSTAR, M_WRITE, M_ALLOW, 0);
	msr_rules()[1] = rule(LSTAR, LSTAR, M_READ, M_PIN, 1);
	verdict("eperm-then-einval", guard_request(MSR_PROTECT, 2), EINVAL, 1);
	msr_rules()[1] = rule(0x800, 0x800, M_READ, M_DENY, 0);
	verdict("eperm-then-eopnotsupp", guard_request(MSR_PROTECT, 2), EOPNOTSUPP, 1);
	msr_rules()[1] = rule(CSTAR, CSTAR, M_WRITE, M_DENY, 0);
	verdict("eperm", guard_request(MSR_PROTECT, 2), EPERM, 0);
	msr_writes("an entry of a refused request", 1, CSTAR, 0x2000);

	/* Not negotiated: unknown, and what is locked stays so. */
	guard_start(F_VERSION_1 | (F_GUARD & ~F_MSR), true, NULL, NULL);
	for (u16 type = MSR_LOCK; type <= MSR_QUERY; type++) {
		msr_rules()[0] = good;
		verdict(unknown[type - MSR_LOCK], raw(type, 0, 1, 32), EOPNOTSUPP, NO_INDEX);
	}
	msr_denied("after a device reset", 0, LSTAR, A_WRITE, 1);
	msr_denied("after a device reset", 1, LSTAR, A_WRITE, 1);
	/* There is nothing else that any of the rules of those requests would have refused. */
	msr_writes("after a device reset", 1, CSTAR, 0x3000);
	verdicts();
	msr_end();
}

static void not_taken(const char *name, u16 access, u16 action, u64 mask)
{
	verdict(name, msr_ask(MSR_PROTECT, LSTAR, LSTAR, access, action, mask), EPERM, 0);
}

static void taken(const char *name, u16 type, u16 access, u16 action, u64 mask)
{
	verdict(name, msr_ask(type, LSTAR, LSTAR, access, action, mask), 0, NO_INDEX);
}

void t_msr_protect(void)
{
	struct config c;

	msr_begin();
	before = guard_config();
	for (u32 cpu = 0; cpu < 2; cpu++)
		msr_writes("before", cpu, LSTAR, 0x1000 * (cpu + 1));
	/* Mutable: anything goes. */
	taken("protect-deny", MSR_PROTECT, M_BOTH, M_DENY, 0);
	taken("protect-log", MSR_PROTECT, M_BOTH, M_LOG, 0);
	taken("protect-pin", MSR_PROTECT, M_WRITE, M_PIN, 0xff);
	taken("protect-other-bits", MSR_PROTECT, M_WRITE, M_PIN, 0xff00);
	msr_writes("the mask was replaced", 1, CSTAR, 1);
	check(msr_try(1, LSTAR, true, &(u64){ 0x20ff }), "a bit that is not pinned any more");
	msr_denied("the mask was replaced", 1, LSTAR, A_WRITE, 0x10ff);
	taken("protect-allow", MSR_PROTECT, M_BOTH, M_ALLOW, 0);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
	/* Where entries overlap, the last one counts. */
	msr_rules()[0] = rule(STAR, SFMASK, M_WRITE, M_DENY, 0);
	msr_rules()[1] = rule(LSTAR, LSTAR, M_WRITE, M_ALLOW, 0);
	msr_rules()[2] = rule(CSTAR, CSTAR, M_BOTH, M_ALLOW, 0);
	verdict("overlapping-entries", guard_request(MSR_PROTECT, 3), 0, NO_INDEX);
	check(guard_config().msr_ranges_in_force == 2, "%u ranges in force, not 2", guard_config().msr_ranges_in_force);
	msr_writes("the last entry", 1, LSTAR, 0x3000);
	msr_writes("the last entry", 0, CSTAR, 0x3000);
	msr_denied("the first entry", 0, STAR, A_WRITE, 1);
	msr_denied("the first entry", 1, SFMASK, A_WRITE, 1);
	msr_free(STAR, SFMASK);

	/* Locked: each step that is not stricter is refused. */
	for (u32 cpu = 0; cpu < 2; cpu++)
		msr_writes("before", cpu, LSTAR, 0x1000 * (cpu + 1));
	taken("lock-log", MSR_LOCK, M_BOTH, M_LOG, 0);
	not_taken("log-to-allow", M_BOTH, M_ALLOW, 0);
	not_taken("log-of-reads-to-allow", M_READ, M_ALLOW, 0);
	not_taken("log-to-pin-without-log", M_WRITE, M_PIN, ~0ull);
	taken("log-to-pin-with-log", MSR_PROTECT, M_WRITE, M_PIN | M_LOG, 0xff);
	not_taken("pin-log-to-log", M_WRITE, M_LOG, 0);
	not_taken("pin-log-to-other-bits", M_WRITE, M_PIN | M_LOG, 0xff00);
	not_taken("pin-log-to-fewer-bits", M_WRITE, M_PIN | M_LOG, 0xf);
	not_taken("pin-log-to-pin", M_WRITE, M_PIN, 0xff);
	taken("pin-log-to-more-bits", MSR_PROTECT, M_WRITE, M_PIN | M_LOG, 0xffff);
	taken("the-same-again", MSR_PROTECT, M_WRITE, M_PIN | M_LOG, 0xffff);
	taken("lock-more-bits", MSR_LOCK, M_WRITE, M_PIN, 0xf0000);
	not_taken("bits-that-were-locked-later", M_WRITE, M_PIN | M_LOG, 0xffff);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		msr_denied("bits of two requests", cpu, LSTAR, A_WRITE, 0x1000 * (cpu + 1) + 1);
		msr_denied("bits of two requests", cpu, LSTAR, A_WRITE, 0x1000 * (cpu + 1) + 0x10000);
		msr_logged("bits of two requests", cpu, LSTAR, A_WRITE, 0x1000 * (cpu + 1) + 0x100000);
		msr_logged("reads are still logged", cpu, LSTAR, A_READ, 0x1000 * (cpu + 1) + 0x100000);
	}
	taken("reads-to-deny", MSR_PROTECT, M_READ, M_DENY, 0);
	not_taken("deny-to-log", M_READ, M_LOG, 0);
	taken("writes-to-deny", MSR_LOCK, M_WRITE, M_DENY, 0);
	not_taken("deny-to-pin", M_WRITE, M_PIN | M_LOG, ~0ull);
	taken("lock-less-is-nothing", MSR_LOCK, M_WRITE, M_LOG, 0);
	/* Only the last entry can be what loosens; the first that does is named. */
	msr_rules()[0] = rule(CSTAR, CSTAR, M_WRITE, M_DENY, 0);
	msr_rules()[1] = rule(LSTAR, LSTAR, M_BOTH, M_ALLOW, 0);
	msr_rules()[2] = rule(STAR, SFMASK, M_BOTH, M_DENY, 0);
	verdict("overwritten-in-the-same-request", guard_request(MSR_PROTECT, 3), 0, NO_INDEX);
	msr_rules()[0] = rule(CSTAR, CSTAR, M_WRITE, M_ALLOW, 0);
	msr_rules()[1] = rule(STAR, CSTAR, M_READ, M_ALLOW, 0);
	msr_rules()[2] = rule(LSTAR, LSTAR, M_BOTH, M_LOG, 0);
	/* Entry 1 loosens LSTAR's reads, but entry 2 has them, too. */
	verdict("the-first-that-loosens", guard_request(MSR_PROTECT, 3), EPERM, 2);
	msr_denied("nothing of a refused request", 0, CSTAR, A_WRITE, 5);
	msr_denied("nothing of a refused request", 1, CSTAR, A_READ, 0);
	msr_free(CSTAR, SFMASK);
	msr_free(STAR, STAR);

	/* SEAL: what is there becomes immutable, what comes later is not. */
	must_msr(MSR_PROTECT, SYSENTER_ESP, M_WRITE, M_PIN, 0xf);
	must_msr(MSR_PROTECT, SYSENTER_EIP, M_READ, M_DENY, 0);
	before = guard_config();
	verdict("seal", guard_seal(), 0, NO_INDEX);
	check(guard_config().msr_ranges_in_force == before.msr_ranges_in_force, "SEAL has changed how much is in force");
	verdict("seal-again", guard_seal(), 0, NO_INDEX);
	verdict("sealed-pin", msr_ask(MSR_PROTECT, SYSENTER_ESP, SYSENTER_ESP, M_WRITE, M_ALLOW, 0), EPERM, 0);
	verdict("sealed-read", msr_ask(MSR_PROTECT, SYSENTER_CS, SYSENTER_EIP, M_READ, M_LOG, 0), EPERM, 0);
	verdict("sealed-grows", msr_ask(MSR_PROTECT, SYSENTER_ESP, SYSENTER_ESP, M_WRITE, M_PIN, 0xff), 0, NO_INDEX);
	verdict("the-other-access", msr_ask(MSR_PROTECT, SYSENTER_EIP, SYSENTER_EIP, M_WRITE, M_DENY, 0), 0, NO_INDEX);
	verdict("the-other-access-back", msr_ask(MSR_PROTECT, SYSENTER_EIP, SYSENTER_EIP, M_WRITE, M_ALLOW, 0), 0, NO_INDEX);
	c = guard_config();
	must_msr(MSR_PROTECT, KERNEL_GS_BASE, M_WRITE, M_DENY, 0);
	msr_free(KERNEL_GS_BASE, KERNEL_GS_BASE);
	check(guard_config().msr_ranges_in_force == c.msr_ranges_in_force, "%u ranges in force, not %u",
	      guard_config().msr_ranges_in_force, c.msr_ranges_in_force);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		msr_denied("sealed", cpu, LSTAR, A_WRITE, 1);
		msr_denied("sealed", cpu, LSTAR, A_READ, 0);
		msr_denied("sealed", cpu, SYSENTER_EIP, A_READ, 0);
	}
	/* Nor does a new driver loosen it. */
	guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
	before = guard_config();
	not_taken("after-a-device-reset", M_WRITE, M_LOG, 0);
	msr_denied("after a device reset", 1, LSTAR, A_WRITE, 1);
	verdicts();
	msr_end();
}

static struct msr_rule *seen;

/* The answer is exactly these; immutable or not is in flags. */
static void query(const char *name, u32 first, u32 last, u16 access, const struct msr_rule *want, u32 n)
{
	static const u32 rooms[] = { 64, 1, 0 };

	for (u32 k = 0; k < ARRAY_SIZE(rooms); k++) {
		u32 used, there = MIN(n, rooms[k]);
		struct response r = guard_msr_query(rule(first, last, access, 0, 0), seen, rooms[k], &used);

		check(!r.status && r.index == NO_INDEX && r.value == n, "%s, room for %u: status %u, %lu entries, not %u", name, rooms[k],
		      r.status, r.value, n);
		check(used == 16 + 24 * there, "%s, room for %u: used length %u, not %u", name, rooms[k], used, 16 + 24 * there);
		for (u32 i = 0; i < there && used >= 16 + 24 * there; i++)
			check(!memcmp(&seen[i], &want[i], sizeof(seen[i])),
			      "%s: entry %u is 0x%x-0x%x access %u action %u flags 0x%x mask 0x%lx, not 0x%x-0x%x %u %u 0x%x 0x%lx", name, i,
			      seen[i].first, seen[i].last, seen[i].access, seen[i].action, seen[i].flags, seen[i].mask, want[i].first,
			      want[i].last, want[i].access, want[i].action, want[i].flags, want[i].mask);
	}
}

void t_msr_query(void)
{
	struct msr_rule two[] = {
		{ LSTAR, CSTAR, M_READ, M_DENY, 0, 0 }, { LSTAR, LSTAR, M_WRITE, M_DENY, 0, 0 }, { CSTAR, CSTAR, M_WRITE, M_PIN, 0, 0xff },
	};
	struct msr_rule one = two[0];

	msr_begin();
	seen = alloc_page();
	query("nothing", 0, ~0u, M_BOTH, NULL, 0);
	/* In pieces, told as one; reads and writes for themselves, by the first MSR. */
	must_msr(MSR_PROTECT, CSTAR, M_WRITE, M_PIN, 0xff);
	must_msr(MSR_PROTECT, CSTAR, M_READ, M_DENY, 0);
	must_msr(MSR_PROTECT, LSTAR, M_BOTH, M_DENY, 0);
	check(guard_config().msr_ranges_in_force == 3, "%u ranges in force, not 3", guard_config().msr_ranges_in_force);
	query("everything", 0, ~0u, M_BOTH, two, 3);
	query("reads", 0, ~0u, M_READ, two, 1);
	query("writes", 0, ~0u, M_WRITE, two + 1, 2);
	query("the rules' own range", LSTAR, CSTAR, M_BOTH, two, 3);
	query("beside them", 0, LSTAR - 1, M_BOTH, NULL, 0);
	query("beside them", CSTAR + 1, ~0u, M_BOTH, NULL, 0);
	/* Of a rule that goes on outside of the range, the part inside. */
	one.first = CSTAR;
	query("a part", CSTAR, CSTAR, M_READ, &one, 1);
	one.first = one.last = LSTAR;
	query("a part", STAR, LSTAR, M_READ, &one, 1);
	/* Locking makes two of what was one. */
	must_msr(MSR_LOCK, CSTAR, M_READ, M_LOG, 0);
	check(guard_config().msr_ranges_in_force == 4, "%u ranges in force, not 4", guard_config().msr_ranges_in_force);
	{
		struct msr_rule locked[] = {
			{ LSTAR, LSTAR, M_READ, M_DENY, 0, 0 }, { LSTAR, LSTAR, M_WRITE, M_DENY, 0, 0 },
			{ CSTAR, CSTAR, M_READ, M_DENY, M_IMMUTABLE, 0 }, { CSTAR, CSTAR, M_WRITE, M_PIN, 0, 0xff },
		};

		query("locked", 0, ~0u, M_BOTH, locked, 4);
		check(!guard_seal().status, "SEAL");
		two[0].flags = two[1].flags = two[2].flags = M_IMMUTABLE;
		query("sealed", 0, ~0u, M_BOTH, two, 3);
		check(guard_config().msr_ranges_in_force == 3, "%u ranges in force, not 3", guard_config().msr_ranges_in_force);
	}
	/* The ends of the numbers. */
	one = (struct msr_rule) { 0, 0x10, M_READ, M_DENY, 0, 0 };
	if (!msr_ask(MSR_PROTECT, 0, 0x10, M_READ, M_DENY, 0).status) {
		query("from 0", 0, 0x100, M_BOTH, &one, 1);
		one.last = 0;
		query("just 0", 0, 0, M_BOTH, &one, 1);
	} else {
		check(false, "MSR 0 cannot be denied");
	}
	if (accel != ACCEL_KVM) {
		must_msr(MSR_PROTECT, ~0u, M_WRITE, M_DENY, 0);
		one = (struct msr_rule) { ~0u, ~0u, M_WRITE, M_DENY, 0, 0 };
		query("the last MSR", ~0u, ~0u, M_BOTH, &one, 1);
		msr_denied("the last MSR", 1, ~0u, A_WRITE, 7);
	}
	msr_end();
}

static u8 *bitmaps;
static u32 bitmaps_len, bitmaps_n;

static struct bitmap *add(u32 flags, u32 nmsrs, u32 base, u8 fill_with)
{
	struct bitmap *b = (struct bitmap *)(bitmaps + sizeof(struct request) + bitmaps_len);
	u32 len = (nmsrs + 63) / 64 * 8;

	*b = (struct bitmap) { flags, nmsrs, base, 0 };
	memset(b->bits, fill_with, len);
	bitmaps_len += sizeof(*b) + len;
	bitmaps_n++;
	return b;
}

static void clear(struct bitmap *b, u32 msr)
{
	b->bits[(msr - b->base) / 8] &= ~(1 << (msr - b->base) % 8);
}

static void begin(void)
{
	bitmaps_len = bitmaps_n = 0;
}

/* Sends what was added; or `len` bytes of it, or another count. */
static struct response send(u32 len, u32 n)
{
	struct response resp;

	*(struct request *)bitmaps = (struct request) { MSR_BITMAP, 0, n };
	check(guard_send(bitmaps, sizeof(struct request) + len, &resp) == sizeof(resp), "used length");
	return resp;
}

static struct response send_all(void)
{
	return send(bitmaps_len, bitmaps_n);
}

static void bad_bitmaps(void)
{
	struct bitmap *b;

	begin();
	add(3, 64, FAR, 0xff);
	add(0, 64, FAR + 64, 0xff);
	verdict("flags-0", send_all(), EINVAL, 1);
	begin();
	add(4, 64, FAR, 0xff);
	verdict("flags-4", send_all(), EINVAL, 0);
	begin();
	add(3, 64, FAR, 0xff)->pad = 1;
	verdict("pad", send_all(), EINVAL, 0);
	begin();
	add(3, 0, FAR, 0xff);
	verdict("no-msrs", send_all(), EINVAL, 0);
	begin();
	add(3, 12289, FAR, 0xff);
	verdict("12289-msrs", send_all(), EINVAL, 0);
	begin();
	add(3, 64, 0xffffffc1, 0xff);
	verdict("beyond-the-last-msr", send_all(), EINVAL, 0);
	begin();
	add(3, 64, FAR, 0xff);
	verdict("bitmap-one-byte-short", send(bitmaps_len - 1, 1), EINVAL, 0);
	verdict("header-one-byte-short", send(15, 1), EINVAL, 0);
	verdict("more-bytes-than-bitmaps", send(bitmaps_len + 8, 1), EINVAL, ANY_INDEX);
	verdict("fewer-bitmaps-than-count", send(bitmaps_len, 2), EINVAL, ANY_INDEX);
	begin();
	add(M_READ, 64, FAR, 0);
	add(M_WRITE, 64, FAR, 0);
	add(M_BOTH, 64, FAR + 63, 0);
	verdict("overlap", send_all(), EINVAL, 2);
	begin();
	for (u32 i = 0; i < 17; i++)
		add(3, 64, FAR + 64 * i, 0xff);
	verdict("17-bitmaps", send_all(), E2BIG, NO_INDEX);
	begin();
	b = add(3, 0x300, 0x700, 0xff);
	clear(b, 0x8ff);
	verdict("x2apic", send_all(), EINVAL, 0);
	begin();
	clear(add(M_WRITE, 64, 0x6c0, 0xff), DEADLINE);
	verdict("tsc-deadline", send_all(), EINVAL, 0);
	/* More rules than fit in a request: every other bit. */
	begin();
	add(3, 8193, FAR, 0x55);
	verdict("4097-rules", send_all(), E2BIG, NO_INDEX);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
}

void t_msr_bitmap(void)
{
	struct msr_rule want[] = {
		{ FAR, FAR + 63, M_READ, M_DENY, 0, 0 }, { FAR, FAR + 64, M_WRITE, M_DENY, 0, 0 }, { LSTAR, LSTAR, M_WRITE, M_DENY, 0, 0 },
	};
	struct msr_rule locked = { LSTAR, LSTAR, M_WRITE, M_DENY, M_IMMUTABLE, 0 };
	struct bitmap *b;

	msr_begin();
	seen = alloc_page();
	bitmaps = alloc_pages(16);
	before = guard_config();
	bad_bitmaps();

	/* The largest there may be, all bits set but one; one with bits beyond nmsrs, which mean nothing. */
	for (u32 cpu = 0; cpu < 2; cpu++)
		msr_writes("before", cpu, LSTAR, 0x1000 * (cpu + 1));
	begin();
	clear(add(M_WRITE, 12288, 0xc0000000, 0xff), LSTAR);
	add(M_READ, 64, FAR, 0);
	add(M_WRITE, 65, FAR, 0);
	verdict("three-bitmaps", send_all(), 0, NO_INDEX);
	query("three bitmaps", 0, ~0u, M_BOTH, want, 3);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		msr_denied("a clear bit", cpu, LSTAR, A_WRITE, 5);
		msr_reads("the other access", cpu, LSTAR, 0x1000 * (cpu + 1));
		msr_writes("a set bit", cpu, CSTAR, 6);
		msr_denied("the last bit", cpu, FAR + 64, A_WRITE, 7);
		msr_denied("the last bit", cpu, FAR + 63, A_READ, 0);
	}
	/* A bitmap that speaks of other MSRs leaves these alone; set bits take back. */
	begin();
	add(M_BOTH, 64, FAR, 0xff);
	clear(add(M_READ, 64, FAR + 64, 0xff), FAR + 127);
	verdict("replaced", send_all(), 0, NO_INDEX);
	want[0] = rule(FAR + 64, FAR + 64, M_WRITE, M_DENY, 0);
	want[1] = rule(FAR + 127, FAR + 127, M_READ, M_DENY, 0);
	query("replaced", 0, ~0u, M_BOTH, want, 3);
	/* x2APIC MSRs and the deadline timer in a bitmap: set, they are no rules. */
	begin();
	b = add(M_BOTH, 0x300, 0x680, 0xff);
	clear(b, 0x7ff);
	clear(b, 0x900);
	verdict("around-x2apic", send_all(), 0, NO_INDEX);
	msr_denied("before x2APIC", 1, 0x7ff, A_WRITE, 1);
	msr_denied("after x2APIC", 1, 0x900, A_READ, 0);
	begin();
	add(M_BOTH, 0x300, 0x680, 0xff);
	verdict("around-x2apic-back", send_all(), 0, NO_INDEX);
	/* What is locked is not taken back. */
	must_msr(MSR_LOCK, LSTAR, M_WRITE, M_LOG, 0);
	before = guard_config();
	begin();
	add(M_WRITE, 64, FAR + 64, 0xff);
	add(M_WRITE, 64, 0xc0000080, 0xff);
	verdict("loosens", send_all(), EPERM, 1);
	query("loosens", 0, ~0u, M_WRITE, (struct msr_rule[]) { want[0], locked }, 2);
	msr_denied("of a refused request", 0, FAR + 64, A_WRITE, 1);
	begin();
	add(M_BOTH, 128, FAR, 0xff);
	clear(add(M_WRITE, 64, 0xc0000080, 0xff), LSTAR);
	verdict("the-same-again", send_all(), 0, NO_INDEX);
	query("the same again", 0, ~0u, M_BOTH, &locked, 1);
	verdicts();
	msr_end();
}

/* Rules one by one until there is no room: how many there were. */
static u32 until_full(const char *what, u32 most, struct response (*next)(u32 n))
{
	struct response r = { 0, 0, 0 };
	u32 n;

	for (n = 0; n < most; n++) {
		before = guard_config();
		r = next(n);
		if (r.status)
			break;
	}
	if (n == most)
		return n;
	check(r.status == ENOSPC && r.index == NO_INDEX, "%s: status %u, index 0x%x after %u", what, r.status, r.index, n);
	check(guard_config().msr_ranges_in_force == before.msr_ranges_in_force, "%s: %u ranges in force, not %u", what,
	      guard_config().msr_ranges_in_force, before.msr_ranges_in_force);
	return n;
}

/* Each in a window of its own. Above what the CPU or KVM knows. */
#define WINDOW(n)	(0x10000000u + (n) * 0x10000u)
#define WINDOWS		40u

static struct response next_window(u32 n)
{
	return msr_ask(MSR_PROTECT, WINDOW(n), WINDOW(n), M_WRITE, M_DENY, 0);
}

/* KVM denies by default then, and its ranges say what is allowed. */
static void everything_but(void)
{
	static const struct msr_rule all[] = {
		{ 0, SYSENTER_CS - 1, M_BOTH, M_DENY, 0, 0 }, { SYSENTER_EIP + 1, DEADLINE - 1, M_BOTH, M_DENY, 0, 0 },
		{ DEADLINE, DEADLINE, M_READ, M_DENY, 0, 0 }, { DEADLINE + 1, 0x7ff, M_BOTH, M_DENY, 0, 0 },
		{ 0x900, LSTAR - 1, M_BOTH, M_DENY, 0, 0 }, { LSTAR + 1, ~0u, M_BOTH, M_DENY, 0, 0 },
	};
	u32 n = ARRAY_SIZE(all);

	memcpy(msr_rules(), all, sizeof(all));
	verdict("everything-but", guard_request(MSR_PROTECT, n), 0, NO_INDEX);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		msr_denied("everything but", cpu, WINDOW(3), A_WRITE, 1);
		msr_denied("everything but", cpu, STAR, A_READ, 0);
		msr_denied("everything but", cpu, 0, A_WRITE, 1);
		msr_denied("everything but", cpu, ~0u, A_WRITE, 1);
		msr_writes("what is left", cpu, LSTAR, 0x1000);
		msr_writes("what is left", cpu, SYSENTER_ESP, 0x1000);
	}
	memcpy(msr_rules(), all, sizeof(all));
	for (u32 i = 0; i < n; i++)
		msr_rules()[i].action = M_ALLOW;
	verdict("everything-but-back", guard_request(MSR_PROTECT, n), 0, NO_INDEX);
	msr_writes("free again", 1, STAR, 0x1000);
	/* Writes alone would need an exit for all reads: KVM cannot do that, and QEMU does not do another thing. */
	verdict("a-gigabyte-of-writes", msr_ask(MSR_PROTECT, 0x1000, 0x3fffffff, M_WRITE, M_DENY, 0), accel == ACCEL_KVM ? ENOSPC : 0,
		NO_INDEX);
	msr_free(0x1000, 0x3fffffff);
}

static void filter_full(void)
{
	u32 n = until_full("windows", WINDOWS, next_window);

	diag("%u windows", n);
	if (accel == ACCEL_KVM)
		check(n >= 8 && n <= 16, "%u windows of MSRs fit KVM's 16 ranges", n);
	else
		check(n == WINDOWS, "%u windows fit, not %u", n, WINDOWS);
	/* What fits is enforced, the last and the first; after the refusal of the next. */
	for (u32 cpu = 0; cpu < 2; cpu++) {
		msr_denied("a window", cpu, WINDOW(0), A_WRITE, 1);
		msr_denied("a window", cpu, WINDOW(n - 1), A_WRITE, 1);
	}
	if (n < WINDOWS) {
		/* One in the place of another, and reads of what is there, still fit. */
		msr_rules()[0] = rule(WINDOW(n), WINDOW(n), M_WRITE, M_DENY, 0);
		msr_rules()[1] = rule(WINDOW(0), WINDOW(0), M_BOTH, M_ALLOW, 0);
		check(!guard_request(MSR_PROTECT, 2).status, "one window in the place of another");
		msr_denied("the new window", 1, WINDOW(n), A_WRITE, 2);
		check(!msr_ask(MSR_PROTECT, WINDOW(1), WINDOW(1), M_BOTH, M_DENY, 0).status, "reads of a window that is there");
		msr_denied("reads of a window", 1, WINDOW(1), A_READ, 0);
	}
	msr_free(WINDOW(0), WINDOW(WINDOWS));
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
	/* All at once: nothing of it. */
	for (u32 i = 0; i < WINDOWS; i++)
		msr_rules()[i] = rule(WINDOW(i), WINDOW(i), M_WRITE, M_DENY, 0);
	before = guard_config();
	if (accel == ACCEL_KVM)
		verdict("forty-windows", guard_request(MSR_PROTECT, WINDOWS), ENOSPC, NO_INDEX);
	else
		verdict("forty-windows", guard_request(MSR_PROTECT, WINDOWS), 0, NO_INDEX);
	msr_free(WINDOW(0), WINDOW(WINDOWS));
	everything_but();
}

static u32 pins[65], n_pins;

static struct response next_pin(u32 n)
{
	return msr_ask(MSR_PROTECT, pins[n], pins[n], M_WRITE, M_PIN, ~0ull);
}

static void pins_full(void)
{
	static const struct { u32 first, last; } candidates[] = {
		{ 0x174, 0x176 }, { 0xc0000081, 0xc0000084 }, { 0xc0000102, 0xc0000102 }, { 0x277, 0x277 }, { 0x200, 0x20f }, { 0x250, 0x250 },
		{ 0x258, 0x259 }, { 0x268, 0x26f }, { 0x2ff, 0x2ff }, { 0x400, 0x47f }, { 0x1000, 0x1100 },
	};
	u32 n;

	for (u32 i = 0; i < ARRAY_SIZE(candidates); i++)
		for (u32 msr = candidates[i].first; msr <= candidates[i].last && n_pins < ARRAY_SIZE(pins); msr++)
			if (msr_exists(msr))
				pins[n_pins++] = msr;
	if (n_pins < ARRAY_SIZE(pins)) {
		diag("only %u MSRs here can be read: no 65th to pin", n_pins);
		return;
	}
	n = until_full("pins", n_pins, next_pin);
	check(n == 64, "%u MSRs can be pinned, not 64", n);
	/* Another pin of what is pinned takes no room, and what is denied has no pin. */
	check(!msr_ask(MSR_PROTECT, pins[63], pins[63], M_WRITE, M_PIN, ~0ull).status, "the 64th again");
	must_msr(MSR_PROTECT, pins[0], M_WRITE, M_DENY, 0);
	check(!next_pin(64).status, "the 65th in the place of the first");
	msr_denied("the 65th", 1, pins[64], A_WRITE, 0x1234567);
	msr_free(0, 0x7ff);
	msr_free(0x1000, 0x1fff);
	msr_free(0xc0000000, 0xc0000fff);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
}

static void ranges_full(void)
{
	u32 max = guard_config().max_msr_ranges, have = 0, i;

	if (max > 6000) {
		diag("%u ranges are too many to try", max);
		return;
	}
	/* Every other MSR of one window of KVM's: reads, then writes of some. */
	for (i = 0; i < MIN(max, MAX_REQ); i++)
		msr_rules()[i] = rule(FAR + 2 * i, FAR + 2 * i, M_READ, M_DENY, 0);
	have = i;
	check(!guard_request(MSR_PROTECT, i).status, "%u ranges of reads", have);
	for (i = 0; i < max - have; i++)
		msr_rules()[i] = rule(FAR + 2 * i, FAR + 2 * i, M_WRITE, M_DENY, 0);
	if (i)
		check(!guard_request(MSR_PROTECT, i).status, "%u ranges of writes", i);
	check(guard_config().msr_ranges_in_force == max, "%u ranges in force, not %u", guard_config().msr_ranges_in_force, max);
	before = guard_config();
	verdict("one-more", msr_ask(MSR_PROTECT, LSTAR, LSTAR, M_WRITE, M_DENY, 0), ENOSPC, NO_INDEX);
	msr_writes("of a refused request", 1, LSTAR, 0x4000);
	msr_rules()[0] = rule(FAR + 1, FAR + 1, M_READ, M_DENY, 0);
	verdict("closes-a-gap", guard_request(MSR_PROTECT, 1), 0, NO_INDEX);
	verdict("one-more-fits", msr_ask(MSR_PROTECT, LSTAR, LSTAR, M_WRITE, M_DENY, 0), 0, NO_INDEX);
	verdict("and-another-does-not", msr_ask(MSR_PROTECT, CSTAR, CSTAR, M_READ, M_DENY, 0), ENOSPC, NO_INDEX);
	msr_denied("the one that fits", 1, LSTAR, A_WRITE, 1);
	msr_denied("the last of many", 1, FAR + 2 * (have - 1), A_READ, 0);
	msr_free(LSTAR, LSTAR);
	msr_free(FAR, FAR + 0x2fff);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
}

void t_msr_nospc(void)
{
	msr_begin();
	/* msr_told() learns where the instructions are. */
	must_msr(MSR_PROTECT, FAR, M_BOTH, M_DENY, 0);
	msr_denied("an MSR that nobody has", 0, FAR, A_READ, 0);
	msr_denied("an MSR that nobody has", 0, FAR, A_WRITE, 1);
	msr_free(FAR, FAR);
	before = guard_config();
	filter_full();
	pins_full();
	ranges_full();
	verdicts();
	msr_end();
}

/* The action of the i-th of many: neighbours differ. */
static struct msr_rule one_of_many(u32 i)
{
	static const struct { u16 access, action; } kinds[] = { { M_WRITE, M_DENY }, { M_BOTH, M_DENY }, { M_READ, M_DENY } };
	u32 k = i % ARRAY_SIZE(kinds);

	return rule(FAR + i, FAR + i, kinds[k].access, kinds[k].action, 0);
}

void t_msr_many(void)
{
	u32 n = opt_num("n", MAX_REQ), some[] = { 0, 1, 2, n / 2, n / 2 + 1, n - 2, n - 1 };
	struct response r;

	msr_begin();
	for (u32 i = 0; i < n; i++)
		msr_rules()[i] = one_of_many(i);
	msr_rules()[n - 1].access = 0;
	r = guard_request(MSR_LOCK, n);
	check(r.status == EINVAL && r.index == n - 1, "a bad last entry: status %u, index %u", r.status, r.index);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
	for (u32 i = 0; i < n; i++)
		msr_rules()[i] = one_of_many(i);
	r = guard_request(MSR_LOCK, n);
	check(!r.status, "%u rules: status %u, index 0x%x", n, r.status, r.index);
	diag("%u rules, %u ranges", n, guard_config().msr_ranges_in_force);
	for (u32 cpu = 0; cpu < 2; cpu++)
		for (u32 j = 0; j < ARRAY_SIZE(some); j++) {
			struct msr_rule m = one_of_many(some[j]);

			if (m.access & M_READ)
				msr_denied("a read", cpu, m.first, A_READ, 0);
			if (m.access & M_WRITE)
				msr_denied("a write", cpu, m.first, A_WRITE, some[j]);
		}
	/* Others are as quick as before, and as free. */
	for (u32 cpu = 0; cpu < 2; cpu++)
		msr_writes("no rule", cpu, LSTAR, 0x1000);
	r = msr_ask(MSR_PROTECT, FAR, FAR + n - 1, M_BOTH, M_ALLOW, 0);
	check(r.status == EPERM && r.index == 0, "taking all back: status %u, index %u", r.status, r.index);
	r = msr_ask(MSR_LOCK, FAR, FAR + n - 1, M_BOTH, M_DENY, 0);
	check(!r.status && guard_config().msr_ranges_in_force == 2, "all of them denied: status %u, %u ranges", r.status,
	      guard_config().msr_ranges_in_force);
	msr_denied("a read that was free", 1, FAR, A_READ, 0);
	msr_end();
}
