# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules for MSRs beside MSRs that QEMU itself answers for: with
`-accel kvm,rapl=on` it has five ranges of KVM's filter, and handlers.

QEMU wants an Intel host with powercap for that, and qemu-vmsr-helper, in the
place of which this has a thread that says what each MSR holds.
"""

import os
import socket
import struct
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from msr_host import A_READ, AUDIT, FAULT, MsrTest  # noqa: E402

POWERCAP = "/sys/class/powercap/intel-rapl/enabled"
CORE_THREAD_COUNT = 0x35
POWER_UNIT, POWER_LIMIT, ENERGY_STATUS, POWER_INFO = 0x606, 0x610, 0x611, 0x614
LSTAR = 0xc0000082
HELD = {POWER_UNIT: 0xa0e03, POWER_LIMIT: 0x1234, POWER_INFO: 0x5678}


def missing():
    """Why QEMU does not start with rapl=on here, or None."""
    if os.environ.get("VHOST_GUARD_RAPL_QEMU"):
        return None     # one that does not look
    with open("/proc/cpuinfo", encoding="ascii") as file:
        if "GenuineIntel" not in file.read():
            return "QEMU's rapl=on needs an Intel host"
    if not os.path.exists(POWERCAP):
        return f"QEMU's rapl=on needs {POWERCAP}"
    return None


class Helper(threading.Thread):
    """Speaks qemu-vmsr-helper's protocol: MSR, CPU and thread, each 32 bits;
    the answer has 64."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(path)
        self.socket.listen()

    def run(self):
        energy = 0
        peer = self.socket.accept()[0]
        with peer:
            while len(request := peer.recv(12, socket.MSG_WAITALL)) == 12:
                energy += 1000
                msr = struct.unpack("=III", request)[0]
                peer.sendall(struct.pack("=Q", HELD.get(msr, energy)))


class Rapl(MsrTest):
    """
    :avocado: tags=kvm
    """

    def setUp(self):
        super().setUp()
        if reason := missing():
            self.cancel(reason)
        path = os.path.join(self.directory, "vmsr")
        self.helper = Helper(path)
        self.helper.start()
        self.accel_was, self.accel = (
            self.accel, f"kvm,rapl=on,rapl-helper-socket={path}")

    def bare_metal(self, test, companion, words=(), devices=(), **options):
        """The guest is to think that it is plain KVM."""
        return super().bare_metal(test, companion,
                                  [*words, f"accel={self.accel_was}"], devices,
                                  **options)

    def test_rules(self):
        """Rules are asked first; what they let through is QEMU's answer."""
        self.hold("""
            [[rule]]
            msrs = [0x610]
            access = "read"
            action = "deny"
            [[rule]]
            msrs = [0x614]
            access = "read"
            action = "log"
            [[rule]]
            msrs = ["LSTAR"]
            access = "write"
            action = "deny"
            """)
        for cpu in (0, 1):
            self.assertEqual(self.read(POWER_UNIT, cpu), HELD[POWER_UNIT])
            self.read_denied(POWER_LIMIT, cpu)
            self.assertEqual(self.read(POWER_INFO, cpu), HELD[POWER_INFO])
            self.told(POWER_INFO, A_READ, HELD[POWER_INFO], AUDIT, cpu)
            self.assertNotEqual(self.read(ENERGY_STATUS, cpu), FAULT)
            self.denied(LSTAR, cpu=cpu)
        self.nothing_told()

    def test_default_deny(self):
        """QEMU's own ranges do not let through what all else is denied."""
        self.hold("""
            default = "deny"
            [[rule]]
            msrs = ["APIC_BASE", "EFER", 0x35, 0x606]
            access = "read-write"
            action = "allow"
            """)
        self.assertEqual(self.read(POWER_UNIT), HELD[POWER_UNIT])
        self.assertNotEqual(self.read(CORE_THREAD_COUNT), FAULT)
        for msr in (POWER_LIMIT, ENERGY_STATUS, POWER_INFO, LSTAR):
            self.read_denied(msr)

    def test_room(self):
        """Eleven ranges are left, and the twelfth is one too many."""
        self.hold()
        for number in range(12):
            self.assertEqual(
                self.rule("p", 0x10000000 + number * 0x100000, 2, 4),
                0 if number < 11 else 28, number)
