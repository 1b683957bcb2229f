"""From what an owner asks for to frozen records and images, by the real qemu-img."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import blockgraph, diskrecords
from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError
from ovt.image import disk as images
from ovt.model import Disk

pytestmark = pytest.mark.qemu
MIB = 1 << 20


@pytest.fixture
def home(tmp_path: Path) -> str:
    (tmp_path / "home").mkdir()
    return str(tmp_path / "home")


@pytest.fixture
def raw(tmp_path: Path) -> str:
    path = tmp_path / "cloud.img"
    path.write_bytes(b"boot" + bytes(4 * MIB - 4))
    return str(path)


def qcow2(path: Path, *more: str) -> str:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *more, str(path)], check=True, timeout=60)
    return str(path)


def made(home: str) -> list[str]:
    return sorted(os.listdir(f"{home}/disks")) if os.path.exists(f"{home}/disks") else []


def test_an_image_gets_an_overlay(home: str, raw: str) -> None:
    seen = diskrecords.prepare([Disk(raw, size=8 * MIB)], home, vcpus=2, make=False)
    assert not os.path.exists(f"{home}/disks")
    [record] = diskrecords.prepare([Disk(raw, size=8 * MIB)], home, vcpus=2)
    assert seen == [record]
    assert record == {
        "id": "root",
        "device": "disk",
        "bus": "virtio",
        "chain": [{"path": raw, "format": "raw"}, {"path": "disks/root.qcow2", "format": "qcow2"}],
        "readonly": False,
        "cache": "writeback",
        "aio": "",
        "discard": True,
        "iothread": False,
        "iops": 0,
        "bps": 0,
        "serial": "root",
        "queues": 2,
        "bootindex": 1,
    }
    top = images.probe(f"{home}/disks/root.qcow2", allow_backing=True)
    assert (top.virtual_size, top.backing, top.backing_format) == (8 * MIB, raw, "raw")
    assert os.stat(f"{home}/disks").st_mode & 0o777 == 0o700
    assert diskrecords.own_files(record) == ["disks/root.qcow2"]
    assert json.loads(json.dumps(record)) == record


def test_every_mode_bus_and_name(home: str, raw: str, tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2", "-b", raw, "-F", "raw")
    subprocess.run(["qemu-img", "rebase", "-q", "-f", "qcow2", "-b", "", base], check=True, timeout=60)
    wanted = [
        Disk(base, mode="direct", iothread=True, serial="S1"),
        Disk(device="cdrom"),
        Disk(size=MIB, bus="nvme", id="data"),
        Disk(size=MIB, format="raw", bus="scsi", iothread=True),
        Disk(raw, device="cdrom", bus="sata"),
        Disk(raw, mode="readonly", bus="scsi", format="raw"),
        Disk(size=MIB, bus="sata"),
    ]
    records = diskrecords.prepare(wanted, home, vcpus=40)
    assert [(record["id"], record["bus"], record.get("unit"), record["bootindex"]) for record in records] == [
        ("root", "virtio", None, 1),
        ("cdrom1", "scsi", 0, 6),
        ("data", "nvme", None, 2),
        ("disk1", "scsi", 1, 3),
        ("cdrom2", "sata", 0, 7),
        ("disk2", "scsi", 2, 4),
        ("disk3", "sata", 1, 5),
    ]
    assert [record["readonly"] for record in records] == [False, True, False, False, True, True, False]
    assert [record["iothread"] for record in records] == [True, *[False] * 6]
    assert (records[0]["queues"], records[0]["serial"], records[0]["chain"]) == (
        16,
        "S1",
        [{"path": base, "format": "qcow2"}],
    )
    assert records[1]["chain"] == [] and records[4]["chain"] == [{"path": raw, "format": "raw"}]
    assert made(home) == ["data.qcow2", "disk1.raw", "disk3.qcow2"]
    assert [diskrecords.needs_port(record) for record in records] == [True, False, True, *[False] * 4]
    for record in records:
        blockgraph.plug_commands({**record, "port": "rp0"}, range(9))
    assert diskrecords.new_controller(wanted, [], 40) == {"id": "scsi0", "queues": 16, "iothread": True}
    assert diskrecords.new_controller(wanted, [{"id": "scsi0"}]) is None
    assert diskrecords.new_controller([Disk(raw)], []) is None


def test_what_is_attached_later_joins_the_others(home: str, raw: str) -> None:
    existing = diskrecords.prepare([Disk(raw), Disk(size=MIB, bus="scsi")], home)
    [record] = diskrecords.prepare([Disk(size=MIB, bus="scsi")], home, existing=existing)
    assert (record["id"], record["unit"]) == ("disk2", 1) and "bootindex" not in record
    (Path(home) / "disks" / "disk3.qcow2").touch()  # what a killed attach has left
    [record] = diskrecords.prepare([Disk(size=MIB)], home, existing=[*existing, record])
    assert record["chain"][0]["path"] == "disks/disk3.1.qcow2"
    with pytest.raises(Conflict, match="there is a disk disk1 already"):
        diskrecords.prepare([Disk(size=MIB, id="disk1")], home, existing=existing)
    with pytest.raises(UsageError, match="SCSI controller has no iothread"):
        diskrecords.prepare(
            [Disk(size=MIB, bus="scsi", iothread=True)], home, existing=existing, controllers=[{"id": "scsi0"}]
        )


def test_links_are_followed_once(home: str, raw: str, tmp_path: Path) -> None:
    (tmp_path / "link.img").symlink_to(raw)
    (Path(home) / "seed.iso").write_bytes(bytes(4096))
    link, seed = diskrecords.prepare(
        [Disk(str(tmp_path / "link.img"), mode="direct"), Disk(f"{home}/seed.iso", device="cdrom")], home
    )
    assert link["chain"][0]["path"] == raw
    assert seed["chain"][0]["path"] == "seed.iso"


def test_a_header_is_believed_only_where_it_is_allowed(home: str, raw: str, tmp_path: Path) -> None:
    overlay = qcow2(tmp_path / "overlay.qcow2", "-b", raw, "-F", "raw")
    with pytest.raises(OvtError, match="is a difference to another image"):
        diskrecords.prepare([Disk(overlay)], home)
    [record] = diskrecords.prepare([Disk(overlay)], home, allow_backing=True)
    assert [layer["format"] for layer in record["chain"]] == ["raw", "qcow2", "qcow2"]
    [record] = diskrecords.prepare([Disk(overlay, id="r", mode="readonly", format="raw")], home)
    assert record["chain"] == [{"path": overlay, "format": "raw"}]


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"source": "relative.img"}, UsageError, "no absolute path"),
        ({"source": "/none.img"}, NotFound, "no disk image /none.img"),
        ({"mode": "shared"}, UsageError, "mode 'shared' is not known"),
        ({"source": ""}, UsageError, "neither an image nor a size"),
        ({"source": "", "size": MIB, "mode": "direct"}, UsageError, "a new disk has no mode direct"),
        ({"source": "", "size": MIB, "format": "vmdk"}, UsageError, "qcow2 or raw"),
        ({"source": "", "size": MIB + 1}, UsageError, "cannot have 1048577 bytes"),
        ({"size": MIB}, UsageError, "do not fit"),
        ({"size": 8 * MIB, "mode": "readonly"}, UsageError, "has the size of its image"),
        ({"format": "qcow2"}, UsageError, "is a raw image, not qcow2"),
        ({"device": "cdrom", "size": MIB}, UsageError, "no size of its own"),
        ({"device": "cdrom", "bus": "nvme"}, UsageError, "no CD-ROM drives on bus nvme"),
        ({"mode": "readonly", "bus": "sata"}, UsageError, "sata disk cannot be read-only"),
        ({"id": "../x"}, UsageError, "cannot have the id"),
        ({"id": "rp1"}, UsageError, "cannot have the id"),
        ({"id": "root"}, Conflict, "there is a disk root already"),
        ({"cache": "fast"}, UsageError, "cache 'fast'"),
    ],
)
def test_a_bad_wish_makes_nothing(
    changes: dict[str, Any], kind: type[OvtError], words: str, home: str, raw: str
) -> None:
    with pytest.raises(kind, match=words):
        diskrecords.prepare([Disk(raw), Disk(**{"source": raw, **changes})], home)
    assert not os.path.exists(f"{home}/disks")


def test_images_in_several_files_are_refused(home: str, tmp_path: Path) -> None:
    path = tmp_path / "split.vmdk"
    options = ["-f", "vmdk", "-o", "subformat=monolithicFlat"]
    subprocess.run(["qemu-img", "create", "-q", *options, str(path), "1M"], check=True, timeout=60)
    with pytest.raises(OvtError, match=r"keeps its data in other files: split-flat\.vmdk"):
        diskrecords.prepare([Disk(str(path))], home)


def test_a_failure_takes_back_what_was_made(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = images.create

    def failing(path: str, size: int, *, format: str) -> None:
        if path.endswith("disk1.qcow2"):
            raise HostError("no space left on device", 28)
        create(path, size, format=format)

    monkeypatch.setattr(images, "create", failing)
    with pytest.raises(HostError, match="no space"):
        diskrecords.prepare([Disk(size=MIB), Disk(size=MIB)], home)
    assert not os.path.exists(f"{home}/disks")
