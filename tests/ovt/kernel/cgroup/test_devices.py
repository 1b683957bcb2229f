"""Device rules: order, defaults, v1's files on a drawn tree, and the BPF program run by a small machine of our own."""

import itertools
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from ovt.errors import ConfigError, HostError
from ovt.kernel.cgroup import devices, ebpf
from ovt.kernel.cgroup.devices import ANY, MKNOD, READ, WRITE, Rule, compress, restrict_v1, rules

DENY_ALL = {"allow": False, "access": "rwm"}
ALLOW_ALL = {"allow": True, "access": "rwm"}
DEFAULTS = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
]


def decide(listed: list[Rule], kind: str, major: int, minor: int, access: int) -> bool:
    """The meaning of a rule list, spelled out: for each kind of access the last rule that matches."""
    for bit in (MKNOD, READ, WRITE):
        verdict = False
        for rule in listed:
            if (
                rule.kind in ("a", kind)
                and rule.major in (ANY, major)
                and rule.minor in (ANY, minor)
                and rule.access & bit
            ):
                verdict = rule.allow
        if access & bit and not verdict:
            return False
    return True


def run(code: bytes, kind: str, major: int, minor: int, access: int) -> bool:
    """Execute the instructions that ebpf.program emits, as the kernel's documentation describes them."""
    registers = [0] * 11
    context = struct.pack("<III", access << 16 | {"b": 1, "c": 2}[kind], major, minor)
    at = 0
    for _ in range(len(code)):
        op, pair, offset, value = struct.unpack_from("<BBhi", code, at * 8)
        target, source = pair & 15, pair >> 4
        at += 1
        if op == 0x61:
            assert source == 1
            registers[target] = struct.unpack_from("<I", context, offset)[0]
        elif op == 0xB7:
            registers[target] = value
        elif op == 0xBC:
            registers[target] = registers[source] & 0xFFFFFFFF
        elif op == 0x54:
            registers[target] &= value
        elif op == 0x74:
            registers[target] >>= value
        elif op == 0x15:
            at += offset if registers[target] == value else 0
        elif op == 0x55:
            at += offset if registers[target] != value else 0
        elif op == 0x95:
            return bool(registers[0])
        else:
            raise AssertionError(f"unknown instruction {op:#x}")
    raise AssertionError("the program does not end")


def random_rule(source: random.Random) -> Rule:
    numbers = [source.choice([ANY, 0, 1, 2]) for _ in range(2)]
    return Rule(source.random() < 0.5, source.choice("abc"), numbers[0], numbers[1], source.randrange(1, 8))


def test_the_program_decides_as_the_rules_do() -> None:
    source = random.Random(7)
    for _ in range(150):
        listed = [random_rule(source) for _ in range(source.randrange(0, 7))]
        code = ebpf.program(listed)
        for kind, major, minor, access in itertools.product("bc", (0, 1, 3), (0, 2), range(1, 8)):
            assert run(code, kind, major, minor, access) == decide(listed, kind, major, minor, access), listed


def test_the_program_of_no_rules_denies() -> None:
    assert ebpf.program([])[-16:] == bytes.fromhex("b700000000000000 9500000000000000")
    assert not run(ebpf.program([]), "c", 1, 3, READ)


def test_golden_program() -> None:
    code = ebpf.program([Rule(True, "c", 10, 229, READ | WRITE)])
    assert code.hex(" ", 8).split() == [
        "6112000000000000",  # r2 = context.access_type
        "bc23000000000000",
        "54020000ffff0000",  # r2: the type
        "7403000010000000",  # r3: the access
        "6114040000000000",  # r4: major
        "6115080000000000",  # r5: minor
        "5502060002000000",  # not a character device: on to the next rule
        "550405000a000000",
        "55050400e5000000",
        "5403000001000000",  # read and write are settled
        "5503020000000000",  # mknod was asked too: on
        "b700000001000000",
        "9500000000000000",
        "b700000000000000",
        "9500000000000000",
    ]


def test_nothing_before_a_universal_rule_counts() -> None:
    assert ebpf.program([Rule(True, "c", 1, 3), Rule(False), Rule(True, "b", 8)]) == ebpf.program(
        [Rule(False), Rule(True, "b", 8)]
    )


def test_the_default_devices_come_last_and_always_work() -> None:
    listed = rules([DENY_ALL, {"allow": False, "type": "c", "major": 1, "minor": 3, "access": "rwm"}])
    code = ebpf.program(listed)
    assert run(code, "c", 1, 3, READ | WRITE | MKNOD)
    assert run(code, "c", 136, 77, READ | WRITE)
    assert run(code, "b", 8, 0, MKNOD)
    assert not run(code, "b", 8, 0, READ)


