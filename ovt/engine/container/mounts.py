"""One mount of a container: prepared as a detached tree, then attached by descriptor below the rootfs.

`open_sources` runs before the builder joins the container's namespaces, so that host paths are opened with the host's
eyes and rights; `attach` runs inside. Only the mount API of Linux 5.2 and 5.12 is used: a mount gets all its
attributes while it is detached, so it is never visible half made, and there is no remount pass.
"""

from __future__ import annotations

import posix
from errno import EBUSY, ENOENT, ENOTDIR, EPERM

from ovt.errors import HostError, OvtError, refused
from ovt.kernel import syscalls as sc

from . import mount_options, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    UserNamespaceFor = Callable[["Mount"], int]
    """Gives the descriptor of a user namespace with the mappings an id-mapped mount asks for."""

_MS_REC_SLAVE = (sc.MS_SLAVE, True)
_RESTRICTIONS = sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC


class Mount:
    """A mount of the configuration on its way to its place."""

    __slots__ = (
        "source",
        "destination",
        "type",
        "options",
        "tree",
        "inside_errno",
        "is_directory",
        "link",
        "path",
        "config",
        "userns",
    )

    def __init__(self, config: dict[str, Any], path: str) -> None:
        self.config = config
        self.path = path  # JSON path, for messages
        self.source: str = config.get("source") or ""
        self.destination: str = config["destination"]
        self.options = mount_options.parse(config.get("options") or [], f"{path}.options")
        self.type: str = config.get("type") or ""
        if self.type in ("bind", "rbind"):
            self.options.recursive |= self.type == "rbind" or not self.options.bind
            self.options.bind = True
        self.tree = -1
        self.inside_errno = 0  # procfs only: why the container's process could not mount it
        self.is_directory = True
        self.userns = -1  # of a new filesystem to be id-mapped
        self.link: str | None = None  # copy-symlink: the text of the link to make

    def failed(self, error: OSError, doing: str = "mount") -> OvtError:
        """`error` told with the mount it belongs to."""
        what = f"{self.source or self.type} to {self.destination}"
        hint = ""
        if error.errno == EPERM and self.type in ("sysfs", "mqueue", "proc"):
            hint = f"a new {self.type} needs the container to own the namespace it shows"
        return refused(f"{doing} {what}", error, hint)


def open_sources(mounts: list[Mount], bundle: str, host_propagation: bool, userns_for: UserNamespaceFor) -> None:
    """Clone the sources of all bind mounts from the caller's mount namespace, detached and with their attributes."""
    for mount in mounts:
        if mount.options.remount:
            continue
        try:
            if mount.options.bind:
                _open_source(mount, bundle, host_propagation, userns_for)
            elif mount.options.idmap or mount.config.get("uidMappings"):
                # a bare `idmap` asks for the container's mappings, with which its own filesystems are born
                mount.userns = userns_for(mount)
        except OSError as error:
            raise mount.failed(error) from None


def _open_source(mount: Mount, bundle: str, host_propagation: bool, userns_for: UserNamespaceFor) -> None:
    source = mount.source if mount.source.startswith("/") else f"{bundle}/{mount.source}"
    options = mount.options
    if options.copy_symlink and posix.lstat(source).st_mode & 0o170000 == 0o120000:
        mount.link = posix.readlink(source)
        return
    flags = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC
    flags |= sc.AT_RECURSIVE if options.recursive else 0
    flags |= sc.AT_SYMLINK_NOFOLLOW if options.source_nofollow else 0
    mount.tree = sc.open_tree(sc.AT_FDCWD, source, flags)
    mount.is_directory = paths.is_directory(mount.tree)
    # the clone is in the peer group of its source: without this, what the container mounts appears on the host
    propagation = options.propagation if host_propagation else [_MS_REC_SLAVE, *options.propagation]
    _set_attributes(mount.tree, options)
    if options.idmap is not None or mount.config.get("uidMappings"):
        fd = userns_for(mount)
        try:
            sc.mount_setattr(
                mount.tree,
                set_=sc.MOUNT_ATTR_IDMAP,
                userns_fd=fd,
                recursive=options.idmap_recursive or (options.recursive and options.idmap is None),
            )
        finally:
            posix.close(fd)
    for flag, recursive in propagation:
        sc.mount_setattr(mount.tree, propagation=flag, recursive=recursive)


