/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What the tests of MSR rules share: requests, accesses on any CPU, and the proof of what came of each. */
#include "guest.h"

static u64 told;		/* violations that were waited for */
static u32 again_msr;		/* again=: its accesses may be reported more than once */
static struct config at_start;

void msr_begin(void)
{
	guard_open();
	if (!guard_has(F_MSR))
		skip("this host does not enforce rules for MSRs: features 0x%lx", guard.dev.offered);
	if (!start_cpus() || n_cpus < 2)
		skip("needs -smp 2");
	at_start = guard_config();
	again_msr = opt_num("again", 0);
	told = 0;
}

void msr_end(void)
{
	struct config c;
	struct event e;
	u32 len;

	while (next_event(&e, &len, 100000000ull))
		check(false, "one event more: type %u access %u MSR 0x%lx value 0x%lx vCPU %u rip 0x%lx times %u action %u", e.type,
		      e.access, e.gpa, e.value, e.source, e.rip, e.times, e.action);
	c = guard_config();
	check(c.violations - at_start.violations == told, "%lu violations counted, not %lu", c.violations - at_start.violations,
	      told);
	pass_or_fail(test_name);
}

struct msr_rule *msr_rules(void)
{
	return (struct msr_rule *)request_buffer()->ranges;
}

struct response msr_ask(u16 type, u32 first, u32 last, u16 access, u16 action, u64 mask)
{
	msr_rules()[0] = (struct msr_rule) { first, last, access, action, 0, mask };
	return guard_request(type, 1);
}

void must_msr(u16 type, u32 msr, u16 access, u16 action, u64 mask)
{
	struct response r = msr_ask(type, msr, msr, access, action, mask);

	if (r.status)
		fail("request of type %u for MSR 0x%x, access %u, action %u, mask 0x%lx: status %u, index 0x%x", type, msr, access, action,
		     mask, r.status, r.index);
	check(r.index == NO_INDEX, "index 0x%x in a response with status 0", r.index);
}

void msr_free(u32 first, u32 last)
{
	struct response r = msr_ask(MSR_PROTECT, first, last, M_BOTH, M_ALLOW, 0);

	if (r.status)
		fail("freeing MSRs 0x%x to 0x%x: status %u, index 0x%x", first, last, r.status, r.index);
}

struct job { u32 msr; bool write; u64 value; };

static void run(void *arg)
{
	struct job *j = arg;

	if (j->write)
		op_wrmsr((void *)(u64)j->msr, j->value, NULL);
	else
		j->value = op_rdmsr((void *)(u64)j->msr, 0, NULL);
}

bool msr_try(u32 cpu, u32 msr, bool write, u64 *value)
{
	struct job j = { msr, write, *value };

	cpu_run(cpu, run, &j);
	if (!write)
		*value = j.value;
	return !trap_of(cpu)->count;
}

bool msr_exists(u32 msr)
{
	u64 v = 0;

	return msr_try(0, msr, false, &v);
}

bool msr_reads(const char *what, u32 cpu, u32 msr, u64 value)
{
	struct trap *t = trap_of(cpu);
	u64 got = 0;

	if (!msr_try(cpu, msr, false, &got))
		return check(false, "%s: a read of MSR 0x%x on CPU %u: exception %lu", what, msr, cpu, t->vector);
	return check(got == value, "%s: MSR 0x%x on CPU %u is 0x%lx, not 0x%lx", what, msr, cpu, got, value);
}

bool msr_writes(const char *what, u32 cpu, u32 msr, u64 value)
{
	struct trap *t = trap_of(cpu);

	return check(msr_try(cpu, msr, true, &value), "%s: a write of 0x%lx to MSR 0x%x on CPU %u: exception %lu", what, value, msr,
		     cpu, t->vector) &&
	       msr_reads(what, cpu, msr, value);
}

