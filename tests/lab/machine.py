"""A lab host as a process: QEMU's argument list, which is a pure function, and the machine that runs with it.

Nothing of it has a name in a file system: the initramfs, the disk and the console's log are memory files, every wire is
a socket pair, all handed to QEMU as descriptors. It dies with the process that started it, even by kill -9.
"""

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import acpi, initramfs
from tests.lab.channel import Channel, Closed, TimedOut
from tests.lab.packages import Kernel, kernel, require_qemu
from tests.lab.taps import taps

ROOT = Path(__file__).resolve().parents[2]
CPUS = {1: 2, 2: 1}
MEMORY = {1: 2304, 2: 768}  # MiB; from about 2750 on QEMU 10 loses the mailbox of igb's virtual functions
QUEUES = 2
NVME_BYTES = 64 << 20
BOOT_SECONDS = 150  # a limit, not an expectation: 6 s on a quiet machine
# Without kaslr the kernel needs no relocation. On a busy machine an emulated timer can be late for the timer check. The
# governor is chosen because a change of frequency makes a kernel that does not know its TSC as constant give it up for
# the HPET, whose every reading leaves the guest.
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 oops=panic intel_iommu=on mitigations=off tsc=reliable nokaslr audit=0 "
    "cryptomgr.notests cpufreq.default_governor=performance rcupdate.rcu_expedited=1 no_timer_check"
)
# An AMD processor, because TCG emulates SVM and not VMX; without what TCG lacks of it, and without MONITOR: the kernel
# would idle in MWAIT, which is a busy loop under TCG, instead of in HLT.
TCG_CPU = "EPYC,monitor=off,fxsr-opt=off,misalignsse=off,osvw=off,topoext=off,nrip-save=off,xsavec=off"
INIT = """#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
. /modules
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /low
mount -t tmpfs up /up; mkdir /up/upper /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work root /new
for d in dev proc sys; do mount -o move /$d /new/$d; done
exec switch_root /new /bin/sh {boot} {kernel} {python} {agent} {root}
"""


# The kernel kills QEMU when the process that started it ends, however it ends; it may have ended before it was asked.
LEASH = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


class Failed(Exception):
    """The lab host crashed, hung or did not boot; the message ends with what its console said."""


@dataclass(frozen=True)
class Wiring:
    """The descriptors that one lab host is given, by what they are for."""

    initrd: int
    table: int
    disk: int
    console: int
    control: int
    wire: int
    cable: int
    taps: list[int] = field(default_factory=list)

    def all(self) -> list[int]:
        return [self.initrd, self.table, self.disk, self.console, self.control, self.wire, self.cable, *self.taps]


