"""The only place that prints: results to stdout, everything else to stderr; tables, JSON and templates.

A template is text with placeholders such as `{{.name}}` or `{{.limits.memory}}`, whose keys are those of the JSON
output; it has no logic. `table TEMPLATE` aligns its columns at tabs and puts a header above.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ovt.errors import UsageError

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


class Column(NamedTuple):
    """A column of the default table: header, key of the record, and how its value is shown."""

    header: str
    key: str
    show: Callable[[dict[str, Any]], str] | None = None


def result(text: str) -> None:
    """One line of what was asked for."""
    sys.stdout.write(text + "\n")


def flush() -> None:
    """Let a reader of a pipe see what was written so far."""
    sys.stdout.flush()


def note(text: str) -> None:
    """One line about what is being done."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")


def error(message: str, hint: str = "") -> None:
    """A failure and what to do next; in the order of what was written to stdout before."""
    sys.stdout.flush()
    sys.stderr.write(f"{paint('ovt:', 'red', sys.stderr)} {message}\n" + (f"  try: {hint}\n" if hint else ""))
    sys.stderr.flush()


def colourful(stream: Any) -> bool:
    """Whether to use colour on `stream` (no-color.org; FORCE_COLOR wins over what the stream is)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: Any = None) -> str:
    """`text` in a colour, if the stream (stdout) takes any."""
    if not colourful(stream or sys.stdout):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def show_json(value: Any) -> None:
    """A JSON document for people and programs."""
    result(json.dumps(value, indent=2, ensure_ascii=False))


def show_line(value: Any) -> None:
    """One JSON document of a stream, in one line, seen at once."""
    result(json.dumps(value, ensure_ascii=False))
    flush()


def show(
    records: Sequence[dict[str, Any]], columns: Sequence[Column], form: str = "table", header: bool = True
) -> None:
    """Print records: `table`, `json`, a template, or `table TEMPLATE`."""
    if form == "json":
        show_json(list(records))
    elif form in {"", "table"}:
        rows = [[_cell(record, column) for column in columns] for record in records]
        table(([column.header for column in columns] if header else None), rows)
    elif form.startswith(("table ", "table\t")):
        pieces = [parse_template(piece) for piece in _unescape(form[6:]).split("\t")]
        titles = [" ".join(key.rpartition(".")[2].upper() for _, key in piece if key) for piece in pieces]
        table(titles if header else None, [[fill(piece, record) for piece in pieces] for record in records])
    else:
        template = parse_template(_unescape(form))
        for record in records:
            result(fill(template, record))


def table(titles: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns; cut to the terminal's width, never in a pipe."""
    lines = [[_printable(cell) for cell in row] for row in rows]
    if titles is not None:
        lines.insert(0, list(titles))
    if not lines:
        return
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    limit = _width()
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        if limit and len(text) > limit:
            text = text[: limit - 1] + "…"
        result(paint(text, "bold") if titles is not None and number == 0 else text)


def parse_template(text: str) -> list[tuple[str, str]]:
    """(literal, key) pairs: each literal is followed by the value of its key, the last key is empty."""
    pieces = []
    rest = text
    while "{{" in rest:
        literal, _, rest = rest.partition("{{")
        inside, closed, rest = rest.partition("}}")
        key = inside.strip()
        if not closed or not key.startswith(".") or not key.strip("."):
            raise UsageError(f"template {text!r} is not complete", "placeholders are written {{.name}}")
        pieces.append((literal, key[1:]))
    pieces.append((rest, ""))
    return pieces


def fill(template: list[tuple[str, str]], record: dict[str, Any]) -> str:
    """The text of a template for one record; UsageError for a key that it does not have."""
    text = ""
    for literal, key in template:
        text += literal
        if key:
            value: Any = record
            for part in key.split("."):
                if not isinstance(value, dict) or part not in value:
                    known = ", ".join(value) if isinstance(value, dict) else "no keys at all"
                    raise UsageError(f"there is no {{{{.{key}}}}}", f"this output has {known}")
                value = value[part]
            text += value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text


def _cell(record: dict[str, Any], column: Column) -> str:
    if column.show is not None:
        return column.show(record)
    value = record.get(column.key)
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _unescape(text: str) -> str:
    return text.replace("\\t", "\t").replace("\\n", "\n")


def _printable(text: str) -> str:
    """Without control characters, which could rewrite the terminal: commands and names come from anywhere."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _width() -> int:
    if not sys.stdout.isatty():
        return 0
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 0
