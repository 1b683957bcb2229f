"""Disks as QEMU is told of them: pure functions from a disk's record to QMP commands or words of the command line.

A disk's chain of images, bottom to top, becomes one file node `ID-fileN` and one format node `ID-fmtN` for each image,
the device `ID` stands on the topmost. Backing nodes are always named or denied: QEMU never follows a name that stands
in an image. Every file is a descriptor that QEMU was given, the set K of them is /dev/fdset/K.

Limits of throughput are the device's own (block_set_io_throttle) and no throttle filter in the graph: they can be
changed on any disk at any time, cost nothing where there are none, and the topmost format node stays a root node,
which block jobs ask for.

A record: {"id", "device": disk | cdrom, "bus": virtio | scsi | nvme | sata, "chain": [{"path", "format", "block"?}],
"cache", "aio", "discard", "iothread", "iops", "bps", "serial", "readonly", "port" of virtio and nvme, "unit" of scsi
(0 to 255) and sata (0 to 5), "queues" of virtio, "bootindex"}; what is missing or empty has its default. `block` says
that the image is a block device. A SCSI disk needs the controller: {"id": "scsi0", "port", "queues", "iothread"}.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ovt.errors import UsageError

Record = Mapping[str, Any]
Command = tuple[str, dict[str, Any]]

SCSI = "scsi0"
FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi")
LAYERED = ("qcow2", "vmdk")  # those with a backing image
BUSES = ("virtio", "scsi", "nvme", "sata")
SATA_PORTS = 6  # of q35's own controller
SCSI_TARGETS = 256
LARGEST_LIMIT = 10**15  # QEMU's own, per second

# (past the host's page cache, without flushes, guest sees a write cache that it has to flush)
_CACHES = {
    "writeback": (False, False, True),
    "none": (True, False, True),
    "writethrough": (False, False, False),
    "directsync": (True, False, False),
    "unsafe": (False, True, True),
}
_AIOS = ("threads", "native", "io_uring")
_DRIVERS = {
    ("virtio", "disk"): "virtio-blk-pci",
    ("scsi", "disk"): "scsi-hd",
    ("scsi", "cdrom"): "scsi-cd",
    ("nvme", "disk"): "nvme",
    ("sata", "disk"): "ide-hd",
    ("sata", "cdrom"): "ide-cd",
}
_SERIALS = {"virtio": 20, "scsi": 36, "nvme": 20, "sata": 20}  # characters that a guest sees; more are cut off
_SERIAL = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")
_NODE = re.compile(r"(?P<id>.+)-(?P<kind>file|fmt)(?P<number>\d+)")


def check(disk: Record) -> None:
    """UsageError for a record that contradicts itself or that QEMU would not take."""
    id, bus, kind = disk["id"], disk.get("bus") or "virtio", disk.get("device") or "disk"
    if bus not in BUSES:
        raise UsageError(f"disk {id}: bus {bus!r} is not known", "one of " + " ".join(BUSES))
    if (bus, kind) not in _DRIVERS:
        if kind == "cdrom":
            raise UsageError(f"disk {id}: there are no CD-ROM drives on bus {bus}", "bus scsi or sata")
        raise UsageError(f"disk {id}: device {kind!r} is not known", "disk or cdrom")
    cache, aio = disk.get("cache") or "writeback", disk.get("aio") or "threads"
    if cache not in _CACHES:
        raise UsageError(f"disk {id}: cache {cache!r} is not known", "one of " + " ".join(_CACHES))
    if aio not in _AIOS:
        raise UsageError(f"disk {id}: aio {aio!r} is not known", "one of " + " ".join(_AIOS))
    if aio == "native" and not direct(disk):
        raise UsageError(f"disk {id}: aio native works only past the page cache", "cache none or directsync")
    if disk.get("iothread") and bus != "virtio":
        raise UsageError(
            f"disk {id}: a {bus} disk has no iothread of its own",
            "the controller's, for scsi; else bus virtio" if bus == "scsi" else "bus virtio",
        )
    if disk.get("readonly") and bus == "sata" and kind == "disk":
        raise UsageError(f"disk {id}: a sata disk cannot be read-only", "another bus, or a CD-ROM drive")
    serial = disk.get("serial") or ""
    if serial and (len(serial) > _SERIALS[bus] or not _SERIAL.fullmatch(serial)):
        raise UsageError(
            f"disk {id}: serial {serial!r} does not fit: at most {_SERIALS[bus]} characters on bus {bus}",
            "letters, digits, dot, dash and underscore",
        )
    for name in ("iops", "bps"):
        check_limit(id, name, disk.get(name) or 0)
    units = {"scsi": SCSI_TARGETS, "sata": SATA_PORTS}.get(bus, 1)
    if not 0 <= disk.get("unit", 0) < units:
        raise UsageError(f"disk {id}: unit {disk['unit']} is not there: bus {bus} has 0 to {units - 1}")
    _check_chain(id, disk.get("chain") or [], kind)


def _check_chain(id: str, chain: Sequence[Record], kind: str) -> None:
    if not chain and kind == "disk":
        raise UsageError(f"disk {id} has no image")
    for number, layer in enumerate(chain):
        if layer["format"] not in FORMATS:
            raise UsageError(f"disk {id}: format {layer['format']!r} is not known", "one of " + " ".join(FORMATS))
        if number and layer["format"] not in LAYERED:
            raise UsageError(f"disk {id}: {layer['path']}: a {layer['format']} image cannot stand on another")


def check_limit(id: str, name: str, value: int) -> None:
    """UsageError for a limit per second that QEMU would not take."""
    if not 0 <= value <= LARGEST_LIMIT:
        raise UsageError(f"disk {id}: {name} {value} is out of range", f"0 (no limit) to {LARGEST_LIMIT}")


def direct(disk: Record) -> bool:
    """Whether images are read and written past the host's page cache (O_DIRECT)."""
    return _CACHES[disk.get("cache") or "writeback"][0]


