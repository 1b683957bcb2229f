"""Machines of ovt on KVM, inside the lab host: devices that come and go, snapshots, clones, and two hosts between which
a machine moves while it counts.

A guest here must not use the TSC deadline, see CONTRIBUTING.md. For the same reason its own clock leaps forward when it
has stood still, so how long that was is told from the lab host's clock, which stamps every line of the consoles of both
"hosts".
"""

import base64
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ovt.engine.vm import agent_verbs, readiness
from ovt.engine.vm.agent import Agent
from ovt.engine.vm.features import choose_accel
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.migration import Settings
from ovt.host import Host
from ovt.machines import clones, devices, migrate, snapshots
from ovt.machines.transport import Address, parse
from ovt.model import Disk, Kind, Limits, Machine, Nic, Spec, Status
from tests.lab.conftest import Modprobe

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(240)]

CPU = "host,tsc-deadline=off"
MIB = 1 << 20
MEMORY = 192 * MIB
AGENT_SECONDS = 120.0
DOWNTIME = 2000  # milliseconds a machine may stand still while it moves; all of ovt is 10 to 20 times slower here
# For most of the memory. What QEMU leaves for the downtime is reckoned from this rate, and then sent as fast as can be:
# else all of the downtime would go into that, as measured while both processors of this host were free.
BANDWIDTH = 5 * MIB
MAC = "52:54:00:00:77:01"
OVT = str(Path(sys.executable).parent / "ovt")
# Nothing in it starts a process. The numbers are the guest's own memory, which goes along.
COUNTER = """
    mkfifo /tick; exec 3<>/tick; n=0
    while :; do n=$((n+1)); read -r up idle </proc/uptime; echo "tick $n $up"; read -r -t 0.02 nothing <&3; done
"""
WRITE = "dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null; md5sum </dev/vda"
READ = "echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda"


@pytest.fixture(scope="module")
def kvm(modprobe: Modprobe) -> None:
    modprobe("kvm_amd" if " svm " in Path("/proc/cpuinfo").read_text() else "kvm_intel")


@contextlib.contextmanager
def a_host(directory: Path) -> Iterator[Host]:
    """One of several hosts on this one: with a data root and a run root of its own."""
    directory.mkdir(exist_ok=True)
    host = Host(str(directory / "data"), str(directory / "run"))
    try:
        yield host
    finally:
        for id in host.store.ids():
            host.delete(id, force=True)


def environment(host: Host) -> dict[str, str]:
    return {**os.environ, "OVT_DATA_ROOT": host.data, "OVT_RUN_ROOT": host.run_root}


