"""What QEMU does for snapshots: all disks go on in new files at once, two images of a chain become one.

The QEMU is that of the running machine, or one without a machine for files that nobody has open (`bare`), so that
there is one way to merge images and not two. Which node is which image is asked of QEMU: the position in the chain is
the node's depth, its descriptors are the set that the file node's name tells.

Descriptors stay in QEMU's sets no longer than something is about to be opened: QEMU's locks on an image belong to the
open file, and one that a set still holds keeps its lock when QEMU has gone over to another of the same image; then the
next change of permissions fails with "Failed to get write lock" (QEMU 10.0).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ovt.engine.vm import blockgraph as graph
from ovt.engine.vm.diskfiles import open_image
from ovt.engine.vm.features import find_program
from ovt.engine.vm.firmware import VARS_NODE
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import HostError
from ovt.image import disk as images
from ovt.kernel import syscalls

JOB = "ovt-snapshot"
_VARS_COPY = "ovt-vars-copy"
_COPY = "ovt-copy"
_SET = re.compile(r"/dev/fdset/(\d+)")
_BARE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
_CANCEL_SECONDS = 60.0

Record = Mapping[str, Any]
Progress = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """A Progress that nobody listens to."""


def nodes(qmp: Qmp, disk: Record) -> list[str]:
    """The format nodes of the disk's chain as QEMU has it, bottom to top; HostError when they are not as many as the
    disk's record has images."""
    pattern = re.compile(re.escape(disk["id"]) + r"-fmt\d+")
    depth: dict[int, str] = {}
    for entry in qmp.command("query-named-block-nodes"):  # flat, it would not tell the depth
        if pattern.fullmatch(entry["node-name"]):
            depth[entry["backing_file_depth"]] = entry["node-name"]
    found = [depth[position] for position in sorted(depth)]
    if len(found) != len(disk["chain"]) or sorted(depth) != list(range(len(found))):
        there = ", ".join(found) or "nothing"
        raise HostError(
            f"disk {disk['id']} has {len(disk['chain'])} images, and QEMU has open {there}",
            hint="stop the machine and try again",
        )
    return found


# Going on in new files -------------------------------------------------------------------------------------------


def add_tops(
    qmp: Qmp, home: str, disks: Sequence[Record], entries: Mapping[str, Record], io_uring: bool
) -> dict[str, tuple[str, str]]:
    """Make nodes of the new, empty images `entries` (by disk); nothing uses them yet. By disk: (old top, new node)."""
    found = {}
    for disk in disks:
        old = nodes(qmp, disk)
        first = 1 + max(_number(name) for name in old)
        record = {**disk, "chain": [entries[disk["id"]]]}
        fd = open_image(home, record, 0, writable=True)
        try:
            fdset = qmp.add_fd(fd, opaque=graph.file_node(disk["id"], first))
        finally:
            os.close(fd)
        name, options = graph.file_blockdev(record, 0, fdset, writable=True, io_uring=io_uring, first=first)
        try:
            qmp.command(name, options)
        except QmpError as error:
            if disk.get("aio") or "io_uring" not in error.message:
                raise
            qmp.command(name, {**options, "aio": "threads"})  # the kernel denies it (kernel.io_uring_disabled)
        qmp.command(*graph.format_blockdev(record, 0, writable=True, first=first))
        _empty(qmp, fdset)
        found[disk["id"]] = (old[-1], graph.format_node(disk["id"], first))
    return found


def switch(qmp: Qmp, tops: Mapping[str, tuple[str, str]], vars_copy: bool) -> None:
    """Let all disks go on above, in one instant or not at all; with `vars_copy` see copy_vars for the same instant.

    The old tops are not written to any more. QmpError: nothing has changed.
    """
    actions: list[dict[str, Any]] = [
        {"type": "blockdev-snapshot", "data": {"node": old, "overlay": new}} for old, new in tops.values()
    ]
    if vars_copy:
        actions.append({"type": "blockdev-backup", "data": _vars_job()})
    if actions:
        qmp.command("transaction", {"actions": actions})
    if vars_copy:
        try:
            qmp.watch_job(JOB, timeout=60.0)
        finally:
            qmp.command("blockdev-del", {"node-name": _VARS_COPY})


