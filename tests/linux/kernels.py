#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian kernels as test guests: packages, modules, initramfs.

Fetches a stock Debian kernel and the headers that belong to it with the apt
of this machine, builds the guest driver and the attack module against it, and
packs an initramfs whose /init runs one scenario of tests/linux/init.

Nothing is installed and no root is needed: packages are unpacked below
$VHOST_GUARD_CACHE (default ~/.cache/vhost-guard).  Results are put in place by
rename, under a lock, so that several test runs can share the cache.

    kernels.py list                     kernels that apt offers with headers
    kernels.py fetch     6.12-cloud     unpack image and headers
    kernels.py modules   6.12-cloud     ... and build the modules
    kernels.py initramfs 6.12-cloud     ... and pack the initramfs

A kernel is named by series and flavour ("6.1-cloud", "6.12-cloud", "6.12"),
which means the newest that apt has, or by its exact release
("6.1.0-56-cloud-amd64").  The last line on standard output is a JSON object
with what was asked for; everything else goes to standard error.

From a test:

    import kernels
    guest = kernels.guest("6.12-cloud")
    # guest.release, guest.vmlinuz, guest.initramfs
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent

# A package that apt lists may be gone from the mirror; do not try for ever.
MAX_CANDIDATES = 3

# In the initramfs besides the modules under test: what brings up virtio-pci
# where it is not built in, and two small ones for the "work" scenario.
BASE_MODULES = ["virtio_pci"]
WORK_MODULES = ["dummy", "tun"]


