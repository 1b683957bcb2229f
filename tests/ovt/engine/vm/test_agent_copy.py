"""Copies between the host and a guest: by any qemu-guest-agent and by our own, both running on this machine."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm.agent import Agent
from ovt.engine.vm.agent_copy import copy
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, UsageError
from tests.ovt.engine.vm.agents import OVT_GUEST, QEMU_GA, b64, fake, ovt_guest, qemu_ga, supporting

SERVERS: dict[str, Callable[[Path], Any]] = {"qemu-ga": qemu_ga, "ovt-guest": ovt_guest}


@pytest.fixture(
    params=[
        pytest.param("qemu-ga", marks=pytest.mark.skipif(not QEMU_GA, reason="needs qemu-ga")),
        pytest.param("ovt-guest", marks=pytest.mark.skipif(not OVT_GUEST.exists(), reason="needs ovt-guest")),
    ]
)
def agent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Agent]:
    home = tmp_path / "home"
    home.mkdir()
    with SERVERS[request.param](home):
        yield Agent(str(home))


@pytest.fixture(params=[True, False], ids=["into", "out of"])
def into(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with one of everything; links and times as they are to arrive."""
    root = tmp_path / "tree"
    (root / "sub/deep").mkdir(parents=True)
    (root / "file").write_bytes(b"content\n")
    (root / "large").write_bytes(os.urandom(1_500_000))
    (root / "sub/empty").write_bytes(b"")
    (root / "sub/deep" / ("long-name-" * 15)).write_text("x")
    (root / "-dash").write_text("dash")
    (root / "ünï\nline").write_text("name")
    (root / "link").symlink_to("file")
    (root / "dangling").symlink_to("/no/such/place")
    os.link(root / "file", root / "hard")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    (root / "file").chmod(0o640)
    (root / "sub/empty").chmod(0o4755)
    (root / "sub").chmod(0o1777)
    os.utime(root / "file", ns=(1_600_000_000_250_000_000, 1_600_000_000_250_000_000))
    os.utime(root / "sub", ns=(1_500_000_000 * 10**9, 1_500_000_000 * 10**9))
    return root


def same(source: Path, target: Path, into: bool) -> None:
    names = sorted(path.relative_to(source) for path in source.rglob("*") if not path.is_socket())
    assert sorted(path.relative_to(target) for path in target.rglob("*")) == names
    for name in names:
        old, new = source / name, target / name
        before, after = old.lstat(), new.lstat()
        assert stat.S_IFMT(before.st_mode) == stat.S_IFMT(after.st_mode), name
        if old.is_symlink():
            assert os.readlink(old) == os.readlink(new)
            continue
        mask = 0o7777 if into else 0o1777
        assert stat.S_IMODE(after.st_mode) == stat.S_IMODE(before.st_mode) & mask, name
        if not old.is_fifo():
            assert after.st_mtime_ns // 10**9 == before.st_mtime_ns // 10**9, name
        if old.is_file():
            assert old.read_bytes() == new.read_bytes(), name
            assert after.st_nlink == 1


def left_in_the_guest() -> list[Path]:
    return [*Path("/var/tmp").glob("ovt.*"), *Path("/tmp").glob("ovt.*")]


def test_tree_under_a_new_name(agent: Agent, tree: Path, tmp_path: Path, into: bool) -> None:
    copy(agent, "vm", str(tree), str(tmp_path / "new"), into)
    same(tree, tmp_path / "new", into)
    assert (tmp_path / "new/file").stat().st_mtime_ns == 1_600_000_000_250_000_000
    assert not left_in_the_guest()


def test_tree_into_a_directory_that_exists(agent: Agent, tree: Path, tmp_path: Path, into: bool) -> None:
    (tmp_path / "there").mkdir()
    copy(agent, "vm", f"{tree}/", f"{tmp_path}/there/", into)
    same(tree, tmp_path / "there/tree", into)


def test_what_is_in_a_directory(agent: Agent, tree: Path, tmp_path: Path, into: bool) -> None:
    target = tmp_path / "there"
    target.mkdir(mode=0o750)
    (target / "kept").write_text("kept")
    (target / "file").write_text("old")
    copy(agent, "vm", f"{tree}/.", str(target), into)
    assert (target / "kept").read_text() == "kept"
    (target / "kept").unlink()
    same(tree, target, into)
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


def test_what_is_in_a_directory_under_a_new_name(agent: Agent, tree: Path, tmp_path: Path, into: bool) -> None:
    copy(agent, "vm", f"{tree}/sub/..", str(tmp_path / "new"), into)
    same(tree, tmp_path / "new", into)


def test_files(agent: Agent, tree: Path, tmp_path: Path, into: bool) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "old").write_text("old")
    copy(agent, "vm", str(tree / "file"), str(tmp_path / "there"), into)
    copy(agent, "vm", str(tree / "-dash"), str(tmp_path / "there"), into)
    copy(agent, "vm", str(tree / "large"), str(tmp_path / "new"), into)
    copy(agent, "vm", str(tree / "file"), str(tmp_path / "old"), into)
    assert (tmp_path / "there/file").read_text() == "content\n"
    assert (tmp_path / "there/-dash").read_text() == "dash"
    assert (tmp_path / "new").read_bytes() == (tree / "large").read_bytes()
    assert (tmp_path / "old").read_text() == "content\n"
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


