"""Snapshots as a tree, and which image file stands on which: pure records and decisions, no file and no QEMU.

Every snapshot holds the whole hardware as it was, and with it the chain of images of every disk, bottom to top; the
last image of a chain is where the disk's content ends at that snapshot. Nothing is ever written to an image that a
chain of the tree holds: when a snapshot is taken, each disk goes on in a new, empty file above. So files form trees
as well, and a file is needed as long as one chain has it. A snapshot that is deleted leaves the tree at once; its
files are given back as far as nothing else stands on them, and are merged with the one that does. Where several
branches stand on a file it stays, without a name, until there is only one.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ovt.errors import Conflict, NotFound, OvtError, UsageError

LAYOUT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Packed = dict[str, Any]  # hardware as in hardware.json


class Snapshot(NamedTuple):
    """One snapshot. `number` is never used again; files below home/snapshots/`number`."""

    number: int
    name: str
    parent: int = 0  # number of the snapshot it was taken after; 0: none
    created: float = 0.0  # seconds since the epoch
    description: str = ""
    memory: dict[str, Any] = {}  # what is known of the file `memory` (memory_state.Saved); empty: disks only
    quiesced: bool = False  # file systems were frozen by the guest agent
    nvram: bool = False  # there is a copy of the UEFI variables, `nvram.qcow2`
    hardware: Packed = {}
    dependants: dict[str, str] = {}  # id → name of the clones that stand on its files, or are being copied from them
    temporary: bool = False  # made for a copy, to go with it

    @property
    def directory(self) -> str:
        """Where its files are, relative to home."""
        return f"snapshots/{self.number}"


class Tree(NamedTuple):
    """All snapshots of a machine. `pending` is the change that is being made, see snapshots.py; `garbage` are files,
    relative to home, that nothing needs any more and that may still be there."""

    snapshots: tuple[Snapshot, ...] = ()
    current: int = 0  # the snapshot that the machine's present state stands on; 0: none
    next: int = 1
    garbage: tuple[str, ...] = ()
    pending: dict[str, Any] = {}

    def find(self, name: str) -> Snapshot:
        """The snapshot of that name; NotFound with the names that there are."""
        for snapshot in self.snapshots:
            if snapshot.name == name:
                return snapshot
        names = ", ".join(snapshot.name for snapshot in self.snapshots)
        raise NotFound(f"it has no snapshot {name!r}", f"there are: {names}" if names else "it has no snapshots at all")

    def get(self, number: int) -> Snapshot:
        """The snapshot of that number; NotFound."""
        for snapshot in self.snapshots:
            if snapshot.number == number:
                return snapshot
        raise NotFound(f"there is no snapshot number {number}")

    def new_name(self, name: str = "") -> str:
        """`name` if it is one and is free, or a free one; UsageError, Conflict."""
        taken = {snapshot.name for snapshot in self.snapshots}
        if not name:
            return next(f"snap{n}" for n in range(1, len(taken) + 2) if f"snap{n}" not in taken)
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"snapshot name {name!r} will not do", "letters, digits, dot, dash and underscore, at most 64"
            )
        if name in taken:
            raise Conflict(f"it has a snapshot {name!r} already", "choose another name, or delete that one")
        return name

    def add(self, snapshot: Snapshot) -> Tree:
        """With `snapshot`, on which the present state stands then."""
        return self._replace(snapshots=(*self.snapshots, snapshot), current=snapshot.number)

    def put(self, snapshot: Snapshot) -> Tree:
        """With `snapshot` in the place of the one with its number."""
        return self._replace(
            snapshots=tuple(snapshot if entry.number == snapshot.number else entry for entry in self.snapshots)
        )

    def without(self, number: int) -> Tree:
        """Without that snapshot: what was taken after it follows its parent. Conflict when linked clones need it."""
        gone = self.get(number)
        if gone.dependants:
            names = ", ".join(sorted(gone.dependants.values()))
            raise Conflict(f"linked clones stand on snapshot {gone.name!r}: {names}", "delete those first")
        rest = tuple(
            entry._replace(parent=gone.parent) if entry.parent == number else entry
            for entry in self.snapshots
            if entry.number != number
        )
        return self._replace(snapshots=rest, current=gone.parent if self.current == number else self.current)

    def children(self, number: int) -> list[Snapshot]:
        """What was taken directly after snapshot `number` (0: the first ones), oldest first."""
        found = [entry for entry in self.snapshots if entry.parent == number]
        return sorted(found, key=lambda entry: (entry.created, entry.number))

    def walk(self) -> Iterator[tuple[int, Snapshot]]:
        """(depth, snapshot), parents before children."""

        def below(number: int, depth: int) -> Iterator[tuple[int, Snapshot]]:
            for entry in self.children(number):
                yield depth, entry
                yield from below(entry.number, depth + 1)

        return below(0, 0)

    def pack(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "layout": LAYOUT,
            "snapshots": [entry._asdict() for entry in self.snapshots],
            "current": self.current,
            "next": self.next,
            "garbage": list(self.garbage),
            "pending": self.pending,
        }


def unpack(data: Mapping[str, Any]) -> Tree:
    """From the JSON object; OvtError for one of a later layout, ValueError, KeyError or TypeError for a damaged one."""
    if data["layout"] != LAYOUT:
        raise OvtError(f"snapshots of layout {data['layout']} are not known here", "use a newer ovt")
    snapshots = tuple(Snapshot(**entry) for entry in data["snapshots"])
    numbers = {entry.number for entry in snapshots}
    wrong = {entry.parent for entry in snapshots} | {data["current"]}
    if not wrong <= numbers | {0}:
        raise ValueError(f"it names snapshots that are not there: {sorted(wrong - numbers - {0})}")
    return Tree(snapshots, data["current"], data["next"], tuple(data["garbage"]), data["pending"])


# Files -----------------------------------------------------------------------------------------------------------


class Merge(NamedTuple):
    """Two neighbours in all chains that have them, of which nobody needs the lower by itself."""

    disk: str
    lower: dict[str, Any]  # entries of a chain
    upper: dict[str, Any]


def written(hardware: Packed) -> list[Packed]:
    """The records of the disks that the guest can write to."""
    return [
        disk
        for disk in hardware["disks"]
        if disk.get("chain") and disk.get("device", "disk") == "disk" and not disk.get("readonly")
    ]


def own(entry: Mapping[str, Any]) -> bool:
    """Whether an image of a chain belongs to this machine: a file in its home, or one that its owner let it write
    to directly. Any other may be the base of other machines."""
    return not entry["path"].startswith("/") or bool(entry.get("direct"))


def above(hardware: Packed, number: int) -> tuple[Packed, dict[str, dict[str, Any]]]:
    """The hardware in which every written disk goes on in a new file, and the new entries by disk."""
    new = copy.deepcopy(hardware)
    entries = {}
    for disk in written(new):
        chain = disk["chain"]
        if chain[-1]["path"].startswith("/"):
            chain[-1]["direct"] = True
        entries[disk["id"]] = {"path": f"disks/{disk['id']}.s{number}.qcow2", "format": "qcow2"}
        chain.append(dict(entries[disk["id"]]))
    return new, entries


def chains(tree: Tree, hardware: Packed) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(disk, chain) of every state that can be reached: the snapshots and the present one."""
    for state in [*(entry.hardware for entry in tree.snapshots), hardware]:
        for disk in state["disks"]:
            if disk.get("chain"):
                yield disk["id"], disk["chain"]


