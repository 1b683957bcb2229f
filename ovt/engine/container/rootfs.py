"""The root filesystem of a container: everything between an empty mount namespace and pivot_root.

Two halves. `Rootfs(...)` runs in the caller's namespaces: it opens and clones what comes from the host. `build` and
`finish` run in the builder, a process that has joined the container's namespaces but keeps the host's root until the
very last call: all work is done below the descriptor of the new root, so no name the builder looks up for itself
can be answered by the container (CVE-2019-14271).
"""

from __future__ import annotations

import posix
from errno import EINVAL, ENOENT, ENOTDIR

from ovt.errors import ConfigError, HostError, OvtError, refused
from ovt.kernel import syscalls as sc

from . import devices, mounts, paths
from .state import in_user_namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PROPAGATION = {
    "shared": (sc.MS_SHARED, False),
    "rshared": (sc.MS_SHARED, True),
    "slave": (sc.MS_SLAVE, False),
    "rslave": (sc.MS_SLAVE, True),
    "private": (sc.MS_PRIVATE, False),
    "rprivate": (sc.MS_PRIVATE, True),
    "unbindable": (sc.MS_UNBINDABLE, False),
    "runbindable": (sc.MS_UNBINDABLE, True),
}
_CLONE = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC


class Rootfs:
    """What will become the container's root, first as detached trees."""

    def __init__(
        self,
        config: dict[str, Any],
        bundle: str,
        path: str,
        *,
        user_namespace: bool,
        userns_for: mounts.UserNamespaceFor,
        overlay: dict[str, Any] | None = None,
    ) -> None:
        linux = config.get("linux") or {}
        self.config = config
        self.linux = linux
        self.path = path
        self.user_namespace = user_namespace
        self._bundle = bundle
        self._userns_for = userns_for
        self._overlay = overlay
        self.mounts = [mounts.Mount(entry, f"$.mounts[{i}]") for i, entry in enumerate(config.get("mounts") or [])]
        self.dev_is_bound = any(m.options.bind and paths.parts(m.destination) == ["dev"] for m in self.mounts)
        self.devices = [] if self.dev_is_bound else devices.wanted(config)
        self.host_nodes: dict[str, int] | None = None
        self.late_propagation: tuple[int, bool] | None = None
        self.tree = self.null = self._empty = -1
        self._null_attached = False

    def open(self) -> None:
        """Open and clone what comes from the host.

        Root does this in its own namespaces, with the host's eyes. A normal user may clone mounts only where he is
        root, in the container's mount namespace, whose copy of the host's tree is the same then.
        """
        propagation: str = self.linux.get("rootfsPropagation") or ""
        shared = "shared" in propagation
        # a shared root cannot be pivoted to, an unbindable one not be cloned: these come last
        late = shared or "unbindable" in propagation
        self.late_propagation = _PROPAGATION[propagation] if late else None
        self.tree = _overlay_tree(self._overlay) if self._overlay else _clone_root(self.path)
        sc.mount_setattr(self.tree, propagation=sc.MS_SLAVE, recursive=True)
        if propagation and not late:
            flag, recursive = _PROPAGATION[propagation]
            sc.mount_setattr(self.tree, propagation=flag, recursive=recursive)
        mounts.open_sources(self.mounts, self._bundle, shared, self._userns_for)
        if self.user_namespace or in_user_namespace():
            self.host_nodes = devices.nodes_for_user_namespace(self.devices, self.linux)
        self.null = _open_null()

    def descriptors(self) -> list[int]:
        """Everything this object holds open, for the caller to close once the builder is done."""
        fds = [self.tree, self.null, *(self.host_nodes or {}).values()]
        for mount in self.mounts:
            fds += [mount.tree, mount.userns]
        return [fd for fd in fds if fd >= 0]

    def _label(self) -> tuple[str, str] | None:
        """(mount option, SELinux label) for new filesystems; None where the host has no SELinux."""
        if not self.linux.get("mountLabel"):
            return None
        from ovt.kernel import lsm

        return lsm.mount_context(self.linux, self.config.get("annotations") or {})

    def proc_mounts(self) -> list[mounts.Mount]:
        """The procfs mounts: the container's own process must make them, they show its pid namespace."""
        return [mount for mount in self.mounts if mount.type == "proc" and not mount.options.bind]

    def build(self, place: int, cgroup: dict[str, Any] | None) -> None:
        """Attach the root on the directory `place` and fill it. The caller has joined the container's namespaces.

        Hooks find it under its own path, with everything mounted, as the runtime-spec has it for createContainer.
        """
        host_root = posix.open("/", paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        sc.mount_setattr(host_root, propagation=sc.MS_SLAVE, recursive=True)
        posix.close(host_root)
        if self.tree < 0:
            self.open()
        sc.move_mount(self.tree, place)
        posix.close(place)
        posix.umask(0)
        label = self._label()
        for mount in self.mounts:
            if mount.type in ("cgroup", "cgroup2") and not mount.options.bind:
                from . import cgroup_mount

                cgroup_mount.attach(mount, self.tree, cgroup, self.config)
                continue
            fd = mounts.attach(mount, self.tree, label)
            posix.close(fd)
        if not self.dev_is_bound:
            devices.make(self.tree, self.devices, self.host_nodes)
            devices.make_links(self.tree)

    def finish(self, pivot: bool) -> None:
        """After the hooks: sysctls, masked and read-only paths, a read-only root; then make it the root."""
        for key, value in (self.linux.get("sysctl") or {}).items():
            _sysctl(key, value)
        for path in self.linux.get("readonlyPaths") or []:
            self._read_only(path)
        for path in self.linux.get("maskedPaths") or []:
            self._mask(path)
        if (self.config.get("root") or {}).get("readonly"):
            sc.mount_setattr(self.tree, sc.MOUNT_ATTR_RDONLY)
        posix.fchdir(self.tree)
        if not pivot:
            # over the old root, where the container's process steps onto it by chroot
            host_root = posix.open("/", paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
            sc.move_mount(self.tree, host_root)
            posix.close(host_root)
        else:
            # new root and put_old are the same directory: the old root ends up on top of the new one and is taken off
            sc.pivot_root(".", ".")
            sc.umount2(".", sc.MNT_DETACH)
        if self.late_propagation:
            flag, recursive = self.late_propagation
            sc.mount_setattr(self.tree, propagation=flag, recursive=recursive)
        posix.chdir("/")

    def _read_only(self, path: str) -> None:
        try:
            fd = paths.resolve(self.tree, path)
        except OSError as error:
            if error.errno in (ENOENT, ENOTDIR):
                return
            raise
        try:
            tree = sc.open_tree(fd, "", _CLONE | sc.AT_EMPTY_PATH | sc.AT_RECURSIVE)
            sc.mount_setattr(tree, sc.MOUNT_ATTR_RDONLY, recursive=True)
            sc.move_mount(tree, fd)
            posix.close(tree)
        except OSError as error:
            raise refused(f"make {path} read-only", error) from None
        finally:
            posix.close(fd)

    def _mask(self, path: str) -> None:
        try:
            fd = paths.resolve(self.tree, path)
        except OSError as error:
            if error.errno in (ENOENT, ENOTDIR):
                return
            raise
        try:
            if paths.is_directory(fd):
                # one empty read-only tmpfs serves all masked directories: Kubernetes masks one for each CPU
                if self._empty < 0:
                    self._empty = mounts.new_filesystem(
                        "tmpfs",
                        "tmpfs",
                        ["size=0k", "nr_inodes=2", "mode=555"],
                        sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC,
                        label=self._label(),
                    )
                    sc.move_mount(self._empty, fd)
                    return
                tree = sc.open_tree(self._empty, "", _CLONE | sc.AT_EMPTY_PATH)
            elif not self._null_attached:
                self._null_attached = True
                sc.move_mount(self.null, fd)
                return
            else:
                tree = sc.open_tree(self.null, "", _CLONE | sc.AT_EMPTY_PATH)
            sc.move_mount(tree, fd)
            posix.close(tree)
        except OSError as error:
            raise refused(f"mask {path}", error) from None
        finally:
            posix.close(fd)


def _clone_root(path: str) -> int:
    try:
        tree = sc.open_tree(sc.AT_FDCWD, path, _CLONE | sc.AT_RECURSIVE)
    except FileNotFoundError:
        raise ConfigError("$.root.path", f"{path}: no such file or directory") from None
    except OSError as error:
        hint = ""
        if error.errno == EINVAL:
            hint = "the mount that holds it is unbindable"
        raise refused(f"open the rootfs {path}", error, hint) from None
    if not paths.is_directory(tree):
        posix.close(tree)
        raise ConfigError("$.root.path", f"{path}: not a directory")
    return tree


def _overlay_tree(overlay: dict[str, Any]) -> int:
    """An overlay that only this container sees: {"lower": [dir, …], "upper": dir, "work": dir}."""
    data = [f"lowerdir={':'.join(_escaped(lower) for lower in overlay['lower'])}"]
    data += [f"upperdir={overlay['upper']}", f"workdir={overlay['work']}", *overlay.get("options", [])]
    try:
        return mounts.new_filesystem("overlay", "overlay", data)
    except OSError as error:
        words = error.filename or posix.strerror(error.errno or 0)
        raise HostError(f"mount the overlay of {overlay['upper']}: {words}", error.errno or 0) from None


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:")


def _open_null() -> int:
    """A detached clone of the host's /dev/null, proven to be it (CVE-2025-31133)."""
    tree = sc.open_tree(sc.AT_FDCWD, "/dev/null", _CLONE)
    status = posix.fstat(tree)
    if status.st_mode & 0o170000 != 0o020000 or status.st_rdev != posix.makedev(1, 3):
        raise HostError("/dev/null of the host is not the null device")
    sc.mount_setattr(tree, propagation=sc.MS_PRIVATE)
    return tree


def _sysctl(key: str, value: str) -> None:
    """Write a sysctl, by a path that cannot leave the host's own procfs (CVE-2019-16884, 2025-52881)."""
    from .sysctl import file_of  # the path that was checked is the path that is written

    path = file_of(key)
    try:
        proc = posix.open("/proc", paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        if sc.fstatfs_type(proc) != sc.PROC_SUPER_MAGIC:
            raise HostError("/proc of the host is not a procfs")
        strict = sc.RESOLVE_BENEATH | sc.RESOLVE_NO_XDEV | sc.RESOLVE_NO_SYMLINKS | sc.RESOLVE_NO_MAGICLINKS
        fd = sc.openat2(proc, f"sys/{path}", posix.O_WRONLY, 0, strict)
        posix.close(proc)
        try:
            posix.write(fd, value.encode())
        finally:
            posix.close(fd)
    except OSError as error:
        raise _sysctl_failed(key, value, error) from None


def _sysctl_failed(key: str, value: str, error: OSError) -> OvtError:
    hint = f"this kernel has no sysctl {key}" if error.errno == ENOENT else ""
    return refused(f"write sysctl {key} = {value!r}", error, hint)
