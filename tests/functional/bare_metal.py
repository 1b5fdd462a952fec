# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The bare-metal guest's own tests, each in a VM of its own.

The guest decides (tests/guests) and says so by QEMU's exit status; here is
only what machine each of its tests needs.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import BareMetalTest, GuardTest  # noqa: E402
from harness.machine import PASS  # noqa: E402

RNG = ("-device", "virtio-rng-pci")
SLOW_DISK = ("-blockdev",
             "null-co,node-name=slow,read-zeroes=on,latency-ns=1000000000",
             "-device", "virtio-blk-pci,drive=slow")

# What is left of a PC in a small VMM. QEMU names the devices on the command
# line.
SMALL = "microvm,acpi=off,pic=off,pit=off,rtc=off"
MMIO = ("-global", "virtio-mmio.force-legacy=false")


class BareMetal(BareMetalTest):
    """One method for each test of the guest.

    :avocado: disable
    """

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

    def test_lock_dma(self):
        self.check("lock-dma", devices=RNG)

    def test_lock_fwcfg(self):
        self.check("lock-fwcfg")

    def test_lock_balloon(self):
        self.check("lock-balloon", devices=("-device", "virtio-balloon-pci"))

    def test_lock_busy(self):
        self.check("lock-busy", devices=SLOW_DISK)

    def test_lock_ring(self):
        self.check("lock-ring", devices=RNG)

    def test_lock_companion(self):
        self.check("lock-companion")

    def test_race(self):
        self.check("race", smp=2, deadline=120)

    # Those that need more than a host's NOWRITE skip themselves.

    def test_deny_rights(self):
        self.check("deny-rights")

    def test_deny_fetch(self):
        self.check("deny-fetch")

    def test_deny_cross(self):
        self.check("deny-cross")

    def test_deny_cross_avx(self):
        self.check("deny-cross", cpu="max" if self.accel == "tcg" else None)

    def test_deny_smc(self):
        self.check("deny-smc")

    def test_deny_rep(self):
        self.check("deny-rep")

    def test_deny_walk(self):
        self.check("deny-walk")

    def test_deny_push(self):
        self.check("deny-push")

    def test_deny_atomic(self):
        self.check("deny-atomic")

    def test_deny_atomic_smp(self):
        """With two CPUs TCG makes atomic operations of them."""
        self.check("deny-atomic", smp=2)

    def test_deny_running(self):
        self.check("deny-running", smp=2, deadline=120)

    def test_deny_toggle(self):
        self.check("deny-toggle", smp=2, deadline=120)

    def test_deny_nested(self):
        self.check("deny-nested", cpu="max" if self.accel == "tcg" else None)

    def test_protect(self):
        self.check("protect")

    def test_seal(self):
        self.check("seal")

    def test_query(self):
        self.check("query")

    def test_watch(self):
        self.check("watch", deadline=180)

    def test_watch_smp(self):
        """With two CPUs TCG makes atomic operations of them."""
        self.check("watch", smp=2, deadline=180)

    def test_kernel_lock(self):
        self.check("kernel-lock")

    def test_kernel_self(self):
        self.check("kernel-self")

    def test_kernel_protect(self):
        self.check("kernel-protect")

    def test_atomic(self):
        self.check("atomic", deadline=120)

    def test_errors(self):
        self.check("errors")

    def test_events(self):
        self.check("events")

    def test_events_lost(self):
        self.check("events-lost", deadline=120)


class Machine(GuardTest):
    """What the other tests stand on, without the guard device.

    :avocado: tags=tcg,kvm,lab
    """

    def test_exceptions_cpus_and_virtio(self):
        vm = self.bare_metal("machine", None, devices=RNG, smp=2, reboot=False)
        self.assertEqual(vm.wait(), PASS, vm.console.tail())


class Inject(BareMetal):
    """The guest gets a fault for each refused store.

    :avocado: tags=tcg,kvm,lab
    """

    policy = "inject"

    def test_many_ranges(self):
        self.check("many", "n=8192", deadline=180)

    def test_nospc(self):
        self.check("nospc", deadline=240, memory=1024)

    def test_lock_unemulated(self):
        self.check("lock-unemulated")

    def test_kernel_dry_run(self):
        self.check("kernel-dry-run")

    def test_kernel_policy(self):
        self.check("kernel-policy")

    def test_kernel_errors(self):
        self.check("kernel-errors")

    def test_kernel_meanwhile(self):
        self.check("kernel-meanwhile")

    def test_kernel_reset(self):
        self.check("kernel-reset", deadline=120)


class PageFault(BareMetal):
    """The guest gets a page fault for each denied access.

    :avocado: tags=tcg
    """

    policy = "inject"
    fault = "pf"


class NoPageFault(GuardTest):
    """KVM cannot give one, and QEMU says so.

    :avocado: tags=kvm,lab
    """

    def test_refused_at_start(self):
        vm = self.bare_metal("probe", self.companion(), fault="pf")
        self.assertEqual(vm.wait(), 1)
        self.assertIn("fault=pf) needs accelerator TCG", vm.log.text())


class Drop(BareMetal):
    """A refused store is discarded and the guest goes on.

    :avocado: tags=tcg,kvm,lab
    """

    policy = "drop"


class Mmio(BareMetalTest):
    """The guard by virtio-mmio, in a machine without PCI, fw_cfg and PIT.

    :avocado: tags=tcg,kvm
    """

    def check(self, test, *words, smp=1, devices=(), **options):
        return super().check(test, f"cpus={smp}", *words, smp=smp,
                             devices=[*MMIO, *devices], machine=SMALL,
                             device="vhost-user-guard", **options)

    def test_machine(self):
        self.check("machine", smp=2, devices=("-device", "virtio-rng-device"))

    def test_probe(self):
        self.check("probe")

    def test_lock_cpl0(self):
        self.check("lock-cpl0")

    def test_kernel_protect(self):
        """The third queue, too."""
        self.check("kernel-protect")

    def test_noise(self):
        """Registers written as no driver does it."""
        self.check("mmio-noise")

    def test_race(self):
        self.check("race", "rounds=5", smp=2)