def switched(qmp: Qmp, tops: Mapping[str, Sequence[str]]) -> bool:
    """Whether that has happened: the new nodes stand on something."""
    depth = {entry["node-name"]: entry["backing_file_depth"] for entry in qmp.command("query-named-block-nodes")}
    return all(depth.get(new, 0) > 0 for _, new in tops.values())


def prepare_vars(qmp: Qmp, path: str) -> None:
    """Make the file `path`, ready to take a copy of the UEFI variables; its space is taken now, so that a disk that
    becomes full does not keep the copy from following the disks. HostError when it is full already."""
    images.create(path, _vars_size(qmp), "falloc")
    _new_file_node(qmp, path, _VARS_COPY)


def copy_vars(qmp: Qmp) -> None:
    """Copy the UEFI variables into what `prepare_vars` was given; of a paused machine."""
    try:
        qmp.run_job("blockdev-backup", _vars_job(), timeout=60.0)
    finally:
        qmp.command("blockdev-del", {"node-name": _VARS_COPY})


def activate(qmp: Qmp) -> None:
    """Let a guest's images be changed again while it stands still after its memory was written; `cont` does so too,
    and is the only way before QEMU 10.0."""
    try:
        qmp.command("blockdev-set-active", {"active": True})
    except QmpError as error:
        if error.error_class != "CommandNotFound":
            raise


def _vars_size(qmp: Qmp) -> int:
    """Bytes of the UEFI variables."""
    for entry in qmp.command("query-named-block-nodes", {"flat": True}):
        if entry["node-name"] == VARS_NODE:
            return int(entry["image"]["virtual-size"])
    raise HostError("QEMU has no UEFI variables")


def length(qmp: Qmp, id: str) -> int:
    """How many images the chain of disk `id` has in QEMU."""
    pattern = re.compile(re.escape(id) + r"-fmt\d+")
    return 1 + max(
        (
            entry["backing_file_depth"]
            for entry in qmp.command("query-named-block-nodes")
            if pattern.fullmatch(entry["node-name"])
        ),
        default=-1,
    )


def end_work(qmp: Qmp, *, saving: bool = False) -> None:
    """After a command that died: end its job, and with `saving` its writing of the guest's memory."""
    if saving and qmp.command("query-migrate").get("status") in {"setup", "active", "device", "pre-switchover"}:
        qmp.command("migrate_cancel")
        deadline = time.monotonic() + _CANCEL_SECONDS
        while qmp.command("query-migrate")["status"] not in {"cancelled", "failed", "completed"}:
            if time.monotonic() > deadline:
                raise HostError(f"QEMU has not ended writing the guest's memory for {_CANCEL_SECONDS:g} seconds")
            with contextlib.suppress(TimeoutError):
                qmp.wait_event("MIGRATION", timeout=0.1)
    for entry in qmp.command("query-jobs"):
        if entry["id"] == JOB:
            with contextlib.suppress(QmpError):  # how the job ended is seen by what it has done
                if entry["status"] not in {"concluded", "aborting"}:
                    qmp.command("job-cancel", {"id": JOB})
                qmp.watch_job(JOB, timeout=60.0)


def close_unused(qmp: Qmp, ids: Sequence[str]) -> None:
    """Close the nodes of these disks that nothing stands on: QEMU refuses to close any other."""
    there = [entry["node-name"] for entry in qmp.command("query-named-block-nodes", {"flat": True})]
    for id in ids:
        for name in graph.owned_nodes(id, there):
            with contextlib.suppress(QmpError):
                qmp.command("blockdev-del", {"node-name": name})
    if _VARS_COPY in there:
        qmp.command("blockdev-del", {"node-name": _VARS_COPY})


# Merging ---------------------------------------------------------------------------------------------------------


