# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Locks and requests through the death of the companion, stop and cont,
system reset, and a new QEMU.

The bare-metal guest's `hold` test obeys bytes on its serial line (tests/guests
README): w attacks the held page, l locks one more, b sends a burst of
requests, c prints the configuration space, q ends. The burst of `kernel-hold`
is one of page table walks.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import GuardTest  # noqa: E402
from harness.machine import PASS  # noqa: E402

LOCKED = r"LOCKED gpa=0x\w+ generation=(?P<generation>\d+) ranges=(?P<ranges>\d+)"
CONFIG = r"CONFIG generation=(?P<generation>\d+) ranges=(?P<ranges>\d+)"
READY = r"READY generation=(?P<generation>\d+) "
WALKS = (r"WALKS ok=(?P<ok>\d+) dup=(?P<dup>\d+) missing=(?P<missing>\d+) "
         r"other=(?P<other>\d+) unlocked=(?P<unlocked>\d+)")
BURST = (r"BURST ok=(?P<ok>\d+) dup=(?P<dup>\d+) missing=(?P<missing>\d+) "
         r"other=(?P<other>\d+) unlocked=(?P<unlocked>\d+)")


class Lifecycle(GuardTest):
    """
    :avocado: tags=tcg,kvm,lab
    """

    def hold(self, companion, *words):
        """A VM whose guest holds one locked page."""
        vm = self.bare_metal("hold", companion, words)
        self.locked = vm.expect(LOCKED)
        self.assert_matches(self.locked, ranges=1)
        return vm

    def attack(self, vm):
        """The held page withstands."""
        self.assertEqual(vm.ask("w", r"(HELD|LOST) \d+").group(1), "HELD")

    def finish(self, vm):
        """The guest has nothing to complain about."""
        vm.type("q")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())

    def test_locks_hold_while_the_companion_is_gone(self):
        companion = self.companion()
        vm = self.hold(companion)
        companion.kill()
        self.attack(vm)
        companion.start()
        match = vm.ask("l", r"LOCK (?P<status>\d+) held")
        self.assert_matches(match, status=0)
        self.attack(vm)
        match = vm.ask("c", CONFIG)
        self.assert_matches(match, ranges=2, generation=int(
            self.locked.group("generation")))
        self.finish(vm)

    def test_kill_under_load_loses_and_repeats_no_answer(self):
        """Killed as soon as a burst is on its way, at several moments."""
        companion = self.companion()
        vm = self.hold(companion)
        for _ in range(5):
            vm.ask("b", r"BURST sent n=\d+")
            companion.kill()
            self.assertFalse(companion.alive())
            companion.start()
            match = vm.expect(BURST, 120)
            self.assert_matches(match, dup=0, missing=0, other=0, unlocked=0)
            self.assertGreater(int(match.group("ok")), 0)
            self.attack(vm)
        self.finish(vm)

    def test_kill_before_a_burst(self):
        """Requests of a guest that knows nothing of the death wait."""
        companion = self.companion()
        vm = self.hold(companion)
        companion.kill()
        vm.ask("b", r"BURST sent n=\d+")
        self.attack_silence(vm)
        companion.start()
        match = vm.expect(BURST, 120)
        self.assert_matches(match, dup=0, missing=0, other=0, unlocked=0)
        self.finish(vm)

    def attack_silence(self, vm):
        """Nobody answers a request while there is no companion. QEMU itself
        goes on: its monitor answers."""
        for _ in range(20):
            self.assertEqual(vm.status(), "running")
        self.assertNotIn("BURST ok", vm.console.text())

    def test_stop_and_cont(self):
        vm = self.hold(self.companion())
        for _ in range(3):
            vm.ask("b", r"BURST sent n=\d+")
            vm.qmp.command("stop")
            self.assertEqual(vm.status(), "paused")
            vm.qmp.command("cont")
            match = vm.expect(BURST, 120)
            self.assert_matches(match, dup=0, missing=0, other=0, unlocked=0)
        self.attack(vm)
        self.finish(vm)

    def test_companion_restarts_while_stopped(self):
        companion = self.companion()
        vm = self.hold(companion)
        vm.qmp.command("stop")
        companion.kill()
        companion.start()
        vm.qmp.command("cont")
        self.attack(vm)
        self.assert_matches(vm.ask("l", r"LOCK (?P<status>\d+) held"), status=0)
        self.finish(vm)

    def test_system_reset_clears_and_the_guest_locks_again(self):
        companion = self.companion()
        vm = self.hold(companion)
        generation = int(self.locked.group("generation"))
        vm.ask("l", r"LOCK 0 held")
        for _ in range(2):
            vm.qmp.command("system_reset")
            again = vm.expect(LOCKED, 60)
            self.assert_matches(again, ranges=1)
            self.assertGreater(int(again.group("generation")), generation)
            generation = int(again.group("generation"))
            self.attack(vm)
        self.assertTrue(companion.alive())
        self.finish(vm)

    def test_system_reset_under_load(self):
        companion = self.companion()
        vm = self.hold(companion)
        vm.ask("b", r"BURST sent n=\d+")
        vm.qmp.command("system_reset")
        self.assert_matches(vm.expect(LOCKED, 60), ranges=1)
        self.attack(vm)
        self.finish(vm)

    def test_system_reset_without_companion(self):
        """The reset clears the locks; the next companion learns of it."""
        companion = self.companion()
        vm = self.hold(companion)
        generation = int(self.locked.group("generation"))
        companion.kill()
        vm.qmp.command("system_reset")
        companion.start()
        again = vm.expect(LOCKED, 60)
        self.assert_matches(again, ranges=1)
        self.assertGreater(int(again.group("generation")), generation)
        self.finish(vm)

    def test_next_vm_with_the_same_companion(self):
        companion = self.companion()
        for _ in range(3):
            vm = self.hold(companion)
            self.attack(vm)
            vm.quit()
        vm = self.hold(companion)
        vm.process.kill()
        vm.wait()
        vm = self.hold(companion)
        self.attack(vm)
        self.finish(vm)
        self.assertEqual(companion.stop(), 0)

    def test_device_reset_keeps_the_lock(self):
        vm = self.hold(self.companion())
        vm.ask("r", r"RESET done")
        self.attack(vm)
        self.assert_matches(vm.ask("c", CONFIG), ranges=1)
        self.finish(vm)


