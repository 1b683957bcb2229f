"""Containers as scopes of a real systemd on cgroup v2: what it shows, what it does with them, what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle
from tests.lab.systemd_host import USER, SystemdHost
from tests.ovt.live import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.root, pytest.mark.timeout(240)]

MIB = 1 << 20
WAITING = ("sleep", "1000")
SCOPE = "lab.slice/lab-inner.slice"


@pytest.fixture(scope="module")
def systemd() -> Iterator[SystemdHost]:
    host = SystemdHost()
    try:
        host.boot()
        yield host
    finally:
        host.close()


class Container:
    """A container made below systemd; `unit` is its scope."""

    def __init__(
        self, host: SystemdHost, runtime: Path, root: Path, name: str, bundle: Path, user: bool = False
    ) -> None:
        self.host = host
        self.user = user
        self.argv = (runtime, "--root", root, "--systemd-cgroup")
        self.name = name
        self.unit = f"ovt-{name}.scope"
        self.bundle = bundle
        self.out = bundle / "out"

    def call(self, verb: str, *arguments: object, **options: Any) -> str:
        return self.host.run(*self.argv, verb, *arguments, user=self.user, check=True, **options).stdout

    def create(self, env: Mapping[str, str] | None = None) -> str:
        """Create it; what was said when that was refused."""
        with open(self.out, "wb") as out:
            options = {"capture_output": False, "stdout": out, "stderr": out, "user": self.user}
            words = [f"{name}={value}" for name, value in (env or {}).items()]
            done = self.host.run("env", *words, *self.argv, "create", "-b", self.bundle, self.name, **options)
        return self.out.read_text() if done.returncode else ""

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.call("state", self.name))
        return state

    def show(self, *names: str) -> dict[str, str]:
        return self.host.show(self.unit, *names, user=self.user)

    @property
    def cgroup(self) -> Path:
        """Its directory, as the lab host sees it."""
        return self.host.group / self.show("ControlGroup")["ControlGroup"].lstrip("/")

    def files(self, *names: str) -> dict[str, str]:
        cgroup = self.cgroup
        return {name: (cgroup / name).read_text().strip() for name in names}


Create = Callable[..., Container]


@pytest.fixture
def prepare(
    systemd: SystemdHost, runtime: Path, bundle: Bundle, container_id: str, tmp_path: Path
) -> Iterator[Callable[..., Container]]:
    """`prepare("sleep", "9", config=…)`: a container to be; deleted by force after the test."""
    made: list[Container] = []

    def make(*arguments: str, name: str = container_id, **config: Any) -> Container:
        linux = {"cgroupsPath": f"lab-inner.slice:ovt:{name}", **config.pop("linux", {})}
        place = bundle(*(arguments or WAITING), config={"linux": linux, **config})
        made.append(Container(systemd, runtime, tmp_path / f"run-{len(made)}", name, place))
        return made[-1]

    yield make
    for container in made:
        container.call("delete", "--force", container.name)


@pytest.fixture
def create(prepare: Create) -> Create:
    """As `prepare`, and created."""

    def make(*arguments: str, **config: Any) -> Container:
        container = prepare(*arguments, **config)
        assert container.create() == ""
        return container

    return make


def test_a_life(create: Create, systemd: SystemdHost) -> None:
    container = create()
    pid = container.state()["pid"]
    shown = container.show("ActiveState", "SubState", "Slice", "ControlGroup", "Delegate", "Transient", "Description")
    assert shown == {
        "ActiveState": "active",
        "SubState": "running",
        "Slice": "lab-inner.slice",
        "ControlGroup": f"/{SCOPE}/{container.unit}",
        "Delegate": "yes",
        "Transient": "yes",
        "Description": f"ovt container {container.unit}",
    }
    told = systemd.run("cat", f"/proc/{pid}/cgroup", check=True).stdout
    assert told == f"0::/{SCOPE}/{container.unit}\n"
    container.call("start", container.name)
    assert container.call("exec", container.name, "cat", "/proc/self/cgroup") == "0::/\n"  # its own namespace
    cgroup = container.cgroup
    assert container.show("TasksCurrent")["TasksCurrent"] == "1"
    container.call("pause", container.name)
    assert "frozen 1" in (cgroup / "cgroup.events").read_text()
    container.call("resume", container.name)
    container.call("kill", container.name, "KILL")
    container.call("delete", "--force", container.name)
    assert container.show("LoadState", "ActiveState") == {"LoadState": "not-found", "ActiveState": "inactive"}
    assert not cgroup.exists()


RESOURCES: dict[str, Any] = {
    "memory": {"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB},
    "pids": {"limit": 77},
    "cpu": {"shares": 512, "quota": 30_000, "period": 60_000, "burst": 5_000, "cpus": "1", "mems": "0"},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}],
    "unified": {"memory.high": str(60 * MIB)},
}
FILES = {
    "memory.max": str(64 * MIB),
    "memory.swap.max": str(32 * MIB),
    "memory.low": str(32 * MIB),
    "memory.high": str(60 * MIB),
    "pids.max": "77",
    "cpu.weight": "59",
    "cpu.max": "30000 60000",
    "cpu.max.burst": "5000",
    "cpuset.cpus": "1",
    "cpuset.cpus.effective": "1",
    "cpuset.mems": "0",
    "hugetlb.2MB.max": str(4 * MIB),
}
PROPERTIES = {
    "MemoryMax": str(64 * MIB),
    "MemorySwapMax": str(32 * MIB),
    "MemoryLow": str(32 * MIB),
    "MemoryHigh": str(60 * MIB),
    "TasksMax": "77",
    "CPUWeight": "59",
    "CPUQuotaPerSecUSec": "500ms",
    "CPUQuotaPeriodUSec": "60ms",
    "AllowedCPUs": "1",
    "AllowedMemoryNodes": "0",
}


def test_limits_are_properties_and_files_and_a_reload_undoes_none(create: Create, systemd: SystemdHost) -> None:
    container = create(linux={"resources": RESOURCES})
    assert container.show(*PROPERTIES) == PROPERTIES
    assert container.files(*FILES) == FILES
    systemd.run("systemctl", "daemon-reload", check=True)
    assert container.show(*PROPERTIES) == PROPERTIES
    assert container.files(*FILES) == FILES
    change = {"memory": {"limit": 48 * MIB, "swap": 48 * MIB}, "pids": {"limit": -1}, "cpu": {"quota": -1}}
    container.call("update", "--resources", "-", container.name, input=json.dumps(change))
    container.call("update", "--cpu-share", "2048", "--cpuset-cpus", "0-1", container.name)
    changed = {"MemoryMax": str(48 * MIB), "MemorySwapMax": "0", "TasksMax": "infinity", "CPUWeight": "174",
               "CPUQuotaPerSecUSec": "infinity", "AllowedCPUs": "0-1"}  # fmt: skip
    written = {"memory.max": str(48 * MIB), "memory.swap.max": "0", "pids.max": "max", "cpu.weight": "174",
               "cpu.max": "max 100000", "cpuset.cpus": "0-1", "memory.low": str(32 * MIB)}  # fmt: skip
    for _ in range(2):
        assert container.show(*changed) == changed
        assert container.files(*written) == written
        systemd.run("systemctl", "daemon-reload", check=True)


def test_the_files_keep_what_systemd_would_round(create: Create) -> None:
    container = create(linux={"resources": {"cpu": {"quota": 33_333, "period": 100_000}}})
    assert container.files("cpu.max") == {"cpu.max": "33333 100000"}
    container.call("update", "--cpu-quota", "44444", container.name)
    assert container.files("cpu.max") == {"cpu.max": "44444 100000"}
    assert container.show("CPUQuotaPerSecUSec") == {"CPUQuotaPerSecUSec": "450ms"}


def test_a_quota_or_a_period_alone_leaves_the_other(create: Create, systemd: SystemdHost) -> None:
    container = create(linux={"resources": {"cpu": {"quota": 20_000, "period": 50_000}}})
    for flags, told, written in (
        (("--cpu-quota", "30000"), "600ms", "30000 50000"),
        (("--cpu-period", "60000"), "500ms", "30000 60000"),
    ):
        container.call("update", *flags, container.name)
        assert container.show("CPUQuotaPerSecUSec") == {"CPUQuotaPerSecUSec": told}
        assert container.files("cpu.max") == {"cpu.max": written}
    systemd.run("systemctl", "daemon-reload", check=True)
    assert container.files("cpu.max") == {"cpu.max": "30000 60000"}


def test_what_another_sets_by_systemd_holds(create: Create, systemd: SystemdHost) -> None:
    container = create(linux={"resources": {"pids": {"limit": 50}}})
    systemd.run("systemctl", "set-property", "--runtime", container.unit, "TasksMax=44", check=True)
    container.call("update", "--memory", "40M", container.name)
    assert container.files("pids.max", "memory.max") == {"pids.max": "44", "memory.max": str(40 * MIB)}


# null is always allowed, full by a rule, the third one, which asks for no capability, by an update.
PROBE = "for d in null full pm; do (: < /tmp/$d) 2>/dev/null && echo $d; done; true"


def test_devices(create: Create, systemd: SystemdHost) -> None:
    latency = os.stat("/dev/cpu_dma_latency").st_rdev
    third = {"type": "c", "major": os.major(latency), "minor": os.minor(latency)}
    null, full = {"type": "c", "major": 1, "minor": 3}, {"type": "c", "major": 1, "minor": 7}
    nodes = [{"path": f"/tmp/{name}", **node} for name, node in (("null", null), ("full", full), ("pm", third))]
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, **full, "access": "r"}]
    container = create(linux={"resources": {"devices": rules}, "devices": nodes}, root={"readonly": False})
    container.call("start", container.name)
    shown = systemd.run("systemctl", "show", container.unit, check=True).stdout.splitlines()
    assert {"DevicePolicy=strict", "DeviceAllow=/dev/char/1:3 rwm", "DeviceAllow=/dev/char/1:7 rwm"} <= set(shown)
    assert container.call("exec", container.name, "sh", "-c", PROBE).split() == ["null", "full"]
    more = [*rules, {"allow": True, **third, "access": "r"}]
    container.call("update", "--resources", "-", container.name, input=json.dumps({"devices": more}))
    assert container.call("exec", container.name, "sh", "-c", PROBE).split() == ["null", "full", "pm"]
    systemd.run("systemctl", "daemon-reload", check=True)
    assert container.call("exec", container.name, "sh", "-c", PROBE).split() == ["null", "full", "pm"]


def test_a_scope_that_systemd_stops(create: Create, systemd: SystemdHost) -> None:
    container = create("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done")
    container.call("start", container.name)
    systemd.run("systemctl", "stop", container.unit, check=True)
    assert container.state()["status"] == "stopped"
    container.call("delete", container.name)


def test_two_of_one_name(create: Create, prepare: Create) -> None:
    first = create()
    second = prepare(name=first.name)
    words = second.create()
    assert f"systemd could not start {first.unit}" in words and "UnitExists" in words
    assert first.state()["status"] == "created"
    assert first.show("ActiveState")["ActiveState"] == "active"


def test_a_failed_scope_makes_room(create: Create) -> None:
    limits = {"RuntimeMaxSec": "uint64 1", "TimeoutStopSec": "uint64 1"}
    first = create(annotations={f"org.systemd.property.{name}": value for name, value in limits.items()})
    first.call("start", first.name)
    wait_for(lambda: first.show("ActiveState")["ActiveState"] == "failed", 30)
    assert first.show("Result")["Result"] == "timeout"
    again = create(name=first.name)
    assert again.show("ActiveState")["ActiveState"] == "active"


def test_annotations(create: Create) -> None:
    container = create(
        annotations={
            "org.systemd.property.TimeoutStopSec": "uint64 7",
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.After": "['session.service']",
            "run.oci.systemd.subgroup": "inner",
        }
    )
    shown = container.show("TimeoutStopUSec", "CollectMode", "After")
    assert (shown["TimeoutStopUSec"], shown["CollectMode"]) == ("7s", "inactive-or-failed")
    assert "session.service" in shown["After"].split()
    assert (container.cgroup / "inner/cgroup.procs").read_text().split()
    assert not (container.cgroup / "cgroup.procs").read_text().split()


def test_a_property_that_systemd_does_not_know(prepare: Create) -> None:
    container = prepare(annotations={"org.systemd.property.NoSuchThing": "uint64 7"})
    assert "NoSuchThing" in container.create()
    assert container.show("LoadState")["LoadState"] == "not-found"


CGROUPS = [
    {"type": "proc", "source": "proc", "destination": "/proc"},
    {"type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup", "options": ["nosuid", "rw"]},
]


def test_a_container_may_make_cgroups_of_its_own(create: Create, systemd: SystemdHost) -> None:
    script = "mkdir /sys/fs/cgroup/own && echo 0 > /sys/fs/cgroup/own/cgroup.procs && sleep 1000"
    container = create("sh", "-c", script, mounts=CGROUPS)
    container.call("start", container.name)
    own = container.cgroup / "own/cgroup.procs"
    wait_for(lambda: (own.exists() and own.read_text()) or container.out.read_text())
    assert container.out.read_text() == ""
    assert container.call("exec", container.name, "true") == ""
    systemd.run("systemctl", "daemon-reload", check=True)
    assert own.read_text()


def test_a_cgroup_below_is_given_away(create: Create) -> None:
    container = create(annotations={"run.oci.delegate-cgroup": "guest"}, process={"user": {"uid": 1234, "gid": 1234}})
    guest = container.cgroup / "guest"
    assert (guest.stat().st_uid, container.cgroup.stat().st_uid) == (1234, 0)
    assert (guest / "cgroup.procs").read_text().split()


def test_without_a_cgroup_namespace_it_sees_its_own_alone(create: Create) -> None:
    kinds = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
    container = create("ls", "/sys/fs/cgroup", mounts=CGROUPS, linux={"namespaces": kinds})
    container.call("start", container.name)
    wait_for(container.out.read_text)
    assert "cgroup.procs" in container.out.read_text().split()
    assert "system.slice" not in container.out.read_text().split()


@pytest.fixture(scope="module")
def user(systemd: SystemdHost) -> SystemdHost:
    """The same host with the user's manager running."""
    systemd.start_user()
    return systemd


