"""Disks of a running QEMU: plug, unplug, resize, limit, change the medium, count.

What is plugged is told by QEMU itself (its nodes, its devices), not by a record here, so that each function can be
called again after a command that died half-way. Nothing is written to hardware.json; the caller does, afterwards.
Files are opened here and handed over as descriptors: QEMU sees no path. What is plugged in before the guest's first
instruction is in the firmware's order of booting only after a system_reset, which the caller makes then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ovt.engine.vm import blockgraph as graph
from ovt.engine.vm.blockgraph import Command, Record
from ovt.engine.vm.diskfiles import Opener, open_chain
from ovt.engine.vm.qmp import Gone, Qmp, QmpError
from ovt.engine.vm.unplug import remove_device
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, UsageError

UNPLUG_SECONDS = 30.0  # for the guest to give a device back; Linux takes less than one
ROLLBACK_SECONDS = 5.0
TRAY_SECONDS = 10.0  # for the guest to unlock a drive
_PERIPHERAL = "/machine/peripheral"
_FDSET = "/dev/fdset/"
_HINT = "unmount it in the guest and try again; a guest that does not run or knows no hotplug never answers"


def plug(qmp: Qmp, home: str, disk: Record, opener: Opener = os.open, *, io_uring: bool = False) -> None:
    """Open the disk's images, hand them over and plug the device in; all or nothing.

    `io_uring` (Features.io_uring) is what a disk that leaves its `aio` open uses, unless the kernel refuses. UsageError
    for a record that contradicts itself, StateError for a bus that takes nothing while QEMU runs, NotFound for an
    image that has vanished, HostError for one that cannot be opened, Conflict for one that another machine uses and
    for an id that is taken, QmpError for what else QEMU refuses, such as a damaged image.
    """
    id = disk["id"]
    graph.check(disk)
    if graph.cold(disk):
        raise StateError(
            f"disk {id}: a sata disk cannot be plugged into a running machine",
            "attach it while the machine is stopped, or use bus virtio, scsi or nvme",
        )
    devices = children(qmp, _PERIPHERAL)
    if id in devices:
        raise Conflict(f"the machine has a device {id} already", "detach it, or choose another id")
    if disk.get("bus") == "scsi" and graph.SCSI not in devices:
        raise StateError(f"disk {id}: the machine has no SCSI controller", "bus virtio")
    remove_backend(qmp, id)  # what a command left that died at this very place
    try:
        _plug(qmp, home, disk, opener, io_uring)
    except QmpError as error:
        if not io_uring or disk.get("aio") or "io_uring" not in error.message:
            raise
        _plug(qmp, home, disk, opener, False)  # QEMU has it and the kernel denies it (kernel.io_uring_disabled)


def plug_controller(qmp: Qmp, controller: Record) -> None:
    """Plug in the SCSI controller, unless it is there; QmpError when QEMU refuses."""
    if controller["id"] not in children(qmp, _PERIPHERAL):
        with _all_or_nothing(qmp, controller["id"]) as steps:
            _run(qmp, controller, graph.controller_commands(controller), steps)


def unplug(qmp: Qmp, disk: Record, timeout: float = UNPLUG_SECONDS) -> None:
    """Take the disk from the guest and let go of its images; may be called again after it has failed.

    A guest has to agree, except for scsi. StateError when it is paused, does not answer in `timeout` seconds or
    refuses: the disk is attached as before then. Conflict when a block job or an export still uses an image.
    """
    id = disk["id"]
    if graph.cold(disk):
        raise StateError(
            f"disk {id}: a sata disk cannot be taken from a running machine", "detach it while the machine is stopped"
        )
    if id in children(qmp, _PERIPHERAL):
        status = qmp.command("query-status")["status"]
        if disk.get("bus") != "scsi" and status not in ("running", "prelaunch"):
            raise StateError(f"disk {id}: the guest has to give it back, and is {status}", "resume the machine first")
        if disk.get("device") == "cdrom" and medium(qmp, disk) is not None:
            # QEMU 10.0 never lets go of what is in a drive that was plugged in empty, once the drive is gone
            qmp.command("blockdev-open-tray", {"id": id, "force": True})
            qmp.command("blockdev-remove-medium", {"id": id})
        remove_device(qmp, id, timeout, _HINT)
    remove_backend(qmp, id)


def resize(qmp: Qmp, disk: Record, size: int) -> None:
    """Make the disk larger, `size` bytes, and tell the guest.

    UsageError when it would become smaller or cannot have that size, StateError for a bus that does not do it while
    QEMU runs.
    """
    id = disk["id"]
    if disk.get("bus") == "nvme":  # QEMU's controller forbids it
        raise StateError(
            f"disk {id}: an nvme disk cannot grow while it is plugged in", "detach it or stop the machine first"
        )
    if graph.read_only(disk):
        raise UsageError(f"disk {id} is read-only and keeps its size")
    if size % 512:
        raise UsageError(f"disk {id}: {size} bytes are no whole number of sectors", "a multiple of 512")
    inserted = medium(qmp, disk)
    if inserted is None:
        raise NotFound(f"disk {id} is not plugged in")
    present = inserted["image"]["virtual-size"]
    if size < present:
        raise UsageError(
            f"disk {id} has {present} bytes and cannot become smaller: the guest may use all of them",
            "attach a new disk of that size and copy inside the guest",
        )
    try:
        qmp.command("block_resize", {"node-name": inserted["node-name"], "size": size})
    except QmpError as error:
        raise QmpError(
            f"disk {id}: {error.message}",
            error.error_class,
            "a block device grows on the host first; formats other than raw and qcow2 do not grow",
        ) from None


def throttle(qmp: Qmp, disk: Record, iops: int, bps: int) -> None:
    """Limit the disk to that many operations and bytes per second from now on; 0: no limit.

    An empty CD-ROM drive has nothing to limit: it gets its record's limits with the next medium.
    """
    graph.check_limit(disk["id"], "iops", iops)
    graph.check_limit(disk["id"], "bps", bps)
    if medium(qmp, disk) is not None:
        name, arguments = graph.throttle_command(disk, iops, bps)
        qmp.command(name, arguments)


def change_medium(
    qmp: Qmp,
    home: str,
    disk: Record,
    chain: Sequence[Record] | None,
    opener: Opener = os.open,
    *,
    force: bool = False,
    io_uring: bool = False,
    timeout: float = TRAY_SECONDS,
) -> None:
    """Put the image `chain` into a CD-ROM drive in place of what is in there; None leaves it empty.

    The new image is opened before the old one is touched. StateError when the guest has locked the drive and does not
    unlock it in `timeout` seconds; `force` takes the medium nevertheless, as a paper clip would. Errors as of `plug`.
    """
    id = disk["id"]
    if disk.get("device") != "cdrom":
        raise UsageError(f"disk {id} is no CD-ROM drive", "attach and detach are for disks")
    new = {**disk, "chain": list(chain or [])}
    graph.check(new)
    old = graph.owned_nodes(id, _nodes(qmp))
    first = 1 + max((node[2] for node in map(graph.parse_node, old) if node), default=-1)
    with _all_or_nothing(qmp, id) as steps:
        fdsets = _hand_over(qmp, home, new, opener, first)
        _run(qmp, new, graph.node_commands(new, fdsets, io_uring=io_uring, first=first), steps, fdsets, first)
        _swap(qmp, disk, graph.format_node(id, first + len(fdsets) - 1) if fdsets else "", force, timeout)
    _remove_nodes(qmp, id, old)
    throttle(qmp, disk, disk.get("iops") or 0, disk.get("bps") or 0)


def remove_unused(qmp: Qmp, disk: Record) -> None:
    """Remove the images of a CD-ROM drive that are not in it: a change of the medium that was killed leaves such."""
    inserted = medium(qmp, disk)
    top = graph.parse_node(inserted["node-name"]) if inserted else None
    owned = graph.owned_nodes(disk["id"], _nodes(qmp))
    _remove_nodes(qmp, disk["id"], [name for name in owned if not top or (graph.parse_node(name) or top)[2] != top[2]])


def stats(qmp: Qmp) -> dict[str, tuple[int, int, int, int]]:
    """What each disk has done since QEMU started: (bytes read, bytes written, reads, writes) by id."""
    found = {}
    for entry in qmp.command("query-blockstats"):
        id = _device_id(entry)
        if id:
            done = entry["stats"]
            found[id] = (done["rd_bytes"], done["wr_bytes"], done["rd_operations"], done["wr_operations"])
    return found


def sizes(qmp: Qmp) -> dict[str, int]:
    """How large the guest sees each disk, in bytes by id; not the drives that are empty."""
    found = {}
    for entry in qmp.command("query-block"):
        id = _device_id(entry)
        if id and entry.get("inserted"):
            found[id] = int(entry["inserted"]["image"]["virtual-size"])
    return found


# plugging


def _plug(qmp: Qmp, home: str, disk: Record, opener: Opener, io_uring: bool) -> None:
    with _all_or_nothing(qmp, disk["id"]) as steps:
        fdsets = _hand_over(qmp, home, disk, opener)
        _run(qmp, disk, graph.plug_commands(disk, fdsets, io_uring=io_uring), steps, fdsets)


def _hand_over(qmp: Qmp, home: str, disk: Record, opener: Opener, first: int = 0) -> list[int]:
    """Open every image of the chain and give QEMU its descriptor; the numbers of the sets, bottom to top."""
    fds = open_chain(home, disk, opener)
    try:
        return [qmp.add_fd(fd, opaque=graph.file_node(disk["id"], first + number)) for number, fd in enumerate(fds)]
    finally:
        for fd in fds:
            os.close(fd)


def _run(
    qmp: Qmp,
    disk: Record,
    commands: Sequence[Command],
    steps: list[Command],
    fdsets: Sequence[int] = (),
    first: int = 0,
) -> None:
    """Make the calls, noting each in `steps` before it is sent: an interrupt may come while QEMU is at it."""
    for command in commands:
        steps.append(command)
        try:
            qmp.command(command[0], command[1])
        except QmpError as error:
            steps.pop()
            raise _explained(disk, command, error, fdsets, first) from None


@contextmanager
def _all_or_nothing(qmp: Qmp, id: str) -> Iterator[list[Command]]:
    """Commands that are listed in what this yields are taken back, and descriptors too, if the body fails."""
    before = set(_fdsets(qmp))
    steps: list[Command] = []
    try:
        yield steps
    except Gone:
        raise  # and everything is gone with it
    except BaseException as error:
        left = _roll_back(qmp, id, steps, before)
        if left and isinstance(error, OvtError):
            error.hint = "; ".join(filter(None, (error.hint, f"QEMU has not let go of it: {', '.join(left)}")))
        raise


def _roll_back(qmp: Qmp, id: str, steps: Sequence[Command], before: set[int]) -> list[str]:
    """Take the steps back, last first, and descriptors in sets other than `before`; what could not be."""
    left: list[str] = []
    for step in reversed(steps):
        undo = graph.undo_command(step)
        if undo is None:
            continue
        try:
            if undo[0] == "device_del":
                remove_device(qmp, undo[1]["id"], ROLLBACK_SECONDS)
            else:
                qmp.command(undo[0], undo[1])
        except HostError as error:  # QEMU does not answer any more
            return [*left, error.message]
        except OvtError as error:
            left.append(error.message)
    try:
        for number, names in _fdsets(qmp).items():
            if number not in before and graph.owned_nodes(id, names):
                qmp.command("remove-fd", {"fdset-id": number})
    except OvtError as error:
        left.append(error.message)
    return left


def _explained(disk: Record, command: Command, error: QmpError, fdsets: Sequence[int], first: int) -> OvtError:
    """QEMU's refusal of `command` in words of the disk: paths instead of descriptors, and what to do."""
    id, chain = disk["id"], disk.get("chain") or []
    reason = error.message.removeprefix(f"{command[0]}: ")
    paths = {f"{_FDSET}{fdset}": layer["path"] for layer, fdset in zip(chain, fdsets, strict=True)}
    reason = re.sub(rf"{_FDSET}\d+", lambda match: paths.get(match[0], match[0]), reason)
    if reason.startswith("Failed to get") and "lock" in reason:
        return Conflict(
            f"disk {id}: {chain[-1]['path']} is in use: {reason}",
            "stop the machine or program that uses it; several machines can share an image in mode overlay or readonly",
        )
    node, hint = graph.parse_node(command[1].get("node-name", "")), ""
    if node:
        layer = chain[node[2] - first]
        reason = f"{layer['path']}: {reason}"
        if node[1] == "fmt" and layer["format"] != "raw":
            hint = f"qemu-img check -f {layer['format']} {layer['path']}"
    return QmpError(f"disk {id}: {reason}", error.error_class, hint)


