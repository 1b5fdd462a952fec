# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Base class of the functional tests.

Which suite a test runs in comes from the runner (tests/functional/run): `tcg`
and `kvm` are this machine, `lab` is KVM in the lab. What every process wrote
lies in the test's own directory among avocado's results.
"""

import os
import re
from pathlib import Path

from avocado import Test

from . import machine
from .control import Control
from .host import LabHost, LocalHost

SUITE = os.environ.get("VHOST_GUARD_SUITE", "tcg")


class GuardTest(Test):
    """A test with a host, and a companion and VMs on it.

    :avocado: disable
    """

    # A hang is a failure, not a hung run; waits have shorter deadlines.
    timeout = 300 if SUITE != "lab" else 900
    policy = "inject"
    fault = "gp"

    def setUp(self):
        self.accel = "tcg" if SUITE == "tcg" else "kvm"
        if SUITE == "lab":
            self.host = LabHost(os.environ["VHOST_GUARD_LAB"])
        else:
            self.host = LocalHost()
        self.host.log_directory = Path(self.outputdir)
        self.directory = self.host.temporary_directory()

    def tearDown(self):
        if hasattr(self, "host"):
            self.host.close()

    def companion(self, name="companion", directory=None, options=()):
        """A companion that listens."""
        return machine.Companion(self.host, directory or self.directory,
                                 name, options).start()

    def vm(self, extra=(), **options):
        """A QEMU."""
        options.setdefault("policy", self.policy)
        options.setdefault("fault", self.fault)
        return machine.Vm(self.host, self.accel, self.directory, extra,
                          **options)

    def table(self, policy=None, extra=(), **options):
        """A QEMU that never runs, and this test in the companion's place, with
        these rules of the host; returns both."""
        path = f"{self.directory}/ctl"
        listener = self.host.listen(path)
        vm = self.vm(
            ["-S", "-chardev", f"socket,id=ctl,path={path}",
             "-object", "vm-guard,id=guard0,chardev=ctl", *extra], **options)
        patience = self.host.patience
        return vm, Control(listener.accept(30 * patience), 60 * patience,
                           policy)

    def reset_table(self, vm, control):
        """A system reset of it."""
        before = control.generation
        vm.qmp.command("system_reset")
        control.wait_reset()
        self.assertEqual(control.generation, before + 1)

    def bare_metal(self, test, companion, words=(), devices=(), **options):
        """A QEMU with the bare-metal guest."""
        policy = options.get("policy", self.policy)
        # A guest that is paused or shut down notices nothing of its own.
        told = policy if policy == "inject" else "drop"
        return self.vm([*machine.bare_metal_arguments(
            self.host, test, told, options.get("fault", self.fault),
            self.accel, words), *devices],
            companion=companion, **options)

    def linux(self, words, companion, kernel="6.12-cloud", devices=(),
              **options):
        """A QEMU with the Linux guest."""
        cpu = "max,la57=off" if self.accel == "tcg" else "host"
        return self.vm([*machine.linux_arguments(self.host, kernel, words),
                        *devices], companion=companion,
                       **{"memory": 512, "bios": None, "cpu": cpu, **options})

    def assert_matches(self, match, **fields):
        """Named groups of a match, as numbers."""
        for name, value in fields.items():
            self.assertEqual(int(match.group(name)), value,
                             f"{name} in {match.group()!r}")


class BareMetalTest(GuardTest):
    """A test that is the bare-metal guest's own.

    :avocado: disable
    """

    companion_options = ()

    def check(self, test, *words, devices=(), deadline=60, **options):
        """Run it; the guest's verdict is the test's. Returns the Vm."""
        companion = self.companion(options=self.companion_options)
        vm = self.bare_metal(test, companion, words, devices, reboot=False,
                             **options)
        try:
            status = vm.wait(deadline)
        finally:
            self.log.info("guest said:\n%s", vm.console.text())
        if status == machine.SKIP:
            reason = re.search(r"^SKIP .*", vm.console.text(), re.M)
            self.cancel(reason.group() if reason else "the guest skipped it")
        if status != machine.PASS:
            self.fail(f"{test}: QEMU's exit status is {status}\n"
                      f"{vm.console.tail()}\n{vm.log.tail()}")
        self.assertTrue(companion.alive(), "the companion is gone")
        self.assertNotIn("panicked", companion.log.text())
        return vm
