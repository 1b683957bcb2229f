"""linux.resources.devices: which device nodes a container may open and make; as v1 files, or (ebpf.py) as a program.

Rules apply in their order, the last one that matches decides, for each of read, write and mknod by itself; what no
rule matches is denied. After the configuration's rules come DEFAULT_RULES: the spec's default devices always work.
"""

from __future__ import annotations

import posix
from errno import EINVAL, EPERM

from ovt.errors import ConfigError, HostError
from ovt.kernel.cgroup.files import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MKNOD, READ, WRITE = 1, 2, 4  # the kernel's BPF_DEVCG_ACC_*
EVERYTHING = MKNOD | READ | WRITE
_BITS = {"m": MKNOD, "r": READ, "w": WRITE}
ANY = -1


class Rule:
    """`kind` is `a`, `b` or `c`; `major` and `minor` may be ANY; `access` is a mask of MKNOD, READ and WRITE."""

    __slots__ = ("allow", "kind", "major", "minor", "access", "implicit")

    def __init__(
        self,
        allow: bool,
        kind: str = "a",
        major: int = ANY,
        minor: int = ANY,
        access: int = EVERYTHING,
        implicit: bool = False,
    ) -> None:
        self.allow = allow
        self.kind = kind
        self.major = major
        self.minor = minor
        self.access = access
        self.implicit = implicit

    @property
    def universal(self) -> bool:
        """Whether the rule matches every access to every device."""
        return self.kind == "a" and self.major == ANY and self.minor == ANY and self.access == EVERYTHING

    def __repr__(self) -> str:
        return f"{'allow' if self.allow else 'deny'} {text(self.kind, self.major, self.minor, self.access)}"


def text(kind: str, major: int, minor: int, access: int) -> str:
    """A rule in the words of v1's files: `c 1:3 rwm`."""
    numbers = ":".join(["*" if number == ANY else str(number) for number in (major, minor)])
    return f"{kind} {numbers} {''.join([letter for letter in 'rwm' if access & _BITS[letter]])}"


# mknod of anything is harmless where opening it is not allowed; then null, zero, full, random, urandom, tty, ptmx
# and every pseudo-terminal.
DEFAULT_RULES = (
    Rule(True, "c", access=MKNOD, implicit=True),
    Rule(True, "b", access=MKNOD, implicit=True),
    *(Rule(True, "c", 1, minor, implicit=True) for minor in (3, 5, 7, 8, 9)),
    Rule(True, "c", 5, 0, implicit=True),
    Rule(True, "c", 5, 2, implicit=True),
    Rule(True, "c", 136, implicit=True),
)


def rules(devices: list[dict[str, Any]] | None) -> list[Rule]:
    """The rules of linux.resources.devices with the default ones behind; ConfigError names the faulty entry."""
    result = [_rule(index, entry) for index, entry in enumerate(devices or ())]
    if not allows_everything(result):
        result += DEFAULT_RULES
    return result


def allows_everything(listed: list[Rule]) -> bool:
    """Whether nothing is left denied: the last rule that is universal allows, and no denial follows it."""
    for rule in reversed(listed):
        if not rule.allow:
            return False
        if rule.universal:
            return True
    return False


def _rule(index: int, entry: dict[str, Any]) -> Rule:
    path = f"$.linux.resources.devices[{index}]"
    kind = entry.get("type") or "a"
    if kind == "u":
        kind = "c"
    if kind not in ("a", "b", "c"):
        raise ConfigError(f"{path}.type", f"unknown device type `{kind}` (a, b or c)")
    access = 0
    for letter in entry.get("access") or "rwm":
        if letter not in _BITS:
            raise ConfigError(f"{path}.access", f"unknown access `{letter}` (a composition of r, w and m)")
        access |= _BITS[letter]
    numbers = []
    for key, highest in (("major", 0xFFF), ("minor", 0xFFFFF)):
        number = entry.get(key)
        if number is None or number == -1:
            number = ANY
        elif not 0 <= number <= highest:
            raise ConfigError(f"{path}.{key}", f"device number {number} is out of range (0 to {highest})")
        numbers.append(number)
    return Rule(bool(entry.get("allow")), kind, numbers[0], numbers[1], access)


Key = tuple[str, int, int]


