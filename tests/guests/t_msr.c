/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What becomes of accesses that rules speak of (docs/msr.md): each action, kept values, and that what is let through is exact. */
#include "guest.h"

static void each_action(u32 msr, u64 base)
{
	for (u32 cpu = 0; cpu < 2; cpu++) {
		u64 old = base + 0x1000 * (cpu + 1), new = old + 0x10;

		must_msr(MSR_PROTECT, msr, M_BOTH, M_ALLOW, 0);
		msr_writes("free", cpu, msr, new);
		msr_writes("free", cpu, msr, old);

		must_msr(MSR_PROTECT, msr, M_READ, M_LOG, 0);
		msr_logged("log of reads", cpu, msr, A_READ, old);
		must_msr(MSR_PROTECT, msr, M_BOTH, M_LOG, 0);
		msr_logged("log", cpu, msr, A_WRITE, new);
		msr_logged("log", cpu, msr, A_READ, new);
		must_msr(MSR_PROTECT, msr, M_READ, M_ALLOW, 0);
		msr_logged("log of writes", cpu, msr, A_WRITE, old);
		msr_reads("log of writes", cpu, msr, old);

		must_msr(MSR_PROTECT, msr, M_WRITE, M_PIN, ~0ull);
		msr_writes("pin", cpu, msr, old);
		msr_denied("pin", cpu, msr, A_WRITE, new);
		msr_reads("pin", cpu, msr, old);
		must_msr(MSR_PROTECT, msr, M_WRITE, M_PIN | M_LOG, ~0ull);
		msr_logged("pin and log", cpu, msr, A_WRITE, old);
		msr_denied("pin and log", cpu, msr, A_WRITE, new);
		msr_reads("pin and log", cpu, msr, old);

		must_msr(MSR_PROTECT, msr, M_WRITE, M_DENY, 0);
		msr_denied("deny of writes", cpu, msr, A_WRITE, new);
		msr_reads("deny of writes", cpu, msr, old);
		msr_denied("deny of writes", cpu, msr, A_WRITE, old);
		must_msr(MSR_PROTECT, msr, M_READ, M_DENY, 0);
		msr_denied("deny", cpu, msr, A_READ, 0);
		msr_denied("deny", cpu, msr, A_WRITE, new);
		must_msr(MSR_PROTECT, msr, M_READ, M_LOG, 0);
		msr_logged("log of reads, deny of writes", cpu, msr, A_READ, old);

		msr_free(msr, msr);
		msr_reads("free again", cpu, msr, old);
		must_msr(MSR_PROTECT, msr, M_READ, M_DENY, 0);
		msr_denied("deny of reads", cpu, msr, A_READ, 0);
		check(msr_try(cpu, msr, true, &new), "deny of reads: exception %lu for a write", trap_of(cpu)->vector);
		msr_free(msr, msr);
		msr_reads("free again", cpu, msr, new);
		msr_writes("free again", cpu, msr, old);
	}
}

/* Any MSR takes these, on any host: deny, and pin of all bits. */
static void not_plain(u32 msr)
{
	u64 now = 0;

	if (!msr_exists(msr)) {
		diag("there is no MSR 0x%x", msr);
		return;
	}
	for (u32 cpu = 0; cpu < 2; cpu++) {
		must_msr(MSR_PROTECT, msr, M_BOTH, M_DENY, 0);
		msr_denied("not plain, deny", cpu, msr, A_READ, 0);
		msr_denied("not plain, deny", cpu, msr, A_WRITE, 0x5a5a);
		msr_free(msr, msr);
		check(msr_try(cpu, msr, false, &now), "MSR 0x%x is gone", msr);
		must_msr(MSR_PROTECT, msr, M_WRITE, M_PIN, ~0ull);
		msr_writes("not plain, pin", cpu, msr, now);
		msr_denied("not plain, pin", cpu, msr, A_WRITE, now ^ 2);
		msr_denied("not plain, pin", cpu, msr, A_WRITE, now ^ 1ull << 63);
		msr_reads("not plain, pin", cpu, msr, now);
		msr_free(msr, msr);
		msr_reads("not plain, free", cpu, msr, now);
	}
}

static void neighbours(void)
{
	for (u32 cpu = 0; cpu < 2; cpu++)
		for (u32 msr = STAR; msr <= SFMASK; msr++)
			msr_writes("before", cpu, msr, msr);
	if (msr_ask(MSR_PROTECT, LSTAR, CSTAR, M_WRITE, M_DENY, 0).status)
		fail("a range is refused");
	for (u32 cpu = 0; cpu < 2; cpu++) {
		msr_writes("a neighbour", cpu, STAR, 1);
		msr_denied("the first of two", cpu, LSTAR, A_WRITE, 2);
		msr_denied("the last of two", cpu, CSTAR, A_WRITE, 3);
		msr_writes("a neighbour", cpu, SFMASK, 4);
		msr_reads("the first of two", cpu, LSTAR, LSTAR);
		msr_reads("the last of two", cpu, CSTAR, CSTAR);
	}
	msr_free(0xc0000000, 0xc0000fff);
	check(!guard_config().msr_ranges_in_force, "%u ranges in force", guard_config().msr_ranges_in_force);
}

