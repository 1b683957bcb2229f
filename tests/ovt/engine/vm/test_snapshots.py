"""Snapshots with a real QEMU, alive, stopped and killed; content is checked by patterns on the disks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.engine.vm import saved, snapshot_changes, snapshots
from ovt.engine.vm import snapshot_live as live
from ovt.engine.vm.agent import AgentError
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import QmpError
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, UsageError
from tests.ovt.engine.vm import snapshot_machine
from tests.ovt.engine.vm.snapshot_machine import CHUNK, Machine

pytestmark = pytest.mark.qemu
NEW = "33333333-3333-4333-8333-333333333333"
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> snapshot_machine.Features:
    return snapshot_machine.features(tmp_path_factory.mktemp("known"))


@pytest.fixture
def machine(tmp_path: Path, known: snapshot_machine.Features) -> Iterator[Machine]:
    made = Machine(tmp_path / "home", known)
    yield made
    made.kill()


@pytest.fixture
def big(tmp_path: Path, known: snapshot_machine.Features) -> Iterator[Machine]:
    """Two disks and UEFI variables."""
    made = Machine(tmp_path / "home", known, uefi=True, count=2)
    yield made
    made.kill()


def take(machine: Machine, name: str, **options: object) -> None:
    snapshots.take(machine.home, machine.qmp, machine.features, name, **options)  # type: ignore[arg-type]


def files(machine: Machine) -> set[str]:
    """Images in the machine's home."""
    return {f"disks/{name}" for name in os.listdir(f"{machine.home}/disks")}


def owned(machine: Machine) -> set[str]:
    """Images that a chain has."""
    tree = snapshot_changes.read(machine.home)
    states = [machine.hardware.pack(), *(entry.hardware for entry in tree.snapshots)]
    found = {layer["path"] for state in states for disk in state["disks"] for layer in disk["chain"]}
    return {path for path in found if not path.startswith("/")}


# Taking and going back


@pytest.mark.parametrize("alive", [True, False])
def test_what_was_there_comes_back(big: Machine, alive: bool) -> None:
    if alive:
        big.start()
    big.write(1)
    big.write(2, number=1)
    take(big, "a", description="first")
    big.write(3)
    big.write(4, number=1)
    assert big.reads(3)
    big.stop()
    assert "snapshot 'a'" in snapshots.lost(big.home)
    snapshots.restore(big.home, "a", NEW)
    assert big.reads(1)
    assert big.reads(2, number=1)
    assert big.reads(ord("B"), at=0, number=0, length=512) is False
    assert big.hardware.generation == NEW
    assert big.hardware.uuid == "11111111-1111-4111-8111-111111111111"
    assert files(big) == owned(big)
    big.start()
    assert big.reads(1)


def test_the_uefi_variables_go_back_too(big: Machine) -> None:
    qmp = big.start()

    def io(words: str) -> str:
        before = Path(big.home, "said").stat().st_size
        qmp.command("human-monitor-command", {"command-line": f'qemu-io -d /machine/system.flash1 "{words}"'})
        return Path(big.home, "said").read_text()[before:]

    assert "wrote" in io("write -P 7 0 4096")
    take(big, "a")
    assert "wrote" in io("write -P 8 0 4096")
    take(big, "b", memory=True)
    big.stop()
    vars_ = [(f"{big.home}/nvram.qcow2", "qcow2")]
    snapshots.restore(big.home, "a", NEW)
    assert "verification failed" not in snapshot_machine.image_io(vars_, "read -P 7 0 4096")
    snapshots.restore(big.home, "b", NEW)
    assert "verification failed" not in snapshot_machine.image_io(vars_, "read -P 8 0 4096")


def test_memory_goes_on_where_it_was(machine: Machine) -> None:
    qmp = machine.start()
    address = 0x1000000
    assert qmp.command("query-status")["running"]
    machine.write(1)
    take(machine, "warm", memory=True)
    assert qmp.command("query-status")["running"]
    machine.write(2)
    before = qmp.command("human-monitor-command", {"command-line": f"xp /4xb {address}"})
    machine.stop()
    snapshots.restore(machine.home, "warm", NEW)
    hardware, _ = saved.read(machine.home)
    assert hardware.pack() == machine.hardware.pack()
    qmp = machine.start()  # the records of devices would not fit, were it not the same machine
    assert qmp.command("query-status")["running"]
    assert qmp.command("human-monitor-command", {"command-line": f"xp /4xb {address}"}) == before
    assert machine.reads(1)
    assert not saved.exists(machine.home)
    assert os.path.exists(f"{machine.home}/snapshots/1/memory")  # it can be gone back to again
    machine.stop()
    snapshots.restore(machine.home, "warm", NEW)
    snapshots.take(machine.home, None, machine.features, "later")
    assert saved.read(machine.home)[0].disks == machine.hardware.disks  # what was saved knows its new images
    snapshots.restore(machine.home, "later", NEW)
    assert not saved.exists(machine.home)


