"""Suspend to RAM and wake by the alarm clock, on the lab host's hardware, in a boot of its own.

The shared lab host cannot sleep: waking resets every device, QEMU's 9p server then knows none of the files that the
guest has open, and Linux's client does not reconnect, so its root would be dead. The root of this boot is an initramfs
with a shell script. It takes the bzImage, because QEMU loads an ELF kernel anew at each reset, over what slept there.
"""

import contextlib
import os
import re
import socket
import subprocess
from typing import NamedTuple

import pytest

from tests.lab import acpi, initramfs, machine, packages

pytestmark = [pytest.mark.lab(outside=True), pytest.mark.slow, pytest.mark.timeout(240)]

LIMIT = 200  # seconds for the whole boot; 15 on a quiet machine
ASLEEP = 3  # seconds until the alarm
MODULES = ["igb", "nvme", "virtio_net", "acpi_cpufreq", "cpufreq_powersave"]
SCRIPT = """#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
. /modules
echo # the firmware has left the cursor somewhere in a line
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" = lab.control ] && exec 3<>/dev/${port##*/}
done
cpu=/sys/devices/system/cpu
pf=/sys/bus/pci/devices/0000:01:00.0
c2() { cat $cpu/cpu1/cpuidle/state2/usage; }
gateway() {
    for second in 1 2 3 4 5 6 7 8 9; do
        busybox ping -c 1 -W 1 10.0.2.2 > /dev/null && echo answers && return
    done
}
night() {
    echo "$1 online: $(cat $cpu/online)"
    echo "$1 cpu1: $(busybox taskset 2 echo runs)"
    echo "$1 governor: $(cat $cpu/cpufreq/policy1/scaling_governor)"
    echo "$1 frequency: $(cat $cpu/cpufreq/policy1/scaling_cur_freq)"
    echo "$1 limit: $(cat $cpu/cpufreq/policy0/scaling_max_freq)"
    used=$(c2); sleep 1; echo "$1 c2: $(($(c2) - used))"
    echo "$1 gateway: $(gateway)"
    echo "$1 numvfs: $(cat $pf/sriov_numvfs)"
    echo "$1 class of vf 1: $(busybox od -An -tx1 -j9 -N3 $pf/virtfn1/config)"
    echo 3 > /proc/sys/vm/drop_caches
    echo "$1 disk: $(busybox head -c 5 /dev/nvme0n1)"
    echo "$1 sleeps: $(cat /sys/power/suspend_stats/success)"
    echo "$1 failures: $(cat /sys/power/suspend_stats/fail)"
    echo "$1" >&3
}
hours() {
    echo "$1 clock: $(busybox date +%s)"
    echo "$1 rtc: $(cat /sys/class/rtc/rtc0/since_epoch)"
    echo "$1 alarm: $(cat /sys/class/rtc/rtc0/wakealarm)"
    echo "$1 uptime: $(sed 's/ .*//' /proc/uptime)"
}
echo powersave > $cpu/cpufreq/policy1/scaling_governor
echo 1600000 > $cpu/cpufreq/policy1/scaling_min_freq
echo 2000000 > $cpu/cpufreq/policy0/scaling_max_freq
ifconfig $(ls $pf/net) 10.0.2.15 up
echo 2 > $pf/sriov_numvfs
echo hello > /dev/nvme0n1
night before
echo deep > /sys/power/mem_sleep
echo +ASLEEP > /sys/class/rtc/rtc0/wakealarm
hours before
echo mem > /sys/power/state
hours after
night after
echo "after end: reached"
busybox reboot -f
"""


class Night(NamedTuple):
    """What the guest told before it slept and after it woke, what came over its port, all it said."""

    before: dict[str, str]
    after: dict[str, str]
    port: bytes
    console: str


