# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Malformed traffic on the control channel, from either side, and page tables
that are none.

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
from harness.case import BareMetalTest, GuardTest  # noqa: E402
from harness.control import (  # noqa: E402
    ALL_BITS, C_HELLO, DEFAULT_ALLOW, DEFAULT_DENY, DENY_MSR, EMULATE,
    GET_STATE, HELLO, HELLO_SIZE, IMMUTABLE, IMMUTABLE_MSR, LOG, MAGIC,
    MSR_POLICY, MSR_RULES, NO_INDEX, NOEXEC, NOEXEC_KERNEL, NOWRITE, PIN,
    PROTECT, READ, RESET, RESULT, SEAL, STATE, VIOLATION, WITH_POLICY, WRITE,
    Control, companion_hello, message, msr_policy, msr_state, pack_rules,
    qemu_hello, seal, state)
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
    "version 2": message(HELLO, struct.pack(
        "<IIIIQQIIIIQ", MAGIC, 2, 2, 12, 15, 1, 8192, 4096, NO_INDEX, 1, 15)),
    "HELLO twice": qemu_hello() + qemu_hello(),
    "short HELLO": message(HELLO, bytes(8)),
    "flags": qemu_hello() + message(RESET, struct.pack("<Q", 2), flags=1),
    "unknown type": qemu_hello() + message(0x77),
    "companion's type": qemu_hello() + message(PROTECT, bytes(40)),
    "length over the limit": qemu_hello() + message(STATE, length=1 << 31),
    "length of the wrong type": qemu_hello() + message(RESULT, bytes(7)),
    "STATE count lies": qemu_hello() + msr_state() + state(count=100000),
    "STATE upside down": qemu_hello() + msr_state() + state(
        [(9, 3, NOWRITE)]),
    "STATE overlaps": qemu_hello() + msr_state() + state(
        [(1, 9, NOWRITE), (5, 7, NOWRITE)]),
    "STATE beyond everything":
        qemu_hello() + msr_state() + state(
            [(1 << 60, (1 << 64) - 1, NOWRITE)]),
    "RESULT for nothing":
        qemu_hello() + msr_state() + state() + message(
            RESULT, bytes(24), seq=99),
    "VIOLATION of nonsense": qemu_hello() + msr_state() + state() + message(
        VIOLATION, b"\xff" * 64),
    "STATE without MSR_STATE": qemu_hello() + state(),
    "MSR_STATE counts lie": qemu_hello() + msr_state(count=3),
    "MSR_STATE counts overflow": qemu_hello() + msr_state(
        count=0xffffffff, host_count=1),
    "MSR_STATE upside down": qemu_hello() + msr_state(
        [(9, 3, READ, DENY_MSR)]),
    "MSR_STATE of both accesses": qemu_hello() + msr_state(
        [(3, 9, READ | WRITE, DENY_MSR)]),
    "MSR_STATE, writes first": qemu_hello() + msr_state(
        [(3, 9, WRITE, DENY_MSR), (3, 9, READ, DENY_MSR)]),
    "MSR_STATE overlaps": qemu_hello() + msr_state(
        [(3, 9, READ, DENY_MSR), (9, 10, READ, LOG)]),
    "MSR_STATE, the guest emulates": qemu_hello() + msr_state(
        [(3, 9, READ, EMULATE, 0, 7)]),
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
    "version 2": message(C_HELLO, struct.pack("<II", MAGIC, 2)),
    "HELLO too short": message(C_HELLO, struct.pack("<II", MAGIC, 3)),
    "HELLO with unknown flags": companion_hello(flags=2),
    "HELLO with reserved bits": companion_hello(reserved=1),
    "MSR_POLICY announced, something else": companion_hello(
        flags=WITH_POLICY) + message(GET_STATE, seq=1),
    "MSR_POLICY count lies": companion_hello(flags=WITH_POLICY) + msr_policy(
        DEFAULT_ALLOW, [(1, 1, READ, DENY_MSR)], count=2),
    "MSR_POLICY with reserved bits": companion_hello(
        flags=WITH_POLICY) + msr_policy(DEFAULT_ALLOW, reserved=1),
    "MSR_POLICY of 4097": companion_hello() + msr_policy(
        DEFAULT_ALLOW, [(1, 1, READ, DENY_MSR)] * 4097),
    "MSR_POLICY too short": companion_hello() + message(MSR_POLICY, bytes(15)),
    "MSR_RULES of nothing": companion_hello() + message(
        MSR_RULES, struct.pack("<QII", 2, 0, 0), seq=1),
    "MSR_RULES count lies": companion_hello() + message(
        MSR_RULES, struct.pack("<QII", 2, 7, 0) + bytes(24), seq=1),
    "MSR_RULES of 4097": companion_hello() + message(
        MSR_RULES, struct.pack("<QII", 2, 4097, 0) + bytes(24 * 4097), seq=1),
    "MSR_RULES with reserved bits": companion_hello() + message(
        MSR_RULES, struct.pack("<QII", 2, 1, 1) + pack_rules(
            [(1, 1, READ, DENY_MSR)]), seq=1),
    "MSR_STATE to QEMU": companion_hello() + msr_state(),
}

