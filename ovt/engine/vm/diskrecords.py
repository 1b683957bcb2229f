"""From the disks that an owner asks for to the records that are frozen, and to the files that these name.

Done once for each disk: at the machine's first start, or when it is attached. The chain of images is walked here, with
suspicion (ovt.image.disk), and written down; no header is believed again after that.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from typing import Any

from ovt.engine.vm import blockgraph as graph
from ovt.engine.vm.blockgraph import Record
from ovt.errors import Conflict, OvtError, UsageError
from ovt.image import disk as images
from ovt.model import Disk

DIRECTORY = "disks"  # of the instance's own images, below its home
MODES = ("overlay", "direct", "readonly")
_MOST_QUEUES = 16  # of one disk; more only cost memory
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")  # fits a serial number too
_RESERVED = re.compile(
    r"(agent|balloon|cpu|dimm|exit|generation|hostdev|mem|nic|panic|rng|rp|scsi|serial|share|video|vsock|watchdog)\d+"
)


def prepare(
    disks: Sequence[Disk],
    home: str,
    *,
    vcpus: int = 1,
    existing: Sequence[Record] = (),
    controllers: Sequence[Record] = (),
    allow_backing: bool = False,
    make: bool = True,
) -> list[dict[str, Any]]:
    """A record for each disk, without its port, and the images that the instance has of its own; all or nothing.

    Without `make` no image is made, for one who only wants to see.

    `existing` and `controllers` are the machine's disks and controllers so far; a machine that has no disks yet gets an
    order to boot from: disks, the first before all, then CD-ROM drives. `allow_backing` lets an image be a difference
    to others that its header names. UsageError for what contradicts itself, Conflict for an id that is taken, and the
    errors of ovt.image.disk for images that are none, damaged or missing.
    """
    records: list[dict[str, Any]] = []
    for disk in disks:
        records.append(_record(disk, home, [*existing, *records], controllers, vcpus, allow_backing))
    if not existing:
        _order(records)
    made: list[str] = []
    try:
        for disk, record in zip(disks, records if make else (), strict=make):
            _make_image(disk, record, home, made)
    except BaseException:
        for path in made:
            os.unlink(path)
        with contextlib.suppress(OSError):  # others are in it
            os.rmdir(f"{home}/{DIRECTORY}")
        raise
    return records


def new_controller(disks: Sequence[Disk], controllers: Sequence[Record], vcpus: int = 1) -> dict[str, Any] | None:
    """The SCSI controller that these disks need, without its port; None when there is one or none is needed."""
    ours = [disk for disk in disks if _bus(disk) == "scsi"]
    if not ours or any(controller["id"] == graph.SCSI for controller in controllers):
        return None
    return {
        "id": graph.SCSI,
        "queues": min(vcpus, _MOST_QUEUES),
        "iothread": any(disk.iothread for disk in ours),
    }


def needs_port(record: Record) -> bool:
    """Whether the disk sits in a root port of its own."""
    return record["bus"] in ("virtio", "nvme")


def own_files(record: Record) -> list[str]:
    """The images of the disk's chain that belong to the instance, as paths below its home."""
    return [layer["path"] for layer in record["chain"] if not os.path.isabs(layer["path"])]


def layer(path: str, format: str, home: str) -> dict[str, Any]:
    """The record of one image of a chain, found by its real name; a path below `home` becomes relative to it."""
    if not path.startswith("/dev/"):  # a link there is a name that stays, what it points to is not
        path = os.path.realpath(path)
    block = stat.S_ISBLK(os.stat(path).st_mode)
    own = os.path.realpath(home) + "/"
    found: dict[str, Any] = {"path": path.removeprefix(own), "format": format}
    return found | {"block": True} if block else found


def _bus(disk: Disk) -> str:
    """CD-ROM drives are on the SCSI controller unless asked for otherwise: it is virtio's, and takes them any time."""
    return "scsi" if disk.device == "cdrom" and disk.bus == "virtio" else disk.bus


def _record(
    disk: Disk,
    home: str,
    others: Sequence[Record],
    controllers: Sequence[Record],
    vcpus: int,
    allow_backing: bool,
) -> dict[str, Any]:
    bus, id = _bus(disk), _id(disk, others)
    _check(disk, id)
    chain = _chain(disk, home, id, allow_backing) if disk.source else []
    if disk.device == "disk" and (disk.mode == "overlay" or not disk.source):
        format = "raw" if not disk.source and disk.format == "raw" else "qcow2"
        chain.append({"path": _own_path(home, id, format), "format": format})
    record: dict[str, Any] = {
        "id": id,
        "device": disk.device,
        "bus": bus,
        "chain": chain,
        "readonly": disk.device == "cdrom" or disk.mode == "readonly",
        "cache": disk.cache or "writeback",
        "aio": disk.aio,
        "discard": disk.discard,
        "iothread": disk.iothread and bus != "scsi",
        "iops": disk.iops,
        "bps": disk.bps,
        "serial": disk.serial or id,  # by which a guest finds it: /dev/disk/by-id/virtio-ID
    }
    if bus == "virtio":
        record["queues"] = min(vcpus, _MOST_QUEUES)
    elif bus in ("scsi", "sata"):
        taken = {other.get("unit", 0) for other in others if other["bus"] == bus}
        record["unit"] = next(unit for unit in range(len(taken) + 1) if unit not in taken)
    if bus == "scsi" and disk.iothread and any(not controller.get("iothread") for controller in controllers):
        raise UsageError(f"disk {id}: the machine's SCSI controller has no iothread", "bus virtio")
    graph.check(record)
    return record


