"""Devices of a machine, attached and detached by the command line: what its guest sees, and commands that are killed.

One guest for nearly all tests: they leave it as they found it, but for the last, which makes it grow.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt import Host
from ovt.engine.vm import attached, disks
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.errors import Conflict, NotFound, UsageError
from ovt.machines import device_list, devices
from ovt.machines import wanted_devices as wanted
from ovt.model import Disk, Machine, Nic
from tests.ovt.cli.place import Place

guest = [pytest.mark.root, pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(300)]
MIB = 1 << 20


def with_guest(test: Any) -> Any:
    for mark in guest:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def ovt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A guest with a program that does nothing, named vm; it has a user network and may grow."""
    place = Place(tmp_path_factory.mktemp("devices"))
    words = ["--memory", "128M", "--max-memory", "1G", "--max-cpus", "2"]
    place("run", "--vm", "-d", "--name", "vm", *words, "busybox", "sleep", "100000", timeout=120)
    place("wait", "--for", "agent", "vm", timeout=200)
    yield place
    for name in place.out("ps", "-a", "--format", "{{.name}}").split():
        place("delete", "--force", name)
    place.nothing_left()


def host(ovt: Place) -> Host:
    return Host(str(ovt.data), str(ovt.run))


def listed(ovt: Place, name: str = "vm") -> dict[str, dict[str, Any]]:
    entries = json.loads(ovt.out("device", "list", "--format", "json", name))
    return {entry["id"]: entry for entry in entries}


def inside(ovt: Place, command: str) -> str:
    return ovt.out("exec", "vm", "sh", "-c", command)


def hardware(ovt: Place) -> Hardware:
    return Hardware.load(str(ovt.home("vm")))


def images(ovt: Place) -> list[str]:
    directory = ovt.home("vm") / "disks"
    return sorted(os.listdir(directory)) if directory.exists() else []


@with_guest
def test_a_disk_comes_grows_is_limited_and_goes(ovt: Place) -> None:
    assert ovt.out("device", "attach", "disk", "vm", "new,size=16M") == "disk1"
    ovt.wait_for(lambda: "vda" in inside(ovt, "ls /sys/block"))
    inside(ovt, "echo mine >/dev/vda && sync")
    entry = listed(ovt)["disk1"]
    assert (entry["sort"], entry["size"], entry["bus"], entry["state"]) == ("disk", 16 * MIB, "virtio", "")
    assert entry["sent"] > 0
    assert "pending" not in hardware(ovt).find("disk1")
    ovt("device", "resize", "vm", "disk1", "32M")
    assert int(inside(ovt, "cat /sys/block/vda/size")) * 512 == 32 * MIB
    smaller = ovt("device", "resize", "vm", "disk1", "16M", check=False)
    assert smaller.returncode == 2
    assert "cannot become smaller" in smaller.stderr
    ovt("device", "limit", "vm", "disk1", "--bps", "1M")
    assert hardware(ovt).find("disk1")["bps"] == MIB
    with host(ovt).vms.qmp(host(ovt).get("vm")[0]) as qmp:
        (shown,) = [entry["inserted"] for entry in qmp.command("query-block") if entry.get("inserted")]
    assert (shown["bps"], shown["iops"]) == (MIB, 0)
    gone = ovt("device", "detach", "vm", "disk1")
    path = ovt.home("vm") / "disks/disk1.qcow2"
    assert str(path) in gone.stderr
    assert "vda" not in inside(ovt, "ls /sys/block")
    # its content can be had again, and another disk gets another file
    assert ovt.out("device", "attach", "disk", "vm", f"{path},mode=direct,id=again,bus=scsi") == "again"
    ovt.wait_for(lambda: "sda" in inside(ovt, "ls /sys/block"))
    assert inside(ovt, "head -n 1 /dev/sda") == "mine"
    ovt("device", "detach", "--delete", "vm", "again")
    assert images(ovt) == []
    unknown = ovt("device", "detach", "vm", "again", check=False)
    assert unknown.returncode == 1
    assert "no device 'again'" in unknown.stderr
    ovt("device", "detach", "vm", "scsi0")  # the controller that came with it
    assert set(listed(ovt)) == {"nic0"}


