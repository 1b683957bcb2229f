"""Live migration as QEMU sees it: the steps on the sending and on the receiving QEMU, over two QMP connections.

It knows neither instances nor hosts: ovt.machines.migrate and ovt.machines.receive put these steps in order and carry
the bytes. QEMU lives in namespaces of its own, so it reaches its sockets below a directory that it is lent as a
descriptor: `/proc/self/fd/N/NAME`. By a path, and not by a descriptor of the socket itself, because QEMU makes the
several connections of multifd itself. Facts are from QEMU's docs/devel/migration and qapi/migration.json (7.2 to 10).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ovt.engine.vm.firmware import VARS_NODE
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import HostError, StateError

OUT, IN, NBD = "out", "in", "nbd"  # sockets in the lent directory: the source's two, the target's two

_OPAQUE = "migration"  # marks the descriptors of lent directories
_ENDED = frozenset({"completed", "failed", "cancelled"})
_SWITCHED = frozenset({"completed", "postcopy-active", "postcopy-paused", "postcopy-recover"})
_CAPABILITIES = (
    *("events", "return-path", "late-block-activate", "pause-before-switchover"),
    *("auto-converge", "multifd", "postcopy-ram"),
)
_PARAMETERS = ("downtime-limit", "max-bandwidth", "multifd-channels")


class Settings(NamedTuple):
    """How to migrate; both sides have to be given the same."""

    downtime: int = 300  # milliseconds the guest may stand still
    bandwidth: int = 0  # bytes per second at most; 0: what the wire gives
    auto_converge: bool = True  # slow the guest down when it writes faster than the wire carries
    multifd: int = 0  # connections beside the main one that carry memory; 0: none
    postcopy: bool = False  # may be switched to post-copy
    disks: bool = False  # disks are mirrored, so the switch-over has to wait for them

    def capabilities(self) -> dict[str, bool]:
        """Every capability used here and whether it is wanted."""
        return {
            "events": True,
            "return-path": True,  # "completed" on the source then means that the target has loaded everything
            "late-block-activate": True,  # the target touches no image before its `cont`
            "pause-before-switchover": self.disks,
            "auto-converge": self.auto_converge,
            "multifd": self.multifd > 0,
            "postcopy-ram": self.postcopy,
        }

    def parameters(self) -> dict[str, int]:
        """The parameters of migrate-set-parameters."""
        wanted = {"downtime-limit": self.downtime, "max-bandwidth": self.bandwidth}
        return {**wanted, "multifd-channels": self.multifd} if self.multifd else wanted


class Disk(NamedTuple):
    """A disk of a running QEMU: the device's id, the node below it, its size in bytes."""

    id: str
    node: str
    size: int
    read_only: bool


class Progress(NamedTuple):
    """Where a migration is. Bytes, bytes per second, milliseconds, seconds; 0 where QEMU does not know yet."""

    phase: str  # disks | memory | postcopy | switch
    remaining: int
    total: int
    rate: float = 0.0
    dirty_rate: float = 0.0
    expected_downtime: int = 0
    passes: int = 0
    elapsed: float = 0.0


class Result(NamedTuple):
    """What a migration took, in milliseconds, as QEMU counts; bytes sent."""

    total: int
    downtime: int
    transferred: int


# both sides


def lend_directory(qmp: Qmp, path: str) -> str:
    """Make the directory `path` reachable for QEMU; the path that QEMU has to use.

    The descriptor is that of a detached bind mount where that is allowed: `..` leads nowhere then.
    """
    fd = _detached(path)
    try:
        answer = qmp.command("add-fd", {"opaque": _OPAQUE}, fds=(fd,))
    finally:
        os.close(fd)
    return f"/proc/self/fd/{answer['fd']}"