void t_msr_actions(void)
{
	static const u32 others[] = { 0x1b, 0x3a, 0x8b, 0x1a0, 0x2ff, 0xc0000103, 0xc0010015 };
	u32 nobodys = 0x1234;

	msr_begin();
	/* First a denied one of each: msr_told() learns where the instructions are. */
	for (u32 cpu = 0; cpu < 2; cpu++) {
		must_msr(MSR_PROTECT, nobodys, M_BOTH, M_DENY, 0);
		msr_denied("an MSR that nobody has", cpu, nobodys, A_READ, 0);
		msr_denied("an MSR that nobody has", cpu, nobodys, A_WRITE, 0x123456789abcdef0ull);
		msr_free(nobodys, nobodys);
	}
	each_action(SYSENTER_ESP, 0);
	each_action(LSTAR, 0xffff800000000000ull);
	each_action(KERNEL_GS_BASE, 0x7f0000000000ull);
	for (u32 i = 0; i < ARRAY_SIZE(others) && !failures; i++)
		not_plain(others[i]);
	neighbours();
	msr_end();
}

/* Bits of EFER that may be tried. */
static bool efer_bit(u32 bit)
{
	return opt_num("efer", ~0ull) >> bit & 1;
}

/* Those that a guest of this host can flip. */
static u64 efer_bits(void)
{
	u64 old = read_msr(EFER), bits = 0;

	for (u32 bit = 0; bit < 16; bit++) {
		u64 v = old ^ 1ull << bit;

		if (!efer_bit(bit) || bit == 8 || bit == 10 || !msr_try(0, EFER, true, &v))
			continue;
		bits |= read_msr(EFER) ^ old;
		write_msr(EFER, old);
	}
	return bits & ~0x500ull;
}

void t_msr_pin(void)
{
	u64 bits, efer[2] = { 0, 0 };

	msr_begin();
	/* EFER: each bit that there is, pinned alone; as it is, and flipped. */
	bits = efer_bits();
	diag("EFER bits that can be flipped: 0x%lx", bits);
	check(bits & 1 && bits & 0x800, "EFER.SCE and NXE cannot be flipped: 0x%lx", bits);
	for (u32 bit = 0; bit < 16; bit++) {
		u64 pin = 1ull << bit, other = bits & 1 ? 1 : 0x800;

		if (!(bits & pin))
			continue;
		other = bit == 0 ? 0x800 : 1;
		for (u32 set = 0; set < 2; set++)
			for (u32 cpu = 0; cpu < 2; cpu++) {
				msr_try(cpu, EFER, false, &efer[cpu]);
				efer[cpu] = (efer[cpu] & ~pin) | (set ? pin : 0);
				msr_writes("free", cpu, EFER, efer[cpu]);
				must_msr(MSR_PROTECT, EFER, M_WRITE, M_PIN, pin);
				msr_writes("other bits of EFER", cpu, EFER, efer[cpu] ^ other);
				msr_denied("a pinned bit of EFER", cpu, EFER, A_WRITE, efer[cpu] ^ other ^ pin);
				msr_reads("a pinned bit of EFER", cpu, EFER, efer[cpu] ^ other);
				msr_denied("a pinned bit of EFER", cpu, EFER, A_WRITE, efer[cpu] ^ pin);
				msr_writes("other bits of EFER", cpu, EFER, efer[cpu]);
				msr_free(EFER, EFER);
				msr_writes("free again", cpu, EFER, efer[cpu] & ~pin);
			}
	}
	/* STAR: selectors pinned, each CPU's own; the rest free. Then the mask grows, and what is kept is what is there then. */
	for (u32 cpu = 0; cpu < 2; cpu++)
		msr_writes("free", cpu, STAR, 0x0023001000000000ull + ((u64)cpu << 56) + 1);
	must_msr(MSR_LOCK, STAR, M_WRITE, M_PIN, 0xffffffff00000000ull);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		u64 star = 0x0023001000000000ull + ((u64)cpu << 56);

		msr_writes("STAR's lower half", cpu, STAR, star + 2);
		msr_denied("STAR's upper half", cpu, STAR, A_WRITE, (star ^ 1ull << 56) + 2);
		msr_denied("STAR's upper half", cpu, STAR, A_WRITE, 2);
		msr_reads("STAR's upper half", cpu, STAR, star + 2);
		msr_writes("STAR's lower half", cpu, STAR, star + 0x10 + cpu);
	}
	must_msr(MSR_LOCK, STAR, M_WRITE, M_PIN, 0xf);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		u64 star = 0x0023001000000000ull + ((u64)cpu << 56) + cpu;

		msr_writes("STAR, 60 bits free or the same", cpu, STAR, star + 0xabcde0);
		msr_denied("STAR, the bits added", cpu, STAR, A_WRITE, star + 0xabcde8);
		msr_denied("STAR, the bits before", cpu, STAR, A_WRITE, star ^ 1ull << 32);
		msr_writes("STAR, 60 bits free or the same", cpu, STAR, star);
	}
	/* With log, what goes through is told, and what is not, once. */
	must_msr(MSR_LOCK, STAR, M_WRITE, M_LOG, 0);
	for (u32 cpu = 0; cpu < 2; cpu++) {
		u64 star = 0x0023001000000000ull + ((u64)cpu << 56) + cpu;

		msr_logged("pin and log", cpu, STAR, A_WRITE, star + 0x50);
		msr_denied("pin and log", cpu, STAR, A_WRITE, star + 0x58);
		msr_logged("pin and log", cpu, STAR, A_WRITE, star + 0x50);
		msr_reads("pin and log", cpu, STAR, star + 0x50);
	}
	msr_end();
}

