"""The file `plain` of a container's state: that `start` and `delete` of it need no Python, but only ovt/launcher.c.

Whatever makes lifecycle.start or lifecycle.delete do more than launcher.c can must keep `create` from writing it.
"""

from __future__ import annotations

import posix

from .state import PLAIN, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LONGEST = 8000  # bytes; launcher.c has room for a little more


def mark(state: State, process: dict[str, Any]) -> None:
    """Write the file if there is a program to execute and no hook around it.

    It holds "PID STARTED" and the directories of the cgroups, each ended by a NUL, when these and the state directory
    are all that `delete` has to remove; else it is empty.
    """
    hooks = state.record["hooks"]
    if not process.get("args") or hooks.get("startContainer") or hooks.get("poststart"):
        return
    new = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC
    fd = posix.open(f"{state.path}/{PLAIN}", new, 0o600)
    try:
        posix.write(fd, _removal(state.record))
    finally:
        posix.close(fd)


def forget(state: State) -> None:
    """Remove it, before something that launcher.c does not look for: a frozen program would never take the byte."""
    try:
        posix.unlink(f"{state.path}/{PLAIN}")
    except FileNotFoundError:
        pass  # it never was, or this is not the first time


def _removal(record: dict[str, Any]) -> bytes:
    cgroup = record["cgroup"] or {"manager": "cgroupfs", "made": True, "paths": {}}
    if record["hooks"].get("poststop") or record.get("netDevices") or record.get("intelRdt"):
        return b""
    if cgroup["manager"] != "cgroupfs" or not cgroup["made"]:
        return b""
    if cgroup.get("kept") or cgroup.get("denied"):
        return b""
    beside = "".join(cgroup.get("beside") or [])  # of cgroup2 on a hybrid host; made only when something needs it
    directories = [*cgroup["paths"].values(), *([beside] if beside else [])]
    # a hierarchy of several controllers is named several times
    words = [f"{record['pid']} {record['pid_start']}", *dict.fromkeys(directories)]
    text = "".join(f"{word}\0" for word in words).encode("utf-8", "surrogateescape")
    return text if len(text) < _LONGEST else b""