def merge(
    qmp: Qmp,
    home: str,
    disk: Record,
    position: int,
    *,
    down: bool,
    progress: Progress = quiet,
    before_switch: Callable[[], None] = lambda: None,
) -> None:
    """Make one image of images `position` and `position` + 1 of the disk's chain.

    `down`: the upper one's data goes into the lower one, which stays; otherwise the other way round. When the guest
    writes to the upper one and that is to go, `before_switch` is called as soon as both are the same but for what the
    guest goes on writing: it has to pause the guest. QmpError with the chain as it was, as when the disk is full.
    """
    chain, names = disk["chain"], nodes(qmp, disk)
    lower, upper, top = names[position], names[position + 1], names[-1]
    job: dict[str, Any] = {"job-id": JOB, "auto-dismiss": False}
    # what is written to: the image that stays, and the header of the image above, which says what is below it
    written = [position if down else position + 1]
    if down and position + 2 < len(names):
        written.append(position + 2)
    opened = []
    try:
        for number in written:
            if names[number] != top and _set_writable(qmp, home, disk, number, names, True):
                opened.append(number)
        if not down:
            if position:
                below = os.path.join(home, chain[position - 1]["path"])
                job |= {"base-node": names[position - 1], "backing-file": below}
            qmp.run_job("block-stream", job | {"device": upper}, progress=progress)
        else:
            job |= {"device": top, "top-node": upper, "base-node": lower}
            if upper == top:
                qmp.run_job("block-commit", job, progress=progress, until="ready")
                try:
                    before_switch()
                    qmp.command("job-complete", {"id": JOB})
                    qmp.watch_job(JOB)
                except BaseException:
                    end_work(qmp)
                    raise
            else:
                job["backing-file"] = os.path.join(home, chain[position]["path"])
                qmp.run_job("block-commit", job, progress=progress)
        kept = position if down else position + 1
        _flush(qmp, disk, kept, names[kept])
    finally:
        # the one that the guest writes to now stays as it is
        for number in opened:
            if number + 1 < len(names) and not (down and upper == top):
                with contextlib.suppress(QmpError):  # QEMU writes to it no more, whether or not it could
                    _set_writable(qmp, home, disk, number, names, False)
    _forget(qmp, upper if down else lower)


@contextlib.contextmanager
def bare(home: str, disk: Record, chain: Sequence[Record], *, writable: bool = True) -> Iterator[Qmp]:
    """A QEMU without a machine that has `chain` open, under the disk's node names; QmpError when somebody else
    writes to it."""
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        command = [find_program(), "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
        command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: syscalls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        theirs.close()
        qmp = Qmp(ours)
        qmp.negotiate(_BARE_SECONDS)
        record = {**disk, "chain": list(chain), "readonly": not writable}
        fdsets = []
        for number in range(len(chain)):
            fd = open_image(home, record, number)
            try:
                fdsets.append(qmp.add_fd(fd))
            finally:
                os.close(fd)
        for name, options in graph.node_commands(record, fdsets):
            qmp.command(name, options)
        for fdset in fdsets:
            _empty(qmp, fdset)
        yield qmp
        qmp.command("quit")
        process.wait(_BARE_SECONDS)  # it writes back what it still holds


def flatten(home: str, disk: Record, target: str, progress: Progress = quiet) -> None:
    """Copy what the disk's chain holds into one new qcow2 at `target`; no image may be written to meanwhile.

    QmpError when it fails, as when the disk is full; `target` may be there then.
    """
    with bare(home, disk, disk["chain"], writable=False) as qmp:
        top = nodes(qmp, disk)[-1]
        there = {entry["node-name"]: entry for entry in qmp.command("query-named-block-nodes", {"flat": True})}
        images.create(target, there[top]["image"]["virtual-size"])
        _new_file_node(qmp, target, _COPY, sparse=True)
        job = {"job-id": JOB, "device": top, "target": _COPY, "sync": "full", "auto-dismiss": False}
        qmp.run_job("blockdev-backup", job, progress=progress)
        qmp.command("blockdev-del", {"node-name": _COPY})
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Nodes and descriptors -------------------------------------------------------------------------------------------


def _number(name: str) -> int:
    return int(name.rpartition("-fmt")[2])


def _file_node(name: str) -> str:
    id, _, number = name.rpartition("-fmt")
    return graph.file_node(id, int(number))


def _vars_job() -> dict[str, Any]:
    return {"job-id": JOB, "device": VARS_NODE, "target": _VARS_COPY, "sync": "full", "auto-dismiss": False}


def _new_file_node(qmp: Qmp, path: str, name: str, *, sparse: bool = False) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fdset = qmp.add_fd(fd)
    finally:
        os.close(fd)
    qmp.command(
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": name,
            "file": {"driver": "file", "filename": f"/dev/fdset/{fdset}"},
            "backing": None,
            "discard": "unmap" if sparse else "ignore",
            "detect-zeroes": "unmap" if sparse else "off",
        },
    )
    _empty(qmp, fdset)


