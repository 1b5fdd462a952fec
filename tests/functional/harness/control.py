# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The control channel, spoken by a test in place of either side.

docs/control-channel.md has the format.
"""

import struct

MAGIC, VERSION = 0x44524756, 3
HELLO, STATE, RESULT, VIOLATION, RESET, MSR_STATE = 1, 2, 3, 4, 5, 6
C_HELLO, PROTECT, GET_STATE, SEAL = 0x101, 0x102, 0x103, 0x104
MSR_POLICY, MSR_RULES = 0x105, 0x106
NOWRITE, NOEXEC, NOREAD, NOEXEC_KERNEL = 1, 2, 4, 8
DENY, AUDIT_SHIFT = 0xf, 8
IMMUTABLE = 1 << 63
NO_INDEX = 0xffffffff
HELLO_FORMAT = "<IIIIQQIIIIQIIII"
HELLO_SIZE = struct.calcsize(HELLO_FORMAT)
#: HELLO's flag: MSR_POLICY is the next message.
WITH_POLICY = 1
#: Of rules for MSRs. READ | WRITE is both.
READ, WRITE = 1, 2
LOG, PIN, DENY_MSR, EMULATE = 1, 2, 4, 8
IMMUTABLE_MSR = 1 << 31
ALL_BITS = (1 << 64) - 1
DEFAULT_ALLOW, DEFAULT_DENY, NO_POLICY = 0, 1, 0xffffffff
MAX_MSR_PINS = 64


def message(kind, payload=b"", seq=0, flags=0, length=None):
    """One message; length can lie."""
    size = len(payload) if length is None else length
    return struct.pack("<HHIQ", kind, flags, size, seq) + payload


def qemu_hello(magic=MAGIC, version=VERSION):
    """What vm-guard says first."""
    return message(HELLO, struct.pack(
        HELLO_FORMAT, magic, version, 2, 12, DENY, 1, 8192, 4096,
        0xffffffff, 1, DENY, 4096, 0xffffffff, MAX_MSR_PINS, NO_POLICY))


def companion_hello(magic=MAGIC, version=VERSION, flags=0, reserved=0):
    """What the companion says first."""
    return message(C_HELLO, struct.pack("<IIII", magic, version, flags,
                                        reserved))


def pack_rules(rules):
    """Rules for MSRs: (first, last, access, action, flags, operand) each, or
    without flags and operand where these are 0."""
    return b"".join(struct.pack("<IIHHIQ", *rule, *(0, 0)[len(rule) - 4:])
                    for rule in rules)


def unpack_rules(payload, start, count):
    """The opposite."""
    return [struct.unpack_from("<IIHHIQ", payload, start + 24 * n)
            for n in range(count)]


def msr_state(rules=(), host=(), generation=1, count=None, host_count=None):
    """What rules there are for MSRs."""
    return message(MSR_STATE, struct.pack(
        "<QII", generation, len(rules) if count is None else count,
        len(host) if host_count is None else host_count)
        + pack_rules(rules) + pack_rules(host))


def msr_policy(default, rules=(), seq=1, count=None, reserved=0):
    """The host's rules."""
    return message(MSR_POLICY, struct.pack(
        "<IIQ", default, len(rules) if count is None else count, reserved)
        + pack_rules(rules), seq)


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

    `ranges` are (first frame, last frame, attributes); `policy` is the host's
    rules for MSRs, a default and a list for pack_rules()."""

    def __init__(self, connection, deadline=20, policy=None):
        self._connection = connection
        self._deadline = deadline
        self._seq = 0
        self.violations = []
        self.msr_rules, self.host_rules = [], []
        self.policy_result = None
        connection.send(companion_hello(
            flags=0 if policy is None else WITH_POLICY))
        if policy is not None:
            self._seq += 1
            connection.send(msr_policy(*policy, seq=self._seq))
        hello = struct.unpack(HELLO_FORMAT, self._expect(HELLO, 0))
        (_, _, _, _, self.deny_bits, self.generation, self.max_ranges, _, _, _,
         self.audit_bits, self.max_msr_ranges, self.msr_filter_ranges,
         self.max_msr_pins, self.msr_default) = hello
        self._take_msr_state(0)
        self._expect(STATE, 0)
        if policy is not None:
            self.policy_result = struct.unpack(
                "<IIQII", self._expect(RESULT, self._seq))
            if self.policy_result[0]:
                # At its start QEMU ends now.
                return
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

    def _take_msr_state(self, seq):
        """The rules for MSRs that come before each STATE."""
        payload = self._expect(MSR_STATE, seq)
        generation, count, host_count = struct.unpack_from("<QII", payload)
        if generation != self.generation:
            raise AssertionError(f"MSR_STATE of generation {generation}, it "
                                 f"is {self.generation}")
        if len(payload) != 16 + 24 * (count + host_count):
            raise AssertionError(f"MSR_STATE of {len(payload)} bytes, with "
                                 f"{count} and {host_count} rules")
        self.msr_rules = unpack_rules(payload, 16, count)
        self.host_rules = unpack_rules(payload, 16 + 24 * count, host_count)

    def wait_reset(self):
        """Wait until QEMU tells of a reset."""
        self._expect(RESET, 0)

    def _ask(self, kind, payload):
        self._seq += 1
        self._connection.send(message(kind, payload, self._seq))

    def _result(self, kind, payload):
        """(status, index, generation, ranges in force)"""
        self._ask(kind, payload)
        *answer, self.msr_ranges = struct.unpack(
            "<IIQII", self._expect(RESULT, self._seq))
        return tuple(answer)

    def protect(self, ranges, generation=None):
        """Ask for a change; returns what RESULT says."""
        return self._result(PROTECT, struct.pack(
            "<QII", generation or self.generation, len(ranges), 0) + b"".join(
                struct.pack("<QQQ", *r) for r in ranges))

    def change_msrs(self, rules, generation=None):
        """Ask for a change of the guest's rules for MSRs; returns (status,
        index). How many ranges there are then is in msr_ranges."""
        return self._result(MSR_RULES, struct.pack(
            "<QII", generation or self.generation, len(rules), 0)
            + pack_rules(rules))[:2]

    def set_policy(self, default, rules=()):
        """Set the host's rules for MSRs; returns (status, index)."""
        return self._result(MSR_POLICY, struct.pack(
            "<IIQ", default, len(rules), 0) + pack_rules(rules))[:2]

    def seal(self, generation=None):
        """Ask to seal; returns what RESULT says."""
        return self._result(SEAL, struct.pack(
            "<QQ", generation or self.generation, 0))

    def state(self):
        """The ranges in force. The rules for MSRs are in msr_rules and
        host_rules then."""
        self._ask(GET_STATE, b"")
        self._take_msr_state(self._seq)
        payload = self._expect(STATE, self._seq)
        generation, count, _ = struct.unpack_from("<QII", payload)
        if generation != self.generation:
            raise AssertionError(f"STATE of generation {generation}, it is "
                                 f"{self.generation}")
        return [struct.unpack_from("<QQQ", payload, 16 + 24 * i)
                for i in range(count)]