# unplugging


def remove_backend(qmp: Qmp, id: str) -> None:
    """Nodes, descriptors and thread of disk `id`, whichever of them are there."""
    _remove_nodes(qmp, id, graph.owned_nodes(id, _nodes(qmp)))
    if graph.iothread(id) in children(qmp, "/objects"):
        qmp.command("object-del", {"id": graph.iothread(id)})


def _remove_nodes(qmp: Qmp, id: str, names: Sequence[str]) -> None:
    """Delete these nodes of disk `id`, which are sorted from the top down, and all descriptors that it does not use.

    Conflict when something else uses them.
    """
    left = list(names)
    while left:
        refused: list[str] = []
        for name in left:
            try:
                qmp.command("blockdev-del", {"node-name": name})
            except QmpError as error:
                refused.append(name)
                reason = error.message
        if len(refused) == len(left):
            raise Conflict(
                f"disk {id}: an image is still in use: {reason}", "wait for its block job or export, or stop it"
            )
        left = refused  # block jobs may have changed which stands on which
    nodes = _nodes(qmp)
    used = set(nodes.values())
    for number, opaques in _fdsets(qmp).items():
        if graph.owned_nodes(id, opaques) and f"{_FDSET}{number}" not in used:
            qmp.command("remove-fd", {"fdset-id": number})


