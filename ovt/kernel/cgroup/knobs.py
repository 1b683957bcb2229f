"""One write to one control file, the order writes go in, and the error when the kernel refuses one. No policy.

What to write is planned by `limits_v1` and `limits_v2` as lists of Knob; here the plan meets the kernel.
"""

from __future__ import annotations

import posix
from errno import EACCES, EBUSY, EINVAL, ENODEV, ENOENT, EOPNOTSUPP, EPERM, EROFS

from ovt.errors import HostError
from ovt.kernel.cgroup.files import read_or, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Knob:
    """Write `value` to `file` for the configuration's `key` (below linux.resources).

    `other` is the file and value for a kernel that lacks `file`; `optional` says that the value is what holds anyway
    where both are missing (no limit, no burst).
    """

    __slots__ = ("controller", "file", "value", "key", "optional", "other")

    def __init__(
        self,
        controller: str,
        file: str,
        value: str,
        key: str,
        optional: bool = False,
        other: tuple[str, str] | None = None,
    ) -> None:
        self.controller = controller
        self.file = file
        self.value = value
        self.key = key
        self.optional = optional
        self.other = other

    def __repr__(self) -> str:
        return f"Knob({self.file} = {self.value!r}, {self.key}{', optional' if self.optional else ''})"


def settle(group: list[Knob], locate: Callable[[Knob], str | None]) -> None:
    """Write all knobs of a group whose values bound one another, in whatever order the kernel takes them.

    memory.limit <= memory.memsw.limit, burst <= quota, quota/period within the parent's: which of two goes first
    depends on the values in force. Instead of reading those, a write refused with EINVAL is tried again after the
    others, as long as each round gets something done. `locate` gives a knob's directory, or None to leave it out.
    """
    pending = group
    while pending:
        refused: list[tuple[Knob, str, OSError]] = []
        for knob in pending:
            directory = locate(knob)
            if directory is None:
                continue
            try:
                write_knob(knob, directory)
            except OSError as error:
                if error.errno != EINVAL or len(group) == 1:
                    raise explain(knob, directory, error) from error
                refused.append((knob, directory, error))
        if len(refused) == len(pending):
            raise explain(*refused[0])
        pending = [knob for knob, _, _ in refused]


def write_knob(knob: Knob, directory: str) -> None:
    """Write one knob below `directory`; each line of the value is a command of its own (io.max takes one device)."""
    for name, value in ((knob.file, knob.value), *((knob.other,) if knob.other else ())):
        path = f"{directory}/{name}"
        try:
            for line in value.split("\n"):
                if line:
                    write(path, line)
            return
        except FileNotFoundError:
            continue
        except PermissionError:
            # open(O_WRONLY) in a cgroup directory of one's own says EACCES for a name that does not exist at all.
            if not _missing(path):
                raise
    if not knob.optional:
        raise FileNotFoundError(ENOENT, posix.strerror(ENOENT), f"{directory}/{knob.file}")


def _missing(path: str) -> bool:
    try:
        posix.stat(path)
    except FileNotFoundError:
        return True
    return False


_HINTS = {
    ENOENT: "this kernel does not offer the file: drop the key from config.json, or enable the feature in the kernel",
    EINVAL: "the kernel takes no such value here: check range and unit, and the limits of the parent cgroup",
    EBUSY: "the cgroup uses more than this at the moment: choose a higher value, or let it shrink first",
    ENODEV: "no such block device (or it has no I/O scheduler that knows this): check major and minor",
    EOPNOTSUPP: "this kernel no longer supports the setting: drop the key from config.json",
    EACCES: "the file belongs to another user: delegate the cgroup, or drop the key from config.json",
    EPERM: "the parent cgroup forbids it: ask for less, or widen the parent",
    EROFS: "the cgroup file system is mounted read-only here: mount it read-write, or drop the key from config.json",
}


def explain(knob: Knob, directory: str, error: OSError) -> HostError:
    """The error for a knob the kernel refused: file, value, configuration key and what to do."""
    path = error.filename if isinstance(error.filename, str) else f"{directory}/{knob.file}"
    detail = ""
    if error.errno == EBUSY and knob.controller == "memory":
        usage = read_or(f"{directory}/memory.usage_in_bytes") or read_or(f"{directory}/memory.current")
        peak = read_or(f"{directory}/memory.max_usage_in_bytes") or read_or(f"{directory}/memory.peak")
        detail = f" (current usage: {usage.strip()}, peak usage: {peak.strip()})"
    shown = knob.value if len(knob.value) <= 80 else knob.value[:77] + "..."
    return HostError(
        f"cannot set linux.resources.{knob.key} to `{shown}`: write to {path}: {error.strerror}{detail}",
        error.errno or 0,
        _HINTS.get(error.errno or 0, "see the kernel log (dmesg) and the limits of the parent cgroup"),
    )