def test_a_tree(machine: Machine) -> None:
    machine.write(1)
    take(machine, "a")
    machine.write(2)
    take(machine, "b")
    snapshots.restore(machine.home, "a", NEW)
    machine.write(3)
    take(machine, "c")
    listed = {entry["name"]: entry for entry in snapshots.listing(machine.home)}
    assert [(name, entry["parent"], entry["depth"]) for name, entry in listed.items()] == [
        ("a", "", 0),
        ("b", "a", 1),
        ("c", "a", 1),
    ]
    assert listed["c"]["current"]
    assert listed["b"]["size"] >= CHUNK
    for name, value in (("b", 2), ("c", 3), ("a", 1)):
        snapshots.restore(machine.home, name, NEW)
        assert machine.reads(value)
    assert files(machine) == owned(machine)


# Deleting


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("order", ["0123", "3210", "1203"])
def test_deleting_in_any_order_changes_nothing_that_is_left(
    tmp_path: Path, known: snapshot_machine.Features, order: str, direct: bool
) -> None:
    machine = Machine(tmp_path / "home", known, direct=direct)
    try:
        machine.start()
        for number in range(4):
            machine.write(number + 1, at=(number + 1) << 20, length=CHUNK << (2 * (number % 2)))
            machine.write(number + 1, at=8 << 20)
            take(machine, f"s{number}")
            if number == 1:  # so that some images are opened again and some are not
                machine.stop()
                machine.start()
        machine.write(9, at=8 << 20)
        for number in order:
            snapshots.delete(machine.home, machine.qmp, f"s{number}")
            assert all(machine.reads(n + 1, at=(n + 1) << 20) for n in range(4))
            assert machine.reads(9, at=8 << 20)
            assert machine.reads(ord("B"))
            assert files(machine) == owned(machine)
            for left in snapshots.listing(machine.home):
                path = Path(machine.home, str(left["disks"]["disk0"]))
                assert path.exists()
        assert len(machine.disk()["chain"]) == (1 if direct else 2)
        machine.stop()
        assert all(machine.reads(n + 1, at=(n + 1) << 20) for n in range(4))
    finally:
        machine.kill()


def test_branches_keep_what_they_share_until_there_is_one(machine: Machine) -> None:
    machine.write(1)
    take(machine, "a")
    machine.write(2)
    take(machine, "b")
    snapshots.restore(machine.home, "a", NEW)
    machine.write(3, at=1 << 20)
    take(machine, "c")
    machine.start()
    snapshots.delete(machine.home, machine.qmp, "a")
    assert "disks/disk0.qcow2" in files(machine)
    assert machine.reads(1)
    snapshots.delete(machine.home, machine.qmp, "b")  # now one stands on it: merged under the running guest
    assert len(machine.disk()["chain"]) == 3
    assert machine.reads(1)
    assert machine.reads(3, at=1 << 20)
    assert files(machine) == owned(machine)


def test_a_branch_that_no_guest_has_open_is_merged_beside_it(machine: Machine) -> None:
    take(machine, "a")
    machine.write(2)
    take(machine, "b")
    machine.write(3, at=1 << 20)
    take(machine, "c")
    snapshots.restore(machine.home, "a", NEW)
    machine.start()
    snapshots.delete(machine.home, machine.qmp, "b")
    assert files(machine) == owned(machine)
    machine.stop()
    snapshots.restore(machine.home, "c", NEW)
    assert machine.reads(2)
    assert machine.reads(3, at=1 << 20)


def test_a_snapshot_that_clones_stand_on_stays(machine: Machine) -> None:
    take(machine, "a")
    tree = snapshot_changes.read(machine.home)
    pinned = tree.put(tree.find("a")._replace(dependants={"0" * 12: "copy"}))
    snapshot_changes.write(machine.home, pinned)
    with pytest.raises(Conflict, match="copy"):
        snapshots.delete(machine.home, None, "a")
    assert snapshot_changes.read(machine.home) == pinned