def _set_attributes(fd: int, options: mount_options.Options) -> None:
    if options.set or options.clear:
        sc.mount_setattr(fd, options.set, options.clear)
    if options.rec_set or options.rec_clear:
        sc.mount_setattr(fd, options.rec_set, options.rec_clear, recursive=True)


def new_filesystem(
    fstype: str,
    source: str,
    data: list[str],
    attributes: int = 0,
    label: tuple[str, str] | None = None,
    errors: bool = True,
) -> int:
    """A detached mount of a new filesystem instance; OSError carries the kernel's own words in its filename."""
    context = sc.fsopen(fstype)
    try:
        if source:
            sc.fsconfig_string(context, "source", source)
        if label:
            sc.fsconfig_string(context, *label)
        for word in data:
            key, equals, value = word.partition("=")
            if not key:
                continue
            if equals:
                sc.fsconfig_string(context, key, value)
            else:
                sc.fsconfig_flag(context, key)
        sc.fsconfig_create(context)
        return sc.fsmount(context, attributes)
    except OSError as error:
        if errors and (words := _kernel_words(context)):
            raise OSError(error.errno, posix.strerror(error.errno or 0), words) from None
        raise
    finally:
        posix.close(context)


def _kernel_words(context: int) -> str:
    """What the filesystem said about the failure: reading the context gives lines such as `e tmpfs: Bad value`."""
    try:
        return posix.read(context, 1024).decode("utf-8", "replace").strip()[2:]
    except OSError:
        return ""


def attach(mount: Mount, root: int, label: tuple[str, str] | None = None) -> int:
    """Put the mount in its place below `root`; the descriptor of the mount's root is returned."""
    try:
        return _attach(mount, root, label)
    except OSError as error:
        failure = mount.failed(error)
        if error.filename and error.filename not in (mount.source, mount.destination):
            failure.message = f"{failure.message}: {error.filename}"
        raise failure from None


def _attach(mount: Mount, root: int, label: tuple[str, str] | None) -> int:
    options = mount.options
    if mount.link is not None:
        return _make_link(mount, root)
    if options.remount:
        fd = paths.resolve(root, mount.destination)
        _set_attributes(fd, options)
        return fd
    if options.tmpcopyup and not paths.parts(mount.destination):
        raise HostError("tmpcopyup on / has nothing to copy from")
    target = _target(mount, root)
    _refuse_procfs(mount, target)
    if mount.tree < 0:
        mount.tree = _new(mount, label, posix.fstat(target).st_mode & 0o7777)
    elif mount.type == "proc" and not options.bind:
        _set_attributes(mount.tree, options)
    try:
        if options.tmpcopyup and mount.type == "tmpfs":
            from .copyup import copy_up

            copy_up(target, mount.tree, {word.partition("=")[0] for word in options.data})
            _set_attributes(mount.tree, options)
        if mount.userns >= 0:
            sc.mount_setattr(mount.tree, sc.MOUNT_ATTR_IDMAP, userns_fd=mount.userns)
        sc.move_mount(mount.tree, target)
    finally:
        posix.close(target)
    if not options.bind:
        for flag, recursive in options.propagation:
            sc.mount_setattr(mount.tree, propagation=flag, recursive=recursive)
    return mount.tree


