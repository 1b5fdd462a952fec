# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What KVM leaves to QEMU: stores that are watched, and instructions that
KVM's emulator lacks.

The guest decides (t_audit.c, t_emul.c). Where CPL 0 is interpreted, as on the
development machine, instructions that the emulator lacks run at CPL 3 only;
in the lab the CPU runs both, and has AVX and XSAVE.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import SUITE, BareMetalTest  # noqa: E402
from harness.machine import PASS  # noqa: E402

NATIVE = SUITE == "lab"
CPU = {"cpu": "host"} if NATIVE else {}
WORDS = ["avx=1", "cpl0=1"] if NATIVE else []


class Inject(BareMetalTest):
    """Where the guest gets a fault for what is denied.

    :avocado: tags=kvm,lab
    """

    policy = "inject"

    def test_audit(self):
        self.check("audit", smp=2, deadline=120)

    def test_audit_then_lock(self):
        """OK against stores of another CPU to a page that was watched."""
        self.check("race", "watched=1", "rounds=40", "seconds=4", smp=2,
                   deadline=120)

    def test_emul(self):
        self.check("emul", *WORDS, **CPU)

    def test_emul_audit(self):
        if not NATIVE:
            self.cancel("this machine's KVM does not single-step CPL 3")
        vm = self.check("emul-audit", *WORDS, smp=2, deadline=120, **CPU)
        self.assertNotIn("single step", vm.log.text())

    def test_emul_other(self):
        """What fails for another reason is an undefined instruction at CPL 3,
        as without the guard."""
        self.check("emul-other")


class Drop(BareMetalTest):
    """Where it gets none.

    :avocado: tags=kvm,lab
    """

    policy = "drop"

    def test_audit(self):
        self.check("audit", "kinds=0", smp=2)

    def test_emul(self):
        self.check("emul", *WORDS, **CPU)


class Host(BareMetalTest):
    """Policies that the guest does not see.

    :avocado: tags=kvm,lab
    """

    def test_emul_pause(self):
        """The VM stops at each store, and goes on after it."""
        vm = self.bare_metal("emul", self.companion(), ["action=3", *WORDS],
                             devices=["-S"], policy="pause", reboot=False,
                             **CPU)
        vm.qmp.command("cont")
        vm.qmp.event("RESUME")
        stops = 0
        while vm.alive() and "PASS" not in vm.console.text():
            self.assertNotIn("not ok", vm.console.text())
            if vm.qmp.has_event("STOP"):
                vm.qmp.event("STOP")
                self.assertEqual(vm.status(), "paused")
                stops += 1
                vm.qmp.command("cont")
                vm.qmp.event("RESUME")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())
        self.assertGreater(stops, 10)

    def test_emul_shutdown(self):
        vm = self.bare_metal("emul", self.companion(), ["cpl0=0"],
                             policy="shutdown", reboot=False)
        vm.expect("cmpxchg16b at CPL 3")
        vm.wait()
        self.assertNotIn("fxsave", vm.console.text())
        self.assertNotIn("not ok", vm.console.text())