class Walks(GuardTest):
    """The same for requests that take long, and are not begun on the control
    channel.

    :avocado: tags=tcg,kvm
    """

    #: How many wait at once; each is for a page of its own.
    burst = 16

    def hold(self, companion):
        """A VM whose guest waits for what to do."""
        vm = self.bare_metal("kernel-hold", companion, [f"burst={self.burst}"])
        self.generation = int(vm.expect(READY).group("generation"))
        return vm

    def begin(self, vm):
        """Walks are on their way."""
        vm.ask("b", r"WALKS sent n=\d+")

    def answered(self, vm):
        """Each of them once, and its page is locked."""
        self.assert_matches(vm.expect(WALKS, 120), ok=self.burst, dup=0,
                            missing=0, other=0, unlocked=0)

    def finish(self, vm):
        """The guest has nothing to complain about."""
        vm.type("q")
        self.assertEqual(vm.wait(), PASS, vm.console.tail())

    def test_kill_during_walks(self):
        """The next companion begins them anew."""
        companion = self.companion()
        vm = self.hold(companion)
        for _ in range(4):
            self.begin(vm)
            companion.kill()
            companion.start()
            self.answered(vm)
        self.finish(vm)

    def test_stop_and_cont_during_walks(self):
        companion = self.companion()
        vm = self.hold(companion)
        for kill in (False, False, True):
            self.begin(vm)
            vm.qmp.command("stop")
            self.assertEqual(vm.status(), "paused")
            if kill:
                companion.kill()
                companion.start()
            vm.qmp.command("cont")
            self.answered(vm)
        self.finish(vm)

    def test_system_reset_during_walks(self):
        """They end; what they were for is not locked in what comes after."""
        companion = self.companion()
        vm = self.hold(companion)
        for _ in range(3):
            before = self.generation
            self.begin(vm)
            vm.qmp.command("system_reset")
            self.generation = int(vm.expect(READY, 60).group("generation"))
            self.assertGreater(self.generation, before)
            match = vm.ask("c", r"CONFIG generation=(?P<generation>\d+) "
                           r"ranges=(?P<ranges>\d+)")
            self.assert_matches(match, generation=self.generation, ranges=0)
        self.begin(vm)
        self.answered(vm)
        self.assertTrue(companion.alive())
        self.finish(vm)
