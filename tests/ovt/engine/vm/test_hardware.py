"""The frozen hardware: what is chosen, what is refused, and its file."""

import json
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm.hardware import FILE, MEMORY_UNIT, Hardware, _topology
from ovt.errors import HostError, NotFound, OvtError, UsageError


def hardware(**changes: Any) -> Hardware:
    chosen: dict[str, Any] = {
        "machine": "pc-q35-7.2", "accel": "tcg", "cpu": "Nehalem", "vcpus": 1, "max_vcpus": 2, "sockets": 2,
        "cores": 1, "threads": 1, "memory": MEMORY_UNIT, "max_memory": 4 << 30, "firmware": "none", "uuid": "u",
        "generation": "g",
    }  # fmt: skip
    return Hardware(**{**chosen, **changes})


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("", 4, (4, 1, 1)),
        ("cores=2,threads=2", 8, (2, 2, 2)),
        ("sockets=1,cores=4", 4, (1, 4, 1)),
    ],
)
def test_topology(text: str, most: int, expected: tuple[int, int, int]) -> None:
    assert _topology(text, most) == expected


@pytest.mark.parametrize("text", ["cores", "cores=0", "cores=x", "dies=2", "cores=3", "sockets=3,cores=2", "cores=-1"])
def test_topology_that_does_not_fit(text: str) -> None:
    with pytest.raises(UsageError, match="topology"):
        _topology(text, 4)


def test_ports() -> None:
    machine = hardware(disks=[{"id": "root", "port": "rp0"}], nics=[{"id": "nic0", "port": "rp2"}])
    assert machine.take_port() == "rp1"
    machine.hostdevs += [{"id": "a", "port": "rp1"}, {"id": "b", "port": "rp3"}]
    with pytest.raises(HostError, match="all 4 places"):
        machine.take_port()
    machine.grow_ports()
    assert machine.ports == 8
    assert machine.take_port() == "rp4"
    assert machine.new_id("nic") == "nic1"
    assert machine.find("b")["port"] == "rp3"
    with pytest.raises(NotFound, match="no device 'c'"):
        machine.find("c")


def test_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not been started"):
        Hardware.load(str(tmp_path))
    machine = hardware(disks=[{"id": "root"}])
    machine.save(str(tmp_path))
    assert Hardware.load(str(tmp_path)) == machine
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    other = machine.copy()
    other.disks[0]["id"] = "changed"
    assert machine.disks == [{"id": "root"}]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"version": 1}', '{"version": 1, "strange": 2}'])
def test_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(OvtError, match="damaged"):
        Hardware.load(str(tmp_path))


def test_of_a_later_version(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({**hardware().pack(), "version": 2}))
    with pytest.raises(OvtError, match="version 2 is not known"):
        Hardware.load(str(tmp_path))
