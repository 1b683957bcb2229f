"""The cgroup manager `systemd` against a real bus with a small service in systemd's place."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.errors import ConfigError, HostError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.hierarchy import Hierarchies, current
from ovt.kernel.cgroup.systemd import Systemd

from .conftest import Child

SOURCE = Path(cgroup.__file__).parents[3]


class Fake:
    """The running service and its journal."""

    def __init__(self, address: str, journal: Path, settings: tuple[str, ...]) -> None:
        self.address = address
        self.journal = journal
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fake_systemd.py")), address, str(journal), *settings],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(SOURCE), "PATH": os.environ["PATH"]},
        )
        assert self.process.stdout and self.process.stdout.readline() == b"ready\n"

    def calls(self) -> list[tuple[str, Any]]:
        return [tuple(json.loads(line)) for line in self.journal.read_text().splitlines()]

    def named(self, member: str) -> list[Any]:
        return [body for name, body in self.calls() if name == member]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def systemd(bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def start(*settings: str) -> Fake:
        made.append(Fake(bus, tmp_path / "journal", settings))
        return made[-1]

    # Both names, so that the tests do the same for root and others.
    monkeypatch.setattr(
        "posix.environ", {b"DBUS_SYSTEM_BUS_ADDRESS": bus.encode(), b"DBUS_SESSION_BUS_ADDRESS": bus.encode()}
    )
    yield start
    for each in made:
        each.close()


@pytest.fixture
def tree(tmp_path: Path) -> Hierarchies:
    """A drawn cgroup2 tree in which systemd has made the scope already."""
    scope = tmp_path / "cg/machine.slice/ovt-web.scope"
    scope.mkdir(parents=True)
    for name in ("cgroup.procs", "memory.max", "pids.max", "cpu.weight", "cgroup.subtree_control", "cgroup.kill"):
        (scope / name).write_text("")
    (scope / "cgroup.controllers").write_text("memory pids\n")
    return Hierarchies(unified=str(tmp_path / "cg"), roots={str(tmp_path / "cg"): "/"}, own={"": "/"})


@pytest.fixture
def unrestricted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovt.kernel.cgroup.devices.restrict_v2", lambda directory, listed: None)


PATH = "machine.slice:ovt:web"
GROUP = "group=/machine.slice/ovt-web.scope"


def new(mounts: Hierarchies, annotations: dict[str, str] | None = None) -> cgroup.Cgroup:
    return cgroup.new(PATH, "web", "systemd", systemd_annotations=annotations or {}, mounts=mounts)


@pytest.mark.parametrize("settings", [(GROUP,), ()])
def test_a_scope_is_started_with_its_process(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None, settings: tuple[str, ...]
) -> None:
    fake = systemd(*settings)
    group = new(tree, {"org.systemd.property.TimeoutStopUSec": "uint64 7"})
    group.create()
    assert fake.calls() == []
    group.apply({"memory": {"limit": 4096}, "pids": {"limit": 3}})
    assert group.fd() == -1
    group.attach(42)
    ((unit, mode, properties, aux),) = fake.named("StartTransientUnit")
    assert (unit, mode, aux) == ("ovt-web.scope", "replace", [])
    properties = [tuple(entry) for entry in properties]
    assert ("Slice", "machine.slice") in properties
    assert ("Delegate", True) in properties
    assert ("PIDs", [42]) in properties
    assert ("MemoryMax", 4096) in properties
    assert ("TasksMax", 3) in properties
    assert ("TimeoutStopUSec", 7) in properties
    assert ("DevicePolicy", "strict") in properties
    scope = Path(str(tree.unified), "machine.slice/ovt-web.scope")
    assert (scope / "memory.max").read_text() == "4096"
    assert (scope / "pids.max").read_text() == "3"
    assert (scope / "cgroup.procs").read_text() == "42"
    assert group.path_for("memory") == str(scope)

    again = cgroup.restore(json.loads(json.dumps(group.record())))
    assert isinstance(again, Systemd)
    assert again.record() == group.record()
    again.apply({"pids": {"limit": 9}}, update=True)
    assert fake.named("SetUnitProperties") == [["ovt-web.scope", True, [["TasksMax", 9]]]]
    assert (scope / "pids.max").read_text() == "9"
    again.attach(43)
    assert (scope / "cgroup.procs").read_text() == "43"
    assert len(fake.named("StartTransientUnit")) == 1


def test_limits_that_come_after_the_process(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None
) -> None:
    fake = systemd(GROUP)
    group = new(tree)
    group.create()
    group.attach(42)
    group.apply({"pids": {"limit": 9}})
    ((unit, runtime, properties),) = fake.named("SetUnitProperties")
    assert (unit, runtime, properties[0]) == ("ovt-web.scope", True, ["TasksMax", 9])
    assert [name for name, _ in properties[1:]] == ["DevicePolicy", "DeviceAllow", "DeviceAllow"]


def test_removal_stops_the_unit(systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None) -> None:
    fake = systemd(GROUP)
    group = new(tree)
    group.create()
    group.attach(42)
    scope = Path(str(group.path_for("")))
    for file in list(scope.iterdir()):
        file.unlink()
    again = cgroup.restore(group.record())
    again.remove()
    assert fake.named("StopUnit") == [["ovt-web.scope", "replace"]]
    assert fake.named("ResetFailedUnit") == [["ovt-web.scope"]]
    assert not scope.exists()
    again.remove()


def test_a_failed_unit_of_that_name_is_reset(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None
) -> None:
    fake = systemd(GROUP, "loaded=ovt-web.scope")
    group = new(tree)
    group.create()
    group.attach(42)
    assert [name for name, _ in fake.calls()][:4] == [
        "Subscribe",
        "StartTransientUnit",
        "ResetFailedUnit",
        "StartTransientUnit",
    ]


def test_a_running_unit_of_that_name_is_an_error(systemd: Callable[..., Fake], tree: Hierarchies) -> None:
    fake = systemd(GROUP, "loaded=ovt-web.scope", "stuck=1")
    group = new(tree)
    with pytest.raises(
        HostError, match=r"systemd could not start ovt-web.scope: .*already loaded.*UnitExists"
    ) as caught:
        group.attach(42)
    assert "another container name" in caught.value.hint
    group.kill()
    group.remove()
    assert fake.named("StopUnit") == []  # it is another's


def test_properties_an_older_systemd_lacks_are_left_out(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None
) -> None:
    fake = systemd(GROUP, "unknown=MemorySwapMax", "unknown=TasksMax")
    group = new(tree)
    (Path(str(tree.unified)) / "machine.slice/ovt-web.scope/memory.swap.max").write_text("")
    group.apply({"memory": {"limit": 4096, "swap": 8192}, "pids": {"limit": 3}})
    group.attach(42)
    names = [name for name, _ in fake.named("StartTransientUnit")[-1][2]]
    assert "MemoryMax" in names and not {"MemorySwapMax", "TasksMax"} & set(names)
    group.apply({"memory": {"limit": 4096}, "pids": {"limit": 5}}, update=True)
    assert fake.named("SetUnitProperties")[-1][2] == [["MemoryMax", 4096]]


def test_a_property_of_an_annotation_is_never_left_out(systemd: Callable[..., Fake], tree: Hierarchies) -> None:
    systemd(GROUP, "unknown=CollectMode")
    group = new(tree, {"org.systemd.property.CollectMode": "'inactive'"})
    with pytest.raises(HostError, match=r"Cannot set property CollectMode, or unknown property"):
        group.attach(42)


def test_a_job_that_fails(systemd: Callable[..., Fake], tree: Hierarchies) -> None:
    systemd(GROUP, "result=failed")
    with pytest.raises(HostError, match=r"systemd could not start ovt-web.scope: the job ended as `failed`") as caught:
        new(tree).attach(42)
    assert "journalctl" in caught.value.hint


@pytest.mark.parametrize("method", ["StartTransientUnit", "GetUnit"])
def test_denial(systemd: Callable[..., Fake], tree: Hierarchies, method: str) -> None:
    systemd(GROUP, f"fail={method}")
    with pytest.raises(HostError, match="Permission denied") as caught:
        new(tree).attach(42)
    assert "polkit" in caught.value.hint


def test_without_a_bus(tree: Hierarchies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"unix:path={tmp_path}/nobody"
    monkeypatch.setattr(
        "posix.environ",
        {b"DBUS_SYSTEM_BUS_ADDRESS": address.encode(), b"DBUS_SESSION_BUS_ADDRESS": address.encode()},
    )
    with pytest.raises(HostError, match=f"{tmp_path}/nobody: {os.strerror(errno.ENOENT)}") as caught:
        new(tree).create()
    assert "--cgroup-manager cgroupfs" in caught.value.hint


def test_before_the_process_there_is_nothing(tree: Hierarchies) -> None:
    group = cgroup.restore(new(tree).record())
    assert (group.pids(), group.fd(), group.path_for("memory"), group.frozen()) == ([], -1, None, False)
    group.kill()
    for action in (group.freeze, group.thaw):
        with pytest.raises(HostError, match=r"ovt-web.scope has not been started"):
            action()


def test_a_subgroup_below_the_scope(systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None) -> None:
    systemd(GROUP)
    below = Path(str(tree.unified), "machine.slice/ovt-web.scope/inner")
    below.mkdir()
    (below / "cgroup.procs").touch()
    group = new(tree, {"run.oci.systemd.subgroup": "inner"})
    group.create()
    group.attach(42)
    assert group.path_for("") == str(below)
    assert (below / "cgroup.procs").read_text() == "42"


def test_what_is_lent_before_there_is_a_scope(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None
) -> None:
    systemd(GROUP)
    below = Path(str(tree.unified), "machine.slice/ovt-web.scope/guest")
    below.mkdir()
    (below / "cgroup.procs").touch()
    group = new(tree)
    group.create()
    group.delegate(os.getuid(), os.getgid(), "guest")
    group.attach(42, "guest")
    assert (below / "cgroup.procs").read_text() == "42"


def test_a_creation_that_fails_later_is_undone_by_the_same_process(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None
) -> None:
    fake = systemd(GROUP)
    group = new(tree)
    group.create()
    group.attach(42)
    for file in list(Path(str(group.path_for(""))).iterdir()):
        file.unlink()
    group.remove()
    assert [len(fake.named(name)) for name in ("Subscribe", "StopUnit")] == [1, 1]


def test_a_quota_alone_is_told_with_the_period_in_force(
    systemd: Callable[..., Fake], tree: Hierarchies, unrestricted: None
) -> None:
    fake = systemd(GROUP)
    group = new(tree)
    group.create()
    group.attach(42)
    file = Path(str(group.path_for("")), "cpu.max")
    for before, change, told in (
        ("max 50000", {"quota": 25_000}, [50_000, 500_000]),
        ("20000 50000", {"period": 40_000}, [40_000, 500_000]),
        ("max 50000", {"period": 40_000}, [40_000, (1 << 64) - 1]),
    ):
        file.write_text(before + "\n")
        group.apply({"cpu": change}, update=True)
        properties = dict(fake.named("SetUnitProperties")[-1][2])
        assert [properties["CPUQuotaPeriodUSec"], properties["CPUQuotaPerSecUSec"]] == told


def test_a_subgroup_stays_below(tree: Hierarchies) -> None:
    with pytest.raises(ConfigError, match=r"`..` components are not allowed"):
        new(tree, {"run.oci.systemd.subgroup": "a/../.."})


@pytest.mark.root
def test_on_this_machines_hierarchies(
    systemd: Callable[..., Fake], place: str, child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    if current().mode != "v1":
        pytest.skip("the stand-in for systemd makes no cgroups, which v2 needs")
    fake = systemd(f"group={place}/ovt-web.scope")
    group = cgroup.new(PATH, "web", "systemd")
    group.create()
    one = child()
    group.attach(one.pid)
    group.apply({"pids": {"limit": 5}, "devices": [{"allow": False, "access": "rwm"}]})
    directory = str(group.path_for("pids"))
    assert directory.endswith(f"{place}/ovt-web.scope")
    assert Path(directory, "pids.max").read_text() == "5\n"
    assert group.pids() == [one.pid]
    assert not group.frozen()
    again = cgroup.restore(group.record())
    again.kill()
    assert one.wait() == -9
    again.remove()
    assert not Path(directory).exists()
    assert [name for name, _ in fake.calls()][-2:] == ["StopUnit", "ResetFailedUnit"]