HANGS_UP = "has closed the connection instead of sending a HELLO"
#: MSRs of which KVM takes any rule.
STAR, LSTAR = 0xc0000081, 0xc0000082
NO_POLICY_CAME = HANGS_UP.replace("a HELLO", "its policy for MSRs")


def announced(rules, default=DEFAULT_ALLOW):
    """A companion that has rules."""
    return companion_hello(flags=WITH_POLICY) + msr_policy(default, rules)


#: name -> what a companion sends to a QEMU that starts before it hangs up, and
#: what QEMU says before it ends
TO_STARTING_QEMU = {
    "nothing": (b"", HANGS_UP),
    "half a header": (message(C_HELLO)[:9], HANGS_UP),
    "half a HELLO": (companion_hello()[:20], HANGS_UP),
    "version 2": (TO_QEMU["version 2"], "speaks version 2 .* not 3"),
    "noise": (noise(3, 4096), "unknown message type"),
    "zeros": (bytes(65536), "unknown message type"),
    "length over the limit": (message(C_HELLO, length=1 << 31), "bad length"),
    "no HELLO first": (message(GET_STATE, seq=1), "not a HELLO"),
    "HELLO twice": (companion_hello(flags=WITH_POLICY) + companion_hello(),
                    "second HELLO"),
    "no policy": (companion_hello(flags=WITH_POLICY), NO_POLICY_CAME),
    "half a policy": (announced([(n, n, READ, LOG) for n in range(99)])[:-1],
                      NO_POLICY_CAME),
    "no such default": (announced([], 2), "Invalid argument"),
    "upside down": (announced([(1, 1, READ, DENY_MSR), (2, 1, READ, DENY_MSR)]),
                    r"Invalid argument.*rule 1 "),
    "overlap": (announced([(7, 7, WRITE, DENY_MSR), (1, 1, READ, DENY_MSR),
                           (0, 9, READ, DENY_MSR)]), r"Invalid argument.*rule 2 "),
    "immutable": (announced([(1, 1, READ, DENY_MSR, IMMUTABLE_MSR)]),
                  r"Invalid argument.*rule 0 "),
    "emulated writes": (announced([(1, 1, WRITE, EMULATE, 0, 1)]),
                        r"Invalid argument.*rule 0 "),
    "x2APIC": (announced([(0x7ff, 0x7ff, READ, DENY_MSR),
                          (0x7ff, 0x800, WRITE, DENY_MSR)]),
               r"not supported.*rule 1 "),
    "TSC_DEADLINE": (announced([(0x6e0, 0x6e0, WRITE, DENY_MSR)],
                               DEFAULT_DENY), r"not supported.*rule 0 "),
    "too far apart": (announced([(n << 24, n << 24, WRITE, PIN, 0, ALL_BITS)
                                 for n in range(65)]),
                      "No space left|not supported"),
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
            self.assertEqual(struct.unpack_from("<HHI", hello),
                             (HELLO, 0, HELLO_SIZE))
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

    def test_garbage_to_a_starting_qemu(self):
        """It says in one line why it does not start."""
        for name, (data, reason) in TO_STARTING_QEMU.items():
            self.log.info("case: %s", name)
            path = f"{self.directory}/ctl"
            listener = self.host.listen(path)
            vm = self.vm(["-chardev", f"socket,id=ctl,path={path}",
                          "-object", "vm-guard,id=guard0,chardev=ctl"])
            peer = listener.accept(20 * self.host.patience)
            # In pieces, so that QEMU sees each half of everything.
            for start in range(0, min(len(data), 200), 10):
                peer.send(data[start:start + 10])
            peer.send(data[200:])
            # Let it say what it says whatever we are: HELLO, MSR_STATE, STATE.
            peer.stream.read(3 * 16 + HELLO_SIZE + 2 * 16,
                             20 * self.host.patience)
            peer.close()
            self.assertEqual(vm.wait(), 1, name)
            said = vm.log.text()
            self.assertRegex(said, reason, name)
            self.assertEqual(len(said.splitlines()), 1, f"{name}:\n{said}")
            listener.close()
            self.host.run(["rm", "-f", path])

    def test_impossible_msr_rules_to_qemu(self):
        """RESULT says which rule it is, and nothing changes."""
        vm, control = self.table()
        lock = IMMUTABLE_MSR
        self.assertEqual(control.change_msrs(
            [(LSTAR, LSTAR, WRITE, PIN, lock, 3)]), (0, NO_INDEX))
        before = control.state(), control.msr_rules
        good = (STAR, STAR, READ, DENY_MSR)
        cases = [  # rules, status, index
            ([good, (2, 1, READ, DENY_MSR)], 22, 1),
            ([good, (STAR, STAR, 0, DENY_MSR)], 22, 1),
            ([good, (STAR, STAR, 4, DENY_MSR)], 22, 1),
            ([good, (STAR, STAR, READ, 16)], 22, 1),
            ([good, (STAR, STAR, READ, DENY_MSR | LOG)], 22, 1),
            ([good, (STAR, STAR, READ, EMULATE, 0, 1)], 22, 1),
            ([good, (STAR, STAR, READ, PIN, 0, 1)], 22, 1),
            ([good, (STAR, STAR, WRITE, PIN)], 22, 1),
            ([good, (STAR, STAR, READ, LOG, 0, 1)], 22, 1),
            ([good, (STAR, STAR, READ, LOG, 1)], 22, 1),
            ([good, (STAR, STAR, READ, LOG, lock)], 22, 1),
            ([(STAR, STAR, READ, LOG, lock), good], 22, 1),
            ([(STAR, STAR, READ, 0, lock)], 22, 0),
            ([good, (0x8ff, 0x8ff, READ, 0)], 95, 1),
            ([good, (0x6e0, 0x6e0, WRITE, LOG)], 95, 1),
            # One rule after the other: the first that is bad counts.
            ([(0x800, 0x800, READ, LOG), (2, 1, READ, LOG)], 95, 0),
            ([good, (LSTAR, LSTAR, READ | WRITE, 0), (LSTAR, LSTAR, WRITE, PIN, 0, 1)], 1, 2),
            ([(LSTAR, LSTAR, WRITE, PIN, 0, 1), (LSTAR, LSTAR, WRITE, PIN, 0, 3), good,
              (STAR, LSTAR, WRITE, LOG)], 1, 3),
            # One pin too many, or too far apart for KVM's filter.
            ([(0x100, 0x13f, WRITE, PIN, 0, 1)] if self.accel == "tcg" else
             [(n << 24, n << 24, READ, DENY_MSR) for n in range(1, 17)],
             28, NO_INDEX),
        ]
        for rules, status, index in cases:
            self.assertEqual(control.change_msrs(rules), (status, index),
                             f"{rules}")
            self.assertEqual(control.msr_ranges, 1)
        for generation in (control.generation + 1, control.generation - 1):
            # Before all else.
            self.assertEqual(control.change_msrs(
                [(2, 1, READ, LOG)], generation), (116, NO_INDEX))
        self.assertEqual((control.state(), control.msr_rules), before,
                         "a refused request changed it")
        self.assertEqual(vm.qmp.command("query-vm-guard")["msrs"], [
            {"first": LSTAR, "last": LSTAR, "access": "write", "deny": False,
             "log": False, "pin": 3, "immutable": True}])

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


class PageTables(BareMetalTest):
    """
    :avocado: tags=tcg,kvm
    """

    def test_hostile_page_tables(self):
        """The other vCPU changes some of them while they are read."""
        self.check("kernel-hostile", smp=2, deadline=120)
