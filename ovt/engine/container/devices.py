"""/dev inside a container: the default devices, those of the configuration, links, ptmx and the console.

Everything is made below the descriptor of the container's /dev, found by openat2(RESOLVE_IN_ROOT): an image that
ships /dev or an entry of it as a link gets nothing created or opened elsewhere (CVE-2025-52565, 2026-41579).
"""

from __future__ import annotations

import posix
from errno import EEXIST, EPERM

from ovt.errors import HostError, refused
from ovt.kernel import syscalls as sc

from . import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TYPES = {"c": 0o020000, "u": 0o020000, "b": 0o060000, "p": 0o010000}
_S_IFMT = 0o170000

DEFAULT = [
    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666},
    {"path": "/dev/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666},
    {"path": "/dev/full", "type": "c", "major": 1, "minor": 7, "fileMode": 0o666},
    {"path": "/dev/random", "type": "c", "major": 1, "minor": 8, "fileMode": 0o666},
    {"path": "/dev/urandom", "type": "c", "major": 1, "minor": 9, "fileMode": 0o666},
    {"path": "/dev/tty", "type": "c", "major": 5, "minor": 0, "fileMode": 0o666},
]
_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
)


def wanted(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The devices to make: the configuration's own, and the defaults that it does not name itself."""
    own: list[dict[str, Any]] = (config.get("linux") or {}).get("devices") or []
    named = {"/" + "/".join(paths.parts(device["path"])) for device in own}
    return [device for device in DEFAULT if device["path"] not in named] + own


def nodes_for_user_namespace(devices: list[dict[str, Any]], linux: dict[str, Any]) -> dict[str, int]:
    """Detached mounts of device nodes, by path: in a user namespace mknod(2) makes nodes that cannot be opened.

    Root makes fresh nodes in a tmpfs that nobody else sees, with owner and mode as configured; where that is not
    allowed (rootless, or a kernel before 6.15, which does not clone from a detached mount) the host's own are used.
    """
    wanted = [device for device in devices if device["type"] != "p"]
    try:
        return _fresh_nodes(wanted, linux)
    except OSError:
        return {device["path"]: _host_node(device["path"]) for device in wanted}


def _fresh_nodes(devices: list[dict[str, Any]], linux: dict[str, Any]) -> dict[str, int]:
    from .mounts import new_filesystem

    tree = new_filesystem("tmpfs", "tmpfs", ["mode=700"], errors=False)
    nodes: dict[str, int] = {}
    umask = posix.umask(0)
    try:
        for number, device in enumerate(devices):
            name = str(number)
            owner = {
                **device,
                "uid": host_id(device.get("uid") or 0, linux.get("uidMappings")),
                "gid": host_id(device.get("gid") or 0, linux.get("gidMappings")),
            }
            _make_node(tree, name, owner)
            node = sc.open_tree(tree, name, sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC)
            sc.mount_setattr(node, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
            nodes[device["path"]] = node
    except OSError:
        for node in nodes.values():
            posix.close(node)
        raise
    finally:
        posix.umask(umask)
        posix.close(tree)
    return nodes


def _host_node(path: str) -> int:
    try:
        node = sc.open_tree(sc.AT_FDCWD, path, sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC)
    except OSError as error:
        raise refused(f"device {path}", error, "in a user namespace a device must exist on the host") from None
    sc.mount_setattr(node, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC, propagation=sc.MS_PRIVATE)
    return node


def host_id(number: int, maps: list[dict[str, Any]] | None) -> int:
    """What the container's user or group id `number` is on the host; itself where nothing maps it."""
    for entry in maps or []:
        if entry["containerID"] <= number < entry["containerID"] + entry["size"]:
            return int(entry["hostID"] + number - entry["containerID"])
    return number


def make(root: int, devices: list[dict[str, Any]], host_nodes: dict[str, int] | None) -> None:
    """Make `devices` below `root`: by mknod, or by attaching the clones of the host's nodes."""
    for device in devices:
        components = paths.parts(device["path"])
        if not components:
            raise HostError(f"device path {device['path']!r} names no file")
        parent = paths.make_directory(root, "/".join(components[:-1]))
        try:
            if host_nodes is not None and device["path"] in host_nodes:
                target = paths.create_file(parent, components[-1])
                sc.move_mount(host_nodes[device["path"]], target)
                posix.close(target)
            else:
                _make_node(parent, components[-1], device)
        except OSError as error:
            hint = "the host does not allow mknod here: is this a user namespace?" if error.errno == EPERM else ""
            raise refused(f"make device {device['path']}", error, hint) from None
        finally:
            posix.close(parent)


def _make_node(parent: int, name: str, device: dict[str, Any]) -> None:
    kind = _TYPES[device["type"]]
    mode = kind | device.get("fileMode", 0o666) & 0o7777
    number = posix.makedev(device.get("major") or 0, device.get("minor") or 0) if kind != 0o010000 else 0
    try:
        posix.mknod(name, mode, number, dir_fd=parent)
    except FileExistsError:
        status = posix.stat(name, dir_fd=parent, follow_symlinks=False)
        if status.st_mode & _S_IFMT != kind or status.st_rdev != number:
            raise OSError(EEXIST, "something else is in its place") from None
        return
    posix.chown(name, device.get("uid") or 0, device.get("gid") or 0, dir_fd=parent, follow_symlinks=False)


def make_links(root: int) -> None:
    """/dev/fd, stdin, stdout, stderr, core and ptmx, where the image has nothing of that name."""
    dev = paths.make_directory(root, "dev")
    try:
        links = [*_LINKS, ("ptmx", "pts/ptmx")]
        try:
            posix.stat("/proc/kcore")
            links.append(("core", "/proc/kcore"))
        except OSError:
            pass
        for name, target in links:
            try:
                posix.symlink(target, name, dir_fd=dev)
            except FileExistsError:
                if name == "ptmx" and paths.exists(dev, "pts/ptmx"):
                    # a host's own ptmx node would hand out terminals of the host's devpts
                    posix.unlink(name, dir_fd=dev)
                    posix.symlink(target, name, dir_fd=dev)
    finally:
        posix.close(dev)


def make_console(root: int, slave: int) -> None:
    """Attach the terminal `slave`, by descriptor, to /dev/console."""
    dev = paths.make_directory(root, "dev")
    try:
        target = paths.create_file(dev, "console", 0o600)
        tree = sc.open_tree(slave, "", sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | sc.AT_EMPTY_PATH)
        sc.move_mount(tree, target)
        posix.close(tree)
        posix.close(target)
    finally:
        posix.close(dev)