bool msr_faults(const char *what, u32 cpu)
{
	struct trap *t = trap_of(cpu);

	if (!check(t->count == 1, "%s, CPU %u: %lu exceptions, not 1", what, cpu, t->count))
		return false;
	return check(t->vector == 13 && t->error == 0 && t->cpl == 0, "%s, CPU %u: exception %lu, error 0x%lx, CPL %lu, not #GP(0)", what,
		     cpu, t->vector, t->error, t->cpl) &
	       check(t->rip == t->start, "%s, CPU %u: rip 0x%lx, not at the instruction 0x%lx", what, cpu, t->rip, t->start);
}

/* The same event again: only that it was one access is in doubt then. */
static void more_of_it(struct event *e)
{
	struct event same = *e;
	u32 len;

	do {
		told += e->times;
		check(e->gpa == same.gpa && e->value == same.value && e->access == same.access && e->action == same.action,
		      "another event: MSR 0x%lx value 0x%lx", e->gpa, e->value);
	} while (next_event(e, &len, 50000000ull));
	*e = same;
	e->times = 1;
	told--;
}

bool msr_told(const char *what, u32 cpu, u32 msr, u32 access, u64 value, u32 action)
{
	/* Where the two instructions are: a write that was dropped or logged raises nothing that would tell. */
	static u64 rips[2];
	struct trap *t = trap_of(cpu);
	u64 *rip = &rips[access == A_WRITE];
	struct event e;
	u32 len;
	bool ok;

	told++;
	/* Each event that does not come takes its time. */
	if (failures > 4)
		pass_or_fail(test_name);
	if (t->count)
		*rip = t->start;
	if (!check(next_event(&e, &len, 10000000000ull), "%s: no event of MSR 0x%x on CPU %u", what, msr, cpu))
		return false;
	ok = check(len == 64 && e.type == 2 && e.access == access, "%s: %u bytes, type %u, access %u, not %u", what, len, e.type,
		   e.access, access);
	ok &= check(e.source == cpu, "%s: source %u, not vCPU %u", what, e.source, cpu);
	ok &= check(e.gpa == msr && e.gva == UNKNOWN, "%s: MSR 0x%lx, not 0x%x; gva 0x%lx", what, e.gpa, msr, e.gva);
	if (!*rip)
		*rip = e.rip;
	ok &= check(e.rip == *rip, "%s: rip 0x%lx in the event, not 0x%lx", what, e.rip, *rip);
	ok &= check(e.value == value && e.size == 8, "%s: value 0x%lx, not 0x%lx; size %u", what, e.value, value, e.size);
	ok &= check(e.action == action, "%s: action %u, not %u", what, e.action, action);
	if (again_msr && msr == again_msr)
		more_of_it(&e);
	ok &= check(e.times == 1 && e.reserved == 0, "%s: value 0x%lx of MSR 0x%x, access %u: %u times, reserved 0x%x", what, value, msr, access,
		    e.times, e.reserved);
	return ok;
}

bool msr_denied(const char *what, u32 cpu, u32 msr, u32 access, u64 value)
{
	bool write = access == A_WRITE, dropped = write && !inject, ok;
	u64 v = value;

	msr_try(cpu, msr, write, &v);
	if (dropped)
		ok = check(!trap_of(cpu)->count, "%s, CPU %u: exception %lu although the policy is drop", what, cpu, trap_of(cpu)->vector);
	else
		ok = msr_faults(what, cpu);
	if (!write)
		ok &= check(v == 0, "%s: a denied read gave 0x%lx", what, v);
	return ok & msr_told(what, cpu, msr, access, write ? value : 0, dropped ? ACT_DROP : ACT_INJECT);
}

bool msr_logged(const char *what, u32 cpu, u32 msr, u32 access, u64 value)
{
	u64 v = value;

	if (!check(msr_try(cpu, msr, access == A_WRITE, &v), "%s: access %u to MSR 0x%x on CPU %u: exception %lu", what, access, msr, cpu,
		   trap_of(cpu)->vector))
		return false;
	return check(v == value, "%s: MSR 0x%x on CPU %u is 0x%lx, not 0x%lx", what, msr, cpu, v, value) &
	       msr_told(what, cpu, msr, access, value, ACT_AUDIT);
}
