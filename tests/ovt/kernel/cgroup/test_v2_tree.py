"""cgroup v2 on a drawn tree: enabling controllers, joining, limits, and the errors of each."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ovt.errors import HostError
from ovt.kernel.cgroup import devices, v2
from ovt.kernel.cgroup.v2 import V2

FILES = {
    "cgroup.procs": "",
    "cgroup.controllers": "cpu memory pids",
    "cgroup.subtree_control": "",
    "cgroup.type": "domain\n",
    "cgroup.freeze": "0\n",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cgroup.kill": "",
}


class Tree:
    """A directory with the files a kernel would make, and a kernel that can be told to refuse writes."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.refusals: dict[str, int] = {}
        self.writes: list[tuple[str, str]] = []
        self.cgroup("", **{"cgroup.controllers": "cpu io memory pids\n"})
        monkeypatch.setattr(v2, "write", self.write)
        monkeypatch.setattr("ovt.kernel.cgroup.knobs.write", self.write)
        monkeypatch.setattr(devices, "restrict_v2", lambda directory, listed: None)

    def cgroup(self, path: str, **files: str) -> None:
        place = self.root / path.lstrip("/")
        place.mkdir(exist_ok=True)
        for name, content in {**FILES, **files}.items():
            (place / name).write_text(content)

    def write(self, path: str, value: str) -> None:
        name = "/" + os.path.relpath(path, self.root)
        number = self.refusals.get(name) or self.refusals.get(f"{name}={value}")
        if number:
            raise OSError(number, os.strerror(number), path)
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        known = (self.root / "cgroup.controllers").read_text().split()
        if path.endswith("subtree_control") and any(word[1:] not in known for word in value.split()):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        self.writes.append((name, value))
        if path.endswith("subtree_control"):
            value = Path(path).read_text() + " " + value.replace("+", "")
        Path(path).write_text(value)

    def refuse(self, name: str, number: int) -> None:
        self.refusals[name] = number


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    drawn = Tree(tmp_path, monkeypatch)
    drawn.cgroup("/pod")
    drawn.cgroup("/pod/web")
    return drawn


@pytest.fixture
def web(tree: Tree) -> V2:
    group = V2(str(tree.root), "/pod/web")
    group.create()
    tree.writes.clear()
    return group


def test_controllers_are_enabled_along_the_path(tree: Tree) -> None:
    V2(str(tree.root), "/pod/web").create()
    assert tree.writes == [
        ("/cgroup.subtree_control", "+cpu +io +memory +pids"),
        ("/pod/cgroup.subtree_control", "+cpu +memory +pids"),
    ]


def test_one_refused_controller_does_not_keep_the_others(tree: Tree) -> None:
    tree.refuse("/cgroup.subtree_control=+cpu +io +memory +pids", errno.EINVAL)
    tree.refuse("/cgroup.subtree_control=+cpu", errno.EINVAL)
    V2(str(tree.root), "/pod/web").create()
    assert [value for name, value in tree.writes if name == "/cgroup.subtree_control"] == ["+io", "+memory", "+pids"]


def test_a_container_that_has_everything_costs_no_write(tree: Tree) -> None:
    tree.cgroup("/pod/web", **{"cgroup.controllers": "cpu io memory pids\n"})
    V2(str(tree.root), "/pod/web").create()
    assert tree.writes == []


def test_parents_are_made(tree: Tree) -> None:
    group = V2(str(tree.root), "/new/deep/web")
    group.create()
    assert (tree.root / "new/deep/web").is_dir()
    assert not group.kept


def test_controllers_nobody_needs_may_fail(tree: Tree) -> None:
    tree.refuse("/pod/cgroup.subtree_control", errno.EBUSY)
    V2(str(tree.root), "/pod/web").create()


def test_a_needed_controller_that_is_held_back_by_processes(tree: Tree, web: V2) -> None:
    (tree.root / "pod/cgroup.subtree_control").write_text("")
    tree.refuse("/pod/cgroup.subtree_control", errno.EBUSY)
    with pytest.raises(HostError) as caught:
        web.apply({"blockIO": {"weight": 100}})
    assert str(caught.value) == (
        "cannot set linux.resources.blockIO.weight: the requested cgroup controller `io` is not available: "
        f"cannot enable it in {tree.root}/pod/cgroup.subtree_control: {tree.root}/pod holds processes itself"
    )
    assert "no internal processes" in caught.value.hint


