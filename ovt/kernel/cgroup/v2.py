"""A container's cgroup in the unified hierarchy (cgroup v2), by plain files.

Also what a hybrid host's `unified` mount is used through. Not here: what limits mean (limits_v2), device programs
(devices, ebpf), systemd.
"""

from __future__ import annotations

import posix
from errno import EBUSY, EINVAL, ENOENT, EOPNOTSUPP, ESRCH

from ovt.errors import HostError
from ovt.kernel.cgroup.base import (
    NOT_PERMITTED,
    SIGKILL,
    Cgroup,
    all_processes,
    check_sub,
    refuse_used,
    refused,
    remove_empty,
    remove_tree,
    signal_processes,
)
from ovt.kernel.cgroup.files import exists, make_directories, read, read_or, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.kernel.cgroup.knobs import Knob

_FREEZE_SECONDS = 10.0


class V2(Cgroup):
    """`directory` below the cgroup2 mount `mount`.

    `made` becomes true with `create()`; `kept` says that the directory was there before and is not ours to remove;
    `denied` is why there is no cgroup at all for this container, else empty.
    """

    __slots__ = ("mount", "directory", "made", "kept", "denied")

    def __init__(self, mount: str, path: str) -> None:
        self.mount = mount
        self.directory = mount + path
        self.made = False
        self.kept = path == ""
        self.denied = ""

    @property
    def mode(self) -> str:
        return "v2"

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "manager": self.manager,
            "mode": self.mode,
            "mount": self.mount,
            "paths": {} if self.denied else {"unified": self.directory},
            "made": self.made,
        }
        if self.kept:
            record["kept"] = True
        if self.denied:
            record["denied"] = self.denied
        return record

    @classmethod
    def restored(cls, record: dict[str, Any]) -> V2:
        """The object that gave `record`."""
        mount = record["mount"]
        group = cls(mount, record["paths"].get("unified", mount)[len(mount) :])
        group.made = record["made"]
        group.kept = record.get("kept", False)
        group.denied = record.get("denied", "")
        return group

    def create(self) -> None:
        try:
            fresh = make_directories(self.directory, self.mount)
        except OSError as error:
            if error.errno not in NOT_PERMITTED:
                raise HostError(
                    f"cannot make cgroup {self.directory}: {error.strerror}",
                    error.errno or 0,
                    f"check that a cgroup2 file system is mounted on {self.mount}",
                ) from error
            self.denied = f"cannot make cgroup {self.directory}: {error.strerror}"
            return
        if not fresh:
            self.kept = True
            refuse_used(self.directory)
            if self.frozen():
                raise HostError(f"container's cgroup unexpectedly frozen: {self.directory}", 0, _thaw_hint(self))
        self.made = True
        self.enable()

    def adopt(self) -> None:
        """Take over a cgroup that systemd has made, whatever is in it, and make those below that are missing."""
        try:
            make_directories(self.directory, self.mount)
        except OSError as error:
            raise refused(f"cannot make cgroup {self.directory}", error) from error
        self.made = True

    def enable(self) -> None:
        """Turn on, from the mount down, every controller that can be; those that cannot are reported by `apply`."""
        available = read_or(self.mount + "/cgroup.controllers")
        if read_or(self.directory + "/cgroup.controllers") == available:
            return
        for at in self._ancestors():
            enabled = read_or(at + "/cgroup.subtree_control").split()
            missing = [name for name in read_or(at + "/cgroup.controllers").split() if name not in enabled]
            try:
                # All in one write: in a cgroup with processes this fails as a whole, while cpu or pids alone would
                # succeed there and make everything below it a threaded subtree, where no container can be.
                if missing:
                    write(at + "/cgroup.subtree_control", " ".join(["+" + name for name in missing]))
            except OSError as error:
                if error.errno not in (EINVAL, ENOENT):
                    return
                for name in missing:  # one of them is refused (cpu: there are real-time processes), not all
                    _enable_one(at, name)

    def _ancestors(self) -> list[str]:
        """The mount and every cgroup between it and ours."""
        ancestors, at = [], self.mount
        for part in self.directory[len(self.mount) :].split("/")[1:]:
            ancestors.append(at)
            at += "/" + part
        return ancestors

    def open_controller(self, controller: str) -> tuple[str, OSError] | None:
        """Turn on one controller for our cgroup; the ancestor and the error that stop it."""
        for at in self._ancestors():
            error = _enable_one(at, controller)
            if error:
                return at, error
        return None

    def fd(self, sub: str = "", init: int = 0) -> int:
        if self.denied:
            return -1
        return posix.open(self._target(sub, init), posix.O_DIRECTORY | posix.O_CLOEXEC | 0o10000000)

    def _target(self, sub: str, init: int) -> str:
        target = self.directory + check_sub(sub)
        # With controllers given to its children a cgroup takes no process itself: follow the container's init.
        if init and not sub and read_or(target + "/cgroup.subtree_control").strip():
            return self._cgroup_of(init) or target
        return target

    def _cgroup_of(self, pid: int) -> str | None:
        from ovt.kernel.cgroup.hierarchy import current, parse_own

        own = parse_own(read_or(f"/proc/{pid}/cgroup")).get("")
        if own is None:
            return None
        root = current().roots.get(self.mount, "/").rstrip("/")
        path = self.mount + (own[len(root) :] if own.startswith(root + "/") else own)
        return path if path.startswith(self.directory + "/") else None

    def attach(self, pid: int, sub: str = "", init: int = 0) -> None:
        if self.denied:
            return
        target = self._target(sub, init)
        try:
            write(target + "/cgroup.procs", str(pid))
        except OSError as error:
            if error.errno == EOPNOTSUPP and read_or(target + "/cgroup.type").startswith("domain invalid"):
                # Below a threaded cgroup every cgroup has to become threaded before it takes anybody.
                write(target + "/cgroup.type", "threaded")
                write(target + "/cgroup.procs", str(pid))
                return
            raise self._attach_error(pid, target, error) from error

    def _attach_error(self, pid: int, target: str, error: OSError) -> HostError:
        reason, hint = error.strerror, ""
        if error.errno == EBUSY:
            enabled = read_or(target + "/cgroup.subtree_control").strip()
            reason = f"it gives the controllers `{enabled}` to its children, so it may hold no process itself"
            hint = "use a cgroup below it (exec --cgroup PATH)"
        elif error.errno == ENOENT:
            hint = "the cgroup was removed, or the exec's --cgroup does not exist: make it inside the container first"
        elif error.errno == ESRCH:
            reason = "the process has ended"
        elif error.errno in NOT_PERMITTED:
            hint = "moving needs write access to cgroup.procs of the common ancestor: run inside a delegated cgroup"
        elif error.errno == EOPNOTSUPP:
            hint = "the cgroup is threaded: choose a linux.cgroupsPath below a domain cgroup"
        return HostError(f"cannot move process {pid} into cgroup {target}: {reason}", error.errno or 0, hint)

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        from ovt.kernel.cgroup.knobs import settle
        from ovt.kernel.cgroup.limits_v2 import plan

        groups = plan(resources)
        if self.denied:
            self.refuse(groups)
            return
        if update and (resources.get("memory") or {}).get("checkBeforeUpdate"):
            self._check_usage(resources["memory"])
        for group in groups:
            settle(group, self._locate)
        if not update or resources.get("devices") is not None:
            from ovt.kernel.cgroup.devices import restrict_v2

            restrict_v2(self.directory, resources.get("devices"))

    def refuse(self, groups: list[list[Knob]]) -> None:
        """HostError if any limit was asked for, as there is no cgroup to set it on."""
        for group in groups:
            for knob in group:
                if not knob.optional:
                    raise HostError(
                        f"cannot set linux.resources.{knob.key}: {self.denied}",
                        0,
                        "run as root, or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes), "
                        "or drop the limit",
                    )

    def _locate(self, knob: Knob) -> str | None:
        if "{" in knob.value:  # limits_v2.KEEP_QUOTA
            knob.value = knob.value.replace("{quota}", read_or(self.directory + "/cpu.max", "max 0").split()[0])
        if not knob.controller or exists(f"{self.directory}/{knob.file}"):
            return self.directory
        if knob.controller not in read_or(self.directory + "/cgroup.controllers").split():
            stopped = self.open_controller(knob.controller)
            if stopped:
                if knob.optional:
                    return None
                raise self._controller_error(knob, *stopped)
        return self.directory

    def _controller_error(self, knob: Knob, at: str, error: OSError) -> HostError:
        name = knob.controller
        message = f"cannot set linux.resources.{knob.key}: the requested cgroup controller `{name}` is not available"
        path = at + "/cgroup.subtree_control"
        hint = ""
        if name not in read_or(self.mount + "/cgroup.controllers").split():
            message += f" under {self.mount}"
            hint = "drop the key, or give the host this controller (it may be in use as cgroup v1)"
        elif error.errno in (EBUSY, EOPNOTSUPP):
            message += f": cannot enable it in {path}: {at} holds processes itself"
            hint = "move them into a cgroup of their own below it (the rule of `no internal processes`)"
        elif error.errno in (ENOENT, EINVAL):
            message += f": it is not delegated to {at}"
            hint = f"enable {name} in cgroup.subtree_control of the cgroups above (systemd: Delegate={name})"
        else:
            message += f": cannot enable it in {path}: {error.strerror}"
            hint = "run as root, or have the cgroup delegated (systemd: Delegate=yes)"
        return HostError(message, error.errno or 0, hint)

    def _check_usage(self, memory: dict[str, Any]) -> None:
        limit = memory.get("limit") or 0
        usage = int(read_or(self.directory + "/memory.current", "0"))
        if 0 < limit < usage:
            raise HostError(
                f"rejecting memory limit {limit} < usage {usage}",
                EBUSY,
                "choose a higher limit, or drop linux.resources.memory.checkBeforeUpdate",
            )

    def pids(self, recursive: bool = True) -> list[int]:
        return [] if self.denied else all_processes(self.directory, recursive)

    def freeze(self) -> None:
        self._freezer("1", _FREEZE_SECONDS)

    def thaw(self) -> None:
        self._freezer("0", _FREEZE_SECONDS)

    def _freezer(self, state: str, seconds: float) -> None:
        if self.denied:
            raise HostError(f"cannot pause or resume: {self.denied}", 0, "run as root or in a delegated cgroup")
        try:
            write(self.directory + "/cgroup.freeze", state)
        except OSError as error:
            raise HostError(
                f"cannot write {self.directory}/cgroup.freeze: {error.strerror}",
                error.errno or 0,
                "pausing needs Linux 5.2 and a cgroup of the container's own",
            ) from error
        path = self.directory + "/cgroup.events"
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            from select import POLLERR, POLLPRI, poll
            from time import monotonic

            wanted = b"frozen " + state.encode()
            end = monotonic() + seconds
            poller = poll()
            poller.register(fd, POLLPRI | POLLERR)
            while wanted not in posix.pread(fd, 4096, 0):
                if monotonic() > end:
                    raise HostError(
                        f"cgroup {self.directory} did not become {wanted.decode()} in {seconds:.0f} s",
                        EBUSY,
                        "a process sleeps in the kernel (state D): try again when it has woken",
                    )
                poller.poll(100)
        except HostError:
            if state == "1":
                write(self.directory + "/cgroup.freeze", "0")
            raise
        finally:
            posix.close(fd)

    def frozen(self) -> bool:
        return not self.denied and read_or(self.directory + "/cgroup.freeze").startswith("1")

    def kill(self, signal: int = SIGKILL) -> None:
        if self.denied or not self.made:
            return
        if signal == SIGKILL:
            try:
                write(self.directory + "/cgroup.kill", "1")
                if self.frozen():  # the dying leave a frozen cgroup, but whoever comes next must not freeze
                    write(self.directory + "/cgroup.freeze", "0")
                return
            except OSError as error:
                if error.errno not in (ENOENT, EOPNOTSUPP):  # Linux < 5.14, or threaded
                    raise refused(f"cannot write {self.directory}/cgroup.kill", error) from error
        if not exists(self.directory):
            return
        was_frozen = self.frozen()
        if not was_frozen:
            self.freeze()  # nobody forks while the list is read
        try:
            signal_processes(self.directory, signal)
        finally:
            if not was_frozen or signal == SIGKILL:
                self.thaw()

    def remove(self) -> None:
        if self.denied or self.kept:
            return
        if not self.made:
            remove_empty(self.directory)
            return
        remove_tree(self.directory)

    def path_for(self, controller: str) -> str | None:
        return None if self.denied else self.directory

    def delegate(self, uid: int, gid: int, sub: str = "") -> None:
        if self.denied:
            return
        directory = self.directory + check_sub(sub)
        files = read_or("/sys/kernel/cgroup/delegate", "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n")
        try:
            make_directories(directory, self.directory)
            posix.chown(directory, uid, gid)
            for name in files.split():
                try:
                    posix.chown(f"{directory}/{name}", uid, gid)
                except FileNotFoundError:  # listed for all kernels' sake; this cgroup may lack the controller
                    continue
        except OSError as error:
            raise HostError(
                f"cannot give cgroup {directory} to {uid}:{gid}: {error.strerror}",
                error.errno or 0,
                "only root may give a cgroup away",
            ) from error


def _enable_one(at: str, controller: str) -> OSError | None:
    """Write `+controller` to cgroup.subtree_control of `at` where it is not in yet; the error of a refusal."""
    path = at + "/cgroup.subtree_control"
    try:
        if controller in read(path).split():
            return None
        # See enable(): cpu and pids must not turn a cgroup with processes into the root of a threaded subtree.
        # The root of the hierarchy, which may have both, has no cgroup.type.
        if read_or(at + "/cgroup.type").startswith("domain\n") and read_or(at + "/cgroup.procs"):
            return OSError(EBUSY, posix.strerror(EBUSY), path)
        write(path, "+" + controller)
    except OSError as error:
        return error
    return None


def _thaw_hint(group: V2) -> str:
    return f"thaw it (echo 0 > {group.directory}/cgroup.freeze), or choose another linux.cgroupsPath"
