"""Copies of a machine: full, with images of their own, or linked, with images above those of a snapshot.

Both are made from a snapshot, whose images nobody writes to, so that the source may run. While a clone is made, and a
linked one as long as it exists, the snapshot knows it as a dependant and is not deleted. Who the clone is, is another
machine's new identity; it has no snapshots and no saved memory. This module knows homes and no instances.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from ovt.engine.vm import snapshot_live as live
from ovt.engine.vm.firmware import NVRAM
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.snapshot_changes import copy_file, read, write
from ovt.engine.vm.snapshot_tree import Packed, Snapshot, Tree, written
from ovt.engine.vm.snapshots import Report, all_there
from ovt.image import disk as images


def build(source: str, snapshot: Snapshot, home: str, hardware: Hardware, *, linked: bool, report: Report) -> None:
    """Make the files of a clone in `home` from a snapshot of the machine in `source`; hardware.json comes last.

    `hardware` is the snapshot's with the clone's identity. NotFound for an image that has vanished, HostError for a
    full disk; what was made until then is left to the caller to remove with `home`.
    """
    all_there(source, snapshot.hardware)
    os.makedirs(f"{home}/disks", mode=0o700, exist_ok=True)
    packed = hardware.pack()
    mine = {disk["id"] for disk in written(packed)}
    for disk in packed["disks"]:
        if disk["id"] in mine:
            (_link if linked else _copy)(source, home, disk, report)
        else:
            disk["chain"] = [_brought(source, home, layer) for layer in disk.get("chain") or ()]
    if snapshot.nvram:
        copy_file(f"{source}/{snapshot.directory}/{NVRAM}", f"{home}/{NVRAM}")
    Hardware.unpack(packed).save(home)


def _link(source: str, home: str, disk: Packed, _report: Report) -> None:
    chain = [_foreign(source, layer) for layer in disk["chain"]]
    path = f"disks/{disk['id']}.qcow2"
    images.create_overlay(f"{home}/{path}", chain[-1]["path"], chain[-1]["format"])
    disk["chain"] = [*chain, {"path": path, "format": "qcow2"}]


def _copy(source: str, home: str, disk: Packed, report: Report) -> None:
    path = f"disks/{disk['id']}.qcow2"

    def progress(done: int, total: int) -> None:
        report(f"disk {disk['id']}", done, total)

    live.flatten(source, disk, f"{home}/{path}", progress)
    disk["chain"] = [{"path": path, "format": "qcow2"}]


def _foreign(source: str, layer: dict[str, Any]) -> dict[str, Any]:
    """The entry of a chain for another machine: it stands on that image and must never change it."""
    entry = {key: value for key, value in layer.items() if key != "direct"}
    return entry | {"path": os.path.join(source, layer["path"])}


def _brought(source: str, home: str, layer: dict[str, Any]) -> dict[str, Any]:
    """What the guest only reads: the source's own small files (a seed) are copied, others are shared."""
    if not layer["path"].startswith("/"):
        os.makedirs(os.path.dirname(f"{home}/{layer['path']}"), mode=0o700, exist_ok=True)
        shutil.copyfile(f"{source}/{layer['path']}", f"{home}/{layer['path']}")
    return dict(layer)


# Dependants ------------------------------------------------------------------------------------------------------


def pin(home: str, tree: Tree, snapshot: Snapshot, id: str, name: str) -> Tree:
    """Record that clone `id` needs the snapshot."""
    return write(home, tree.put(snapshot._replace(dependants={**snapshot.dependants, id: name})))


def unpin(home: str, number: int, id: str) -> Tree:
    """Record that clone `id` does not need it any more."""
    tree = read(home)
    snapshot = tree.get(number)
    rest = {other: name for other, name in snapshot.dependants.items() if other != id}
    return write(home, tree.put(snapshot._replace(dependants=rest)))


def prune(home: str) -> Tree:
    """Forget clones that are not there any more: those whose home, beside this one, is gone."""
    tree = before = read(home)
    beside = os.path.dirname(home)
    for snapshot in tree.snapshots:
        left = {id: name for id, name in snapshot.dependants.items() if os.path.isdir(f"{beside}/{id}")}
        tree = tree.put(snapshot._replace(dependants=left))
    return tree if tree == before else write(home, tree)


def dependants(home: str) -> list[str]:
    """The names of the clones that stand on this machine's images: it must not be deleted before they are."""
    return sorted({name for snapshot in prune(home).snapshots for name in snapshot.dependants.values()})
