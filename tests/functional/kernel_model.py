# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""PROTECT_KERNEL, compared with the simplest way to do it: every path through
the page tables, and every page by itself.

What must come of each request is worked out here, from docs/device.md and
docs/paging.md alone, and loaded into the memory of the bare-metal guest: its
test `kernel-model` writes the page tables, asks, and compares answers, what
QUERY tells, and which stores land. Tables, entries, policies and processors
are random, and so are the mistakes in them.

The seed is in the log; VHOST_GUARD_SEED=n repeats a run.
"""

import os
import random
import re
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import SUITE, GuardTest  # noqa: E402
from harness.control import (  # noqa: E402
    AUDIT_SHIFT, IMMUTABLE, NOEXEC_KERNEL, NO_INDEX, NOWRITE)
from harness.machine import PASS  # noqa: E402
from model import grows, join, names  # noqa: E402

EPERM, EACCES, EFAULT, EINVAL, EOPNOTSUPP = 1, 13, 14, 22, 95
#: Flags and policies of a request, and the processor it speaks of.
LOCK, DRY_RUN = 1, 2
LEAVE, REPORT, REFUSE, DENY_UNMAPPED = 0, 1, 2, 3
NXE, WP, SMEP, SHADOW_STACKS, GIB_PAGES = 1, 2, 4, 8, 16
#: Of entries in page tables.
PRESENT, WRITABLE, USER, DIRTY, LARGE, XD = 1, 2, 4, 1 << 6, 1 << 7, 1 << 63
ADDRESS = (1 << 52) - 4096
TABLES, PAGES = 16, 32
#: Where the guest's memory has nothing else, and where it looks for cases.
TABLES_AT, PAGES_AT, CASES_AT = 0x6000000, 0x7000000, 0x8000000
MEMORY = 256 << 20
MAGIC = 0x6c656e72656b6776
#: Where there is no memory: beyond it, the local APIC.
NOWHERE = 1 << 33, 0xfee00000
#: Of what is below, nobody knows what it holds.
LOW_MEMORY = 1 << 20
SLOTS = (0, 1, 2, 255, 256, 510, 511)

#: Counts of an answer, in the order of the specification.
COUNTS = ("pages", "unmapped", "not_written", "not_executed", "write_exec",
          "given", "elsewhere", "ranges", "mappings", "reserved", "outside")


class Request:
    """What is asked: tables as {(table, slot): entry}, entries as [first,
    last, attributes], and the numbers of the header."""

    def __init__(self, **fields):
        self.tables, self.entries = {}, []
        self.__dict__.update(fields)

    def words(self):
        """As the guest wants it: tables, header, entries."""
        return len(self.tables), len(self.entries), (
            self.flags, self.root(), self.start, self.end, self.levels,
            self.bits, self.unmapped, self.write_exec, self.control,
            *(word for (table, slot), value in self.tables.items()
              for word in (table, slot, value)),
            *(word for entry in self.entries for word in entry))

    def root(self):
        """The address of the top table."""
        return self.top if self.top > TABLES else TABLES_AT + 4096 * self.top

    def __str__(self):
        return (f"flags {self.flags}, top {self.top:#x}, {self.start:#x}-"
                f"{self.end:#x}, levels {self.levels}, bits {self.bits}, "
                f"unmapped {self.unmapped}, write_exec {self.write_exec}, "
                f"control {self.control}, entries " + ", ".join(
                    f"{a:#x}-{b:#x} {c:#x}" for a, b, c in self.entries)
                + ", tables " + ", ".join(
                    f"{table}[{slot}]={value:#x}" for (table, slot), value
                    in sorted(self.tables.items())))


class Walk:
    """Every path from the root."""

    def __init__(self, request):
        self.request = request
        self.mapped = []        # (first frame, last frame, writes, executes)
        self.reserved = self.outside = 0
        self.tables = {request.top}
        self._table(request.top, request.levels, 0, True, True, False)

    def _is_reserved(self, entry, level):
        request = self.request
        if entry & XD and not request.control & NXE:
            return True
        if entry & ADDRESS & ~((1 << request.bits) - 1):
            return True
        if not entry & LARGE or level == 1:
            return False
        if level >= 4 or level == 3 and not request.control & GIB_PAGES:
            return True
        return bool(entry & ((1 << (12 + 9 * (level - 1))) - (1 << 13)))

    def _table(self, table, level, base, writable, user, no_exec):
        request = self.request
        size = 1 << (12 + 9 * (level - 1))
        entries = {slot: value for (at, slot), value in request.tables.items()
                   if at == table}
        for slot, entry in entries.items():
            first = base + slot * size
            if level == request.levels and slot >= 256:
                first += (1 << 64) - 512 * size
            last = first + size - 1
            if last < request.start or first > request.end \
                    or not entry & PRESENT:
                continue
            if self._is_reserved(entry, level):
                self.reserved += 1
                continue
            rights = (writable and bool(entry & WRITABLE),
                      user and bool(entry & USER),
                      no_exec or bool(entry & XD))
            if level > 1 and not entry & LARGE:
                # All other memory has no entry that is present.
                if LOW_MEMORY <= entry & ADDRESS < MEMORY:
                    at = ((entry & ADDRESS) - TABLES_AT) >> 12
                    self.tables.add(at)
                    self._table(at, level - 1, first, *rights)
                else:
                    self.outside += 1
                continue
            frame = (entry & ADDRESS & ~(size - 1)) >> 12
            low = max(first, request.start) - first >> 12
            high = min(last, request.end) - first >> 12
            self.mapped.append((frame + low, frame + high,
                                *self._rights(entry, writable, *rights)))

    def _rights(self, entry, writable_above, writable, user, no_exec):
        control = self.request.control
        shadow_stack = (control & SHADOW_STACKS and writable_above
                        and entry & DIRTY and not entry & WRITABLE)
        return (writable or not control & WP or bool(shadow_stack),
                not no_exec and not (control & SMEP and user))

    def of(self, page):
        """None without mapping, else (written, executed)."""
        found = [(w, x) for first, last, w, x in self.mapped
                 if first <= page <= last]
        return found and (any(w for w, _ in found), any(x for _, x in found))

    def frames(self):
        """How many frames are mapped."""
        count = end = 0
        for first, last, _, _ in sorted(self.mapped):
            first = max(first, end)
            count += max(0, last + 1 - first)
            end = max(end, last + 1)
        return count


class Model:
    """docs/device.md, page by page."""

    def __init__(self, offered):
        self.offered = offered
        self.pages = {}

    def _check(self, request):
        """Status and index of what is wrong with the request itself."""
        allowed = NOWRITE | NOEXEC_KERNEL
        allowed |= allowed << AUDIT_SHIFT
        if request.flags & ~3:
            return EINVAL, NO_INDEX
        if not request.entries:
            return EINVAL, NO_INDEX
        for index, (first, last, attributes) in enumerate(request.entries):
            if first > last or last >= 1 << 52 or attributes & ~allowed:
                return EINVAL, index
            if attributes & ~self.offered:
                return EOPNOTSUPP, index
        root = request.root()
        hole = 1 << (11 + 9 * request.levels)
        if (request.levels not in (4, 5) or not 32 <= request.bits <= 52
                or request.unmapped > 3 or request.write_exec > 2
                or request.control > 31
                or root & 4095 or root >> request.bits
                or request.start > request.end
                or request.start & 4095 or ~request.end & 4095
                or any(hole <= va < (1 << 64) - hole
                       for va in (request.start, request.end))):
            return EINVAL, NO_INDEX
        for index, (first, last, attributes) in enumerate(request.entries):
            if attributes and not LOW_MEMORY >> 12 <= first <= last \
                    < MEMORY >> 12:
                return EINVAL, index
        if request.top > TABLES:
            return EFAULT, NO_INDEX
        return 0, NO_INDEX

    def ask(self, request):
        """The answer: status, index, the counts or None where they are 0, and
        the told pages or None where they are not compared. Sets what is
        set."""
        status, index = self._check(request)
        if status:
            return status, index, None, None, 0
        walk = Walk(request)
        entry_of = {page: index for index, (first, last, attributes)
                    in enumerate(request.entries)
                    for page in range(first, min(last, first + 1000) + 1)}
        asked = {page: index for page, index in entry_of.items()
                 if request.entries[index][2]}
        given, both, unmapped, counts = {}, [], [], dict.fromkeys(COUNTS, 0)
        for page, index in sorted(asked.items()):
            rights, attributes = walk.of(page), request.entries[index][2]
            if not rights:
                unmapped.append(page)
                given[page] = (attributes if request.unmapped == DENY_UNMAPPED
                               else 0)
                continue
            for right, bit, count in (
                    (rights[0], NOWRITE, "not_written"),
                    (rights[1], NOEXEC_KERNEL, "not_executed")):
                if right:
                    attributes &= ~(bit | bit << AUDIT_SHIFT)
                else:
                    counts[count] += 1
            given[page] = attributes
            if all(rights):
                both.append(page)
        given = {page: join(held, 0) for page, held in given.items()}
        counts.update(
            pages=len(asked), unmapped=len(unmapped), write_exec=len(both),
            given=sum(map(bool, given.values())),
            elsewhere=walk.frames() - len(asked) + len(unmapped),
            ranges=len({page for page, held in given.items() if held and (
                given.get(page - 1) != held
                or asked[page - 1] != asked[page])}),
            mappings=len(walk.mapped), reserved=walk.reserved,
            outside=walk.outside)
        told = [sum(1 << (page & PAGES - 1) for page in pages)
                if policy == REPORT else 0 for pages, policy
                in ((both, request.write_exec), (unmapped, request.unmapped))]
        refused = (both if request.write_exec == REFUSE else []) + (
            unmapped if request.unmapped == REFUSE else [])
        tables = len(walk.tables)
        if walk.outside and not request.flags & DRY_RUN:
            return EFAULT, NO_INDEX, counts, None, tables
        if refused:
            return (EACCES, min(asked[page] for page in refused), counts,
                    None, tables)
        status, index = self._set(given, asked, request.flags)
        return status, index, counts, told, tables

    def _set(self, given, asked, flags):
        pages = dict(self.pages)
        if flags & LOCK:
            for page, attributes in given.items():
                if attributes:
                    pages[page] = join(pages.get(page, 0),
                                       attributes) | IMMUTABLE
        else:
            loosened = []
            for page, attributes in given.items():
                held = pages.get(page, 0)
                if held & IMMUTABLE and not grows(held, attributes):
                    loosened.append(asked[page])
                pages[page] = attributes | held & IMMUTABLE
            if loosened:
                return EPERM, min(loosened)
        if not flags & DRY_RUN:
            self.pages = {page: held for page, held in pages.items() if held}
        return 0, NO_INDEX

    def ranges(self):
        """As QUERY tells them."""
        runs = []
        for page, held in sorted(self.pages.items()):
            if runs and runs[-1][1] + 1 == page and runs[-1][2] == held:
                runs[-1][1] = page
            else:
                runs.append([page, page, held])
        return [tuple(run) for run in runs]


class Requests:
    """A source of random requests."""

    def __init__(self, seed, offered):
        self.random = random.Random(seed)
        self.offered = offered
        self.first_page = PAGES_AT

    def _chance(self, probability):
        return self.random.random() < probability

    def _flags(self, leaf):
        """Rights as they come, accessed and dirty, and the guest's own."""
        r = self.random
        return (PRESENT * (not self._chance(.04))
                | WRITABLE * self._chance(.5 if leaf else .9)
                | USER * self._chance(.4 if leaf else .8)
                | XD * self._chance(.4 if leaf else .05)
                | r.choice((0, 0, 0x20, DIRTY, 0x60, 0x118, 0xe00))
                | r.choice((0, 0, 0, 1 << 52, 1 << 62)))

    def _leaf(self, level):
        r = self.random
        page = self.first_page + 4096 * r.randrange(PAGES)
        if self._chance(.07):
            page = r.choice((*NOWHERE, MEMORY, 1 << 38,
                             TABLES_AT))
        if level == 1:
            return page | self._flags(True)
        size = 1 << (12 + 9 * (level - 1))
        low = r.choice((0, 0, 0, 1 << 12, 1 << 13, size >> 1))
        return page & ~(size - 1) | low | LARGE | self._flags(True)

    def _entry(self, level, below):
        r = self.random
        if self._chance(.015):
            return r.getrandbits(64)
        if level == 1 or level < 4 and self._chance(.08):
            entry = self._leaf(level)
        elif self._chance(.015):
            entry = r.choice(NOWHERE) | self._flags(False)
        else:
            # Of any level, so of itself too.
            table = r.randrange(TABLES) if self._chance(.06) \
                else r.choice(below)
            entry = TABLES_AT + 4096 * table | self._flags(False)
        if self._chance(.01):
            entry |= 1 << r.choice((7, 12, 36, 40, 45, 51, 63))
        return entry

    def _tables(self, levels):
        """A table or two of each level, four of the last."""
        r = self.random
        numbers = r.sample(range(TABLES), TABLES)
        by_level = {levels: [numbers.pop()]}
        for level in range(levels - 1, 0, -1):
            by_level[level] = [numbers.pop() for _ in range(
                r.randrange(1, 5 if level == 1 else 3))]
        tables = {}
        for level, these in by_level.items():
            for table in these:
                slots = r.sample(SLOTS, r.choice((1, 2, 2, 3)))
                if level == 1:
                    slots += r.sample(range(512), r.randrange(2, 16))
                for slot in slots:
                    tables[table, slot] = self._entry(
                        level, by_level.get(level - 1))
        return by_level[levels][0], tables

    def _address(self, levels):
        va = 0
        for level in range(levels):
            va |= self.random.choice(SLOTS) << (12 + 9 * level)
        return va - (va >> (11 + 9 * levels) << (12 + 9 * levels)) \
            & (1 << 64) - 1

    def _range(self, levels):
        top = (1 << 64) - 1
        middle = 1 << (11 + 9 * levels)
        if self._chance(.3):
            ends = sorted(self._address(levels) for _ in range(2))
            return ends[0], ends[1] | 4095
        return self.random.choice(((0, top), (0, middle - 1),
                                   (top + 1 - middle, top)))

    def _entries(self):
        r = self.random
        bits = [bit << shift for bit in (NOWRITE, NOEXEC_KERNEL)
                for shift in (0, AUDIT_SHIFT)
                if bit << shift & self.offered]
        entries = []
        page = self.first_page >> 12
        for _ in range(r.choice((1, 1, 2, 3, 6))):
            first = r.randrange(PAGES)
            last = min(PAGES - 1, first + r.choice((0, 1, 3, 10, 31)))
            attributes = 0
            if not self._chance(.12):
                attributes = r.choice(bits)
                for bit in bits:
                    attributes |= bit if self._chance(
                        .6 if bit < 1 << AUDIT_SHIFT else .15) else 0
            entries.append([page + first, page + last, attributes])
        return entries

    def _spoil(self, request):
        """One or two mistakes."""
        r = self.random
        for _ in range(r.choice((1, 1, 2))):
            at = r.randrange(len(request.entries))
            spoiled = r.choice((
                ("flags", r.choice((4, 0x8001))),
                ("levels", r.choice((0, 3, 6, 255))),
                ("bits", r.choice((31, 53, 0))), ("unmapped", 4),
                ("write_exec", 3), ("control", 32 | request.control),
                ("top", r.choice(NOWHERE)),
                ("top", TABLES_AT | 1), ("top", 1 << 51),
                ("start", request.start | 8), ("end", request.end & ~1),
                ("start", 1 << (56 if request.levels == 5 else 47)),
                ("end", 0xff7f << 48 | 4095),
                (0, request.entries[at][1] + 1), (1, 1 << 52),
                (1, MEMORY >> 12), (0, 1 << 40),
                (2, request.entries[at][2] | 1 << r.choice(
                    (1, 2, 4, 9, 10, 12, 40, 63))),
                (2, NOEXEC_KERNEL << AUDIT_SHIFT)))
            if isinstance(spoiled[0], str):
                setattr(request, *spoiled)
            else:
                request.entries[at][spoiled[0]] = spoiled[1]

    def next(self):
        """A request, and now and then one that is wrong."""
        r = self.random
        levels = r.choice((4, 4, 5))
        top, tables = self._tables(levels)
        start, end = self._range(levels)
        request = Request(
            tables=tables, top=top, levels=levels, start=start, end=end,
            entries=self._entries(), bits=r.choice((36, 40, 46, 52)),
            flags=r.choice((0, 0, 0, 0, 0, DRY_RUN, DRY_RUN | LOCK))
            if not self._chance(.03) else LOCK,
            unmapped=r.choice((LEAVE, LEAVE, REPORT, REPORT, REFUSE,
                               DENY_UNMAPPED, DENY_UNMAPPED)),
            write_exec=r.choice((LEAVE, REPORT, REPORT, REPORT, REFUSE)),
            control=r.choice((NXE | WP, NXE | WP | GIB_PAGES,
                              NXE | WP | SMEP | GIB_PAGES,
                              r.randrange(32))))
        if self._chance(.07):
            self._spoil(request)
        return request