def read_only(disk: Record) -> bool:
    """Whether the guest cannot write to it."""
    return bool(disk.get("readonly")) or disk.get("device") == "cdrom"


def cold(disk: Record) -> bool:
    """Whether the device can only be on the command line: QEMU's sata controller takes none later, not even at -S."""
    return disk.get("bus") == "sata"


def open_flags(disk: Record, number: int, *, writable: bool | None = None) -> int:
    """How image `number` of the chain has to be opened: QEMU takes a descriptor whose flags are those that it would
    have used, O_DIRECT among them (QEMU 9.1). `writable` overrules that only the top of a disk is, for block jobs."""
    if writable is None:
        writable = number == len(disk["chain"]) - 1 and not read_only(disk)
    return (os.O_RDWR if writable else os.O_RDONLY) | (os.O_DIRECT if direct(disk) else 0)


def file_node(id: str, number: int) -> str:
    """The name of the node of image file `number`."""
    return f"{id}-file{number}"


def format_node(id: str, number: int) -> str:
    """The name of the node of image `number`'s content."""
    return f"{id}-fmt{number}"


def parse_node(name: str) -> tuple[str, str, int] | None:
    """(disk, "file" or "fmt", number) of a node of ours; None for any other."""
    match = _NODE.fullmatch(name)
    return (match["id"], match["kind"], int(match["number"])) if match else None


def owned_nodes(id: str, names: Iterable[str]) -> list[str]:
    """Those of the nodes that belong to disk `id`, in an order that they can be deleted in: from the top down."""
    found = []
    for name in names:
        node = parse_node(name)
        if node and node[0] == id:
            found.append((-node[2], node[1] == "file", name))
    return [name for _, _, name in sorted(found)]


def file_blockdev(disk: Record, number: int, fdset: int, *, writable: bool, io_uring: bool, first: int = 0) -> Command:
    """blockdev-add of the file of image `number`, which is /dev/fdset/`fdset`.

    `io_uring` says what is used for a disk that does not say. `first` is added to `number` in the name.
    """
    options: dict[str, Any] = {
        "driver": "host_device" if disk["chain"][number].get("block") else "file",
        "node-name": file_node(disk["id"], first + number),
        "filename": f"/dev/fdset/{fdset}",
        "read-only": not writable,
        "auto-read-only": False,
        "aio": disk.get("aio") or ("io_uring" if io_uring else "threads"),
        "cache": _cache(disk),
        "locking": "auto",
    }
    if _discards(disk):
        options["discard"] = "unmap"
    return ("blockdev-add", options)


def format_blockdev(disk: Record, number: int, *, writable: bool, first: int = 0) -> Command:
    """blockdev-add of the content of image `number`, above its file and the image below."""
    id, format = disk["id"], disk["chain"][number]["format"]
    options: dict[str, Any] = {
        "driver": format,
        "node-name": format_node(id, first + number),
        "file": file_node(id, first + number),
        "read-only": not writable,
        "auto-read-only": False,
        "cache": _cache(disk),
    }
    if format in LAYERED:
        options["backing"] = format_node(id, first + number - 1) if number else None
    if _discards(disk):
        options["discard"] = "unmap"
        if writable:
            options["detect-zeroes"] = "unmap"
    return ("blockdev-add", options)


def node_commands(disk: Record, fdsets: Sequence[int], *, io_uring: bool = False, first: int = 0) -> list[Command]:
    """What makes the nodes of the chain, bottom to top; `fdsets` has the number of each image's set of descriptors."""
    commands = []
    top = len(disk.get("chain") or []) - 1
    for number in range(top + 1):
        writable = number == top and not read_only(disk)
        commands.append(file_blockdev(disk, number, fdsets[number], writable=writable, io_uring=io_uring, first=first))
        commands.append(format_blockdev(disk, number, writable=writable, first=first))
    return commands