def merges(tree: Tree, hardware: Packed) -> list[Merge]:
    """What can be merged now, from the bottom up."""
    ends = {chain[-1]["path"] for _, chain in chains(tree, hardware)}
    pinned = {
        entry["path"]
        for snapshot in tree.snapshots
        if snapshot.dependants
        for disk in snapshot.hardware["disks"]
        for entry in disk.get("chain", ())
    }
    neighbours: dict[str, dict[str, Merge]] = {}
    for disk, chain in chains(tree, hardware):
        for lower, upper in itertools.pairwise(chain):
            neighbours.setdefault(lower["path"], {})[upper["path"]] = Merge(disk, lower, upper)
    return [
        merge
        for path, uppers in neighbours.items()
        if path not in ends and len(uppers) == 1
        for merge in uppers.values()
        if own(merge.lower) and own(merge.upper) and not {path, merge.upper["path"]} & pinned
    ]


def merged(tree: Tree, hardware: Packed, merge: Merge, kept: Mapping[str, Any]) -> tuple[Tree, Packed]:
    """Tree and hardware in which the one image `kept` stands in the place of the two."""
    hardware = copy.deepcopy(hardware)
    tree = tree._replace(
        snapshots=tuple(entry._replace(hardware=copy.deepcopy(entry.hardware)) for entry in tree.snapshots)
    )
    for _, chain in chains(tree, hardware):
        paths = [entry["path"] for entry in chain]
        if merge.upper["path"] in paths:
            at = paths.index(merge.upper["path"])
            chain[at - 1 : at + 1] = [dict(kept)]
    return tree, hardware


def unused(before: tuple[Tree, Packed], after: tuple[Tree, Packed]) -> list[str]:
    """Files in home that a chain had before and none has any more."""

    def files(tree: Tree, hardware: Packed) -> dict[str, None]:
        return {entry["path"]: None for _, chain in chains(tree, hardware) for entry in chain}

    left = files(*after)
    return [path for path in files(*before) if path not in left and not path.startswith("/")]


# Showing ---------------------------------------------------------------------------------------------------------


def draw(tree: Tree, label: Mapping[int, str]) -> list[str]:
    """The tree as text, a line for each snapshot and one for the present state; `label` by number, 0: the present."""
    lines: list[str] = []

    def below(number: int, indent: str) -> None:
        numbers = [entry.number for entry in tree.children(number)]
        if tree.current == number:
            numbers.append(0)
        for position, child in enumerate(numbers):
            last = position == len(numbers) - 1
            lines.append(f"{indent}{'└─ ' if last else '├─ '}{label[child]}")
            if child:
                below(child, indent + ("   " if last else "│  "))

    below(0, "")
    return lines
