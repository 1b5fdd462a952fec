# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the VM's management sees: query-vm-guard, VM_GUARD_VIOLATION, and guest
memory itself, whatever the guest may do with it.
"""

import os
import re
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.control import NOREAD, Control  # noqa: E402
from harness.machine import PASS  # noqa: E402
from harness.qmp import QmpError  # noqa: E402


class Management(GuardTest):
    """
    :avocado: tags=tcg,kvm,lab
    """

    def hold(self, **options):
        """A VM whose guest holds a locked page, and that page."""
        self.guard = self.companion()
        vm = self.bare_metal("hold", self.guard, **options)
        vm.connect()
        return vm, int(vm.expect(r"LOCKED gpa=(0x\w+) ").group(1), 16)

    def violation(self, vm, gpa, action):
        """The next event, which must be about a store to that page."""
        event = vm.qmp.wait_for("VM_GUARD_VIOLATION")
        self.assertEqual((event["access"], event["action"]),
                         ("write", action), event)
        self.assertEqual(event["cpu-index"], 0, event)
        self.assertEqual(event["gpa"] >> 12, gpa >> 12, event)
        self.assertIn("rip", event)
        self.assertGreater(event["violations"], 0, event)
        self.assertEqual((event["audited"], event["lost"]), (0, 0), event)
        if self.accel == "kvm":
            self.assertGreater(event["size"], 0, event)
            self.assertIn("value", event)
        return event

    def test_no_object(self):
        """A VM without the feature says so."""
        with self.assertRaisesRegex(QmpError, "has no vm-guard object"):
            self.vm(["-S"]).qmp.command("query-vm-guard")

    def test_query(self):
        """It follows what the guest, the companion and a reset do."""
        vm, gpa = self.hold(policy="drop")
        info = vm.qmp.command("query-vm-guard")
        self.assertIn("nowrite", info["deny-bits"])
        self.assertEqual(info["on-violation"], "drop")
        self.assertTrue(info["connected"])
        self.assertEqual(info["requests"], 1)
        self.assertEqual(info["violations"], 0)
        self.assertEqual(info["ranges"], [
            {"gfn-start": gpa >> 12, "gfn-end": gpa >> 12,
             "deny": ["nowrite"], "audit": [], "immutable": True}])
        self.guard.kill()
        self.assertEqual(vm.ask("w", "HELD|LOST").group(), "HELD")
        gone = vm.qmp.command("query-vm-guard")
        self.assertFalse(gone["connected"])
        self.assertGreater(gone["violations"], 0)
        self.assertEqual(gone["ranges"], info["ranges"])
        vm.qmp.command("system_reset")
        vm.qmp.event("RESET")
        again = vm.qmp.command("query-vm-guard")
        self.assertEqual(again["generation"], info["generation"] + 1)
        self.assertEqual(again["ranges"], [])
        self.assertEqual(again["violations"], gone["violations"])

    def test_event(self):
        """The first one comes at once; later ones tell of all before."""
        vm, gpa = self.hold()
        self.assertEqual(vm.qmp.take("VM_GUARD_VIOLATION"), [])
        self.assertEqual(vm.ask("w", "HELD|LOST").group(), "HELD")
        self.violation(vm, gpa, "inject")
        for _ in range(20):
            vm.ask("w", "HELD|LOST")
        total = vm.qmp.command("query-vm-guard")["violations"]
        self.assertGreater(total, 20)
        event = self.violation(vm, gpa, "inject")
        while event["violations"] < total:
            event = self.violation(vm, gpa, "inject")
        self.assertEqual(event["violations"], total)
        vm.type("q")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())

    def test_event_without_companion(self):
        """Who manages the VM hears of it all the same."""
        vm, gpa = self.hold()
        self.guard.kill()
        self.assertEqual(vm.ask("w", "HELD|LOST").group(), "HELD")
        self.violation(vm, gpa, "inject")

    def test_event_when_the_vm_is_paused(self):
        """Why it stopped."""
        vm, gpa = self.hold(policy="pause")
        vm.type("w")
        vm.qmp.event("STOP")
        self.violation(vm, gpa, "pause")

    def test_event_when_the_vm_is_shut_down(self):
        """Why it ended."""
        vm, gpa = self.hold(policy="shutdown")
        vm.type("w")
        vm.qmp.event("SHUTDOWN")
        self.violation(vm, gpa, "shutdown")


class HostReads(GuardTest):
    """A debugger may read what the guest may not, and that is no violation.

    :avocado: tags=tcg
    """

    VALUE, ADDRESS = 0x1122334455667788, 0x1000000

    def gdb(self, path, command):
        """The answer to one command of gdb's remote protocol."""
        with socket.socket(socket.AF_UNIX) as stub:
            stub.settimeout(20)
            stub.connect(path)
            stub.sendall(b"$%s#%02x" % (command, sum(command) & 0xff))
            data = b""
            while b"#" not in data:
                data += stub.recv(4096)
            return data[data.index(b"$") + 1:data.index(b"#")].decode()

    def test_reads(self):
        stub = f"{self.directory}/gdb"
        saved = f"{self.directory}/saved"
        vm, control = self.table(extra=[
            "-gdb", f"unix:{stub},server=on,wait=off", "-device",
            f"loader,addr={self.ADDRESS:#x},data={self.VALUE:#x},data-len=8"])
        if not control.deny_bits & NOREAD:
            self.cancel("this host does not enforce NOREAD")
        little = self.VALUE.to_bytes(8, "little")
        gfn = self.ADDRESS >> 12
        for locked in (False, True):
            with self.subTest(locked=locked):
                if locked:
                    self.assertEqual(
                        control.protect([(gfn, gfn, NOREAD)])[0], 0)
                for command in ("x", "xp"):
                    self.assertIn(f"{self.VALUE:#x}", vm.qmp.human(
                        f"{command} /1gx {self.ADDRESS:#x}"), command)
                for command, arguments in (("memsave", {"cpu_index": 0}),
                                           ("pmemsave", {})):
                    vm.qmp.command(command, val=self.ADDRESS, size=8,
                                   filename=saved, **arguments)
                    with open(saved, "rb") as file:
                        self.assertEqual(file.read(), little, command)
                question = b"m%x,8" % self.ADDRESS
                self.assertEqual(self.gdb(stub, question), little.hex())
        info = vm.qmp.command("query-vm-guard")
        self.assertEqual((info["violations"], info["audited"]), (0, 0))
        self.assertEqual(control.violations, [])

    def test_page_tables(self):
        """Nor is it one to look up a virtual address in them."""
        companion = self.companion()
        vm = self.bare_metal("hold", companion)
        address = vm.expect(r"LOCKED gpa=(0x\w+) ").group(1)
        vm.qmp.command("stop")
        root = int(re.search(r"CR3=(\w+)", vm.qmp.human("info registers"))
                   .group(1), 16) >> 12
        companion.kill()
        self.host.run(["rm", "-f", companion.control])
        control = Control(self.host.listen(companion.control).accept(30))
        if not control.deny_bits & NOREAD:
            self.cancel("this host does not enforce NOREAD")
        before = vm.qmp.human(f"x /4gx {address}")
        self.assertRegex(before, r"0x\w{16}.*0x\w{16}")
        self.assertEqual(control.protect([(root, root, NOREAD)])[0], 0)
        self.assertEqual(vm.qmp.human(f"x /4gx {address}"), before)
        self.assertEqual(vm.qmp.command("query-vm-guard")["violations"], 0)
