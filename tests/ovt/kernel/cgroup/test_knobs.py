"""Order of writes whose values bound one another, and what a refused write says."""

import errno
import os
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel.cgroup import knobs
from ovt.kernel.cgroup.knobs import Knob, settle, write_knob


class Kernel:
    """memory.limit <= memory.memsw.limit, as the memory controller of v1 has it."""

    def __init__(self, limit: int, memsw: int) -> None:
        self.values = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": memsw}
        self.written: list[str] = []

    def write(self, path: str, value: str) -> None:
        name = os.path.basename(path)
        after = {**self.values, name: int(value)}
        if after["memory.limit_in_bytes"] > after["memory.memsw.limit_in_bytes"]:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        self.values = after
        self.written.append(name)


def memory(limit: int, swap: int) -> list[Knob]:
    return [
        Knob("memory", "memory.limit_in_bytes", str(limit), "memory.limit"),
        Knob("memory", "memory.memsw.limit_in_bytes", str(swap), "memory.swap"),
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [((100, 200), (300, 400)), ((300, 400), (100, 200)), ((100, 200), (150, 160)), ((100, 100), (100, 100))],
)
def test_raising_and_lowering_find_their_order(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int]
) -> None:
    kernel = Kernel(*before)
    monkeypatch.setattr(knobs, "write", kernel.write)
    settle(memory(*after), lambda knob: "/cg")
    assert tuple(kernel.values.values()) == after
    assert len(kernel.written) == 2


def test_values_that_contradict_end_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "write", Kernel(100, 100).write)
    with pytest.raises(HostError) as caught:
        settle(memory(300, 50), lambda knob: "/cg")
    assert str(caught.value) == (
        "cannot set linux.resources.memory.limit to `300`: write to /cg/memory.limit_in_bytes: Invalid argument"
    )
    assert caught.value.errno == errno.EINVAL and caught.value.hint


def test_a_missing_knob_names_file_key_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        settle([Knob("cpu", "cpu.idle", "1", "cpu.idle")], lambda knob: str(tmp_path))
    assert str(caught.value) == (
        f"cannot set linux.resources.cpu.idle to `1`: write to {tmp_path}/cpu.idle: No such file or directory"
    )
    assert "drop the key" in caught.value.hint


def test_optional_knobs_may_be_missing(tmp_path: Path) -> None:
    settle([Knob("cpu", "cpu.cfs_burst_us", "0", "cpu.burst", optional=True)], lambda knob: str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_other_file_with_its_own_value(tmp_path: Path) -> None:
    (tmp_path / "io.weight").touch()
    write_knob(Knob("io", "io.bfq.weight", "500", "blockIO.weight", other=("io.weight", "4950")), str(tmp_path))
    assert (tmp_path / "io.weight").read_text() == "4950"


def test_knobs_without_a_place_are_left_out() -> None:
    settle([Knob("pids", "pids.max", "max", "pids.limit", optional=True)], lambda knob: None)


def test_every_line_is_a_write_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(knobs, "write", lambda path, value: written.append(value))
    write_knob(Knob("io", "io.max", "8:0 rbps=1\n8:16 rbps=2\n", "unified.io.max"), "/cg")
    assert written == ["8:0 rbps=1", "8:16 rbps=2"]


def test_busy_memory_tells_the_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: str, value: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", path)

    (tmp_path / "memory.usage_in_bytes").write_text("5000\n")
    (tmp_path / "memory.max_usage_in_bytes").write_text("9000\n")
    monkeypatch.setattr(knobs, "write", busy)
    with pytest.raises(HostError, match=r"\(current usage: 5000, peak usage: 9000\)"):
        settle([Knob("memory", "memory.limit_in_bytes", "1", "memory.limit")], lambda knob: str(tmp_path))


def test_long_values_are_shortened(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        settle([Knob("io", "io.max", "x" * 500, "unified.io.max")], lambda knob: str(tmp_path))
    assert len(str(caught.value)) < 300
