"""A tar stream out of a guest, unpacked below a directory of the host without trusting a byte of it.

No name leaves the directory: every entry is made through the descriptor of its own, which openat2(2) finds without
following a single link, whether the stream planted it or it was there before. Nothing is read into memory by a length
that the stream gives. Kept: modes without set-id bits, times, symbolic links; hard links become files, devices stay
out, and everything belongs to the caller. Archives that people bring are read by ovt/image/archive.py.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from typing import IO, NamedTuple, Protocol

from ovt.errors import HostError, OvtError
from ovt.kernel.syscalls import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

ENTRIES = 2_000_000
_BLOCK = 512
_CHUNK = 1 << 20
_LONGEST = 1 << 20  # bytes of an extended header
_EXTENSIONS = 10  # extended headers before one entry
_PADDING = 1 << 20  # bytes after the archive's end
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TIME = re.compile(r"(-?\d{1,11})(?:\.(\d{1,9})\d*)?")
_GNU_NAME, _GNU_LINK, _PAX, _PAX_ALL = b"L", b"K", b"x", b"g"


class Source(Protocol):
    """Where the bytes come from."""

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end."""


class Cut(OvtError):
    """The stream ended before the archive did."""


class Member(NamedTuple):
    """One header. `mtime` in nanoseconds since the epoch."""

    name: str
    type: bytes
    size: int
    mode: int
    mtime: int
    link: str


class Target(NamedTuple):
    """Where to: an open directory, what the stream's top entry is called and what it is to be called here.

    Both empty: the entries of `.` become entries of the directory; an empty `old` alone: `.` becomes `new`.
    """

    directory: int
    old: str
    new: str


def unpack(source: Source, target: Target, shown: str) -> int:
    """Unpack all of `source`, which people know as `shown`; the number of entries made.

    HostError for a stream that leads outside, is damaged or does not fit; Cut when it ends too early.
    """
    unpacker = _Unpacker(source, target, shown)
    unpacker.run()
    return unpacker.count


