"""Clones and the verbs of snapshots on a host: a real store, real images, and a QEMU whose guest never runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ovt import leftovers
from ovt.cli import snapshots as cli
from ovt.cli.context import App
from ovt.engine.base import Leftover
from ovt.engine.vm import clones as engine_clones
from ovt.engine.vm import snapshot_changes
from ovt.engine.vm.engine import VmEngine
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware
from ovt.errors import Conflict, NotFound, StateError, UsageError
from ovt.host import Host
from ovt.kernel import procfs
from ovt.machines import clones, snapshots
from ovt.model import Instance, Kind, Machine, Nic, Seed, Spec, Status
from tests.ovt.engine.vm import snapshot_machine
from tests.ovt.engine.vm.snapshot_machine import CHUNK

pytestmark = pytest.mark.qemu
ROOT = Path(__file__).parents[4]
SOURCE = "aaaaaaaaaaaa"


class Bench(VmEngine):
    """The engine with machines that a test holds instead of containers."""

    def __init__(self, known: Features) -> None:
        self._features = known
        self.machine: snapshot_machine.Machine | None = None

    def qmp(self, instance: Instance, timeout: float = 30.0) -> Any:
        assert self.machine
        return contextlib.nullcontext(self.machine.qmp)

    def cleanup(self, instance: Instance, home: str) -> bool:
        return False

    def status(self, instance: Instance) -> Status:
        return Status.STOPPED

    def leftovers(self, owned: Any, remove: bool = False) -> list[Leftover]:
        return []


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return snapshot_machine.features(tmp_path_factory.mktemp("known"))


@pytest.fixture
def bench(known: Features) -> Bench:
    return Bench(known)


@pytest.fixture
def host(tmp_path: Path, bench: Bench) -> Host:
    return Host(str(tmp_path / "data"), str(tmp_path / "run"), engine=bench)


@pytest.fixture
def machine(host: Host, bench: Bench, known: Features) -> Iterator[snapshot_machine.Machine]:
    """An instance `web` with two disks and UEFI variables, not running."""
    spec = Spec("image", machine=Machine(nics=(Nic(mac="52:54:00:00:00:01"),), seed=Seed(user_data="#cloud-config\n")))
    instance = Instance(
        SOURCE, "web", Kind.VM, 1.0, spec, Status.STOPPED, started=2.0, rootfs={"firmware": "uefi", "cid": 77}
    )
    host.store.add(instance)
    made = snapshot_machine.Machine(Path(host.store.home(SOURCE)), known, uefi=True, count=2)
    bench.machine = made
    yield made
    made.kill()


def run(host: Host, machine: snapshot_machine.Machine) -> None:
    """Start the source, so that the store takes it for alive."""
    machine.start()
    assert machine.process
    with host.store.locked(SOURCE) as instance:
        pid = machine.process.pid
        host.store.save(instance._replace(status=Status.RUNNING, pid=pid, start_time=procfs.start_time(pid) or 0))


def of(host: Host, name: str) -> str:
    return host.store.home(host.store.resolve(name))


def reads(home: str, value: int, number: int = 0) -> bool:
    chain = Hardware.load(home).disks[number]["chain"]
    images = [(os.path.join(home, layer["path"]), layer["format"]) for layer in chain]
    said = snapshot_machine.image_io(images, f"read -P {value} 0 {CHUNK}")
    assert "read " in said, said
    return "verification failed" not in said


# Clones


@pytest.mark.parametrize("alive", [False, True], ids=["stopped", "running"])
@pytest.mark.parametrize("linked", [False, True], ids=["full", "linked"])
def test_a_clone_has_the_content_and_an_identity_of_its_own(
    host: Host, machine: snapshot_machine.Machine, linked: bool, alive: bool
) -> None:
    if alive:
        run(host, machine)
    machine.write(1)
    machine.write(2, number=1)
    made = clones.clone(host, "web", "copy", linked=linked)
    assert made == host.get("copy")[0]
    assert made.status is Status.CREATED
    home = of(host, "copy")
    assert reads(home, 1)
    assert reads(home, 2, number=1)
    old, new = machine.hardware, Hardware.load(home)
    assert new.uuid != old.uuid
    assert new.generation != old.generation
    assert new.cid not in (old.cid, 0)
    assert new.nics[0]["mac"] != old.nics[0]["mac"]
    assert made.spec.machine.nics[0].mac == new.nics[0]["mac"]
    assert (made.rootfs["uuid"], made.rootfs["cid"]) == (new.uuid, new.cid)
    assert made.spec.machine.seed
    assert made.spec.machine.seed.instance_id == f"ovt-{made.id}"
    assert os.path.exists(f"{home}/nvram.qcow2")
    if linked:
        assert [layer["path"] for layer in new.disks[0]["chain"][:2]] == [
            old.disks[0]["chain"][0]["path"],
            f"{machine.home}/disks/disk0.qcow2",
        ]
    else:
        assert [layer["path"] for layer in new.disks[0]["chain"]] == ["disks/disk0.qcow2"]
        assert snapshots.listing(host, "web") == []
        assert len(machine.disk()["chain"]) == 2
    # neither sees what the other writes
    machine.write(3)
    assert reads(home, 1)
    with open(f"{home}/disks/disk0.qcow2", "rb") as file:
        assert file.read(4) == b"QFI\xfb"


def test_a_clone_of_a_snapshot(host: Host, machine: snapshot_machine.Machine) -> None:
    machine.write(1)
    snapshots.create(host, "web", "old")
    machine.write(2)
    for linked in (False, True):
        name = f"copy-{linked}".lower()
        clones.clone(host, "web", name, linked=linked, snapshot="old")
        assert reads(of(host, name), 1)
    assert [entry["name"] for entry in snapshots.listing(host, "web")] == ["old"]


def test_what_a_linked_clone_stands_on_is_kept_until_it_is_gone(host: Host, machine: snapshot_machine.Machine) -> None:
    snapshots.create(host, "web", "old")
    clones.clone(host, "web", "copy", linked=True, snapshot="old")
    clones.clone(host, "web", "other", linked=True)
    assert engine_clones.dependants(machine.home) == ["copy", "other"]
    with pytest.raises(Conflict, match="copy"):
        snapshots.delete(host, "web", "old")
    for name in ("copy", "other"):
        host.store.remove(host.get(name)[0])
    assert engine_clones.dependants(machine.home) == []
    snapshots.delete(host, "web", "old")
    assert snapshots.listing(host, "web") == []  # that which was taken for `other` went with it
    assert len(machine.disk()["chain"]) == 2


def test_a_clone_of_a_linked_clone(
    host: Host, machine: snapshot_machine.Machine, bench: Bench, known: Features
) -> None:
    machine.write(5)
    clones.clone(host, "web", "one", linked=True)
    clones.clone(host, "one", "two", linked=True)
    clones.clone(host, "two", "three")
    assert reads(of(host, "two"), 5)
    assert reads(of(host, "three"), 5)
    assert len(Hardware.load(of(host, "three")).disks[0]["chain"]) == 1


def test_what_cannot_be_cloned_leaves_nothing(host: Host, machine: snapshot_machine.Machine) -> None:
    before = snapshot_changes.read(machine.home).snapshots, machine.hardware.disks
    with pytest.raises(NotFound, match="no snapshot 'z'"):
        clones.clone(host, "web", "copy", snapshot="z")
    with pytest.raises(UsageError, match="host name"):
        clones.clone(host, "web", "no good")
    for linked in (False, True):
        with pytest.raises(Conflict, match="taken"):
            clones.clone(host, "web", "web", linked=linked)
    box = Instance("b" * 12, "box", Kind.CONTAINER, 1.0, Spec("busybox"))
    host.store.add(box)
    with pytest.raises(UsageError, match="container"):
        clones.clone(host, "box", "copy")
    assert (snapshot_changes.read(machine.home).snapshots, machine.hardware.disks) == before
    assert host.store.ids() == [SOURCE, "b" * 12] or host.store.ids() == ["b" * 12, SOURCE]


def test_a_vanished_image_while_cloning(host: Host, machine: snapshot_machine.Machine) -> None:
    snapshots.create(host, "web", "old")
    os.rename(f"{machine.home}/disks/disk0.qcow2", f"{machine.home}/elsewhere")
    with pytest.raises(NotFound, match=r"disk0\.qcow2 has vanished"):
        clones.clone(host, "web", "copy", snapshot="old")
    assert host.store.ids() == [SOURCE]
    assert host.store.unfinished() == []
    assert engine_clones.dependants(machine.home) == []


@pytest.mark.parametrize("linked", [False, True], ids=["full", "linked"])
def test_a_clone_that_is_killed_half_way(
    host: Host, machine: snapshot_machine.Machine, known: Features, tmp_path: Path, linked: bool
) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from ovt.engine.vm import clones as inner\n"
        "from ovt.host import Host\n"
        "from ovt.machines import clones\n"
        "from tests.ovt.engine.vm import snapshot_machine, test_clones\n"
        "known = snapshot_machine.features(Path(sys.argv[1]))\n"
        "inner.copy_file = lambda *a: os.kill(os.getpid(), 9)\n"
        "host = Host(sys.argv[2], sys.argv[3], engine=test_clones.Bench(known))\n"
        f"clones.clone(host, 'web', 'copy', linked={linked})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), host.data, host.run_root],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert host.get("copy")[1] is Status.BROKEN
    with pytest.raises(StateError):
        host.exec("copy", None)  # type: ignore[arg-type]
    found = leftovers.find(host, fix=True)
    assert any(entry.name == "copy" for entry in found)
    assert host.store.ids() == [SOURCE]
    clones.clone(host, "web", "copy")
    assert snapshots.listing(host, "web") == []  # that which the killed one had taken is gone as well
    assert len(machine.disk()["chain"]) == 2


# The verbs of snapshots


def test_going_back_needs_a_word_when_it_is_alive(host: Host, machine: snapshot_machine.Machine) -> None:
    run(host, machine)
    machine.write(1)
    snapshots.create(host, "web", "old", description="words")
    machine.write(2)
    with pytest.raises(StateError, match="running"):
        snapshots.restore(host, "web", "old")
    assert "everything written" in snapshots.lost(host, "web")
    assert snapshots.show(host, "web", "old")["description"] == "words"
    machine.stop()
    host.store.save(host.get("web")[0]._replace(status=Status.STOPPED, pid=0))
    snapshots.restore(host, "web", "old", keep="new")
    assert reads(machine.home, 1)
    assert snapshots.drawing(host, "web", {0: "now", 1: "old", 2: "new"}) == ["└─ old", "   ├─ new", "   └─ now"]
    snapshots.restore(host, "web", "new")
    assert reads(machine.home, 2)
    events = [event["event"] for event in host.events()]
    assert events == ["snapshot", "snapshot", "restore", "restore"]


def test_memory_makes_a_saved_machine(host: Host, machine: snapshot_machine.Machine) -> None:
    run(host, machine)
    snapshots.create(host, "web", "warm", memory=True)
    machine.stop()
    host.store.save(host.get("web")[0]._replace(status=Status.STOPPED, pid=0))
    snapshots.restore(host, "web", "warm")
    assert host.get("web")[1] is Status.SAVED


def test_quiescing_without_an_agent_changes_nothing(host: Host, machine: snapshot_machine.Machine) -> None:
    with pytest.raises(UsageError, match="not running"):
        snapshots.create(host, "web", "a", quiesce=True)
    assert snapshots.listing(host, "web") == []


def test_the_commands(host: Host, machine: snapshot_machine.Machine) -> None:
    app = App()
    app._host = host

    def ovt(command: click.Command, *words: str) -> str:
        done = CliRunner().invoke(command, list(words), obj=app, catch_exceptions=False)
        return done.stdout

    assert ovt(cli.snapshot, "create", "web", "one", "-d", "some words") == "one\n"
    assert ovt(cli.snapshot, "create", "web") == "snap1\n"
    tree = ovt(cli.snapshot, "list", "web").splitlines()
    assert [line.split("  ")[0].strip("└─ ") for line in tree[:1]] == ["one"]
    assert tree[0].endswith("some words")
    assert "the present state" in tree[2]
    assert [entry["name"] for entry in json.loads(ovt(cli.snapshot, "list", "--format", "json", "web"))] == [
        "one",
        "snap1",
    ]
    assert ovt(cli.snapshot, "list", "--format", "{{.name}} {{.parent}}", "web") == "one \nsnap1 one\n"
    assert json.loads(ovt(cli.snapshot, "show", "web", "one"))["hardware"]["cid"] == 77
    assert ovt(cli.snapshot, "restore", "web", "one") == "web\n"
    assert ovt(cli.snapshot, "delete", "web", "one", "snap1") == "one\nsnap1\n"
    assert ovt(cli.clone, "web", "copy") == "copy\n"
