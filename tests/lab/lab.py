#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The KVM lab: a stock Debian kernel with its own kvm_amd, on any machine.

QEMU's TCG emulates AMD SVM with nested paging. Level 1 is a stock Debian cloud
kernel under TCG; level 2, started inside it, is the patched QEMU with `-accel
kvm`, the companion and a guest. This file packs level 1's initramfs and boots
it; it knows nothing of tests. They reach level 1 through the agent (agent.c),
which serves each of PORTS virtio-serial ports, one client at a time.

    lab.py shell        boot, with level 1's console on this terminal
    lab.py boot         boot, print the directory for VHOST_GUARD_LAB, and keep
                        it up until interrupted

Environment: VHOST_GUARD_QEMU, VHOST_GUARD_BIN, VHOST_GUARD_EMBEDDED,
VHOST_GUARD_LAB_KERNEL (a name that tests/linux/kernels.py knows; default
6.12-cloud).
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
sys.path.insert(0, str(REPO / "tests" / "linux"))
import kernels  # noqa: E402  pylint: disable=wrong-import-position

PORTS = 4
MEMORY = "3072"
KERNEL = os.environ.get("VHOST_GUARD_LAB_KERNEL", "6.12-cloud")
KVM_MODULES = ["kvm-amd"]
FIRMWARE_DIRS = [Path("/usr/share/seabios"), Path("/usr/share/qemu")]
FIRMWARE = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin",
            "qboot.rom"]


class LabError(Exception):
    """The lab did not come up, and why."""


# ------------------------------------------------------------------ initramfs

def stored_name(path):
    """Where a file of the host lies in level 1: by content, so that a file
    that was packed at boot needs no upload, and a changed one is another."""
    path = Path(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return f"/vg/files/{digest}-{path.name}"


def shared_libraries(program):
    """The libraries and the loader that `program` needs."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        return []                         # static
    missing = re.findall(r"(\S+) => not found", done.stdout)
    if missing:
        raise LabError(f"{program} needs {', '.join(missing)}")
    return re.findall(r"(/\S+) \(0x", done.stdout)


def build_agent():
    """The agent, compiled into the cache."""
    source = HERE / "agent.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    final = kernels.cache_dir() / "lab" / f"agent-{digest}"
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = final.with_name(f".{final.name}-{os.getpid()}")
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-static", "-o",
                        scratch, source], check=True)
        os.rename(scratch, final)
    return final


class Image:
    """Level 1's initramfs."""

    def __init__(self, kernel):
        self.cpio = kernels.Cpio()
        self.seen = set()
        for name in ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc",
                     "sys", "tmp", "etc", "vg",
                     "vg/bin", "vg/files", "vg/guests", "vg/linux",
                     "vg/firmware", "lib", "lib/modules"):
            self.directory(name)
        self.cpio.add("dev/console", 0o020600, rdev=(5, 1))
        self.file("bin/busybox", kernels.busybox())
        self.symlink("bin/sh", "busybox")
        self.file("init", HERE / "init")
        self.file("etc/motd", HERE / "motd", 0o644)
        self.cpio.file("etc/profile", b"export QEMU_DIRS='-L /vg/firmware' "
                       b"PS1='lab# '\nstty rows 50 cols 120\n", 0o644)
        self.file("vg/bin/agent", build_agent())
        modules = kernels.with_dependencies(kernel, KVM_MODULES)
        if not modules:
            raise LabError(f"{kernel.release} has no kvm-amd module")
        for name, (data, _) in modules.items():
            self.cpio.file(f"lib/modules/{name}.ko", data, 0o644)
        self.cpio.file("etc/modules", "\n".join(modules).encode() + b"\n",
                       0o644)
        for name in FIRMWARE:
            for directory in FIRMWARE_DIRS:
                if (directory / name).exists():
                    self.file(f"vg/firmware/{name}", directory / name, 0o644)
                    break

    def directory(self, name):
        """A directory and its parents, once."""
        parts = name.split("/")
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end])
            if path not in self.seen:
                self.seen.add(path)
                self.cpio.directory(path)

    def file(self, name, source, mode=0o755):
        """A file of the host, once."""
        if name not in self.seen:
            self.directory(os.path.dirname(name) or "dev")
            self.seen.add(name)
            self.cpio.file(name, Path(source).read_bytes(), mode)

    def symlink(self, name, target):
        """A symbolic link."""
        self.seen.add(name)
        self.cpio.symlink(name, target)

    def store(self, path, link):
        """A file where Host.put() of the tests looks for it, with the
        libraries that it needs, and a link for people."""
        path = Path(path)
        stored = stored_name(path)
        executable = os.access(path, os.X_OK)
        self.file(stored.lstrip("/"), path, 0o755 if executable else 0o644)
        if link not in self.seen:
            self.symlink(link, stored)
        if executable and path.read_bytes()[:4] == b"\x7fELF":
            for library in shared_libraries(path):
                self.file(library.lstrip("/"), library)


# ------------------------------------------------------------------------ lab