def plug_commands(disk: Record, fdsets: Sequence[int], *, io_uring: bool = False) -> list[Command]:
    """Everything that plugs the disk in, in order. UsageError where it contradicts itself (see check)."""
    check(disk)
    id = disk["id"]
    commands = [("object-add", {"qom-type": "iothread", "id": iothread(id)})] if disk.get("iothread") else []
    commands += node_commands(disk, fdsets, io_uring=io_uring)
    commands.append(("device_add", device(disk)))
    if disk.get("chain") and (disk.get("iops") or disk.get("bps")):
        commands.append(throttle_command(disk, disk.get("iops") or 0, disk.get("bps") or 0))
    return commands


def words(disk: Record, fdsets: Sequence[int], *, io_uring: bool = False) -> list[str]:
    """The same for a disk that has to be on the command line (see cold); limits are set when QEMU runs."""
    options = {"object-add": "-object", "blockdev-add": "-blockdev", "device_add": "-device"}
    found = []
    for name, arguments in plug_commands(disk, fdsets, io_uring=io_uring):
        if name in options:
            found += [options[name], json.dumps(arguments)]
    return found


def device(disk: Record) -> dict[str, Any]:
    """The arguments of device_add."""
    id, bus, kind = disk["id"], disk.get("bus") or "virtio", disk.get("device") or "disk"
    chain = disk.get("chain") or []
    options: dict[str, Any] = {"driver": _DRIVERS[bus, kind], "id": id}
    if bus in ("virtio", "nvme"):
        options["bus"] = disk["port"]
        if disk.get("addr"):
            options["addr"] = disk["addr"]
    elif bus == "scsi":
        options |= {"bus": f"{SCSI}.0", "channel": 0, "scsi-id": disk.get("unit", 0), "lun": 0}
    else:
        options |= {"bus": f"ide.{disk.get('unit', 0)}", "unit": 0}
    if chain:
        options["drive"] = format_node(id, len(chain) - 1)
    if kind == "disk":
        options["write-cache"] = "on" if _CACHES[disk.get("cache") or "writeback"][2] else "off"
    if disk.get("serial") or bus == "nvme":  # an nvme controller has to have one
        options["serial"] = disk.get("serial") or id[: _SERIALS[bus]]
    if "bootindex" in disk:
        options["bootindex"] = disk["bootindex"]
    if bus == "virtio":
        options["num-queues"] = disk.get("queues") or 1
        options["discard"] = _discards(disk)
        if disk.get("iothread"):
            options["iothread"] = iothread(id)
    return options


def controller_commands(controller: Record) -> list[Command]:
    """What plugs in the SCSI controller, on which all scsi disks and drives are."""
    id = controller["id"]
    options = {
        "driver": "virtio-scsi-pci",
        "id": id,
        "bus": controller["port"],
        "num_queues": controller.get("queues") or 1,
    }
    commands: list[Command] = []
    if controller.get("iothread"):
        commands.append(("object-add", {"qom-type": "iothread", "id": iothread(id)}))
        options["iothread"] = iothread(id)
    return [*commands, ("device_add", options)]


def throttle_command(disk: Record, iops: int, bps: int) -> Command:
    """What limits the disk to that many operations and bytes per second together for reads and writes; 0: no limit."""
    each = {"iops_rd": 0, "iops_wr": 0, "bps_rd": 0, "bps_wr": 0}
    return ("block_set_io_throttle", {"id": qom_path(disk), "iops": iops, "bps": bps, **each})


def qom_path(disk: Record) -> str:
    """Where QEMU keeps the device that has the drive."""
    # virtio-blk-pci is only the card; the device proper is inside it, and knows nothing of the id
    inside = "/virtio-backend" if (disk.get("bus") or "virtio") == "virtio" else ""
    return f"/machine/peripheral/{disk['id']}{inside}"


def iothread(id: str) -> str:
    """The name of the thread of device `id`."""
    return f"{id}-iothread"


def undo_command(command: Command) -> Command | None:
    """What takes back a command of plug_commands or controller_commands; None where the device takes it along."""
    name, arguments = command
    if name == "object-add":
        return ("object-del", {"id": arguments["id"]})
    if name == "blockdev-add":
        return ("blockdev-del", {"node-name": arguments["node-name"]})
    return ("device_del", {"id": arguments["id"]}) if name == "device_add" else None


def _cache(disk: Record) -> dict[str, bool]:
    past_cache, no_flush, _ = _CACHES[disk.get("cache") or "writeback"]
    return {"direct": past_cache, "no-flush": no_flush}


def _discards(disk: Record) -> bool:
    return bool(disk.get("discard", True)) and not read_only(disk)