def _set_writable(qmp: Qmp, home: str, disk: Record, number: int, names: Sequence[str], writable: bool) -> bool:
    """Have QEMU open image `number` of the chain again, for writing or not; False when it was so already."""
    name = names[number]
    file = _file_node(name)
    there = {entry["node-name"]: entry for entry in qmp.command("query-named-block-nodes", {"flat": True})}
    if there[file]["ro"] != writable:
        return False
    found = _SET.search(there[file]["file"])
    if found is None:
        raise HostError(f"QEMU does not say which file {file} is")
    fdset = int(found[1])
    _empty(qmp, fdset)
    fd = open_image(home, disk, number, writable=writable)
    try:
        qmp.add_fd(fd, fdset)
    finally:
        os.close(fd)
    try:
        first = _number(name) - number
        above = _as_it_is(qmp, disk, number, name, writable)
        for io_uring in (True, False):  # the one thing that it does not tell and does not let change
            _, below = graph.file_blockdev(disk, number, fdset, writable=writable, io_uring=io_uring, first=first)
            try:
                qmp.command("blockdev-reopen", {"options": [below, above]})
                return True
            except QmpError as error:
                if not io_uring or "'aio'" not in error.message:
                    raise
    finally:
        _empty(qmp, fdset)
    return True


def _flush(qmp: Qmp, disk: Record, number: int, name: str) -> None:
    """Have QEMU write all it holds of an image to the disk: a job that has ended has not. QmpError when it cannot.

    Opening a node again is the one command that does so for one image, tells of errors and leaves the guest running.
    """
    there = {entry["node-name"]: entry for entry in qmp.command("query-named-block-nodes", {"flat": True})}
    qmp.command("blockdev-reopen", {"options": [_as_it_is(qmp, disk, number, name, not there[name]["ro"])]})


def _as_it_is(qmp: Qmp, disk: Record, number: int, name: str, writable: bool) -> dict[str, Any]:
    """The options of the format node `name` of image `number`: numbers of nodes and positions in the chain differ
    after a merge."""
    _, options = graph.format_blockdev(disk, number, writable=writable, first=_number(name) - number)
    if "backing" in options:
        options["backing"] = _below(qmp, name)
    return options


def _below(qmp: Qmp, name: str) -> str | None:
    """The format node that node `name` stands on."""
    entries = {entry["node-name"]: entry for entry in qmp.command("query-named-block-nodes")}
    depth = entries[name]["backing_file_depth"]
    id = name.rpartition("-fmt")[0]
    other: str
    for other, entry in entries.items():
        if other.rpartition("-fmt")[0] == id and entry["backing_file_depth"] == depth - 1:
            return other
    return None


def _empty(qmp: Qmp, fdset: int) -> None:
    """Take the descriptors out of a set; what QEMU has opened of it stays open, and the set with it."""
    for entry in qmp.command("query-fdsets"):
        if entry["fdset-id"] == fdset:
            for fd in entry["fds"]:
                qmp.command("remove-fd", {"fdset-id": fdset, "fd": fd["fd"]})


def _forget(qmp: Qmp, name: str, there: set[str] | None = None) -> None:
    """Close a format node and its file; one that is in use stays."""
    for node in (name, _file_node(name)):
        if there is None or node in there:
            with contextlib.suppress(QmpError):
                qmp.command("blockdev-del", {"node-name": node})
