"""Disks of a real QEMU that stands at its first instruction: nothing is left of one that was taken away or failed."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import blockgraph as graph
from ovt.engine.vm import diskfiles, disks
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, UsageError
from tests.ovt.engine.vm.bare import Bare, qemu

pytestmark = pytest.mark.qemu
MIB = 1 << 20
PORTS = [
    word
    for number in range(6)
    for word in ("-device", json.dumps({"driver": "pcie-root-port", "id": f"rp{number}", "chassis": number + 1}))
]
# Without ACPI's hotplug a device that the guest has not switched on is given back at once, as by a guest that agrees.
AGREEING = [*PORTS, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]


@pytest.fixture
def qmp() -> Iterator[Bare]:
    with qemu(more=AGREEING) as connection:
        yield connection


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a chain of three images, another raw one, and a CD-ROM's, all of 4 MiB."""
    home = tmp_path / "home"
    (home / "disks").mkdir(parents=True)
    for name in ("base.img", "other.img", "cd.iso"):
        (home / name).write_bytes(name.encode() * 8 + bytes(4 * MIB - 8 * len(name)))
    img("create", "-b", home / "base.img", "-F", "raw", home / "middle.qcow2")
    img("create", "-b", home / "middle.qcow2", "-F", "qcow2", home / "disks/root.qcow2")
    return home


def img(command: str, *arguments: str | Path) -> None:
    subprocess.run(["qemu-img", command, "-q", "-f", "qcow2", *map(str, arguments)], check=True, timeout=60)


def root(home: Path, **changes: Any) -> dict[str, Any]:
    chain = [
        {"path": str(home / "base.img"), "format": "raw"},
        {"path": str(home / "middle.qcow2"), "format": "qcow2"},
        {"path": "disks/root.qcow2", "format": "qcow2"},
    ]
    return {"id": "root", "device": "disk", "bus": "virtio", "port": "rp0", "chain": chain, **changes}


def one(path: Path, **changes: Any) -> dict[str, Any]:
    return {**root(path.parent), "id": "disk1", "chain": [{"path": str(path), "format": "raw"}], **changes}


def cdrom(home: Path, **changes: Any) -> dict[str, Any]:
    drive = {"id": "cdrom1", "device": "cdrom", "bus": "scsi", "unit": 2, "readonly": True}
    return {**drive, "chain": medium(home / "cd.iso"), **changes}


def medium(path: Path) -> list[dict[str, Any]]:
    return [{"path": str(path), "format": "raw"}]


def state(qmp: Qmp) -> dict[str, Any]:
    """Everything that a disk can leave in QEMU."""
    return {
        "devices": sorted(entry["name"] for entry in qmp.command("qom-list", {"path": "/machine/peripheral"})),
        "objects": sorted(entry["name"] for entry in qmp.command("qom-list", {"path": "/objects"})),
        "nodes": sorted(node["node-name"] for node in qmp.command("query-named-block-nodes", {"flat": True})),
        "fdsets": qmp.command("query-fdsets"),
    }


def block(qmp: Qmp, id: str) -> dict[str, Any]:
    found = [entry for entry in qmp.command("query-block") if f"/{id}/" in f"/{entry['qdev']}/"]
    assert len(found) == 1
    return dict(found[0])


def write(qmp: Qmp, disk: dict[str, Any], what: str) -> None:
    """Write as the guest does, through the device."""
    line = f'qemu-io -d {graph.qom_path(disk)} "write {what}"'
    assert qmp.command("human-monitor-command", {"command-line": line}) == ""


def verify(path: Path, *reads: str) -> None:
    """What is in the image, and those below it, once QEMU has let go of it."""
    commands = [word for read in reads for word in ("-c", f"read -P {read}")]
    said = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-r", *commands, str(path)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert said.count("read ") == len(reads) and "failed" not in said


VARIANTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "virtio": lambda home: root(home),
    "virtio with everything": lambda home: root(home, iothread=True, queues=2, iops=90, bps=MIB, bootindex=1),
    "virtio, past the page cache": lambda home: root(home, cache="none", aio="native"),
    "virtio, directsync": lambda home: root(home, cache="directsync"),
    "virtio, read-only": lambda home: root(home, readonly=True),
    "scsi": lambda home: root(home, bus="scsi", unit=3, serial="x", iops=5),
    "scsi, read-only": lambda home: root(home, bus="scsi", unit=3, readonly=True),
    "scsi cdrom": lambda home: cdrom(home, bps=MIB),
    "scsi cdrom, empty": lambda home: cdrom(home, chain=[], bps=MIB),
    "nvme": lambda home: root(home, bus="nvme", cache="writethrough", bps=MIB),
    "nvme, read-only": lambda home: root(home, bus="nvme", readonly=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_plugged_and_unplugged_without_a_trace(name: str, qmp: Qmp, home: Path) -> None:
    disk = VARIANTS[name](home)
    if disk["bus"] == "scsi":
        disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1", "iothread": True})
    before = state(qmp)
    for _ in range(2):
        disks.plug(qmp, str(home), disk, io_uring=True)
        seen = block(qmp, disk["id"])
        if disk["chain"]:
            assert seen["inserted"]["node-name"] == f"{disk['id']}-fmt{len(disk['chain']) - 1}"
            assert seen["inserted"]["ro"] == graph.read_only(disk)
            assert (seen["inserted"]["iops"], seen["inserted"]["bps"]) == (disk.get("iops", 0), disk.get("bps", 0))
        assert len(state(qmp)["fdsets"]) == len(before["fdsets"]) + len(disk["chain"])
        disks.unplug(qmp, disk, timeout=10)
        assert state(qmp) == before


@pytest.mark.parametrize("bus", ["virtio", "scsi", "nvme"])
def test_data_goes_to_the_top_alone(bus: str, qmp: Qmp, home: Path) -> None:
    below = [home / "base.img", home / "middle.qcow2"]
    before = [hashlib.sha256(path.read_bytes()).digest() for path in below]
    disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1"})
    disk = root(home, bus=bus)
    disks.plug(qmp, str(home), disk)
    write(qmp, disk, "-P 0x5a 64k 128k")
    disks.unplug(qmp, disk)
    assert [hashlib.sha256(path.read_bytes()).digest() for path in below] == before
    top = home / "disks/root.qcow2"
    verify(top, "0x5a 64k 128k", "0 192k 64k", "0x62 0 1", "0x61 1 1")
    extents = subprocess.run(
        ["qemu-img", "map", "--output=json", str(top)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert any(extent["depth"] == 0 and extent["data"] and extent["start"] <= 65536 for extent in json.loads(extents))


def test_the_firmware_boots_from_the_first_and_it_is_counted(home: Path) -> None:
    with qemu(more=PORTS) as qmp:
        disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1"})
        disks.plug(qmp, str(home), one(home / "other.img", bus="scsi", bootindex=2))
        disks.plug(qmp, str(home), root(home, bootindex=1))
        disks.plug(qmp, str(home), cdrom(home, chain=[]))
        assert disks.stats(qmp) == {"root": (0, 0, 0, 0), "disk1": (0, 0, 0, 0), "cdrom1": (0, 0, 0, 0)}
        qmp.command("system_reset")  # only now QEMU tells the firmware of the order
        qmp.command("cont")
        deadline = time.monotonic() + 60
        while not disks.stats(qmp)["root"][2] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert disks.stats(qmp) == {"root": (512, 0, 1, 0), "disk1": (0, 0, 0, 0), "cdrom1": (0, 0, 0, 0)}


def test_the_controller_is_plugged_once(qmp: Qmp, home: Path) -> None:
    with pytest.raises(StateError, match="no SCSI controller"):
        disks.plug(qmp, str(home), root(home, bus="scsi"))
    for _ in range(2):
        disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1", "queues": 2, "iothread": True})
    before = state(qmp)
    assert {"scsi0"} <= set(before["devices"]) and "scsi0-iothread" in before["objects"]
    with pytest.raises(QmpError, match="rp7"):
        disks.plug_controller(qmp, {"id": "scsi1", "port": "rp7", "iothread": True})
    assert state(qmp) == before


def test_sata_is_for_the_command_line(home: Path) -> None:
    wanted = one(home / "other.img", bus="sata", unit=1)
    drive = cdrom(home, bus="sata", unit=2, iops=50)
    with (
        (home / "other.img").open("r+b") as file,
        (home / "cd.iso").open("rb") as iso,
        qemu(
            more=[
                *["-add-fd", f"fd={file.fileno()},set=7", *graph.words(wanted, [7])],
                *["-add-fd", f"fd={iso.fileno()},set=8", *graph.words(drive, [8])],
            ],
            inherit=[file.fileno(), iso.fileno()],
        ) as qmp,
    ):
        disks.throttle(qmp, wanted, 30, 0)
        assert block(qmp, "disk1")["inserted"]["iops"] == 30
        disks.resize(qmp, wanted, 8 * MIB)
        write(qmp, wanted, "-P 7 7M 64k")
        disks.change_medium(qmp, str(home), drive, medium(home / "base.img"))
        assert block(qmp, "cdrom1")["inserted"]["iops"] == 50
        for call in (disks.unplug, lambda qmp, disk: disks.plug(qmp, str(home), disk)):
            with pytest.raises(StateError, match="a sata disk cannot be") as caught:
                call(qmp, wanted)
            assert "stopped" in caught.value.hint
    assert (home / "other.img").read_bytes()[7 * MIB :] == b"\7" * 65536 + bytes(MIB - 65536)


# what goes wrong


class Failing:
    """A connection on which the n-th command that changes something fails: before QEMU has it, or afterwards."""

    CHANGING = ("object-add", "blockdev-add", "device_add", "block_set_io_throttle", "add-fd")

    def __init__(self, qmp: Qmp, number: int, error: BaseException, after: bool) -> None:
        self.qmp, self.number, self.error, self.after = qmp, number, error, after
        self.events, self.wait_event = qmp.events, qmp.wait_event

    def command(self, name: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
        if name not in self.CHANGING:
            return self.qmp.command(name, arguments, **options)
        self.number -= 1
        if self.number == -1 and not self.after:
            raise self.error
        result = self.qmp.command(name, arguments, **options)
        if self.number == -1:
            raise self.error
        return result

    def add_fd(self, fd: int, fdset: int | None = None, opaque: str = "") -> int:
        return int(self.command("add-fd", {"opaque": opaque}, fds=(fd,))["fdset-id"])


@pytest.mark.parametrize(("error", "after"), [(QmpError("refused"), False), (KeyboardInterrupt(), True)])
def test_a_failure_at_any_step_leaves_nothing(error: BaseException, after: bool, qmp: Qmp, home: Path) -> None:
    disk = root(home, iothread=True, iops=5)
    before, open_files = state(qmp), os.listdir("/proc/self/fd")
    steps = 0
    while True:
        try:
            disks.plug(Failing(qmp, steps, error, after), str(home), disk)  # type: ignore[arg-type]
            break
        except (QmpError, KeyboardInterrupt) as caught:
            assert "let go" not in getattr(caught, "hint", "")
        assert state(qmp) == before
        steps += 1
    assert steps == 3 + 1 + 6 + 1 + 1  # descriptors, thread, nodes, device, limit
    assert len(os.listdir("/proc/self/fd")) == len(open_files)


def corrupt_header(home: Path) -> None:
    with (home / "disks/root.qcow2").open("r+b") as file:
        file.write(b"QFI\xfc")


def corrupt_table(home: Path) -> None:
    with (home / "disks/root.qcow2").open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)  # offset of the L1 table


def replace(path: str) -> Callable[[Path], None]:
    def put(home: Path) -> None:
        (home / path).rename(home / "moved")
        (home / path).symlink_to(home / "moved")

    return put


def pipe(home: Path) -> None:
    (home / "base.img").unlink()
    os.mkfifo(home / "base.img")


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (corrupt_header, QmpError, r"disk root: disks/root.qcow2: .*not in qcow2 format"),
        (corrupt_table, QmpError, r"disk root: disks/root.qcow2: .*L1"),
        (lambda home: (home / "middle.qcow2").unlink(), NotFound, "middle.qcow2 has vanished"),
        (lambda home: (home / "disks/root.qcow2").unlink(), NotFound, "disks/root.qcow2 has vanished"),
        (replace("base.img"), HostError, "replaced by a symbolic link"),
        (replace("disks/root.qcow2"), HostError, "replaced by a symbolic link"),
        (pipe, UsageError, "neither a file nor a block device"),
    ],
)
def test_a_bad_image_is_one_clear_error(
    harm: Callable[[Path], None], kind: type[OvtError], words: str, qmp: Qmp, home: Path
) -> None:
    before, open_files = state(qmp), os.listdir("/proc/self/fd")
    harm(home)
    with pytest.raises(kind, match=words):
        disks.plug(qmp, str(home), root(home))
    assert state(qmp) == before
    assert len(os.listdir("/proc/self/fd")) == len(open_files)


def test_names_lead_nowhere_else(home: Path) -> None:
    outside = root(home, chain=[{"path": "../secret", "format": "raw"}])
    (home.parent / "secret").write_bytes(bytes(512))
    with pytest.raises(HostError, match="leads out of the machine's directory"):
        diskfiles.open_chain(str(home), outside)
    with pytest.raises(UsageError, match="no longer a block device"):
        diskfiles.open_chain(
            str(home), one(home / "other.img", chain=[{**medium(home / "other.img")[0], "block": True}])
        )

    def denied(path: str, flags: int) -> int:
        raise PermissionError(13, "denied", path)

    with pytest.raises(HostError, match=r"image .*base.img: permission denied") as caught:
        diskfiles.open_chain(str(home), root(home), denied)
    assert "permissions" in caught.value.hint


def test_two_machines_cannot_write_to_one_image(qmp: Qmp, home: Path) -> None:
    disk = one(home / "other.img")
    disks.plug(qmp, str(home), disk)
    with qemu(more=AGREEING) as second:
        before = state(second)
        with pytest.raises(Conflict, match=r"other.img is in use: Failed to get .write. lock"):
            disks.plug(second, str(home), disk)
        assert state(second) == before
        disks.plug(second, str(home), root(home))  # and may share what neither writes to
        disks.plug(qmp, str(home), root(home, port="rp1", chain=root(home)["chain"][:2], readonly=True))


def test_an_id_is_taken_once(qmp: Qmp, home: Path) -> None:
    disks.plug(qmp, str(home), one(home / "other.img"))
    before = state(qmp)
    with pytest.raises(Conflict, match="device disk1 already"):
        disks.plug(qmp, str(home), one(home / "base.img", port="rp2"))
    assert state(qmp) == before


def test_what_a_killed_command_left_is_no_obstacle(qmp: Qmp, home: Path) -> None:
    before = state(qmp)
    for fd in (fds := diskfiles.open_chain(str(home), root(home))):
        qmp.add_fd(fd, opaque=f"root-file{fds.index(fd)}")
        os.close(fd)
    for name, arguments in graph.plug_commands(root(home, iothread=True), [0, 1, 2])[:4]:
        qmp.command(name, arguments)
    disks.plug(qmp, str(home), root(home, iothread=True))
    disks.unplug(qmp, root(home))
    assert state(qmp) == before


def test_where_the_kernel_denies_io_uring_threads_do_it(qmp: Qmp, home: Path) -> None:
    tried = []

    class Denying(Failing):
        def command(self, name: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
            if arguments and "aio" in arguments:
                tried.append(arguments["aio"])
                if arguments["aio"] == "io_uring":
                    raise QmpError("blockdev-add: Unable to use linux io_uring: Operation not permitted")
            return super().command(name, arguments, **options)

    denying: Any = Denying(qmp, 99, QmpError(""), False)
    disks.plug(denying, str(home), one(home / "other.img"), io_uring=True)
    assert tried == ["io_uring", "threads"]
    with pytest.raises(QmpError, match="io_uring"):
        disks.plug(denying, str(home), one(home / "base.img", id="disk2", port="rp3", aio="io_uring"), io_uring=True)


# unplugging


def test_a_guest_that_says_nothing_keeps_its_disk(home: Path) -> None:
    with qemu(more=PORTS) as qmp:
        before = state(qmp)
        disks.plug(qmp, str(home), root(home))
        plugged = state(qmp)
        for _ in range(2):
            with pytest.raises(StateError, match=r"has not given root back in 0.1 seconds: it stays attached"):
                disks.unplug(qmp, root(home), timeout=0.1)
            assert state(qmp) == plugged
        qmp.command("system_reset")  # what the guest was asked for, it does now
        qmp.wait_event("DEVICE_DELETED", timeout=10, where=lambda event: event["data"].get("device") == "root")
        disks.unplug(qmp, root(home))
        assert state(qmp) == before


def test_a_paused_guest_cannot_give_a_disk_back(qmp: Qmp, home: Path) -> None:
    disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1"})
    disks.plug(qmp, str(home), root(home))
    disks.plug(qmp, str(home), one(home / "other.img", bus="scsi"))
    qmp.command("cont")
    qmp.command("stop")
    with pytest.raises(StateError, match="the guest has to give it back, and is paused") as caught:
        disks.unplug(qmp, root(home))
    assert "resume" in caught.value.hint
    disks.unplug(qmp, one(home / "other.img", bus="scsi"))  # nobody is asked here
    assert "disk1" not in disks.stats(qmp)


def test_an_export_keeps_the_image(qmp: Qmp, home: Path) -> None:
    before, disk = state(qmp), one(home / "other.img")
    disks.plug(qmp, str(home), disk)
    address = {"type": "unix", "data": {"path": f"{os.path.relpath(home)}/nbd"}}
    qmp.command("nbd-server-start", {"addr": address})
    qmp.command("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk1-fmt0"})
    with pytest.raises(Conflict, match="an image is still in use"):
        disks.unplug(qmp, disk)
    qmp.command("nbd-server-stop")
    disks.unplug(qmp, disk)
    assert state(qmp) == before


# changing


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_resize_and_throttle_live(bus: str, qmp: Qmp, home: Path) -> None:
    disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1"})
    disk = root(home, bus=bus)
    disks.plug(qmp, str(home), disk)
    disks.resize(qmp, disk, 8 * MIB)
    assert block(qmp, "root")["inserted"]["image"]["virtual-size"] == 8 * MIB
    write(qmp, disk, "-P 1 7M 64k")
    for size, words in ((4 * MIB, "cannot become smaller"), (9 * MIB + 1, "no whole number of sectors")):
        with pytest.raises(UsageError, match=words):
            disks.resize(qmp, disk, size)
    for iops, bps in ((10, 0), (0, MIB), (0, 0)):
        disks.throttle(qmp, disk, iops, bps)
        assert (block(qmp, "root")["inserted"]["iops"], block(qmp, "root")["inserted"]["bps"]) == (iops, bps)
    with pytest.raises(UsageError, match="out of range"):
        disks.throttle(qmp, disk, -1, 0)
    disks.unplug(qmp, disk)
    verify(home / "disks/root.qcow2", "1 7M 64k")


def test_what_cannot_be_resized(qmp: Qmp, home: Path) -> None:
    disks.plug(qmp, str(home), root(home, bus="nvme", iops=5))
    with pytest.raises(StateError, match="cannot grow while it is plugged in"):
        disks.resize(qmp, root(home, bus="nvme"), 8 * MIB)
    disks.throttle(qmp, root(home, bus="nvme"), 0, MIB)
    assert block(qmp, "root")["inserted"]["bps"] == MIB
    disks.unplug(qmp, root(home, bus="nvme"))
    with pytest.raises(NotFound, match="disk root is not plugged in"):
        disks.resize(qmp, root(home), 8 * MIB)
    with pytest.raises(UsageError, match="read-only"):
        disks.resize(qmp, root(home, readonly=True), 8 * MIB)
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", str(home / "a.vmdk"), "4M"], check=True, timeout=60)
    disk = one(home / "a.vmdk", chain=[{"path": str(home / "a.vmdk"), "format": "vmdk"}])
    disks.plug(qmp, str(home), disk)
    with pytest.raises(QmpError, match=r"disk disk1: block_resize: .*not support"):
        disks.resize(qmp, disk, 8 * MIB)


def test_a_medium_comes_and_goes(qmp: Bare, home: Path) -> None:
    disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1"})
    drive = cdrom(home, chain=[], iops=9)
    disks.plug(qmp, str(home), drive)
    disks.throttle(qmp, drive, 5, 0)  # nothing to limit yet
    empty = state(qmp)
    for path in (home / "cd.iso", home / "other.img", home / "cd.iso"):
        disks.change_medium(qmp, str(home), drive, medium(path))
        seen = block(qmp, "cdrom1")
        assert seen["tray_open"] is False and seen["inserted"]["iops"] == 9
        [fdset], nodes = state(qmp)["fdsets"], state(qmp)["nodes"]
        assert os.readlink(f"/proc/{qmp.pid}/fd/{fdset['fds'][0]['fd']}") == str(path) and len(nodes) == 2
    disks.change_medium(qmp, str(home), drive, None)
    assert state(qmp) == empty and block(qmp, "cdrom1")["tray_open"] is False
    with pytest.raises(UsageError, match="disk root is no CD-ROM drive"):
        disks.change_medium(qmp, str(home), root(home), None)


def test_a_medium_stays_when_the_next_does_not_fit(qmp: Qmp, home: Path) -> None:
    disks.plug_controller(qmp, {"id": "scsi0", "port": "rp1"})
    disks.plug(qmp, str(home), cdrom(home))
    before = state(qmp)

    def stays(qmp: Any, chain: Sequence[dict[str, Any]], kind: type[OvtError], words: str) -> None:
        with pytest.raises(kind, match=words):
            disks.change_medium(qmp, str(home), cdrom(home), chain, timeout=0.1)
        assert state(qmp) == before
        assert block(qmp if isinstance(qmp, Qmp) else qmp.qmp, "cdrom1")["inserted"]["node-name"] == "cdrom1-fmt0"

    class Locked(Failing):
        def command(self, name: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
            if name == "blockdev-open-tray" and arguments and not arguments["force"]:
                raise QmpError("blockdev-open-tray: Device 'cdrom1' is locked and force was not specified")
            return super().command(name, arguments, **options)

    class Jammed(Failing):
        def command(self, name: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
            if name == "blockdev-insert-medium" and arguments and arguments["node-name"] != "cdrom1-fmt0":
                raise QmpError("blockdev-insert-medium: jammed")
            return super().command(name, arguments, **options)

    locked = Locked(qmp, 99, QmpError(""), False)
    stays(qmp, medium(home / "none.iso"), NotFound, "has vanished")
    stays(qmp, [{"path": str(home / "cd.iso"), "format": "qcow2"}], QmpError, "not in qcow2 format")
    stays(locked, medium(home / "other.img"), StateError, "the guest has locked drive cdrom1")
    stays(Jammed(qmp, 99, QmpError(""), False), medium(home / "other.img"), QmpError, "jammed")
    disks.change_medium(locked, str(home), cdrom(home), None, force=True)  # type: ignore[arg-type]
    assert "inserted" not in block(qmp, "cdrom1")