def ovt(host: Host, *words: str) -> str:
    command = [OVT, *words]
    done = subprocess.run(command, env=environment(host), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def agent_of(host: Host, name: str) -> Agent:
    return Agent(host.store.home(host.store.resolve(name)), sync_timeout=30.0, timeout=60.0)


def wait_for_agent(host: Host, name: str) -> None:
    agent_verbs.wait_for_agent(agent_of(host, name), AGENT_SECONDS)


def inside(host: Host, name: str, script: str) -> str:
    """What a script says in the guest, where it must succeed."""
    agent = agent_of(host, name)
    words = {"path": "/bin/sh", "arg": ["-c", f"exec 2>&1; {script}"], "capture-output": True}
    pid = agent.command("guest-exec", words)["pid"]
    while not (done := agent.command("guest-exec-status", {"pid": pid}))["exited"]:
        time.sleep(0.1)
    said = base64.b64decode(done.get("out-data", "")).decode()
    assert done.get("exitcode") == 0, f"{script}: {done} {said}"
    return said.strip()


def until(question: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Wait for an answer that is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} seconds"
        time.sleep(0.2)
    return answer


# one machine and what is done to it


@pytest.fixture(scope="module")
def here(kvm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with a_host(tmp_path_factory.mktemp("vm") / "here") as host:
        yield host


@pytest.fixture(scope="module")
def guest(here: Host) -> Host:
    """The host of machine `g`, which runs."""
    options = ["--cpu", CPU, "--memory", f"{MEMORY}", "--max-cpus", "2", "--disk", "new,size=16M,id=data"]
    assert ovt(here, "run", "-d", "--vm", *options, "--name", "g", "busybox", "--", "sleep", "100000") == "g\n"
    wait_for_agent(here, "g")
    return here


def test_kvm_is_chosen_and_is_what_the_guest_runs_on(guest: Host) -> None:
    assert choose_accel() == ("kvm", "")
    (accelerator,) = [check for check in readiness.checks(guest.run_root) if check.name == "accelerator"]
    assert (accelerator.state, accelerator.detail) == ("ok", "kvm")
    assert Hardware.load(guest.store.home(guest.store.resolve("g"))).accel == "kvm"
    assert "Hypervisor detected: KVM" in inside(guest, "g", "dmesg")


def test_stats_count_exits(guest: Host) -> None:
    (record,) = json.loads(ovt(guest, "stats", "--no-stream", "--format", "json", "g"))
    assert record["exits"] > 10000  # those of its start
    assert record["exits_per_second"] > 0  # an idle guest has a clock to keep
    assert record["cpu_seconds"] > 0


def test_a_disk_comes_and_goes(guest: Host) -> None:
    assert devices.attach_disk(guest, "g", Disk(size=8 * MIB, id="more", serial="LAB8")) == "more"
    size = until(lambda: inside(guest, "g", "cat /sys/block/vdb/size 2>/dev/null || true"), "a second disk")
    assert int(size) * 512 == 8 * MIB
    assert inside(guest, "g", "cat /sys/block/vdb/serial") == "LAB8"
    assert inside(guest, "g", "echo kept | dd of=/dev/vdb conv=fsync 2>/dev/null; head -c4 /dev/vdb") == "kept"
    devices.detach(guest, "g", "more", delete=True)
    assert inside(guest, "g", "ls /sys/block | grep vd") == "vda"


def test_a_network_card_comes_and_goes(guest: Host) -> None:
    id = devices.attach_nic(guest, "g", Nic("user", mac=MAC))
    script = f"grep -l {MAC} /sys/class/net/*/address || true"
    card = until(lambda: inside(guest, "g", script), "a second card").split("/")[4]
    # It is there for use: frames go out, and QEMU's network answers them.
    inside(guest, "g", f"ip link set {card} up")
    inside(guest, "g", f"ip addr flush dev {card}; ip addr add 10.0.2.99/24 dev {card}")
    assert "1 packets received" in inside(guest, "g", f"ping -c 1 -W 10 -I {card} 10.0.2.2")
    devices.detach(guest, "g", id)
    assert inside(guest, "g", f"ls /sys/class/net | grep -c {card} || true") == "0"


def test_a_processor_comes(guest: Host) -> None:
    assert inside(guest, "g", "nproc") == "1"
    guest.update("g", {"cpus": 2.0})
    until(lambda: inside(guest, "g", "cat /sys/devices/system/cpu/online") == "0-1", "a second processor")
    assert inside(guest, "g", "taskset 2 nproc; grep -c ^processor /proc/cpuinfo") == "1\n2"  # it works there


def test_memory_comes(guest: Host) -> None:
    def total() -> int:
        return int(inside(guest, "g", "grep MemTotal /proc/meminfo").split()[1]) << 10

    before = total()
    guest.update("g", {"memory": MEMORY + 128 * MIB})
    until(lambda: total() - before > 120 * MIB, "128 MiB more")
    assert "offline" not in inside(guest, "g", "cat /sys/devices/system/memory/memory*/state")


def test_memory_and_disk_go_back_together_and_a_linked_clone_has_the_disk(guest: Host) -> None:
    inside(guest, "g", "echo then >/state")
    content = inside(guest, "g", WRITE)
    snapshots.create(guest, "g", "s1", memory=True)
    changed = inside(guest, "g", f"echo now >/state; {WRITE}")
    assert changed != content
    snapshots.restore(guest, "g", "s1", force=True)
    # The same guest goes on: its memory is that of the snapshot, and so is what was plugged in before it.
    assert inside(guest, "g", "cat /state; nproc") == "then\n2"
    assert inside(guest, "g", READ) == content
    clones.clone(guest, "g", "twin", linked=True, snapshot="s1")
    inside(guest, "g", WRITE)  # what the source writes now is not the clone's
    guest.start("twin")
    wait_for_agent(guest, "twin")
    assert inside(guest, "twin", "hostname; ls /state 2>/dev/null || true") == "twin"  # it was booted
    assert inside(guest, "twin", READ) == content
    (size, _), *_ = [(path.stat().st_size, path) for path in disk_files(guest, "twin")]
    assert size < MIB  # its own image holds no more than what it has written
    guest.delete("twin", force=True)


def disk_files(host: Host, name: str) -> list[Path]:
    return list(Path(host.store.home(host.store.resolve(name)), "disks").iterdir())


# from one host to another


class Tick(NamedTuple):
    """A line of the counter: its number, the guest's clock and this host's, in seconds."""

    number: int
    guest: float
    host: float


def ticks(*hosts: Host) -> list[Tick]:
    """What the counter has said on these hosts, one after the other; a line may begin on one and end on the next."""
    found, line = [], b""
    for host in hosts:
        for record in host.logs("m"):
            line += record.data
            if line.endswith(b"\n"):
                if match := re.fullmatch(rb"tick (\d+) ([\d.]+)\r?\n", line):
                    found.append(Tick(int(match[1]), float(match[2]), record.time_ns / 1e9))
                line = b""
    return found


def count(host: Host, disk: Disk) -> None:
    """Start machine `m`, which counts, and see it counting."""
    machine = Machine(cpu=CPU, disks=(disk,))
    command = ("sh", "-c", COUNTER)
    spec = Spec("busybox", command, network="none", limits=Limits(memory=MEMORY), machine=machine)
    host.start(host.create(spec, "m", kind=Kind.VM).id)
    wait_for_agent(host, "m")
    until(lambda: len(ticks(host)) > 20, "the counter")


def move(here: Host, there: Host, address: Address, with_disks: bool) -> list[Tick]:
    """Move `m`, and hold what the counter has said on both sides against what was promised; what it has said."""
    options = migrate.Options(Settings(DOWNTIME, BANDWIDTH), with_disks=with_disks, keep=True)
    outcome = migrate.migrate(here, "m", address, options)
    arrived = until(lambda: ticks(there), "the counter on the other host")[0].number
    until(lambda: ticks(there)[-1].number > arrived + 20, "the counter on the other host")
    assert (here.get("m")[1], there.get("m")[1]) == (Status.STOPPED, Status.RUNNING)
    said = ticks(here, there)
    assert [tick.number for tick in said] == list(range(1, len(said) + 1))  # nothing twice, nothing missing
    assert all(one.guest <= other.guest for one, other in itertools.pairwise(said))
    last_here = ticks(here)[-1].number
    gaps = [other.host - one.host for one, other in itertools.pairwise(said)]
    pause = gaps[last_here - 1] * 1000  # between the last line here and the first there
    others = max(gaps[last_here - 20 : last_here - 1] + gaps[last_here:]) * 1000
    print(f"{outcome}: the guest was silent for {pause:.0f} ms, before and after for at most {others:.0f} ms")
    assert outcome.downtime <= DOWNTIME
    assert outcome.pause <= DOWNTIME
    assert pause <= DOWNTIME
    assert outcome.transferred > 10 * MIB
    return said


@contextlib.contextmanager
def receiving(host: Host, listen: str) -> Iterator[str]:
    """The address of an `ovt receive --listen` of `host`, which has no network but its own."""
    # Not TLS: an emulated processor encrypts some 4 MB/s, and what lies in buffers then takes seconds of the downtime.
    command = ["unshare", "--net", OVT, "receive", "--listen", listen]
    with subprocess.Popen(command, env=environment(host), stderr=subprocess.PIPE, text=True) as receiver:
        try:
            assert receiver.stderr
            line = receiver.stderr.readline()
            assert line.startswith("waiting at "), line + receiver.stderr.read()
            yield line.removeprefix("waiting at ").strip()
        finally:
            receiver.kill()


@pytest.fixture
def pair(kvm: None, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with a_host(tmp_path / "one") as one, a_host(tmp_path / "two") as two:
        yield one, two


def test_a_counting_machine_moves_to_a_host_with_the_same_storage(pair: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = pair
    image = tmp_path / "shared.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
    count(one, Disk(str(image), "data", mode="direct"))
    content = inside(one, "m", WRITE)
    with receiving(two, f"unix:{tmp_path}/receive") as address:
        move(one, two, parse(address), with_disks=False)
    assert inside(two, "m", READ) == content
    assert list(Path(two.data).rglob("*.qcow2")) == []  # no image was made there
    other = inside(two, "m", WRITE)
    assert inside(two, "m", READ) == other != content  # it can write there


def test_a_counting_machine_moves_with_its_disk(pair: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = pair
    count(one, Disk(size=16 * MIB, id="data"))
    content = inside(one, "m", WRITE)
    with receiving(two, f"unix:{tmp_path}/receive") as address:
        move(one, two, parse(address), with_disks=True)
    assert [path.name for path in disk_files(two, "m")] == ["data.qcow2"]
    disk_files(one, "m")[0].unlink()  # nothing of it is used any more
    assert inside(two, "m", READ) == content
    assert inside(two, "m", f"{WRITE} >/sum; {READ} | cmp - /sum && echo same") == "same"