class Exceptions:
    """v1's model of a rule list: a default, and devices that are excepted from it with an access mask."""

    __slots__ = ("allow", "entries", "implicit")

    def __init__(self, allow: bool = False) -> None:
        self.allow = allow
        self.entries: dict[Key, int] = {}
        self.implicit: set[Key] = set()

    def add(self, rule: Rule) -> None:
        """Put one more rule behind; ConfigError where v1 has no words for the result."""
        if rule.universal:
            self.allow = rule.allow
            self.entries.clear()
            return
        for kind in "bc" if rule.kind == "a" else rule.kind:
            key = (kind, rule.major, rule.minor)
            if rule.allow == self.allow:
                self._take_back(key, rule)
            else:
                if rule.implicit and key not in self.entries:
                    self.implicit.add(key)
                self.entries[key] = self.entries.get(key, 0) | rule.access

    def _take_back(self, key: Key, rule: Rule) -> None:
        for other, access in list(self.entries.items()):
            if not access & rule.access or other[0] != key[0]:
                continue
            if _covers(key, other):
                self.entries[other] = access & ~rule.access
                if not self.entries[other]:
                    del self.entries[other]
            elif _covers(other, key) or _covers((key[0], key[1], ANY), other):
                raise ConfigError(
                    "$.linux.resources.devices",
                    f"cgroup v1 cannot {rule!r} out of the range `{text(*other, access)}`",
                    "list the devices of the range one by one",
                )


def _covers(wide: Key, narrow: Key) -> bool:
    return wide[0] == narrow[0] and wide[1] in (ANY, narrow[1]) and wide[2] in (ANY, narrow[2])


def compress(listed: list[Rule]) -> Exceptions:
    """The default and the exceptions that amount to the rules."""
    target = Exceptions()
    for rule in listed:
        target.add(rule)
    return target


def parse_list(content: str) -> Exceptions:
    """The present state, from devices.list; the exceptions of a cgroup that allows by default are not told there."""
    state = Exceptions()
    for line in content.splitlines():
        kind, numbers, access = line.split()
        if kind == "a":
            return Exceptions(True)
        major, minor = [ANY if number == "*" else int(number) for number in numbers.split(":")]
        state.entries[(kind, major, minor)] = sum([_BITS[letter] for letter in access])
    return state


def restrict_v1(directory: str, devices: list[dict[str, Any]] | None) -> None:
    """Bring the devices cgroup `directory` to the rules by the fewest writes; no moment is laxer than both states."""
    target = compress(rules(devices))
    try:
        current = parse_list(read(directory + "/devices.list"))
        allow: list[tuple[str, bool]] = []
        deny: list[tuple[str, bool]] = []
        if current.allow != target.allow or (target.allow and target.entries):
            current = Exceptions(target.allow)
            (allow if target.allow else deny).append(("a", False))
        for key, access in current.entries.items():
            surplus = access & ~target.entries.get(key, 0)
            if surplus:
                (allow if target.allow else deny).append((text(*key, surplus), False))
        for key, access in target.entries.items():
            missing = access & ~current.entries.get(key, 0)
            if missing:
                (deny if target.allow else allow).append((text(*key, missing), key in target.implicit))
        first, second = ("/devices.allow", allow), ("/devices.deny", deny)
        for name, lines in (first, second) if target.allow else (second, first):
            _write_lines(directory + name, lines)
    except OSError as error:
        raise HostError(
            f"cannot set linux.resources.devices: {error.filename}: {error.strerror}",
            error.errno or 0,
            {
                EPERM: "the parent cgroup forbids that device: allow it there, or drop the rule",
                EINVAL: "the cgroup has children, so its default cannot change: remove them first",
            }.get(error.errno or 0, "check that the devices hierarchy of cgroup v1 is mounted read-write"),
        ) from error


def _write_lines(path: str, lines: list[tuple[str, bool]]) -> None:
    if not lines:
        return
    fd = posix.open(path, posix.O_WRONLY | posix.O_CLOEXEC)
    try:
        for line, implicit in lines:
            try:
                posix.write(fd, line.encode())
            except OSError as error:
                # Inside another container the parent may not have a default device; nobody asked for it here.
                if implicit and error.errno == EPERM:
                    continue
                error.filename = f"write `{line}` to {path}"
                raise
    finally:
        posix.close(fd)


def restrict_v2(directory: str, devices: list[dict[str, Any]] | None) -> None:
    """Bring the v2 cgroup `directory` to the rules: one program that replaces the one before, or none at all."""
    listed = rules(devices)
    from ovt.kernel.cgroup import ebpf

    ebpf.install(directory, None if allows_everything(listed) else ebpf.program(listed))
