"""Find what a container left behind on the host: mounts, control groups, processes, runtime state."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def mounts(marks: Sequence[str]) -> list[str]:
    """Mounts of this mount namespace whose mountinfo line holds one of `marks`."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount {line.split()[4]}" for line in lines if any(mark in line for mark in marks)]


def cgroups(marks: Sequence[str]) -> list[str]:
    """Control group directories, in any hierarchy, named after one of `marks`."""
    found = []
    for base, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [f"cgroup {base}/{name}" for name in directories if any(mark in name for mark in marks)]
    return found


def processes(marks: Sequence[str]) -> list[str]:
    """Live processes that hold one of `marks` in their command line or cgroup path."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = (entry / "cgroup").read_text()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it ended while we looked
            continue
        if state != "Z" and any(mark in command or mark in where for mark in marks):
            found.append(f"process {entry.name} {command[:120]}")
    return found


def runtime_state(runtime: Sequence[str], ids: Iterable[str]) -> list[str]:
    """Containers the runtime still knows. `runtime` is its command line up to the verb."""
    return [
        f"runtime state of {one}"
        for one in ids
        if subprocess.run([*runtime, "state", one], capture_output=True, check=False).returncode == 0
    ]


def until_none(find: Callable[[], list[str]], timeout: float = 5) -> list[str]:
    """Call `find` until it finds nothing (clean-up is asynchronous in both managers) or `timeout` seconds passed."""
    deadline = time.monotonic() + timeout
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
