"""Reading and writing the small files of a cgroup file system: open, one read or one write, close. No policy.

A cgroup file takes each write(2) as one command, so a value is never split over two writes and never buffered.
"""

from __future__ import annotations

import posix
from errno import ENOENT

_READ = posix.O_RDONLY | posix.O_CLOEXEC
_WRITE = posix.O_WRONLY | posix.O_CLOEXEC


def read(path: str) -> str:
    """The whole text of `path`; OSError with the path on failure."""
    fd = posix.open(path, _READ)
    try:
        text = posix.read(fd, 65536)
        if len(text) < 3072:  # seq_file hands out whole records of up to a page; none here is a quarter page long
            return text.decode("utf-8", "replace")
        parts = [text]
        while text := posix.read(fd, 65536):
            parts.append(text)
        return b"".join(parts).decode("utf-8", "replace")
    except OSError as error:
        error.filename = path
        raise
    finally:
        posix.close(fd)


def read_or(path: str, default: str = "") -> str:
    """The text of `path`, or `default` where there is no such file (or the cgroup is gone: ENODEV)."""
    try:
        return read(path)
    except OSError as error:
        if error.errno not in (ENOENT, 19):
            raise
        return default


def write(path: str, value: str) -> None:
    """Write `value` as one command to the existing file `path`; OSError with the path on failure."""
    fd = posix.open(path, _WRITE)
    try:
        posix.write(fd, value.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        posix.close(fd)


def exists(path: str) -> bool:
    """Whether `path` can be looked up."""
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def make_directories(path: str, base: str) -> bool:
    """mkdir -p of `path`, which lies below the existing `base`; False where `path` was there already.

    Tries the last component first: the parents of a container's cgroup nearly always exist.
    """
    try:
        posix.mkdir(path, 0o755)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:
        if len(path) <= len(base):
            raise
    make_directories(path[: path.rindex("/")], base)
    try:
        posix.mkdir(path, 0o755)
    except FileExistsError:  # somebody made it since: another container of the same parent
        return False
    return True


def children(path: str) -> list[str]:
    """The cgroups directly below `path`; empty when there is no such cgroup."""
    try:
        # kernfs counts a directory's children in its link count, so a leaf need not be listed (40 files each).
        if posix.stat(path).st_nlink == 2:
            return []
        with posix.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if error.errno not in (ENOENT, 19):
            raise
        return []


def clean(path: str) -> str:
    """`path` as an absolute path without `.`, `..`, empty components or a trailing slash: it never leaves `/`.

    The root itself is the empty string, so that a mount point can be put in front.
    """
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part and part != ".":
            parts.append(part)
    return "".join(["/" + part for part in parts])
