"""Snapshots of one machine, alive or not: taking, going back, deleting.

    home/snapshots/NUMBER/memory        the guest's memory;  nvram.qcow2: its UEFI variables
    home/disks/ID.sNUMBER.qcow2         where a disk goes on after that snapshot

There is one kind of snapshot: images above images, never inside one, so that it is the same for a machine that runs,
with memory, with UEFI. Which image is below which stands in the records alone, not in the images' headers.

The functions are called with the instance locked. `qmp` is None for a machine that is not alive. What happens when one
of them is killed is told in snapshot_changes.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from ovt.engine.vm import agent_verbs, memory_state, saved
from ovt.engine.vm import snapshot_live as live
from ovt.engine.vm.agent import Agent
from ovt.engine.vm.features import Features
from ovt.engine.vm.firmware import NVRAM
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.engine.vm.snapshot_changes import Change, copy_file, read, recover, sweep, write
from ovt.engine.vm.snapshot_tree import Merge, Packed, Snapshot, Tree, above, merged, merges, own, unused, written
from ovt.errors import NotFound, StateError, UsageError
from ovt.image import disk as images

Report = Callable[[str, int, int], None]  # what is being done, how many bytes are, of how many


def silent(what: str, done: int, total: int) -> None:
    """A Report that nobody listens to."""


def listing(home: str) -> list[dict[str, Any]]:
    """All snapshots for people and programs, parents before children; `size` in bytes on the disk."""
    tree = read(home)
    by_number = {entry.number: entry.name for entry in tree.snapshots}
    found = []
    for depth, entry in tree.walk():
        memory = _allocated(f"{home}/{entry.directory}/memory")
        files = [disk["chain"][-1] for disk in written(entry.hardware)]
        disks = sum(_allocated(os.path.join(home, file["path"])) for file in files if own(file))
        found.append(
            {
                "name": entry.name,
                "parent": by_number.get(entry.parent, ""),
                "depth": depth,
                "current": entry.number == tree.current,
                "created": entry.created,
                "description": entry.description,
                "memory": bool(entry.memory),
                "quiesced": entry.quiesced,
                "size": memory + disks,
                "memory_size": memory,
                "disks": {disk["id"]: disk["chain"][-1]["path"] for disk in written(entry.hardware)},
                "linked_clones": sorted(entry.dependants.values()),
                "number": entry.number,
            }
        )
    return found


# Taking ----------------------------------------------------------------------------------------------------------


def take(
    home: str,
    qmp: Qmp | None,
    features: Features,
    name: str = "",
    *,
    description: str = "",
    memory: bool = False,
    agent: Agent | None = None,
    freeze_timeout: float = 30.0,
    temporary: bool = False,
    report: Report = silent,
) -> Snapshot:
    """Keep the present state of all disks the guest writes to, and of the UEFI variables, under `name` (empty: made
    up); with `memory` also the guest itself, which stands still while that is written.

    With `agent` the guest's file systems are frozen for the moment of it, and thawed whatever happens. Conflict for a
    name that is taken, NotFound for an image that has vanished, StateError for memory of a machine that is not alive,
    HostError for a full disk: nothing has changed then, and a guest that ran goes on.
    """
    tree = recover(home, qmp)
    name = tree.new_name(name)
    if memory and qmp is None:
        raise StateError("it is not running and has no memory to keep", "leave out --memory")
    if memory and agent:
        raise UsageError("with memory the guest needs no freezing: it goes on where it was", "leave out one of them")
    if agent and qmp is None:
        raise UsageError("it is not running: its file systems are at rest", "leave out --quiesce")
    before = Hardware.load(home).pack()
    all_there(home, before)
    disks = written(before)
    if not disks and not memory:
        raise UsageError("it has no disk that is written to", "--memory keeps the guest itself")
    after, entries = above(before, tree.next)
    vars_copy = bool(before.get("uefi"))
    snapshot = Snapshot(
        tree.next,
        name,
        tree.current,
        time.time(),
        description,
        quiesced=agent is not None,
        nvram=vars_copy,
        hardware=before,
        temporary=temporary,
    )
    change = Change(home, tree, "create", after, tree._replace(next=tree.next + 1).add(snapshot))
    with change.making([snapshot.directory, *(entry["path"] for entry in entries.values())], qmp):
        os.mkdir(f"{home}/{snapshot.directory}", 0o700)
        os.makedirs(f"{home}/disks", mode=0o700, exist_ok=True)
        for disk in disks:
            below = disk["chain"][-1]
            images.create_overlay(
                f"{home}/{entries[disk['id']]['path']}", os.path.join(home, below["path"]), below["format"]
            )
        if qmp is None:
            if vars_copy:
                copy_file(f"{home}/{NVRAM}", f"{home}/{snapshot.directory}/{NVRAM}")
            change.acting()
        else:
            if vars_copy:
                live.prepare_vars(qmp, f"{home}/{snapshot.directory}/{NVRAM}")
            tops = live.add_tops(qmp, home, disks, entries, features.io_uring)
            if memory:
                snapshot = _with_memory(home, qmp, features, change, snapshot, vars_copy, report)
            with agent_verbs.fsfreeze(agent, freeze_timeout) if agent else contextlib.nullcontext():
                change.acting(tops=tops)
                live.switch(qmp, tops, vars_copy and not memory)
            if memory and not change.paused:
                live.activate(qmp)
            change.go_on(qmp)
        change.finish()
    return snapshot


def _with_memory(
    home: str, qmp: Qmp, features: Features, change: Change, snapshot: Snapshot, vars_copy: bool, report: Report
) -> Snapshot:
    """Pause the guest and write its memory; the snapshot with what is known of the file."""
    change.pause(qmp)
    if vars_copy:
        live.copy_vars(qmp)

    def progress(done: int, total: int) -> None:
        report("memory", done, total)

    state = memory_state.save_file(qmp, features, f"{home}/{snapshot.directory}/memory", progress=progress)
    snapshot = snapshot._replace(memory=state._asdict())
    change.tree = change.tree.put(snapshot)
    return snapshot


# Going back ------------------------------------------------------------------------------------------------------


def lost(home: str) -> str:
    """What going back to a snapshot throws away, in words; empty when there is nothing."""
    tree = read(home)
    size = 0
    for disk in written(Hardware.load(home).pack()):
        if own(disk["chain"][-1]):
            size += _allocated(os.path.join(home, disk["chain"][-1]["path"]))
    since = f"snapshot {tree.get(tree.current).name!r}" if tree.current else "its beginning"
    words = f"everything written to its disks since {since} ({size / (1 << 20):.1f} MiB)"
    return f"{words}, and its saved memory" if saved.exists(home) else words


def restore(home: str, name: str, generation: str) -> Snapshot:
    """Make a snapshot the present state of a machine that is not alive; what was present and has no snapshot is lost.

    A snapshot with memory goes on where it was at the next start, which finds it in home/saved. `generation` is the
    new GUID by which the guest learns that its time has been set back (vmgenid). NotFound for an image that has
    vanished; the present state is untouched by whatever fails.
    """
    tree = recover(home, None)
    snapshot = tree.find(name)
    present = Hardware.load(home).pack()
    all_there(home, snapshot.hardware)
    if snapshot.memory and not os.path.exists(f"{home}/{snapshot.directory}/memory"):
        raise NotFound(f"{home}/{snapshot.directory}/memory has vanished", "bring it back, or delete the snapshot")
    after, entries = above(snapshot.hardware, tree.next)
    # who it is stays: only what it is made of goes back
    after |= {"generation": generation, "cid": present["cid"], "uuid": present["uuid"]}
    new = tree._replace(next=tree.next + 1, current=snapshot.number)
    new = new._replace(garbage=(*new.garbage, *unused((tree, present), (new, after))))
    copies = []
    if snapshot.nvram:
        copies.append((f"{snapshot.directory}/{NVRAM}", NVRAM))
    change = Change(home, tree, "restore", after, new)
    change.more = {"copies": copies, "memory": snapshot.number if snapshot.memory else 0}
    with change.making([entry["path"] for entry in entries.values()], None):
        os.makedirs(f"{home}/disks", mode=0o700, exist_ok=True)
        for disk in written(snapshot.hardware):
            below = disk["chain"][-1]
            images.create_overlay(
                f"{home}/{entries[disk['id']]['path']}", os.path.join(home, below["path"]), below["format"]
            )
        change.acting()
        change.finish()
    return snapshot


# Deleting --------------------------------------------------------------------------------------------------------


def delete(home: str, qmp: Qmp | None, name: str, report: Report = silent) -> Snapshot:
    """Forget a snapshot and give back its space: files that nothing stands on go, those that one other file stands on
    are merged with it (also under a running guest), those that several stand on stay until they are fewer.

    The snapshot is gone as soon as this begins; a merge that is interrupted, or fails because the disk is full, costs
    space and nothing else, and is tried again with the next change. Conflict while linked clones need it.
    """
    tree = recover(home, qmp)
    snapshot = tree.find(name)
    hardware = Hardware.load(home).pack()
    new = tree.without(snapshot.number)
    garbage = [snapshot.directory, *unused((tree, hardware), (new, hardware))]
    write(home, sweep(home, write(home, new._replace(garbage=(*tree.garbage, *garbage)))))
    collapse(home, qmp, report)
    return snapshot


def collapse(home: str, qmp: Qmp | None, report: Report = silent) -> int:
    """Merge every image that only one other needs; how many there were. Errors as of QEMU's jobs; see delete."""
    count = 0
    while True:
        tree = recover(home, qmp)
        hardware = Hardware.load(home).pack()
        found = merges(tree, hardware)
        if not found:
            return count
        _merge(home, qmp, tree, hardware, found[0], report)
        count += 1


