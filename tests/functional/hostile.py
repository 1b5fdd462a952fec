# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Malformed traffic on the control channel, from either side.

What must be so whatever arrives: the process that reads it lives and logs one
line, the VM runs on, and what is locked stays locked.
docs/control-channel.md has the format.
"""

import os
import random
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.control import (  # noqa: E402
    C_HELLO, GET_STATE, HELLO, HELLO_SIZE, IMMUTABLE, NO_INDEX, NOEXEC,
    NOEXEC_KERNEL, NOWRITE, PROTECT, RESET, RESULT, SEAL, STATE, VIOLATION,
    Control, companion_hello, message, qemu_hello, seal, state)
from harness.machine import PASS  # noqa: E402



def noise(seed, size):
    """Bytes without sense, the same each time."""
    return random.Random(seed).randbytes(size)


#: name -> what a false QEMU sends to the companion
TO_COMPANION = {
    "noise": noise(1, 4096),
    "zeros": bytes(65536),
    "half a header": message(HELLO)[:9],
    "no HELLO first": state(),
    "wrong magic": qemu_hello(magic=1),
    "wrong version": qemu_hello(version=99),
    "version 1": qemu_hello(version=1),
    "HELLO twice": qemu_hello() + qemu_hello(),
    "short HELLO": message(HELLO, bytes(8)),
    "flags": qemu_hello() + message(RESET, struct.pack("<Q", 2), flags=1),
    "unknown type": qemu_hello() + message(0x77),
    "companion's type": qemu_hello() + message(PROTECT, bytes(40)),
    "length over the limit": qemu_hello() + message(STATE, length=1 << 31),
    "length of the wrong type": qemu_hello() + message(RESULT, bytes(7)),
    "STATE count lies": qemu_hello() + state(count=100000),
    "STATE upside down": qemu_hello() + state([(9, 3, NOWRITE)]),
    "STATE overlaps": qemu_hello() + state([(1, 9, NOWRITE), (5, 7, NOWRITE)]),
    "STATE beyond everything":
        qemu_hello() + state([(1 << 60, (1 << 64) - 1, NOWRITE)]),
    "RESULT for nothing":
        qemu_hello() + state() + message(RESULT, bytes(24), seq=99),
    "VIOLATION of nonsense": qemu_hello() + state() + message(
        VIOLATION, b"\xff" * 64),
    "header, then silence": qemu_hello() + message(STATE, length=4096),
}

#: name -> what a false companion sends to QEMU
TO_QEMU = {
    "noise": noise(2, 4096),
    "zeros": bytes(65536),
    "half a header": message(C_HELLO)[:9],
    "no HELLO first": message(GET_STATE, seq=1),
    "wrong magic": companion_hello(magic=1),
    "wrong version": companion_hello(version=99),
    "version 1": companion_hello(version=1),
    "HELLO twice": companion_hello() + companion_hello(),
    "flags": companion_hello() + message(GET_STATE, seq=1, flags=4),
    "unknown type": companion_hello() + message(0x199),
    "QEMU's type": companion_hello() + message(RESET, bytes(8)),
    "length over the limit": companion_hello() + message(
        PROTECT, length=1 << 20),
    "length of the wrong type": companion_hello() + message(
        GET_STATE, bytes(5)),
    "PROTECT count lies": companion_hello() + message(
        PROTECT, struct.pack("<QII", 1, 4000, 0) + bytes(24), seq=1),
    "PROTECT of nothing": companion_hello() + message(
        PROTECT, struct.pack("<QII", 1, 0, 0), seq=1),
    "PROTECT of 4097": companion_hello() + message(
        PROTECT, struct.pack("<QII", 1, 4097, 0) + bytes(24 * 4097), seq=1),
    "PROTECT with reserved bits": companion_hello() + message(
        PROTECT, struct.pack("<QII", 2, 1, 7) + bytes(24), seq=1),
    "SEAL too short": companion_hello() + message(SEAL, bytes(8), seq=1),
    "SEAL too long": companion_hello() + message(SEAL, bytes(24), seq=1),
    "SEAL without payload": companion_hello() + message(SEAL, seq=1),
    "SEAL with reserved bits": companion_hello() + seal(2, reserved=1),
    "SEAL before HELLO": seal(2),
}


class Hostile(GuardTest):
    """
    :avocado: tags=tcg,lab
    """

    def test_garbage_to_the_companion(self):
        """It hangs up, logs it, and serves the next VM."""
        companion = self.companion()
        for name, data in TO_COMPANION.items():
            with self.subTest(name):
                self.log.info("case: %s", name)
                mark = companion.log.mark()
                peer = self.host.connect(companion.control)
                peer.send(data)
                if name not in ("half a header", "header, then silence",
                                "RESULT for nothing", "VIOLATION of nonsense",
                                "STATE beyond everything"):
                    peer.stream.wait_end(20 * self.host.patience)
                peer.close()
                self.assertTrue(companion.alive(), f"{name}: it is gone")
                said = companion.log.text(mark)
                self.assertNotIn("panicked", said)
                self.assertLess(len(said.splitlines()), 8, f"{name}:\n{said}")
        # Half a VM is not left behind: a real one is served.
        vm = self.bare_metal("lock-cpl0", companion, reboot=False)
        self.assertEqual(vm.wait(), PASS, vm.console.tail())

    def test_garbage_to_the_vhost_user_socket(self):
        """A front end that speaks nonsense does not keep QEMU out."""
        companion = self.companion()
        for seed in range(5):
            peer = self.host.connect(companion.socket)
            peer.send(noise(seed, 512))
            peer.close()
            self.assertTrue(companion.alive(), f"seed {seed}: it is gone")
        vm = self.bare_metal("lock-cpl0", companion, reboot=False)
        self.assertEqual(vm.wait(120), PASS, vm.console.tail())

    def test_garbage_to_qemu(self):
        """The real companion locks; then false ones speak to vm-guard."""
        companion = self.companion()
        vm = self.bare_metal("hold", companion)
        vm.expect(r"LOCKED gpa=")
        companion.kill()
        self.host.run(["rm", "-f", companion.control])
        listener = self.host.listen(companion.control)
        for name, data in TO_QEMU.items():
            self.log.info("case: %s", name)
            peer = listener.accept(20 * self.host.patience)
            # QEMU's own HELLO and STATE come whatever we are.
            hello = peer.stream.read(16 + HELLO_SIZE, 20 * self.host.patience)
            self.assertEqual(struct.unpack_from("<HHI", hello), (HELLO, 0, HELLO_SIZE))
            mark = vm.log.mark()
            peer.send(data)
            if name == "half a header":
                peer.close()
            else:
                peer.stream.wait_end(20 * self.host.patience)
            self.assertEqual(vm.status(), "running", name)
            self.assertEqual(vm.ask("w", r"(HELD|LOST)").group(1), "HELD",
                             name)
            said = vm.log.text(mark)
            self.assertLess(len(said.splitlines()), 4, f"{name}:\n{said}")
        listener.close()
        self.host.run(["rm", "-f", companion.control])
        companion.start()
        self.assertEqual(vm.ask("l", r"LOCK (\d+) held").group(1), "0")
        vm.type("q")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())

    def test_impossible_requests_to_qemu(self):
        """Well formed, but nothing that vm-guard can do: RESULT says so and
        nothing changes."""
        companion = self.companion()
        vm = self.bare_metal("hold", companion)
        vm.expect(r"LOCKED gpa=")
        companion.kill()
        self.host.run(["rm", "-f", companion.control])
        listener = self.host.listen(companion.control)
        peer = listener.accept(20 * self.host.patience)
        control = Control(peer, 20 * self.host.patience)
        before = control.state()
        self.assertEqual(len(before), 1)
        held = before[0][0]
        generation = control.generation
        lock, top = NOWRITE | IMMUTABLE, (1 << 64) - 1
        cases = [  # ranges, status, index
            ([(1, 0, lock)], 22, 0),
            ([(0, (1 << 40) - 1, lock)], 22, 0),
            ([(16, 16, lock), (1 << 35, 1 << 35, lock)], 22, 1),
            ([(16, 16, lock), (1 << 40, 1 << 40, lock)], 22, 1),
            ([(top, top, lock)], 22, 0),
            ([(16, 16, lock), (17, 17, NOWRITE)], 22, 1),
            ([(16, 16, NOWRITE), (17, 17, NOWRITE), (18, 18, lock)], 22, 2),
            ([(16, 16, lock), (17, 17, IMMUTABLE)], 22, 1),
            ([(16, 16, 0x10)], 22, 0),
            ([(16, 16, lock | 1 << 62)], 22, 0),
            ([(16, 16, 0x1000 | IMMUTABLE)], 22, 0),
            ([(held, held, 0)], 1, 0),
            ([(16, 16, NOWRITE), (held - 1, held + 1, NOWRITE << 8)], 1, 1),
            # EPERM is looked for before not RAM.
            ([(1 << 35, 1 << 35, 0), (held, held, 0)], 1, 1),
        ]
        for bit in (NOEXEC, NOEXEC_KERNEL):
            if not control.deny_bits & bit:
                cases.append(([(16, 16, lock), (17, 17, bit | IMMUTABLE)], 95,
                              1))
        for ranges, status, index in cases:
            self.assertEqual(control.protect(ranges),
                             (status, index, generation, 1), f"{ranges}")
        for asked in (generation + 1, generation - 1):
            self.assertEqual(
                control.protect([(16, 16, lock)], asked),
                (116, NO_INDEX, generation, 1))
            self.assertEqual(control.seal(asked),
                             (116, NO_INDEX, generation, 1))
        self.assertEqual(control.state(), before,
                         "a refused request changed it")
        self.assertEqual(vm.ask("w", r"(HELD|LOST)").group(1), "HELD")
