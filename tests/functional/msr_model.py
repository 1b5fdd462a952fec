# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU's table of MSR rules, compared with the simplest one there is: a
dictionary of MSRs for each kind of access, and docs/msr.md.

As model.py, of which this is the sibling: a test in the companion's place, no
guest, random requests, VHOST_GUARD_SEED=n repeats a run.
"""

import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.control import NO_INDEX, NOWRITE  # noqa: E402

EPERM, EEXIST, EINVAL, ENOSPC, EOPNOTSUPP, ESTALE = 1, 17, 22, 28, 95, 116
READ, WRITE = 1, 2
LOG, PIN, DENY, EMULATE = 1, 2, 4, 8
LOCKED = 1 << 31
MAX_PINS = 64
DEADLINE = 0x6e0
#: What the random requests are about: first MSR, how many; and how often. All
#: in the ranges that fit KVM's filter whatever the rules are. The last three
#: are where no rule can speak of something.
PLACES = ((0x170, 16), (0xc0000080, 8), (0xc0000100, 4), (0x40000000, 100),
          (0, 20), (0x277, 1), (0x400, 100), (0x6d8, 12), (0x7f0, 20),
          (0x8f8, 12))
WEIGHTS = (10, 10, 5, 10, 3, 3, 10, .3, .3, .3)
#: What QEMU carries out itself on KVM.
PLAIN = {0x174, 0x175, 0x176, 0x277, *range(0xc0000080, 0xc0000085),
         0xc0000100, 0xc0000101, 0xc0000102}


def both(one, other):
    """(action, operand) of what is as strict as both."""
    action, operand = one[0] | other[0], one[1] | other[1]
    return (DENY, 0) if action & DENY else (action, operand)


class Model:
    """Rules are (first, last, access, action, flags, operand)."""

    def __init__(self, max_ranges, kvm):
        self.max_ranges = max_ranges
        self.kvm = kvm
        #: For reads, for writes: MSR -> (action, operand, immutable).
        self.guest = {READ: {}, WRITE: {}}
        self.host = {READ: {}, WRITE: {}}

    def check(self, rules, is_host=False):
        """Status and index of what is wrong with single rules."""
        for index, (first, last, access, action, flags, operand) in enumerate(
                rules):
            kind = action & ~LOG
            if (first > last or access not in (1, 2, 3) or flags & ~LOCKED
                    or flags != (0 if is_host else rules[0][4] & LOCKED)
                    or kind not in (0, PIN, DENY, *((EMULATE,) if is_host
                                                    else ()))
                    or action == DENY | LOG
                    or kind == PIN and (access != WRITE or not operand)
                    or kind == EMULATE and access != READ
                    or kind not in (PIN, EMULATE) and operand
                    or flags and not action):
                return EINVAL, index
            if (first <= 0x8ff and last >= 0x800
                    or action and access & WRITE and first <= DEADLINE <= last
                    or self.kvm and not set(range(
                        first, min(last, first + 4096) + 1)) <= PLAIN
                    and (action & LOG and kind != EMULATE
                         or kind == PIN)):
                return EOPNOTSUPP, index
        return 0, NO_INDEX

    def pins(self, guest):
        """How many MSRs are pinned by both sides together."""
        host = self.host[WRITE]
        return sum(bool(both(host.get(msr, (0, 0)),
                             guest[WRITE].get(msr, (0, 0)))[0] & PIN)
                   for msr in {*host, *guest[WRITE]})

    def change(self, rules):
        """Returns status and index."""
        status, index = self.check(rules)
        if status:
            return status, index
        lock, loosened = rules[0][4] & LOCKED, []
        table = {kind: dict(held) for kind, held in self.guest.items()}
        for kind, held in table.items():
            last_of = {}
            for index, (first, last, access, action, _, operand) in enumerate(
                    rules):
                if not access & kind:
                    continue
                for msr in range(first, last + 1):
                    if lock:
                        held[msr] = (*both(held.get(msr, (0, 0))[:2],
                                           (action, operand)), True)
                    else:
                        last_of[msr] = index
            for msr, index in last_of.items():
                wanted = rules[index][3], rules[index][5]
                before = held.get(msr, (0, 0, False))
                if before[2] and both(before[:2], wanted) != wanted:
                    loosened.append(index)
                held[msr] = (*wanted, before[2])
            table[kind] = {m: h for m, h in held.items() if h[0]}
        if loosened:
            return EPERM, min(loosened)
        if len(self.rules(table)) > self.max_ranges \
                or self.pins(table) > MAX_PINS:
            return ENOSPC, NO_INDEX
        self.guest = table
        return 0, NO_INDEX

    def set_policy(self, rules):
        """Rules that are good."""
        for first, last, access, action, _, operand in rules:
            for kind in (READ, WRITE):
                if access & kind and action:
                    self.host[kind].update(
                        (msr, (action, operand, False))
                        for msr in range(first, last + 1))

    def seal(self):
        """All that is there becomes immutable."""
        self.guest = {kind: {msr: (*h[:2], True) for msr, h in held.items()}
                      for kind, held in self.guest.items()}

    def reset(self):
        """Nothing of the guest's is left."""
        self.guest = {READ: {}, WRITE: {}}

    @staticmethod
    def rules(table):
        """As MSR_STATE tells them: those of reads first."""
        told = []
        for kind in (READ, WRITE):
            runs = []
            for msr in sorted(table[kind]):
                held = table[kind][msr]
                if runs and runs[-1][1] + 1 == msr and runs[-1][2] == held:
                    runs[-1][1] = msr
                else:
                    runs.append([msr, msr, held])
            told += [(first, last, kind, action, LOCKED if locked else 0,
                      operand) for first, last, (action, operand, locked)
                     in runs]
        return told