def test_a_controller_that_is_not_delegated(tree: Tree, web: V2) -> None:
    (tree.root / "pod/cgroup.subtree_control").write_text("")
    tree.refuse("/pod/cgroup.subtree_control", errno.ENOENT)
    with pytest.raises(HostError, match=r"`io` is not available: it is not delegated to .*/pod") as caught:
        web.apply({"blockIO": {"weight": 100}})
    assert "Delegate=io" in caught.value.hint


def test_a_controller_without_permission(tree: Tree, web: V2) -> None:
    (tree.root / "pod/cgroup.subtree_control").write_text("")
    tree.refuse("/pod/cgroup.subtree_control", errno.EACCES)
    with pytest.raises(HostError, match=r"cannot enable it in .*/pod/cgroup.subtree_control: Permission denied"):
        web.apply({"blockIO": {"weight": 100}})


def test_a_controller_the_host_lacks(web: V2) -> None:
    with pytest.raises(HostError, match=r"the requested cgroup controller `foo` is not available under"):
        web.apply({"unified": {"foo.bar": "x"}})


def test_a_file_that_does_not_exist(tree: Tree, web: V2) -> None:
    with pytest.raises(HostError, match=r"linux.resources.unified.memory.nope to `1`: .*No such file or directory"):
        web.apply({"unified": {"memory.nope": "1"}})


def test_limits_arrive(tree: Tree, web: V2) -> None:
    for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.weight", "cpu.max", "memory.high"):
        (tree.root / "pod/web" / name).write_text("100 5000" if name == "cpu.max" else "")
    web.apply(
        {
            "memory": {"limit": 1000, "swap": 3000},
            "pids": {"limit": 9},
            "cpu": {"shares": 1024, "period": 20000},
            "unified": {"memory.high": "900"},
        }
    )
    assert tree.writes == [
        ("/pod/web/memory.swap.max", "2000"),
        ("/pod/web/memory.max", "1000"),
        ("/pod/web/cpu.weight", "100"),
        ("/pod/web/cpu.max", "100 20000"),
        ("/pod/web/pids.max", "9"),
        ("/pod/web/memory.high", "900"),
    ]


def test_a_period_alone_keeps_no_limit_where_there_is_none(tree: Tree, web: V2) -> None:
    (tree.root / "pod/web/cpu.max").write_text("max 100000\n")
    web.apply({"cpu": {"period": 20000}}, update=True)
    assert tree.writes == [("/pod/web/cpu.max", "max 20000")]


def test_check_before_update(tree: Tree, web: V2) -> None:
    (tree.root / "pod/web/memory.current").write_text("5000\n")
    (tree.root / "pod/web/memory.max").write_text("max\n")
    with pytest.raises(HostError, match="rejecting memory limit 4000 < usage 5000"):
        web.apply({"memory": {"limit": 4000, "checkBeforeUpdate": True}}, update=True)
    web.apply({"memory": {"limit": 6000, "checkBeforeUpdate": True}}, update=True)
    assert tree.writes == [("/pod/web/memory.max", "6000")]


def test_joining_and_the_reasons_it_fails(tree: Tree, web: V2) -> None:
    web.attach(42)
    assert tree.writes == [("/pod/web/cgroup.procs", "42")]
    (tree.root / "pod/web/cgroup.subtree_control").write_text("memory\n")
    for number, message in (
        (errno.EBUSY, "it gives the controllers `memory` to its children, so it may hold no process itself"),
        (errno.ESRCH, "the process has ended"),
        (errno.EACCES, "Permission denied"),
        (errno.EOPNOTSUPP, "Operation not supported"),
    ):
        tree.refuse("/pod/web/cgroup.procs", number)
        with pytest.raises(HostError) as caught:
            web.attach(42)
        assert str(caught.value) == f"cannot move process 42 into cgroup {web.directory}: {message}"
        assert caught.value.errno == number


