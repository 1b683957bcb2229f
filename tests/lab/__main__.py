"""scripts/lab: boot the lab host and run something in it.

    scripts/lab                  boot it, show its hardware, end
    scripts/lab -- COMMAND …     run a command in it; output and exit status are the command's
    scripts/lab shell            a terminal in it
    scripts/lab fetch            only fetch the kernel and build what it needs
    --two                        with a second lab host beside it (inside: python -m tests.lab.second -- COMMAND)

The file system inside is this machine's own, read-only below a memory overlay: everything can be written and nothing
stays. It works in this directory. It ends with the command, and nothing is left behind.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator

from tests.lab import netdevsim, packages
from tests.lab.channel import Closed, TimedOut
from tests.lab.machine import Failed, Machine, note
from tests.lab.pair import Hosts

LOAD_DRIVERS = """
modprobe -a igb nvme vfio-pci && if grep -qw svm /proc/cpuinfo; then modprobe kvm-amd; else modprobe kvm-intel; fi
"""
HARDWARE = """
echo "kernel      $(uname -r), $(nproc) CPUs, $(awk '/MemTotal/ {printf "%d MiB", $2/1024}' /proc/meminfo)"
echo "cgroup v2   $(cat /sys/fs/cgroup/cgroup.controllers)"
echo "IOMMU       $(ls /sys/class/iommu) with $(ls /sys/kernel/iommu_groups | wc -l) groups"
for d in /sys/bus/pci/devices/*; do
    [ -e $d/sriov_totalvfs ] || continue
    echo "SR-IOV      ${d##*/} $(basename $(readlink $d/driver)), $(cat $d/sriov_totalvfs) VFs"
done
echo "KVM         $(ls /dev/kvm)"
cd /sys/devices/system/cpu
echo "P-states    $(cat cpufreq/policy0/scaling_driver): $(cat cpufreq/policy0/scaling_available_frequencies)kHz"
echo "C-states    $(cat cpuidle/current_driver): $(cat cpu0/cpuidle/state*/name | tr '\\n' ' ')"
echo "sleep       $(cat /sys/power/mem_sleep)"
"""


def terminal_size() -> list[int]:
    packed = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
    rows, columns, _, _ = struct.unpack("HHHH", packed)
    return [rows or 24, columns or 80]


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def relay(machine: Machine) -> int:
    """Pass input, output, signals and the terminal's size to and fro until the command ends; its exit status."""
    line = machine.channel
    wake, waker = os.pipe2(os.O_NONBLOCK)
    got: list[int] = []
    signal.set_wakeup_fd(waker)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH):
        signal.signal(name, lambda number, _: got.append(number))
    reading = [line.fd, wake, 0]
    asked = 0  # to end, by signals
    while True:
        frame = line.next()
        if frame is None:
            ready = select.select(reading, [], [])[0]
            if wake in ready:
                os.read(wake, 64)
            while got:
                number = got.pop(0)
                if number == signal.SIGWINCH:
                    if os.isatty(0):
                        line.send_json(b"W", terminal_size())
                else:
                    asked += 1
                    if asked > 3:
                        raise machine.failure("does not react to signals")
                    line.send_json(b"S", number)
            if 0 in ready:
                data = os.read(0, 4096)
                line.send(b"I", data)
                if not data:
                    reading.remove(0)
            if line.fd in ready:
                line.fill()
            continue
        kind, payload = frame
        if kind in b"OE":
            write_all(1 if kind == b"O" else 2, payload)
        elif kind == b"!":
            note(json.loads(payload))
        elif kind == b"D":
            return int(payload)


def quietly(machine: Machine, argv: list[str]) -> int:
    """Run a command whose output only matters when it fails."""
    machine.request(argv)
    machine.channel.send(b"I")
    output = b""
    while True:
        kind, payload = machine.channel.receive(120)
        if kind == b"D":
            if int(payload):
                note(f"{' '.join(argv)}: {output.decode(errors='replace').strip()}")
            return int(payload)
        output += payload


def run(argv: list[str], *, terminal: bool, two: bool) -> int:
    show = sys.stderr.isatty()
    with Hosts() as hosts:
        machine = hosts.first

        def tick(seconds: float) -> None:
            if show:
                print(f"\rlab: booting, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)

        seconds = hosts.wait_for_boot(tick)
        if show:
            print("\r", end="", file=sys.stderr)
        try:
            quietly(machine, ["sh", "-c", LOAD_DRIVERS])
            if two:
                hosts.start_second()
            note(f"up after {seconds:.0f} s, {machine.cpu_seconds():.0f} s of processor time")
            machine.request(argv, terminal=terminal_size() if terminal else None)
            if terminal:
                with raw_terminal():
                    return relay(machine)
            return relay(machine)
        except Closed:
            time.sleep(0.2)  # for the last words of the kernel to arrive
            raise machine.failure("ended under the command") from None
        except TimedOut:
            raise machine.failure("hung while it loaded drivers") from None


def main(arguments: list[str]) -> int:
    two = "--two" in arguments[:1]
    arguments = arguments[1:] if two else arguments
    try:
        if arguments == ["fetch"]:
            image = packages.kernel()
            try:
                netdevsim.build(image, note)
            except packages.Unavailable as error:
                note(f"without netdevsim: {error}")
            return 0
        if not arguments:
            return run(["sh", "-c", HARDWARE], terminal=False, two=two)
        if arguments == ["shell"]:
            if not os.isatty(0):
                note("shell needs a terminal; try: scripts/lab -- COMMAND")
                return 2
            return run([os.environ.get("SHELL", "/bin/sh"), "-i"], terminal=True, two=two)
        if arguments[0] == "--" and len(arguments) > 1:
            return run(arguments[1:], terminal=False, two=two)
    except (Failed, packages.Unavailable) as error:
        note(str(error))
        return 125
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output is gone
        return 141
    print(__doc__, file=sys.stderr)
    return 0 if arguments in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
