"""A container's cgroups in the hierarchies of cgroup v1, by plain files; on hybrid hosts also what v2 alone holds.

One directory per hierarchy. A hybrid host's cgroup2 mount is joined only when a resource needs a controller that lives
there (hugetlb, say): `beside` tells where that cgroup is, made on first use. Not here: what limits mean
(limits_v1), device rules (devices), systemd.
"""

from __future__ import annotations

import posix
from errno import EBUSY, EINVAL, ENODEV, ENOENT, ESRCH

from ovt.errors import HostError, UsageError
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
    from ovt.kernel.cgroup.v2 import V2

_FREEZE_SECONDS = 10.0
# Hierarchies in which a container's processes stay in one place are asked first for the list of them.
_LIST_BY = ("pids", "devices", "freezer", "memory", "name=systemd")


class V1(Cgroup):
    """`paths`: controller to directory, `mounts`: controller to mount point, `beside`: cgroup2 mount, path below it.

    `made` becomes true with `create()`; `kept` lists directories that were there before and are not ours to remove;
    `denied` maps the controllers without a cgroup for this container to the reason.
    """

    __slots__ = ("paths", "mounts", "beside", "made", "kept", "denied")

    def __init__(self, mounts: dict[str, str], paths: dict[str, str], beside: tuple[str, str] | None = None) -> None:
        self.mounts = mounts
        self.paths = paths
        self.beside = beside
        self.made = False
        self.kept: list[str] = []
        self.denied: dict[str, str] = {}

    @property
    def mode(self) -> str:
        return "v1"

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "manager": self.manager,
            "mode": self.mode,
            "paths": self.paths,
            "mounts": {name: self.mounts[name] for name in self.paths},
            "made": self.made,
        }
        if self.kept:
            record["kept"] = self.kept
        if self.denied:
            record["denied"] = self.denied
        if self.beside:
            record["beside"] = list(self.beside)
        return record

    @classmethod
    def restored(cls, record: dict[str, Any]) -> V1:
        """The object that gave `record`."""
        mount, path = record.get("beside") or ("", "")
        group = cls(record["mounts"], record["paths"], (mount, path) if mount else None)
        group.made = record["made"]
        group.kept = record.get("kept", [])
        group.denied = record.get("denied", {})
        return group

    def _directories(self) -> list[str]:
        """Each directory once: controllers mounted together share theirs."""
        return list(dict.fromkeys(self.paths.values()))

    def create(self) -> None:
        self._make()
        if self.kept:
            for directory in self.kept:
                refuse_used(directory)
            if self.frozen():
                raise HostError(
                    f"container's cgroup unexpectedly frozen: {self.paths['freezer']}",
                    0,
                    f"thaw it (echo THAWED > {self._state()}), or choose another linux.cgroupsPath",
                )
        self.made = True

    def adopt(self) -> None:
        """Take over the cgroups that systemd has made, whatever is in them, and make those it has not."""
        self._make()
        self.kept.clear()
        self.made = True

    def _make(self) -> None:
        mount_of = {directory: self.mounts[name] for name, directory in self.paths.items()}
        for directory, mount in mount_of.items():
            try:
                fresh = make_directories(directory, mount)
            except OSError as error:
                if error.errno not in NOT_PERMITTED:
                    raise HostError(
                        f"cannot make cgroup {directory}: {error.strerror}",
                        error.errno or 0,
                        f"check that a cgroup file system is mounted on {mount}",
                    ) from error
                for name in [name for name, path in self.paths.items() if path == directory]:
                    del self.paths[name]
                    self.denied[name] = f"cannot make cgroup {directory}: {error.strerror}"
                continue
            if not fresh:
                self.kept.append(directory)
        if "cpuset" in self.paths:
            _inherit_cpuset(self.paths["cpuset"], self.mounts["cpuset"])

    def attach(self, pid: int, sub: str = "", init: int = 0) -> None:
        for directory in self._targets(sub):
            try:
                write(directory + "/cgroup.procs", str(pid))
            except OSError as error:
                raise _attach_error(pid, directory, error) from error
        if beside := self._joined():
            beside.attach(pid, init=init)

    def _joined(self) -> V2 | None:
        """The cgroup in the cgroup2 mount of a hybrid host, if a resource has needed it."""
        if self.beside is None or not exists("".join(self.beside)):
            return None
        return self._beside()

    def _beside(self) -> V2:
        from ovt.kernel.cgroup.v2 import V2

        assert self.beside is not None
        return V2(*self.beside)

    def enter_fds(self, sub: str = "") -> list[int]:
        if self._joined():
            return []
        descriptors: list[int] = []
        try:
            for directory in self._targets(sub):
                # `tasks` moves one thread, and then needs no lock over the thread group; cgroup.procs would.
                descriptors.append(posix.open(directory + "/tasks", posix.O_WRONLY | posix.O_CLOEXEC))
        except OSError as error:
            for fd in descriptors:
                posix.close(fd)
            raise refused(f"cannot open {error.filename}", error) from error
        return descriptors

    def _targets(self, sub: str) -> list[str]:
        if not sub:
            return self._directories()
        names, colon, path = sub.rpartition(":")
        path = check_sub(path)
        chosen = names.split(",") if colon else list(self.paths)
        for name in chosen:
            if name not in self.paths:
                raise UsageError(
                    f"unknown cgroup controller `{name}` in --cgroup {sub}", f"choose from: {', '.join(self.paths)}"
                )
        below = {directory: exists(directory + path) for directory in [self.paths[name] for name in chosen]}
        if not any(below.values()):
            raise UsageError(
                f"no such cgroup `{sub}` below the container's own", "make the cgroup inside the container first"
            )
        return [directory + path if below.get(directory) else directory for directory in self._directories()]

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        from ovt.kernel.cgroup.knobs import settle
        from ovt.kernel.cgroup.limits_v1 import plan

        if update and (resources.get("memory") or {}).get("checkBeforeUpdate"):
            self._check_usage(resources["memory"])
        here, there = self._split(resources)
        for group in plan(here):
            settle(group, self._locate)
        if there:
            self._apply_beside(there)
        if "devices" in self.paths and (not update or resources.get("devices") is not None):
            from ovt.kernel.cgroup.devices import restrict_v1

            restrict_v1(self.paths["devices"], resources.get("devices"))

    def _split(self, resources: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What v1 files take, and what only the cgroup2 mount of a hybrid host can."""
        raw = resources.get("unified")
        if raw and not self.beside:
            raise HostError(
                "invalid configuration: cannot use unified on cgroup v1 ($.linux.resources.unified)",
                EINVAL,
                "use the keys of linux.resources (memory, cpu, pids ...), or boot with cgroup v2 only",
            )
        there = {"unified": raw} if raw else {}
        if self.beside:
            for key, controller in (("hugepageLimits", "hugetlb"), ("rdma", "rdma")):
                if resources.get(key) and controller not in self.paths and controller not in self.denied:
                    there[key] = resources[key]
        return {key: value for key, value in resources.items() if key not in there}, there

    def _apply_beside(self, resources: dict[str, Any]) -> None:
        beside = self._joined()
        if beside is None:
            beside = self._beside()
            beside.create()
            for pid in self.pids():
                beside.attach(pid)
        beside.apply(resources, update=True)

    def _locate(self, knob: Knob) -> str | None:
        directory = self.paths.get(knob.controller)
        if directory is not None:
            return directory
        if knob.optional:
            return None
        reason = self.denied.get(knob.controller)
        if reason:
            hint = "run as root, or drop the limit: cgroup v1 cannot be delegated to users"
            raise HostError(f"cannot set linux.resources.{knob.key}: {reason}", 0, hint)
        raise HostError(
            f"cannot set linux.resources.{knob.key}: the requested cgroup controller `{knob.controller}` "
            "is not available: no mounted hierarchy has it",
            ENODEV,
            "drop the key from config.json, or mount that controller (kernel parameter cgroup_enable=)",
        )

    def _check_usage(self, memory: dict[str, Any]) -> None:
        limit = memory.get("limit") or 0
        usage = int(read_or(f"{self.paths.get('memory', '')}/memory.usage_in_bytes", "0"))
        if 0 < limit < usage:
            raise HostError(
                f"rejecting memory limit {limit} < usage {usage}",
                EBUSY,
                "choose a higher limit, or drop linux.resources.memory.checkBeforeUpdate",
            )

    def pids(self, recursive: bool = True) -> list[int]:
        directory = self.path_for("")
        return all_processes(directory, recursive) if directory else []

    def path_for(self, controller: str) -> str | None:
        if controller:
            return self.paths.get(controller)
        for name in _LIST_BY:
            if name in self.paths:
                return self.paths[name]
        return next(iter(self.paths.values()), None)

    def _state(self) -> str:
        return self.paths["freezer"] + "/freezer.state"

    def _need_freezer(self) -> None:
        if "freezer" not in self.paths:
            reason = self.denied.get("freezer", "no mounted hierarchy has the freezer controller")
            raise HostError(f"cannot pause or resume: {reason}", ENODEV, "mount the freezer hierarchy of cgroup v1")

    def freeze(self) -> None:
        self._need_freezer()
        path = self._state()
        try:
            write(path, "FROZEN")
            if read(path) == "FROZEN\n":
                return
            from time import monotonic, sleep

            end = monotonic() + _FREEZE_SECONDS
            pause, tries = 0.0002, 0
            while (state := read(path)) != "FROZEN\n":
                if monotonic() > end:
                    write(path, "THAWED")
                    raise HostError(
                        f"unable to freeze {self.paths['freezer']} in {_FREEZE_SECONDS:.0f} s (state {state.strip()})",
                        EBUSY,
                        "a process sleeps in the kernel (state D): try again when it has woken",
                    )
                tries += 1
                if tries % 20 == 0:
                    # The v1 freezer can hang half way when processes of the cgroup wait for one another in the
                    # kernel (vfork, ptrace); thawed for a moment they pass that point.
                    write(path, "THAWED")
                    sleep(0.001)
                write(path, "FROZEN")  # also catches those who joined or forked since
                sleep(pause)
                pause = min(pause * 2, 0.01)
        except OSError as error:
            raise refused(f"cannot freeze {self.paths['freezer']}", error) from error

    def thaw(self) -> None:
        self._need_freezer()
        try:
            write(self._state(), "THAWED")
        except OSError as error:
            raise refused(f"cannot thaw {self.paths['freezer']}", error) from error

    def frozen(self) -> bool:
        return "freezer" in self.paths and read_or(self._state(), "THAWED").strip() != "THAWED"

    def kill(self, signal: int = SIGKILL) -> None:
        directory = self.path_for("")
        if not directory or not self.made or not all_processes(directory):
            return
        was_frozen = self.frozen()
        can_freeze = "freezer" in self.paths
        if can_freeze and not was_frozen:
            try:
                self.freeze()  # nobody forks while the list is read
            except HostError:
                if signal != SIGKILL:
                    raise
                can_freeze = False  # kill what can be killed; the rounds below catch those who fork
        try:
            signal_processes(directory, signal)
        finally:
            if can_freeze and (not was_frozen or signal == SIGKILL):
                self.thaw()  # a frozen process dies of its SIGKILL only when thawed
        if signal == SIGKILL and not can_freeze:
            for _ in range(100):
                if not signal_processes(directory, signal):
                    return

    def remove(self) -> None:
        for directory in self._directories():
            if directory not in self.kept:
                (remove_tree if self.made else remove_empty)(directory)
        if self.made and (beside := self._joined()):
            remove_tree(beside.directory)


def _attach_error(pid: int, directory: str, error: OSError) -> HostError:
    reason, hint = error.strerror, ""
    if error.errno == ENOENT:
        hint = "the cgroup was removed while the container was made"
    elif error.errno == ESRCH:
        reason = "the process has ended"
    elif error.errno == EINVAL:
        hint = "a real-time process needs linux.resources.cpu.realtimeRuntime in this hierarchy"
    return HostError(f"cannot move process {pid} into cgroup {directory}: {reason}", error.errno or 0, hint)


def _inherit_cpuset(directory: str, mount: str) -> None:
    """Give an empty cpuset its parent's CPUs and memory nodes: v1 takes no process without, and inherits nothing."""
    for name in ("/cpuset.cpus", "/cpuset.mems"):
        try:
            _inherit(directory, mount, name)
        except OSError as error:
            raise refused(f"cannot set {error.filename}", error) from error


def _inherit(directory: str, mount: str, name: str) -> str:
    value = read(directory + name).strip()
    if value or directory == mount:
        return value
    value = _inherit(directory[: directory.rindex("/")], mount, name)
    write(directory + name, value)
    return value