# CD-ROM drives


def _swap(qmp: Qmp, disk: Record, node: str, force: bool, timeout: float) -> None:
    """Exchange what is in the drive for `node`, or nothing; the old medium is in there again if this fails."""
    id, inserted = disk["id"], medium(qmp, disk)
    old = inserted["node-name"] if inserted else ""
    _open_tray(qmp, disk, force, timeout)
    try:
        qmp.command("blockdev-remove-medium", {"id": id})
        if node:
            qmp.command("blockdev-insert-medium", {"id": id, "node-name": node})
    except QmpError:
        if old and medium(qmp, disk) is None:
            qmp.command("blockdev-insert-medium", {"id": id, "node-name": old})
        raise
    finally:
        qmp.command("blockdev-close-tray", {"id": id})


def _open_tray(qmp: Qmp, disk: Record, force: bool, timeout: float) -> None:
    """Open the drive; where the guest has locked it, it is asked to, which is what the button on a drive does."""
    id = disk["id"]
    for event in [event for event in qmp.events if event["event"] == "DEVICE_TRAY_MOVED"]:
        qmp.events.remove(event)
    try:
        qmp.command("blockdev-open-tray", {"id": id, "force": force})
        return
    except QmpError as error:
        if "is locked" not in error.message:
            raise
    try:
        qmp.wait_event(
            "DEVICE_TRAY_MOVED",
            timeout=timeout,
            where=lambda event: event["data"].get("id") == id and event["data"]["tray-open"],
        )
    except TimeoutError:
        raise StateError(
            f"the guest has locked drive {id} and does not open it",
            "unmount it in the guest (eject), or use --force",
        ) from None