def _id(disk: Disk, others: Sequence[Record]) -> str:
    taken = {other["id"] for other in others}
    if disk.id:
        if not _ID.fullmatch(disk.id) or _RESERVED.fullmatch(disk.id):
            raise UsageError(
                f"a disk cannot have the id {disk.id!r}", "a letter, then up to 19 letters, digits, dashes, underscores"
            )
        if disk.id in taken:
            raise Conflict(f"there is a disk {disk.id} already", "choose another id")
        return disk.id
    if disk.device != "cdrom" and not any(other["device"] == "disk" for other in others) and "root" not in taken:
        return "root"
    prefix = "cdrom" if disk.device == "cdrom" else "disk"
    return next(f"{prefix}{n}" for n in range(1, len(taken) + 2) if f"{prefix}{n}" not in taken)


def _check(disk: Disk, id: str) -> None:
    if disk.source and not os.path.isabs(disk.source):
        raise UsageError(f"disk {id}: {disk.source!r} is no absolute path")
    if disk.mode not in MODES:
        raise UsageError(f"disk {id}: mode {disk.mode!r} is not known", "one of " + " ".join(MODES))
    if disk.device == "cdrom":
        if disk.size:
            raise UsageError(f"{id} is a CD-ROM drive and has no size of its own", "leave out the size")
        return
    if not disk.source:
        if not disk.size:
            raise UsageError(f"disk {id} has neither an image nor a size", "size=10G for a new one")
        if disk.mode != "overlay":
            raise UsageError(f"disk {id}: a new disk has no mode {disk.mode}", "leave out the mode")
        if disk.format not in ("", "qcow2", "raw"):
            raise UsageError(f"disk {id}: new images are qcow2 or raw, not {disk.format!r}")
    elif disk.size and disk.mode != "overlay":
        raise UsageError(
            f"disk {id}: in mode {disk.mode} it has the size of its image", "leave out the size, and resize it later"
        )


def _chain(disk: Disk, home: str, id: str, allow_backing: bool) -> list[dict[str, Any]]:
    if disk.format == "raw":
        found = [(images.probe(disk.source, format="raw").path, "raw")]
    else:
        found = images.chain(disk.source, allow_backing=allow_backing)
    path, format = found[-1]
    if disk.format not in ("", format):
        raise UsageError(f"disk {id}: {path} is a {format} image, not {disk.format}")
    for path, format in found:
        extents = images.probe(path, format=format, allow_backing=True).extents
        if extents:  # QEMU is given one descriptor for each image
            raise OvtError(
                f"disk {id}: {path} keeps its data in other files: {', '.join(extents)}",
                "make it one image: qemu-img convert -O qcow2 OLD NEW",
            )
    return [layer(path, format, home) for path, format in found]


def _own_path(home: str, id: str, suffix: str) -> str:
    """A name that no file has: what an attach left that was killed stays until the machine is deleted."""
    path, number = f"{DIRECTORY}/{id}.{suffix}", 0
    while os.path.lexists(f"{home}/{path}"):
        number += 1
        path = f"{DIRECTORY}/{id}.{number}.{suffix}"
    return path


def _order(records: list[dict[str, Any]]) -> None:
    """Number them as the firmware is to try them."""
    wanted = sorted(records, key=lambda record: record["device"] == "cdrom")
    for index, record in enumerate(wanted, 1):
        record["bootindex"] = index


def _make_image(disk: Disk, record: dict[str, Any], home: str, made: list[str]) -> None:
    """Make the topmost image, where it is one of the instance's own, and note its path in `made`."""
    if disk.device == "cdrom" or (disk.source and disk.mode != "overlay"):
        return
    os.makedirs(f"{home}/{DIRECTORY}", mode=0o700, exist_ok=True)
    path = f"{home}/{record['chain'][-1]['path']}"
    if disk.source:
        below = record["chain"][-2]
        images.create_overlay(path, os.path.join(home, below["path"]), below["format"], disk.size)
    else:
        images.create(path, disk.size, format=record["chain"][-1]["format"])
    made.append(path)
