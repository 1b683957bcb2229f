"""What this host and this caller can do for containers, read once per command: the `Facts` of `bundle.config`."""

from __future__ import annotations

import os
import zlib
from typing import NamedTuple

from ovt.engine.container.bundle import Facts, Node
from ovt.errors import HostError, NotFound, UsageError
from ovt.kernel import capabilities, procfs
from ovt.kernel.userns import Mapping, mappings, subordinate
from ovt.model import Device

_INITS = ("/usr/libexec/podman/catatonit", "/usr/bin/catatonit", "/usr/bin/tini-static", "/usr/bin/tini", "/sbin/tini")
_CGROUP = "/sys/fs/cgroup"
_EVERY = ("/dev/ptmx", "/dev/console", "/dev/tty", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class Cgroups(NamedTuple):
    """How cgroups are made here: the runtime's manager, where containers go, and whether devices are ruled."""

    manager: str  # cgroupfs, systemd or disabled
    parent: str
    devices: bool


def rootless() -> bool:
    """Whether this process is not root of its user namespace."""
    return os.geteuid() != 0


def gather(cgroups: Cgroups, uids: tuple[Mapping, ...], gids: tuple[Mapping, ...]) -> Facts:
    """The facts for a container with these id mappings (none: the host's own ids)."""
    return Facts(
        machine=os.uname().machine,
        capabilities=tuple(_available()),
        cgroup_parent=cgroups.parent,
        device_rules=cgroups.devices and not rootless(),
        rootless=rootless(),
        uid_mappings=uids,
        gid_mappings=gids,
        init=find_init(),
        seccomp=os.path.exists("/proc/sys/kernel/seccomp"),
    )


def _available() -> list[str]:
    last = capabilities.last_cap()
    if rootless():  # a new user namespace comes with all of them
        return list(capabilities.NAMES[: last + 1])
    bits = next(line.split()[1] for line in procfs.read("/proc/self/status").splitlines() if line.startswith("CapBnd"))
    return capabilities.names_of(int(bits, 16))[: last + 1]


def find_init() -> str:
    """A static init to run as the first process; empty when the host has none."""
    return next((path for path in _INITS if os.access(path, os.X_OK)), "")


def find_cgroups(run: str) -> Cgroups:
    """The manager that works for this caller; a cgroup of its own for each directory `run` of run-time state, so that
    one host's leftovers are never taken for another's."""
    version = cgroup_version()
    if version == "none":
        return Cgroups("disabled", "", False)
    if not rootless():
        probe = _CGROUP if version == "v2" else next((p for p in _controllers() if os.access(p, os.W_OK)), "")
        if probe and os.access(probe, os.W_OK) and not _read_only(probe):
            return Cgroups(
                "cgroupfs",
                f"/ovt-{zlib.crc32(run.encode()):08x}",
                version == "v2" or os.path.isdir(f"{_CGROUP}/devices"),
            )
        return Cgroups("disabled", "", False)
    bus = f"{os.environ.get('XDG_RUNTIME_DIR', '')}/bus"
    if version == "v2" and os.path.exists("/run/systemd/system") and os.path.exists(bus):
        return Cgroups("systemd", "user.slice:ovt", False)
    return Cgroups("disabled", "", False)


def cgroup_version() -> str:
    """`v2` for the unified hierarchy, `hybrid` for v1 with a v2 tree beside it, `v1`, or `none`."""
    if os.path.exists(f"{_CGROUP}/cgroup.controllers"):
        return "v2"
    if not _controllers():
        return "none"
    return "hybrid" if os.path.exists(f"{_CGROUP}/unified/cgroup.controllers") else "v1"


def _controllers() -> list[str]:
    names = ("memory", "pids", "cpu", "cpu,cpuacct", "freezer", "devices")
    return [f"{_CGROUP}/{name}" for name in names if os.path.exists(f"{_CGROUP}/{name}/cgroup.procs")]


def _read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def own_mappings() -> tuple[tuple[Mapping, ...], tuple[Mapping, ...]]:
    """The user and group ids a caller who is not root may map; HostError when it may map none but its own."""
    import pwd

    uid, gid = os.geteuid(), os.getegid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    users, groups = subordinate("/etc/subuid", name, uid), subordinate("/etc/subgid", name, uid)
    if not users or not groups:
        missing = "/etc/subuid" if not users else "/etc/subgid"
        raise HostError(
            f"{missing} grants {name} no ids, and a container needs more than one",
            hint=f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
        )
    return mappings(uid, users), mappings(gid, groups)


def nodes(devices: tuple[Device, ...], privileged: bool) -> list[Node]:
    """The device nodes to show: those asked for, and for a privileged container all of the host's /dev."""
    result = {}
    if privileged and not rootless():
        for directory, _, files in os.walk("/dev"):
            if directory.startswith(("/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/hugepages")):
                continue
            for name in files:
                path = f"{directory}/{name}"
                if path not in _EVERY and not os.path.islink(path) and (node := _node(path, path, "rwm")):
                    result[path] = node
    for device in devices:
        found = _node(device.source, device.target, device.permissions)
        if found is None:
            raise UsageError(f"{device.source} is not a device", "ls -l /dev")
        result[device.target] = found
    return list(result.values())


def _node(path: str, target: str, permissions: str) -> Node | None:
    import stat

    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise NotFound(f"there is no device {path}", "ls -l /dev") from None
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    if not kind:
        return None
    number = info.st_rdev
    mode = stat.S_IMODE(info.st_mode)
    return Node(target, kind, os.major(number), os.minor(number), mode, info.st_uid, info.st_gid, permissions)