def boot(kernel: packages.Kernel, qemu: str) -> tuple[str, bytes]:
    """Run SCRIPT on the hardware of lab host 1; the console, and what came over the control port."""
    initrd = initramfs.with_busybox(SCRIPT.replace("ASLEEP", str(ASLEEP)), kernel, MODULES)
    with contextlib.ExitStack() as stack:

        def file(name: str, content: bytes = b"") -> int:
            fd = machine.memory_file(name, content)
            stack.callback(os.close, fd)
            return fd

        def pair(kind: socket.SocketKind = socket.SOCK_STREAM) -> list[socket.socket]:
            return [stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, kind)]

        (control, ours), cable, wire = pair(), pair(), pair(socket.SOCK_DGRAM)
        wiring = machine.Wiring(
            initrd=file("initrd", initrd),
            table=file("table", acpi.table(machine.CPUS[1])),
            disk=file("disk", bytes(1 << 20)),
            console=file("console"),
            control=control.fileno(),
            cable=cable[0].fileno(),
            wire=wire[0].fileno(),
        )
        command = machine.arguments(qemu, kernel, 1, wiring, kvm=machine.kvm_works())
        command[command.index("-kernel") + 1] = str(kernel.vmlinuz)
        # Waking changes the memory map under both processors; with a thread each, QEMU 10 now and then fails its own
        # assertion (iotlb_to_section).
        command = [word.replace("thread=multi", "thread=single") for word in command]
        root = command.index("-virtfs")
        del command[root : root + 2]
        try:
            done = subprocess.run(
                [*machine.LEASH, str(os.getpid()), *command],
                pass_fds=wiring.all(),
                stdin=subprocess.DEVNULL,
                stdout=wiring.console,
                stderr=wiring.console,
                timeout=LIMIT,
                check=False,
            )
            ended = f"QEMU ended with status {done.returncode}"
        except subprocess.TimeoutExpired:  # and QEMU has been killed
            ended = f"not off after {LIMIT} s"
        control.close()
        port = ours.recv(4096)
        console = os.pread(wiring.console, 1 << 20, 0).decode(errors="replace").replace("\r", "")
    return f"{console}\n{ended}", port


@pytest.fixture(scope="module")
def night() -> Night:
    try:
        qemu, kernel = packages.require_qemu(), packages.kernel()
    except packages.Unavailable as error:
        pytest.skip(str(error))
    console, port = boot(kernel, qemu)
    print(console)
    told = [dict(re.findall(rf"^{when} ([\w ]+): (.*)$", console, re.M)) for when in ("before", "after")]
    assert "failures" in told[0], "the guest did not come as far as its sleep"
    assert "end" in told[1], "the guest did not come to the end of its script"
    return Night(told[0], told[1], port, console)


def test_it_slept_and_the_alarm_woke_it(night: Night) -> None:
    assert (night.before["sleeps"], night.after["sleeps"]) == ("0", "1")
    assert night.after["failures"] == "0"
    assert "error" not in night.console.lower()
    assert int(night.before["alarm"]) == pytest.approx(int(night.before["rtc"]) + ASLEEP, abs=2)
    assert night.after["alarm"] == ""  # it has rung


def test_time_went_on_while_it_slept(night: Night) -> None:
    for name in ("clock", "rtc", "uptime"):
        assert ASLEEP - 1.5 <= float(night.after[name]) - float(night.before[name]) < 60
    assert abs(int(night.after["clock"]) - int(night.after["rtc"])) <= 2


def test_second_processor_came_back(night: Night) -> None:
    assert night.after["online"] == night.before["online"] == "0-1"
    assert night.after["cpu1"] == night.before["cpu1"] == "runs"


def test_frequencies_and_idle_states_are_as_before(night: Night) -> None:
    for told in (night.before, night.after):
        assert (told["governor"], told["frequency"], told["limit"]) == ("powersave", "1600000", "2000000")
        assert int(told["c2"]) > 0


def test_nic_works_and_has_its_virtual_functions_again(night: Night) -> None:
    for told in (night.before, night.after):
        assert told["gateway"] == "answers"
        assert told["numvfs"] == "2"
        assert told["class of vf 1"].split() == ["00", "00", "02"]


def test_disk_can_be_read_again(night: Night) -> None:
    assert night.before["disk"] == night.after["disk"] == "hello"


def test_open_serial_port_outlives_the_sleep(night: Night) -> None:
    assert night.port == b"before\nafter\n"
