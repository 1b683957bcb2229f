"""What the lab host is made of, from the distribution's own packages: QEMU to emulate it, the kernel it boots.

The kernel is the one that ovt boots guests with, from the same cache. QEMU is installed by apt from the same suites:
Debian 13 has a new enough one, Debian 12 in backports.

    packages.py qemu      install QEMU (as root; nothing to do where it is new enough)
    packages.py kernel    fetch the kernel into the cache and print its version
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # by scripts/setup with an isolated Python, before there is a virtual environment
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ovt.errors import OvtError
from ovt.image.kernel import Kernel, apt, cache, cached, depmod, download, get, locked, suites, update

__all__ = ["QEMU", "Kernel", "Unavailable", "cache", "cached", "depmod", "download", "kernel", "locked", "update"]

QEMU = "qemu-system-x86_64"
QEMU_OLDEST = (8, 0)  # the first with igb, a NIC with SR-IOV
QEMU_PACKAGES = ("qemu-system-x86", "qemu-utils")

Unavailable = OvtError  # the lab cannot be had on this machine; the message says why and what to do


def qemu_version() -> tuple[int, int] | None:
    """The version of the installed QEMU, None where there is none."""
    program = shutil.which(QEMU)
    if program is None:
        return None
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", words)
    return (int(found[1]), int(found[2])) if found else None


def require_qemu() -> str:
    """The path of a QEMU that can emulate the lab host."""
    version = qemu_version()
    if version is None or version < QEMU_OLDEST:
        had = "there is none" if version is None else f"this one is {version[0]}.{version[1]}"
        raise Unavailable(f"the lab needs {QEMU} {QEMU_OLDEST[0]} or newer and {had}: run scripts/setup --test")
    program = shutil.which(QEMU)
    assert program
    return program


def install_qemu() -> None:
    version = qemu_version()
    if version and version >= QEMU_OLDEST and shutil.which("qemu-img"):
        return
    command = f"apt-get install -t {suites()[-1]} {' '.join(QEMU_PACKAGES)}"
    if os.geteuid():
        raise Unavailable(f"QEMU is missing or too old and this is not root; as root: {command}")
    print(f"setup: installing Debian packages from {suites()[-1]}: {' '.join(QEMU_PACKAGES)}", file=sys.stderr)
    with locked("kernel"):
        update()
    apt("apt-get", "install", "-y", "--no-install-recommends", *QEMU_PACKAGES)


def kernel() -> Kernel:
    """The lab's kernel, fetched if the cache has none. Raises Unavailable."""
    try:
        return get(lambda line: print(f"lab: {line}", file=sys.stderr))
    except OvtError as error:
        raise Unavailable(f"{error}\n  try: {error.hint}") from error
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the lab's kernel cannot be had: {error}") from error


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["qemu"]:
            install_qemu()
        elif arguments == ["kernel"]:
            print(kernel().version)
        else:
            print("usage: packages.py qemu | kernel", file=sys.stderr)
            return 2
    except Unavailable as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
