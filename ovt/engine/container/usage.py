"""What a container uses, and what its cgroups leave behind: readings of cgroups and /proc for the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ovt.engine.base import Stats
from ovt.errors import HostError, OvtError
from ovt.kernel import procfs

_CGROUP = "/sys/fs/cgroup"
_UNLIMITED = 1 << 60  # v1 shows "no limit" as the largest multiple of the page size below 2**63


def stats(data: dict[str, Any], pid: int, pids: list[int]) -> Stats:
    """From the runtime's statistics (the `data` object of `events --stats`); without a cgroup from /proc."""
    received, sent = _network(pid)
    if not data:
        return Stats(_cpu_seconds(pids), _resident(pids), 0, len(pids), 0, 0, 0, received, sent)
    memory = (data.get("memory") or {}).get("usage") or {}
    cache = (data.get("memory") or {}).get("cache", 0)
    limit = memory.get("limit", 0)
    processes = data.get("pids") or {}
    most = processes.get("limit", 0)
    blocks = (data.get("blkio") or {}).get("ioServiceBytesRecursive") or []
    return Stats(
        cpu_seconds=((data.get("cpu") or {}).get("usage") or {}).get("total", 0) / 1e9,
        memory=max(0, memory.get("usage", 0) - cache),
        memory_limit=limit if 0 < limit < _UNLIMITED else 0,
        pids=processes.get("current", len(pids)),
        pids_limit=most if 0 < most < _UNLIMITED else 0,
        block_read=_sum(blocks, "read"),
        block_write=_sum(blocks, "write"),
        network_received=received,
        network_sent=sent,
    )


def _sum(entries: list[dict[str, Any]], operation: str) -> int:
    return sum(int(entry.get("value", 0)) for entry in entries if str(entry.get("op", "")).lower() == operation)


def _network(pid: int) -> tuple[int, int]:
    """Bytes in and out over all links but the loopback, from /proc/PID/net/dev (proc(5))."""
    received = sent = 0
    try:
        lines = procfs.read(f"/proc/{pid}/net/dev").splitlines()[2:]
    except (FileNotFoundError, ProcessLookupError, OSError):
        return 0, 0  # it has just ended
    for line in lines:
        name, _, numbers = line.partition(":")
        if name.strip() != "lo":
            fields = numbers.split()
            received += int(fields[0])
            sent += int(fields[8])
    return received, sent


def _cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = procfs.stat_fields(pid)
        if fields:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _resident(pids: list[int]) -> int:
    pages = 0
    for pid in pids:
        fields = procfs.stat_fields(pid)
        if fields:
            pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")


def process(pid: int) -> dict[str, Any] | None:
    """What /proc says of one process (proc(5)); None when it has just ended."""
    try:
        status = dict(line.split(":\t", 1) for line in procfs.read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
        command = procfs.read(f"/proc/{pid}/cmdline").rstrip("\0").replace("\0", " ")
        fields = procfs.stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields is None:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = (int(fields[11]) + int(fields[12])) / ticks
    return {
        "pid": int(status["NSpid"].split()[-1]),
        "host_pid": pid,
        "host_uid": int(status["Uid"].split()[0]),
        "state": fields[0],
        "cpu_seconds": round(seconds, 2),
        "memory": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "command": command or f"[{status['Name']}]",
    }


def same_pid_namespace(pid: int) -> list[int]:
    """All processes in the pid namespace of `pid`, for containers without a cgroup."""
    try:
        wanted = os.readlink(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == wanted:
                    found.append(int(name))
            except OSError:
                continue  # ended, or another user's
    return sorted(found)


def out_of_memory(root: str, id: str) -> bool:
    """Whether the kernel has killed for memory in the cgroup of container `id` (memory.events, v1: oom_control)."""
    from ovt.engine.container.state import State
    from ovt.kernel import cgroup

    try:
        record = State.load(root, id).record.get("cgroup")
        directory = cgroup.restore(record).path_for("memory") if record else None
    except OvtError:
        return False  # nothing is known of it any more
    for name in ("memory.events", "memory.oom_control") if directory else ():
        try:
            lines = procfs.read(f"{directory}/{name}").splitlines()
        except FileNotFoundError:
            continue
        return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in lines)
    return False


def _hierarchies() -> list[str]:
    if os.path.exists(f"{_CGROUP}/cgroup.controllers"):
        return [_CGROUP]
    if not os.path.isdir(_CGROUP):
        return []
    return [f"{_CGROUP}/{name}" for name in os.listdir(_CGROUP) if not os.path.islink(f"{_CGROUP}/{name}")]


def cgroup_directories(parent: str) -> Iterator[str]:
    """The directories that ovt made for containers below `parent` in every hierarchy."""
    if not parent.startswith("/"):
        return
    for root in _hierarchies():
        try:
            names = os.listdir(root + parent)
        except OSError:
            continue
        for name in sorted(names):
            if os.path.isdir(f"{root}{parent}/{name}"):
                yield f"{root}{parent}/{name}"


def remove_cgroup(path: str) -> None:
    """Remove an empty cgroup and those below it; HostError naming the processes that are still in it."""
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except OSError as error:
            pids = procfs.read(f"{directory}/cgroup.procs").split()
            raise HostError(f"{directory} is still used by processes {' '.join(pids)}", error.errno or 0) from error


def remove_parents(parent: str) -> None:
    """Remove the directory `parent` itself where nothing is left in it."""
    if not parent.startswith("/"):
        return
    for root in _hierarchies():
        try:
            os.rmdir(root + parent)
        except OSError:
            continue  # in use, or not there


def unrecorded(root: str) -> list[str]:
    """Entries of the runtime's state directory that a killed command left without a record (or before their name)."""
    found = []
    for name in os.listdir(root) if os.path.isdir(root) else []:
        if name.startswith("."):
            maker, started = ["", *name.split(".")][-2:]  # `.ID.PID.START` while that process makes it
            if maker.isdigit() and started.isdigit() and not procfs.alive(int(maker), int(started)):
                found.append(name)
        elif not os.path.exists(f"{root}/{name}/state.json"):
            found.append(name)
    return found


def remove_unrecorded(root: str, names: list[str]) -> None:
    """Remove those of `names` that still have no record."""
    import shutil

    for name in names:
        if os.path.isdir(f"{root}/{name}") and (name.startswith(".") or name in unrecorded(root)):
            shutil.rmtree(f"{root}/{name}")
