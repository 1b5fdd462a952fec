# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Page tables of the bare-metal guest, read from outside in two ways.

The guest's `hold` test has identity mappings and waits (tests/guests README).
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.host import lab  # noqa: E402
from harness.machine import PASS  # noqa: E402

EVERYWHERE = ("--va", "0-0xffffffffffffffff")
#: What does not depend on where memory and registers came from.
SAME = ("paging", "addresses", "mappings", "summary", "write_exec", "errors")


class Pagetable(GuardTest):
    """
    :avocado: tags=tcg,kvm
    """

    def pagetable(self, *options, status=0):
        """What `vhost-guard pagetable --json` says of all addresses."""
        found, out, err = self.host.run(
            [self.host.put(lab.companion_path()), "pagetable", "--json",
             *EVERYWHERE, *options], check=False)
        self.assertEqual(found, status, err)
        self.assertEqual(err, "")
        return json.loads(out)

    def test_a_guest_that_runs_and_its_dump_have_the_same_tables(self):
        companion = self.companion()
        monitor = f"{self.directory}/other.qmp"
        vm = self.bare_metal("hold", companion, devices=[
            "-qmp", f"unix:{monitor},server=on,wait=off"])
        vm.expect(r"LOCKED gpa=0x\w+")
        running = ("--socket-path", companion.socket, "--qmp", monitor)
        live = self.pagetable(*running, "--pause")
        self.assertEqual(vm.status(), "running")
        self.assertEqual(self.pagetable(*running)["mappings"],
                         live["mappings"])
        # It maps all of its memory with all rights.
        self.assertNotEqual(live["write_exec"]["pages"], 0)
        self.pagetable(*running, "--fail-on-wx", status=3)

        vm.qmp.command("stop")
        dump = f"{self.directory}/dump"
        vm.qmp.command("dump-guest-memory", paging=False,
                       protocol=f"file:{dump}", deadline=120)
        # The one register that a dump does not have.
        dumped = self.pagetable("--memory", dump, "--efer",
                                live["registers"]["efer"])
        for part in SAME:
            self.assertEqual(dumped[part], live[part], part)
        for name in ("cr0", "cr3", "cr4"):
            self.assertEqual(dumped["registers"][name],
                             live["registers"][name])
        # A VM that did not run is not made to.
        self.pagetable(*running, "--pause")
        self.assertEqual(vm.status(), "paused")
        vm.qmp.command("cont")
        vm.type("q")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())
