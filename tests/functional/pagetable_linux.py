# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost-guard pagetable` on a Debian guest, held against those who read the
same tables and have nothing to do with it: QEMU's monitor, mapping by mapping,
and the guest's own kernel.
"""

import json
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.host import lab  # noqa: E402

SMALL, LARGE, HUGE = 1 << 12, 1 << 21, 1 << 30
#: What a line of the kernel's ends with.
PAGE_SIZES = {"pte": SMALL, "pmd": LARGE, "pud": HUGE}
KERNEL_HALF = 1 << 63


def by_qemu(tlb, mem):
    """(first, last, physical address, page size, rights) of each mapping.

    `info tlb` has each leaf with its own bits; `info mem` what R/W and U/S
    come to over all levels. Where that is empty the leaf's bits count, for a
    Linux sets both in all upper tables. P stands for 2 MiB: this guest has no
    1 GiB."""
    regions = [(int(first, 16), (int(after, 16) - 1) % (1 << 64), "w" in flags,
                "u" in flags) for first, after, flags in re.findall(
                    r"^(\w{16})-(\w{16}) \w+ (\S+)\s*$", mem, re.M)]
    rows, at = [], 0
    for va, pa, flags in re.findall(r"^(\w{16}): (\w{16}) (\S{9})\s*$", tlb,
                                    re.M):
        va = int(va, 16)
        write, user = flags[8] == "W", flags[7] == "U"
        if regions:
            while regions[at][1] < va:
                at += 1
            first, _, write, user = regions[at]
            if first > va:
                raise AssertionError(f"info mem does not have {va:#x}")
        size = LARGE if flags[2] == "P" else SMALL
        rows.append((va, va + size - 1, int(pa, 16), size,
                     rights(write, user, flags[0] == "X")))
    return rows


def rights(write, user, no_execute):
    """As vhost-guard prints them, with CR4.SMEP and CR0.WP set."""
    return ("r" + ("w" if write else "-")
            + ("x" if not no_execute and not user else "-")
            + ("u" if not no_execute and user else "-"))


def by_linux(text):
    """(first, last, None, page size, rights) as ptdump has them, by areas:
    {name: rows}."""
    areas, name = {}, None
    for line in text.splitlines():
        if found := re.match(r"---\[ (.*) \]---", line):
            name = found[1]
        found = re.match(r"0x(\w{16})-0x(\w{16}) +\d+[KMGTPE] (.*) (\w+)\s*$",
                         line)
        # What is not there has no bits.
        if found and found[3].strip():
            bits = found[3].split()
            areas.setdefault(name, []).append(
                (int(found[1], 16), (int(found[2], 16) - 1) % (1 << 64), None,
                 PAGE_SIZES[found[4]],
                 rights("RW" in bits, "USR" in bits, "NX" in bits)))
    return areas


def by_vhost_guard(document):
    """The same."""
    return [(int(m["va"], 16), int(m["va_last"], 16), int(m["pa"], 16),
             m["page_size"], m["rights"]) for m in document["mappings"]]


def joined(rows, physical=True):
    """Neighbours that run on, as one; without physical addresses, if these
    are not to matter."""
    out = []
    for first, last, pa, size, allowed in rows:
        if out and (out[-1][1] + 1, *out[-1][3:]) == (first, size, allowed) and (
                not physical or out[-1][2] + first - out[-1][0] == pa):
            out[-1] = (out[-1][0], last, *out[-1][2:])
        else:
            out.append((first, last, pa if physical else None, size, allowed))
    return out


class PageTable(GuardTest):
    """
    :avocado: disable
    """

    kernel = "6.12-cloud"
    options = {}
    levels = 4

    def pagetable(self, companion, *words):
        """The JSON document. A monitor serves one client, so the host has one
        of its own."""
        _, out, _ = self.host.run(
            [self.host.put(lab.companion_path()), "pagetable", "--json",
             "--socket-path", companion.socket,
             "--qmp", f"{self.directory}/monitor", *words])
        return json.loads(out)

    def assert_same(self, ours, theirs, whose):
        """Row by row, with those that differ in the message."""
        self.assertGreater(len(theirs), 50, f"{whose} has hardly any")
        if ours != theirs:
            only = [[f"{r[0]:#x}-{r[1]:#x} {r[2] or 0:#x} {r[3]:#x} {r[4]}"
                     for r in sorted(set(a) - set(b))[:20]]
                    for a, b in ((ours, theirs), (theirs, ours))]
            self.fail(f"only vhost-guard has {only[0]}, only {whose} {only[1]}")

    def test_agrees(self):
        """With QEMU on every mapping while the VM stands still, and with the
        kernel's own account on all but vmalloc's area, which changes while it
        is told."""
        companion = self.companion()
        vm = self.linux(
            ["guard.run=wait", "guard.console=3"], companion,
            kernel=self.kernel, **self.options, devices=[
                "-qmp", f"unix:{self.directory}/monitor,server=on,wait=off"])
        vm.expect(r"^guard-test: ready", 120)
        vm.ask("insmod /guard/ptdump.ko\n", r"^guard-test: ready")
        said = len(vm.console.text())
        vm.ask("cat /proc/page_tables\n", r"^guard-test: ready")
        areas = by_linux(vm.console.text()[said:])
        vm.qmp.command("stop")
        document = self.pagetable(companion, "--va", "0-0xffffffffffffffff")
        ours = by_vhost_guard(document)
        self.assertEqual(document["paging"]["levels"], self.levels)
        # With 5 levels `info mem` takes what is present for absent and the
        # other way round, and may be at that for hours.
        theirs = by_qemu(vm.qmp.human("info tlb"),
                         "" if self.levels == 5 else vm.qmp.human("info mem"))
        self.assert_same(ours, joined(theirs), "QEMU")
        self.assertEqual(sum(document["summary"]["mappings"].values()),
                         len(theirs))

        moving = areas.pop("vmalloc() Area")
        linux = joined((row for rows in areas.values() for row in rows
                        if row[0] >= KERNEL_HALF), physical=False)
        self.assertLess(20, len(areas["Low Kernel Mapping"]))
        self.assert_same(
            [row for row in joined(ours, physical=False)
             if row[0] >= KERNEL_HALF
             and not moving[0][0] <= row[0] <= moving[-1][1]],
            linux, "Linux")

        # What Debian's kernels are proud of.
        kernel = self.pagetable(companion, "--summary", "--wx")
        self.assertEqual(kernel["write_exec"],
                         {"pages": 0, "mappings": [], "frames": []})
        self.assertTrue(companion.alive())
        vm.quit()


class PageTable612(PageTable):
    """
    :avocado: tags=tcg
    """


class PageTable61FiveLevels(PageTable):
    """
    :avocado: tags=tcg
    """

    kernel = "6.1-cloud"
    options = {"cpu": "max"}
    levels = 5