class Requests:
    """A source of random requests."""

    def __init__(self, seed, kvm):
        self.random = random.Random(seed)
        self.kvm = kvm

    def rule(self, flags, is_host=False):
        """A good rule, most of the time."""
        start, size = self.random.choices(PLACES, WEIGHTS)[0]
        first = start + self.random.randrange(size)
        last = first + self.random.choice((0, 0, 1, 3, 10, 30))
        access = self.random.choice((READ, WRITE, READ | WRITE))
        action = self.random.choice((0, 0, LOG, DENY, DENY))
        operand = 0
        if access == WRITE and self.random.random() < .5:
            action, operand = PIN, self.random.choice(
                ((1 << 64) - 1, 1, 0xff, self.random.getrandbits(64) | 1))
        elif is_host and access == READ and self.random.random() < .3:
            action, operand = EMULATE, self.random.getrandbits(64)
        if action & (PIN | EMULATE) and self.random.random() < .3:
            action |= LOG
        # Most of what KVM refuses is left out; which MSRs it lets QEMU read,
        # and so pin, is not known here.
        if self.kvm and action & (LOG | PIN) and (
                action & PIN or self.random.random() < .95):
            first = last = self.random.choice(sorted(PLAIN))
        # There are too few pins for long ranges of them.
        if action & PIN:
            last = min(last, first + self.random.choice(
                (0, 0, 1, 3) if is_host else (0, 0, 1, 3, 15, 60)))
        if flags and not action:
            action = DENY
        return first, last, access, action, flags, operand

    def spoil(self, rules):
        """Make one of them bad."""
        at = self.random.randrange(len(rules))
        first, last, access, action, flags, operand = rules[at]
        rules[at] = self.random.choice((
            (last + 1, first, access, action, flags, operand),
            (first, last, 0, action, flags, operand),
            (first, last, access | 4, action, flags, operand),
            (first, last, access, action | 16, flags, operand),
            (first, last, access, EMULATE, flags, operand),
            (first, last, access, DENY | PIN, flags, operand),
            (first, last, READ, PIN, flags, 1),
            (first, last, WRITE, PIN, flags, 0),
            (first, last, access, DENY, flags, 1),
            (first, last, access, action, flags ^ LOCKED, operand),
            (first, last, access, action, flags | 1, operand),
            (0x7ff, 0x900, access, DENY, flags, 0),
            (DEADLINE, DEADLINE, WRITE, LOG, flags, 0)))

    def next(self):
        """Rules of a request."""
        flags = LOCKED if self.random.random() < .015 else 0
        rules = [self.rule(flags)
                 for _ in range(self.random.choice((1, 1, 2, 3, 8, 20)))]
        if self.random.random() < .08:
            self.spoil(rules)
        return rules

    def policy(self, check):
        """Good rules that do not overlap."""
        rules, taken = [], set()
        while len(rules) < 25:
            first, last, access, action, _, operand = self.rule(0, True)
            spoken = {(kind, msr) for kind in (READ, WRITE) if access & kind
                      for msr in range(first, last + 1)}
            rule = first, last, access, action, 0, operand
            if not spoken & taken and not check([rule], True)[0]:
                taken |= spoken
                rules.append(rule)
        return rules


class TableTest(GuardTest):
    """A VM that never runs, and a test in the companion's place.

    :avocado: disable
    """

    #: What the host says of MSRs that it does not list.
    default = None

    def start(self, policy=None):
        """QEMU, with these rules of the host."""
        self.machine, self.control = self.table(policy, smp=2)
        if not self.control.max_msr_ranges:
            self.cancel("this QEMU enforces no rules for MSRs")
        self.qmp = self.machine.qmp
        self.model = Model(self.control.max_msr_ranges, self.accel == "kvm")

    def change(self, rules, note=""):
        """A request, of both; returns the status."""
        want = self.model.change(rules)
        got = self.control.change_msrs(rules)
        self.assertEqual(got, want, f"{note}: {rules}")
        self.assertEqual(self.control.msr_ranges,
                         len(self.model.rules(self.model.guest)), note)
        return want[0]

    def reset(self):
        """A system reset."""
        self.reset_table(self.machine, self.control)
        self.model.reset()

    def compare(self, note=""):
        """The rules, as the companion and as management is told them."""
        self.control.state()
        guest, host = self.control.msr_rules, self.control.host_rules
        self.assertEqual(guest, self.model.rules(self.model.guest), note)
        self.assertEqual(host, self.model.rules(self.model.host), note)
        self.compare_qmp(guest, host, note)

    def compare_qmp(self, guest, host, note):
        """query-vm-guard."""
        info = self.qmp.command("query-vm-guard")
        self.assertEqual(info["msrs"], [told(rule) for rule in guest], note)
        self.assertEqual(info["host-msrs"],
                         [{**told(rule), "immutable": True} for rule in host],
                         note)
        self.assertEqual(info["max-msr-ranges"], self.control.max_msr_ranges)
        self.assertEqual(info.get("host-msr-default"), self.default, note)