@pytest.fixture
def rootless(user: SystemdHost, runtime: Path, bundle: Bundle, container_id: str) -> Iterator[Container]:
    """A container of the user; not created yet."""

    def edit(config: dict[str, Any]) -> None:
        config["linux"]["cgroupsPath"] = f":ovt:{container_id}"
        config["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "user", "network")]
        mapping = {"containerID": 0, "size": 1}
        config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [{**mapping, "hostID": USER}]
        config["linux"]["resources"] = {"pids": {"limit": 77}, "memory": {"limit": 64 * MIB}}
        config["mounts"] = [{"type": "proc", "source": "proc", "destination": "/proc"}]

    place = user.directory / container_id
    shutil.copytree(bundle(*WAITING, edit=edit), place, symlinks=True)
    for path in (place, *place.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    container = Container(user, runtime, place / "run", container_id, place, user=True)
    yield container
    container.call("delete", "--force", container.name)
    shutil.rmtree(place)


def test_of_a_user(rootless: Container, user: SystemdHost) -> None:
    assert rootless.create() == ""
    shown = rootless.show("Slice", "ControlGroup", "TasksMax", "MemoryMax")
    inside = f"/user.slice/{rootless.unit}"
    group = user.user_tree.removeprefix("/sys/fs/cgroup") + inside
    assert shown == {"Slice": "user.slice", "ControlGroup": group, "TasksMax": "77", "MemoryMax": str(64 * MIB)}
    assert rootless.files("pids.max", "memory.max") == {"pids.max": "77", "memory.max": str(64 * MIB)}
    rootless.call("start", rootless.name)
    rootless.call("update", "--pids-limit", "88", rootless.name)
    assert rootless.show("TasksMax") == {"TasksMax": "88"}
    cgroup = rootless.cgroup
    rootless.call("delete", "--force", rootless.name)
    assert rootless.show("LoadState") == {"LoadState": "not-found"}
    assert not cgroup.exists()


def test_a_user_may_not_ask_the_systems_manager(rootless: Container) -> None:
    address = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/dbus/system_bus_socket"}
    done = rootless.create(address)
    assert "the bus or polkit forbids it" in done