def kvm_works() -> bool:
    """Whether /dev/kvm is hardware virtualization: the device alone says nothing, the processor's flags do."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return bool({"vmx", "svm"} & set(flags.split())) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def arguments(qemu: str, image: Kernel, number: int, wiring: Wiring, *, kvm: bool) -> list[str]:
    """QEMU's command line for lab host `number` (1 or 2); CONTRIBUTING.md has a table of what each part emulates."""

    def fd(descriptor: int) -> str:
        return f"/proc/self/fd/{descriptor}"

    accel = ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg,thread=multi", "-cpu", TCG_CPU]
    machine = "q35,kernel-irqchip=split" if kvm else "q35"
    card = f"tap,id=queues,fds={':'.join(map(str, wiring.taps))}" if wiring.taps else "user,id=queues"
    several = f",mq=on,vectors={2 * QUEUES + 2}" if wiring.taps else ""
    mac = f"52:54:00:0{number}:00"
    return [
        *(qemu, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-machine", machine, *accel),
        *("-smp", str(CPUS[number]), "-m", f"{MEMORY[number]}M", "-acpitable", f"file={fd(wiring.table)}"),
        *("-kernel", str(image.vmlinux), "-initrd", fd(wiring.initrd)),
        *("-append", f"{COMMAND_LINE} lab.host=lab{number}"),
        *("-chardev", f"file,id=console,path={fd(wiring.console)},append=on", "-serial", "chardev:console"),
        *("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=control,fd={wiring.control}"),
        *("-device", "virtserialport,chardev=control,name=lab.control"),
        *("-chardev", f"socket,id=cable,fd={wiring.cable}"),
        *("-device", "virtserialport,chardev=cable,name=lab.cable"),
        *("-device", "pcie-root-port,id=rp1,chassis=1", "-netdev", "user,id=outside"),
        *("-device", f"igb,bus=rp1,netdev=outside,mac={mac}:01,romfile="),
        *("-device", "pcie-root-port,id=rp2,chassis=2"),
        *("-netdev", f"dgram,id=wire,local.type=fd,local.str={wiring.wire}"),
        *("-device", f"igb,bus=rp2,netdev=wire,mac={mac}:02,romfile="),
        *("-device", "pcie-root-port,id=rp3,chassis=3", "-device", "nvme-subsys,id=subsystem"),
        *("-device", "nvme,id=nvme,bus=rp3,serial=lab,subsys=subsystem,sriov_max_vfs=4,max_ioqpairs=10,msix_qsize=11"),
        *("-set", "device.nvme.sriov_vq_flexible=8", "-set", "device.nvme.sriov_vi_flexible=8"),
        *("-drive", f"file={fd(wiring.disk)},if=none,format=raw,id=disk", "-device", "nvme-ns,drive=disk,bus=nvme"),
        *("-netdev", card, "-device", f"virtio-net-pci,netdev=queues,mac={mac}:03,romfile={several}"),
    ]


def memory_file(name: str, content: bytes = b"") -> int:
    fd = os.memfd_create(name)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return fd


class Machine:
    """A lab host that is being booted; `wait_for_boot` before the first command. A context manager that kills it."""

    def __init__(
        self,
        number: int,
        wire: socket.socket,
        cable: socket.socket | None = None,
        control: socket.socket | None = None,
    ) -> None:
        """Start host `number`. `wire` is its end of the network between two of them, `cable` what its port lab.cable
        leads to, if anywhere; `control` is where its agent talks, if not to us."""
        self.number = number
        qemu, image = require_qemu(), kernel()
        script = INIT.format(
            boot=shlex.quote(str(Path(__file__).with_name("boot.sh"))),
            agent=shlex.quote(str(Path(__file__).with_name("agent.py"))),
            kernel=shlex.quote(str(image.directory)),
            python="/usr/bin/python3",
            root=shlex.quote(str(ROOT)),
        )
        self.console_fd = memory_file("console")
        fcntl.fcntl(self.console_fd, fcntl.F_SETFL, os.O_APPEND)  # two write to it: the guest's console, QEMU's stderr
        disk = memory_file("disk")
        os.truncate(disk, NVME_BYTES)
        self.control, agent_side = socket.socketpair()
        self.unused = socket.socketpair()
        cable, control = cable or self.unused[0], control or agent_side
        wiring = Wiring(
            initrd=memory_file("initrd", initramfs.with_busybox(script, image, ["9p", "9pnet_virtio", "overlay"])),
            table=memory_file("table", acpi.table(CPUS[number])),
            disk=disk,
            console=self.console_fd,
            control=control.fileno(),
            wire=wire.fileno(),
            cable=cable.fileno(),
            taps=taps(QUEUES),
        )
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*LEASH, str(os.getpid()), *arguments(qemu, image, number, wiring, kvm=kvm_works())],
            pass_fds=wiring.all(),
            stdin=subprocess.DEVNULL,
            stdout=self.console_fd,
            stderr=self.console_fd,
            start_new_session=True,
        )
        for fd in (wiring.initrd, wiring.table, wiring.disk, *wiring.taps):
            os.close(fd)
        agent_side.close()
        self.control.setblocking(False)
        self.channel = Channel(self.control.fileno())
        self.busy_seconds = 0.0  # as last seen
        self.last_words = ""

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once; nothing in it needs a shutdown, because nothing of it is kept."""
        if self.console_fd < 0:
            return
        self.busy_seconds = self.cpu_seconds()
        self.process.kill()
        self.process.wait()
        self.last_words = self.console()
        os.close(self.console_fd)
        self.console_fd = -1
        for end in (self.control, *self.unused):
            end.close()

    def console(self) -> str:
        """All that the kernel and QEMU have said so far."""
        if self.console_fd < 0:
            return self.last_words
        size = os.fstat(self.console_fd).st_size
        return os.pread(self.console_fd, size, 0).decode(errors="replace").replace("\r", "")

    def failure(self, what: str) -> Failed:
        """`what` happened, with the end of the console's log. Kills the machine."""
        ended = self.process.poll()
        self.kill()
        if ended is not None:
            words = f"killed by {signal.Signals(-ended).name}" if ended < 0 else f"status {ended}"
            what = f"{what}; QEMU ended ({words})"
        lines = self.console().splitlines()[-100:]
        return Failed("\n".join([f"lab{self.number}: {what}", "--- its console:", *lines, "--- end of the console"]))

    def cpu_seconds(self) -> float:
        """Processor time that QEMU has used, seconds."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return self.busy_seconds
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_for_boot(self, tick: Callable[[float], Any] = lambda _: None) -> float:
        """Wait until the agent inside answers; `tick` is called twice a second. Seconds it took. Raises Failed."""
        while True:
            waited = time.monotonic() - self.started
            try:
                kind, _ = self.channel.receive(0.5)
            except TimedOut:
                if waited > BOOT_SECONDS:
                    raise self.failure(f"not up after {BOOT_SECONDS} s") from None
                tick(waited)
                continue
            except Closed:
                raise self.failure("ended while it booted") from None
            if kind != b"H":
                raise self.failure(f"said {kind!r} instead of hello")
            return waited

    def request(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        terminal: list[int] | None = None,
    ) -> None:
        """Start a command in it; its output then comes over `channel`."""
        request = {"argv": argv, "env": env or {}, "cwd": cwd or str(ROOT), "terminal": terminal}
        self.channel.send_json(b"R", request)


def note(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)
