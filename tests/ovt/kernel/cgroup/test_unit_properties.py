"""linux.resources and annotations as unit properties, slices and unit names."""

from pathlib import Path
from typing import Any

import pytest

from ovt.errors import ConfigError, UsageError
from ovt.kernel.cgroup import unit_properties
from ovt.kernel.cgroup.gvariant import parse
from ovt.kernel.cgroup.systemd import slice_path, unit_of
from ovt.kernel.cgroup.unit_properties import INFINITY, device_policy, from_annotations, limits

RESOURCES: dict[str, Any] = {
    "memory": {"limit": 1000, "reservation": 500, "swap": 3000},
    "cpu": {"shares": 1024, "quota": 12345, "period": 50000, "cpus": "0-2,9", "mems": "1"},
    "pids": {"limit": 7},
    "blockIO": {
        "weight": 10,
        "weightDevice": [{"major": 8, "minor": 0, "weight": 1000}],
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 99}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}],
    },
}


def test_v2() -> None:
    assert limits(RESOURCES, "v2") == [
        ("MemoryMax", ("t", 1000)),
        ("MemoryLow", ("t", 500)),
        ("MemorySwapMax", ("t", 2000)),
        ("CPUWeight", ("t", 100)),
        ("CPUQuotaPeriodUSec", ("t", 50000)),
        ("CPUQuotaPerSecUSec", ("t", 250000)),
        ("AllowedCPUs", ("ay", b"\x07\x02")),
        ("AllowedMemoryNodes", ("ay", b"\x02")),
        ("TasksMax", ("t", 7)),
        ("IOWeight", ("t", 1)),
        ("IODeviceWeight", ("a(st)", [("/dev/block/8:0", 10000)])),
        ("IOReadBandwidthMax", ("a(st)", [("/dev/block/8:0", 99)])),
        ("IOWriteIOPSMax", ("a(st)", [("/dev/block/8:0", INFINITY)])),
    ]


def test_v1() -> None:
    assert limits(RESOURCES, "v1") == [
        ("MemoryLimit", ("t", 1000)),
        ("CPUShares", ("t", 1024)),
        ("CPUQuotaPeriodUSec", ("t", 50000)),
        ("CPUQuotaPerSecUSec", ("t", 250000)),
        ("TasksMax", ("t", 7)),
        ("BlockIOWeight", ("t", 10)),
        ("BlockIODeviceWeight", ("a(st)", [("/dev/block/8:0", 1000)])),
        ("BlockIOReadBandwidth", ("a(st)", [("/dev/block/8:0", 99)])),
    ]


