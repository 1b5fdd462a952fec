# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the functional tests stand on.

stream.py    bytes that arrive, and waiting for what is expected among them
host.py      where a test's processes run: this machine, or the lab's level 1
agent.py     the lab's agent, as host.py sees it
qmp.py       a QMP client
machine.py   the companion, QEMU with the device, and the guests
case.py      the base class of the tests

The same test class runs on this machine (TCG, or KVM where there is one) and
in the lab (stock kvm_amd), because it only speaks to a Host.
"""