def test_a_merge_that_is_cancelled(machine: Machine) -> None:
    qmp = machine.start()
    machine.write(1, length=1 << 20)
    take(machine, "a")
    machine.write(2, at=1 << 20)

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshots.delete(machine.home, qmp, "a", interrupt)
    assert not qmp.command("query-jobs")
    assert qmp.command("query-status")["running"]
    assert len(machine.disk()["chain"]) == len(live.nodes(qmp, machine.disk())) == 3
    assert snapshots.collapse(machine.home, qmp) == 1
    assert machine.reads(1, length=1 << 20)
    assert machine.reads(2, at=1 << 20)


def test_a_machine_that_was_paused_stays_so(machine: Machine) -> None:
    qmp = machine.start()
    qmp.command("stop")
    machine.write(1)
    take(machine, "warm", memory=True)
    assert not qmp.command("query-status")["running"]
    machine.write(2)
    take(machine, "b")
    snapshots.delete(machine.home, qmp, "warm")
    assert not qmp.command("query-status")["running"]
    qmp.command("cont")
    assert machine.reads(2)
    machine.stop()
    snapshots.restore(machine.home, "b", NEW)
    assert machine.reads(2)


@pytest.mark.parametrize("where", ["", "freeze", "switch", "thaw"])
def test_a_guest_is_thawed_whatever_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    said: list[str] = []

    class Guest:
        """An agent that fails at one command."""

        def need(self, name: str, what: str) -> None:
            said.append(f"need {name}")

        def command(self, name: str, *rest: object, timeout: float | None = None, **more: object) -> int:
            said.append(name.removeprefix("guest-fsfreeze-"))
            if where and name.endswith(where) and said.count(said[-1]) == 1:
                raise AgentError(f"{name}: no")
            return 1

    real = live.switch

    def switch(*arguments: object) -> None:
        assert said[-1] == "freeze"
        if where == "switch":
            raise QmpError("transaction: no")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(live, "switch", switch)
    qmp = machine.start()
    machine.write(1)
    if where in ("freeze", "switch"):
        with pytest.raises(OvtError, match="no"):
            take(machine, "a", agent=Guest())
        assert snapshot_changes.read(machine.home).snapshots == ()
        assert len(live.nodes(qmp, machine.disk())) == 2
    else:
        take(machine, "a", agent=Guest())
        assert snapshot_changes.read(machine.home).find("a").quiesced
    assert said[-1] == "thaw"
    assert files(machine) == owned(machine)
    assert machine.reads(1)


def test_a_disk_with_a_thread_and_limits_of_its_own(tmp_path: Path, known: snapshot_machine.Features) -> None:
    machine = Machine(tmp_path / "home", known)
    hardware = machine.hardware
    hardware.disks[0] |= {"iothread": True, "iops": 5000}
    hardware.save(machine.home)
    try:
        machine.start()
        for number in range(3):
            machine.write(number + 1, at=number << 20)
            take(machine, f"s{number}", memory=number == 1)
        for name in ("s0", "s2", "s1"):
            snapshots.delete(machine.home, machine.qmp, name)
        assert all(machine.reads(number + 1, at=number << 20) for number in range(3))
        assert len(machine.disk()["chain"]) == 2
    finally:
        machine.kill()


# What cannot be


def test_what_cannot_be_is_said_and_changes_nothing(machine: Machine) -> None:
    take(machine, "a")
    before = snapshot_changes.read(machine.home).pack(), machine.hardware.pack(), files(machine)
    with pytest.raises(Conflict, match="'a'"):
        take(machine, "a")
    with pytest.raises(StateError, match="not running"):
        take(machine, "b", memory=True)
    with pytest.raises(NotFound, match="no snapshot 'z'"):
        snapshots.restore(machine.home, "z", NEW)
    with pytest.raises(NotFound, match="no snapshot 'z'"):
        snapshots.delete(machine.home, None, "z")
    Path(machine.home, "disks/disk0.s2.qcow2").touch()
    with pytest.raises(Conflict, match="in the way"):
        take(machine, "b")
    Path(machine.home, "disks/disk0.s2.qcow2").unlink()
    assert (snapshot_changes.read(machine.home).pack(), machine.hardware.pack(), files(machine)) == before


def test_a_machine_without_disks_of_its_own(tmp_path: Path, known: snapshot_machine.Features) -> None:
    machine = Machine(tmp_path / "home", known, count=0)
    with pytest.raises(UsageError, match="no disk"):
        take(machine, "a")
    machine.start()
    try:
        take(machine, "a", memory=True)
        machine.stop()
        snapshots.restore(machine.home, "a", NEW)
        assert machine.start().command("query-status")["running"]
    finally:
        machine.kill()


