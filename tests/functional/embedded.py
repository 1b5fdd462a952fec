# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The library in a VMM of its own, without QEMU: the bare-metal guest's tests
on examples/embedded.

What enforces here is the library's KvmVm, which is held to the same tests as
QEMU. The guest decides, and says so by the VMM's exit status.
"""

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from emulation import WORDS  # noqa: E402
from harness.case import GuardTest  # noqa: E402
from harness.host import lab  # noqa: E402
from harness.machine import Embedded as Vm  # noqa: E402
from msr import CHECKS, LAB_CPU  # noqa: E402


class EmbeddedTest(GuardTest):
    """A test that boots the bare-metal guest with it.

    :avocado: disable
    """

    def boot(self, test, *words, **options):
        """The VMM."""
        options.setdefault("policy", self.policy)
        return Vm(self.host, test, words, **options)

    def finish(self, vm, deadline=60):
        """Wait for the guest's verdict, which is the test's."""
        try:
            status = vm.wait(deadline)
        finally:
            self.log.info("guest said:\n%s", vm.console.text())
        if status == vm.SKIP:
            reason = re.search(r"^SKIP .*", vm.console.text(), re.M)
            self.cancel(reason.group() if reason else "the guest skipped it")
        self.assertEqual(status, vm.PASS,
                         f"{vm.console.tail()}\n{vm.log.tail()}")
        self.assertNotIn("panicked", vm.log.text())

    def check(self, test, *words, deadline=60, **options):
        """Run it to its end."""
        self.finish(self.boot(test, *words, **options), deadline)


class Embedded(EmbeddedTest):
    """The guest gets a fault for each refused store.

    :avocado: tags=kvm,lab
    """

    def test_machine(self):
        self.check("machine", cpus=2)

    def test_demo(self):
        self.check("demo", cpus=2)

    def test_probe(self):
        self.check("probe")

    def test_lock_cpl0(self):
        self.check("lock-cpl0")

    def test_lock_cpl3(self):
        self.check("lock-cpl3")

    def test_lock_alias(self):
        self.check("lock-alias")

    def test_lock_pagetable(self):
        self.check("lock-pagetable")

    def test_lock_device_reset(self):
        self.check("lock-device-reset")

    def test_lock_own_rings(self):
        self.check("lock-companion")

    def test_mmio_noise(self):
        self.check("mmio-noise")

    def test_race(self):
        self.check("race", "rounds=20", cpus=2, deadline=120)

    def test_race_watched(self):
        self.check("race", "watched=1", "rounds=20", "seconds=4", cpus=2,
                   deadline=120)

    def test_protect(self):
        self.check("protect")

    def test_seal(self):
        self.check("seal")

    def test_query(self):
        self.check("query")

    def test_many_ranges(self):
        self.check("many", "n=2048", deadline=120)

    def test_nospc(self):
        self.check("nospc", deadline=240)

    def test_atomic(self):
        self.check("atomic", "n=1024", deadline=120)

    def test_errors(self):
        self.check("errors")

    def test_events(self):
        self.check("events")

    def test_events_lost(self):
        self.check("events-lost", deadline=120)

    def test_flood(self):
        vm = self.boot("flood", "n=2000", "seconds=1", cpus=2)
        vm.expect("FLOOD n=")
        vm.type("x")
        self.finish(vm)

    def test_kernel_lock(self):
        self.check("kernel-lock")

    def test_kernel_self(self):
        self.check("kernel-self")

    def test_kernel_dry_run(self):
        self.check("kernel-dry-run")

    def test_kernel_protect(self):
        self.check("kernel-protect")

    def test_kernel_policy(self):
        self.check("kernel-policy")

    def test_kernel_errors(self):
        self.check("kernel-errors")

    def test_kernel_hostile(self):
        self.check("kernel-hostile", "rounds=10", cpus=2, deadline=120)

    def test_kernel_meanwhile(self):
        self.check("kernel-meanwhile")

    def test_kernel_reset(self):
        self.check("kernel-reset", deadline=120)

    def test_that_locks_nothing_fails(self):
        """The guest's tests see it when nothing is enforced."""
        vm = self.boot("lock-cpl0", "fake=1")
        self.assertEqual(vm.wait(), vm.FAIL, vm.console.tail())
        self.assertIn("FAIL lock-cpl0", vm.console.text())

    def test_serial_line(self):
        """The guest obeys what is typed, also after a reset of the device."""
        vm = self.boot("hold")
        vm.expect(r"LOCKED gpa=0x\w+ generation=1 ranges=1")
        vm.ask("w", r"HELD \d+")
        vm.ask("l", "LOCK 0 held")
        vm.ask("r", "RESET done")
        vm.ask("w", r"HELD \d+")
        vm.type("q")
        self.finish(vm)

    def test_what_cannot_be_booted(self):
        """One line, and no VM."""
        process = self.host.spawn(
            [self.host.put(lab.embedded_path()), "/dev/null"], name="nothing")
        self.assertEqual(process.wait(60 * self.host.patience), Vm.ERROR)
        self.assertRegex(process.stderr.text(),
                         r"^embedded: error: cannot load /dev/null: .*\n$")