def test_a_link_is_copied_and_one_in_the_way_is_replaced(agent: Agent, tree: Path, tmp_path: Path, into: bool) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "way").symlink_to(precious)
    copy(agent, "vm", str(tree / "dangling"), str(tmp_path / "new"), into)
    copy(agent, "vm", str(tree / "file"), str(tmp_path / "way"), into)
    assert os.readlink(tmp_path / "new") == "/no/such/place"
    assert precious.read_text() == "precious" and not (tmp_path / "way").is_symlink()


@pytest.mark.parametrize(
    ("source", "target", "error", "words"),
    [
        ("none", "new", NotFound, "there is no"),
        ("file/", "new", UsageError, "is not a directory"),
        ("file/.", "new", NotFound, "there is no"),
        ("file", "no/such/new", NotFound, "no directory for"),
        ("file", "new/", NotFound, "there is no directory"),
        ("sub", "file", Conflict, "is not a directory"),
    ],
)
def test_mistakes_change_nothing(
    agent: Agent, tree: Path, into: bool, source: str, target: str, error: type[OvtError], words: str
) -> None:
    before = sorted(tree.rglob("*"))
    with pytest.raises(error, match=words):
        copy(agent, "vm", f"{tree}/{source}", f"{tree}/{target}", into)
    assert sorted(tree.rglob("*")) == before
    assert not left_in_the_guest()


def test_messages_name_the_guest(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"there is no vm:{tmp_path}/none"):
        copy(agent, "vm", f"{tmp_path}/none", str(tmp_path), False)


def test_tar_that_fails_is_heard(agent: Agent, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "there/tree/file").mkdir(parents=True)
    (tmp_path / "there/tree/file/inner").write_text("in the way")
    with pytest.raises(HostError, match="tar in the guest failed: tar: file: "):
        copy(agent, "vm", str(tree / "file"), str(tmp_path / "there/tree"), True)
    assert not left_in_the_guest()


def test_file_that_cannot_be_read_ends_the_copy(
    agent: Agent, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("/sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr("ovt.engine.vm.agent_copy.os.lstat", failing)
    with pytest.raises(HostError, match="tree/sub: permission denied"):
        copy(agent, "vm", str(tree), str(tmp_path / "new"), True)
    monkeypatch.undo()
    assert not left_in_the_guest()


# guests that cannot, or lie


def guest(probe: bytes, data: bytes = b"") -> Callable[[dict[str, Any]], Any]:
    """Any qemu-guest-agent whose programs all succeed; `data` is in every file."""
    outputs = {"kind()": probe, "mktemp": b"/tmp/ovt.abcdefgh12\n"}
    current = b""
    sent = False

    def handler(request: dict[str, Any]) -> Any:
        nonlocal current, sent
        arguments = request.get("arguments", {})
        match request["execute"]:
            case "guest-info":
                names = ("exec", "exec-status", "file-open", "file-read", "file-write", "file-flush", "file-close")
                return supporting(*(f"guest-{name}" for name in names))
            case "guest-exec":
                script = " ".join(arguments["arg"][:2])
                current = next((text for word, text in outputs.items() if word in script), b"")
                return {"return": {"pid": 5}}
            case "guest-exec-status":
                return {"return": {"exited": True, "exitcode": 0, "out-data": b64(current)}}
            case "guest-file-open":
                return {"return": 1000}
            case "guest-file-read":
                piece, sent = (b"" if sent else data), True
                return {"return": {"count": len(piece), "buf-b64": b64(piece), "eof": not piece}}
        return {"return": {}}

    return handler


def test_guest_without_tar(tmp_path: Path) -> None:
    with fake(tmp_path, guest(b"file\nfile\ndir\nnone\n")), pytest.raises(StateError, match="no tar"):
        copy(Agent(str(tmp_path)), "vm", "/etc/hosts", str(tmp_path / "new"), False)


@pytest.mark.parametrize("probe", [b"", b"file\n", b"a b c d", b"file file dir gnu extra", b"\xff\xff \xff \x1b"])
def test_nonsense_about_what_is_there(tmp_path: Path, probe: bytes) -> None:
    with fake(tmp_path, guest(probe)), pytest.raises(HostError, match="cannot find out"):
        copy(Agent(str(tmp_path)), "vm", "/etc/hosts", str(tmp_path / "new"), False)


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"x" * 5000, b"\0" * 100])
def test_no_archive(tmp_path: Path, data: bytes) -> None:
    with fake(tmp_path, guest(b"file\nfile\ndir\ngnu\n", data)) as peer, pytest.raises(OvtError, match="vm:/etc/hosts"):
        copy(Agent(str(tmp_path)), "vm", "/etc/hosts", str(tmp_path / "new"), False)
    assert not (tmp_path / "new").exists()
    assert peer.seen.count("guest-file-close") == 1
    last = [request for request in peer.requests if request["execute"] == "guest-exec"][-1]
    assert last["arguments"]["path"] == "rm"


def test_write_that_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with fake(tmp_path, guest(b"none\nnone\ndir\ngnu\n")), pytest.raises(OvtError, match="how much it wrote"):
        copy(Agent(str(tmp_path)), "vm", str(tmp_path / "file"), "/new", True)