static const struct { u32 msr; u64 mask; } kept[] = {
	{ SYSENTER_ESP, ~0ull }, { SYSENTER_EIP, ~0ull }, { LSTAR, ~0ull }, { CSTAR, ~0ull }, { KERNEL_GS_BASE, ~0ull },
	/* These INIT does reset. */
	{ FS_BASE, ~0ull }, { GS_BASE, ~0ull },
	/* SCE, LME, NXE, as Linux: the CPU comes up again only if it can set LME. */
	{ EFER, 0x901 },
};

static u64 kept_value(u32 cpu, u32 i)
{
	return kept[i].msr == EFER ? 0x500 + cpu : 0x10000ul * (i + 1) + 0x1000 * cpu;
}

void t_msr_kept(void)
{
	u32 resets = 0;
	u64 now;

	msr_begin();
	for (u32 cpu = 0; cpu < 2; cpu++)
		for (u32 i = 0; i < ARRAY_SIZE(kept); i++)
			if (kept[i].msr == EFER && cpu)
				/* What the start-up code sets: else it would fault before there is a handler. */
				msr_writes("before", cpu, EFER, 0x500);
			else
				msr_writes("before", cpu, kept[i].msr, kept_value(cpu, i));
	for (u32 i = 0; i < ARRAY_SIZE(kept); i++)
		must_msr(MSR_LOCK, kept[i].msr, M_WRITE, M_PIN, kept[i].mask);
	/* What is pinned already is not kept anew by another rule, not even while the CPU is down. */
	for (u32 round = 0; round < 3; round++) {
		cpu_stop(1);
		if (round == 1)
			must_msr(MSR_LOCK, LSTAR, M_WRITE, M_PIN, ~0ull);
		if (round == 2)
			must_msr(MSR_LOCK, LSTAR, M_WRITE, M_LOG | M_PIN, ~0ull);
		if (!check(cpu_start(1), "round %u: the CPU does not start again", round))
			break;
		for (u32 i = 0; i < ARRAY_SIZE(kept); i++) {
			u32 msr = kept[i].msr;
			bool logs = msr == LSTAR && round == 2;

			if (!check(msr_try(1, msr, false, &now), "MSR 0x%x cannot be read", msr))
				continue;
			if (!round)
				diag("MSR 0x%x after INIT: 0x%lx, kept 0x%lx", msr, now, msr == EFER ? 0x500 : kept_value(1, i));
			resets += now != kept_value(1, i) && msr != EFER;
			if (msr == EFER) {
				msr_denied("EFER after INIT", 1, EFER, A_WRITE, now ^ 1);
				msr_denied("EFER after INIT", 1, EFER, A_WRITE, now ^ 0x800);
				msr_reads("EFER after INIT", 1, EFER, now);
				continue;
			}
			msr_denied("neither kept nor there", 1, msr, A_WRITE, kept_value(1, i) + 8);
			msr_denied("what another CPU has kept", 1, msr, A_WRITE, kept_value(0, i));
			msr_reads("nothing of it landed", 1, msr, now);
			if (logs)
				msr_logged("what is there", 1, msr, A_WRITE, now);
			else
				msr_writes("what is there", 1, msr, now);
			if (logs)
				msr_logged("what was kept", 1, msr, A_WRITE, kept_value(1, i));
			else
				msr_writes("what was kept", 1, msr, kept_value(1, i));
			msr_reads("what was kept", 1, msr, kept_value(1, i));
			if (now != kept_value(1, i))
				msr_denied("what INIT left, once the kept value is back", 1, msr, A_WRITE, now);
			msr_denied("neither kept nor there", 1, msr, A_WRITE, kept_value(1, i) + 8);
		}
	}
	check(resets, "INIT has reset none of these MSRs: this test shows nothing");
	for (u32 i = 0; i < ARRAY_SIZE(kept); i++) {
		msr_reads("the other CPU", 0, kept[i].msr, kept_value(0, i));
		if (kept[i].msr != EFER)
			msr_denied("the other CPU", 0, kept[i].msr, A_WRITE, kept_value(1, i));
	}
	msr_end();
}

