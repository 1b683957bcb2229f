"""A small Linux guest inside the lab host: the lab host's own kernel, busybox, one script, and away with it.

It proves that the lab host can have guests and give devices to them. It is not how this project runs guests, and shares
nothing with the code that does.
"""

import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab import initramfs
from tests.lab.packages import QEMU, Kernel

MEMORY = 192  # MiB; all of it is mapped for a device's DMA where one is passed through
# In the lab host a guest's timer in TSC-deadline mode never fires, and the guest would sleep for ever.
CPU = "host,tsc-deadline=off"
# Every exit to QEMU is dear here. pci=lastbus=0: else the kernel asks for the 8192 devices of 256 buses, one exit each,
# which is half of the boot. The rest spares it calibration, self-tests and the search for an address of its own.
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 oops=panic pci=lastbus=0 mitigations=off tsc=reliable no_timer_check nokaslr audit=0 "
    "cryptomgr.notests nowatchdog"
)
INIT = """#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
. /modules
{script}
echo {end}
sleep 3600
"""
END = "guest: the script has ended"


class GuestFailed(Exception):
    """The guest did not run its script to the end; the message ends with its console."""

    def __init__(self, what: str, console: str) -> None:
        lines = console.splitlines()[-60:]
        super().__init__("\n".join([f"guest: {what}", "--- its console:", *lines, "--- end of its console"]))


def running_kernel() -> Kernel:
    """The kernel that runs here. The mount table says which directory of the cache its modules are bound from."""
    version = os.uname().release
    modules = os.path.realpath(f"/lib/modules/{version}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        source, target = line.split()[3:5]
        if target == modules:
            return Kernel(version, Path(source.removesuffix(f"/lib/modules/{version}")))
    raise FileNotFoundError(f"nothing is mounted on {modules}: this is no lab host")


def boot(script: str, *, devices: Sequence[str] = (), modules: Sequence[str] = (), timeout: float = 90) -> str:
    """Boot a guest, load `modules` in it, run `script` by busybox's shell and return what it printed.

    `devices` are values of QEMU's -device. It is never emulated: inside an emulated host that takes a quarter of an
    hour. Raises GuestFailed.
    """
    kernel = running_kernel()
    init = INIT.format(script=script, end=END)
    initrd = os.memfd_create("initrd")
    with os.fdopen(initrd, "wb") as file:
        file.write(initramfs.with_busybox(init, kernel, list(modules)))
        file.flush()
        command = [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-machine", "q35,hpet=off", "-accel", "kvm", "-cpu", CPU, "-m", f"{MEMORY}M"),
            *("-kernel", str(kernel.vmlinux), "-initrd", f"/proc/self/fd/{initrd}", "-append", COMMAND_LINE),
            *(word for device in devices for word in ("-device", device)),
        ]
        with subprocess.Popen(
            command,
            pass_fds=[initrd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as qemu:
            try:
                return watch(qemu, timeout)
            finally:
                qemu.kill()  # it has nothing to lose, and a shutdown costs more than this


def watch(qemu: subprocess.Popen[bytes], timeout: float) -> str:
    """What the guest says on its console before END."""
    assert qemu.stdout
    console = b""
    deadline = time.monotonic() + timeout
    while END.encode() not in console:
        if not select.select([qemu.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise GuestFailed(f"its script has not ended after {timeout:.0f} s", text(console))
        data = os.read(qemu.stdout.fileno(), 65536)
        if not data:
            raise GuestFailed(f"QEMU ended with status {qemu.wait()}", text(console))
        console += data
    return text(console).partition(END)[0]


def text(console: bytes) -> str:
    return console.decode(errors="replace").replace("\r", "")
