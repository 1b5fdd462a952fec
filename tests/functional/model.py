# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU's table of what is in force, compared with the simplest one there is:
a dictionary of pages.

A test sits on the control channel in the companion's place and sends requests
at random: LOCK, PROTECT and SEAL, good ones and bad ones, with system resets in
between. Each answer, and every now and then the whole table as STATE and as
query-vm-guard tell it, must be the model's. No guest runs.

The seed is in the log; VHOST_GUARD_SEED=n repeats a run.
"""

import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.control import (  # noqa: E402
    AUDIT_SHIFT, DENY, IMMUTABLE, NO_INDEX, NOWRITE)

EPERM, EINVAL, ENOSPC, EOPNOTSUPP, ESTALE = 1, 22, 28, 95, 116
MEMORY = 144
#: What the random requests are about: pages in the middle of RAM, pages on
#: both sides of its end, and pages on both sides of the firmware's end.
PLACES = ((0x1000, 300), ((MEMORY << 8) - 30, 40), (0xf0, 30))
NAMES = ("nowrite", "noexec", "noread", "noexec-kernel")


def join(one, other):
    """What is denied is not watched."""
    both = one | other
    return both & ~((both & DENY) << AUDIT_SHIFT)


def grows(before, after):
    """Does no right move back from denied to watched to free?"""
    return all((before >> n & 1) <= (after >> n & 1)
               and (before >> n + AUDIT_SHIFT & 1)
               <= (after >> n & 1 | after >> n + AUDIT_SHIFT & 1)
               for n in range(4))


class Model:
    """docs/device.md and docs/control-channel.md, page by page."""

    def __init__(self, deny_bits, audit_bits, max_ranges):
        self.pages = {}
        self.rights = deny_bits | audit_bits << AUDIT_SHIFT
        self.max_ranges = max_ranges

    @staticmethod
    def is_ram(page):
        """Above the firmware."""
        return 0x100 <= page < MEMORY << 8

    def _check(self, ranges):
        for index, (first, last, attributes) in enumerate(ranges):
            rights = attributes & ~IMMUTABLE
            if (first > last or last >= 1 << 40
                    or rights & ~(DENY | DENY << AUDIT_SHIFT)
                    or attributes == IMMUTABLE
                    or (attributes ^ ranges[0][2]) & IMMUTABLE):
                return EINVAL, index
            if rights & ~self.rights:
                return EOPNOTSUPP, index
        return 0, NO_INDEX

    def protect(self, ranges):
        """Returns status and index."""
        status, index = self._check(ranges)
        if status:
            return status, index
        pages, loosened = dict(self.pages), []
        for index, (first, last, attributes) in enumerate(ranges):
            for page in range(first, last + 1):
                if attributes & IMMUTABLE:
                    pages[page] = join(pages.get(page, 0), attributes)
                else:
                    # The last one that has the page decides.
                    pages[page] = index
        if not ranges[0][2] & IMMUTABLE:
            for page in {page for first, last, _ in ranges
                         for page in range(first, last + 1)}:
                index, held = pages[page], self.pages.get(page, 0)
                wanted = join(ranges[index][2], 0)
                if held & IMMUTABLE and not grows(held, wanted):
                    loosened.append(index)
                pages[page] = wanted | held & IMMUTABLE
        if loosened:
            return EPERM, min(loosened)
        for index, (first, last, _) in enumerate(ranges):
            if not all(self.is_ram(p) for p in range(first, last + 1)):
                return EINVAL, index
        pages = {page: held for page, held in pages.items() if held}
        if len(self.ranges(pages)) > self.max_ranges:
            return ENOSPC, NO_INDEX
        self.pages = pages
        return 0, NO_INDEX

    def seal(self):
        """All that is there becomes immutable."""
        self.pages = {p: held | IMMUTABLE for p, held in self.pages.items()}

    def reset(self):
        """Nothing is left."""
        self.pages = {}

    def ranges(self, pages=None):
        """As STATE tells them."""
        runs = []
        pages = self.pages if pages is None else pages
        for page in sorted(pages):
            if runs and runs[-1][1] + 1 == page and runs[-1][2] == pages[page]:
                runs[-1][1] = page
            else:
                runs.append([page, page, pages[page]])
        return [tuple(run) for run in runs]


def names(bits):
    """As QMP has them."""
    return [name for n, name in enumerate(NAMES) if bits >> n & 1]


class Requests:
    """A source of random requests."""

    def __init__(self, seed, rights):
        self.random = random.Random(seed)
        self.bits = [1 << n for n in range(12) if rights >> n & 1]

    def attributes(self):
        """Any of the rights that can be asked for, or none."""
        chosen = self.random.sample(
            self.bits, self.random.randrange(len(self.bits) + 1))
        return sum(chosen)

    def range(self, kind):
        """A good range, most of the time one of ordinary RAM."""
        start, size = self.random.choices(PLACES, (40, 1, 1))[0]
        first = start + self.random.randrange(size)
        last = first + self.random.choice((0, 0, 1, 3, 10, 40))
        attributes = self.attributes()
        if kind and not attributes:
            attributes = self.bits[0]
        return first, last, attributes | kind

    def spoil(self, ranges):
        """Make one of them bad."""
        at = self.random.randrange(len(ranges))
        first, last, attributes = ranges[at]
        ranges[at] = self.random.choice((
            (last + 1, first, attributes),
            (first, 1 << 40, attributes),
            ((1 << 64) - 1, (1 << 64) - 1, attributes),
            (first, last, attributes | 1 << self.random.choice(
                (*range(4, 8), *range(12, 63)))),
            (first, last, attributes ^ IMMUTABLE),
            (first, last, IMMUTABLE),
            (first, last, attributes | 1 << self.random.randrange(12))))

    def next(self):
        """Ranges of a request."""
        kind = IMMUTABLE if self.random.random() < .06 else 0
        ranges = [self.range(kind)
                  for _ in range(self.random.choice((1, 1, 2, 3, 8, 30)))]
        if self.random.random() < .08:
            self.spoil(ranges)
        return ranges


class TableTest(GuardTest):
    """A VM that never runs, and a test in the companion's place.

    :avocado: disable
    """

    def setUp(self):
        super().setUp()
        self.machine, self.control = self.table(memory=MEMORY)
        self.qmp = self.machine.qmp
        self.model = Model(self.control.deny_bits, self.control.audit_bits,
                           self.control.max_ranges)
        self.requests = 0

    def protect(self, ranges, note=""):
        """A request, of both; returns the status."""
        want = self.model.protect(ranges)
        got = self.control.protect(ranges)
        self.requests += 1
        self.assertEqual(got[:2], want, f"{note}: {ranges}")
        self.assertEqual(got[3], len(self.model.ranges()), note)
        return want[0]

    def reset(self):
        """A system reset."""
        self.reset_table(self.machine, self.control)
        self.model.reset()

    def compare(self, note=""):
        """The table, as the companion and as management is told it."""
        ranges = self.model.ranges()
        self.assertEqual(self.control.state(), ranges, note)
        info = self.qmp.command("query-vm-guard")
        self.assertEqual(info["ranges"], [
            {"gfn-start": first, "gfn-end": last, "deny": names(held),
             "audit": names(held >> AUDIT_SHIFT),
             "immutable": bool(held & IMMUTABLE)}
            for first, last, held in ranges], note)
        told = {key: info[key] for key in (
            "requests", "generation", "connected", "violations", "audited",
            "lost", "on-violation", "max-ranges", "deny-bits", "audit-bits")}
        self.assertEqual(told, {
            "requests": self.requests, "generation": self.control.generation,
            "connected": True, "violations": 0, "audited": 0, "lost": 0,
            "on-violation": "inject", "max-ranges": self.control.max_ranges,
            "deny-bits": names(self.control.deny_bits),
            "audit-bits": names(self.control.audit_bits)}, note)


class Table(TableTest):
    """
    :avocado: tags=tcg,kvm
    """

    def test_random_requests(self):
        seed = int(os.environ.get("VHOST_GUARD_SEED", 0)) or random.randrange(
            1, 1 << 32)
        operations = 10500 if self.accel == "tcg" else 4000
        source = Requests(seed, self.model.rights)
        self.log.info("seed %d, %d operations", seed, operations)
        started, count = time.monotonic(), {}
        for number in range(operations):
            note = f"seed {seed}, operation {number}"
            kind = source.random.random()
            if kind < .01:
                what = "reset"
                self.reset()
            elif kind < .014:
                what = "seal"
                self.model.seal()
                self.requests += 1
                self.assertEqual(self.control.seal(), (
                    0, NO_INDEX, self.control.generation,
                    len(self.model.ranges())), note)
            elif kind < .018:
                what = "stale"
                self.requests += 2
                for answer in (
                        self.control.protect(source.next(),
                                             self.control.generation + 1),
                        self.control.seal(self.control.generation - 1)):
                    self.assertEqual(answer[:2], (ESTALE, NO_INDEX), note)
            else:
                what = self.protect(source.next(), note)
            count[what] = count.get(what, 0) + 1
            if number % 20 == 0 or what in ("seal", "reset", "stale"):
                self.compare(note)
        self.compare(f"seed {seed}, at the end")
        self.log.info("%.1f s: %s", time.monotonic() - started, count)
        wanted = ["reset", "seal", "stale", 0, EPERM, EINVAL]
        if self.model.rights != DENY | DENY << AUDIT_SHIFT:
            wanted.append(EOPNOTSUPP)
        for what in wanted:
            self.assertGreater(count.get(what, 0), 3, f"{what}: {count}")


class Full(TableTest):
    """KVM is slow with so many memslots; there it is the guest's nospc.

    :avocado: tags=tcg
    """

    def test_max_ranges(self):
        """A request that is one range too many changes nothing; one that
        closes a gap still fits."""
        spare = 50
        base, have = 0x100, 0
        while have < self.model.max_ranges - spare:
            some = min(4096, self.model.max_ranges - spare - have)
            self.assertEqual(self.protect(
                [(base + 2 * n, base + 2 * n, NOWRITE) for n in range(some)]),
                0)
            base, have = base + 2 * some, have + some
        more = [(base + 2 * n, base + 2 * n, NOWRITE)
                for n in range(spare + 1)]
        self.assertEqual(self.protect(more), ENOSPC)
        asked = time.monotonic()
        self.compare("after ENOSPC")
        self.log.info("STATE and query-vm-guard of %d ranges: %.2f s",
                      len(self.model.ranges()), time.monotonic() - asked)
        self.assertEqual(self.protect(more[:-1]), 0)
        self.assertEqual(self.protect(more[-1:]), ENOSPC)
        self.assertEqual(self.protect([(base - 1, base - 1, NOWRITE)]), 0)
        self.assertEqual(self.protect(more[-1:]), 0)
        self.compare("at the end")
        self.reset()
        self.compare("after a reset")
