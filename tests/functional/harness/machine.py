# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The companion, QEMU with the device, and what the guests say.

Each class runs one program on a Host and turns what it says into something
to wait for. None of them knows which host it is.
"""

import functools
import json
import re
import signal
import sys

from . import qmp as monitor
from .host import REPO, lab
from .stream import Ended

sys.path.insert(0, str(REPO / "tests" / "linux"))
import kernels  # noqa: E402  pylint: disable=wrong-import-position

GUEST_ELF = REPO / "build" / "guests" / "guard-guest.elf"
#: What the bare-metal guest's verdict is as an exit status of QEMU.
PASS, FAIL, SKIP = 33, 35, 37


@functools.lru_cache
def linux_guest(kernel):
    """Image and initramfs of a Debian kernel."""
    return kernels.guest(kernel)


class Companion:
    """One vhost-guard process; `options` are more of its command line."""

    def __init__(self, host, directory, name="companion", options=()):
        self.host = host
        self.name = name
        self.socket = f"{directory}/guard"
        self.control = f"{directory}/guard.ctl"
        self.options = list(options)
        self.process = None
        self.generation = 0

    @property
    def log(self):
        """Its standard error, a Stream."""
        return self.process.stderr

    def spawn(self):
        """Start it. It may have something to say instead of listening."""
        self.generation += 1
        self.process = self.host.spawn(
            [self.host.put(lab.companion_path()), "--socket-path", self.socket,
             "--control-path", self.control, "--log-level", "info",
             *self.options], name=f"{self.name}-{self.generation}")
        return self

    def start(self):
        """Start it and wait until it listens."""
        self.spawn()
        self.log.expect("listening", 30 * self.host.patience)
        return self

    def show(self):
        """What `vhost-guard show --json` says."""
        return json.loads(self.host.run(
            [self.host.put(lab.companion_path()), "show", "--json",
             "--socket-path", self.socket])[1])

    def kill(self):
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait(10 * self.host.patience)

    def stop(self):
        """SIGTERM; returns its exit status."""
        self.process.kill(signal.SIGTERM)
        return self.process.wait(10 * self.host.patience)

    def alive(self):
        """Does it run?"""
        return self.process.poll() is None

    def show(self):
        """What it knows of the VM and of violations, as `show --json`."""
        _, out, _ = self.host.run([self.host.put(lab.companion_path()), "show",
                                   "--json", "--socket-path", self.socket])
        return json.loads(out)


class Booted:
    """A VM on a host: a process with the guest's serial line on its standard
    input and output."""

    def __init__(self, host, name, command):
        self.host = host
        self.name = name
        self.process = host.spawn(command, name=name)

    @property
    def console(self):
        """The guest's serial line, a Stream."""
        return self.process.stdout

    @property
    def log(self):
        """The process's standard error, a Stream."""
        return self.process.stderr

    def type(self, text):
        """Bytes on the guest's serial line."""
        self.process.send(text.encode())

    def ask(self, text, answer, deadline=60):
        """Type, then wait for the answer on the console."""
        self.type(text)
        return self.expect(answer, deadline)

    def expect(self, pattern, deadline=60):
        """Wait for a line of the guest. If the VM ended, say how."""
        try:
            return self.console.expect(pattern, deadline * self.host.patience)
        except Ended as err:
            status = self.process.wait(10)
            raise Ended(f"{self.name} ended with status {status}; stderr:\n"
                        f"{self.log.tail()}\n{err}") from None

    def wait(self, deadline=60):
        """Wait for the process's end; returns its exit status."""
        return self.process.wait(deadline * self.host.patience)

    def alive(self):
        """Does it run?"""
        return self.process.poll() is None