/* One access without a rule and the same with one: same fault, same value. */
static void same(u32 msr, u64 value, u64 pin)
{
	u64 old = 0, free_value = 0, rule_value = 0;
	bool free_ok, rule_ok, lax = opt_num("lax", 0);
	struct response r;

	check(msr_try(1, msr, false, &old), "MSR 0x%x cannot be read", msr);
	free_ok = msr_try(1, msr, true, &value);
	check(free_ok || trap_of(1)->vector == 13, "exception %lu", trap_of(1)->vector);
	msr_try(1, msr, false, &free_value);
	check(msr_try(1, msr, true, &old), "MSR 0x%x: its value 0x%lx cannot be written back", msr, old);

	r = msr_ask(MSR_PROTECT, msr, msr, M_WRITE, pin ? M_PIN | M_LOG : M_LOG, pin);
	if (r.status == EOPNOTSUPP && (msr == FS_BASE || msr == GS_BASE)) {
		/* KVM's for AMD knows them only as segments. */
		if (value == 0)
			diag("this host cannot log MSR 0x%x", msr);
		return;
	}
	if (!check(!r.status, "a rule for MSR 0x%x: status %u", msr, r.status))
		return;
	rule_ok = msr_try(1, msr, true, &value);
	if (rule_ok)
		msr_told("with a rule", 1, msr, A_WRITE, value, ACT_AUDIT);
	else
		msr_faults("with a rule", 1);
	msr_free(msr, msr);
	msr_try(1, msr, false, &rule_value);
	/* lax=1: the CPU is an emulated one that checks less, and KVM has made the checks. */
	check((rule_ok == free_ok && rule_value == free_value) || (lax && free_ok && !rule_ok) || (lax && msr >= SYSENTER_CS && msr <= SYSENTER_EIP && (u16)rule_value == (u16)free_value),
	      "a write of 0x%lx to MSR 0x%x (0x%lx) %s and leaves 0x%lx; with a rule it %s and leaves 0x%lx", value, msr, old,
	      free_ok ? "succeeds" : "faults", free_value, rule_ok ? "succeeds" : "faults", rule_value);
	msr_try(1, msr, true, &old);
}

void t_msr_checks(void)
{
	static const u32 msrs[] = {
		STAR, LSTAR, CSTAR, SFMASK, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, FS_BASE, GS_BASE, KERNEL_GS_BASE, PAT,
	};
	static const u64 values[] = {
		0, 1, 0xffff, 0x12345678, 0xffffffff, 0x100000000ull, 0x7fffffffffffull, 0x800000000000ull, 0xffff800000000000ull,
		0x8000000000000000ull, 0xfffffffffffffffcull, 0x7fffffffffffffffull, 0xff800000000000ull, 0x100000000000000ull,
	};
	static const u64 pats[] = { 0x0007040600070406ull, 0x0007040600070402ull, 0x0307040600070406ull, 0x0008040600070406ull, 0x0101050105010401ull };
	u64 efer = 0;

	msr_begin();
	for (u32 i = 0; i < ARRAY_SIZE(msrs); i++)
		for (u32 j = 0; j < ARRAY_SIZE(values); j++)
			same(msrs[i], values[j], 0);
	for (u32 j = 0; j < ARRAY_SIZE(pats); j++)
		same(PAT, pats[j], 0);
	/* A pin of another bit makes no difference. */
	for (u32 j = 0; j < ARRAY_SIZE(values); j++)
		if (!(values[j] & 2))
			same(LSTAR, values[j] & ~2ull, 2);
	msr_try(1, EFER, false, &efer);
	for (u32 bit = 0; bit < 64; bit++) {
		if (!efer_bit(bit))
			continue;
		same(EFER, efer ^ 1ull << bit, 0);
		if (bit)
			same(EFER, efer ^ 1ull << bit, 1);
	}
	if (efer_bit(63)) {
		same(EFER, 0, 0);
		same(EFER, ~0ull, 0);
	}
	msr_end();
}
