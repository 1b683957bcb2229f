"""Whether a file of one host is there on another: the same file on storage that both share, or an equal copy of it.

For a file that is written to, only the same file will do. The sending host proves it by a small file of a random name
beside it that the other host has to find; for a block device by the identity that its hardware has. A file that is
only read may as well be a copy: size and samples of the content tell. Nothing is changed that stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

_SAMPLES = 64
_SAMPLE = 64 << 10  # bytes
_PREFIX = ".ovt-migrate-"


class Trace(NamedTuple):
    """What the sending host knows of one file; `path` is absolute. Empty strings where nothing can be told."""

    path: str
    size: int
    mark: str = ""  # name of a file beside it, whose content is its name
    device: str = ""  # identity of a block device
    digest: str = ""  # of samples of the content, unless it is being written to

    @classmethod
    def unpack(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)


@contextlib.contextmanager
def traces(paths: Mapping[str, bool]) -> Iterator[list[Trace]]:
    """What can be told of each of `paths` (with whether it is written to); the marks are there until the end."""
    marks: dict[str, str] = {}
    found = []
    try:
        for path, written in paths.items():
            info = os.stat(path)
            if stat.S_ISBLK(info.st_mode):
                identity = _device(info.st_rdev)
                found.append(Trace(path, _size(path), device=identity, digest="" if written else _digest(path)))
                continue
            directory = os.path.dirname(os.path.realpath(path))
            if directory not in marks:
                marks[directory] = _mark(directory)
            mark = marks[directory]
            found.append(Trace(path, info.st_size, mark, digest="" if written or mark else _digest(path)))
        yield found
    finally:
        for directory, name in marks.items():
            if name:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{directory}/{name}")


def with_digests(found: Iterable[Trace]) -> list[Trace]:
    """The same with digests, for those files that were not recognised by their marks."""
    return [trace if trace.digest else trace._replace(digest=_digest(trace.path)) for trace in found]


def compare(trace: Trace) -> str:
    """What this host has at that path: `same` (the very file), `equal` (a copy), `other`, `missing`, or `unknown`."""
    try:
        info = os.stat(trace.path)
    except OSError:
        return "missing"
    if trace.device or stat.S_ISBLK(info.st_mode):
        if trace.device and stat.S_ISBLK(info.st_mode) and _device(info.st_rdev) == trace.device:
            return "same"
    elif trace.mark:
        mark = f"{os.path.dirname(os.path.realpath(trace.path))}/{os.path.basename(trace.mark)}"
        with contextlib.suppress(OSError):
            with open(mark, encoding="ascii", errors="replace") as file:
                if file.read(200) == trace.mark:
                    return "same"
    if not trace.digest:
        return "unknown"
    equal = _size(trace.path) == trace.size and _digest(trace.path) == trace.digest
    return "equal" if equal else "other"


def _mark(directory: str) -> str:
    name = _PREFIX + os.urandom(16).hex()
    try:
        fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:  # read-only: the content has to tell
        return ""
    with open(fd, "w", encoding="ascii") as file:
        file.write(name)
        file.flush()
        os.fsync(fd)  # network file systems show it to others then
    return name


def _device(number: int) -> str:
    base = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for name in ("wwid", "device/wwid", "dm/uuid", "nguid", "uuid"):
        with contextlib.suppress(OSError):
            with open(f"{base}/{name}", encoding="ascii", errors="replace") as file:
                if text := file.read().strip():
                    return text
    return ""


def _size(path: str) -> int:
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def _digest(path: str) -> str:
    """Of the beginning, the end and parts between, so that gigabytes need not be read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        last = max(0, size - _SAMPLE)
        for offset in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            digest.update(os.pread(file.fileno(), _SAMPLE, offset))
    return f"{size}:{digest.hexdigest()}"