def qemu_path():
    """The patched QEMU, built if need be."""
    given = os.environ.get("VHOST_GUARD_QEMU")
    if given:
        return Path(given)
    done = subprocess.run([REPO / "qemu-patches" / "build"], check=True,
                          stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.splitlines()[-1])


def companion_path():
    """The companion; `make build` makes it."""
    return Path(os.environ.get("VHOST_GUARD_BIN",
                               REPO / "target" / "release" / "vhost-guard"))


def embedded_path():
    """The library's own VMM; `make embedded` makes it."""
    return Path(os.environ.get("VHOST_GUARD_EMBEDDED", REPO / "target" /
                               "release" / "examples" / "embedded"))


def firmware_arguments():
    """-L for QEMU on the host."""
    return [word for path in FIRMWARE_DIRS for word in ("-L", str(path))]


def default_files():
    """What tests use inside: (file, link for people)."""
    files = [(qemu_path(), "vg/bin/qemu-system-x86_64")]
    for path, link in ((companion_path(), "vg/bin/vhost-guard"),
                       (embedded_path(), "vg/bin/embedded")):
        if path.exists():
            files.append((path, link))
    for elf in sorted((REPO / "build" / "guests").glob("*.elf")):
        files.append((elf, f"vg/guests/{elf.name}"))
    return files


def linux_files():
    """The level 2 Linux guest."""
    guest = kernels.guest("6.12-cloud")
    return [(guest.vmlinuz, "vg/linux/vmlinuz"),
            (guest.initramfs, "vg/linux/initramfs")]


class Lab:
    """A booted level 1. `directory` holds port-N (sockets), console.log."""

    def __init__(self, files):
        # Socket paths have 108 bytes: not below the checkout.
        self.directory = Path(tempfile.mkdtemp(prefix="vg-lab-"))
        self.kernel = kernels.fetch(KERNEL)
        self.files = files
        self.process = None

    def pack(self):
        """Write the initramfs."""
        image = Image(self.kernel)
        for path, link in self.files:
            image.store(path, link)
        (self.directory / "initramfs").write_bytes(image.cpio.finish())

    def command(self, append):
        """QEMU's command line for level 1."""
        program = os.environ.get("VHOST_GUARD_LEVEL1_QEMU") or qemu_path()
        return [str(program), *firmware_arguments(),
                "-accel", "tcg,thread=multi", "-cpu", "EPYC-v4,+svm,+npt",
                "-smp", "2", "-m", MEMORY, "-machine", "q35",
                "-nodefaults", "-no-user-config", "-display", "none",
                "-no-reboot", "-kernel", str(self.kernel.vmlinuz),
                "-initrd", str(self.directory / "initramfs"),
                "-append", f"console=ttyS0 quiet panic=-1 {append}"]

    def boot(self):
        """Start level 1; it is up when the agent answers on a port."""
        self.pack()
        command = self.command(f"vg.ports={PORTS}")
        command += ["-serial", f"file:{self.directory}/console.log",
                    "-device", "virtio-serial-pci,max_ports=31"]
        for n in range(PORTS):
            command += ["-chardev", f"socket,id=c{n},server=on,wait=off,"
                        f"path={self.directory}/port-{n}", "-device",
                        f"virtserialport,chardev=c{n},nr={n + 1},name=vg.{n}"]
        with open(self.directory / "qemu.log", "wb") as log:
            # setpriv: level 1 ends with the process that booted it.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def check(self):
        """Raise if level 1 is gone."""
        if self.process.poll() is not None:
            raise LabError(f"level 1 ended, status {self.process.returncode}:\n"
                           + self.logs())

    def logs(self):
        """What QEMU and level 1's console said."""
        text = ""
        for name in ("qemu.log", "console.log"):
            with contextlib.suppress(OSError):
                text += (self.directory / name).read_text(errors="replace")
        return text

    def close(self):
        """Stop level 1 and remove its directory."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def shell(self):
        """Level 1 on this terminal."""
        self.pack()
        return subprocess.run(self.command("vg.shell") + [
            "-chardev", "stdio,mux=on,id=con,signal=off", "-serial",
            "chardev:con", "-monitor", "chardev:con"], check=False).returncode


def main():
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description="The KVM lab")
    parser.add_argument("what", choices=["shell", "boot"])
    args = parser.parse_args()
    lab = None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        files = default_files() + linux_files()
        lab = Lab(files)
        if args.what == "shell":
            return lab.shell()
        started = time.monotonic()
        lab.boot()
        while "lab: " not in lab.logs():
            lab.check()
            time.sleep(0.1)
        print(f"level 1 is up after {time.monotonic() - started:.0f} s",
              file=sys.stderr)
        print(f"export VHOST_GUARD_LAB={lab.directory}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            lab.process.wait()
        return 0
    except (LabError, kernels.KernelError) as err:
        print(f"lab: {err}", file=sys.stderr)
        return 1
    finally:
        if lab:
            lab.close()


if __name__ == "__main__":
    sys.exit(main())
