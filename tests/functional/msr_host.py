# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The host's rules for MSRs, and what becomes of both sides' when the VM or
the companion is reset, stopped or killed.

The bare-metal guest's `msr-hold` obeys lines (tests/guests/t_msr_hold.c); the
tests here ask it for accesses, and compare with docs/msr.md.
"""

import json
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.host import REPO  # noqa: E402
from harness.machine import PASS, Companion  # noqa: E402
from harness.stream import Ended  # noqa: E402

READY = (r"READY generation=(?P<generation>\d+) msr_ranges=(?P<msr_ranges>\d+) "
         r"cpus=2")
CONFIG = (r"CONFIG generation=(?P<generation>\d+) msr_ranges=(?P<msr_ranges>\d+) "
          r".*\n")
EVENT = (r"EVENT type=2 access=(\d) cpu=(\d+) msr=(0x\w+) value=(0x\w+) "
         r"action=(\d) times=(\d+)\n")
READ, WRITE, BOTH = 1, 2, 3
LOG, PIN, DENY = 1, 2, 4
ALL = (1 << 64) - 1
A_WRITE, A_READ = 1, 3
INJECT, DROP, PAUSE, SHUTDOWN, AUDIT = 1, 2, 3, 4, 5
EPERM, EOPNOTSUPP = 1, 95
(SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, STAR, LSTAR, CSTAR, SFMASK, PAT,
 BIOS_SIGN_ID, CORE_THREAD_COUNT, MISC_ENABLE, GS_BASE, KERNEL_GS_BASE) = (
     0x174, 0x175, 0x176, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084,
     0x277, 0x8b, 0x35, 0x1a0, 0xc0000101, 0xc0000102)
FAULT = "fault"


class MsrTest(GuardTest):
    """A VM whose guest does as it is told.

    :avocado: disable
    """

    def policy_file(self, text, name="policy.toml"):
        """A file on the host, and the companion's option for it."""
        path = os.path.join(self.outputdir, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return ["--msr-policy", self.host.put(path)]

    def hold(self, policy=None, options=(), **vm_options):
        """A companion with the host's rules, if any, and the guest."""
        options = [*(self.policy_file(policy) if policy else ()), *options]
        self.guard = self.companion(options=options)
        self.guest = self.bare_metal("msr-hold", self.guard,
                                     **{"smp": 2, **vm_options})
        self.ready = self.guest.expect(READY)
        return self.guest

    def generation(self):
        """The VM's, as the guest sees it."""
        return int(self.guest.ask("c\n", CONFIG).group("generation"))

    def _access(self, line):
        match = self.guest.ask(line + "\n", r"MSR .*\n")
        if "fault=13 error=0 at=instruction" in match.group():
            return FAULT
        self.assertIn(" ok", match.group())
        return int(re.search(r"value=(0x\w+)", match.group()).group(1), 16)

    def read(self, msr, cpu=0):
        """Its value, or FAULT."""
        return self._access(f"r {cpu} {msr:#x}")

    def write(self, msr, value, cpu=0):
        """None, or FAULT."""
        return (FAULT if self._access(f"w {cpu} {msr:#x} {value:#x}") == FAULT
                else None)

    def rule(self, kind, msr, access, action, mask=0, last=None):
        """An MSR_LOCK (l) or MSR_PROTECT (p) of one entry; its status."""
        return int(self.guest.ask(
            f"{kind} {msr:#x} {last or msr:#x} {access} {action} {mask:#x}\n",
            r"RULE status=(\d+) .*\n").group(1))

    def lock(self, msr, access, action, mask=0):
        """That must be possible."""
        self.assertEqual(self.rule("l", msr, access, action, mask), 0)

    def told(self, msr, access, value, action, cpu=0):
        """The next event the guest hears of."""
        event = self.guest.ask("e\n", r"EVENT .*\n").group()
        match = re.match(EVENT, event)
        self.assertTrue(match, event)
        self.assertEqual(tuple(int(word, 0) for word in match.groups()),
                         (access, cpu, msr, value, action, 1), event)

    def nothing_told(self):
        """There is no event."""
        self.assertEqual(self.guest.ask("e\n", r"EVENT .*\n").group().strip(),
                         "EVENT none")

    def denied(self, msr, value=0x5a5a, cpu=0):
        """A write that faults, is told, and leaves the MSR alone."""
        before = self.read(msr, cpu)
        self.assertEqual(self.write(msr, value, cpu), FAULT, hex(msr))
        self.told(msr, A_WRITE, value, INJECT, cpu)
        self.assertEqual(self.read(msr, cpu), before, hex(msr))

    def read_denied(self, msr, cpu=0):
        """A read that faults and is told."""
        self.assertEqual(self.read(msr, cpu), FAULT, hex(msr))
        self.told(msr, A_READ, 0, INJECT, cpu)

    def free(self, msr, value=0x1230, cpu=0):
        """A write that lands."""
        self.assertIsNone(self.write(msr, value, cpu), hex(msr))
        self.assertEqual(self.read(msr, cpu), value, hex(msr))

    def finish(self):
        """The guest's end."""
        self.guest.type("q\n")
        self.assertEqual(self.guest.wait(), PASS, self.guest.console.tail())


DENY_LIST = """
[[rule]]
msrs = ["LSTAR"]
access = "write"
action = "deny"

[[rule]]
msrs = ["CSTAR"]
access = "read-write"
action = "deny"

[[rule]]
msrs = ["SYSENTER_ESP-SYSENTER_EIP"]
action = "pin"

[[rule]]
msrs = ["STAR"]
action = "pin"
mask = "0xffff_ffff_0000_0000"
log = true

[[rule]]
msrs = ["SFMASK"]
access = "read-write"
action = "log"

[[rule]]
msrs = ["BIOS_SIGN_ID"]
action = "emulate"
value = "0xffff_ffff_0000_0000"

[[rule]]
msrs = ["PERF_STATUS"]
action = "emulate"
value = 77
log = true
"""


#: mask, value, log, immutable: the host's are until its QEMU ends.
NONE = (None, None, False, True)


def number(value):
    """Of a number, a string that is one, or None."""
    return int(value, 0) if isinstance(value, str) else value


class HostRules(MsrTest):
    """
    :avocado: tags=tcg,kvm,lab
    """

    def test_examples(self):
        """Those of examples/ can be enforced wherever MSR rules can."""
        for path in sorted((REPO / "examples").glob("msr-*.toml")):
            with self.subTest(path.name):
                guard = self.companion(path.stem, options=self.policy_file(
                    path.read_text(encoding="utf-8"), path.name))
                vm = self.bare_metal("probe", guard, reboot=False)
                self.assertEqual(vm.wait(), PASS,
                                 f"{vm.console.tail()}\n{vm.log.tail()}")
                self.assertIn("are in force", guard.log.text())
                guard.stop()

    def test_deny_list(self):
        """Every action, and MSRs that are not listed."""
        self.hold(DENY_LIST)
        self.assert_matches(self.ready, msr_ranges=0)
        for cpu in (0, 1):
            self.denied(LSTAR, cpu=cpu)
            self.read_denied(CSTAR, cpu)
            self.assertEqual(self.write(CSTAR, 1, cpu), FAULT)
            self.told(CSTAR, A_WRITE, 1, INJECT, cpu)
            # Pinned as the machine comes up: 0.
            for msr in (SYSENTER_ESP, SYSENTER_EIP):
                self.assertEqual(self.read(msr, cpu), 0)
                self.denied(msr, cpu=cpu)
                self.assertIsNone(self.write(msr, 0, cpu))
            self.assertIsNone(self.write(STAR, 0x1234, cpu))
            self.told(STAR, A_WRITE, 0x1234, AUDIT, cpu)
            self.assertEqual(self.write(STAR, 1 << 32, cpu), FAULT)
            self.told(STAR, A_WRITE, 1 << 32, INJECT, cpu)
            self.assertEqual(self.read(STAR, cpu), 0x1234)
            self.assertIsNone(self.write(SFMASK, 0x700, cpu))
            self.told(SFMASK, A_WRITE, 0x700, AUDIT, cpu)
            self.assertEqual(self.read(SFMASK, cpu), 0x700)
            self.told(SFMASK, A_READ, 0x700, AUDIT, cpu)
            self.assertEqual(self.read(BIOS_SIGN_ID, cpu), 0xffffffff << 32)
            self.assertEqual(self.read(0x198, cpu), 77)
            self.told(0x198, A_READ, 77, AUDIT, cpu)
            self.free(KERNEL_GS_BASE, cpu=cpu)
        self.nothing_told()
        self.finish()

    def test_default_deny(self):
        """With an allow list."""
        self.hold("""
            default = "deny"
            [[rule]]
            msrs = ["APIC_BASE", "EFER"]
            access = "read-write"
            action = "allow"
            [[rule]]
            msrs = ["LSTAR"]
            access = "read-write"
            action = "allow"
            [[rule]]
            msrs = ["SYSENTER_ESP"]
            access = "read"
            action = "allow"
            [[rule]]
            msrs = ["SYSENTER_EIP"]
            access = "read-write"
            action = "log"
            """)
        for cpu in (0, 1):
            self.free(LSTAR, cpu=cpu)
            self.assertEqual(self.read(SYSENTER_ESP, cpu), 0)
            self.denied(SYSENTER_ESP, cpu=cpu)
            self.assertIsNone(self.write(SYSENTER_EIP, 0x100, cpu))
            self.told(SYSENTER_EIP, A_WRITE, 0x100, AUDIT, cpu)
            for msr in (CSTAR, STAR, 0, 0x10, 0x1234, BIOS_SIGN_ID,
                        CORE_THREAD_COUNT, 0x40000000, 0xfffffffe, ALL >> 32):
                self.read_denied(msr, cpu)
                self.assertEqual(self.write(msr, 1, cpu), FAULT)
                self.told(msr, A_WRITE, 1, INJECT, cpu)
        # What the guest allows is still denied, and is no rule of its own.
        self.assertEqual(self.rule("p", CSTAR, BOTH, 0), 0)
        self.read_denied(CSTAR)
        self.assert_matches(self.guest.ask("c\n", CONFIG), msr_ranges=0)
        # What the host allows the guest can deny.
        self.lock(LSTAR, READ, DENY)
        self.read_denied(LSTAR, 1)
        self.finish()

    def test_stricter_of_both(self):
        """Host x guest, for writes of MSRs with each of the host's rules."""
        self.hold("""
            [[rule]]
            msrs = ["LSTAR"]
            access = "write"
            action = "log"
            [[rule]]
            msrs = ["CSTAR"]
            action = "pin"
            mask = 0xf0
            [[rule]]
            msrs = ["KERNEL_GS_BASE"]
            access = "read-write"
            action = "deny"
            [[rule]]
            msrs = ["BIOS_SIGN_ID"]
            action = "emulate"
            value = 5
            """)
        # log + pin: a pin does not take the place of a log.
        self.assertIsNone(self.write(LSTAR, 0x1000, 1))
        self.told(LSTAR, A_WRITE, 0x1000, AUDIT, 1)
        self.assertEqual(self.rule("p", LSTAR, WRITE, PIN, 0xff), 0)
        self.assertIsNone(self.write(LSTAR, 0x2000, 1))
        self.told(LSTAR, A_WRITE, 0x2000, AUDIT, 1)
        self.assertEqual(self.write(LSTAR, 0x2001, 1), FAULT)
        self.told(LSTAR, A_WRITE, 0x2001, INJECT, 1)
        # The guest's rule is what MSR_QUERY tells, not the host's.
        self.guest.ask(f"? 0 {ALL >> 32:#x} 3\n", re.escape(
            f"QUERY status=0 n=1 {LSTAR:#x}-{LSTAR:#x},2,2,0x0,0xff"))
        # pin + pin: the bits of both.
        self.assertEqual(self.rule("l", CSTAR, WRITE, PIN, 0xf), 0)
        for value, outcome in ((0x10, FAULT), (1, FAULT), (0x100, None)):
            self.assertEqual(self.write(CSTAR, value), outcome, hex(value))
            if outcome:
                self.told(CSTAR, A_WRITE, value, INJECT)
        # pin + log, pin + deny.
        self.assertEqual(self.rule("p", CSTAR, WRITE, PIN | LOG, 0xf), 0)
        self.assertIsNone(self.write(CSTAR, 0x200))
        self.told(CSTAR, A_WRITE, 0x200, AUDIT)
        self.assertEqual(self.rule("p", CSTAR, WRITE, DENY), 0)
        self.denied(CSTAR, 0x200)
        # deny + anything.
        for action, mask in ((0, 0), (LOG, 0), (PIN, ALL)):
            self.assertEqual(
                self.rule("p", KERNEL_GS_BASE, WRITE, action, mask), 0)
            self.assertEqual(self.write(KERNEL_GS_BASE, 0), FAULT)
            self.told(KERNEL_GS_BASE, A_WRITE, 0, INJECT)
        # A constant is given, reported, or not given at all.
        self.assertEqual(self.read(BIOS_SIGN_ID), 5)
        if self.rule("p", BIOS_SIGN_ID, READ, LOG) == 0:
            self.assertEqual(self.read(BIOS_SIGN_ID, 1), 5)
            self.told(BIOS_SIGN_ID, A_READ, 5, AUDIT, 1)
        self.assertEqual(self.rule("p", BIOS_SIGN_ID, READ, DENY), 0)
        self.read_denied(BIOS_SIGN_ID, 1)
        self.assertEqual(self.rule("p", BIOS_SIGN_ID, READ, 0), 0)
        self.assertEqual(self.read(BIOS_SIGN_ID, 1), 5)
        self.nothing_told()
        self.finish()

    def core_thread_count(self, action, more=""):
        """A VM with such a rule for reads of MSR 0x35."""
        self.hold(f"""
            [[rule]]
            msrs = [0x35]
            access = "read"
            action = "{action}"
            {more}""")

    def test_core_thread_count(self):
        """QEMU's own, on KVM through its own range of the filter."""
        self.hold()
        plain = self.read(CORE_THREAD_COUNT)
        self.assertEqual(plain, self.read(CORE_THREAD_COUNT, 1))
        if plain == FAULT:
            self.cancel("this host's QEMU has no MSR 0x35 for the guest")
        self.assertEqual(plain & 0xffff, 2, "threads")
        self.nothing_told()
        self.assertEqual(self.rule("p", CORE_THREAD_COUNT, READ, DENY), 0)
        self.read_denied(CORE_THREAD_COUNT, 1)
        self.assertEqual(self.rule("p", CORE_THREAD_COUNT, BOTH, DENY), 0)
        self.assertEqual(self.write(CORE_THREAD_COUNT, 3), FAULT)
        self.told(CORE_THREAD_COUNT, A_WRITE, 3, INJECT)
        self.assertEqual(self.rule("p", CORE_THREAD_COUNT, BOTH, 0), 0)
        self.assertEqual(self.read(CORE_THREAD_COUNT, 1), plain)
        status = self.rule("p", CORE_THREAD_COUNT, READ, LOG)
        if self.accel == "tcg" or status == 0:
            self.assertEqual(status, 0)
            self.assertEqual(self.read(CORE_THREAD_COUNT), plain)
            self.told(CORE_THREAD_COUNT, A_READ, plain, AUDIT)
        else:
            self.assertEqual(status, EOPNOTSUPP)
        self.nothing_told()
        self.finish()

    def test_core_thread_count_denied(self):
        self.core_thread_count("deny")
        self.read_denied(CORE_THREAD_COUNT)
        self.read_denied(CORE_THREAD_COUNT, 1)
        self.finish()

    def test_core_thread_count_emulated(self):
        self.core_thread_count("emulate", "value = 0x10001")
        self.assertEqual(self.read(CORE_THREAD_COUNT), 0x10001)
        self.assertEqual(self.read(CORE_THREAD_COUNT, 1), 0x10001)
        self.nothing_told()
        self.finish()

    def test_show_and_events(self):
        """What `vhost-guard show`, query-vm-guard and the events file say."""
        events = f"{self.directory}/events"
        self.hold(DENY_LIST, ["--events", events])
        self.lock(GS_BASE, WRITE, DENY)
        self.guest.connect()
        self.denied(LSTAR, 0x1234, 1)
        event = self.guest.qmp.wait_for("VM_GUARD_VIOLATION")
        self.assertEqual((event["msr"], event["cpu-index"], event["value"],
                          event["access"], event["action"], event["size"]),
                         (LSTAR, 1, 0x1234, "write", "inject", 8), event)
        self.assertNotIn("gpa", event)
        shown = self.guard.show()
        self.log.info("show: %s", json.dumps(shown))
        self.assertEqual(shown["msr_default"], "allow")
        self.assertEqual(
            {(rule["by"], number(rule["first"]), number(rule["last"]),
              access, rule["action"], number(rule["mask"]),
              number(rule["value"]), rule["log"], rule["immutable"])
             for rule in shown["msr_rules"]
             for access in rule["access"].split("-")}, {
                 ("host", LSTAR, LSTAR, "write", "deny", *NONE),
                 ("host", CSTAR, CSTAR, "read", "deny", *NONE),
                 ("host", CSTAR, CSTAR, "write", "deny", *NONE),
                 ("host", SYSENTER_ESP, SYSENTER_EIP, "write", "pin", ALL,
                  None, False, True),
                 ("host", STAR, STAR, "write", "pin", 0xffffffff << 32, None,
                  True, True),
                 ("host", SFMASK, SFMASK, "read", "log", None, None, True,
                  True),
                 ("host", SFMASK, SFMASK, "write", "log", None, None, True,
                  True),
                 ("host", BIOS_SIGN_ID, BIOS_SIGN_ID, "read", "emulate", None,
                  0xffffffff << 32, False, True),
                 ("host", 0x198, 0x198, "read", "emulate", None, 77, True,
                  True),
                 ("guest", GS_BASE, GS_BASE, "write", "deny", None, None,
                  False, True)})
        self.assertEqual([number(v["msr"]) for v in shown["violations"]],
                         [LSTAR])
        info = self.guest.qmp.command("query-vm-guard")
        self.log.info("query-vm-guard: %s", json.dumps(info))
        self.assertEqual(info["host-msr-default"], "allow")
        self.assertEqual(info["msrs"], [
            {"first": GS_BASE, "last": GS_BASE, "access": "write",
             "deny": True, "log": False, "immutable": True}])
        # Those of writes of LSTAR and CSTAR are one.
        self.assertEqual([(rule["access"], rule["first"], rule["last"])
                          for rule in info["host-msrs"]], [
            *(("read", msr, msr)
              for msr in (BIOS_SIGN_ID, 0x198, CSTAR, SFMASK)),
            ("write", SYSENTER_ESP, SYSENTER_EIP), ("write", STAR, STAR),
            ("write", LSTAR, CSTAR), ("write", SFMASK, SFMASK)])
        lines = [json.loads(line)
                 for line in self.host.read_file(events).splitlines()]
        self.assertEqual(len(lines), 1, lines)
        self.assertEqual(int(str(lines[0]["msr"]), 0), LSTAR, lines)
        self.assertEqual((lines[0]["access"], lines[0]["source"],
                          lines[0]["action"], lines[0]["value"]),
                         ("write", "vcpu1", "inject", "0x1234"), lines)
        self.finish()


class Refused(MsrTest):
    """Policies that do not get as far as a running VM.

    :avocado: tags=tcg,kvm,lab
    """

    def test_bad_files(self):
        """The companion says which line, and ends."""
        for number, (text, line) in enumerate((
                ("default = \"maybe\"\n", 1),
                ("\n[[rule]]\nmsrs = [\"NO_SUCH\"]\naction = \"deny\"\n"
                 "access = \"read\"\n", 3),
                ("[[rule]]\nmsrs = [0x800]\naccess = \"read\"\n"
                 "action = \"deny\"\n", 2),
                ("[[rule]]\nmsrs = [1]\naccess = \"read\"\naction = \"deny\"\n"
                 "[[rule]]\nmsrs = [1]\naccess = \"read\"\naction = \"log\"\n",
                 6),
                ('[[rule]]\nmsrs = ["0x200-0x23f"]\naction = "pin"\n'
                 '[[rule]]\nmsrs = [0x240]\naction = "pin"\n', 5))):
            options = self.policy_file(text, f"bad-{number}.toml")
            companion = Companion(self.host, self.directory, f"bad-{number}",
                                  options).spawn()
            status = companion.process.wait(20 * self.host.patience)
            said = companion.log.text()
            with self.subTest(said=said):
                self.assertEqual(status, 1)
                self.assertEqual(len(said.strip().splitlines()), 1)
                self.assertIn(f"{options[1]}:{line}: ", said)
        companion = Companion(self.host, self.directory, "none",
                              ["--msr-policy", "/nonexistent"]).spawn()
        self.assertEqual(companion.process.wait(20 * self.host.patience), 1)
        self.assertIn("/nonexistent", companion.log.text())

    def not_started(self, policy, *words):
        """QEMU ends before the guest runs, and says why."""
        guard = self.companion(options=self.policy_file(policy))
        vm = self.bare_metal("msr-hold", guard, smp=2)
        with self.assertRaises(Ended):
            vm.expect(READY, 30)
        self.assertEqual(vm.wait(), 1)
        said = vm.log.text()
        self.log.info("QEMU said: %s", said)
        for word in words:
            self.assertRegex(said, word)
        self.assertTrue(guard.alive(), guard.log.tail())
        return guard

    def test_what_kvm_cannot_do(self):
        """QEMU names the rule and does not start; TCG takes it."""
        policy = """
            [[rule]]
            msrs = ["LSTAR"]
            access = "write"
            action = "deny"
            [[rule]]
            msrs = ["MISC_ENABLE"]
            access = "write"
            action = "log"
            """
        if self.accel == "tcg":
            self.hold(policy)
            now = self.read(MISC_ENABLE)
            self.assertIsNone(self.write(MISC_ENABLE, now))
            self.told(MISC_ENABLE, A_WRITE, now, AUDIT)
            self.finish()
            return
        guard = self.not_started(policy, r"rule 1 \(from 0\)")
        self.assertRegex(guard.log.text(), r"policy\.toml:7 are NOT in force")

    def test_more_ranges_than_kvm_has(self):
        """The same, of a policy that is too scattered."""
        policy = "".join(
            f'[[rule]]\nmsrs = [{0x10000000 + n * 0x100000}]\n'
            'access = "write"\naction = "deny"\n' for n in range(20))
        if self.accel == "tcg":
            self.hold(policy)
            self.assertEqual(self.write(0x10000000 + 19 * 0x100000, 1), FAULT)
            self.told(0x10000000 + 19 * 0x100000, A_WRITE, 1, INJECT)
            self.finish()
            return
        guard = self.not_started(policy, "No space left")
        self.assertIn("do not fit into KVM's filter", guard.log.text())


class Lifecycle(MsrTest):
    """
    :avocado: tags=tcg,kvm,lab
    """

    def locked(self):
        """Both sides' rules are enforced."""
        for cpu in (0, 1):
            self.denied(LSTAR, cpu=cpu)
            self.denied(CSTAR, cpu=cpu)
        self.free(STAR)

    HOST = '[[rule]]\nmsrs = ["LSTAR"]\naccess = "write"\naction = "deny"\n'

    def test_device_reset(self):
        self.hold(self.HOST)
        self.lock(CSTAR, WRITE, PIN, ALL)
        self.guest.ask("d\n", "RESET done")
        self.locked()
        self.assertEqual(self.rule("p", CSTAR, WRITE, 0), EPERM)
        self.guest.ask("n\n", "RESET without F_MSR")
        self.locked()
        self.assertEqual(self.rule("p", KERNEL_GS_BASE, WRITE, DENY),
                         EOPNOTSUPP)
        self.free(KERNEL_GS_BASE)
        self.finish()

    def test_companion_killed(self):
        """Rules hold meanwhile and afterwards, and the next one knows them."""
        self.hold(self.HOST)
        self.lock(CSTAR, WRITE, DENY)
        self.assertEqual(self.rule("p", SFMASK, WRITE, DENY), 0)
        self.guard.kill()
        for cpu in (0, 1):
            for msr in (LSTAR, CSTAR, SFMASK):
                self.assertEqual(self.write(msr, 0x5a5a, cpu), FAULT)
        self.guard.start()
        self.assertEqual(self.rule("p", CSTAR, WRITE, 0), EPERM)
        self.guest.ask("d\n", "RESET done")
        self.assertEqual(self.rule("p", SFMASK, WRITE, 0), 0)
        self.free(SFMASK)
        self.assert_matches(self.guest.ask("c\n", CONFIG), msr_ranges=1)
        self.lock(SYSENTER_ESP, WRITE, PIN, ALL)
        self.assertEqual(self.write(SYSENTER_ESP, 1, 1), FAULT)
        self.finish()

    def test_companion_with_another_policy(self):
        """The old one holds, and that is said; so it is without any."""
        self.hold(self.HOST)
        self.guard.kill()
        self.guard.options = self.policy_file(
            '[[rule]]\nmsrs = ["CSTAR"]\naccess = "write"\naction = "deny"\n',
            "other.toml")
        self.guard.start()
        self.guard.log.expect("MSR rules of .*other.toml are NOT in force",
                              30 * self.host.patience)
        self.denied(LSTAR, cpu=1)
        self.free(CSTAR)
        self.guard.kill()
        self.guard.options = []
        self.guard.start()
        self.guard.log.expect("the VM has MSR rules of its host",
                              30 * self.host.patience)
        self.denied(LSTAR)
        self.log.info("companions said: %s", self.guard.log.text())
        # The same again is no news.
        self.guard.kill()
        self.guard.options = self.policy_file(self.HOST)
        self.guard.start()
        self.denied(LSTAR)
        self.lock(STAR, WRITE, DENY)
        self.assertNotIn("NOT in force", self.guard.log.text())
        self.finish()

    def test_first_policy_of_a_later_companion(self):
        """QEMU was started with none: then it is set in the running VM."""
        self.hold()
        for cpu in (0, 1):
            self.free(LSTAR, cpu=cpu)
            self.free(SYSENTER_ESP, 0x1000 * (cpu + 1), cpu)
        self.guard.kill()
        self.guard.options = self.policy_file(
            self.HOST + '[[rule]]\nmsrs = ["SYSENTER_ESP"]\naction = "pin"\n')
        self.guard.start()
        # An answer means that the policy, which was sent before, holds.
        self.lock(CSTAR, WRITE, DENY)
        self.locked()
        for cpu in (0, 1):
            self.assertIsNone(
                self.write(SYSENTER_ESP, 0x1000 * (cpu + 1), cpu))
            self.denied(SYSENTER_ESP, cpu=cpu)
        # What is kept after a reset is what there is then.
        self.guest.qmp.command("system_reset")
        self.guest.expect(READY)
        for cpu in (0, 1):
            self.assertEqual(self.read(SYSENTER_ESP, cpu), 0)
            self.denied(SYSENTER_ESP, 0x1000 * (cpu + 1), cpu)
            self.assertIsNone(self.write(SYSENTER_ESP, 0, cpu))
        self.finish()

    def test_system_reset(self):
        """The guest's rules end, the host's stay, its pins keep the values of
        power-on anew."""
        self.hold(self.HOST
                  + '[[rule]]\nmsrs = ["SYSENTER_ESP", "SYSENTER_EIP"]\n'
                  'action = "pin"\nmask = 0xff\n')
        self.lock(CSTAR, WRITE, DENY)
        self.lock(SYSENTER_EIP, WRITE, PIN, ALL)
        generation = int(self.ready.group("generation"))
        for _ in range(2):
            for cpu in (0, 1):
                self.denied(LSTAR, cpu=cpu)
                self.assertIsNone(self.write(SYSENTER_ESP, 0x4500, cpu))
                self.denied(SYSENTER_ESP, 0x45, cpu)
            self.guest.qmp.command("system_reset")
            self.assert_matches(self.guest.expect(READY), msr_ranges=0,
                                generation=generation + 1)
            generation += 1
            for cpu in (0, 1):
                self.free(CSTAR, cpu=cpu)
                self.denied(LSTAR, cpu=cpu)
                self.assertEqual(self.read(SYSENTER_ESP, cpu), 0)
                self.assertIsNone(self.write(SYSENTER_EIP, 0x100, cpu))
                self.denied(SYSENTER_EIP, 0x101, cpu)
        self.finish()

    def test_system_reset_without_rules_of_the_host(self):
        """What the guest had locked is free, of both kinds."""
        self.hold()
        for _ in range(2):
            self.lock(CSTAR, BOTH, DENY)
            self.lock(LSTAR, WRITE, PIN, ALL)
            self.read_denied(CSTAR, 1)
            self.guest.qmp.command("system_reset")
            self.assert_matches(self.guest.expect(READY), msr_ranges=0)
            for cpu in (0, 1):
                self.free(CSTAR, cpu=cpu)
                self.free(LSTAR, cpu=cpu)
        self.nothing_told()
        self.finish()

    def test_system_reset_without_companion(self):
        self.hold(self.HOST)
        self.lock(CSTAR, WRITE, DENY)
        self.guard.kill()
        self.guest.qmp.command("system_reset")
        self.guard.start()
        self.assert_matches(self.guest.expect(READY), msr_ranges=0)
        self.free(CSTAR)
        self.denied(LSTAR, cpu=1)
        self.finish()

    def test_cpu_again(self):
        """The host's pins keep the values of power-on through INIT."""
        self.hold('[[rule]]\nmsrs = ["GS_BASE", "LSTAR"]\naction = "pin"\n')
        kept = self.read(GS_BASE, 1)
        for _ in range(2):
            self.guest.ask("i\n", "INIT up")
            self.assertIsNone(self.write(GS_BASE, kept, 1))
            self.denied(GS_BASE, 0x1000, 1)
            self.denied(LSTAR, 0x1000, 1)
        self.finish()

    def test_suspend_to_ram(self):
        """MSRs are reset, rules are not: the kept value can be written again,
        by each vCPU its own, and nothing else but what is there."""
        self.hold('[[rule]]\nmsrs = ["SYSENTER_ESP"]\naction = "pin"\n')
        for cpu in (0, 1):
            self.free(LSTAR, 0x1000 * (cpu + 1), cpu)
        self.lock(LSTAR, WRITE, PIN, ALL)
        self.lock(CSTAR, WRITE, DENY)
        self.guest.connect()
        for _ in range(2):
            self.guest.ask("z\n", "SUSPEND")
            self.guest.qmp.event("SUSPEND")
            self.guest.qmp.command("system_wakeup")
            self.assert_matches(self.guest.expect(READY), msr_ranges=2,
                                generation=int(self.ready.group("generation")))
            for cpu in (0, 1):
                self.assertEqual(self.read(LSTAR, cpu), 0, "not reset")
                self.denied(LSTAR, 0x1000 * (2 - cpu), cpu)
                self.assertIsNone(self.write(LSTAR, 0, cpu))
                self.free(LSTAR, 0x1000 * (cpu + 1), cpu)
                self.denied(LSTAR, 0, cpu)
                self.denied(CSTAR, cpu=cpu)
                self.denied(SYSENTER_ESP, cpu=cpu)
        self.finish()

    def test_stop_and_cont(self):
        self.hold(self.HOST)
        self.lock(CSTAR, WRITE, PIN, ALL)
        for _ in range(3):
            self.guest.qmp.command("stop")
            self.guest.qmp.command("cont")
            self.locked()
        self.finish()


class Policies(MsrTest):
    """What becomes of a denied access.

    :avocado: tags=tcg,kvm,lab
    """

    def test_drop(self):
        """A write is skipped, a read faults."""
        self.policy = "drop"
        self.hold()
        self.free(LSTAR, 0x1000, 1)
        self.lock(LSTAR, BOTH, DENY)
        self.assertIsNone(self.write(LSTAR, 5, 1))
        self.told(LSTAR, A_WRITE, 5, DROP, 1)
        self.assertEqual(self.read(LSTAR, 1), FAULT)
        self.told(LSTAR, A_READ, 0, INJECT, 1)
        self.lock(CSTAR, WRITE, PIN, 0xf)
        self.assertIsNone(self.write(CSTAR, 0x101))
        self.told(CSTAR, A_WRITE, 0x101, DROP)
        self.assertEqual(self.read(CSTAR), 0)
        self.free(CSTAR, 0x100)
        self.finish()

    def pauses(self, line):
        """Ask for an access; the VM stops at it. Goes on; what the guest
        saw."""
        self.guest.type(line + "\n")
        self.guest.qmp.event("STOP")
        self.assertEqual(self.guest.status(), "paused")
        mark = self.guest.console.text().count("MSR cpu")
        self.guest.qmp.command("cont")
        self.guest.qmp.event("RESUME")
        said = self.guest.expect(r"MSR .*\n").group()
        self.assertEqual(self.guest.console.text().count("MSR cpu"), mark + 1)
        return said

    def test_pause(self):
        """A write is skipped and a read faults when the VM goes on."""
        self.policy = "pause"
        self.hold()
        self.guest.connect()
        for cpu in (0, 1):
            self.free(LSTAR, 0x1000 + cpu, cpu)
        self.lock(LSTAR, WRITE, DENY)
        for cpu in (0, 1):
            self.assertIn(" ok", self.pauses(f"w {cpu} {LSTAR:#x} 5"))
            self.assertEqual(self.read(LSTAR, cpu), 0x1000 + cpu)
            self.told(LSTAR, A_WRITE, 5, PAUSE, cpu)
        self.lock(LSTAR, READ, DENY)
        for cpu in (0, 1):
            self.assertIn("fault=13 error=0 at=instruction",
                          self.pauses(f"r {cpu} {LSTAR:#x}"))
            self.told(LSTAR, A_READ, 0, PAUSE, cpu)
        self.assertFalse(self.guest.qmp.has_event("STOP"))
        self.finish()

    def shuts_down(self, line):
        """QEMU ends, and the guest saw nothing."""
        self.policy = "shutdown"
        self.hold()
        self.guest.connect()
        self.lock(LSTAR, BOTH, DENY)
        self.guest.type(line + "\n")
        self.guest.qmp.event("SHUTDOWN")
        self.guest.wait()
        self.assertNotIn("MSR cpu", self.guest.console.text())

    def test_shutdown_at_a_write(self):
        self.shuts_down(f"w 1 {LSTAR:#x} 5")

    def test_shutdown_at_a_read(self):
        self.shuts_down(f"r 0 {LSTAR:#x}")
