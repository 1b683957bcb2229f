"""The journal of what happened to instances: one JSON object a line, appended by whoever did it, followed by anyone.

    {"time": 1763827200.5, "event": "start", "id": "0123456789ab", "name": "web", …}

It is a record for people and programs that watch, not the store: nothing is ever decided by it. A line is one
write(2) in append mode, so lines of several writers do not mix.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

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

    def read(self, since: float = 0.0, until: float = 0.0, follow: bool = False) -> Iterator[dict[str, Any]]:
        """Events with since <= time < until (seconds since the epoch; until 0: no end), oldest first.

        `follow` goes on with new ones, over the change of files, until `until` has passed.
        """
        for path in (self.older, self.path):
            if path == self.path and follow:
                yield from self._follow(since, until)
                return
            try:
                with open(path, "rb") as file:
                    yield from _select(file, since, until)
            except FileNotFoundError:
                continue

    def _follow(self, since: float, until: float) -> Iterator[dict[str, Any]]:
        while not until or time.time() < until:
            try:
                file = open(self.path, "rb")
            except FileNotFoundError:
                time.sleep(_POLL)
                continue
            with file:
                while not until or time.time() < until:
                    position = file.tell()
                    lines = file.readlines()
                    if lines and not lines[-1].endswith(b"\n"):
                        file.seek(position + sum(map(len, lines[:-1])))
                        lines.pop()
                    yield from _select(lines, since, until)
                    if not lines:
                        if _replaced(self.path, file.fileno()):
                            break
                        time.sleep(_POLL)


def _replaced(path: str, fd: int) -> bool:
    try:
        return not os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return True


def _select(lines: Any, since: float, until: float) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a full disk: later lines are whole again
        if event["time"] >= since and (not until or event["time"] < until):
            yield event