def _detached(path: str) -> int:
    from ovt.kernel import syscalls

    try:
        return syscalls.open_tree(-100, path, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    except OSError:  # not root, or the directory lies in a mount of another namespace
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def take_back_directories(qmp: Qmp) -> None:
    """Undo `lend_directory`."""
    for entry in qmp.command("query-fdsets"):
        if any(fd.get("opaque") == _OPAQUE for fd in entry["fds"]):
            with contextlib.suppress(QmpError):  # gone meanwhile
                qmp.command("remove-fd", {"fdset-id": entry["fdset-id"]})


def parameters(qmp: Qmp) -> dict[str, Any]:
    """The parameters that `configure` changes, as they are now."""
    present = qmp.command("query-migrate-parameters")
    return {name: present[name] for name in _PARAMETERS if name in present}


def configure(qmp: Qmp, settings: Settings) -> None:
    """Set capabilities and parameters. QmpError when QEMU lacks one of them or two do not go together."""
    _set_capabilities(qmp, settings.capabilities())
    qmp.command("migrate-set-parameters", settings.parameters())


def deconfigure(qmp: Qmp, before: Mapping[str, Any]) -> None:
    """Undo `configure`, `before` it `parameters` said: else snapshots and saved states were written differently."""
    _set_capabilities(qmp, dict.fromkeys(_CAPABILITIES, False))
    qmp.command("migrate-set-parameters", before)


def _set_capabilities(qmp: Qmp, wanted: Mapping[str, bool]) -> None:
    listed = [{"capability": name, "state": state} for name, state in wanted.items()]
    qmp.command("migrate-set-capabilities", {"capabilities": listed})


def disks(qmp: Qmp) -> dict[str, Disk]:
    """The disks and loaded CD-ROM drives by device id."""
    found = {}
    for entry in qmp.command("query-block"):
        inserted = entry.get("inserted")
        id = device_id(entry.get("qdev", ""))
        if inserted and id:
            node = inserted["node-name"]
            found[id] = Disk(id, node, inserted["image"]["virtual-size"], inserted["ro"])
    return found


def device_id(qdev: str) -> str:
    """The id in a path such as `/machine/peripheral/root/virtio-backend`; a device's own id stays as it is."""
    parts = qdev.split("/")
    return parts[3] if qdev.startswith("/machine/peripheral/") else "" if "/" in qdev else qdev


def nvram_size(qmp: Qmp) -> int:
    """Bytes of the UEFI variables, 0 without UEFI. Their content moves with the memory."""
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    return next((node["image"]["virtual-size"] for node in nodes if node["node-name"] == VARS_NODE), 0)


def has_vsock(qmp: Qmp) -> bool:
    """Whether the machine has a vsock device."""
    devices = [*qmp.command("qom-list", {"path": "/machine/peripheral"})]
    devices += qmp.command("qom-list", {"path": "/machine/peripheral-anon"})
    return any("vhost-vsock" in device["type"] for device in devices)


def running(qmp: Qmp) -> bool:
    """Whether the guest runs."""
    return bool(qmp.command("query-status")["running"])


# the source


def blocked_reasons(qmp: Qmp) -> list[str]:
    """Why QEMU itself would refuse to migrate: devices without migration support, mounted 9p shares …"""
    return list(qmp.command("query-migrate").get("blocked-reasons", ()))


def start_mirrors(qmp: Qmp, directory: str, mirrored: Sequence[Disk], bandwidth: int = 0) -> None:
    """Begin to copy disks to the exports of the same names behind `directory`/nbd, and every write with them."""
    for disk in mirrored:
        node = {
            "driver": "nbd",
            "node-name": _mirror(disk),
            "server": {"type": "unix", "path": f"{directory}/{NBD}"},
            "export": disk.id,
            "discard": "unmap",
        }
        qmp.command("blockdev-add", node)
        job = {"job-id": _mirror(disk), "device": disk.node, "target": _mirror(disk), "sync": "full"}
        speed = {"speed": bandwidth} if bandwidth else {}
        policy = {"on-source-error": "report", "on-target-error": "report", "auto-dismiss": False}
        qmp.command("blockdev-mirror", {**job, **speed, **policy})


def _mirror(disk: Disk) -> str:
    return f"migrate-{disk.id}"


def mirrors(qmp: Qmp, mirrored: Sequence[Disk]) -> tuple[bool, int, int]:
    """Whether every mirror is in step with its disk, and the bytes remaining and in all; HostError when one failed."""
    jobs = {job["id"]: job for job in qmp.command("query-jobs")}
    ready, done, total = True, 0, 0
    for disk in mirrored:
        job = jobs.get(_mirror(disk))
        if job is None or job["status"] == "concluded":
            reason = "it has ended" if job is None else job.get("error", "it has ended")
            raise HostError(f"disk {disk.id} cannot be copied: {reason[:1].lower()}{reason[1:]}")
        ready = ready and job["status"] == "ready"
        done += job["current-progress"]
        total += job["total-progress"]
    return ready, max(0, total - done), total


def lock_step(qmp: Qmp, mirrored: Sequence[Disk]) -> None:
    """From now on the guest's writes end when the copy has them too, so that nothing is left to copy at the end.

    QEMU before 8.2 cannot change that of a running job: then the pause at the switch-over is a little longer.
    """
    for disk in mirrored:
        change = {"id": _mirror(disk), "type": "mirror", "copy-mode": "write-blocking"}
        try:
            qmp.command("block-job-change", change)
        except QmpError as error:
            if error.error_class != "CommandNotFound":
                raise


def finish_mirrors(qmp: Qmp, mirrored: Sequence[Disk], timeout: float = 60.0) -> None:
    """End mirrors that are in step, with the guest standing still: the copies are complete then. HostError if not."""
    for disk in mirrored:
        qmp.command("block-job-cancel", {"device": _mirror(disk)})  # of a ready mirror: end without changing over
    for disk in mirrored:
        try:
            qmp.watch_job(_mirror(disk), timeout=timeout)
        except QmpError as error:
            raise HostError(f"disk {disk.id} could not be copied to the end: {error.message}") from None
        except TimeoutError:
            raise HostError(f"the copy of disk {disk.id} has not ended within {timeout:g} seconds") from None
        qmp.command("blockdev-del", {"node-name": _mirror(disk)})


def drop_mirrors(qmp: Qmp, mirrored: Sequence[Disk], timeout: float = 30.0) -> None:
    """End mirrors in whatever state they are, and forget what they wrote to."""
    jobs = {job["id"] for job in qmp.command("query-jobs")}
    for disk in mirrored:
        if _mirror(disk) in jobs:
            with contextlib.suppress(QmpError):  # it may have ended by itself just now
                qmp.command("block-job-cancel", {"device": _mirror(disk), "force": True})
            with contextlib.suppress(QmpError):
                qmp.watch_job(_mirror(disk), timeout=timeout)
    nodes = {node["node-name"] for node in qmp.command("query-named-block-nodes", {"flat": True})}
    for disk in mirrored:
        if _mirror(disk) in nodes:
            qmp.command("blockdev-del", {"node-name": _mirror(disk)})


def start(qmp: Qmp, directory: str) -> None:
    """Begin to send the memory to `directory`/out; `advance` sees it through."""
    qmp.events.clear()
    qmp.command("migrate", {"uri": f"unix:{directory}/{OUT}"})


def status(qmp: Qmp) -> tuple[str, Progress, Result]:
    """QEMU's word for the state (`active`, `pre-switchover`, `completed` …) and the figures.

    HostError with QEMU's reason when the migration failed or was cancelled.
    """
    info = qmp.command("query-migrate")
    state = info.get("status", "none")
    if state in {"failed", "cancelled"}:
        raise HostError(f"QEMU gave the migration up: {info.get('error-desc', state)}")
    ram = info.get("ram", {})
    page = ram.get("page-size", 4096)
    progress = Progress(
        phase="postcopy" if state.startswith("postcopy") else "switch" if state == "pre-switchover" else "memory",
        remaining=ram.get("remaining", 0),
        total=ram.get("total", 0),
        rate=ram.get("mbps", 0.0) * 1e6 / 8,
        dirty_rate=float(ram.get("dirty-pages-rate", 0) * page),
        expected_downtime=info.get("expected-downtime", 0),
        passes=ram.get("dirty-sync-count", 0),
        elapsed=info.get("total-time", 0) / 1000,
    )
    return state, progress, Result(info.get("total-time", 0), info.get("downtime", 0), ram.get("transferred", 0))


def switched(state: str) -> bool:
    """Whether the guest stands still on the source in `state`, and the target can go on with it."""
    return state in _SWITCHED


def stopped_at(qmp: Qmp) -> float:
    """When the guest stood still, in seconds since the epoch: of the last STOP event, else now."""
    stamps = [event["timestamp"] for event in qmp.events if event["event"] == "STOP"]
    return stamps[-1]["seconds"] + stamps[-1]["microseconds"] / 1e6 if stamps else time.time()


def wait_change(qmp: Qmp, timeout: float) -> None:
    """Return at the next change of the migration's or a job's state, at the latest after `timeout` seconds."""
    with contextlib.suppress(TimeoutError):
        qmp.wait_event("MIGRATION", "BLOCK_JOB_ERROR", timeout=timeout)


def start_postcopy(qmp: Qmp) -> None:
    """Change over at once and send the rest of the memory afterwards, page by page as the guest needs it."""
    qmp.command("migrate-start-postcopy")


def send_again(qmp: Qmp, directory: str) -> None:
    """After post-copy lost its connection: send the rest to `directory`/out."""
    qmp.command("migrate", {"uri": f"unix:{directory}/{OUT}", "resume": True})


def go_on(qmp: Qmp) -> None:
    """After `pre-switchover`: hand over."""
    qmp.command("migrate-continue", {"state": "pre-switchover"})


def cancel(qmp: Qmp, timeout: float = 30.0) -> str:
    """End a migration that is under way, and wait for its end; QEMU's word for how it ended, `none` before a first."""
    deadline = time.monotonic() + timeout
    asked = False
    while (state := qmp.command("query-migrate").get("status", "none")) not in _ENDED | {"none"}:
        if state.startswith("postcopy"):
            raise StateError("the guest's memory is on both hosts: post-copy has no way back")
        if time.monotonic() > deadline:
            raise HostError(f"QEMU has not ended the migration within {timeout:g} seconds: it is {state}")
        if not asked:
            with contextlib.suppress(QmpError):  # it has come to its end or to post-copy just now
                qmp.command("migrate_cancel")
            asked = True
        wait_change(qmp, 0.2)
    return str(state)


def run_again(qmp: Qmp, timeout: float = 10.0) -> None:
    """Let the guest go on where it is, after `cancel` or a failure; QmpError when QEMU cannot, HostError when it does
    not."""
    deadline = time.monotonic() + timeout
    while not running(qmp):
        try:
            qmp.command("cont")
        except QmpError:
            if time.monotonic() > deadline:  # another QEMU may hold the images for a moment
                raise
        if time.monotonic() > deadline:
            raise HostError("the guest does not go on")
        time.sleep(0.02)


# the target


def listen(qmp: Qmp, directory: str) -> None:
    """Wait for a source at `directory`/in. QEMU was started with `-incoming defer`."""
    qmp.command("migrate-incoming", {"uri": f"unix:{directory}/{IN}"})


def listen_again(qmp: Qmp, directory: str, timeout: float = 10.0) -> None:
    """After post-copy lost its connection: wait for the source at `directory`/in once more. The guest goes on as far
    as the memory allows that it has. HostError when it is not in post-copy."""
    deadline = time.monotonic() + timeout
    while (state := qmp.command("query-migrate").get("status")) != "postcopy-paused":
        if state != "postcopy-active" or time.monotonic() > deadline:
            raise HostError(f"there is nothing to recover: the migration is {state}")
        with contextlib.suppress(QmpError):  # it may see the loss by itself just now
            qmp.command("migrate-pause")
        time.sleep(0.05)
    qmp.command("migrate-recover", {"uri": f"unix:{directory}/{IN}"})


def export(qmp: Qmp, directory: str, wanted: Sequence[str]) -> None:
    """Let the disks with these device ids be written through `directory`/nbd, each under its id."""
    here = disks(qmp)
    qmp.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": f"{directory}/{NBD}"}}})
    for id in wanted:
        if id not in here:
            raise HostError(f"the machine that was made here has no disk {id}")
        request = {"type": "nbd", "id": f"migrate-{id}", "node-name": here[id].node, "name": id, "writable": True}
        qmp.command("block-export-add", request)


def close_exports(qmp: Qmp) -> None:
    """End `export`; what was written is flushed."""
    qmp.command("nbd-server-stop")


def wait_arrived(qmp: Qmp, timeout: float = 30.0) -> None:
    """Wait until the guest is here and only `cont` is missing; HostError when it did not come.

    After post-copy has begun it is here although most of its memory is not.
    """
    deadline = time.monotonic() + timeout
    while True:
        info = qmp.command("query-migrate")
        state = info.get("status", "none")
        if state in {"completed", "postcopy-active"} and qmp.command("query-status")["status"] != "inmigrate":
            return
        if state == "failed":
            raise HostError(f"the guest did not arrive: {info.get('error-desc', 'QEMU does not say why')}")
        if time.monotonic() > deadline:
            raise HostError(f"the guest has not arrived within {timeout:g} seconds: the migration is {state}")
        time.sleep(0.002)


def wait_whole(qmp: Qmp, timeout: float) -> None:
    """Wait until the last of the memory is here, after post-copy; TimeoutError."""
    deadline = time.monotonic() + timeout
    while qmp.command("query-migrate").get("status") != "completed":
        if time.monotonic() > deadline:
            raise TimeoutError
        wait_change(qmp, 0.1)


def go(qmp: Qmp, run: bool) -> None:
    """Let the arrived guest run (QmpError when its images cannot be had), and tell the network where it is now."""
    if run:
        qmp.command("cont")
        with contextlib.suppress(QmpError):  # a machine without network cards has nobody to tell
            qmp.command("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100})