class Vm(Booted):
    """One QEMU with the guard device. `extra` is added to the command line."""

    count = 0

    def __init__(self, host, accel, directory, extra=(), *, companion=None,
                 control=None, policy="inject", fault="gp", memory=256, smp=1,
                 machine="q35", bios="qboot.rom", cpu=None, reboot=True,
                 device="vhost-user-guard-pci"):
        Vm.count += 1
        name = f"vm-{Vm.count}"
        self._qmp_path = f"{directory}/{name}.qmp"
        command = [host.put(lab.qemu_path()), *host.firmware_arguments(),
                   "-accel", accel, "-smp", str(smp), "-m",
                   str(memory), "-object", "memory-backend-memfd,id=ram,"
                   f"size={memory}M,share=on", "-machine",
                   f"{machine},memory-backend=ram", "-nodefaults",
                   "-no-user-config", "-display", "none", "-serial", "stdio",
                   "-qmp", f"unix:{self._qmp_path},server=on,wait=off"]
        if cpu:
            command += ["-cpu", cpu]
        if bios:
            command += ["-bios", bios]
        if not reboot:
            command += ["-no-reboot"]
        if companion:
            command += self.guard_arguments(companion.socket,
                                            control or companion.control,
                                            policy, fault, device)
        super().__init__(host, name, [*command, *extra])
        self._qmp = None

    @staticmethod
    def guard_arguments(socket, control, policy, fault="gp",
                        device="vhost-user-guard-pci"):
        """The feature's flags."""
        return ["-chardev", f"socket,id=guard,path={socket},reconnect-ms=100",
                "-chardev",
                f"socket,id=guardctl,path={control},reconnect-ms=100",
                "-object",
                f"vm-guard,id=guard0,chardev=guardctl,on-violation={policy}"
                + (f",fault={fault}" if fault != "gp" else ""),
                "-device", f"{device},chardev=guard,guard=guard0"]

    @property
    def qmp(self):
        """The monitor, connected at first use."""
        if self._qmp is None:
            self._qmp = monitor.Qmp(
                self.host.connect(self._qmp_path, f"{self.name}-qmp"),
                self.host.patience)
        return self._qmp

    def connect(self):
        """Connect the monitor now, so that no event is missed."""
        return self.qmp

    def status(self):
        """The VM's run state."""
        return self.qmp.command("query-status")["status"]

    def quit(self):
        """Ask QEMU to end."""
        try:
            self.qmp.command("quit")
        except Ended:
            pass
        return self.wait(20)


class Embedded(Booted):
    """The library's own VMM (examples/embedded) with one test of the
    bare-metal guest: the device is in its process, there is no QEMU."""

    #: Its exit status, in words.
    PASS, FAIL, ERROR, SKIP, PAUSED, SHUTDOWN = range(6)

    count = 0

    def __init__(self, host, test, words=(), *, policy="inject", cpus=1,
                 memory=256):
        Embedded.count += 1
        append = " ".join([f"test={test}",
                           f"timeout={int(60 * host.patience)}", *words])
        super().__init__(host, f"embedded-{Embedded.count}", [
            host.put(lab.embedded_path()), "--on-violation", policy,
            "--cpus", str(cpus), "--memory", str(memory),
            host.put(GUEST_ELF), append])


def bare_metal_arguments(host, test, policy, fault, accel, words=()):
    """QEMU's arguments for one test of the bare-metal guest."""
    append = " ".join([f"test={test}", f"policy={policy}", f"fault={fault}",
                       f"accel={accel}",
                       f"timeout={int(60 * host.patience)}", *words])
    return ["-device", "isa-debug-exit,iobase=0xf4,iosize=1",
            "-kernel", host.put(GUEST_ELF), "-append", append]


def linux_arguments(host, kernel, words):
    """QEMU's arguments for the Linux guest; `words` for its command line."""
    guest = linux_guest(kernel)
    return ["-kernel", host.put(guest.vmlinuz),
            "-initrd", host.put(guest.initramfs),
            "-append", "console=ttyS0 quiet panic=-1 no_timer_check " +
            " ".join(words)]


def linux_results(text):
    """(ok, not ok, skipped) names among a Linux guest's console lines."""
    return tuple(re.findall(rf"^guard-test: {kind} - (.*?)\r?$", text, re.M)
                 for kind in ("ok", "not ok", "skip"))
