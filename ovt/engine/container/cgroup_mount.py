"""A mount of type `cgroup` (or `cgroup2`): the container's view of its own control groups.

With a cgroup namespace of its own the container gets a fresh mount, whose root is its cgroup; without one it gets
its own cgroup by bind mount and nothing of the host's tree (CVE-2022-47952). v1 gives a directory with one mount for
each hierarchy, v2 a single mount.
"""

from __future__ import annotations

import posix
from errno import EBUSY, EINVAL, EPERM

from ovt.errors import HostError
from ovt.kernel import syscalls as sc

from . import mounts, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CLONE = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC


def attach(mount: mounts.Mount, root: int, record: dict[str, Any] | None, config: dict[str, Any]) -> None:
    """Put the cgroup mount(s) in place below `root`; `record` is what the state keeps about the cgroup."""
    from ovt.kernel.cgroup.hierarchy import current

    own_namespace = any(entry["type"] == "cgroup" for entry in (config.get("linux") or {}).get("namespaces") or [])
    try:
        if (record is not None and record["mode"] == "v2") or (not record and current().mode == "v2"):
            _unified(mount, root, record, own_namespace)
        else:
            _v1(mount, root, record, own_namespace)
    except OSError as error:
        raise mount.failed(error) from None


def _attributes(mount: mounts.Mount, record: dict[str, Any] | None) -> int:
    # without a cgroup of its own the container sees the caller's, which it must not change (CVE-2023-25809)
    return mount.options.set | (0 if record and record.get("paths") else sc.MOUNT_ATTR_RDONLY)


def _unified(mount: mounts.Mount, root: int, record: dict[str, Any] | None, own_namespace: bool) -> None:
    tree = -1
    if own_namespace:
        try:
            tree = mounts.new_filesystem("cgroup2", "cgroup", [], _attributes(mount, record), errors=False)
        except OSError as error:
            if error.errno not in (EPERM, EBUSY):
                raise
    if tree < 0:
        directory = (record or {}).get("paths", {}).get("unified") or "/sys/fs/cgroup"
        tree = _bind(directory, _attributes(mount, record))
    _place(tree, root, mount.destination)


def _v1(mount: mounts.Mount, root: int, record: dict[str, Any] | None, own_namespace: bool) -> None:
    """A small tmpfs with a directory for each hierarchy, and links for the names of those mounted together."""
    top = mounts.new_filesystem("tmpfs", "cgroup", ["mode=755", "size=0k", "nr_inodes=128"], errors=False)
    attributes = _attributes(mount, record)
    sc.mount_setattr(top, attributes & ~sc.MOUNT_ATTR_RDONLY)
    _place(top, root, mount.destination, close=False)
    for directory, names in _hierarchies(record).items():
        tree = -1
        if own_namespace:
            try:
                tree = _fresh(names, attributes)
            except OSError as error:
                if error.errno not in (EPERM, EBUSY, EINVAL):
                    raise
        if tree < 0:
            tree = _bind(directory, attributes)
        folder = ",".join(name.removeprefix("name=") for name in names)
        posix.mkdir(folder, 0o755, dir_fd=top)
        _place(tree, top, folder)
        if len(names) > 1:
            for name in names:
                posix.symlink(folder, name, dir_fd=top)
    if attributes & sc.MOUNT_ATTR_RDONLY:
        sc.mount_setattr(top, sc.MOUNT_ATTR_RDONLY)
    posix.close(top)


def _hierarchies(record: dict[str, Any] | None) -> dict[str, list[str]]:
    """The container's directory in each hierarchy, with the controllers mounted together there."""
    from ovt.kernel.cgroup.hierarchy import current

    paths_ = (record or {}).get("paths") or {}
    if not paths_:
        here = current()
        paths_ = {name: point + here.own_directory(name) for name, point in here.v1.items()}
    out: dict[str, list[str]] = {}
    for name, directory in paths_.items():
        out.setdefault(directory, []).append(name)
    return out


def _fresh(names: list[str], attributes: int) -> int:
    data = list(names)
    if any(name.startswith("name=") for name in names):
        data.insert(0, "none")
    return mounts.new_filesystem("cgroup", "cgroup", data, attributes, errors=False)


def _bind(directory: str, attributes: int) -> int:
    try:
        tree = sc.open_tree(sc.AT_FDCWD, directory, _CLONE)
    except FileNotFoundError:
        raise HostError(f"mount the cgroup {directory}: it does not exist") from None
    sc.mount_setattr(tree, attributes, propagation=sc.MS_SLAVE)
    return tree


def _place(tree: int, root: int, destination: str, close: bool = True) -> None:
    target = paths.make_directory(root, destination)
    try:
        sc.move_mount(tree, target)
    finally:
        posix.close(target)
    if close:
        posix.close(tree)