def _new(mount: Mount, label: tuple[str, str] | None, mode: int) -> int:
    """The detached tree of a filesystem mount; falls back to the host's where the kernel keeps it from us."""
    options = mount.options
    superblock = [word for word in options.data if not _is_attribute_data(word)]
    words = mount.config.get("options") or []
    superblock += [word for word in words if mount_options.is_superblock_flag(word)]
    if mount.type == "tmpfs" and not any(word.startswith("mode=") for word in superblock):
        superblock.append(f"mode={mode:o}")  # that of the directory it hides
    late = options.tmpcopyup and mount.type == "tmpfs"
    if mount.type == "proc":
        # the kernel shows a procfs only to the owner of the pid namespace: what the host mounted is passed on
        return _host_tree("/proc", options) if mount.inside_errno in (EPERM, EBUSY) else _refused(mount)
    source = (
        mount.source if mount.type not in ("proc", "sysfs", "tmpfs", "devpts", "mqueue") else mount.source or "none"
    )
    try:
        tree = new_filesystem(
            mount.type, source, superblock, label=label if mount.type in ("tmpfs", "mqueue") else None
        )
    except OSError as error:
        if error.errno in (EPERM, EBUSY) and mount.type in ("sysfs", "mqueue"):
            # the same for the network and the ipc namespace
            return _host_tree("/sys" if mount.type == "sysfs" else "/dev/mqueue", options)
        raise
    if not late:
        _set_attributes(tree, options)
    return tree


def _host_tree(path: str, options: mount_options.Options) -> int:
    tree = sc.open_tree(sc.AT_FDCWD, path, sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | sc.AT_RECURSIVE)
    sc.mount_setattr(tree, propagation=sc.MS_SLAVE, recursive=True)
    _set_attributes(tree, options)
    # also what is mounted below: a read-only /sys must not hold a writable /sys/fs/cgroup (CVE-2023-25809)
    sc.mount_setattr(tree, options.set & _RESTRICTIONS, recursive=True)
    return tree


def _refused(mount: Mount) -> int:
    raise OSError(mount.inside_errno, posix.strerror(mount.inside_errno))


def _is_attribute_data(word: str) -> bool:
    return word.startswith(("idmap", "ridmap"))


# what LXCFS and the like provide their own version of
_PROC_FILES = frozenset(
    {"cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev"}
    | {"sys/kernel/ns_last_pid", "sys/crypto/fips_enabled", "sys/kernel/hostname"}
)


def _refuse_procfs(mount: Mount, target: int) -> None:
    """Nothing may cover parts of a procfs: what is written to it would go elsewhere (CVE-2019-16884)."""
    components = paths.parts(mount.destination)
    if sc.fstatfs_type(target) != sc.PROC_SUPER_MAGIC or mount.type == "proc" or len(components) < 2:
        return
    if "/".join(components[1:]) in _PROC_FILES:
        return
    if mount.tree >= 0 and sc.fstatfs_type(mount.tree) == sc.PROC_SUPER_MAGIC:
        return  # a part of the host's own procfs
    posix.close(target)
    raise HostError(f"{mount.destination} cannot be mounted because it is inside /proc")


def _target(mount: Mount, root: int) -> int:
    """Open the destination below `root`, making it where it is missing."""
    destination = mount.destination
    if mount.type in ("proc", "sysfs"):
        # a link here would send masks and labels elsewhere (CVE-2019-19921, 2023-27561)
        try:
            return paths.resolve(root, destination, paths.O_PATH | posix.O_DIRECTORY, sc.RESOLVE_NO_SYMLINKS)
        except OSError as error:
            if error.errno != ENOENT:
                raise HostError(
                    f'filesystem "{mount.type}" must be mounted on ordinary directory, and {destination} is none',
                    ENOTDIR,
                ) from None
    if mount.options.destination_nofollow:
        components = paths.parts(destination)
        parent = paths.make_directory(root, "/".join(components[:-1]))
        try:
            return posix.open(components[-1], paths.O_PATH | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            pass
        finally:
            posix.close(parent)
    return (paths.make_directory if mount.is_directory else paths.make_file)(root, destination)


def _make_link(mount: Mount, root: int) -> int:
    components = paths.parts(mount.destination)
    parent = paths.make_directory(root, "/".join(components[:-1]))
    try:
        posix.symlink(mount.link or "", components[-1], dir_fd=parent)
    except FileExistsError:
        if posix.readlink(components[-1], dir_fd=parent) != mount.link:
            raise
    return parent
