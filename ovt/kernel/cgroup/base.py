"""What every kind of cgroup has in common: the interface the container engine programs against, and process lists.

Subclasses: V1 (also hybrid hosts), V2, Systemd (which has one of those two inside) and Disabled. A Cgroup is an
address until `create()` is called; `record()` is what the state file keeps, and `restore()` (in the package) makes the
object again from it. Nothing here remembers processes: membership is always read from the kernel.
"""

from __future__ import annotations

import posix
from errno import EACCES, EBUSY, ENODEV, ENOENT, EOPNOTSUPP, EPERM, EROFS, ESRCH

from ovt.errors import HostError, UsageError
from ovt.kernel.cgroup.files import children, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ovt.kernel.cgroup.events import Events

NOT_PERMITTED = (EACCES, EPERM, EROFS)
SIGKILL = 9


class Cgroup:
    """One container's cgroup. Every method may raise HostError; `apply` also ConfigError, `attach` UsageError."""

    __slots__ = ()

    manager = "cgroupfs"

    @property
    def mode(self) -> str:
        """`v1` (also on hybrid hosts), `v2` or `none`: the kind of files that `path_for` leads to."""
        return "none"

    def record(self) -> dict[str, Any]:
        """The JSON object for the state file; take it after `create()` and again after `attach()` and `apply()`."""
        raise NotImplementedError

    def create(self) -> None:
        """Make the cgroup in every hierarchy.

        A path that exists is used when it is empty and refused when it holds processes or is frozen. Where the caller
        may not make cgroups at all (rootless without delegation) the container stays in the caller's cgroup, and
        `apply` refuses what cannot be applied then.
        """
        raise NotImplementedError

    def fd(self, sub: str = "", init: int = 0) -> int:
        """A new O_PATH descriptor of the v2 cgroup for CLONE_INTO_CGROUP, which the caller closes; -1 where none.

        `sub` and `init` as for `attach`.
        """
        return -1

    def attach(self, pid: int, sub: str = "", init: int = 0) -> None:
        """Move process `pid` in, in all hierarchies.

        `sub` is an existing cgroup below the container's (on v1 in those hierarchies that have it, or in the named
        ones: `CONTROLLER[,CONTROLLER]:PATH`). `init` is the container's first process: where the container has put it
        in a cgroup of its own below this one and thereby closed this one to processes (v2, "no internal processes"),
        `pid` follows it there.
        """
        raise NotImplementedError

    def enter_fds(self, sub: str = "") -> list[int]:
        """Descriptors, closed by the caller, through which a process moves itself in; empty: use `attach` or `fd`.

        A single-threaded process writes `0` to each. On v1 that takes 0.2 ms where `attach` from outside waits for an
        RCU grace period (7 to 13 ms): the kernel locks out forks and exits of all processes, but not for oneself.
        """
        return []

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        """Apply the runtime-spec's `linux.resources`.

        With `update` only what is named changes. Without, device access is restricted even when `resources` does not
        mention devices: the spec's default devices and mknod are allowed, nothing else.
        """
        raise NotImplementedError

    def pids(self, recursive: bool = True) -> list[int]:
        """The processes of the cgroup, with `recursive` also of the cgroups below; in ascending order."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Stop every process and return when all of them have stopped."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Let frozen processes run on."""
        raise NotImplementedError

    def frozen(self) -> bool:
        """Whether the cgroup is frozen or freezing."""
        raise NotImplementedError

    def kill(self, signal: int = SIGKILL) -> None:
        """Send `signal` to every process, also below; SIGKILL also thaws and leaves nobody behind a fork."""
        raise NotImplementedError

    def remove(self) -> None:
        """Remove the cgroup and all below it; absent is fine. HostError names the processes that are left."""
        raise NotImplementedError

    def path_for(self, controller: str) -> str | None:
        """The directory whose files belong to `controller` (`""`: cgroup2, else where processes are), or None."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """The `data` object of `runc events --stats`."""
        from ovt.kernel.cgroup.stats import collect

        return collect(self)

    def delegate(self, uid: int, gid: int, sub: str = "") -> None:
        """Give the cgroup to `uid`:`gid` (host ids) so that the container may make cgroups of its own below (v2).

        With `sub` it is the cgroup of that name below which is made and given; `attach` the process there. Nothing is
        done on v1. See delegation.requested for when.
        """

    def events(self, timeout: float | None = None) -> Events:
        """Iterate over `{"type": "oom"}`, one for each out-of-memory kill from now on.

        Ends when the cgroup is gone or `timeout` seconds have passed; `close()` stops watching.
        """
        from ovt.kernel.cgroup.events import Events

        return Events(self, timeout)


_HINTS = {
    EACCES: "run as root, or in a delegated cgroup (systemd: Delegate=yes)",
    EPERM: "run as root, or in a delegated cgroup (systemd: Delegate=yes)",
    EROFS: "mount the cgroup file system read-write",
    ENOENT: "the cgroup was removed meanwhile, or the kernel is too old for the file: see the system's log",
    ENODEV: "the cgroup was removed meanwhile",
}


def refused(action: str, error: OSError) -> HostError:
    """The error for `action` (cannot ...) on cgroup files that the kernel refused, with what to do about it."""
    hint = _HINTS.get(error.errno or 0, "see the kernel log (dmesg)")
    return HostError(f"{action}: {error.strerror}", error.errno or 0, hint)


def walk(directory: str) -> Iterator[str]:
    """`directory` and every cgroup below it, parents first."""
    yield directory
    for child in children(directory):
        yield from walk(child)


def processes(directory: str) -> list[int]:
    """The processes of exactly this cgroup; none where it is gone."""
    try:
        text = read(directory + "/cgroup.procs")
    except OSError as error:
        # EOPNOTSUPP: a threaded cgroup, whose processes are all told by its domain above.
        if error.errno in (ENOENT, ENODEV, EOPNOTSUPP):
            return []
        raise
    # 0 stands for a process outside our pid namespace: there is no number to signal it by.
    return [pid for pid in map(int, text.split()) if pid]


def all_processes(directory: str, recursive: bool = True) -> list[int]:
    """The processes of this cgroup and, with `recursive`, of those below, ascending."""
    if not recursive:
        return sorted(processes(directory))
    return sorted({pid for path in walk(directory) for pid in processes(path)})


def signal_processes(directory: str, signal: int) -> int:
    """Signal everybody in the cgroup and below but this process itself; how many were signalled."""
    me = posix.getpid()
    count = 0
    for pid in all_processes(directory):
        if pid == me:
            continue
        try:
            posix.kill(pid, signal)
            count += 1
        except OSError as error:
            if error.errno != ESRCH:  # gone since the list was read
                raise
    return count


def remove_tree(directory: str, deadline: float = 5.0) -> None:
    """rmdir the cgroup and everything below, retrying for `deadline` seconds while the last processes exit.

    HostError names the processes that are still there, with their state: one in `D` waits inside the kernel and no
    signal reaches it.
    """
    failure = _remove_once(directory)
    if failure is None:
        return
    if failure.errno != EBUSY:
        raise refused(f"cannot remove cgroup {directory}", failure)
    from time import monotonic, sleep

    end = monotonic() + deadline
    pause = 0.001
    while (failure := _remove_once(directory)) is not None:
        if monotonic() > end:
            raise HostError(
                f"cannot remove cgroup {directory}: {failure.strerror}{_who_is_left(directory)}",
                failure.errno or 0,
                "end these processes, or reboot where one is stuck in state D, then delete the container again",
            )
        sleep(pause)
        pause = min(pause * 2, 0.1)


def remove_empty(directory: str) -> None:
    """rmdir what an interrupted creation has left: if anybody is in it, it is not ours."""
    try:
        posix.rmdir(directory)
    except OSError as error:
        if error.errno not in (ENOENT, EBUSY):
            raise refused(f"cannot remove cgroup {directory}", error) from error


def _remove_once(directory: str) -> OSError | None:
    try:
        posix.rmdir(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        failure = error
    else:
        return None
    below = children(directory)
    if not below:
        return failure
    for child in below:
        result = _remove_once(child)
        if result is not None:
            return result
    return _remove_once(directory)


def _who_is_left(directory: str) -> str:
    left = []
    for pid in all_processes(directory)[:20]:
        try:
            stat = read(f"/proc/{pid}/stat")
        except OSError:  # it ended meanwhile, so it is not what keeps the cgroup
            continue
        name, _, rest = stat[stat.index("(") + 1 :].rpartition(")")
        left.append(f"{pid} ({name}, state {rest.split()[0]})")
    return "; processes left: " + ", ".join(left) if left else ""


def refuse_used(directory: str) -> None:
    """HostError when a cgroup that was there before holds processes: limits and kill would hit strangers."""
    count = len(all_processes(directory))
    if count:
        raise HostError(
            f"container's cgroup is not empty: {count} process(es) found in {directory}",
            0,
            "choose another linux.cgroupsPath, or end the processes there",
        )


def check_sub(sub: str) -> str:
    """The cgroup `sub` of an exec, below the container's own: `/a/b` or `` for the container's cgroup itself."""
    if ".." in sub.split("/"):
        raise UsageError(
            f"`..` components are not allowed in the cgroup path `{sub}`", "name a cgroup below the container's own"
        )
    return "".join(["/" + part for part in sub.split("/") if part and part != "."])