class KernelError(Exception):
    """What went wrong and, where there is one, what to do about it."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: image, modules and headers of one release."""

    release: str
    root: Path

    @property
    def vmlinuz(self):
        """The bzImage."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def headers(self):
        """The directory for `make -C`."""
        return self.root / "usr/src" / f"linux-headers-{self.release}"

    @property
    def module_dir(self):
        """lib/modules/<release> of the image package."""
        return self.root / "lib/modules" / self.release


@dataclasses.dataclass(frozen=True)
class Guest:
    """All that a test gives to QEMU."""

    release: str
    vmlinuz: Path
    initramfs: Path


def log(message):
    """Progress, on standard error."""
    print(f"kernels: {message}", file=sys.stderr, flush=True)


def cache_dir():
    """Where everything is kept between runs."""
    path = os.environ.get("VHOST_GUARD_CACHE")
    if not path:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "vhost-guard"
    path = Path(path).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(name):
    """Hold the cache-wide lock `name`; waits for another run to finish."""
    with open(cache_dir() / f".{name}.lock", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def built_into(final):
    """A directory to work in that becomes `final` only if all went well."""
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
    try:
        yield work
        work.chmod(0o755)
        os.rename(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(argv, **kwargs):
    """Run a command; its output is shown only if it fails."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True,
                              errors="replace", check=False, **kwargs)
    except FileNotFoundError as err:
        raise KernelError(f"{argv[0]} is not installed") from err
    if done.returncode:
        line = " ".join(str(word) for word in argv)
        raise KernelError(f"{line}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


# ---------------------------------------------------------------- packages

def natural(text):
    """Sort key: 6.12.9 before 6.12.10."""
    return [int(part) if part.isdigit() else part
            for part in re.split(r"(\d+)", text)]


def releases_in_apt():
    """Releases with both image and headers, newest first."""
    def names(prefix):
        out = run(["apt-cache", "search", "--names-only", f"^{prefix}-[0-9]"])
        found = re.findall(rf"^{prefix}-(\S+) - ", out, re.MULTILINE)
        # linux-headers-6.12-amd64 and such are meta packages.
        return {name for name in found
                if re.fullmatch(r"\d+\.\d+\.\S*-(cloud-)?amd64", name)
                and "-rt-" not in name}

    both = names("linux-image") & names("linux-headers")
    return sorted(both, key=natural, reverse=True)


def matches(release, wanted):
    """Does `release` answer to the name `wanted`?"""
    if release == wanted:
        return True
    parts = re.fullmatch(r"(\d+\.\d+)(-cloud)?", wanted)
    if not parts:
        return False
    cloud = release.endswith("-cloud-amd64")
    return (release.startswith(parts.group(1) + ".")
            and cloud == bool(parts.group(2)))


def packages_of(release):
    """Image, headers, and the two packages that the headers stand on."""
    headers = f"linux-headers-{release}"
    depends = run(["apt-cache", "depends", headers])
    needed = re.findall(r"Depends: (linux-(?:headers|kbuild)-\S+)", depends)
    return [f"linux-image-{release}", headers, *needed]


def download(packages, into):
    """`apt-get download`, which checks signatures, then unpack."""
    with tempfile.TemporaryDirectory(dir=into.parent) as debs:
        run(["apt-get", "download", *packages], cwd=debs)
        for deb in sorted(Path(debs).glob("*.deb")):
            run(["dpkg", "-x", deb, into])


def make_relocatable(kernel, release):
    """Header packages include /usr/src/...-common/Makefile by full path."""
    makefile = kernel / "usr/src" / f"linux-headers-{release}" / "Makefile"
    here = "$(dir $(realpath $(lastword $(MAKEFILE_LIST))))"
    text = makefile.read_text(encoding="utf-8")
    makefile.write_text(text.replace("include /usr/src/",
                                     f"include {here}../"), encoding="utf-8")


def cached_releases():
    """Releases already unpacked, newest first."""
    found = (path.name for path in (cache_dir() / "kernels").glob("[0-9]*"))
    return sorted(found, key=natural, reverse=True)


def fetch(wanted):
    """The newest kernel that answers to `wanted`, unpacked."""
    with locked("kernels"):
        base = cache_dir() / "kernels"
        try:
            offered = releases_in_apt()
        except KernelError as err:
            log(err)
            offered = []
        candidates = [rel for rel in offered if matches(rel, wanted)]
        for release in candidates[:MAX_CANDIDATES]:
            if not (base / release).is_dir():
                log(f"fetching Linux {release} and its headers")
                try:
                    with built_into(base / release) as work:
                        download(packages_of(release), work)
                        make_relocatable(work, release)
                except KernelError as err:
                    log(err)
                    continue
            return Kernel(release, base / release)
        for release in cached_releases():
            if matches(release, wanted):
                log(f"apt has no {wanted} kernel; using {release} of the cache")
                return Kernel(release, base / release)
    raise KernelError(
        f"no kernel {wanted}: apt offers no image with matching headers that "
        "can be downloaded, and none is cached (try `apt-get update`)")


# ----------------------------------------------------------------- modules

def is_source(path):
    """What a build reads, as against what one left lying around."""
    return path.name in ("Kbuild", "Makefile") or path.suffix in (".c", ".h", ".S")


def copy_sources(source, target):
    """Copy `source` without build products."""
    for file in sorted(source.rglob("*")):
        if file.is_file() and is_source(file) and ".mod." not in file.name:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def kernel_make(kernel, directory):
    """Build the module in `directory`; warnings are errors."""
    argv = ["make", "-s", "-C", kernel.headers, f"M={directory}", "W=1",
            "KCFLAGS=-Werror",
            # The headers' vmlinux is BTF only, and pahole may be missing.
            "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]
    if not shutil.which("x86_64-linux-gnu-gcc-12"):
        argv.insert(1, "CC=gcc")
    env = {k: v for k, v in os.environ.items()
           if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    run(argv, env=env)


def build_modules(kernel):
    """The driver, the modules of the tests, guardtest and compat; returns
    their directory."""
    sources = {"guest-driver": REPO / "guest-driver",
               "attack": HERE / "attack", "ptdump": HERE / "ptdump",
               "guardtest": HERE / "guardtest"}
    with tempfile.TemporaryDirectory() as clean:
        # Hash what would be built, not what an earlier build left.
        digest = hashlib.sha256()
        for name, source in sources.items():
            copy_sources(source, Path(clean) / name)
        for file in sorted(Path(clean).rglob("*")):
            if file.is_file():
                digest.update(str(file.relative_to(clean)).encode() + b"\0")
                digest.update(file.read_bytes() + b"\0")
        digest.update(Path(__file__).read_bytes())
    final = cache_dir() / "modules" / f"{kernel.release}-{digest.hexdigest()[:16]}"
    with locked("modules"):
        if final.is_dir():
            return final
        log(f"building modules for Linux {kernel.release}")
        with built_into(final) as work:
            for name, source in sources.items():
                copy_sources(source, work / name)
            for name in ("guest-driver", "attack", "ptdump"):
                kernel_make(kernel, work / name)
            for module in ("guest-driver/virtio_guard.ko", "attack/attack.ko",
                           "attack/attack_msr.ko", "ptdump/ptdump.ko"):
                shutil.copyfile(work / module, work / Path(module).name)
                run(["strip", "-g", work / Path(module).name])
            run(["gcc", "-static", "-O1", "-Wall", "-Wextra", "-Werror",
                 "-I", work / "guest-driver/include/uapi",
                 "-o", work / "guardtest/guardtest",
                 *sorted((work / "guardtest").glob("*.c"))])
            # No C library: none of 32 bits may be there.
            run(["gcc", "-m32", "-nostdlib", "-static", "-no-pie",
                 "-o", work / "guardtest/compat",
                 work / "guardtest/compat.S"])
    return final


def build_guardctl():
    """guardctl, the program for the guest; returns its file. Cargo's directory
    stays, so that a change does not build its dependencies anew."""
    source = REPO / "guest-driver"
    digest = hashlib.sha256()
    for file in (REPO / "Cargo.lock", source / "Makefile",
                 *sorted((source / "guardctl").rglob("*"))):
        if file.suffix in (".rs", ".toml", ".lock") or file.name == "Makefile":
            digest.update(str(file.relative_to(REPO)).encode() + b"\0")
            digest.update(file.read_bytes() + b"\0")
    base = cache_dir() / "guardctl"
    final = base / digest.hexdigest()[:16]
    with locked("guardctl"):
        if not final.is_dir():
            log("building guardctl")
            env = {k: v for k, v in os.environ.items()
                   if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
            run(["make", "-s", "-C", source, "guardctl"],
                env={**env, "CARGO_TARGET_DIR": str(base / "target")})
            with built_into(final) as work:
                shutil.copy2(base / "target/x86_64-unknown-linux-gnu/release"
                             / "guardctl", work)
    if not is_static(final / "guardctl"):
        raise KernelError(f"{final}/guardctl is not static")
    return final / "guardctl"


# --------------------------------------------------------------- initramfs

def module_file(kernel, name):
    """The file of module `name`, or None when it is built in."""
    pattern = re.compile(name.replace("_", "[-_]") + r"\.ko(\.xz)?")
    for path in (kernel.module_dir / "kernel").rglob("*.ko*"):
        if pattern.fullmatch(path.name):
            return path
    return None


def module_bytes(path):
    """The module, uncompressed."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def with_dependencies(kernel, names):
    """name -> (bytes, names it depends on), dependencies before users."""
    result = {}

    def visit(name):
        if name in result:
            return
        path = module_file(kernel, name)
        if path is None:
            return
        data = module_bytes(path)
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        depends = [dep for dep in found.group(1).decode().split(",")
                   if dep] if found else []
        for dependency in depends:
            visit(dependency)
        result[name] = (data, [dep for dep in depends if dep in result])

    for name in names:
        visit(name)
    return result


def is_static(path):
    """An ELF file without a program interpreter."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return False
    phoff, = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    return all(struct.unpack_from("<I", data, phoff + i * size)[0] != 3
               for i in range(count))


def busybox():
    """A static busybox: the installed one, or Debian's busybox-static."""
    installed = shutil.which("busybox")
    if installed and is_static(Path(installed).resolve()):
        return Path(installed).resolve()
    with locked("busybox"):
        final = cache_dir() / "busybox-static"
        if not final.is_dir():
            with built_into(final) as work:
                download(["busybox-static"], work)
    for path in ("usr/bin/busybox", "bin/busybox"):
        if (final / path).is_file():
            return final / path
    raise KernelError(f"no busybox in {final}; remove that directory")


class Cpio:
    """A newc archive, the format of an initramfs; needs no root."""

    def __init__(self):
        self.out = bytearray()
        self.ino = 0

    def add(self, name, mode, data=b"", rdev=(0, 0)):
        """One entry; `mode` with the file type."""
        self.ino += 1
        encoded = name.encode() + b"\0"
        fields = (self.ino, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev,
                  len(encoded), 0)
        self.out += b"070701" + b"".join(b"%08x" % f for f in fields) + encoded
        self.out += b"\0" * (-len(self.out) % 4)
        self.out += data
        self.out += b"\0" * (-len(self.out) % 4)

    def directory(self, name):
        """A directory."""
        self.add(name, 0o040755)

    def file(self, name, data, mode=0o755):
        """A regular file."""
        self.add(name, 0o100000 | mode, data)

    def symlink(self, name, target):
        """A symbolic link."""
        self.add(name, 0o120777, target.encode())

    def finish(self):
        """The archive."""
        self.add("TRAILER!!!", 0)
        return bytes(self.out)


def pack_initramfs(kernel, modules, guardctl):
    """The archive: busybox, /init, the modules, the test programs, guardctl."""
    base = with_dependencies(kernel, BASE_MODULES)
    # Order matters to some: virtio_pci registers drivers as it loads.
    extra = with_dependencies(kernel, WORK_MODULES)
    cpio = Cpio()
    module_dir = f"lib/modules/{kernel.release}"
    for name in ("bin", "sbin", "dev", "proc", "sys", "tmp", "etc", "lib",
                 "lib/modules", module_dir, "guard"):
        cpio.directory(name)
    cpio.add("dev/console", 0o020600, rdev=(5, 1))
    cpio.file("bin/busybox", busybox().read_bytes())
    cpio.symlink("bin/sh", "busybox")
    # The kernel calls /sbin/modprobe itself.
    cpio.symlink("sbin/modprobe", "../bin/busybox")
    cpio.file("init", (HERE / "init").read_bytes())
    for name in ("guardtest", "compat"):
        cpio.file(f"guard/{name}",
                  (modules / "guardtest" / name).read_bytes())
    cpio.file("guard/guardctl", guardctl.read_bytes())
    for name in ("virtio_guard.ko", "attack.ko", "attack_msr.ko", "ptdump.ko"):
        cpio.file(f"guard/{name}", (modules / name).read_bytes(), 0o644)
    deps = []
    for name, (data, depends) in {**base, **extra}.items():
        cpio.file(f"{module_dir}/{name}.ko", data, 0o644)
        deps.append(f"{name}.ko: " + " ".join(f"{d}.ko" for d in depends))
    cpio.file(f"{module_dir}/modules.dep",
              ("\n".join(deps) + "\n").encode(), 0o644)
    cpio.file("etc/modules", "".join(
        f"{name}\n" for name in base).encode(), 0o644)
    return cpio.finish()


def initramfs(kernel, modules):
    """The initramfs for `kernel` with `modules`, built if need be."""
    guardctl = build_guardctl()
    digest = hashlib.sha256()
    for path in (HERE / "init", Path(__file__), busybox(), guardctl):
        digest.update(path.read_bytes())
    final = modules.parent.parent / "initramfs" / (
        f"{modules.name}-{digest.hexdigest()[:16]}.cpio")
    with locked("initramfs"):
        if not final.is_file():
            log(f"packing {final.name}")
            final.parent.mkdir(parents=True, exist_ok=True)
            new = final.with_name(f".new-{os.getpid()}-{final.name}")
            try:
                new.write_bytes(pack_initramfs(kernel, modules, guardctl))
                os.rename(new, final)
            finally:
                new.unlink(missing_ok=True)
    return final


def guest(wanted):
    """Everything for one guest, fetched and built as far as needed."""
    kernel = fetch(wanted)
    modules = build_modules(kernel)
    return Guest(kernel.release, kernel.vmlinuz, initramfs(kernel, modules))


def main():
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        description="Debian kernels as test guests",
        epilog="Kernels: 6.1-cloud, 6.12-cloud, 6.12, or an exact release.")
    parser.add_argument("what", choices=["list", "fetch", "modules", "initramfs"])
    parser.add_argument("kernel", nargs="?", default="6.12-cloud")
    args = parser.parse_args()
    try:
        if args.what == "list":
            result = {"apt": releases_in_apt(), "cached": cached_releases()}
        else:
            kernel = fetch(args.kernel)
            result = {"release": kernel.release, "vmlinuz": str(kernel.vmlinuz),
                      "headers": str(kernel.headers)}
            if args.what != "fetch":
                modules = build_modules(kernel)
                result["modules"] = str(modules)
            if args.what == "initramfs":
                result["initramfs"] = str(initramfs(kernel, modules))
    except KernelError as err:
        print(f"kernels: {err}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
