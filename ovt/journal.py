"""The journal of what happened to instances: one JSON object a line, appended by whoever did it, followed by anyone.

    {"time": 1763827200.5, "event": "start", "id": "0123456789ab", "name": "web", …}

It is a record for people and programs that watch, not the store: nothing is ever decided by it. A line is one
write(2) in append mode, so lines of several writers do not mix.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Parse = Callable[[bytes], dict[str, Any] | None]

MAX_BYTES = 4 << 20  # then the file becomes `events.1.jsonl`, and the one before that is forgotten
_POLL = 0.2


class Journal:
    """The journal in the directory `root`."""

    def __init__(self, root: str) -> None:
        self.path = f"{root}/events.jsonl"
        self.older = f"{root}/events.1.jsonl"

    def write(self, event: str, id: str, name: str, **details: Any) -> None:
        """Append one event that happens now."""
        line = json.dumps({"time": time.time(), "event": event, "id": id, "name": name, **details})
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode() + b"\n")
            full = os.fstat(fd).st_size > MAX_BYTES
        finally:
            os.close(fd)
        if full:
            os.rename(self.path, self.older)

    def read(
        self,
        since: float = 0.0,
        until: float = 0.0,
        follow: bool = False,
        others: Callable[[], Iterable[tuple[str, Parse]]] = tuple,
    ) -> Iterator[dict[str, Any]]:
        """Events with since <= time < until (seconds since the epoch; until 0: no end), oldest first.

        `follow` goes on with new ones, over the change of files, until `until` has passed; those of one fifth of a
        second are in order. `others` are further files with events, and what makes an event of a line of theirs.
        """
        files = _Files()
        while True:
            found: list[dict[str, Any]] = []
            for path, parse in [(self.older, own), (self.path, own), *others()]:
                for line in files.new_lines(path):
                    event = parse(line)
                    if event and event["time"] >= since and (not until or event["time"] < until):
                        found.append(event)
            yield from sorted(found, key=lambda event: float(event["time"]))
            if not follow or (until and time.time() >= until):
                return
            time.sleep(_POLL)


def own(line: bytes) -> dict[str, Any] | None:
    """The event of a line of the journal; None for one that a full disk has torn."""
    event = parsed(line)
    return event if event and isinstance(event.get("time"), (int, float)) else None


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None when it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class _Files:
    """How far each file has been read; a file that is renamed meanwhile stays the same one."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[int, int], int] = {}

    def new_lines(self, path: str) -> list[bytes]:
        """The whole lines of the file that have come since it was last looked at."""
        try:
            with open(path, "rb") as file:
                info = os.fstat(file.fileno())
                identity = (info.st_dev, info.st_ino)
                offset = self._offsets.get(identity, 0)
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rpartition(b"\n")[0]
        self._offsets[identity] = offset + (len(whole) + 1 if whole else 0)
        return whole.splitlines()
