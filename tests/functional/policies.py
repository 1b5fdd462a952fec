# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What becomes of the VM when a store is refused: pause and shutdown.

inject and drop are seen by the guest: bare_metal.py.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402


class Policies(GuardTest):
    """
    :avocado: tags=tcg,kvm,lab
    """

    def test_pause_then_cont(self):
        """The VM stops at each refused store and goes on with cont. The guest
        tries several kinds of store before it answers."""
        vm = self.bare_metal("hold", self.companion(), policy="pause")
        vm.expect(r"LOCKED gpa=")
        vm.connect()
        vm.type("w")
        stops = 0
        while "HELD" not in vm.console.text():
            self.assertNotIn("LOST", vm.console.text())
            if vm.qmp.has_event("STOP"):
                vm.qmp.event("STOP")
                self.assertEqual(vm.status(), "paused")
                stops += 1
                vm.qmp.command("cont")
                vm.qmp.event("RESUME")
            self.assertTrue(vm.alive(), vm.log.tail())
        self.assertGreater(stops, 0, "the VM was not paused")
        self.assertEqual(vm.status(), "running")

    def test_a_locked_page_cannot_be_covered(self):
        """A guest that maps something else over it is shut down."""
        vm = self.bare_metal("lock-covered", self.companion(), reboot=False)
        vm.expect("COVERING")
        vm.wait()
        self.assertNotIn("FAIL", vm.console.text())
        self.assertIn("guarded guest memory was taken away or covered",
                      vm.log.text())

    def test_pause_at_a_load_and_a_fetch(self):
        """The VM stops at each, and has its fault when it goes on."""
        if self.accel != "tcg":
            self.cancel("KVM denies no loads and no fetches")
        vm = self.bare_metal("hold", self.companion(), policy="pause")
        vm.expect(r"LOCKED gpa=")
        vm.connect()
        vm.type("d")
        for _ in range(2):
            vm.qmp.event("STOP")
            self.assertEqual(vm.status(), "paused")
            self.assertNotIn("DENIED", vm.console.text())
            vm.qmp.command("cont")
            vm.qmp.event("RESUME")
        vm.expect("DENIED load=0x0 fetch=0xfe7c4fa017 failures=0")
        self.assertFalse(vm.qmp.has_event("STOP"))

    def test_shutdown_at_a_load(self):
        """QEMU ends before the guest sees anything."""
        if self.accel != "tcg":
            self.cancel("KVM denies no loads")
        vm = self.bare_metal("hold", self.companion(), policy="shutdown")
        vm.expect(r"LOCKED gpa=")
        vm.connect()
        vm.type("d")
        vm.qmp.event("SHUTDOWN")
        vm.wait()
        self.assertNotIn("DENIED load=0x6", vm.console.text())

    def test_shutdown(self):
        """QEMU ends, and says why."""
        vm = self.bare_metal("hold", self.companion(), policy="shutdown")
        vm.expect(r"LOCKED gpa=")
        vm.connect()
        vm.type("w")
        vm.qmp.event("SHUTDOWN")
        vm.wait()
        self.assertNotIn("LOST", vm.console.text())
        self.assertNotIn("HELD", vm.console.text())
