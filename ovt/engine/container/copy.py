"""Copy files between two root directories of which one may be hostile: a container that changes while we look.

Both sides are descriptors; every path is resolved by openat2(RESOLVE_IN_ROOT) and every entry is made and opened
through the descriptor of its directory without following links, so a swapped symbolic link leads nowhere
(CVE-2018-15664) and nothing of the container is ever executed or loaded (CVE-2019-14271). Names become host paths
only on the host's side. Kept: modes, times and symbolic links; hard links become files, devices and sockets stay out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from ovt.errors import Conflict, HostError, NotFound, UsageError
from ovt.kernel.syscalls import O_PATH, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_RESOLVE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_CHUNK = 1 << 20


class Side:
    """One end of a copy: a root directory, a path below it, and the words people know it by."""

    def __init__(self, root: int, path: str, shown: str) -> None:
        self.root = root
        # `..` is only ever resolved by openat2: as the name of an entry it would be the directory above the root
        self.path = f"{path}/." if path.rsplit("/", 1)[-1] == ".." else path
        self.shown = shown

    def open(self, path: str, flags: int) -> int:
        """Open `path` as a process chrooted here would see it."""
        return openat2(self.root, path.lstrip("/") or ".", flags, 0, _RESOLVE)

    def mode(self, path: str) -> int:
        """st_mode of what `path` leads to, 0 when there is nothing."""
        try:
            fd = self.open(path, O_PATH)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        try:
            return os.fstat(fd).st_mode
        finally:
            os.close(fd)


Owner = Callable[[int, int], tuple[int, int]]  # the new (uid, gid) for an old one


def copy(source: Side, target: Side, owner: Owner, setid: bool = True) -> None:
    """Copy `source` to `target`, with the rules of cp(1): into a directory that exists, else under the new name;
    `DIR/.` copies what is in DIR. `owner` is asked for the owner of everything that is made, by root only.
    Without `setid` set-id bits are taken off: a container must not bring a program to the host that runs as its owner.
    """
    try:
        _copy(source, target, _Copier(owner, setid))
    except OSError as error:
        raise HostError(f"{error.filename or source.shown}: {error.strerror}", error.errno or 0) from error


def _copy(source: Side, target: Side, copier: _Copier) -> None:
    contents = source.path.endswith("/.") or source.path == "."
    path = source.path.rstrip("/") or "/"
    kind = source.mode(path) if contents or source.path.endswith("/") else _link_mode(source, path)
    if not kind:
        raise NotFound(f"there is no {source.shown}")
    if source.path.endswith("/") and not stat.S_ISDIR(kind):
        raise UsageError(f"{source.shown} is not a directory", "leave out the slash at its end")
    existing = target.mode(target.path)
    if stat.S_ISDIR(existing):
        directory = target.path
        name = "" if contents or path == "/" else path.rsplit("/", 1)[-1]
    else:
        if target.path.endswith("/"):
            raise NotFound(f"there is no directory {target.shown}", "make it first, or leave out the slash at its end")
        if existing and stat.S_ISDIR(kind):
            raise Conflict(f"{target.shown} is not a directory, {source.shown} is one")
        directory, _, name = target.path.rstrip("/").rpartition("/")
        if not stat.S_ISDIR(target.mode(directory or _top(target.path))):
            raise NotFound(f"there is no directory for {target.shown}", "make it first: ovt exec NAME mkdir -p DIR")
    into = target.open(directory or _top(target.path), _DIRECTORY)
    try:
        if not name:
            inner = source.open(path, _DIRECTORY)
            try:
                copier.children(inner, into, source.shown)
            finally:
                os.close(inner)
            return
        above, _, last = path.rpartition("/")
        if contents:
            above, last = path, "."
        holder = source.open(above or _top(path), _DIRECTORY)
        try:
            copier.entry(holder, last, into, name, source.shown)
        finally:
            os.close(holder)
    finally:
        os.close(into)


def _top(path: str) -> str:
    return "/" if path.startswith("/") else "."


def _link_mode(side: Side, path: str) -> int:
    """st_mode of `path` itself, not of what a link leads to; 0 when there is nothing."""
    above, _, last = path.rpartition("/")
    try:
        fd = side.open(above or _top(path), _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    try:
        return os.stat(last or ".", dir_fd=fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0
    finally:
        os.close(fd)


class _Copier:
    def __init__(self, owner: Owner, setid: bool = True) -> None:
        self.owner = owner
        self.modes = 0o7777 if setid else 0o1777
        self.may_chown = os.geteuid() == 0

    def children(self, source: int, target: int, shown: str) -> None:
        for name in sorted(os.listdir(source)):
            self.entry(source, name, target, name, f"{shown}/{name}")

    def entry(self, source: int, name: str, target: int, new: str, shown: str) -> None:
        """Copy entry `name` of directory `source` to `new` in `target`; an old one there is replaced."""
        try:
            info = os.stat(name, dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                self._directory(source, name, target, new, shown)
            elif stat.S_ISLNK(info.st_mode):
                text = os.readlink(name, dir_fd=source)
                _clear(new, target)
                os.symlink(text, new, dir_fd=target)
                self._chown_link(new, target, info)
            elif stat.S_ISREG(info.st_mode):
                self._file(source, name, target, new)
            elif stat.S_ISFIFO(info.st_mode):
                _clear(new, target)
                os.mkfifo(new, stat.S_IMODE(info.st_mode) & 0o777, dir_fd=target)
                self._chown_link(new, target, info)
            else:
                return  # a device or a socket
        except OSError as error:
            raise HostError(f"{shown}: {error.strerror}", error.errno or 0) from error

    def _directory(self, source: int, name: str, target: int, new: str, shown: str) -> None:
        inner = os.open(name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
        try:
            info = os.fstat(inner)
            try:
                os.mkdir(new, 0o700, dir_fd=target)
            except FileExistsError:
                pass  # a directory is filled; anything else fails in the open below
            made = os.open(new, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target)
            try:
                self.children(inner, made, shown)
                self.dress(made, info)
            finally:
                os.close(made)
        finally:
            os.close(inner)

    def _file(self, source: int, name: str, target: int, new: str) -> None:
        # non-blocking: between stat and open a fifo may have taken its place
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        with open(fd, "rb", buffering=0) as reader:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return
            with open(_new_file(new, target), "wb") as writer:
                while chunk := reader.read(_CHUNK):
                    writer.write(chunk)
                writer.flush()
                self.dress(writer.fileno(), info)

    def dress(self, fd: int, info: os.stat_result) -> None:
        if self.may_chown:
            os.fchown(fd, *self.owner(info.st_uid, info.st_gid))
        os.fchmod(fd, info.st_mode & self.modes)
        os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))

    def _chown_link(self, name: str, target: int, info: os.stat_result) -> None:
        if self.may_chown:
            uid, gid = self.owner(info.st_uid, info.st_gid)
            os.chown(name, uid, gid, dir_fd=target, follow_symlinks=False)


def _new_file(name: str, directory: int) -> int:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        _clear(name, directory)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # a mount of its own, such as /etc/hosts: it cannot be replaced, only written
        fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=directory)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, 0)
            return fd
        os.close(fd)
        raise
    return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)


def _clear(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def copy_tree(source: int, target: int, owner: Owner, shown: str) -> None:
    """Copy what is in the directory `source` into the directory `target`, both descriptors; also root's own mode."""
    copier = _Copier(owner)
    copier.children(source, target, shown)
    copier.dress(target, os.fstat(source))
