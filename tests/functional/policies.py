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
        """The VM stops at each refused store and goes on with cont."""
        vm = self.bare_metal("hold", self.companion(), policy="pause")
        vm.expect(r"LOCKED gpa=")
        vm.qmp  # connected before anything happens  pylint: disable=W0104
        vm.type("w")
        for _ in range(100):
            vm.qmp.event("STOP")
            self.assertEqual(vm.status(), "paused")
            mark = vm.console.mark()
            vm.qmp.command("cont")
            vm.qmp.event("RESUME")
            if self.answered_or_stopped(vm, mark):
                break
        self.assertNotIn("LOST", vm.console.text())

    def answered_or_stopped(self, vm, mark):
        """The guest tries more than one kind of store: the next stops the VM
        again, the last is followed by the guest's answer."""
        def answered():
            return "HELD" in vm.console.text(mark)

        while not answered():
            if vm.status() == "paused":
                return answered()
        return True

    def test_shutdown(self):
        """QEMU ends, and says why."""
        vm = self.bare_metal("hold", self.companion(), policy="shutdown")
        vm.expect(r"LOCKED gpa=")
        vm.qmp  # pylint: disable=W0104
        vm.type("w")
        vm.qmp.event("SHUTDOWN")
        vm.wait()
        self.assertNotIn("LOST", vm.console.text())
        self.assertNotIn("HELD", vm.console.text())
