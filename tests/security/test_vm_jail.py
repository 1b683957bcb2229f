"""What the QEMU of a real machine may do and see, as the kernel tells it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ovt.cli.place import Place

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Where the state is, and /proc/PID of two machines' QEMU; their guests need not have booted."""
    place = Place(tmp_path)
    before = emulators()
    try:
        for name in ("one", "two"):
            place("run", "--vm", "-d", "--name", name, "--memory", "128M", "busybox", "sleep", "1000", timeout=120)
        yield tmp_path, sorted(emulators() - before)
    finally:
        for name in place.out("ps", "-a", "--format", "{{.name}}").split():
            place("delete", "--force", name)
        place.nothing_left()


def emulators() -> set[Path]:
    return {path.parent for path in Path("/proc").glob("[0-9]*/comm") if path.read_text().startswith("qemu-system")}


def test_qemu_may_nothing_and_sees_nothing(machines: tuple[Path, list[Path]]) -> None:
    state, processes = machines
    assert len(processes) == 2
    users = set()
    for process in processes:
        lines = (line.partition(":") for line in (process / "status").read_text().splitlines())
        status = {key: value.split() for key, _, value in lines}
        assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == int(status["CapBnd"][0], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
        assert len(set(status["Uid"])) == 1
        users.add(int(status["Uid"][0]))
        for kind in ("mnt", "pid", "ipc", "uts"):
            assert os.readlink(process / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
        assert not os.path.lexists(f"{process}/root{state}")
        root = next(line.split() for line in (process / "mountinfo").read_text().splitlines() if line.split()[4] == "/")
        assert "ro" in root[5].split(",")
        command = (process / "cmdline").read_bytes()
        assert os.fsencode(state) not in command
        core = next(line for line in (process / "limits").read_text().splitlines() if line.startswith("Max core"))
        assert core.split()[4:6] == ["0", "0"]
    assert len(users) == 2
    assert 0 not in users
