"""Where a container's cgroup goes: linux.cgroupsPath, managers, and what the state file keeps."""

import os
from typing import Any

import pytest

from ovt.errors import HostError, UsageError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.hierarchy import Hierarchies
from ovt.kernel.cgroup.v1 import V1
from ovt.kernel.cgroup.v2 import V2

SPLIT = Hierarchies(
    v1={"memory": "/cg/memory", "cpu": "/cg/cpu,cpuacct", "cpuacct": "/cg/cpu,cpuacct", "name=x": "/cg/x"},
    own={"memory": "/me", "cpu": "/", "cpuacct": "/"},
)
UNIFIED = Hierarchies(unified="/cg", own={"": "/user/session"})


def v1(path: str, **changes: Any) -> V1:
    made = cgroup.new(path, "web", "cgroupfs", mounts=changes.get("mounts", SPLIT))
    assert isinstance(made, V1)
    return made


def v2(path: str, mounts: Hierarchies = UNIFIED) -> str:
    made = cgroup.new(path, "web", "cgroupfs", mounts=mounts)
    assert isinstance(made, V2)
    return made.directory


def test_an_absolute_path_is_below_every_mount() -> None:
    assert v1("/pod/web").paths == {
        "memory": "/cg/memory/pod/web",
        "cpu": "/cg/cpu,cpuacct/pod/web",
        "cpuacct": "/cg/cpu,cpuacct/pod/web",
    }
    assert v2("/pod/web") == "/cg/pod/web"


def test_a_relative_path_is_below_the_callers_cgroup_on_v1_and_beside_it_on_v2() -> None:
    paths = v1("web").paths
    assert (paths["memory"], paths["cpu"]) == ("/cg/memory/me/web", "/cg/cpu,cpuacct/web")
    assert v2("web") == "/cg/user/web"
    assert v2("web", Hierarchies(unified="/cg", own={"": "/"})) == "/cg/web"


@pytest.mark.parametrize("path", ["/../../etc", "/..", "/a/../../../etc/./", "//a//..//b/"])
def test_dots_never_leave_the_mount(path: str) -> None:
    cleaned = os.path.normpath("/" + path).replace("//", "/").rstrip("/")
    assert v2(path) == "/cg" + cleaned
    assert v1(path).paths["memory"] == "/cg/memory" + cleaned


def test_dots_of_a_relative_path_stay_below_the_own_cgroup() -> None:
    assert v2("../../../x") == "/cg/user/x"


def test_the_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posix.geteuid", lambda: 0)
    assert v2("") == "/cg/ovt/web"
    monkeypatch.setattr("posix.geteuid", lambda: 1000)
    assert v2("") == "/cg/user/ovt-web"


def test_a_nul_byte_is_refused() -> None:
    with pytest.raises(UsageError, match="NUL byte"):
        v2("/test\0invalid")


def test_an_unknown_manager_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown cgroup manager `openrc`") as caught:
        cgroup.new("/x", "web", "openrc", mounts=UNIFIED)
    assert "cgroupfs, systemd, disabled" in caught.value.hint


def test_without_any_cgroup_file_system() -> None:
    with pytest.raises(HostError, match="no cgroup file system is mounted"):
        cgroup.new("/x", "web", "cgroupfs", mounts=Hierarchies())


def test_a_hybrid_host_keeps_a_place_beside() -> None:
    hybrid = Hierarchies(v1={"memory": "/cg/memory"}, unified="/cg/unified", own={"memory": "/", "": "/"})
    group = v1("/pod/web", mounts=hybrid)
    assert group.beside == ("/cg/unified", "/pod/web")


@pytest.mark.parametrize(
    "mounts",
    [SPLIT, UNIFIED, Hierarchies(v1={"pids": "/cg/pids"}, unified="/cg/unified", own={"pids": "/", "": "/"})],
)
def test_a_record_restores_to_the_same(mounts: Hierarchies) -> None:
    first = cgroup.new("/pod/web", "web", "cgroupfs", mounts=mounts)
    second = cgroup.restore(first.record())
    assert type(second) is type(first)
    assert second.record() == first.record()
    assert second.path_for("pids") == first.path_for("pids")


def test_the_root_of_a_hierarchy_is_never_removed() -> None:
    assert V2("/cg", "").kept


class TestDisabled:
    def test_nothing_is_done(self) -> None:
        group = cgroup.new("", "web", "disabled")
        group.create()
        group.attach(os.getpid())
        group.apply({"memory": {"limit": 1}})
        group.kill()
        group.remove()
        assert cgroup.restore(group.record()).record() == {"manager": "disabled"}
        assert (group.pids(), group.fd(), group.path_for("memory"), group.frozen()) == ([], -1, None, False)

    def test_what_needs_a_cgroup_is_refused(self) -> None:
        group = cgroup.new("", "web", "disabled")
        for action in (
            group.freeze,
            group.thaw,
            group.stats,
            lambda: group.apply({"pids": {"limit": 3}}, update=True),
            lambda: group.attach(1, sub="x"),
        ):
            with pytest.raises(HostError, match="cgroups are disabled") as caught:
                action()
            assert caught.value.hint