def told(rule):
    """A rule as query-vm-guard has it."""
    first, last, access, action, flags, operand = rule
    info = {"first": first, "last": last, "deny": bool(action & DENY),
            "access": "read" if access == READ else "write",
            "log": bool(action & LOG), "immutable": bool(flags & LOCKED)}
    if action & PIN:
        info["pin"] = operand
    if action & EMULATE:
        info["emulate"] = operand
    return info


class Table(TableTest):
    """
    :avocado: tags=tcg,kvm
    """

    def random_requests(self, policy, operations):
        """The test itself."""
        seed = int(os.environ.get("VHOST_GUARD_SEED", 0)) or random.randrange(
            1, 1 << 32)
        source = Requests(seed, self.accel == "kvm")
        self.log.info("seed %d, %d operations", seed, operations)
        rules = source.policy(Model(0, source.kvm).check) if policy else None
        if policy:
            self.log.info("policy %s", rules)
            self.start((0, rules))
            self.model.set_policy(rules)
            self.default = "allow"
            self.assertEqual(self.control.policy_result[:2], (0, NO_INDEX))
            # Once in QEMU's life, or the same again.
            self.assertEqual(self.control.set_policy(0, rules), (0, NO_INDEX))
            self.assertEqual(self.control.set_policy(1, rules)[0], EEXIST)
            self.assertEqual(self.control.set_policy(0, rules[1:])[0],
                             EEXIST)
        else:
            self.start()
        self.compare("before")
        started, count = time.monotonic(), {}
        for number in range(operations):
            note = f"seed {seed}, operation {number}"
            kind = source.random.random()
            if number % 500 == 499:
                # So rare that chance would forget it at times.
                what = "seal"
                self.model.seal()
                self.assertEqual(self.control.seal()[:2], (0, NO_INDEX), note)
            elif kind < .01:
                what = "reset"
                self.reset()
            elif kind < .016:
                what = "stale"
                self.assertEqual(self.control.change_msrs(
                    source.next(), self.control.generation + 1),
                    (ESTALE, NO_INDEX), note)
            elif kind < .03:
                # Pages are another table.
                what = "pages"
                self.assertEqual(self.control.protect(
                    [(0x1000, 0x1000, NOWRITE)])[0], 0, note)
            else:
                what = self.change(source.next(), note)
            count[what] = count.get(what, 0) + 1
            if number % 20 == 0 or what in ("seal", "reset", "stale"):
                self.compare(note)
        self.compare(f"seed {seed}, at the end")
        self.log.info("%.1f s: %s", time.monotonic() - started, count)
        wanted = ["reset", "seal", "stale", 0, EPERM, EINVAL, EOPNOTSUPP]
        if self.accel == "tcg":
            wanted.append(ENOSPC)
        for what in wanted:
            self.assertGreater(count.get(what, 0), 3, f"{what}: {count}")

    def test_random_requests(self):
        self.random_requests(False, 10500 if self.accel == "tcg" else 4000)

    def test_random_requests_and_a_policy(self):
        self.random_requests(True, 8000 if self.accel == "tcg" else 4000)

    def test_bad_policies(self):
        """Each is refused, and the connection's next one is taken."""
        good = (0x174, 0x174, WRITE, DENY, 0, 0)
        self.start()
        for number, (bad, status) in enumerate((
                ((2, 1, WRITE, DENY, 0, 0), EINVAL),
                ((1, 2, WRITE, DENY, LOCKED, 0), EINVAL),
                ((1, 2, READ | WRITE, EMULATE, 0, 1), EINVAL),
                ((1, 2, READ, EMULATE | DENY, 0, 1), EINVAL),
                ((1, 2, WRITE, PIN, 0, 0), EINVAL),
                ((0x174, 0x175, WRITE, LOG, 0, 0), EINVAL),
                ((0x800, 0x800, READ, DENY, 0, 0), EOPNOTSUPP),
                ((DEADLINE, DEADLINE, WRITE, DENY, 0, 0), EOPNOTSUPP))):
            self.assertEqual(self.control.set_policy(0, [good, bad]),
                             (status, 1), f"{number}: {bad}")
        self.assertEqual(
            self.control.set_policy(0, [(0x200, 0x240, WRITE, PIN, 0, 1)])[0],
            EOPNOTSUPP if self.accel == "kvm" else ENOSPC)
        self.compare("after refused ones")
        self.assertEqual(self.control.set_policy(0, [good]), (0, NO_INDEX))
        self.model.set_policy([good])
        self.default = "allow"
        self.compare("at the end")