def test_below_a_threaded_cgroup_ours_becomes_threaded(tree: Tree, web: V2) -> None:
    (tree.root / "pod/web/cgroup.type").write_text("domain invalid\n")
    plain = tree.write

    def threaded(path: str, value: str) -> None:
        if path.endswith("procs") and (tree.root / "pod/web/cgroup.type").read_text() != "threaded":
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", path)
        plain(path, value)

    v2.write = threaded
    web.attach(42)
    assert tree.writes == [("/pod/web/cgroup.type", "threaded"), ("/pod/web/cgroup.procs", "42")]


def test_an_exec_follows_the_containers_init(
    tree: Tree, web: V2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree.cgroup("/pod/web/init.scope")
    (tree.root / "pod/web/cgroup.subtree_control").write_text("memory\n")
    real = v2.read_or
    monkeypatch.setattr(
        v2, "read_or", lambda path, *rest: "0::/pod/web/init.scope\n" if path == "/proc/7/cgroup" else real(path, *rest)
    )
    web.attach(42, init=7)
    assert tree.writes == [("/pod/web/init.scope/cgroup.procs", "42")]
    fd = web.fd(init=7)
    assert os.readlink(f"/proc/self/fd/{fd}") == f"{tree.root}/pod/web/init.scope"
    os.close(fd)


def test_the_descriptor_is_of_the_directory(web: V2) -> None:
    fd = web.fd()
    assert os.readlink(f"/proc/self/fd/{fd}") == web.directory
    os.close(fd)


def test_freezing_waits_for_the_event(tree: Tree, web: V2) -> None:
    (tree.root / "pod/web/cgroup.events").write_text("populated 1\nfrozen 1\n")
    web.freeze()
    assert web.frozen()
    (tree.root / "pod/web/cgroup.events").write_text("populated 1\nfrozen 0\n")
    web.thaw()
    assert tree.writes == [("/pod/web/cgroup.freeze", "1"), ("/pod/web/cgroup.freeze", "0")]


@pytest.mark.filterwarnings("default")
def test_freezing_gives_up_and_thaws(tree: Tree, web: V2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2, "_FREEZE_SECONDS", 0.0)
    with pytest.raises(HostError, match="did not become frozen 1"):
        web._freezer("1", 0.0)
    assert tree.writes[-1] == ("/pod/web/cgroup.freeze", "0")


def test_kill_uses_the_kernels_own(tree: Tree, web: V2) -> None:
    web.kill()
    assert tree.writes == [("/pod/web/cgroup.kill", "1")]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_without_permission_the_container_stays_where_it_is(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: str, base: str) -> bool:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(v2, "make_directories", refuse)
    group = V2(str(tree.root), "/pod/web")
    group.create()
    group.attach(42)
    group.apply({"devices": [{"allow": False}], "pids": {"limit": 0}})
    assert tree.writes == []
    again = V2.restored(group.record())
    asked: list[dict[str, Any]] = [{"pids": {"limit": 5}}, {"cpu": {"shares": 5}}, {"unified": {"memory.high": "1"}}]
    for resources in asked:
        with pytest.raises(HostError, match=rf"cannot make cgroup {group.directory}: {os.strerror(number)}") as caught:
            again.apply(resources)
        assert "Delegate=yes" in caught.value.hint
    with pytest.raises(HostError, match="cannot pause or resume"):
        again.freeze()
    again.kill()
    again.remove()
    assert (again.pids(), again.fd(), again.path_for("memory")) == ([], -1, None)


def test_other_failures_to_make_it_are_errors(tree: Tree) -> None:
    (tree.root / "file").touch()
    with pytest.raises(HostError, match=r"cannot make cgroup .*/file/web: Not a directory"):
        V2(str(tree.root), "/file/web").create()


def test_delegation_gives_exactly_the_delegate_files(
    tree: Tree, web: V2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[tuple[str, int, int]] = []

    def chown(path: str, uid: int, gid: int) -> None:
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        given.append((os.path.relpath(path, web.directory), uid, gid))

    monkeypatch.setattr("posix.chown", chown)
    web.delegate(1000, 1001)
    assert (".", 1000, 1001) in given
    names = {name for name, _, _ in given} - {"."}
    assert names == {"cgroup.procs", "cgroup.subtree_control"}