def test_an_image_that_has_vanished_is_named(machine: Machine) -> None:
    take(machine, "a")
    os.rename(f"{machine.home}/disks/disk0.qcow2", f"{machine.home}/elsewhere")
    for action in (
        lambda: take(machine, "b"),
        lambda: snapshots.restore(machine.home, "a", NEW),
    ):
        with pytest.raises(NotFound, match=r"disks/disk0\.qcow2 has vanished"):
            action()
    os.rename(f"{machine.home}/elsewhere", f"{machine.home}/disks/disk0.qcow2")
    snapshots.restore(machine.home, "a", NEW)


def test_damaged_records_are_named(machine: Machine) -> None:
    take(machine, "a")
    Path(machine.home, snapshot_changes.TREE).write_text("{")
    with pytest.raises(OvtError, match=r"tree\.json is damaged"):
        snapshots.listing(machine.home)


@pytest.mark.root
def test_a_full_disk(tmp_path: Path, known: snapshot_machine.Features) -> None:
    """Each step on a file system that becomes full: one error, the guest goes on, nothing is left."""
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(tmp_path / "small")], check=True)
    machine = Machine(tmp_path / "small/home", known)
    try:
        qmp = machine.start()
        machine.write(1, length=1 << 20)
        take(machine, "a")
        machine.write(2, at=1 << 20, length=1 << 20)
        filler = tmp_path / "small/filler"
        room = os.statvfs(tmp_path / "small").f_bavail * 4096
        filler.write_bytes(bytes(room - (128 << 10)))
        before = snapshot_changes.read(machine.home), machine.hardware.pack(), files(machine)
        with pytest.raises(HostError, match=r"(?i)no space left"):
            take(machine, "warm", memory=True)
        assert qmp.command("query-status")["running"]
        filler.write_bytes(bytes(room))
        with pytest.raises(OvtError, match=r"(?i)no space left"):
            take(machine, "b")
        assert (snapshot_changes.read(machine.home), machine.hardware.pack(), files(machine)) == before
        filler.write_bytes(bytes(room - (64 << 10)))  # enough for the records
        with pytest.raises(QmpError, match="No space left"):
            snapshots.delete(machine.home, qmp, "a")
        assert machine.reads(1)
        assert machine.reads(2, at=1 << 20)
        filler.unlink()
        assert snapshots.collapse(machine.home, qmp) == 1
        assert machine.reads(1)
        assert machine.reads(2, at=1 << 20)
        assert files(machine) == owned(machine)
    finally:
        machine.kill()
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


# Commands that are killed

_VICTIM = """
import json, os, sys
from pathlib import Path
from ovt.engine.vm import snapshots, snapshot_changes, snapshot_live, memory_state
from ovt.engine.vm.qmp import Qmp
from ovt.image import disk as images
from tests.ovt.engine.vm import snapshot_machine
home, where, verb, fd, tmp = sys.argv[1:]
known = snapshot_machine.features(Path(tmp))

def kill(): os.kill(os.getpid(), 9)

def at(module, name, after):
    real = getattr(module, name)
    def wrapper(*a, **k):
        if not after: kill()
        result = real(*a, **k)
        kill()
        return result
    setattr(module, name, wrapper)

module, name, after = where.split(":")
modules = dict(images=images, live=snapshot_live, changes=snapshot_changes, snapshots=snapshots, memory=memory_state)
at(modules[module], name, after == "after")
import socket
qmp = Qmp(socket.socket(fileno=int(fd))) if int(fd) >= 0 else None
if qmp: qmp.greeting = {"version": {"qemu": dict(major=known.version[0], minor=known.version[1], micro=0)}}
if verb == "take": snapshots.take(home, qmp, known, "new")
elif verb == "warm": snapshots.take(home, qmp, known, "new", memory=True)
elif verb == "delete": snapshots.delete(home, qmp, "a")
elif verb == "restore": snapshots.restore(home, "a", "44444444-4444-4444-8444-444444444444")
"""


