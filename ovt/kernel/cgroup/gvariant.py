"""Values in GVariant's text format, as annotations `org.systemd.property.NAME` hold them, to D-Bus variants.

Enough of the format for unit properties: numbers with or without a type word (`uint64 5`), booleans, strings, arrays,
tuples, and an explicit type in front (`@as []`). Not here: dictionaries, maybe types, byte strings.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_WORDS = {
    "boolean": "b",
    "byte": "y",
    "int16": "n",
    "uint16": "q",
    "int32": "i",
    "uint32": "u",
    "int64": "x",
    "uint64": "t",
    "double": "d",
    "string": "s",
    "objectpath": "o",
    "signature": "g",
}
_RANGES = {"y": (0, 8), "n": (1, 16), "q": (0, 16), "i": (1, 32), "u": (0, 32), "x": (1, 64), "t": (0, 64)}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a"}


def parse(text: str) -> tuple[str, Any]:
    """(signature, value) of `text`; ValueError says what is wrong and where (characters from 0)."""
    parser = _Parser(text)
    value = parser.value("")
    parser.space()
    if parser.at != len(text):
        raise ValueError(f"unexpected `{text[parser.at :]}` at {parser.at}")
    return value


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def space(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def word(self) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in " \t\n,[](){}'\"":
            self.at += 1
        return self.text[start : self.at]

    def value(self, wanted: str) -> tuple[str, Any]:
        """One value, of the type `wanted` where that is not empty."""
        self.space()
        start = self.text[self.at : self.at + 1]
        if start == "@":
            self.at += 1
            begin = self.at
            while self.at < len(self.text) and not self.text[self.at].isspace():
                self.at += 1
            return self.value(self.text[begin : self.at])
        if start in ("'", '"'):
            return self.typed(wanted, "s", "sog"), self.string(start)
        if start == "[":
            return self.array(wanted)
        if start == "(":
            return self.tuple(wanted)
        word = self.word()
        if word in _WORDS:
            return self.value(_WORDS[word])
        if word in ("true", "false"):
            return self.typed(wanted, "b", "b"), word == "true"
        return self.number(word, wanted)

    @staticmethod
    def typed(wanted: str, usual: str, possible: str) -> str:
        if wanted and wanted not in possible:
            raise ValueError(f"expected a value of type {wanted}")
        return wanted or usual

    def number(self, word: str, wanted: str) -> tuple[str, Any]:
        try:
            if wanted == "d" or (not wanted and "." in word):
                return "d", float(word)
            number, kind = int(word, 0), wanted or "i"
        except ValueError:
            raise ValueError(f"`{word or self.text[self.at :]}` is not a value") from None
        if kind not in _RANGES:
            raise ValueError(f"`{word}` is not of type {kind}")
        signed, bits = _RANGES[kind]
        if not -(signed << bits - 1) <= number < 1 << (bits - signed):
            raise ValueError(f"{number} does not fit type {kind}")
        return kind, number

    def string(self, quote: str) -> str:
        out: list[str] = []
        self.at += 1
        while self.at < len(self.text):
            letter = self.text[self.at]
            self.at += 1
            if letter == quote:
                return "".join(out)
            if letter == "\\":
                letter = self.text[self.at : self.at + 1]
                self.at += 1
                letter = _ESCAPES.get(letter, letter)
            out.append(letter)
        raise ValueError("the string has no end")

    def items(self, closing: str, kinds: list[str] | None, kind: str) -> list[tuple[str, Any]]:
        """The values up to `closing`: each of type `kind`, or of the one in its place in `kinds`."""
        found: list[tuple[str, Any]] = []
        self.at += 1
        while True:
            self.space()
            if self.text[self.at : self.at + 1] == closing:
                self.at += 1
                return found
            if kinds is not None and len(found) == len(kinds):
                raise ValueError("a tuple has more members than its type")
            found.append(self.value(kinds[len(found)] if kinds is not None else kind or _first(found)))
            self.space()
            mark = self.text[self.at : self.at + 1]
            if mark == ",":
                self.at += 1
            elif mark != closing:
                raise ValueError(f"expected `,` or `{closing}` at {self.at}")

    def array(self, wanted: str) -> tuple[str, Any]:
        if wanted and not wanted.startswith("a"):
            raise ValueError(f"an array is not of type {wanted}")
        found = self.items("]", None, wanted[1:])
        if not found and not wanted:
            raise ValueError("an empty array needs a type in front, such as @as")
        kind = wanted[1:] or found[0][0]
        if any(each != kind for each, _ in found):
            raise ValueError("the members of an array must have one type")
        values = [value for _, value in found]
        return "a" + kind, bytes(values) if kind == "y" else values

    def tuple(self, wanted: str) -> tuple[str, Any]:
        from ovt.kernel.cgroup.dbus_wire import split

        kinds = split(wanted[1:-1]) if wanted else None
        found = self.items(")", kinds, "")
        if kinds is not None and len(found) != len(kinds):
            raise ValueError("a tuple has fewer members than its type")
        return "(" + "".join([kind for kind, _ in found]) + ")", tuple([value for _, value in found])


def _first(found: list[tuple[str, Any]]) -> str:
    return found[0][0] if found and found[0][0] in _RANGES else ""
