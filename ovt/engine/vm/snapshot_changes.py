"""The records of a machine's snapshots, and changes of them that survive the command that makes them.

    home/snapshots/tree.json            replaced atomically: snapshot_tree.Tree

Every change is written down in the tree as `pending` before anything happens, with what tree and hardware will be.
While its stage is `making` only new files are made: a command that is killed then has changed nothing. From `acting` on
QEMU may have done it, and is asked; where it has ended, the state that is right in both cases is taken. See `recover`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

from ovt.engine.vm import saved
from ovt.engine.vm import snapshot_live as live
from ovt.engine.vm.hardware import Hardware, replace_json
from ovt.engine.vm.qmp import Gone, Qmp
from ovt.engine.vm.snapshot_tree import Packed, Tree, unpack, written
from ovt.errors import Conflict, OvtError, refused

TREE = "snapshots/tree.json"
_PAUSED = frozenset({"paused", "postmigrate", "finish-migrate", "save-vm"})


def read(home: str) -> Tree:
    """The records as they are, a change that was not finished included; OvtError when they are damaged."""
    path = f"{home}/{TREE}"
    try:
        with open(path, encoding="utf-8") as file:
            return unpack(json.load(file))
    except FileNotFoundError:
        return Tree()
    except (ValueError, KeyError, TypeError) as error:
        raise OvtError(
            f"{path} is damaged: {error}", "put back a copy of it; its images are below the same home"
        ) from None


def write(home: str, tree: Tree) -> Tree:
    """Replace the records, durably; HostError for a full disk, with the old ones in place."""
    try:
        os.makedirs(f"{home}/snapshots", mode=0o700, exist_ok=True)
        replace_json(f"{home}/{TREE}", tree.pack())
    except OSError as error:
        raise refused(f"cannot write {home}/{TREE}", error, "make room, then try again") from None
    return tree


class Change:
    """One change from its intent to its end; `tree` and `hardware` are what will be."""

    def __init__(self, home: str, before: Tree, verb: str, hardware: Packed, tree: Tree) -> None:
        self.home = home
        self.before = before
        self.verb = verb
        self.hardware = hardware
        self.tree = tree
        self.files: list[str] = []
        self.more: dict[str, Any] = {}
        self.paused = False
        self.stage = "making"

    @contextlib.contextmanager
    def making(self, files: list[str], qmp: Qmp | None) -> Iterator[None]:
        """Write the intent down. When the block fails, the change is finished or taken back at once."""
        for path in files:
            if os.path.lexists(f"{self.home}/{path}"):  # not ours to take back
                raise Conflict(f"{self.home}/{path} is in the way", "move it")
        self.files = files
        self._write("making")
        try:
            yield
        except Gone:
            raise  # the next command finds out what has happened
        except BaseException as error:
            # the first error is the one to tell, and what is left is found by the next command
            with contextlib.suppress(OvtError, OSError):
                recover(self.home, qmp)
            if isinstance(error, OSError):
                raise refused(f"cannot write below {self.home}", error) from error
            raise

    def acting(self, **more: Any) -> None:
        """From here on it may have happened."""
        self.more |= more
        self._write("acting")

    def pause(self, qmp: Qmp) -> None:
        """Have the guest stand still, if it runs."""
        if qmp.command("query-status")["running"]:
            self.paused = True
            self._write(self.stage)
            qmp.command("stop")

    def go_on(self, qmp: Qmp) -> None:
        """Let it run again, if it was this change that stopped it."""
        if self.paused:
            qmp.command("cont")
            self.paused = False

    def finish(self) -> None:
        """It has happened: make it the truth. A guest whose topmost image was merged away must not go on before."""
        _finish(self.home, read(self.home))

    def _write(self, stage: str) -> None:
        self.stage = stage
        pending = {
            "verb": self.verb,
            "stage": stage,
            "files": self.files,
            "paused": self.paused,
            "hardware": self.hardware,
            "tree": self.tree.pack(),
            **self.more,
        }
        write(self.home, self.before._replace(pending=pending))


def recover(home: str, qmp: Qmp | None) -> Tree:
    """Finish or take back what a killed command has begun, remove what nothing needs; the records after that.

    A guest that such a command has left standing still goes on.
    """
    tree = read(home)
    if not tree.pending:
        return write(home, sweep(home, tree)) if tree.garbage else tree
    pending = tree.pending
    ids = [disk["id"] for disk in written(pending["hardware"])]
    if qmp is not None:
        live.end_work(qmp, saving=pending["verb"] == "create")
    happened = _happened(home, pending, qmp)
    try:
        tree = _finish(home, tree) if happened else _take_back(home, tree)
    except BaseException:
        if qmp is not None and not (happened and pending["verb"] == "merge"):  # see Change.finish
            _go_on(qmp, pending)
        raise
    if qmp is not None:
        live.close_unused(qmp, ids)
        _go_on(qmp, pending)
    return tree


def _go_on(qmp: Qmp, pending: dict[str, Any]) -> None:
    if pending["paused"] and qmp.command("query-status")["status"] in _PAUSED:
        qmp.command("cont")


def _happened(home: str, pending: dict[str, Any], qmp: Qmp | None) -> bool:
    if pending["stage"] != "acting":
        return False
    if pending["verb"] == "create" and qmp is not None:
        return live.switched(qmp, pending["tops"])
    if pending["verb"] == "merge":
        # Taken back is right as long as the hardware does not have it: both chains read the same until then, because
        # the guest stands still while the image that it writes to is merged away.
        if not pending["images"]:
            return False
        id = pending["disk"]["id"]
        if _chains(Hardware.load(home).pack())[id] == _chains(pending["hardware"])[id]:
            return True
        return qmp is not None and live.length(qmp, id) == pending["images"]
    return True  # empty images above: the same content, whether or not QEMU had come to write to them


def _finish(home: str, tree: Tree) -> Tree:
    pending = tree.pending
    hardware = Hardware.unpack(pending["hardware"])
    if pending["verb"] != "restore":  # it may have got or lost devices since the command was killed
        hardware = Hardware.load(home)
        wanted = _chains(pending["hardware"])
        for disk in hardware.disks:
            disk["chain"] = wanted.get(disk["id"], disk.get("chain"))
    hardware.save(home)
    for source, target in pending.get("copies", ()):
        copy_file(f"{home}/{source}", f"{home}/{target}")
    if pending["verb"] == "restore":
        _hand_over_memory(home, unpack(pending["tree"]), pending["memory"], pending["hardware"])
    else:
        _follow(home, pending["hardware"])
    return write(home, sweep(home, write(home, unpack(pending["tree"]))))


def _chains(hardware: Packed) -> dict[str, Any]:
    return {disk["id"]: disk["chain"] for disk in hardware["disks"] if disk.get("chain")}


def _take_back(home: str, tree: Tree) -> Tree:
    garbage = (*tree.garbage, *tree.pending["files"])
    return write(home, sweep(home, write(home, tree._replace(pending={}, garbage=garbage))))


def sweep(home: str, tree: Tree) -> Tree:
    """Remove the files that nothing needs; the records without them, not yet written."""
    for path in tree.garbage:
        whole = f"{home}/{path}"
        if os.path.isdir(whole):
            shutil.rmtree(whole)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(whole)
    return tree._replace(garbage=())


def _hand_over_memory(home: str, tree: Tree, number: int, hardware: Packed) -> None:
    """Have the next start take the memory of snapshot `number` (0: of none)."""
    saved.discard(home)
    if not number:
        return
    snapshot = tree.get(number)
    directory = f"{home}/.{saved.DIRECTORY}"
    shutil.rmtree(directory, ignore_errors=True)
    os.mkdir(directory, 0o700)
    os.link(f"{home}/{snapshot.directory}/memory", f"{directory}/memory")
    replace_json(f"{directory}/saved.json", {"state": snapshot.memory, "hardware": hardware})
    os.rename(directory, f"{home}/{saved.DIRECTORY}")


def _follow(home: str, hardware: Packed) -> None:
    """Tell a saved state, whose record names the images too, that its disks go on in others of the same content."""
    if saved.exists(home):
        frozen, state = saved.read(home)
        frozen.disks = hardware["disks"]
        replace_json(f"{home}/{saved.DIRECTORY}/saved.json", {"state": state._asdict(), "hardware": frozen.pack()})


def copy_file(source: str, target: str) -> None:
    """A whole copy of a small file, or none."""
    temporary = f"{target}.new"
    shutil.copyfile(source, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.rename(temporary, target)
