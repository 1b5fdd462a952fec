# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A stock Debian kernel with the driver, and the attacks on it.

tests/linux/init runs the scenarios inside the guest and says how they went;
a VM here runs several of them, because booting is what takes the time.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.machine import linux_results  # noqa: E402


class Scenarios(GuardTest):
    """
    :avocado: disable
    """

    kernel = "6.12-cloud"

    def scenario(self, name, *words, reboot=False, deadline=120,
                 at_last=None, suspends=False, **options):
        """Run one; every line of the guest must be an ok. Returns them.
        `at_last` is called with the companion while the VM is still there.
        If the guest `suspends`, it is woken up."""
        companion = self.companion()
        run = f"{name},wait" if at_last else name
        vm = self.linux([f"guard.run={run}", *words], companion,
                        kernel=self.kernel, reboot=reboot, **options)
        if suspends:
            vm.connect()
            vm.qmp.event("SUSPEND", deadline=deadline)
            vm.qmp.command("system_wakeup")
        if at_last:
            vm.expect(r"^guard-test: ready", deadline)
            at_last(companion)
            vm.type("quit\n")
        vm.expect(r"^guard-test: (passed|FAILED)", deadline)
        good, bad, skipped = linux_results(vm.console.text())
        self.log.info("ok: %s; skipped: %s", good, skipped)
        self.assertFalse(bad, f"not ok: {bad}")
        self.assertIn("guard-test: passed", vm.console.text())
        self.assertTrue(good, "the guest checked nothing")
        self.assertNotIn("Kernel panic", vm.console.text())
        vm.wait()
        self.assertTrue(companion.alive(), "the companion is gone")
        return good

    def check_kernel(self, scenario, **options):
        """The scenario, and that this accelerator's rights were all tried."""
        checked = self.scenario(scenario, deadline=180, **options)
        if self.accel == "tcg":
            self.assertIn("kernel data cannot be executed", checked)


class Linux(Scenarios):
    """What the accelerator has a part in.

    :avocado: disable
    """

    def test_attacks_work_without_the_driver(self):
        """The control experiment: the attacks can tell."""
        self.scenario("attack-control")

    def test_attacks_are_refused(self):
        self.scenario("attack")

    def test_reload(self):
        """Neither rmmod nor unbind loosens anything."""
        self.scenario("reload")

    def test_events(self):
        """What user space is told of violations, and when the device goes."""
        self.scenario("events", deadline=180)

    def test_rights(self):
        """PROTECT, SEAL, QUERY, and accesses that are watched."""
        checked = self.scenario("rights", deadline=180)
        if self.accel == "tcg":
            # The guest tries what is offered, and here that is everything.
            for name in ("a fetch is refused", "a load is refused",
                         "NOEXEC_KERNEL lets user space execute"):
                self.assertIn(name, checked)

    def test_kernel_is_locked_by_its_page_tables(self):
        """It works on, through suspend to RAM too, and attacks do not."""
        self.check_kernel("kernel-work", smp=2, suspends=True)

    def test_msr_attacks_work_without_pins(self):
        """The control experiment of the next ones."""
        self.scenario("msr-control", smp=2)

    def test_msrs_are_pinned(self):
        """No other system call entry, and CPUs still come and go."""
        def check(companion):
            seen = {(event["msr"], event["source"])
                    for event in companion.show()["violations"]
                    if "msr" in event}
            for cpu in range(2):
                self.assertIn(("0xc0000080", f"vcpu{cpu}"), seen)
                self.assertIn(("0xc0000082", f"vcpu{cpu}"), seen)

        self.scenario("msr", smp=2, deadline=180, at_last=check)

    def test_msrs_stay_pinned_through_suspend(self):
        """The kernel writes back what suspend to RAM has reset."""
        self.scenario("msr-suspend", smp=2, suspends=True)

    def test_reboot(self):
        """Locks end with the reboot; the guest locks again."""
        self.scenario("reboot", reboot=True, deadline=180)


class Inside(Scenarios):
    """What is the driver's and its program's own, or what a test of Linux does
    among other things: one accelerator will do.

    :avocado: disable
    """

    def test_finds_what_the_kernel_says(self):
        """And what it has that does not go with pinned MSRs."""
        checked = self.scenario("find", "maxcpus=1", "crashkernel=64M", smp=2)
        for name in ("the log tells of the crash kernel",
                     "the log names CPUs that cannot come up"):
            self.assertIn(name, checked)

    def test_ioctl(self):
        self.scenario("ioctl")

    def test_guardctl(self):
        self.scenario("guardctl")

    def test_guardctl_rights(self):
        self.scenario("guardctl-rights")

    def test_kernel_with_five_levels_is_locked_by_its_page_tables(self):
        """On one CPU."""
        self.check_kernel("kernel", cpu="max")

    def test_suspend(self):
        """Locks hold through suspend to RAM."""
        self.scenario("suspend", suspends=True)

    def test_guardctl_msr(self):
        self.scenario("guardctl-msr", smp=2)

    def test_work(self):
        """A locked kernel goes on working with no violation."""
        self.scenario("work", smp=2, deadline=180)


class Linux612(Linux):
    """
    :avocado: tags=tcg,lab
    """


class Linux61(Linux):
    """
    :avocado: tags=tcg
    """

    kernel = "6.1-cloud"


class Inside612(Inside):
    """
    :avocado: tags=tcg
    """


class Inside61(Inside):
    """
    :avocado: tags=tcg
    """

    kernel = "6.1-cloud"


class LinuxCompanion(GuardTest):
    """The companion under a running kernel.

    :avocado: tags=tcg,lab
    """

    def test_kernel_outlives_the_companion(self):
        companion = self.companion()
        vm = self.linux(["guard.run=wait"], companion)
        vm.expect(r"^guard-test: ready", 120)
        companion.kill()
        vm.ask("attack\n", r"^guard-test: ready")
        # What waits on the queue for page tables, the next one answers.
        vm.ask("(guardctl kernel --json; echo kernel $?) &\n",
               r"^guard-test: ready")
        companion.start()
        vm.expect(r'^\{"dry_run":true,.*"write_exec":0,')
        vm.expect(r"^kernel 0")
        vm.ask("attack\n", r"^guard-test: ready")
        vm.ask("work\n", r"^guard-test: ready")
        vm.ask("lock\n", r"^guard-test: ready")
        good, bad, _ = linux_results(vm.console.text())
        self.assertFalse(bad)
        self.assertIn("locked again", good)
        vm.type("quit\n")
        vm.wait()