def _merge(home: str, qmp: Qmp | None, tree: Tree, hardware: Packed, merge: Merge, report: Report) -> None:
    sizes = [_allocated(os.path.join(home, entry["path"])) for entry in (merge.lower, merge.upper)]
    # less is copied; an image of the owner's own must stay, because it is his
    down = bool(merge.lower.get("direct")) or sizes[1] < sizes[0] // 2
    kept = merge.lower if down else merge.upper
    after_tree, after = merged(tree, hardware, merge, kept)
    gone = merge.upper if down else merge.lower
    after_tree = after_tree._replace(garbage=(*tree.garbage, gone["path"]))
    change = Change(home, tree, "merge", after, after_tree)

    def progress(done: int, total: int) -> None:
        report(f"disk {merge.disk}", done, total)

    disk, position, chain = _place(tree, hardware, merge)
    open_now = any(
        merge.lower["path"] == entry["path"] for record in hardware["disks"] for entry in record.get("chain") or ()
    )
    change.more = {"disk": disk, "images": len(disk["chain"]) - 1 if open_now else 0}
    with change.making([], qmp):
        change.acting()
        if qmp is not None and open_now:
            live.merge(qmp, home, disk, position, down=down, progress=progress, before_switch=lambda: change.pause(qmp))
        else:
            with live.bare(home, disk, chain) as alone:
                live.merge(alone, home, {**disk, "chain": chain}, position, down=down, progress=progress)
        # before the guest goes on: what it writes from now on belongs to the new chain
        Hardware.unpack(after).save(home)
        if qmp is not None:
            change.go_on(qmp)
        change.finish()


def _place(tree: Tree, hardware: Packed, merge: Merge) -> tuple[Packed, int, list[dict[str, Any]]]:
    """The record of a disk that has both images, the position of the lower one, and the chain up to the upper one."""
    for state in [hardware, *(entry.hardware for entry in tree.snapshots)]:
        for disk in state["disks"]:
            paths = [entry["path"] for entry in disk.get("chain") or ()]
            if merge.upper["path"] in paths:
                at = paths.index(merge.upper["path"])
                return disk, at - 1, disk["chain"][: at + 1]
    raise NotFound(f"no chain has {merge.upper['path']}")


# Files -----------------------------------------------------------------------------------------------------------


def all_there(home: str, hardware: Packed) -> None:
    """NotFound naming the first image of a disk that has vanished."""
    for disk in hardware["disks"]:
        for entry in disk.get("chain") or ():
            path = os.path.join(home, entry["path"])
            if not os.path.exists(path):
                raise NotFound(f"{path} has vanished, and disk {disk['id']} stands on it", "bring it back")


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