class _Unpacker:
    def __init__(self, source: Source, target: Target, shown: str) -> None:
        self.source = source
        self.target = target
        self.shown = shown
        self.count = 0
        self.files: set[str] = set()
        self.directories: list[tuple[str, Member]] = []
        space = os.fstatvfs(target.directory)
        free = space.f_bavail * space.f_frsize
        self.left = free - min(free // 20, 1 << 30)

    def run(self) -> None:
        while (member := self._header()) is not None:
            path = self._path(member.name)
            self.count += 1
            if self.count > ENTRIES:
                raise HostError(f"{self.shown} has more than {ENTRIES} entries", hint="copy it in parts")
            if member.type == tarfile.REGTYPE:
                self.left -= member.size
                if self.left < 0:
                    raise HostError(f"{self.shown} does not fit: it has more than this file system has room for")
            try:
                self._make(path, member)
            except OSError as error:
                where = f"{self.shown}: {_shown(path)}"
                raise HostError(f"{where}: {(error.strerror or '').lower()}", error.errno or 0) from error
        read = 0
        while chunk := self.source.read(_CHUNK):
            read += len(chunk)
            if read > _PADDING:
                raise self._bad("it goes on after its end")
        for path, member in reversed(self.directories):
            fd = openat2(self.target.directory, path, _DIRECTORY, 0, _RESOLVE)
            try:
                _dress(fd, member)
            finally:
                os.close(fd)

    # headers

    def _header(self) -> Member | None:
        """The next entry, with what extended headers before it say; None at the end."""
        name = link = ""
        size = mtime = -1
        for _ in range(_EXTENSIONS):
            block = self._exactly(_BLOCK)
            if not any(block):
                return None
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise self._bad(str(error) or "a header is wrong") from error
            if info.size < 0:
                raise self._bad("a size is negative")
            if info.type in (_GNU_NAME, _GNU_LINK):
                text = os.fsdecode(self._extended(info.size).rstrip(b"\0"))
                name, link = (text, link) if info.type == _GNU_NAME else (name, text)
                continue
            if info.type == _PAX_ALL:
                self._extended(info.size)
                continue
            if info.type == _PAX:
                words = self._words(self._extended(info.size))
                name, link = words.get("path", name), words.get("linkpath", link)
                size = _number(words.get("size", ""), size)
                mtime = _nanoseconds(words.get("mtime", ""), mtime)
                continue
            kind = tarfile.REGTYPE if info.type in (tarfile.AREGTYPE, tarfile.CONTTYPE) else info.type
            if kind == tarfile.REGTYPE and not name and info.name.endswith("/"):
                kind = tarfile.DIRTYPE
            own_time = _nanoseconds(str(int(info.mtime)), 0)
            return Member(
                name or info.name,
                kind,
                size if size >= 0 else info.size,
                info.mode & 0o7777,
                mtime if mtime >= 0 else own_time,
                link or info.linkname,
            )
        raise self._bad("too many headers and no entry")

    def _extended(self, size: int) -> bytes:
        if size > _LONGEST:
            raise self._bad("a header is too long")
        return self._exactly(-(-size // _BLOCK) * _BLOCK)[:size]

    def _words(self, data: bytes) -> dict[str, str]:
        """The records of a PAX header: `LENGTH KEY=VALUE` and a line feed, LENGTH counting all of it."""
        words: dict[str, str] = {}
        at = 0
        while at < len(data):
            digits = data[at : at + 8].partition(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            key, equals, value = data[at + len(digits) + 1 : at + length].partition(b"=")
            if length <= len(digits) + 1 or at + length > len(data) or not equals or not value.endswith(b"\n"):
                raise self._bad("a header is wrong")
            words[os.fsdecode(key)] = os.fsdecode(value[:-1])
            at += length
        return words

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            chunk = self.source.read(min(size, _CHUNK))
            if not chunk:
                raise Cut(f"{self.shown} cannot be copied: what the guest sends ends in the middle")
            parts.append(chunk)
            size -= len(chunk)
        return b"".join(parts)

    def _path(self, name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or name.startswith("/") or "\0" in name:
            raise self._bad(f"{_shown(name)} leads outside")
        if self.target.old:
            if not parts or parts[0] != self.target.old:
                raise self._bad(f"{_shown(name)} was not asked for")
            del parts[0]
        if self.target.new:
            parts.insert(0, self.target.new)
        return "/".join(parts)

    def _bad(self, why: str) -> HostError:
        return HostError(f"{self.shown} cannot be copied: what the guest sends is no archive to trust: {why}")

    # entries

    def _make(self, path: str, member: Member) -> None:
        if not path:  # the directory that all this goes into
            if member.type != tarfile.DIRTYPE:
                raise self._bad("its top is no directory")
            return
        if member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            return
        above, _, name = path.rpartition("/")
        parent = openat2(self.target.directory, above or ".", _DIRECTORY, 0, _RESOLVE)
        try:
            if member.type == tarfile.DIRTYPE:
                try:
                    os.mkdir(name, 0o700, dir_fd=parent)
                except FileExistsError:
                    pass  # a directory is filled; anything else, also a link to one, fails in the open
                os.close(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent))
                self.directories.append((path, member))
            elif member.type == tarfile.REGTYPE:
                self._file(parent, name, member)
                self.files.add(path)
            elif member.type == tarfile.SYMTYPE:
                _clear(name, parent)
                os.symlink(member.link, name, dir_fd=parent)
                os.utime(name, ns=(member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
            elif member.type == tarfile.LNKTYPE:
                self._same(parent, name, member)
            elif member.type == tarfile.FIFOTYPE:
                _clear(name, parent)
                os.mkfifo(name, member.mode & 0o777, dir_fd=parent)
            else:
                raise self._bad(f"an entry of type {member.type!r}")
        finally:
            os.close(parent)

    def _file(self, parent: int, name: str, member: Member) -> None:
        with _new(name, parent) as file:
            try:
                left = member.size
                while left > 0:
                    chunk = self._exactly(min(left, _CHUNK))
                    file.write(chunk)
                    left -= len(chunk)
                self._exactly(-member.size % _BLOCK)
                file.flush()
                _dress(file.fileno(), member)
            except BaseException:
                os.unlink(name, dir_fd=parent)
                raise

    def _same(self, parent: int, name: str, member: Member) -> None:
        """A hard link: a copy of a file that this stream has brought, and of no other."""
        path = self._path(member.link)
        if path not in self.files:
            raise self._bad(f"a link to {_shown(member.link)}, which it did not bring")
        fd = openat2(self.target.directory, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0, _RESOLVE)
        with open(fd, "rb") as old:
            info = os.fstat(fd)
            self.left -= info.st_size
            if not stat.S_ISREG(info.st_mode) or self.left < 0:
                raise self._bad(f"a link to {_shown(member.link)}")
            with _new(name, parent) as file:
                while chunk := old.read(_CHUNK):
                    file.write(chunk)
                file.flush()
                _dress(file.fileno(), member)


def _new(name: str, parent: int) -> IO[bytes]:
    _clear(name, parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(name, flags, 0o600, dir_fd=parent), "wb")


def _clear(name: str, parent: int) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass


def _dress(fd: int, member: Member) -> None:
    os.fchmod(fd, member.mode & 0o1777)
    os.utime(fd, ns=(member.mtime, member.mtime))


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else otherwise


def _nanoseconds(text: str, otherwise: int) -> int:
    found = _TIME.fullmatch(text)
    if not found:
        return otherwise
    seconds = min(max(int(found[1]), 0), 1 << 33)
    return seconds * 1_000_000_000 + int((found[2] or "0").ljust(9, "0"))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "…")