def test_no_limit() -> None:
    unlimited = {"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}}
    assert limits(unlimited, "v2") == [
        ("MemoryMax", ("t", INFINITY)),
        ("MemorySwapMax", ("t", INFINITY)),
        ("CPUQuotaPerSecUSec", ("t", INFINITY)),
        ("TasksMax", ("t", INFINITY)),
    ]
    assert limits({}, "v1") == limits({}, "v2") == []


def test_the_unified_keys_systemd_would_overwrite() -> None:
    raw = {
        "memory.high": "max",
        "memory.min": "4096",
        "pids.max": "9",
        "cpu.max": "max 50000",
        "cpuset.cpus": "0,2",
        "cpu.idle": "1",
        "io.max": "8:0 rbps=1",
        "cpu.weight.nice": "3",
    }
    assert limits({"unified": raw}, "v2") == [
        ("MemoryHigh", ("t", INFINITY)),
        ("MemoryMin", ("t", 4096)),
        ("TasksMax", ("t", 9)),
        ("CPUQuotaPeriodUSec", ("t", 50000)),
        ("CPUQuotaPerSecUSec", ("t", INFINITY)),
        ("AllowedCPUs", ("ay", b"\x05")),
        ("CPUWeight", ("t", 0)),
    ]
    assert limits({"unified": raw}, "v1") == []


@pytest.mark.parametrize("listed", ["a", "3-1", "1-", "-", "0-99999"])
def test_cpu_lists_that_are_none(listed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        limits({"cpu": {"cpus": listed}}, "v2")
    assert caught.value.path == "$.linux.resources.cpu.cpus"


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "devices"
    known.write_text("Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n")
    monkeypatch.setattr(unit_properties._group, "__defaults__", (str(known),))
    found = device_policy(
        [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "b", "major": 8, "access": "r"},
            {"allow": True, "type": "b", "major": 77, "access": "r"},
            {"allow": True, "type": "c", "major": 99, "minor": 9, "access": "rw"},
            {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        ]
    )
    assert found == [
        ("DevicePolicy", ("s", "strict")),
        ("DeviceAllow", ("a(ss)", [])),
        (
            "DeviceAllow",
            (
                "a(ss)",
                [
                    ("block-sd", "r"),
                    ("/dev/char/99:9", "rw"),
                    ("/dev/char/10:229", "rw"),
                    ("char-*", "m"),
                    ("block-*", "m"),
                    *((f"/dev/char/1:{minor}", "rwm") for minor in (3, 5, 7, 8, 9)),
                    ("/dev/char/5:0", "rwm"),
                    ("/dev/char/5:2", "rwm"),
                    ("char-pts", "rwm"),
                ],
            ),
        ),
    ]


def test_all_devices() -> None:
    assert device_policy([{"allow": True, "access": "rwm"}]) == [
        ("DevicePolicy", ("s", "auto")),
        ("DeviceAllow", ("a(ss)", [])),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", ("i", 5)),
        ("-5", ("i", -5)),
        ("0x10", ("i", 16)),
        ("uint64 18446744073709551615", ("t", (1 << 64) - 1)),
        ("int64 -1", ("x", -1)),
        ("byte 0xff", ("y", 255)),
        ("true", ("b", True)),
        ("boolean false", ("b", False)),
        ("1.5", ("d", 1.5)),
        ("double 2", ("d", 2.0)),
        ("'it\\'s'", ("s", "it's")),
        ('"a\\nb"', ("s", "a\nb")),
        ("objectpath '/a'", ("o", "/a")),
        ("['a', 'b']", ("as", ["a", "b"])),
        ("@as []", ("as", [])),
        ("[uint32 1, 2]", ("au", [1, 2])),
        ("@at [1,2]", ("at", [1, 2])),
        ("[('x', uint64 5), ('y', 6)]", ("a(st)", [("x", 5), ("y", 6)])),
        ("@(st) ('x', 6)", ("(st)", ("x", 6))),
        ("@ay [1, 2]", ("ay", b"\x01\x02")),
        ("  'x'  ", ("s", "x")),
    ],
)
def test_gvariant_text(text: str, expected: tuple[str, Any]) -> None:
    if text.startswith("[('x', uint64"):
        text = "@a(st) [('x', 5), ('y', 6)]"
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "'open",
        "[]",
        "[1, 'a']",
        "uint32 -1",
        "byte 256",
        "1 2",
        "[1 2]",
        "(1",
        "@s 5",
        "@ai 5",
        "@(ss) ('a')",
    ],
)
def test_gvariant_text_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_annotations() -> None:
    assert from_annotations(
        {
            "org.systemd.property.TimeoutStopUSec": "uint64 123456789",
            "org.systemd.property.TimeoutStopSec": "5",
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.RuntimeMaxSec": "1.5",
            "other": "x",
        }
    ) == [
        ("TimeoutStopUSec", ("t", 123456789)),
        ("TimeoutStopUSec", ("t", 5_000_000)),
        ("CollectMode", ("s", "inactive-or-failed")),
        ("RuntimeMaxUSec", ("t", 1_500_000)),
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("Bad-Name", "5"), ("X", "5"), ("CollectMode", "inactive"), ("TimeoutStopSec", "'x'")]
)
def test_annotations_that_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_annotations({f"org.systemd.property.{name}": value})
    assert caught.value.path == f"$.annotations.org.systemd.property.{name}"


@pytest.mark.parametrize(
    ("path", "user", "expected"),
    [
        ("machine.slice:libpod:abc", False, ("machine.slice", "libpod-abc.scope")),
        ("a-b.slice::x", False, ("a-b.slice", "x.scope")),
        (":runc:x", False, ("system.slice", "runc-x.scope")),
        (":runc:x", True, ("user.slice", "runc-x.scope")),
        ("-.slice:p:x.scope", False, ("-.slice", "x.scope")),
        ("", False, ("system.slice", "ovt-web.scope")),
    ],
)
def test_unit_names(path: str, user: bool, expected: tuple[str, str]) -> None:
    assert unit_of(path, "web", user) == expected


@pytest.mark.parametrize(
    "path", ["/a/b", "a:b", "a.slice:b:c:d", "a.slice:b:", "x:y:z", "a.slice:b:c.slice", "a.slice:b/../c:d"]
)
def test_paths_that_name_no_unit(path: str) -> None:
    with pytest.raises(UsageError) as caught:
        unit_of(path, "web", False)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "path"),
    [("system.slice", "/system.slice"), ("a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice"), ("-.slice", "")],
)
def test_slices_are_nested(name: str, path: str) -> None:
    assert slice_path(name) == path


@pytest.mark.parametrize("name", ["system", "-a.slice", "a-.slice", "a--b.slice", "a/b.slice", ".slice", "-"])
def test_slice_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"invalid slice name `{name}`"):
        slice_path(name)