def victim(machine: Machine, where: str, verb: str, tmp: Path) -> None:
    """Another process does `verb` and is killed at `where`."""
    fd = machine.qmp.fileno() if machine.qmp else -1
    done = subprocess.run(
        [sys.executable, "-c", _VICTIM, machine.home, where, verb, str(fd), str(tmp)],
        pass_fds=[fd] if fd >= 0 else [],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


TAKING = (
    "images:create_overlay:before",
    "images:create_overlay:after",
    "live:add_tops:after",
    "live:switch:before",
    "live:switch:after",
    "changes:_finish:before",
    "changes:sweep:before",
)


@pytest.mark.parametrize("dies_too", [False, True], ids=["qemu-lives", "qemu-dies"])
@pytest.mark.parametrize("where", [*TAKING, "memory:save_file:before", "memory:save_file:after"])
def test_taking_that_is_killed(machine: Machine, tmp_path: Path, where: str, dies_too: bool) -> None:
    qmp = machine.start()
    machine.write(1)
    victim(machine, where, "warm" if where.startswith("memory") else "take", tmp_path)
    if dies_too:
        machine.kill()
    tree = snapshot_changes.recover(machine.home, machine.qmp)
    assert not tree.pending
    assert not tree.garbage
    assert files(machine) == owned(machine)
    names = [entry.name for entry in tree.snapshots]
    assert names in ([], ["new"])
    assert (names == ["new"]) == (where in TAKING[4:] or (dies_too and where == TAKING[3]))
    if not dies_too:
        assert qmp.command("query-status")["running"]
        assert live.nodes(qmp, machine.disk())  # record and QEMU agree
        machine.write(2)
    if names:
        machine.stop() if not dies_too else None
        snapshots.restore(machine.home, "new", NEW)
        assert machine.reads(1)
    else:
        take(machine, "new")


@pytest.mark.parametrize("dies_too", [False, True], ids=["qemu-lives", "qemu-dies"])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("where", ["live:merge:before", "live:merge:after", "changes:_finish:before"])
def test_deleting_that_is_killed(machine: Machine, tmp_path: Path, where: str, down: bool, dies_too: bool) -> None:
    machine.start()
    machine.write(1, length=(1 << 20) if down else CHUNK)
    take(machine, "a")
    machine.write(2, at=2 << 20)
    if not down:
        machine.write(2, at=2 << 20, length=1 << 20)
    victim(machine, where, "delete", tmp_path)
    if dies_too:
        machine.kill()
    else:
        assert machine.qmp
    tree = snapshot_changes.recover(machine.home, machine.qmp)
    assert tree.snapshots == ()
    if not dies_too and machine.qmp:
        assert machine.qmp.command("query-status")["running"]
        machine.write(3, at=4 << 20)
    snapshots.collapse(machine.home, machine.qmp)
    assert machine.reads(1)
    assert machine.reads(2, at=2 << 20)
    assert len(machine.disk()["chain"]) == 2
    assert files(machine) == owned(machine)
    if not dies_too:
        machine.stop()
        assert machine.reads(3, at=4 << 20)


@pytest.mark.parametrize(
    "where", ["images:create_overlay:before", "images:create_overlay:after", "changes:_finish:before"]
)
def test_going_back_that_is_killed(machine: Machine, tmp_path: Path, where: str) -> None:
    machine.write(1)
    take(machine, "a")
    machine.write(2)
    victim(machine, where, "restore", tmp_path)
    tree = snapshot_changes.recover(machine.home, None)
    assert not tree.pending
    assert machine.reads(1 if where.startswith("changes") else 2)
    assert files(machine) == owned(machine)


def test_a_merge_that_goes_on_in_qemu_when_its_command_is_killed(machine: Machine, tmp_path: Path) -> None:
    qmp = machine.start()
    machine.write(1, length=8 << 20)
    take(machine, "a")
    machine.write(2, length=1 << 20)
    # as slow as a large disk
    code = _VICTIM.replace("at(modules", "#").replace(
        "import socket\n",
        "import socket\nfrom ovt.engine.vm.qmp import Qmp\nreal = Qmp.command\n"
        "def slow(self, name, arguments=None, **k):\n"
        "    if name.startswith('block-') and 'job-id' in (arguments or {}):\n"
        "        real(self, name, {**arguments, 'speed': 65536}, **k); kill()\n"
        "    return real(self, name, arguments, **k)\n"
        "Qmp.command = slow\n",
        1,
    )
    done = subprocess.run(
        [sys.executable, "-c", code, machine.home, "live:merge:x", "delete", str(qmp.fileno()), str(tmp_path)],
        pass_fds=[qmp.fileno()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    time.sleep(0.3)
    assert qmp.command("query-jobs")
    assert snapshots.collapse(machine.home, qmp) == 1
    assert not qmp.command("query-jobs")
    assert machine.reads(2, length=1 << 20)
    assert machine.reads(1, at=1 << 20, length=7 << 20)


def test_hardware_and_tree_are_read_whole(machine: Machine) -> None:
    take(machine, "a")
    assert json.loads(Path(machine.home, snapshot_changes.TREE).read_text())["layout"] == 1
    assert Hardware.load(machine.home).disks[0]["chain"][-1]["path"] == "disks/disk0.s1.qcow2"
