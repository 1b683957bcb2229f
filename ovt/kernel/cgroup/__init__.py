"""Control groups: a container's place in the cgroup hierarchies, its limits, its process list and its freezer.

    new(linux.cgroupsPath, id, manager)  ->  Cgroup        restore(record)  ->  the same one, from the state file
    base       the interface, lists of processes           hierarchy  what is mounted where
    v1, v2     by plain files                              systemd, dbus  by asking systemd for a scope
    limits_*   linux.resources as planned writes           knobs  the writes, their order and errors
    devices    device rules; ebpf: as a program for v2     stats, events  numbers and out-of-memory kills

Where the container goes (`cgroups_path`):

    /a/b       below the mount, for every hierarchy
    a/b        below the caller's own cgroup on v1; beside it on v2, where a cgroup with processes has no children
    (empty)    root: /ovt/ID;  other users: ovt-ID as a relative path
    s:p:n      manager systemd: scope p-n.scope in slice s (empty: user.slice or system.slice, ovt, ID)

`..` never leaves the mount. Not here: cgroup namespaces and the mount of /sys/fs/cgroup inside the container.
"""

from __future__ import annotations

import posix

from ovt.errors import HostError, UsageError
from ovt.kernel.cgroup.base import Cgroup
from ovt.kernel.cgroup.files import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.kernel.cgroup.hierarchy import Hierarchies

__all__ = ["MANAGERS", "Cgroup", "new", "restore"]

MANAGERS = ("cgroupfs", "systemd", "disabled")

# Hierarchies without a controller are somebody's own bookkeeping, but for systemd's: tools look there for containers.
_NAMED = "name=systemd"


def new(
    cgroups_path: str,
    container_id: str,
    manager: str = "cgroupfs",
    *,
    systemd_annotations: dict[str, str] | None = None,
    mounts: Hierarchies | None = None,
) -> Cgroup:
    """The cgroup of a container to be; nothing is touched yet.

    `cgroups_path` is linux.cgroupsPath, `manager` one of MANAGERS, `systemd_annotations` the configuration's
    annotations (those of `org.systemd.property.` and `run.oci.systemd.` are read), `mounts` the hierarchies to use
    instead of this machine's. Raises UsageError for an unknown manager or a path that does not fit it, HostError where
    no cgroup file system is mounted.
    """
    if "\0" in cgroups_path:
        raise UsageError("linux.cgroupsPath holds a NUL byte", "use a path such as /ovt/web")
    if manager not in MANAGERS:
        raise UsageError(f"unknown cgroup manager `{manager}`", f"choose one of: {', '.join(MANAGERS)}")
    if manager == "disabled":
        from ovt.kernel.cgroup.disabled import Disabled

        return Disabled()
    if mounts is None:
        from ovt.kernel.cgroup.hierarchy import current

        mounts = current()
    if manager == "cgroupfs":
        return _by_files(cgroups_path, container_id, mounts)
    from ovt.kernel.cgroup.systemd import Systemd

    return Systemd.new(cgroups_path, container_id, systemd_annotations or {}, mounts)


def restore(record: dict[str, Any]) -> Cgroup:
    """The Cgroup whose `record()` this is."""
    if record["manager"] == "systemd":
        from ovt.kernel.cgroup.systemd import Systemd

        return Systemd.restored(record)
    if record["manager"] == "disabled":
        from ovt.kernel.cgroup.disabled import Disabled

        return Disabled()
    # Either, never both: `restore` runs in every command of the runtime, and an import costs 0.2 to 0.4 ms.
    if record["mode"] == "v2":
        from ovt.kernel.cgroup.v2 import V2

        return V2.restored(record)
    from ovt.kernel.cgroup.v1 import V1

    return V1.restored(record)


def _by_files(cgroups_path: str, container_id: str, mounts: Hierarchies) -> Cgroup:
    mode = mounts.mode
    if not cgroups_path:
        cgroups_path = f"/ovt/{container_id}" if posix.geteuid() == 0 else f"ovt-{container_id}"
    absolute = cgroups_path.startswith("/")
    path = clean(cgroups_path)
    if mode == "v2":
        from ovt.kernel.cgroup.v2 import V2

        assert mounts.unified is not None
        return V2(mounts.unified, path if absolute else _beside_own(mounts) + path)
    if mode == "none":
        raise HostError(
            "no cgroup file system is mounted", 0, "mount one on /sys/fs/cgroup, or use --cgroup-manager disabled"
        )
    chosen = {name: mount for name, mount in mounts.v1.items() if not name.startswith("name=") or name == _NAMED}
    paths = {name: mount + (path if absolute else mounts.own_directory(name) + path) for name, mount in chosen.items()}
    beside = None
    if mounts.unified:
        beside = (mounts.unified, path if absolute else _beside_own(mounts) + path)
    from ovt.kernel.cgroup.v1 import V1

    return V1(chosen, paths, beside)


def _beside_own(mounts: Hierarchies) -> str:
    return mounts.own_directory("").rpartition("/")[0]