def case(model, request, first, try_stores):
    """A case as the guest wants it, and its status."""
    slots, entries, asked = request.words()
    status, index, counts, told, tables = model.ask(request)
    ranges = model.ranges()
    words = [first, slots, entries, len(ranges), try_stores, *asked,
             status, index, counts is not None]
    words += [counts[name] for name in COUNTS] if counts else [0] * len(COUNTS)
    # A table may be read at each level, and for each of 8 sets of rights.
    words += [tables, told is not None, tables * request.levels * 8,
              *(told or (0, 0)), *(word for run in ranges for word in run),
              sum(1 << n for n in range(PAGES)
                  if not model.pages.get(first + n, 0) & NOWRITE)]
    return struct.pack(f"<{len(words)}Q", *words), status


class Kernel(GuardTest):
    """
    :avocado: tags=tcg,kvm,lab
    """

    #: How many requests, and how many about the same pages: some are locked
    #: for good by then.
    cases = {"tcg": 6000, "kvm": 1000, "lab": 300}[SUITE]
    batch = 100

    def make_cases(self, seed, offered):
        """Into a file; returns it, the requests, what holds at the end and how
        often each status comes."""
        source, model = Requests(seed, offered), Model(offered)
        requests, table, count, blob = [], [], {}, bytearray(struct.pack(
            "<3Q", MAGIC, self.cases, TABLES_AT))
        for number in range(self.cases):
            if number % self.batch == 0:
                # Pages that nobody asks about are between those of batches.
                source.first_page = (PAGES_AT + number // self.batch * 2
                                     * PAGES * 4096)
                table += model.ranges()
                model.pages = {}
            request = source.next()
            words, status = case(model, request, source.first_page >> 12,
                                 number % 8 == 0)
            blob += words
            requests.append(request)
            count[status] = count.get(status, 0) + 1
        path = Path(self.outputdir) / "cases"
        path.write_bytes(blob)
        return path, requests, table + model.ranges(), count

    def test_random_tables(self):
        seed = int(os.environ.get("VHOST_GUARD_SEED", 0)) or random.randrange(
            1, 1 << 32)
        # What TCG offers, and what KVM does.
        kept = NOWRITE | NOEXEC_KERNEL if self.accel == "tcg" else NOWRITE
        self.log.info("seed %d", seed)
        started = time.monotonic()
        path, requests, table, count = self.make_cases(
            seed, kept | kept << AUDIT_SHIFT)
        self.log.info("%d requests made in %.1f s: %s", len(requests),
                      time.monotonic() - started, count)
        if self.cases >= 1000:
            for what in (0, EPERM, EACCES, EFAULT, EINVAL):
                self.assertGreater(count.get(what, 0), 0, f"{what}: {count}")
        guard = self.companion()
        vm = self.bare_metal("kernel-model", guard, devices=(
            "-device", f"loader,file={self.host.put(path)},addr={CASES_AT}"))
        match = vm.expect(r"CASES done=(\d+) bad=(\d+) generation=(\d+)", 120)
        self.log.info("asked in %.1f s", time.monotonic() - started)
        bad = sorted({int(n) for n in re.findall(r"case (\d+):",
                                                 vm.console.text())})
        self.assertEqual((int(match[1]), bad), (len(requests), []), "\n".join(
            f"seed {seed}, {n}: {requests[n]}" for n in bad)
            + "\n" + vm.console.tail())
        path.unlink()
        self.compare_table(vm, guard, table, int(match[3]))
        vm.type("q")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())

    def compare_table(self, vm, guard, ranges, generation):
        """What holds at the end, as QEMU and the companion say."""
        info = vm.qmp.command("query-vm-guard")
        self.assertEqual(info["ranges"], [
            {"gfn-start": first, "gfn-end": last, "deny": names(held),
             "audit": names(held >> AUDIT_SHIFT),
             "immutable": bool(held & IMMUTABLE)}
            for first, last, held in ranges])
        status = guard.show()
        self.assertEqual((status["generation"], len(status["ranges"])),
                         (generation, len(ranges)))
