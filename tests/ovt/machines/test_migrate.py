"""Machines that move between two hosts on this machine, and what is left when anything dies on the way.

The machines have a disk of their own and no system on it: their firmware runs, and that is a guest that runs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt import exits
from ovt.engine.vm import firmware, migration, process
from ovt.engine.vm.migration import Settings
from ovt.errors import OvtError, StateError
from ovt.host import Host
from ovt.machines import migrate, outgoing, receive
from ovt.machines.migrate import Blocked, Options
from ovt.model import Disk, Instance, Kind, Limits, Machine, Spec, Status
from tests.ovt.machines.peer import Fault, Peer

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.slow]
MIB = 1 << 20
MOVING = Options(with_disks=True, new_id=True)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path / "here") as made:
        yield made


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path / "there") as made:
        yield made


@contextlib.contextmanager
def host(directory: Path) -> Iterator[Host]:
    directory.mkdir()
    made = Host(str(directory / "data"), str(directory / "run"))
    yield made
    for id in made.store.ids():
        made.delete(id, force=True)


@pytest.fixture
def machine(here: Host) -> Instance:
    spec = Spec(
        image="none",
        limits=Limits(memory=32 * MIB),
        machine=Machine(accel="tcg", disks=(Disk(size=4 * MIB),), vsock=False, balloon=False),
        network="none",
    )
    return here.start(here.create(spec, "one", kind=Kind.VM).id)


def running(host: Host) -> list[str]:
    """The names of machines whose guest runs, asked of QEMU."""
    found = []
    for instance, status in host.list():
        if status in {Status.RUNNING, Status.PAUSED, Status.CREATING}:
            with process.running(host.store.home(instance.id)) as qmp:
                found += [instance.name] if migration.running(qmp) else []
    return found


def nothing_left(host: Host) -> bool:
    """No record, no name, no meeting, no container."""
    names = os.listdir(host.store.names) if os.path.isdir(host.store.names) else []
    meetings = f"{host.run_root}/receive"
    return not (host.store.ids() or names or (os.path.isdir(meetings) and os.listdir(meetings)))


def stays(here: Host, there: Host, machine: Instance) -> None:
    """It runs on this host alone, as if nothing had been."""
    assert running(here) == ["one"]
    assert nothing_left(there)
    assert here.get("one")[1] is Status.RUNNING
    home = Path(here.store.home(machine.id))
    assert not (home / outgoing.RECORD).exists()
    assert not (home / receive.DIRECTORY).exists()
    with process.running(str(home)) as qmp:
        assert not any(entry["state"] for entry in qmp.command("query-migrate-capabilities"))
        assert qmp.command("query-jobs") == []


def moved(here: Host, there: Host) -> None:
    assert running(there) == ["one"]
    assert nothing_left(here)
    assert there.get("one")[1] is Status.RUNNING


def test_it_moves_and_what_it_was_stays_the_same(here: Host, there: Host, machine: Instance, tmp_path: Path) -> None:
    told = []
    home = Path(here.store.home(machine.id))
    before = json.loads((home / "hardware.json").read_text())
    with Peer(tmp_path / "there") as peer:
        outcome = migrate.migrate(here, "one", peer.address, MOVING, told.append)
    moved(here, there)
    assert peer.seen == ["hello", "survey", "check", "prepare", "disks-done", "commit", "bye"]
    after = json.loads((Path(there.store.home(outcome.id)) / "hardware.json").read_text())
    assert after == before
    arrived = there.get("one")[0]
    assert (arrived.name, arrived.spec, arrived.created) == (machine.name, machine.spec, machine.created)
    assert {progress.phase for progress in told} >= {"disks", "memory"}
    assert outcome.transferred > 0
    assert not here.store.ids()
    there.stop("one", 0.0)
    there.start("one")  # cold, from the disk that was copied
    assert running(there) == ["one"]


@pytest.mark.parametrize("settings", [Settings(multifd=2), Settings(postcopy=True)], ids=["multifd", "postcopy"])
def test_other_ways(here: Host, there: Host, machine: Instance, tmp_path: Path, settings: Settings) -> None:
    with Peer(tmp_path / "there") as peer:
        migrate.migrate(here, "one", peer.address, MOVING._replace(settings=settings))
    moved(here, there)


def test_a_paused_machine_arrives_paused_and_stays_here_stopped_with_keep(
    here: Host, there: Host, machine: Instance, tmp_path: Path
) -> None:
    here.pause("one")
    with Peer(tmp_path / "there") as peer:
        migrate.migrate(here, "one", peer.address, MOVING._replace(keep=True))
    assert running(there) == []
    assert there.get("one")[1] is Status.PAUSED
    there.resume("one")
    assert running(there) == ["one"]
    kept, status = here.get("one")
    assert (status, kept.stop_wanted) == (Status.STOPPED, True)


def test_uefi_variables_move_with_the_memory(
    here: Host, there: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = os.urandom(128 << 10)
    (tmp_path / "vars").write_bytes(variables)
    (code,) = Path("/usr/share").glob("seabios/bios-256k.bin")  # what the code does is no matter here
    found = firmware.Firmware(str(code), "raw", str(tmp_path / "vars"), "raw")
    monkeypatch.setattr(firmware, "find", lambda machine: found)
    spec = Spec(
        image="none",
        limits=Limits(memory=32 * MIB),
        machine=Machine(accel="tcg", firmware="uefi", disks=(Disk(size=MIB),), vsock=False),
        network="none",
    )
    here.start(here.create(spec, "one", kind=Kind.VM).id)
    with Peer(tmp_path / "there") as peer:
        outcome = migrate.migrate(here, "one", peer.address, MOVING)
    moved(here, there)
    there.stop("one", 0.0)
    command = ["qemu-img", "convert", "-O", "raw", f"{there.store.home(outcome.id)}/{firmware.NVRAM}"]
    subprocess.run([*command, str(tmp_path / "arrived")], check=True, timeout=60)
    assert (tmp_path / "arrived").read_bytes() == variables


def test_check_finds_everything_and_changes_nothing(here: Host, there: Host, machine: Instance, tmp_path: Path) -> None:
    taken = there.create(Spec(image="none", machine=Machine(disks=(Disk(size=MIB),))), "one", kind=Kind.VM)
    with Peer(tmp_path / "there") as peer:
        found = migrate.check(here, "one", peer.address, Options(new_id=True))
        assert {blocker.what for blocker in found} == {"disk root", "name"}
        assert all(blocker.remedy for blocker in found)
        with pytest.raises(Blocked, match="disk root: it lies in this host's own directory"):
            migrate.migrate(here, "one", peer.address, Options(new_id=True))
        there.delete(taken.id)
        stays(here, there, machine)
        assert migrate.check(here, "one", peer.address, MOVING) == []
        assert "prepare" in peer.seen  # a trial
    stays(here, there, machine)


BEFORE_COMMIT = ["hello", "survey", "check", "prepare", "disks-done"]


@pytest.mark.parametrize("kill", [False, True], ids=["lost", "killed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", BEFORE_COMMIT)
def test_a_peer_that_dies_leaves_the_guest_here(
    here: Host, there: Host, machine: Instance, tmp_path: Path, stage: str, when: str, kill: bool
) -> None:
    with Peer(tmp_path / "there", Fault(stage, when, kill)) as peer:
        with pytest.raises(OvtError):
            migrate.migrate(here, "one", peer.address, MOVING)
        assert peer.hit.is_set()
        stays(here, there, machine)


@pytest.mark.parametrize("channel", ["memory", "disks"])
def test_data_that_does_not_get_through(
    here: Host, there: Host, machine: Instance, tmp_path: Path, channel: str
) -> None:
    with Peer(tmp_path / "there", cut=channel) as peer, pytest.raises(OvtError):
        migrate.migrate(here, "one", peer.address, MOVING)
    stays(here, there, machine)


@pytest.mark.parametrize("kill", [False, True], ids=["lost", "killed"])
def test_a_commit_that_does_not_get_there_leaves_the_guest_here(
    here: Host, there: Host, machine: Instance, tmp_path: Path, kill: bool
) -> None:
    with Peer(tmp_path / "there", Fault("commit", "before", kill)) as peer:
        with pytest.raises(OvtError):
            migrate.migrate(here, "one", peer.address, MOVING)
        stays(here, there, machine)


@pytest.mark.parametrize("kill", [False, True], ids=["lost", "killed"])
def test_a_commit_whose_answer_is_lost_has_moved_it(
    here: Host, there: Host, machine: Instance, tmp_path: Path, kill: bool
) -> None:
    with Peer(tmp_path / "there", Fault("commit", "after", kill)) as peer:
        migrate.migrate(here, "one", peer.address, MOVING)
    moved(here, there)


@pytest.mark.parametrize("when", ["before", "after"])
def test_nobody_guesses_when_the_other_host_is_away(
    here: Host, there: Host, machine: Instance, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "_PATIENCE", 1.0)
    monkeypatch.setattr(outgoing.owner, "__defaults__", (1.0,))
    with Peer(tmp_path / "there", Fault("commit", when, away=True)) as peer:
        with pytest.raises(outgoing.Undecided, match="may run there, and stands still here"):
            migrate.migrate(here, "one", peer.address, MOVING)
        assert running(here) == []
        with pytest.raises(StateError, match="was interrupted"):
            migrate.migrate(here, "one", peer.address, MOVING)
        with pytest.raises(outgoing.Undecided):
            outgoing.resolve(here, "one")
        assert running(here) == []
        peer.away = False
        where = outgoing.resolve(here, "one")
        if when == "before":
            assert where == "here"
            stays(here, there, machine)
        else:
            assert where == "there"
            moved(here, there)


@pytest.mark.parametrize(("stage", "when"), [("disks-done", "before"), ("commit", "before"), ("commit", "after")])
def test_a_killed_migrate_is_resolved(
    here: Host, there: Host, machine: Instance, tmp_path: Path, stage: str, when: str
) -> None:
    with Peer(tmp_path / "there", Fault(stage, when)) as peer:
        child = start_migrate(here, peer)
        assert peer.hit.wait(60)
        child.kill()
        child.wait()
        assert outgoing.read(here.store.home(machine.id))
        where = outgoing.resolve(here, "one")
        if (stage, when) == ("commit", "after"):
            assert where == "there"
            moved(here, there)
        else:
            assert where == "here"
            stays(here, there, machine)


def test_cancel_from_another_command(here: Host, there: Host, machine: Instance, tmp_path: Path) -> None:
    with Peer(tmp_path / "there") as peer:
        child = start_migrate(here, peer, bandwidth=64 << 10)
        deadline = time.monotonic() + 60
        while not outgoing.read(here.store.home(machine.id)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        outgoing.cancel(here, "one")
        assert child.wait(60) == -signal.SIGINT
    stays(here, there, machine)
    with pytest.raises(StateError, match="no migration of it is under way"):
        outgoing.cancel(here, "one")
    with pytest.raises(StateError, match="no migration of it was interrupted"):
        outgoing.resolve(here, "one")


def test_a_time_limit(here: Host, there: Host, machine: Instance, tmp_path: Path) -> None:
    options = MOVING._replace(timeout=2.0, settings=Settings(downtime=1, bandwidth=64 << 10))
    with Peer(tmp_path / "there") as peer, pytest.raises(OvtError, match=r"not there.* within 2 seconds"):
        migrate.migrate(here, "one", peer.address, options)
    stays(here, there, machine)


def test_a_killed_qemu_ends_the_migration_on_both_sides(
    here: Host, there: Host, machine: Instance, tmp_path: Path
) -> None:
    killed = []

    def kill(progress: object) -> None:
        if not killed:
            killed.append(os.kill(here.get("one")[0].pid, signal.SIGKILL))

    with Peer(tmp_path / "there") as peer, pytest.raises(OvtError):
        migrate.migrate(here, "one", peer.address, MOVING._replace(settings=Settings(bandwidth=MIB)), kill)
    assert nothing_left(there)
    assert here.get("one")[1] is Status.STOPPED


def start_migrate(here: Host, peer: Peer, bandwidth: int = 0) -> "subprocess.Popen[bytes]":
    """In a process of its own."""
    program = (
        "import sys; from ovt.host import Host; from ovt.machines import migrate, transport\n"
        "from ovt.engine.vm.migration import Settings\n"
        "options = migrate.Options(Settings(bandwidth=int(sys.argv[4])), with_disks=True, new_id=True)\n"
        "migrate.migrate(Host(*sys.argv[1:3]), 'one', transport.parse(sys.argv[3]), options)\n"
    )
    arguments = [here.data, here.run_root, f"unix:{peer.path}", str(bandwidth)]
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.Popen(command, env=exits.env(), stderr=subprocess.DEVNULL)