class EmbeddedDrop(EmbeddedTest):
    """A refused store is discarded and the guest goes on.

    :avocado: tags=kvm,lab
    """

    policy = "drop"

    def test_lock_cpl0(self):
        self.check("lock-cpl0")

    def test_lock_cpl3(self):
        self.check("lock-cpl3")

    def test_lock_alias(self):
        self.check("lock-alias")

    def test_race(self):
        self.check("race", "rounds=20", cpus=2, deadline=120)

    def test_events(self):
        self.check("events")

    def test_kernel_protect(self):
        self.check("kernel-protect")


class EmbeddedMsr(EmbeddedTest):
    """Rules for MSRs, where the library has them; as in msr.py.

    :avocado: tags=kvm,lab
    """

    def check(self, test, *words, **options):
        super().check(test, *words, **{"cpus": 2, "deadline": 120, **options})

    def test_actions(self):
        self.check("msr-actions")

    def test_actions_drop(self):
        self.check("msr-actions", policy="drop")

    def test_pin(self):
        self.check("msr-pin", *LAB_CPU)

    def test_kept(self):
        self.check("msr-kept")

    def test_checks(self):
        self.check("msr-checks", *CHECKS, deadline=240)

    def test_race(self):
        self.check("msr-race", "rounds=40", "seconds=8")

    def test_toggle(self):
        self.check("msr-toggle", "rounds=60", "seconds=8")

    def test_errors(self):
        self.check("msr-errors")

    def test_protect(self):
        self.check("msr-protect")

    def test_query(self):
        self.check("msr-query")

    def test_bitmap(self):
        self.check("msr-bitmap")

    def test_nospc(self):
        self.check("msr-nospc")

    def test_many(self):
        self.check("msr-many")


class EmbeddedEmulation(EmbeddedTest):
    """Watched stores, and what KVM's emulator lacks; as in emulation.py.

    :avocado: tags=kvm,lab
    """

    def test_audit(self):
        self.check("audit", cpus=2, deadline=120)

    def test_audit_drop(self):
        self.check("audit", "kinds=0", cpus=2, policy="drop")

    def test_lock_unemulated(self):
        self.check("lock-unemulated")

    def test_emul(self):
        self.check("emul", *WORDS)

    def test_emul_drop(self):
        self.check("emul", *WORDS, policy="drop")

    def test_emul_other(self):
        self.check("emul-other")


class EmbeddedPolicies(EmbeddedTest):
    """What the guest does not live to see.

    :avocado: tags=kvm,lab
    """

    def stopped_by_a_store(self, policy, status):
        """The VM stands at the first one, and it is told."""
        vm = self.boot("hold", policy=policy)
        vm.expect("LOCKED gpa=")
        vm.type("w")
        self.assertEqual(vm.wait(), status, vm.log.tail())
        self.assertRegex(vm.log.text(), "violation: refused write by vcpu0 "
                         f"at gpa=.* times=1 action={policy}\n")
        self.assertNotRegex(vm.console.text(), "HELD|LOST")

    def test_pause(self):
        self.stopped_by_a_store("pause", Vm.PAUSED)

    def test_shutdown(self):
        self.stopped_by_a_store("shutdown", Vm.SHUTDOWN)