# what QEMU says


def attached(qmp: Qmp) -> set[str]:
    """The ids of all devices that QEMU has, disks or not."""
    return children(qmp, _PERIPHERAL)


def children(qmp: Qmp, path: str) -> set[str]:
    """Names of what is below a place of QEMU's tree of objects."""
    return {entry["name"] for entry in qmp.command("qom-list", {"path": path})}


def _nodes(qmp: Qmp) -> dict[str, str]:
    """File names of all block nodes by node name."""
    return {node["node-name"]: node["file"] for node in qmp.command("query-named-block-nodes", {"flat": True})}


def _fdsets(qmp: Qmp) -> dict[int, list[str]]:
    """What the descriptors of each set are for, by the set's number."""
    return {entry["fdset-id"]: [fd.get("opaque", "") for fd in entry["fds"]] for entry in qmp.command("query-fdsets")}


def _device_id(entry: dict[str, Any]) -> str:
    """The id of the device that an entry of query-block or query-blockstats belongs to; empty for none."""
    # an id, or the path of a part of the device that has it
    return str(entry.get("qdev", "")).removeprefix(f"{_PERIPHERAL}/").partition("/")[0]


def medium(qmp: Qmp, disk: Record) -> dict[str, Any] | None:
    """What is in the drive (BlockDeviceInfo); None for an empty one."""
    for entry in qmp.command("query-block"):
        if _device_id(entry) == disk["id"]:
            inserted: dict[str, Any] | None = entry.get("inserted")
            return inserted
    return None
