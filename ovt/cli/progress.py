"""How slow steps are told to people: library code is given one of these functions and never prints by itself."""

from __future__ import annotations

from collections.abc import Callable

from ovt.cli import output

Report = Callable[[str], None]


def reporter(quiet: bool) -> Report:
    """One line on stderr for each step; nothing when `quiet`."""
    if quiet:
        return lambda line: None
    return output.note