@pytest.mark.parametrize(
    ("listed", "everything"),
    [
        ([ALLOW_ALL], True),
        ([DENY_ALL, ALLOW_ALL], True),
        ([ALLOW_ALL, {"allow": True, "type": "c", "major": 5}], True),
        ([ALLOW_ALL, {"allow": False, "type": "c", "major": 5}], False),
        ([{"allow": True, "type": "a", "access": "rw"}], False),
        ([], False),
        (None, False),
    ],
)
def test_whether_everything_is_allowed(listed: list[dict[str, Any]] | None, everything: bool) -> None:
    assert devices.allows_everything(rules(listed)) is everything


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ({"allow": True, "type": "x"}, "$.linux.resources.devices[0].type"),
        ({"allow": True, "type": "p"}, "$.linux.resources.devices[0].type"),
        ({"allow": True, "access": "rx"}, "$.linux.resources.devices[0].access"),
        ({"allow": True, "major": -2}, "$.linux.resources.devices[0].major"),
        ({"allow": True, "major": 4096}, "$.linux.resources.devices[0].major"),
        ({"allow": True, "minor": 1 << 20}, "$.linux.resources.devices[0].minor"),
    ],
)
def test_faulty_entries(entry: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules([entry])
    assert caught.value.path == path


def test_minus_one_and_absent_numbers_are_wildcards_and_u_is_a_character_device() -> None:
    (first, *_) = rules([{"allow": True, "type": "u", "major": 7, "minor": -1, "access": "w"}])
    assert repr(first) == "allow c 7:* w"


class TestV1:
    def tree(self, tmp_path: Path, content: str) -> Path:
        for name in ("devices.allow", "devices.deny"):
            (tmp_path / name).touch()
        (tmp_path / "devices.list").write_text(content)
        return tmp_path

    def writes(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        done: list[tuple[str, str]] = []
        monkeypatch.setattr(
            devices, "_write_lines", lambda path, lines: done.extend([(path.rpartition(".")[2], x) for x, _ in lines])
        )
        return done

    def test_a_new_container(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = self.writes(monkeypatch)
        restrict_v1(str(self.tree(tmp_path, "a *:* rwm\n")), [DENY_ALL])
        assert done == [("deny", "a"), *[("allow", line) for line in DEFAULTS]]

    def test_a_privileged_container_needs_no_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = self.writes(monkeypatch)
        restrict_v1(str(self.tree(tmp_path, "a *:* rwm\n")), [ALLOW_ALL])
        assert done == []

    def test_an_update_writes_the_difference(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = self.writes(monkeypatch)
        before = "\n".join([*DEFAULTS, "c 10:229 rw", "b 8:0 r"]) + "\n"
        restrict_v1(
            str(self.tree(tmp_path, before)),
            [DENY_ALL, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"}],
        )
        assert done == [("deny", "b 8:0 r"), ("allow", "c 10:229 m")]

    def test_from_denial_to_everything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = self.writes(monkeypatch)
        restrict_v1(str(self.tree(tmp_path, "c 1:3 rwm\n")), [ALLOW_ALL])
        assert done == [("allow", "a")]

    def test_everything_but(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = self.writes(monkeypatch)
        listed = [ALLOW_ALL, {"allow": False, "type": "b", "major": 8, "access": "w"}]
        restrict_v1(str(self.tree(tmp_path, "a *:* rwm\n")), listed)
        assert done == [("allow", "a"), ("deny", "b 8:* w")]

    def test_rules_add_up_and_take_away(self) -> None:
        target = compress(
            rules(
                [
                    DENY_ALL,
                    {"allow": True, "type": "c", "major": 10, "minor": 1, "access": "r"},
                    {"allow": True, "type": "c", "major": 10, "minor": 1, "access": "w"},
                    {"allow": True, "type": "b", "major": 8, "minor": 3, "access": "rw"},
                    {"allow": False, "type": "b", "major": 8, "access": "w"},
                ]
            )
        )
        assert target.entries[("c", 10, 1)] == READ | WRITE
        assert target.entries[("b", 8, 3)] == READ

    def test_what_v1_cannot_say_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"cannot deny c 10:229 rwm out of the range `c 10:\* rwm`"):
            compress(
                rules(
                    [
                        DENY_ALL,
                        {"allow": True, "type": "c", "major": 10, "access": "rwm"},
                        {"allow": False, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
                    ]
                )
            )

    def test_a_missing_hierarchy_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match=rf"linux.resources.devices: {tmp_path}/devices.list: No such file"):
            restrict_v1(str(tmp_path), [DENY_ALL])
