"""JSON without the `json` package: what the machines' side reads (config.json, state.json) and writes.

Built on `_json`, the C half of `json`, because `import json` pulls in `re` and `enum` and costs 4 to 10 ms of the 20
that a container may take. It is not a general encoder: only the types that JSON itself has, no hooks, no sorting.
Stricter than `json` where a runtime must not guess: NaN, numbers beyond a double, unpaired surrogates and bytes that
are not UTF-8 are refused; every fault of the input is a ValueError of one line. Only a syntax error imports `json`.
"""

import posix
from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

DEFAULT_LIMIT = 16 << 20

_WHITESPACE = " \t\n\r"
_TOO_DEEP = "the values are nested too deeply"


def loads(text: str) -> "Any":
    """The value of a JSON document; a duplicate key keeps its last value.

    Raises ValueError `line 3, column 7: reason`, counted from 1, or the reason alone where it has no one place.
    """
    start = len(text) - len(text.lstrip(_WHITESPACE))
    try:
        value, end = _scan_document(text, start)
    except StopIteration as stop:
        raise _error(text, stop.value, "a value was expected" if text[start:] else "the document is empty") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        position = getattr(error, "pos", None)
        if position is None:
            raise
        raise _error(text, position, _reason(error)) from None
    rest = text[end:].lstrip(_WHITESPACE)
    if rest:
        raise _error(text, len(text) - len(rest), "there is more text after the document's end")
    if "\\u" in text:
        _refuse_surrogates(value)
    return value


def dumps(value: object, indent: int = 0) -> str:
    """`value` as JSON in ASCII: on one line, or with `indent` spaces a level when it is not 0.

    Raises TypeError for a type that JSON does not have, ValueError for NaN, infinity and endless nesting.
    """
    try:
        return "".join(_lines(value, indent, "\n")) if indent else "".join(_encode(value, 0))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def load_bytes(data: bytes) -> "Any":
    """The value of a JSON document in UTF-8, with or without a byte order mark. Raises ValueError."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    return loads(text.removeprefix("\ufeff"))


def load_file(path: str, limit: int = DEFAULT_LIMIT) -> "Any":
    """The value of the JSON file at `path`, at most `limit` bytes long.

    Raises OSError when it cannot be read, ValueError `PATH: reason` when it is too long or not JSON.
    """
    try:
        return load_bytes(read_file(path, limit))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_file(path: str, limit: int = DEFAULT_LIMIT) -> bytes:
    """The bytes of a file or pipe; ValueError once there are more than `limit`, OSError as the kernel says."""
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return read_fd(fd, limit)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        posix.close(fd)


def read_fd(fd: int, limit: int = DEFAULT_LIMIT) -> bytes:
    """The bytes left on a descriptor, which stays open; errors as `read_file`."""
    chunks: list[bytes] = []
    room = limit + 1
    while room:
        chunk = posix.read(fd, min(room, 1 << 18))
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        room -= len(chunk)
    raise ValueError(f"it is longer than {limit} bytes")


def _refuse_constant(name: str) -> "NoReturn":
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _integer(digits: str) -> int:
    # far above any field of the specification and below the interpreter's own limit, whose message names Python
    if len(digits) > 100:
        raise ValueError(f"the number {digits[:40]}… is too large")
    return int(digits)


class _Context:
    """What the C scanner reads its settings from."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = staticmethod(_finite)
    parse_int = staticmethod(_integer)
    parse_constant = staticmethod(_refuse_constant)


_context: "Any" = _Context()
_scan = make_scanner(_context)


def _scan_document(text: str, start: int) -> "tuple[Any, int]":
    try:
        return _scan(text, start)
    except SystemError:
        # Python 3.11 and 3.12: the scanner has no class to report a syntax error with until json.decoder is loaded
        import json.decoder  # noqa: F401

        return _scan(text, start)


def _refuse_type(value: object) -> "NoReturn":
    raise TypeError(f"JSON has no {type(value).__name__}")


_encode = make_encoder(None, _refuse_type, encode_basestring_ascii, None, ": ", ", ", False, False, False)


def _reason(error: "ValueError") -> str:
    message = str(getattr(error, "msg", error))
    return message[:1].lower() + message[1:].removesuffix(" at").removesuffix(" starting")


def _error(text: str, position: int, reason: str) -> "ValueError":
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return ValueError(f"line {line}, column {column}: {reason}")


def _refuse_surrogates(value: object) -> None:
    # "\ud800" alone has no UTF-8 form, and "\udc80" would become a raw byte in a path
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the string {encode_basestring_ascii(item)[:60]} has half a surrogate pair") from None
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _lines(value: object, indent: int, newline: str) -> list[str]:
    if isinstance(value, dict) and value:
        inner = newline + " " * indent
        out = ["{"]
        for key, item in value.items():
            out += [inner, encode_basestring_ascii(key), ": "]
            out += _lines(item, indent, inner)
            out.append(",")
        out[-1] = newline + "}"
        return out
    if isinstance(value, (list, tuple)) and value:
        inner = newline + " " * indent
        out = ["["]
        for item in value:
            out.append(inner)
            out += _lines(item, indent, inner)
            out.append(",")
        out[-1] = newline + "]"
        return out
    return list(_encode(value, 0))
