"""D-Bus messages as bytes and back: marshalling by signature, the header, nothing about connections.

From the D-Bus Specification, "Type System" and "Message Protocol". Python values: int, bool, float, str; a list for an
array, a dict for an array of dictionary entries, bytes for `ay`; a tuple for a structure; (signature, value) for a
variant that goes out, the bare value for one that comes in. Messages go out little-endian, come in either way.
"""

from __future__ import annotations

from _struct import pack, unpack_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
# header fields, and their types
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)
_FIELD_TYPES = {PATH: "o", REPLY_SERIAL: "u", SIGNATURE: "g"}

_FIXED = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d", "h": "I"}
_SIZES = {"y": 1, "n": 2, "q": 2, "b": 4, "i": 4, "u": 4, "h": 4, "x": 8, "t": 8, "d": 8}
_ALIGNMENTS = {**_SIZES, "s": 4, "o": 4, "g": 1, "v": 1, "a": 4, "(": 8, "{": 8}

MAXIMUM = 1 << 27  # bytes of a message


def split(signature: str) -> list[str]:
    """The single complete types of a signature: `sa(sv)u` is [`s`, `a(sv)`, `u`]. ValueError where it is none."""
    types, at = [], 0
    while at < len(signature):
        end = _type_end(signature, at)
        types.append(signature[at:end])
        at = end
    return types


def _type_end(signature: str, at: int) -> int:
    code = signature[at : at + 1]
    if code == "a":
        return _type_end(signature, at + 1)
    if code in ("(", "{"):
        closing = ")" if code == "(" else "}"
        at += 1
        while signature[at : at + 1] != closing:
            at = _type_end(signature, at)
        return at + 1
    if not code or code not in _ALIGNMENTS:
        raise ValueError(f"not a D-Bus signature: {signature}")
    return at + 1


def marshal(signature: str, values: tuple[Any, ...] | list[Any]) -> bytes:
    """The body of a message of that signature."""
    out = bytearray()
    types = split(signature)
    if len(types) != len(values):
        raise ValueError(f"{len(values)} values for the D-Bus signature {signature}")
    for kind, value in zip(types, values, strict=True):
        _put(out, kind, value)
    return bytes(out)


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)


def _put(out: bytearray, kind: str, value: Any) -> None:
    code = kind[0]
    _pad(out, _ALIGNMENTS[code])
    if code in _FIXED:
        out += pack("<" + _FIXED[code], value)
    elif code in "so":
        raw = value.encode()
        out += pack("<I", len(raw)) + raw + b"\0"
    elif code == "g":
        raw = value.encode()
        out += bytes([len(raw)]) + raw + b"\0"
    elif code == "v":
        signature, inner = value
        _put(out, "g", signature)
        _put(out, signature, inner)
    elif code == "(":
        for member, item in zip(split(kind[1:-1]), value, strict=True):
            _put(out, member, item)
    elif code == "a":
        _put_array(out, kind[1:], value)
    else:
        raise ValueError(f"not a D-Bus type: {kind}")


def _put_array(out: bytearray, kind: str, value: Any) -> None:
    place = len(out)
    out += bytes(4)
    _pad(out, _ALIGNMENTS[kind[0]])  # not counted in the array's length
    start = len(out)
    if kind == "y":
        out += value
    elif kind[0] == "{":
        key_kind, value_kind = split(kind[1:-1])
        for key, item in value.items():
            _pad(out, 8)
            _put(out, key_kind, key)
            _put(out, value_kind, item)
    else:
        for item in value:
            _put(out, kind, item)
    out[place : place + 4] = pack("<I", len(out) - start)


class Reader:
    """Takes values off `data` from offset `at`; `order` is `<` or `>`."""

    __slots__ = ("at", "data", "order")

    def __init__(self, data: bytes, order: str = "<", at: int = 0) -> None:
        self.data = data
        self.order = order
        self.at = at

    def take(self, kind: str) -> Any:
        """The next value, which is of the single complete type `kind`."""
        code = kind[0]
        self.at += -self.at % _ALIGNMENTS[code]
        if code in _FIXED:
            value = unpack_from(self.order + _FIXED[code], self.data, self.at)[0]
            self.at += _SIZES[code]
            return bool(value) if code == "b" else value
        if code in "sog":
            length = self.take("y" if code == "g" else "u")
            text = self.data[self.at : self.at + length].decode()
            self.at += length + 1
            return text
        if code == "v":
            return self.take(self.take("g"))
        if code == "(":
            return tuple([self.take(member) for member in split(kind[1:-1])])
        return self._array(kind[1:])

    def _array(self, kind: str) -> Any:
        length = self.take("u")
        self.at += -self.at % _ALIGNMENTS[kind[0]]
        end = self.at + length
        if kind == "y":
            self.at = end
            return self.data[end - length : end]
        if kind[0] == "{":
            key_kind, value_kind = split(kind[1:-1])
            entries = {}
            while self.at < end:
                self.at += -self.at % 8
                key = self.take(key_kind)
                entries[key] = self.take(value_kind)
            return entries
        items = []
        while self.at < end:
            items.append(self.take(kind))
        return items


class Message:
    """`kind` is CALL, RETURN, ERROR or SIGNAL; `fields` the header fields by number; `body` the values."""

    __slots__ = ("body", "fields", "kind", "serial")

    def __init__(self, kind: int, serial: int, fields: dict[int, Any], body: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.serial = serial
        self.fields = fields
        self.body = body

    def encode(self) -> bytes:
        """The message as it goes over the wire; its fields must hold SIGNATURE if it has a body."""
        body = marshal(self.fields.get(SIGNATURE, ""), self.body)
        fields = [(code, (_FIELD_TYPES.get(code, "s"), value)) for code, value in self.fields.items()]
        out = bytearray(pack("<cBBBII", b"l", self.kind, 0, 1, len(body), self.serial))
        _put(out, "a(yv)", fields)
        _pad(out, 8)
        return bytes(out) + body


def message_length(start: bytes) -> int:
    """The length of the whole message whose first 16 bytes these are. ValueError where they begin no message."""
    order = {b"l": "<", b"B": ">"}.get(start[:1])
    if order is None:
        raise ValueError("not a D-Bus message")
    body, _, fields = unpack_from(order + "III", start, 4)
    length: int = 16 + fields + (-fields % 8) + body
    if length > MAXIMUM:
        raise ValueError(f"a D-Bus message of {length} bytes")
    return length


def decode(data: bytes) -> Message:
    """The message in `data`, which is exactly as long as `message_length` said."""
    order = "<" if data[:1] == b"l" else ">"
    reader = Reader(data, order, 12)
    fields = dict(reader.take("a(yv)"))
    reader.at += -reader.at % 8
    body = tuple([reader.take(kind) for kind in split(fields.get(SIGNATURE, ""))])
    return Message(data[1], unpack_from(order + "I", data, 8)[0], fields, body)
