# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules for MSRs, as the guest sees them: its own tests, each in a VM of its
own. What needs somebody outside the guest is in msr_host.py.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from harness.case import SUITE, BareMetalTest  # noqa: E402


#: The lab's CPU is TCG's. It checks less than a real one what a guest writes,
#: and nested guests hang on it that turn on EFER.SVME. SCE, NXE and FFXSR.
LAB_CPU = ("lax=1", f"efer={0x4801}") if SUITE == "lab" else ()

#: A software KVM has been seen to run a WRMSR again when it has been told of
#: another EFER.NXE, as it is before the instruction ends.
CHECKS = ("again=3221225600",) if SUITE == "kvm" else LAB_CPU


class MsrRules(BareMetalTest):
    """One method for each test of the guest; all have two vCPUs.

    :avocado: disable
    """

    def check(self, test, *words, **options):
        return super().check(test, *words, **{"smp": 2, "deadline": 120,
                                              **options})

    def test_actions(self):
        self.check("msr-actions")

    def test_pin(self):
        self.check("msr-pin", *LAB_CPU)

    def test_kept(self):
        self.check("msr-kept")

    def test_race(self):
        self.check("msr-race", "seconds=15", deadline=240)

    def test_protect(self):
        self.check("msr-protect")

    def test_nospc(self):
        self.check("msr-nospc")


class MsrInject(MsrRules):
    """
    :avocado: tags=tcg,kvm,lab
    """

    policy = "inject"

    def test_checks(self):
        """What a rule lets through is checked as the CPU would."""
        self.check("msr-checks", *CHECKS, deadline=240)

    def test_toggle(self):
        self.check("msr-toggle", "seconds=15", deadline=240)

    def test_errors(self):
        self.check("msr-errors")

    def test_query(self):
        self.check("msr-query")

    def test_bitmap(self):
        self.check("msr-bitmap")

    def test_many(self):
        """As many rules as a request can have."""
        self.check("msr-many")


class MsrDrop(MsrRules):
    """A denied write is skipped, a denied read faults.

    :avocado: tags=tcg,kvm,lab
    """

    policy = "drop"
