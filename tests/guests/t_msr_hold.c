/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * msr-hold: a guest that does with MSRs what the harness says on the serial line, for what needs somebody outside the guest: policies,
 * the host's rules, resets, companions that die.  It says what it sees and decides nothing.
 */
#include "guest.h"

/* Words of a line: the command, then numbers, decimal or with 0x. */
struct line { char command; u32 n; u64 word[6]; };

static u64 number(const char **p)
{
	u64 v = 0;

	if ((*p)[0] == '0' && (*p)[1] == 'x') {
		for (*p += 2; ; ++*p) {
			char c = **p | 0x20;

			if (**p >= '0' && **p <= '9')
				v = v << 4 | (**p - '0');
			else if (c >= 'a' && c <= 'f')
				v = v << 4 | (c - 'a' + 10);
			else
				return v;
		}
	}
	for (; **p >= '0' && **p <= '9'; ++*p)
		v = v * 10 + (**p - '0');
	return v;
}

static struct line next_line(void)
{
	static char buffer[256];
	const char *p = buffer;
	struct line l = { 0, 0, { 0 } };
	u32 len = 0;

	for (;;) {
		int c = serial_rx();

		if (c < 0) {
			relax();
			continue;
		}
		if (c == '\n')
			break;
		if (len < sizeof(buffer) - 1)
			buffer[len++] = c;
	}
	buffer[len] = 0;
	l.command = *p ? *p++ : ' ';
	while (*p == ' ') {
		p++;
		if (l.n < ARRAY_SIZE(l.word))
			l.word[l.n++] = number(&p);
	}
	return l;
}

static void print_access(const struct line *l, bool write)
{
	u32 cpu = l->word[0], msr = l->word[1];
	u64 value = l->word[2];
	bool ok = msr_try(cpu, msr, write, &value);
	struct trap *t = trap_of(cpu);

	if (ok)
		print("MSR cpu=%u msr=0x%x value=0x%lx ok\n", cpu, msr, value);
	else
		print("MSR cpu=%u msr=0x%x value=0x%lx fault=%lu error=%lu at=%s\n", cpu, msr, write ? 0 : value, t->vector, t->error,
		      t->rip == t->start ? "instruction" : "elsewhere");
}

static void print_event(void)
{
	struct event e;
	u32 len;

	if (!next_event(&e, &len, 2000000000ull)) {
		print("EVENT none\n");
		return;
	}
	print("EVENT type=%u access=%u cpu=%u msr=0x%lx value=0x%lx action=%u times=%u\n", e.type, e.access, e.source, e.gpa, e.value,
	      e.action, e.times);
}

static void print_rules(const struct line *l)
{
	struct msr_rule *to = alloc_page(), of = { l->word[0], l->word[1], l->word[2], 0, 0, 0 };
	struct response r;
	u32 used;

	r = guard_msr_query(of, to, 64, &used);
	print("QUERY status=%u n=%lu", r.status, r.value);
	for (u32 i = 0; i < (used - 16) / 24; i++)
		print(" 0x%x-0x%x,%u,%u,0x%x,0x%lx", to[i].first, to[i].last, to[i].access, to[i].action, to[i].flags, to[i].mask);
	print("\n");
}

void t_msr_hold(void)
{
	struct response r;
	struct config c;

	guard_open();
	reply_ns = ~0ull;
	if (!start_cpus())
		fail("CPU %u does not start", n_cpus);
	c = guard_config();
	print("READY generation=%lu msr_ranges=%u cpus=%u features=0x%lx\n", c.generation, c.msr_ranges_in_force, n_cpus,
	      guard.dev.features);
	for (;;) {
		struct line l = next_line();

		switch (l.command) {
		case 'r':		/* cpu msr */
		case 'w':		/* cpu msr value */
			print_access(&l, l.command == 'w');
			break;
		case 'l':		/* first last access action mask */
		case 'p':
			r = msr_ask(l.command == 'l' ? MSR_LOCK : MSR_PROTECT, l.word[0], l.word[1], l.word[2], l.word[3], l.word[4]);
			print("RULE status=%u index=0x%x\n", r.status, r.index);
			break;
		case 's':
			r = guard_seal();
			print("SEAL status=%u\n", r.status);
			break;
		case '?':		/* first last access */
			print_rules(&l);
			break;
		case 'e':
			print_event();
			break;
		case 'c':
			c = guard_config();
			print("CONFIG generation=%lu msr_ranges=%u violations=%lu\n", c.generation, c.msr_ranges_in_force, c.violations);
			break;
		case 'i':		/* INIT and start-up IPI of CPU 1 */
			cpu_stop(1);
			print("INIT %s\n", cpu_start(1) ? "up" : "down");
			break;
		case 'd':
			guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
			print("RESET done\n");
			break;
		case 'n':		/* no rules for MSRs wanted */
			guard_start(F_VERSION_1 | (F_GUARD & ~F_MSR), true, NULL, NULL);
			print("RESET without F_MSR\n");
			break;
		case 'z':		/* suspend to RAM (q35, as qboot sets it up); what wakes up is a new start of this program */
			print("SUSPEND\n");
			outw(0x604, 0x2400);
			break;
		case 'q':
			pass_or_fail(test_name);
		default:
			print("WHAT %c\n", l.command);
		}
	}
}
