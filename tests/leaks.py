"""What a test left on the host: mounts, cgroups, processes, network namespaces, descriptors.

Other work may be going on on the machine, so only what can be told to be the test's own is looked at: processes that
became children of the test run (it adopts orphans, so a forgotten container lands there), mounts below its temporary
directory, cgroups and named network namespaces that carry its prefix, its own descriptors.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

PREFIX = f"ovt-test-{os.getpid()}"
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of every orphaned descendant, as conmon and containerd's shim do."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def mounts(below: Path) -> set[str]:
    with open("/proc/self/mountinfo") as lines:
        points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return {point for point in points if point == str(below) or point.startswith(f"{below}/")}


def hierarchies() -> list[str]:
    with open("/proc/self/mountinfo") as lines:
        return [line.split()[4] for line in lines if line.split(" - ")[1].split()[0] in ("cgroup", "cgroup2")]


def cgroups() -> set[str]:
    """Every cgroup with the prefix in its path, but not the parent directory that bundles share."""
    found = set()
    for top in hierarchies():
        for place, directories, _ in os.walk(top):
            found |= {f"{place}/{d}" for d in directories if PREFIX in f"{place}/{d}" and d != PREFIX}
    return found


def remove_test_cgroups() -> None:
    """Remove the shared parent directories; what is in use stays, it was reported by the test that left it."""
    for top in hierarchies():
        for place, _, _ in os.walk(f"{top}/{PREFIX}", topdown=False):
            try:
                os.rmdir(place)
            except OSError:
                continue


def descendants() -> dict[int, str]:
    """pid → state and command of every process below this one."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as f:
                    name, _, rest = f.read().partition(" (")[2].rpartition(") ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry)] = (int(rest.split()[1]), f"{rest.split()[0]} {name}")
    found = {os.getpid()}
    while True:
        more = {pid for pid, (parent, _) in parents.items() if parent in found} - found
        if not more:
            return {pid: parents[pid][1] for pid in found if pid != os.getpid()}
        found |= more


def network_namespaces() -> set[str]:
    try:
        return {name for name in os.listdir("/run/netns") if PREFIX in name}
    except FileNotFoundError:
        return set()


def descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


class Snapshot:
    """The state of everything watched, at one moment."""

    def __init__(self, basetemp: Path) -> None:
        self.basetemp = basetemp
        self.mounts = mounts(basetemp)
        self.cgroups = cgroups()
        self.processes = set(descendants())
        self.namespaces = network_namespaces()
        self.descriptors = descriptors()


def reap() -> None:
    """Collect the zombies of adopted containers; the exit status belongs to nobody else."""
    for pid, state in descendants().items():
        if state.startswith("Z"):
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def left_behind(before: Snapshot, patience: float = 2.0) -> list[str]:
    """One line per thing that is there now and was not then; things on their way out get `patience` seconds.

    Processes and mounts that were left are removed, so that one careless test does not fail all that follow.
    """
    deadline = time.monotonic() + patience
    while True:
        reap()
        now = Snapshot(before.basetemp)
        processes = {pid: what for pid, what in descendants().items() if pid not in before.processes}
        lines = [
            *[f"mount {m}" for m in sorted(now.mounts - before.mounts)],
            *[f"cgroup {c}" for c in sorted(now.cgroups - before.cgroups)],
            *[f"process {pid} ({what})" for pid, what in processes.items()],
            *[f"network namespace {n}" for n in sorted(now.namespaces - before.namespaces)],
            *[f"descriptor {fd} → {t}" for fd, t in now.descriptors.items() if fd not in before.descriptors],
        ]
        if not lines or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for point in sorted(now.mounts - before.mounts, reverse=True):
        ctypes.CDLL(None).umount2(os.fsencode(point), 2)
    return lines
