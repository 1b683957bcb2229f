"""The kinds of JSON value that a schema table is built from: fast on good values, exact on the first bad one.

Not a JSON Schema implementation: only what the OCI runtime-spec needs. A node's `check` returns nothing or raises
`Fault`; each level that a fault passes on its way up adds its own part of the JSON path, so a good document pays
nothing for paths. As in the Go readers of these documents, a member that is null counts as absent, and is removed;
unknown members are left alone (spec: a runtime MUST NOT generate an error for them).
"""

from _json import encode_basestring_ascii

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import NoReturn


class Fault(Exception):
    """A value is not what the schema asks for; `path` is relative to the node that raised, outermost part last."""

    def __init__(self, message: str, *path: str) -> None:
        super().__init__(message)
        self.message = message
        self.path = list(path)

    def below(self, part: str) -> "Fault":
        """The same fault, seen from one level up."""
        self.path.append(part)
        return self

    def location(self, root: str) -> str:
        """The JSON path from `root`, such as `$.mounts[3].destination`."""
        return root + "".join(reversed(self.path))


def member(name: str) -> str:
    """The part of a JSON path that leads to an object's member."""
    plain = name.isascii() and name.isidentifier()
    return f".{name}" if plain else f"[{encode_basestring_ascii(name)}]"


def describe(value: object) -> str:
    """A short name of a JSON value for an error message."""
    if isinstance(value, str):
        shown = encode_basestring_ascii(value)
        return shown if len(shown) <= 80 else f'{shown[:76]}…"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)[:40]
    return {type(None): "null", list: "an array", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


def _refuse(expected: str, value: object) -> "NoReturn":
    raise Fault(f"must be {expected}, not {describe(value)}")


class Node:
    """One kind of value. `children` lists what it contains, for tests that account for every declared field."""

    __slots__ = ()

    def check(self, value: object) -> None:
        """Raises Fault unless `value` is of this kind."""
        raise NotImplementedError

    def children(self) -> "Iterator[tuple[str, Node]]":
        """Pairs of path part (`.name`, `[]` for the items of an array, `{}` for the values of a map) and node."""
        return iter(())


class Boolean(Node):
    """true or false."""

    __slots__ = ()

    def check(self, value: object) -> None:
        if value is not True and value is not False:
            _refuse("true or false", value)


class Integer(Node):
    """A whole number from `low` to `high`; true and 1.0 are not whole numbers."""

    __slots__ = ("high", "low")

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def check(self, value: object) -> None:
        if type(value) is not int:
            _refuse("an integer", value)
        if not self.low <= value <= self.high:
            _refuse(f"from {self.low} to {self.high}", value)


class String(Node):
    """A string without NUL bytes (none could reach the kernel); `form` returns what is wrong with one, or ""."""

    __slots__ = ("form",)

    def __init__(self, form: "Callable[[str], str] | None" = None) -> None:
        self.form = form

    def check(self, value: object) -> None:
        if type(value) is not str:
            _refuse("a string", value)
        if "\0" in value:
            raise Fault("must not contain a NUL byte")
        if self.form is not None:
            wrong = self.form(value)
            if wrong:
                raise Fault(f"{wrong}, not {describe(value)}")


class Choice(Node):
    """One of a few strings; `noun` names them in the message."""

    __slots__ = ("noun", "values")

    def __init__(self, noun: str, values: "Iterable[str]") -> None:
        self.noun = noun
        self.values = tuple(values)

    def check(self, value: object) -> None:
        if value not in self.values or type(value) is not str:
            if type(value) is not str:
                _refuse("a string", value)
            raise Fault(f"unknown {self.noun} {describe(value)}; one of {', '.join(filter(None, self.values))}")


class Array(Node):
    """A list of at least `minimum` items of one kind."""

    __slots__ = ("item", "minimum", "plain")

    def __init__(self, item: "Node", minimum: int = 0) -> None:
        self.item = item
        self.minimum = minimum
        self.plain = type(item) is String and item.form is None

    def children(self) -> "Iterator[tuple[str, Node]]":
        yield "[]", self.item

    def check(self, value: object) -> None:
        if type(value) is not list:
            _refuse("an array", value)
        if len(value) < self.minimum:
            raise Fault(f"must have at least {self.minimum} item")
        if self.plain:
            # one pass in C over the lists of names that make up most of a configuration
            try:
                if "\0" not in "".join(value):
                    return
            except TypeError:
                pass
        check = self.item.check
        index = 0
        try:
            for item in value:
                check(item)
                index += 1
        except Fault as fault:
            raise fault.below(f"[{index}]") from None


class Map(Node):
    """An object whose names are data: `form` returns what is wrong with a name, or ""."""

    __slots__ = ("form", "item")

    def __init__(self, item: "Node", form: "Callable[[str], str] | None" = None) -> None:
        self.item = item
        self.form = form

    def children(self) -> "Iterator[tuple[str, Node]]":
        yield "{}", self.item

    def check(self, value: object) -> None:
        if type(value) is not dict:
            _refuse("an object", value)
        _drop_nulls(value)
        for name, item in value.items():
            try:
                if "\0" in name:
                    raise Fault("the name must not contain a NUL byte")
                wrong = self.form(name) if self.form is not None else ""
                if wrong:
                    raise Fault(f"the name {wrong}")
                self.item.check(item)
            except Fault as fault:
                raise fault.below(member(name)) from None


class Object(Node):
    """An object with known members, of which `required` must be there; members that are not known are ignored."""

    __slots__ = ("fields", "required")

    def __init__(self, fields: "dict[str, Node]", required: tuple[str, ...] = ()) -> None:
        self.fields = fields
        self.required = required

    def children(self) -> "Iterator[tuple[str, Node]]":
        for name, node in self.fields.items():
            yield f".{name}", node

    def check(self, value: object) -> None:
        if type(value) is not dict:
            _refuse("an object", value)
        _drop_nulls(value)
        for name in self.required:
            if name not in value:
                raise Fault("is required", member(name))
        fields = self.fields
        for name, item in value.items():
            node = fields.get(name)
            if node is not None:
                try:
                    node.check(item)
                except Fault as fault:
                    raise fault.below(member(name)) from None


def _drop_nulls(value: dict[str, object]) -> None:
    if None in value.values():
        for name in [name for name, item in value.items() if item is None]:
            del value[name]
