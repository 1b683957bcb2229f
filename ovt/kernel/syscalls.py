"""One small function per system call that Python 3.11 does not offer, and nothing else: no policy, no fall-backs.

Built on `_ctypes`, the C half of ctypes, because `import ctypes` costs 3 ms of the 20 that a container may take
and this module is on the path of every container; `posix` stands in for `os` for the same reason (1 ms).
Failures are plain OSError with errno and, where there is one, the path. Constants and structures come from the
Linux uapi headers. Everything above number 423 is the same on all architectures; older numbers are tabled.
"""

import posix
from _ctypes import CFuncPtr, _SimpleCData, dlopen, dlsym, get_errno
from _struct import pack

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
O_PATH = 0o10000000

# clone and setns flags (linux/sched.h)
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PARENT = 0x00008000
CLONE_INTO_CGROUP = 0x200000000

# mount(2) flags (linux/mount.h)
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_POSIXACL = 1 << 16
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# the mount API of Linux 5.2 and 5.12
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = posix.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 1
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

# openat2 (linux/openat2.h)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PROC_SUPER_MAGIC = 0x9FA0
SYSFS_MAGIC = 0x62656572
CGROUP2_SUPER_MAGIC = 0x63677270

PR_SET_DUMPABLE = 4

_X86_64 = posix.uname().machine == "x86_64"


class _Long(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Function(CFuncPtr):
    _flags_ = 1 | 8  # FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Long


_syscall = _Function(dlsym(dlopen(None, 2), "syscall"))  # type: ignore[arg-type]


def syscall(number: int, *args: int | bytes | None, path: str | bytes | None = None) -> int:
    """Call `number` with integers, NUL-terminated byte strings or None (a null pointer); raise OSError on failure."""
    result: int = _syscall(
        _Long(number),
        *[_Long(arg) if type(arg) is int else arg for arg in args],
    )
    if result < 0:
        errno = get_errno()
        raise OSError(errno, posix.strerror(errno), *([path] if path is not None else []))
    return result


def _path(path: str | bytes) -> bytes:
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    if b"\0" in raw:
        raise OSError(22, "path holds a NUL byte", path)
    return raw


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    syscall(
        165 if _X86_64 else 40,
        None if source is None else _path(source),
        _path(target),
        None if fstype is None else _path(fstype),
        flags,
        None if data is None else _path(data),
        path=target,
    )


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    syscall(166 if _X86_64 else 39, _path(target), flags, path=target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    syscall(155 if _X86_64 else 41, _path(new_root), _path(put_old))


def setns(fd: int, nstype: int) -> None:
    """setns(2): `fd` is a namespace or a pidfd, `nstype` a CLONE_NEW* mask."""
    syscall(308 if _X86_64 else 268, fd, nstype)


def unshare(flags: int) -> None:
    """unshare(2)."""
    syscall(272 if _X86_64 else 97, flags)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2)."""
    return syscall(157 if _X86_64 else 167, option, arg2, arg3, arg4, arg5)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """open_tree(2), Linux 5.2: a descriptor of the mount at `path`, or with OPEN_TREE_CLONE of a detached copy."""
    return syscall(428, dirfd, _path(path), flags, path=path)


def move_mount(from_fd: int, to_fd: int) -> None:
    """move_mount(2), Linux 5.2, always by descriptors: attach the mount `from_fd` on top of `to_fd`."""
    syscall(429, from_fd, b"", to_fd, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def fsopen(fstype: str) -> int:
    """fsopen(2), Linux 5.2."""
    return syscall(430, _path(fstype), FSOPEN_CLOEXEC, path=fstype)


def fsconfig_flag(fd: int, key: str) -> None:
    """fsconfig(2) FSCONFIG_SET_FLAG."""
    syscall(431, fd, FSCONFIG_SET_FLAG, _path(key), None, 0, path=key)


def fsconfig_string(fd: int, key: str, value: str) -> None:
    """fsconfig(2) FSCONFIG_SET_STRING."""
    syscall(431, fd, FSCONFIG_SET_STRING, _path(key), _path(value), 0, path=key)


def fsconfig_create(fd: int) -> None:
    """fsconfig(2) FSCONFIG_CMD_CREATE: make the superblock."""
    syscall(431, fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(fd: int, attributes: int = 0) -> int:
    """fsmount(2): a detached mount with MOUNT_ATTR_* `attributes`."""
    return syscall(432, fd, FSMOUNT_CLOEXEC, attributes)


def mount_setattr(
    fd: int, set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0, recursive: bool = False
) -> None:
    """mount_setattr(2), Linux 5.12, on the mount that `fd` refers to."""
    attr = pack("QQQQ", set_, clear, propagation, userns_fd)
    syscall(442, fd, b"", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), attr, len(attr))


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2), Linux 5.6. The descriptor is always close-on-exec."""
    how = pack("QQQ", flags | posix.O_CLOEXEC, mode, resolve)
    return syscall(437, dirfd, _path(path), how, len(how), path=path)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2), Linux 5.6."""
    return syscall(438, pidfd, fd, 0)


def fstatfs_type(fd: int) -> int:
    """The f_type of the filesystem that `fd` is on (statfs(2)); os.fstatvfs does not tell it."""
    buffer = bytes(120)  # struct statfs, 64-bit; filled by the kernel before any other reference to it exists
    syscall(138 if _X86_64 else 44, fd, buffer)
    return int.from_bytes(buffer[:8], "little")


def bpf(command: int, attr: bytes) -> int:
    """bpf(2)."""
    return syscall(321 if _X86_64 else 280, command, attr, len(attr))


def capget() -> int:
    """The permitted capabilities of this process as a bit mask (capget(2))."""
    header = pack("Ii", 0x20080522, 0)
    data = bytes(24)
    syscall(125 if _X86_64 else 90, header, data)
    return int.from_bytes(data[4:8], "little") | int.from_bytes(data[16:20], "little") << 32


def prlimit(pid: int, resource: int, soft: int, hard: int) -> None:
    """prlimit64(2): set one limit of another process; unlimited is 2**64-1."""
    mask = 0xFFFFFFFFFFFFFFFF
    syscall(302 if _X86_64 else 261, pid, resource, pack("QQ", soft & mask, hard & mask), None)


def ioprio_set(pid: int, ioprio: int) -> None:
    """ioprio_set(2) for one process."""
    syscall(251 if _X86_64 else 30, 1, pid, ioprio)


def sched_setattr(
    pid: int, policy: int, flags: int, nice: int, priority: int, runtime: int, deadline: int, period: int
) -> None:
    """sched_setattr(2); times in nanoseconds."""
    attr = pack("=IIQiIQQQ", 48, policy, flags, nice, priority, runtime, deadline, period)
    syscall(314 if _X86_64 else 274, pid, attr, 0)


def setdomainname(name: str) -> None:
    """setdomainname(2): the NIS domain name of the uts namespace."""
    raw = name.encode()
    syscall(171 if _X86_64 else 162, raw, len(raw))
