"""How slow steps are told to people: library code is given one of these functions and never prints by itself."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ovt.cli import output, values

Report = Callable[[str], None]


def reporter(quiet: bool) -> Report:
    """One line on stderr for each step; nothing when `quiet`."""
    if quiet:
        return lambda line: None
    return output.note


Progress = Callable[[int, int], None]  # (done, total) in bytes
_WIDTH = 30
_INTERVAL = 0.1  # seconds between two pictures


@contextmanager
def bar(quiet: bool, title: str) -> Iterator[Progress]:
    """A bar on stderr while something takes long, where that is a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda done, total: None
        return
    begun = shown = time.monotonic()

    def draw(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _INTERVAL:
            return
        shown = now
        part = min(1.0, done / total) if total else 0.0
        filled = round(part * _WIDTH)
        rate = f"{values.show_size(done / max(now - begun, 0.001))}/s"
        sizes = f"{values.show_size(done)} of {values.show_size(total)}"
        sys.stderr.write(f"\r\x1b[K{title} [{'#' * filled}{'.' * (_WIDTH - filled)}] {part:4.0%} {sizes} {rate}")
        sys.stderr.flush()

    try:
        yield draw
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
