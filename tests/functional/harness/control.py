# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The control channel, spoken by a test in place of either side.

docs/control-channel.md has the format.
"""

import struct

MAGIC, VERSION = 0x44524756, 2
HELLO, STATE, RESULT, VIOLATION, RESET = 1, 2, 3, 4, 5
C_HELLO, PROTECT, GET_STATE, SEAL = 0x101, 0x102, 0x103, 0x104
NOWRITE, NOEXEC, NOREAD, NOEXEC_KERNEL = 1, 2, 4, 8
DENY, AUDIT_SHIFT = 0xf, 8
IMMUTABLE = 1 << 63
NO_INDEX = 0xffffffff
HELLO_SIZE = 56


def message(kind, payload=b"", seq=0, flags=0, length=None):
    """One message; length can lie."""
    size = len(payload) if length is None else length
    return struct.pack("<HHIQ", kind, flags, size, seq) + payload


def qemu_hello(magic=MAGIC, version=VERSION):
    """What vm-guard says first."""
    return message(HELLO, struct.pack(
        "<IIIIQQIIIIQ", magic, version, 2, 12, DENY, 1, 8192, 4096,
        0xffffffff, 1, DENY))


def companion_hello(magic=MAGIC, version=VERSION):
    """What the companion says first."""
    return message(C_HELLO, struct.pack("<II", magic, version))


def state(ranges=(), generation=1, count=None):
    """What is in force."""
    body = b"".join(struct.pack("<QQQ", *r) for r in ranges)
    return message(STATE, struct.pack(
        "<QII", generation, len(ranges) if count is None else count, 0) + body)


def seal(generation, seq=1, reserved=0):
    """A request to seal."""
    return message(SEAL, struct.pack("<QQ", generation, reserved), seq)


class Control:
    """A test in the companion's place: asks vm-guard and takes its answers.

    `ranges` are (first frame, last frame, attributes)."""

    def __init__(self, connection, deadline=20):
        self._connection = connection
        self._deadline = deadline
        self._seq = 0
        self.violations = []
        connection.send(companion_hello())
        hello = struct.unpack("<IIIIQQIIIIQ", self._expect(HELLO, 0))
        (_, _, _, _, self.deny_bits, self.generation, self.max_ranges, _, _, _,
         self.audit_bits) = hello
        self._expect(STATE, 0)
        # The machine's first reset may be on its way.
        self.state()

    def _expect(self, kind, seq):
        """The next message but VIOLATION and RESET; its payload."""
        while True:
            got, flags, size, number = struct.unpack(
                "<HHIQ", self._connection.stream.read(16, self._deadline))
            payload = self._connection.stream.read(size, self._deadline)
            if got == VIOLATION:
                self.violations.append(payload)
            elif got == RESET:
                self.generation, = struct.unpack("<Q", payload)
            if got == kind:
                break
            if got not in (VIOLATION, RESET):
                raise AssertionError(f"message {got:#x}, not {kind:#x}")
        if (flags, number) != (0, seq):
            raise AssertionError(f"flags {flags}, seq {number}, not 0, {seq}")
        return payload

    def wait_reset(self):
        """Wait until QEMU tells of a reset."""
        self._expect(RESET, 0)

    def _ask(self, kind, payload, answer):
        self._seq += 1
        self._connection.send(message(kind, payload, self._seq))
        return self._expect(answer, self._seq)

    def _result(self, kind, payload):
        """(status, index, generation, ranges in force)"""
        answer = struct.unpack("<IIQII", self._ask(kind, payload, RESULT))
        return answer[:4]

    def protect(self, ranges, generation=None):
        """Ask for a change; returns what RESULT says."""
        return self._result(PROTECT, struct.pack(
            "<QII", generation or self.generation, len(ranges), 0) + b"".join(
                struct.pack("<QQQ", *r) for r in ranges))

    def seal(self, generation=None):
        """Ask to seal; returns what RESULT says."""
        return self._result(SEAL, struct.pack(
            "<QQ", generation or self.generation, 0))

    def state(self):
        """The ranges in force."""
        payload = self._ask(GET_STATE, b"", STATE)
        generation, count, _ = struct.unpack_from("<QII", payload)
        if generation != self.generation:
            raise AssertionError(f"STATE of generation {generation}, it is "
                                 f"{self.generation}")
        return [struct.unpack_from("<QQQ", payload, 16 + 24 * i)
                for i in range(count)]
