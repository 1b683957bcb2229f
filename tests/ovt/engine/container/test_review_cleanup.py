"""One process that makes many containers: no step that fails may leave a descriptor, a child or a directory behind."""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import config as configs
from ovt.engine.container.init import Init, _memfd
from ovt.engine.container.namespaces import Namespaces
from ovt.engine.container.runtime import Runtime
from ovt.errors import ConfigError, HostError, OvtError, PayloadError
from tests import leaks
from tests.conftest import Bundle
from tests.ovt.live import bind, namespaces

pytestmark = pytest.mark.root
Edit = Callable[[dict[str, Any]], object]

_memfd()  # the one descriptor that an engine keeps for good


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.fixture
def engine(run_root: Path) -> Runtime:
    return Runtime(str(run_root))


def terminal(config: dict[str, Any]) -> None:
    config["process"]["terminal"] = True


def without_devpts(config: dict[str, Any]) -> None:
    terminal(config)
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/dev/pts"]


def on_the_host(config: dict[str, Any]) -> None:
    """No namespaces at all, but a terminal."""
    terminal(config)
    config.pop("hostname", None)
    for name in ("namespaces", "maskedPaths", "readonlyPaths"):
        config["linux"][name] = []


def hook(name: str, **changes: Any) -> Edit:
    return lambda config: config.update(hooks={name: [{"path": "/bin/false", **changes}]})


CASES: dict[str, tuple[Edit, dict[str, Any], str]] = {
    "bind source": (lambda c: c["mounts"].extend([bind("/tmp", "/mnt"), bind("/no/such", "/mnt")]), {}, "/no/such"),
    "second namespace": (lambda c: namespaces(c, network="/proc/self/ns/net", ipc="/no/such"), {}, "/no/such"),
    "kind of namespace": (lambda c: namespaces(c, ipc="/proc/self/ns/net"), {}, "not a ipc namespace"),
    "root is a file": (lambda c: c["root"].update(path="/etc/passwd"), {}, "not a directory"),
    "root is missing": (lambda c: c["root"].update(path="/no/such"), {}, "no such file"),
    "hook is missing": (hook("createRuntime", path="/no/such"), {}, "no such file"),
    "hook fails": (hook("createContainer"), {}, "exit status 1"),
    "no devpts": (without_devpts, {"want_terminal": True}, "/dev/pts/ptmx"),
    "no namespaces, no devpts": (on_the_host, {"want_terminal": True}, "/dev/pts/ptmx"),
    "console socket": (terminal, {"console_socket": "/no/such"}, "No such file"),
    "long console socket": (terminal, {"console_socket": "/" + "x" * 120}, "too long"),
    "pid file": (terminal, {"want_terminal": True, "pid_file": "/no/such"}, "No such file"),
    "program": (lambda c: c["process"].update(args=["no-such"]), {}, "not found"),
    "long program": (lambda c: c["process"].update(args=["x" * 200_000]), {}, "xxx"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_creation_that_fails(
    engine: Runtime, bundle: Bundle, container_id: str, run_root: Path, name: str
) -> None:
    edit, options, words = CASES[name]
    place = bundle("true", edit=edit)
    before = descriptors(), children()
    for _ in range(3):
        with pytest.raises((OvtError, OSError)) as caught:
            engine.create(container_id, str(place), **options)
        assert words in str(caught.value)
        del caught
        assert (descriptors(), children()) == before
        assert not (run_root / container_id).exists()


EXECS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception]]] = {
    "program": ({"args": ["no-such"]}, {}, PayloadError),
    "directory": ({"cwd": "/no/such"}, {}, OSError),
    "initial CPU": ({"execCPUAffinity": {"initial": "900"}}, {}, HostError),
    "pid file": ({}, {"pid_file": "/no/such/file"}, OSError),
    "terminal's pid file": ({"terminal": True}, {"want_terminal": True, "pid_file": "/no/such/file"}, OSError),
    "console socket": ({"terminal": True}, {"console_socket": "/no/such"}, HostError),
}


@pytest.fixture
def waiting(engine: Runtime, bundle: Bundle, container_id: str) -> Iterator[str]:
    engine.create(container_id, str(bundle("sleep", "1000")))
    engine.start(container_id)
    yield container_id
    engine.delete(container_id, force=True)
    leaks.reap()


@pytest.mark.parametrize("name", EXECS)
def test_an_exec_that_fails(engine: Runtime, waiting: str, name: str) -> None:
    changes, options, kind = EXECS[name]
    process = {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"], **changes}
    before = descriptors(), children()
    with pytest.raises(kind) as caught:
        engine.exec(waiting, process, **options)
    del caught
    assert (descriptors(), children()) == before


def test_a_full_disk_leaves_the_name_free(bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        (disk / "fill").write_bytes(bytes(12288))
        engine, place = Runtime(str(disk / "run")), str(bundle("true"))
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                engine.create(container_id, place)
            assert os.listdir(disk / "run") == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_more_mounts_than_descriptors(engine: Runtime, bundle: Bundle, container_id: str) -> None:
    many = [bind("/etc/hostname", f"/tmp/{number}") for number in range(300)]
    place = str(bundle("true", edit=lambda config: config["mounts"].extend(many)))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
    try:
        engine.create(container_id, place)
        engine.delete(container_id, force=True)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        leaks.reap()


def test_the_way_back_kills_no_stranger(engine: Runtime, waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the clone has taken over, the number of the reaped parent may be another process's."""
    seen: list[Init] = []
    adopt = Init.adopt_clone

    def spy(self: Init, tape: Any) -> int:
        pid = adopt(self, tape)
        seen.append(self)
        assert self.spawned == self.pid == pid
        return pid

    monkeypatch.setattr(Init, "adopt_clone", spy)
    process = {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]}
    os.waitpid(engine.exec(waiting, process), 0)
    assert len(seen) == 1


def test_the_runtimes_own_mount_namespace_is_refused(bundle: Bundle) -> None:
    """To pivot there would take the root away from every process of the host, so it is not tried here."""
    place = bundle("true", edit=lambda config: namespaces(config, mount="/proc/self/ns/mnt"))
    with pytest.raises(ConfigError, match="mount namespace of the runtime itself"):
        list(Namespaces(configs.load(str(place))).open_joined())


def test_a_terminal_without_namespaces(engine: Runtime, bundle: Bundle, container_id: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        on_the_host(config)
        config["root"]["path"] = "/"

    place = bundle("/bin/sh", "-c", "tty; echo done", edit=edit)
    state, master = engine.create_terminal(container_id, str(place), want_terminal=True)
    engine.start(container_id)
    text, deadline = b"", time.monotonic() + 10
    while b"done" not in text and time.monotonic() < deadline:
        text += os.read(master, 1000)
    assert b"/dev/pts/" in text
    os.waitpid(state.pid, 0)
    os.close(master)
    engine.delete(container_id, force=True)
