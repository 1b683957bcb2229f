"""The configuration that `ovt-runtime spec` writes: a shell in a private container, for a person to edit.

The same in substance as what other runtimes write, because people and scripts edit it by the names they know. What
`ovt run` gives a container is not here but in `bundle.py`.
"""

import posix

from ovt.engine.container.state import OCI_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")


def spec(rootless: bool = False) -> "dict[str, Any]":
    """A new configuration; `rootless`: for the calling user's own ids, in a user namespace and without limits."""
    namespaces = ["pid", "network", "ipc", "uts", "mount"]
    if _unified():
        namespaces.append("cgroup")
    linux: dict[str, Any] = {}
    if rootless:
        namespaces.remove("network")
        namespaces.append("user")
        linux["uidMappings"] = [{"containerID": 0, "hostID": posix.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": posix.getegid(), "size": 1}]
    else:
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    linux["namespaces"] = [{"type": kind} for kind in namespaces]
    linux["maskedPaths"] = [
        "/proc/acpi",
        "/proc/asound",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/sys/firmware",
        "/proc/scsi",
    ]
    linux["readonlyPaths"] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
    return {
        "ociVersion": OCI_VERSION,
        "process": _process(),
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "ovt",
        "mounts": _mounts(rootless),
        "linux": linux,
    }


def _process() -> "dict[str, Any]":
    return {
        "terminal": True,
        "user": {"uid": 0, "gid": 0},
        "args": ["sh"],
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {name: list(_CAPABILITIES) for name in ("bounding", "effective", "permitted")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    }


def _mounts(rootless: bool) -> "list[dict[str, Any]]":
    confined = ["nosuid", "noexec", "nodev"]
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    if rootless:
        terminals.pop()  # group 5 is not mapped
        # a sysfs of one's own needs a network namespace of one's own
        sysfs = _mount("/sys", "none", "/sys", ["rbind", *confined, "ro"])
    else:
        sysfs = _mount("/sys", "sysfs", "sysfs", [*confined, "ro"])
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount("/dev/pts", "devpts", "devpts", terminals),
        _mount("/dev/shm", "tmpfs", "shm", [*confined, "mode=1777", "size=65536k"]),
        _mount("/dev/mqueue", "mqueue", "mqueue", confined),
        sysfs,
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*confined, "relatime", "ro"]),
    ]


def _mount(destination: str, kind: str, source: str, options: list[str]) -> "dict[str, Any]":
    return {"destination": destination, "type": kind, "source": source, "options": options}


def _unified() -> bool:
    try:
        posix.stat("/sys/fs/cgroup/cgroup.controllers")
    except OSError:
        return False
    return True
