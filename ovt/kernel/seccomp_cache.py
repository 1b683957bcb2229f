"""Compiled seccomp programs on disk: a directory of small files, each named by all that went into it.

The name is a digest of the profile's rules, the identity of libseccomp, kernel release, machine and format, so a
file is never stale, only unused. A file holds a digest of its own content as well: a truncated, mixed-up or edited
one is as good as none. What keeps others from planting a filter is the directory: owned by the caller, closed to
everybody else, reached without following a symbolic link; anything else is not used at all. The cache never makes
a container fail: whatever goes wrong here, the profile is compiled again.
"""

import posix
import time
from _struct import pack, unpack_from
from marshal import dumps

try:
    from _blake2 import blake2b
except ImportError:  # an interpreter built without the C module
    from hashlib import blake2b

_FORMAT = b"ovt seccomp 1\n"
_HEADER = len(_FORMAT) + 32 + 8
_LARGEST = _HEADER + 8 * 4096
MAX_ENTRIES = 64
_KEEP = 48
# A file used again is touched at most this often, so that eviction by mtime means least recently used.
_TOUCH_AFTER_SECONDS = 3600
_RULE_FIELDS = ("defaultAction", "defaultErrnoRet", "architectures", "flags", "syscalls")

Entry = tuple[bytes, int, bool]


def key(profile: dict[str, object], library: tuple[object, ...]) -> bytes:
    """The digest that names the entry of a profile; listenerPath and listenerMetadata do not take part."""
    uname = posix.uname()
    content = [[profile.get(field) for field in _RULE_FIELDS], library, uname.release, uname.machine]
    # Format 2 of marshal has no back references, so equal content gives equal bytes; unlike JSON it tells 1 from 1.0.
    return blake2b(_FORMAT + dumps(content, 2), digest_size=32).digest()


def load(directory: str, key: bytes) -> Entry | None:
    """(program, flags, notify) stored under `key`, or None."""
    dirfd = _open_directory(directory, create=False)
    if dirfd < 0:
        return None
    fd = -1
    try:
        fd = posix.open(key.hex(), posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC, dir_fd=dirfd)
        data = posix.read(fd, _LARGEST + 1)
        if not _HEADER < len(data) <= _LARGEST or (len(data) - _HEADER) % 8:
            return None
        if data[: _HEADER - 8] != _FORMAT + _digest(key, data[_HEADER - 8 :]):
            return None
        if time.time() - posix.fstat(fd).st_mtime > _TOUCH_AFTER_SECONDS:
            posix.utime(fd)
    except OSError:
        return None
    finally:
        if fd >= 0:
            posix.close(fd)
        posix.close(dirfd)
    flags, notify = unpack_from("=II", data, _HEADER - 8)
    return data[_HEADER:], flags, bool(notify)


def store(directory: str, key: bytes, entry: Entry) -> bool:
    """Keep an entry, making room when there are too many; False when the directory cannot be used."""
    dirfd = _open_directory(directory, create=True)
    if dirfd < 0:
        return False
    temporary = f".{posix.urandom(8).hex()}"
    program, flags, notify = entry
    body = pack("=II", flags, notify) + program
    try:
        fd = posix.open(temporary, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600, dir_fd=dirfd)
        try:
            written = posix.write(fd, _FORMAT + _digest(key, body) + body)
        finally:
            posix.close(fd)
        if written != _HEADER - 8 + len(body):  # a full disk
            posix.unlink(temporary, dir_fd=dirfd)
            return False
        # No fsync: after a crash the digest tells a torn file, and compiling again is cheaper than waiting for a disk.
        posix.rename(temporary, key.hex(), src_dir_fd=dirfd, dst_dir_fd=dirfd)
        _evict(dirfd)
    except OSError:
        return False
    finally:
        posix.close(dirfd)
    return True


def _digest(key: bytes, body: bytes) -> bytes:
    return blake2b(key + body, digest_size=32).digest()


def _open_directory(directory: str, create: bool) -> int:
    """A descriptor of the directory if it is ours alone, else -1."""
    flags = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_NOFOLLOW | posix.O_CLOEXEC
    try:
        fd = posix.open(directory, flags)
    except FileNotFoundError:
        if not create:
            return -1
        try:
            posix.mkdir(directory, 0o700)
        except FileExistsError:
            pass  # another container's create was quicker
        except OSError:
            return -1
        try:
            fd = posix.open(directory, flags)
        except OSError:
            return -1
    except OSError:
        return -1
    status = posix.fstat(fd)
    if status.st_uid != posix.geteuid() or status.st_mode & 0o077:
        posix.close(fd)
        return -1
    return fd


def _evict(dirfd: int) -> None:
    names = posix.listdir(dirfd)
    if len(names) <= MAX_ENTRIES:
        return
    by_age = []
    for name in names:
        try:
            by_age.append((posix.stat(name, dir_fd=dirfd, follow_symlinks=False).st_mtime_ns, name))
        except FileNotFoundError:  # evicted by somebody else meanwhile
            continue
    by_age.sort()
    for _, name in by_age[: len(by_age) - _KEEP]:
        try:
            posix.unlink(name, dir_fd=dirfd)
        except OSError:  # gone, or a directory somebody put here; neither is ours to insist on
            continue
