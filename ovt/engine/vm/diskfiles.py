"""The files of disks, opened for QEMU: images as they are recorded, with the flags that QEMU expects.

A record's relative paths are below the instance's own directory and may not lead out of it. Absolute ones are images
of the owner's: they were resolved when the record was made, so a symbolic link in such a place was put there later and
is not followed, except below /dev, where links are the names that stay.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from ovt.engine.vm import blockgraph as graph
from ovt.engine.vm.blockgraph import Record
from ovt.errors import HostError, NotFound, UsageError, refused
from ovt.kernel import syscalls

Opener = Callable[[str, int], int]  # (path, flags) -> descriptor, as os.open


def open_chain(home: str, disk: Record, opener: Opener = os.open) -> list[int]:
    """Descriptors of a disk's images, bottom to top: the top for writing unless the disk is read-only.

    `opener` opens absolute paths. Errors as of `open_image`; nothing stays open then.
    """
    fds: list[int] = []
    try:
        for number in range(len(disk.get("chain") or [])):
            fds.append(open_image(home, disk, number, opener))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def open_image(home: str, disk: Record, number: int, opener: Opener = os.open, *, writable: bool | None = None) -> int:
    """A descriptor of image `number` of the disk's chain, as blockgraph.open_flags has it.

    NotFound when it has vanished, HostError when it cannot be opened, UsageError when it is not what was recorded.
    """
    layer = disk["chain"][number]
    path = layer["path"]
    what = f"disk {disk['id']}: image {path}"
    # O_NONBLOCK: a pipe of that name must not stop us
    flags = graph.open_flags(disk, number, writable=writable) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = _open(home, path, flags, opener)
    except FileNotFoundError:
        raise NotFound(f"{what} has vanished", "put it back, or detach the disk") from None
    except OSError as error:
        raise _refused(what, error, flags) from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"{what} is neither a file nor a block device")
        if stat.S_ISBLK(mode) != bool(layer.get("block")):
            raise UsageError(f"{what} is {'now' if stat.S_ISBLK(mode) else 'no longer'} a block device")
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(home: str, path: str, flags: int, opener: Opener) -> int:
    if os.path.isabs(path):
        return opener(path, flags if path.startswith("/dev/") else flags | os.O_NOFOLLOW)
    directory = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.openat2(directory, path, flags, resolve=syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
    finally:
        os.close(directory)


def _refused(what: str, error: OSError, flags: int) -> HostError:
    if error.errno == errno.ELOOP:
        return HostError(f"{what} has been replaced by a symbolic link", errno.ELOOP, "attach the file it points to")
    if error.errno == errno.EXDEV:
        return HostError(f"{what} leads out of the machine's directory", errno.EXDEV)
    if error.errno == errno.EINVAL and flags & os.O_DIRECT:
        return HostError(f"{what}: its file system cannot bypass the page cache", errno.EINVAL, "cache writeback")
    hint = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "check the permissions of the file and of every directory above it"
    elif error.errno == errno.EROFS:
        hint = "attach it in mode overlay or readonly"
    return refused(what, error, hint)
