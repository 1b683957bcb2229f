"""Read the log that a supervisor writes: CRI lines in `log`, older ones in `log.1`, `log.2` …

    2026-11-22T16:00:00.000000000Z stdout F text     a whole line, its newline taken off
    2026-11-22T16:00:00.000000000Z stdout P text     a part: its line goes on in the stream's next record

Writing is supervisor.c's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ovt.engine.supervised import alive, exit_record
from ovt.errors import NotFound

POLL = 0.05
TIME_WIDTH = len("2026-11-22T16:00:00.000000000Z")
BLOCK = 65536


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One piece of output; `data` ends with a newline unless it is a part of a line. Concatenation is the output.

    `time` is RFC 3339 in UTC with nanoseconds, so records sort by it as text.
    """

    time: str
    stream: str
    data: bytes

    @property
    def time_ns(self) -> int:
        """Nanoseconds since the epoch."""
        import calendar

        seconds = calendar.timegm(time.strptime(self.time[:19], "%Y-%m-%dT%H:%M:%S"))
        return seconds * 1_000_000_000 + int(self.time[20:29])


def read_log(
    path: str,
    *,
    follow: bool = False,
    since_ns: int | None = None,
    until_ns: int | None = None,
    tail: int | None = None,
    directory: str | None = None,
) -> Iterator[LogRecord]:
    """The records of the log `path` and its rotated predecessors, oldest first.

    since_ns <= time < until_ns, in nanoseconds since the epoch. `tail` starts at the last so many lines (0: none),
    whatever their time. `follow` goes on with new records over rotations until exit.json is in `directory` (default:
    the directory of `path`) or its supervisor is gone, and all is read. Lines that are not CRI are skipped.
    NotFound, with the first record, without a log.
    """
    since = _timestamp(since_ns) if since_ns is not None else ""
    until = _timestamp(until_ns) if until_ns is not None else "~"
    with _Files(path) as files:
        if tail is not None:
            files.seek_tail(tail)
        while True:
            ended = not follow or _ended(directory or os.path.dirname(path))
            for line in files.rest():
                record = _parse(line)
                if record and record.time >= until:
                    return
                if record and record.time >= since:
                    yield record
            if ended or (until_ns is not None and time.time_ns() >= until_ns):
                return
            time.sleep(POLL)


class _Files:
    """The log as one stream of lines over its files, of which the supervisor renames each to the next number."""

    def __init__(self, path: str) -> None:
        self.path = path
        numbers = self._numbers()
        if not numbers:
            raise NotFound(f"there is no log {path}")
        self._file: BinaryIO | None = self._open(numbers[-1])
        self._torn = b""

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def _name(self, number: int) -> str:
        return f"{self.path}.{number}" if number else self.path

    def _numbers(self) -> list[int]:
        """Which files exist, newest first."""
        base = os.path.basename(self.path)
        numbers = []
        for name in os.listdir(os.path.dirname(self.path) or "."):
            if name == base:
                numbers.append(0)
            elif name.startswith(base + ".") and name[len(base) + 1 :].isdecimal():
                numbers.append(int(name[len(base) + 1 :]))
        return sorted(numbers)

    def _open(self, number: int) -> BinaryIO | None:
        try:
            return open(self._name(number), "rb", buffering=BLOCK)
        except FileNotFoundError:
            return None

    def _place(self) -> int | None:
        """The number that the file being read has now; None when it was dropped."""
        assert self._file is not None
        mine = os.fstat(self._file.fileno())
        for number in self._numbers():
            try:
                if os.path.samestat(mine, os.stat(self._name(number))):
                    return number
            except FileNotFoundError:
                continue
        return None

    def rest(self) -> Iterator[bytes]:
        """Whole lines without their newlines from the present position to the present end of the newest file."""
        while True:
            if self._file is None:
                self._file = self._open(max(self._numbers(), default=0))
            if self._file is None:
                return
            place = self._place()
            for line in self._file:
                self._torn += line
                if self._torn.endswith(b"\n"):
                    yield self._torn[:-1]
                    self._torn = b""
            if place == 0:
                return
            # nothing is written to a file once it has a number: it was read to its end above
            following = self._open(place - 1) if place else None
            if place is not None and (following is None or self._place() != place):
                if following is None:
                    return  # between the rename of the old and the making of the new
                following.close()
                continue
            self._file.close()
            self._file, self._torn = following, b""

    def seek_tail(self, lines: int) -> None:
        """Go to the beginning of the last so many lines; lines of both streams in parts may make it a few more."""
        seen, newest = 0, True
        for number in self._numbers():
            file = self._open(number)
            if file is None or (not newest and self._file and os.path.sameopenfile(file.fileno(), self._file.fileno())):
                continue  # rotated since it was listed
            if self._file:
                self._file.close()
            self._file = file
            for end, line in _backwards(file):
                if newest or line[TIME_WIDTH + 8 : TIME_WIDTH + 9] == b"F":
                    if seen >= lines:
                        file.seek(end)
                        return
                    seen, newest = seen + 1, False
            file.seek(0)


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Whole lines from the last to the first: the offset behind its newline, and the line without it."""
    start = file.seek(0, os.SEEK_END)
    block, stop = b"", 0  # file[start : start + len(block)], of which block[stop:] is dealt with
    while True:
        newline = block.rfind(b"\n", 0, max(stop - 1, 0))
        if newline < 0 and start:
            size = min(BLOCK, start)
            start = file.seek(start - size)
            block, stop = file.read(size) + block[:stop], stop + size
            stop = block.rfind(b"\n", 0, stop) + 1  # less than all only for the torn end of the file
            block = block[:stop]
            continue
        if not stop:
            return
        yield start + stop, block[newline + 1 : stop - 1]
        stop = newline + 1


def _parse(line: bytes) -> LogRecord | None:
    head, data = line[: TIME_WIDTH + 10], line[TIME_WIDTH + 10 :]
    fields = head.split(b" ")
    if len(fields) != 4 or len(fields[0]) != TIME_WIDTH or fields[2] not in (b"F", b"P") or fields[3]:
        return None
    text = head.decode("ascii", "replace")
    return LogRecord(text[:TIME_WIDTH], text[TIME_WIDTH + 1 : TIME_WIDTH + 7], data + b"\n" * (fields[2] == b"F"))


def _timestamp(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


def _ended(directory: str) -> bool:
    """Whether no more output can come; a directory that no supervisor knows is one whose log only rests."""
    running = False
    try:
        running = alive(directory)
    except NotFound:
        pass
    return not running or exit_record(directory) is not None