@with_guest
def test_a_drive_takes_and_gives_images(ovt: Place, tmp_path: Path) -> None:
    for name, size in (("one.iso", 1), ("two.iso", 2)):
        (tmp_path / name).write_bytes(name.encode() * (size * MIB // 7 // 2048 * 2048))
    assert ovt.out("device", "attach", "cdrom", "vm", "empty") == "cdrom1"
    ovt.wait_for(lambda: "sr0" in inside(ovt, "ls /sys/block"))
    ovt("device", "insert", "vm", "cdrom1", str(tmp_path / "one.iso"))
    ovt.wait_for(lambda: inside(ovt, "head -c 7 /dev/sr0 || true") == "one.iso")
    ovt("device", "insert", "vm", "cdrom1", str(tmp_path / "two.iso"))
    ovt.wait_for(lambda: inside(ovt, "head -c 7 /dev/sr0 || true") == "two.iso")
    assert listed(ovt)["cdrom1"]["chain"] == [str(tmp_path / "two.iso")]
    ovt("device", "eject", "--force", "vm", "cdrom1")
    assert listed(ovt)["cdrom1"]["chain"] == []
    assert ovt("device", "insert", "vm", "cdrom1", str(tmp_path / "none.iso"), check=False).returncode == 1
    ovt("device", "detach", "vm", "cdrom1")
    ovt("device", "detach", "vm", "scsi0")
    assert set(listed(ovt)) == {"nic0"}


@with_guest
def test_a_card_comes_loses_its_cable_and_goes(ovt: Place) -> None:
    mac = "52:54:00:00:00:77"
    assert ovt.out("device", "attach", "nic", "vm", f"none,mac={mac}") == "nic1"
    ovt.wait_for(lambda: mac in inside(ovt, "cat /sys/class/net/*/address"))
    taken = ovt("device", "attach", "nic", "vm", f"none,mac={mac}", check=False)
    assert taken.returncode == 2
    ovt("device", "link", "vm", "nic0", "down")
    ovt.wait_for(lambda: inside(ovt, "ip link set eth0 up; cat /sys/class/net/eth0/carrier") == "0")
    assert "link down" in listed(ovt)["nic0"]["what"]
    ovt("device", "link", "vm", "nic0", "up")
    ovt.wait_for(lambda: inside(ovt, "cat /sys/class/net/eth0/carrier") == "1")
    ovt("device", "detach", "vm", "nic1")
    assert mac not in inside(ovt, "cat /sys/class/net/*/address")
    assert set(listed(ovt)) == {"nic0"}


@with_guest
def test_a_guest_that_stands_still_keeps_its_devices(ovt: Place) -> None:
    ovt("device", "attach", "disk", "vm", "new,size=1M")
    ovt("pause", "vm")
    refused = ovt("device", "detach", "vm", "disk1", check=False)
    ovt("resume", "vm")
    assert refused.returncode == 1
    assert "ovt resume vm" in refused.stderr
    assert listed(ovt)["disk1"]["state"] == ""
    # one that is too slow keeps it as well, until it lets go after all
    late = ovt("device", "detach", "--timeout", "0", "vm", "disk1", check=False)
    assert late.returncode == 1
    assert "stays attached" in late.stderr
    assert "disk1" in {disk["id"] for disk in hardware(ovt).disks}
    ovt.wait_for(lambda: listed(ovt)["disk1"]["state"] == "not attached")
    assert ovt("device", "link", "vm", "nic0", "up").returncode == 0  # any change sees what has become of it
    assert set(listed(ovt)) == {"nic0"}
    assert images(ovt) == ["disk1.qcow2"]
    os.unlink(ovt.home("vm") / "disks/disk1.qcow2")


def killed(action: Callable[[], object], step: int) -> bool:
    """Do it in a process that kills itself before its step number `step`; whether it came to that."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        left = step

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*arguments, **options)

            return call

        Qmp.command = counted(Qmp.command)  # type: ignore[method-assign]
        Hardware.save = counted(Hardware.save)  # type: ignore[method-assign]
        os.unlink = counted(os.unlink)
        action()
        os._exit(0)
    except BaseException:
        os._exit(1)


def settled(ovt: Place) -> tuple[set[str], set[str], set[str]]:
    """(recorded, attached, what else QEMU keeps for devices) once the next command has looked."""
    with devices.opened(host(ovt), "vm") as at:
        assert at.qmp is not None
        recorded = {device["id"] for device in at.frozen().devices()}
        there = disks.attached(at.qmp) & {"nic0", "nic1", "data", "scsi0", "cdrom1"}
        kept = {node["node-name"] for node in at.qmp.command("query-named-block-nodes", {"flat": True})}
        kept |= {fd.get("opaque", "") for entry in at.qmp.command("query-fdsets") for fd in entry["fds"]}
        pending = [d["id"] for d in at.frozen().devices() if not attached.asked_back(d, at.run) and "pending" in d]
        assert pending == []
        return recorded, there, {name for name in kept if name.startswith("data-")}


@with_guest
def test_a_killed_attach_leaves_all_or_nothing(ovt: Place) -> None:
    outcomes = set()
    step = 0
    wanted_disk = Disk(size=MIB, id="data", iops=100)
    while killed(lambda: devices.attach_disk(host(ovt), "vm", wanted_disk), step):
        recorded, there, kept = settled(ovt)
        assert recorded == there, step
        assert bool(kept) == ("data" in there), step
        outcomes.add("data" in there)
        if "data" in there:
            assert hardware(ovt).find("data")["iops"] == 100
            ovt("device", "detach", "--delete", "vm", "data")
        step += 1
    assert outcomes == {True, False}
    assert step > 15
    assert settled(ovt)[0] == {"nic0", "data"}
    ovt("device", "detach", "--delete", "vm", "data")
    for path in images(ovt):  # of attaches that were killed after they had made one
        os.unlink(ovt.home("vm") / "disks" / path)


@with_guest
def test_a_killed_detach_leaves_all_or_nothing(ovt: Place) -> None:
    step, tried = 0, 0
    while True:
        ovt("device", "attach", "disk", "vm", "new,size=1M,id=data")
        tried += 1
        if not killed(lambda: devices.detach(host(ovt), "vm", "data", 30.0, True), step):
            break

        def agree() -> bool:
            recorded, there, kept = settled(ovt)
            return recorded == there and bool(kept) == ("data" in there)

        ovt.wait_for(agree)  # a guest that was asked lets go in its own time
        if "data" in settled(ovt)[0]:
            ovt("device", "detach", "--delete", "vm", "data")
        step += 1
    assert tried > 8
    assert settled(ovt)[0] == {"nic0"}
    for path in images(ovt):
        os.unlink(ovt.home("vm") / "disks" / path)


@with_guest
def test_a_killed_attach_of_a_card_leaves_all_or_nothing(ovt: Place) -> None:
    outcomes = set()
    step = 0
    while killed(lambda: devices.attach_nic(host(ovt), "vm", Nic("user", link=False)), step):
        recorded, there, _ = settled(ovt)
        assert recorded == there, step
        outcomes.add("nic1" in there)
        if "nic1" in there:
            ovt("device", "detach", "vm", "nic1")
        step += 1
    assert outcomes == {True, False}
    ovt("device", "detach", "vm", "nic1")
    assert settled(ovt)[0] == {"nic0"}


@with_guest
def test_a_killed_change_of_a_medium_is_recorded_as_it_ended(ovt: Place, tmp_path: Path) -> None:
    iso = tmp_path / "one.iso"
    iso.write_bytes(bytes(MIB))
    ovt("device", "attach", "cdrom", "vm", "empty")

    def nodes() -> list[str]:
        with host(ovt).vms.qmp(host(ovt).get("vm")[0]) as qmp:
            return [node["node-name"] for node in qmp.command("query-named-block-nodes", {"flat": True})]

    step, outcomes = 0, set()
    while killed(lambda: devices.insert(host(ovt), "vm", "cdrom1", str(iso), force=True), step):
        settled(ovt)
        entry = listed(ovt)["cdrom1"]
        assert bool(entry["chain"]) == (entry["size"] is not None), step
        assert len(nodes()) == (2 if entry["chain"] else 0), step
        outcomes.add(bool(entry["chain"]))
        if entry["chain"]:
            ovt("device", "eject", "--force", "vm", "cdrom1")
        step += 1
    assert outcomes == {True, False}
    ovt("device", "detach", "vm", "cdrom1")  # with what is in it
    assert nodes() == []
    ovt("device", "detach", "vm", "scsi0")


def memory(ovt: Place) -> int:
    """MiB that the guest knows of."""
    return int(inside(ovt, "grep MemTotal /proc/meminfo").split()[1]) >> 10


def free(ovt: Place) -> int:
    return int(inside(ovt, "grep MemFree /proc/meminfo").split()[1]) >> 10


@with_guest
def test_memory_and_processors_grow_while_it_runs(ovt: Place) -> None:
    before = memory(ovt)
    step = 0
    while killed(lambda: host(ovt).update("vm", {"memory": 200 * MIB}), step):
        with devices.opened(host(ovt), "vm") as at:
            assert at.qmp is not None
            there = [entry["data"]["id"] for entry in at.qmp.command("query-memory-devices")]
            assert [dimm["id"] for dimm in at.frozen().dimms] == there, step
            kept = disks.children(at.qmp, "/objects")
        assert ("dimm0-memory" in kept) == (there == ["dimm0"]), step
        step += 1
    assert listed(ovt)["dimm0"]["size"] == 128 * MIB  # and never a second one
    assert "dimm1" not in listed(ovt)
    assert memory(ovt) > before + 100
    told = ovt("-v", "update", "--cpus", "2", "vm").stderr
    with host(ovt).vms.qmp(host(ovt).get("vm")[0]) as qmp:
        assert len(qmp.command("query-cpus-fast")) == 2
    used = int(inside(ovt, "grep -c ^processor /proc/cpuinfo"))
    # a kernel that does not know its hypervisor takes no processor while it runs, and the owner is told
    assert used == (1 if "uses 1 of 2 processors" in told else 2)
    too_many = ovt("update", "--cpus", "3", "vm", check=False)
    too_much = ovt("update", "--memory", "2G", "vm", check=False)
    assert (too_many.returncode, too_much.returncode) == (2, 2)
    assert {"dimm0", "cpu1"} <= set(listed(ovt))
    had = free(ovt)
    ovt("update", "--memory", "160M", "vm")  # less by the balloon
    ovt.wait_for(lambda: free(ovt) < had - 30)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Place]:
    """A place for a guest of the test's own, which it ends and starts."""
    place = Place(tmp_path)
    yield place
    for name in place.out("ps", "-a", "--format", "{{.name}}").split():
        place("delete", "--force", name)
    place.nothing_left()


@with_guest
def test_what_was_attached_outlives_a_save_and_a_stop(own: Place) -> None:
    words = ["--memory", "128M", "--max-memory", "1G", "--max-cpus", "2"]
    own("run", "--vm", "-d", "--name", "vm", *words, "busybox", "sleep", "100000", timeout=120)
    own("wait", "--for", "agent", "vm", timeout=200)
    before = memory(own)
    own("update", "--memory", "200M", "--cpus", "2", "vm")
    own("device", "attach", "disk", "vm", "new,size=1M,id=data")
    record = hardware(own)
    assert record.dimms[0]["addr"] > 0
    assert record.plugged_vcpus[0]["socket-id"] == 1
    late = own("device", "attach", "hostdev", "vm", "00:1f.7", check=False)
    assert "made without it" in late.stderr
    assert hardware(own) == record
    own("save", "vm")
    refused = own("device", "attach", "disk", "vm", "new,size=1M", check=False)
    assert "its memory is on the disk" in refused.stderr
    assert "data" in listed(own)
    own("start", "vm", timeout=120)
    assert hardware(own) == record
    assert memory(own) > before + 100
    assert settled(own)[:2] == ({"nic0", "data"}, {"nic0", "data"})
    # stopped, it is changed for its next start
    own("stop", "--force", "vm")
    own("device", "detach", "--delete", "vm", "data")
    assert images(own) == []
    assert own.out("device", "attach", "disk", "vm", "new,size=1M,bus=sata") == "disk1"
    assert own.out("device", "attach", "nic", "vm", "none") == "nic1"
    own("device", "resize", "vm", "disk1", "2M")
    assert own.out("device", "attach", "hostdev", "vm", "00:1f.7") == "hostdev0"
    assert listed(own)["hostdev0"]["what"] == "0000:00:1f.7"
    own("device", "detach", "vm", "hostdev0")
    assert hardware(own).balloon
    for _ in range(6):  # more than it had places for
        own("device", "attach", "disk", "vm", "new,size=1M")
    own("device", "detach", "--delete", "vm", "disk7")
    own("device", "limit", "vm", "disk2", "--iops", "50")
    own("start", "vm", timeout=120)
    own("wait", "--for", "agent", "vm", timeout=200)
    seen = inside(own, "grep -c ^processor /proc/cpuinfo; cat /sys/block/sda/size; ls -d /sys/block/vd* | wc -l")
    assert seen.split() == ["2", "4096", "5"]
    assert memory(own) > before + 20  # 72 less what a kernel for two processors keeps
    assert listed(own)["disk2"]["iops"] == 50
    assert set(listed(own)) == {"nic0", "nic1", "disk1", "disk2", "disk3", "disk4", "disk5", "disk6"}
    cold = own("device", "detach", "vm", "disk1", check=False)
    assert "while the machine is stopped" in cold.stderr


# without a guest


@pytest.mark.root
@pytest.mark.qemu
def test_a_machine_that_was_never_started_is_asked_for_other_devices(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place("create", "--vm", "--name", "new", "busybox", timeout=120)
    assert place.out("device", "attach", "disk", "new", "new,size=1M") == "disk1"
    assert place.out("device", "attach", "cdrom", "new", "empty") == "cdrom1"
    assert place.out("device", "attach", "nic", "new", "none") == "nic1"
    place("device", "resize", "new", "disk1", "8M")
    place("device", "limit", "new", "disk1", "--iops", "10")
    place("device", "link", "new", "nic1", "down")
    place("device", "detach", "new", "nic0")
    place("device", "detach", "new", "cdrom1")
    spec = Host(str(place.data), str(place.run)).get("new")[0].spec.machine
    assert [(disk.id, disk.size, disk.iops) for disk in spec.disks] == [("disk1", 8 * MIB, 10)]
    assert [(nic.id, nic.network, nic.link) for nic in spec.nics] == [("nic1", "none", False)]
    assert {entry["state"] for entry in listed(place, "new").values()} == {"from its first start"}
    wrong = place("device", "attach", "disk", "new", f"{tmp_path}/none.img", check=False)
    assert wrong.returncode == 1
    assert len(listed(place, "new")) == 2
    assert not (place.home("new") / "disks").exists()
    place("delete", "new")
    assert os.listdir(place.data / "instances") == []


def test_wishes_are_changed_by_id() -> None:
    machine = Machine(disks=(Disk(id="root", source="/a"), Disk(id="cdrom1", device="cdrom")), nics=(Nic(id="nic0"),))
    more, id = wanted.add_disk(machine, Disk(size=1))
    assert (id, more.disks[-1].id) == ("disk1", "disk1")
    more, id = wanted.add_disk(more, Disk(device="cdrom"))
    assert id == "cdrom2"
    more, id = wanted.add_nic(more, Nic("none"))
    assert (id, len(more.nics[-1].mac)) == ("nic1", 17)
    assert wanted.remove(more, "root").disks[0].id == "cdrom1"
    assert wanted.change_disk(more, "root", size=7).disks[0].size == 7
    assert not wanted.change_nic(more, "nic0", link=False).nics[0].link
    with pytest.raises(Conflict):
        wanted.add_disk(machine, Disk(id="nic0"))
    with pytest.raises(NotFound, match="'vda'"):
        wanted.remove(machine, "vda")
    with pytest.raises(UsageError, match="no CD-ROM drive"):
        wanted.drive(machine, "root")
    with pytest.raises(NotFound) as caught:
        wanted.change_nic(machine, "root", link=True)
    assert "nic0" in caught.value.hint


def test_a_container_has_no_such_devices(tmp_path: Path) -> None:
    from ovt.model import Instance, Kind, Spec

    place = Host(str(tmp_path / "data"), str(tmp_path / "run"))
    place.store.add(Instance("0123456789ab", "box", Kind.CONTAINER, 0.0, Spec("busybox")))
    with pytest.raises(UsageError, match="it is a container"):
        devices.detach(place, "box", "disk1")
    with pytest.raises(UsageError, match="it is a container"):
        device_list.listing(place, "box")
