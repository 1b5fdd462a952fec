# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Emulated devices that read what the guest has made NOREAD.

The guest decides (tests/guests/t_read.c). KVM cannot deny loads, so there is
only TCG.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.machine import PASS, SKIP  # noqa: E402


class DmaReads(GuardTest):
    """
    :avocado: tags=tcg
    """

    def check(self, test, *devices):
        """Run it; the guest's verdict is the test's."""
        companion = self.companion()
        vm = self.bare_metal(test, companion, devices=devices, reboot=False)
        status = vm.wait(120)
        self.log.info("guest said:\n%s", vm.console.text())
        if status == SKIP:
            self.cancel(vm.console.tail(1))
        self.assertEqual(status, PASS,
                         f"{vm.console.tail()}\n{vm.log.tail()}")
        self.assertTrue(companion.alive(), "the companion is gone")

    def test_disk_gets_zeros(self):
        disk = f"{self.directory}/disk"
        self.host.run(["truncate", "-s", "1M", disk])
        self.check("read-disk", "-blockdev",
                   f"file,node-name=disk,filename={disk}",
                   "-device", "virtio-blk-pci,drive=disk")

    def test_busy_while_a_disk_reads(self):
        self.check("read-busy", "-blockdev",
                   "null-co,node-name=slow,read-zeroes=on,"
                   "latency-ns=1000000000",
                   "-device", "virtio-blk-pci,drive=slow")

    def test_rings(self):
        self.check("read-ring", "-device", "virtio-rng-pci")
