"""tmpcopyup: fill a new tmpfs with what the directory below it holds, by descriptors only."""

import posix

from . import paths

_READ = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_CLOEXEC
_WRITE = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
_TYPE = 0o170000


def copy_up(source: int, target: int, keep: set[str]) -> None:
    """Copy the tree below the directory `source` into the empty directory `target`: owners, modes, times, links.

    `keep` names what the mount's options have given `target` itself and stays: "mode", "uid", "gid".
    """
    source = posix.open(".", _READ | posix.O_DIRECTORY, dir_fd=source)
    target = posix.open(".", _READ | posix.O_DIRECTORY, dir_fd=target)
    try:
        _directory(source, target)
        status = posix.fstat(source)
        posix.chown(target, -1 if "uid" in keep else status.st_uid, -1 if "gid" in keep else status.st_gid)
        if "mode" not in keep:
            posix.chmod(target, status.st_mode & 0o7777)
    finally:
        posix.close(source)
        posix.close(target)


def _directory(source: int, target: int) -> None:
    for name in posix.listdir(source):
        status = posix.stat(name, dir_fd=source, follow_symlinks=False)
        kind = status.st_mode & _TYPE
        if kind == 0o120000:
            posix.symlink(posix.readlink(name, dir_fd=source), name, dir_fd=target)
            posix.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
            continue
        if kind == 0o040000:
            posix.mkdir(name, 0o700, dir_fd=target)
            below = posix.open(name, _READ | posix.O_DIRECTORY, dir_fd=source)
            made = posix.open(name, _READ | posix.O_DIRECTORY, dir_fd=target)
            _directory(below, made)
            posix.close(below)
        elif kind == 0o100000:
            made = _file(name, source, target)
        else:
            posix.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
            made = posix.open(name, paths.O_PATH | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=target)
            posix.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
            posix.close(made)
            continue
        posix.chown(made, status.st_uid, status.st_gid)
        posix.chmod(made, status.st_mode & 0o7777)
        posix.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))
        posix.close(made)


def _file(name: str, source: int, target: int) -> int:
    read = posix.open(name, _READ, dir_fd=source)
    made = posix.open(name, _WRITE, 0o600, dir_fd=target)
    try:
        while posix.sendfile(made, read, None, 1 << 20):
            pass
    finally:
        posix.close(read)
    return made
