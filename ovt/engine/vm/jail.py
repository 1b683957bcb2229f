"""The container that QEMU runs in: its OCI configuration, a pure function, and the descriptors that go with it.

QEMU gets a root of its own that nobody can write to, with the host's programs and libraries and nothing else: no
image, no log, no socket has a path in there, all come as descriptors. Its user is one that owns nothing on the host,
its namespaces are its own (the network too unless it is to use the host's connections itself), its capabilities are
none, and system calls are filtered twice: by the container's profile here and by QEMU's own -sandbox.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ovt.engine.container import seccomp_default
from ovt.engine.container.bundle import MASKED_PATHS, OCI_VERSION, READONLY_PATHS, Facts
from ovt.errors import HostError

_FIRST_UID = 0x20000000  # above what people, services and subordinate ranges use
_UIDS = 0x0FFFFFFF
_PIDS = 4096  # threads: vCPUs, block workers, io_uring
_OVERHEAD = 512 << 20  # bytes of QEMU's own, beside the guest's memory: devices, block caches, translated code
# What QEMU needs beyond a container's profile: asynchronous files, post-copy migration, NUMA placement.
_SYSCALLS = (
    "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "mbind", "set_mempolicy", "get_mempolicy",
    "migrate_pages", "move_pages",
)  # fmt: skip
_LIBRARIES = ("/usr", "/lib", "/lib64", "/lib32", "/libx32", "/bin", "/sbin")
_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/alternatives")


class Node(NamedTuple):
    """A device of the host that QEMU uses by its path."""

    path: str
    major: int
    minor: int


def user_id(id: str, uid_map: str = "/proc/self/uid_map") -> int:
    """The user that the machine `id` runs as when root starts it; HostError where this process may not use so many."""
    wanted = _FIRST_UID + int(id, 16) % _UIDS
    with open(uid_map, encoding="ascii") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    if any(first <= wanted < first + count for first, _, count in ranges):
        return wanted
    first, _, count = max(ranges, key=lambda entry: entry[2])
    if count < 4096:
        raise HostError("this process may use fewer than 4096 user ids, and every machine has one of its own")
    # a container whose host gave it a range: the upper half of that
    return first + count // 2 + int(id, 16) % (count // 2)


def node(path: str) -> Node:
    """The device at `path`; OSError when it cannot be had."""
    number = os.stat(path).st_rdev
    return Node(path, os.major(number), os.minor(number))


def prepare_root(root: str) -> None:
    """Make the directory that QEMU's root is put together on: places to mount at, and the host's symbolic links."""
    for name in ("usr", "dev", "proc", "tmp", "etc", "sys"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for path in _LIBRARIES:
        target = f"{root}{path}"
        if os.path.islink(path) and not os.path.lexists(target):
            os.symlink(os.readlink(path), target)


def config(
    command: Sequence[str],
    *,
    id: str,
    root: str,
    facts: Facts,
    uid: int,
    memory: int,
    cpus: float,
    cpuset: str,
    host_network: bool,
    nodes: Sequence[Node] = (),
    mounts_of_shares: Sequence[Mapping[str, Any]] = (),
    locked_memory: bool = False,
    sysfs: bool = False,
) -> dict[str, Any]:
    """The OCI configuration. `memory` is the guest's in bytes, `mounts_of_shares` are those of
    `shares.mounts`, `cpus` limits the time of the whole (0: not), `sysfs` shows /sys (read-only) for host devices."""
    program = command[0]
    mounts = [
        _mount("proc", "/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("tmpfs", "/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64k"),
        _mount("tmpfs", "/tmp", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=16m"),
    ]
    for path in _LIBRARIES:
        if os.path.isdir(path) and not os.path.islink(path):
            mounts.append(_mount(path, path, "bind", "rbind", "ro", "nosuid", "nodev", "rprivate"))
    for path in _FILES:
        if os.path.exists(path):
            mounts.append(_mount(path, path, "bind", "rbind", "ro", "nosuid", "nodev", "noexec", "rprivate"))
    if not program.startswith("/usr/"):  # a QEMU of the owner's own, with its firmware beside it
        prefix = os.path.dirname(os.path.dirname(program))
        mounts.append(_mount(prefix, prefix, "bind", "rbind", "ro", "nosuid", "nodev", "rprivate"))
    if sysfs:
        mounts.append(_mount("/sys", "/sys", "bind", "bind", "ro", "nosuid", "nodev", "noexec", "rprivate"))
    mounts += [dict(mount) for mount in mounts_of_shares]
    files = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1] & (1 << 64) - 1)  # unlimited is -1
    rlimits = [{"type": "RLIMIT_NOFILE", "soft": files, "hard": files}]
    rlimits.append({"type": "RLIMIT_CORE", "soft": 0, "hard": 0})  # a core would be the guest's memory on the disk
    if locked_memory:
        rlimits.append({"type": "RLIMIT_MEMLOCK", "soft": (1 << 64) - 1, "hard": (1 << 64) - 1})
    namespaces = ["pid", "ipc", "uts", "mount"]
    namespaces += ["cgroup"] if facts.cgroup_parent else []
    namespaces += [] if host_network else ["network"]
    namespaces += ["user"] if facts.uid_mappings else []
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READONLY_PATHS),
    }
    if facts.seccomp:
        linux["seccomp"] = seccomp_default.profile(facts.machine, (), _SYSCALLS)
    if facts.uid_mappings:
        linux["uidMappings"] = [{"containerID": i, "hostID": h, "size": n} for i, h, n in facts.uid_mappings]
        linux["gidMappings"] = [{"containerID": i, "hostID": h, "size": n} for i, h, n in facts.gid_mappings]
    if facts.cgroup_parent:
        separator = "/" if facts.cgroup_parent.startswith("/") else ":"
        linux["cgroupsPath"] = f"{facts.cgroup_parent}{separator}{id}"
        linux["resources"] = resources(memory, cpus, cpuset)
    if nodes:
        linux["devices"] = [
            {"path": n.path, "type": "c", "major": n.major, "minor": n.minor, "fileMode": 0o666, "uid": 0, "gid": 0}
            for n in nodes
        ]
        if facts.device_rules and facts.cgroup_parent:
            allowed = [{"allow": True, "type": "c", "major": n.major, "minor": n.minor, "access": "rw"} for n in nodes]
            linux["resources"]["devices"] = [{"allow": False, "access": "rwm"}, *allowed]
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": uid},
            "args": list(command),
            "env": ["PATH=/usr/bin:/bin", "HOME=/tmp", "LC_ALL=C.UTF-8"],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": True,
            "rlimits": rlimits,
        },
        "root": {"path": root, "readonly": True},
        "hostname": "vm",
        "mounts": mounts,
        "linux": linux,
    }


def resources(memory: int, cpus: float, cpuset: str) -> dict[str, Any]:
    """The OCI `resources` of a machine: a QEMU gone wild is stopped, one that works is not."""
    result: dict[str, Any] = {
        "memory": {"limit": memory + memory // 8 + _OVERHEAD},
        "pids": {"limit": _PIDS},
    }
    cpu: dict[str, Any] = {}
    if cpus:
        cpu = {"quota": round(cpus * 100_000), "period": 100_000}
    if cpuset:
        cpu["cpus"] = cpuset
    if cpu:
        result["cpu"] = cpu
    return result


def _mount(source: str, target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}
