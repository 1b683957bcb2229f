"""What QEMU is told of disks, against a golden file (`OVT_REGENERATE=1` writes it anew)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import blockgraph as graph
from ovt.errors import UsageError

GOLDEN = Path(__file__).parents[3] / "golden" / "vm-disks.json"
BASE = {"path": "/images/base.img", "format": "raw"}
MIDDLE = {"path": "/images/middle.qcow2", "format": "qcow2"}
TOP = {"path": "disks/root.qcow2", "format": "qcow2"}
ISO = {"path": "/images/debian.iso", "format": "raw"}


def disk(**changes: Any) -> dict[str, Any]:
    return {"id": "root", "device": "disk", "bus": "virtio", "port": "rp0", "chain": [BASE, TOP], **changes}


def cdrom(**changes: Any) -> dict[str, Any]:
    return {"id": "cdrom1", "device": "cdrom", "bus": "scsi", "unit": 1, "chain": [ISO], "readonly": True, **changes}


CASES: dict[str, dict[str, Any]] = {
    "plain": disk(),
    "chain of three": disk(chain=[BASE, MIDDLE, TOP]),
    "everything": disk(
        serial="S-1",
        queues=4,
        bootindex=1,
        iothread=True,
        iops=500,
        bps=1 << 20,
        addr="0x0",
        aio="native",
        cache="none",
    ),
    "read-only": disk(readonly=True),
    "without discard": disk(discard=False),
    "block device": disk(chain=[{"path": "/dev/vg/lv", "format": "raw", "block": True}]),
    "writethrough": disk(cache="writethrough"),
    "directsync": disk(cache="directsync"),
    "unsafe": disk(cache="unsafe"),
    "threads": disk(aio="threads"),
    "only operations limited": disk(iops=100),
    **{f"one {format} image": disk(chain=[{"path": "/i", "format": format}]) for format in graph.FORMATS},
    "scsi": disk(bus="scsi", unit=3, serial="a", bootindex=2, bps=1),
    "nvme": disk(bus="nvme", port="rp3", cache="writethrough", iops=7),
    "sata": disk(bus="sata", unit=2, serial="b"),
    "scsi cdrom": cdrom(),
    "scsi cdrom, empty, limited": cdrom(chain=[], bps=1 << 20),
    "sata cdrom": cdrom(bus="sata", unit=5, bootindex=3),
    "sata cdrom, empty": cdrom(bus="sata", unit=0, chain=[]),
}


def golden() -> str:
    made: dict[str, Any] = {
        name: graph.plug_commands(case, range(10, 20), io_uring=True) for name, case in CASES.items()
    }
    for name in ("sata", "sata cdrom, empty"):
        made[f"{name}, on the command line"] = graph.words(CASES[name], [10, 11])
    made["controller"] = graph.controller_commands({"id": "scsi0", "port": "rp1"})
    made["controller with a thread"] = graph.controller_commands(
        {"id": "scsi0", "port": "rp1", "queues": 4, "iothread": True}
    )
    made["a new medium beside the old"] = graph.node_commands(cdrom(), [5], first=3)
    lists = (
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(step) for step in steps) + "\n ]"
        for name, steps in made.items()
    )
    return "{\n" + ",\n".join(lists) + "\n}\n"


def test_golden() -> None:
    text = golden()
    if os.environ.get("OVT_REGENERATE"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_top_alone_is_written_to_and_no_header_is_believed(name: str) -> None:
    case = CASES[name]
    nodes = [arguments for command, arguments in graph.plug_commands(case, range(9)) if command == "blockdev-add"]
    top = len(case["chain"]) - 1
    for node in nodes:
        number = int(node["node-name"][-1])
        assert node["read-only"] == (number < top or graph.read_only(case))
        assert node["auto-read-only"] is False
        if node["driver"] in ("qcow2", "vmdk"):
            assert node["backing"] == (f"{case['id']}-fmt{number - 1}" if number else None)
        if "filename" in node:
            assert node["filename"] == f"/dev/fdset/{number}"
    assert all(layer["path"] not in json.dumps(nodes) for layer in case["chain"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bus": "usb"}, "bus 'usb' is not known"),
        ({"device": "floppy"}, "device 'floppy' is not known"),
        ({"device": "cdrom"}, "no CD-ROM drives on bus virtio"),
        ({"cache": "fast"}, "cache 'fast' is not known"),
        ({"aio": "posix"}, "aio 'posix' is not known"),
        ({"aio": "native"}, "only past the page cache"),
        ({"bus": "scsi", "iothread": True}, "a scsi disk has no iothread of its own"),
        ({"bus": "nvme", "iothread": True}, "a nvme disk has no iothread"),
        ({"bus": "sata", "readonly": True}, "a sata disk cannot be read-only"),
        ({"serial": "x" * 21}, "at most 20 characters"),
        ({"serial": "a,b=c"}, "does not fit"),
        ({"iops": -1}, "iops -1 is out of range"),
        ({"bps": 10**15 + 1}, "bps 1000000000000001 is out of range"),
        ({"bus": "sata", "unit": 6}, "unit 6 is not there"),
        ({"bus": "scsi", "unit": 256}, "unit 256 is not there"),
        ({"chain": []}, "has no image"),
        ({"chain": [{"path": "/i", "format": "qed"}]}, "format 'qed' is not known"),
        ({"chain": [TOP, BASE]}, "a raw image cannot stand on another"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        graph.plug_commands(disk(**changes), [0, 1])
    assert "root" in caught.value.message


def test_flags_are_those_that_qemu_would_open_with() -> None:
    assert [graph.open_flags(disk(), number) for number in (0, 1)] == [os.O_RDONLY, os.O_RDWR]
    assert graph.open_flags(disk(readonly=True), 1) == os.O_RDONLY
    assert graph.open_flags(disk(cache="none"), 1) == os.O_RDWR | os.O_DIRECT
    assert graph.open_flags(disk(cache="directsync"), 0, writable=True) == os.O_RDWR | os.O_DIRECT


def test_nodes_are_deleted_from_the_top_down() -> None:
    names = ["a-file0", "a-fmt0", "b-fmt0", "a-fmt10", "a-file10", "a-fmt9", "#block1", "a-b-fmt0", "a-other"]
    assert graph.owned_nodes("a", names) == ["a-fmt10", "a-file10", "a-fmt9", "a-fmt0", "a-file0"]


def test_each_step_has_its_undoing() -> None:
    commands = graph.plug_commands(CASES["everything"], [0, 1])
    undone = [graph.undo_command(command) for command in commands]
    assert undone[0] == ("object-del", {"id": "root-iothread"})
    assert undone[1] == ("blockdev-del", {"node-name": "root-file0"})
    assert undone[-2:] == [("device_del", {"id": "root"}), None]
