"""CVE-2024-21626, Leaky Vessels: descriptors that a runtime or its caller left open; working directories in them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BARE, Bundle, Oci
from tests.security.conftest import Container, Create, refused

pytestmark = pytest.mark.root

FIRST, LAST = 3, 24  # descriptor numbers under which the caller leaks a directory, and the runtime keeps its own

Leaky = Callable[..., "subprocess.CompletedProcess[str]"]
LEAK = 'for n in $(seq 3 24); do eval "exec $n< \\"\\$0\\""; done; exec "$@"'


@pytest.fixture
def host(tmp_path: Path) -> Path:
    place = tmp_path / "host"
    place.mkdir()
    (place / "host-mark").touch()
    return place


@pytest.fixture
def leaky(runtime: Path, run_root: Path, host: Path) -> Leaky:
    """Call the runtime like the fixture `oci`, but with descriptors FIRST to LAST open on the directory `host`."""

    def call(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
        command = ["bash", "-c", LEAK, host, runtime, "--root", run_root, *map(str, arguments)]
        options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options}
        return subprocess.run(command, env=BARE, timeout=60, check=False, **options)

    return call


def test_the_trap_is_set(host: Path) -> None:
    """A program that is executed with these descriptors does reach the host's directory."""
    command = ["bash", "-c", LEAK, host, "/bin/busybox", "ls", f"/proc/self/fd/{FIRST}", f"/proc/self/fd/{LAST}"]
    done = subprocess.run(command, env=BARE, capture_output=True, text=True, check=True)
    assert done.stdout.count("host-mark") == 2


@pytest.mark.parametrize("place", ["proc", "link", "child", "thread-self"])
def test_cve_2024_21626_working_directory_of_run(
    oci: Oci, bundle: Bundle, container_id: str, leaky: Leaky, place: str
) -> None:
    """process.cwd is a descriptor, by number, through a link in the image, or a directory below it."""
    for number in range(FIRST, LAST + 1, 1 if place == "proc" else 4):
        base = "/proc/thread-self" if place == "thread-self" else "/proc/self"
        cwd = f"{base}/fd/{number}" + ("/." if place == "child" else "")
        made = bundle("ls", "-a", ".", config={"process": {"cwd": "/work" if place == "link" else cwd}})
        if place == "link":
            (made / "rootfs/work").symlink_to(cwd)
        done = leaky("run", "-b", made, container_id)
        assert "host-mark" not in done.stdout
        assert "cwd" in refused(done) or "current directory" in done.stderr


def test_cve_2024_21626_working_directory_of_exec(
    oci: Oci, bundle: Bundle, create: Create, leaky: Leaky
) -> None:
    container = create(bundle("sleep", "60")).start()
    for number in range(FIRST, LAST + 1):
        done = leaky("exec", "--cwd", f"/proc/self/fd/{number}", container.id, "ls", "-a", ".")
        assert "host-mark" not in done.stdout
        assert "cwd" in refused(done) or "current directory" in done.stderr


def test_cve_2024_21626_a_preserved_directory_is_no_working_directory(
    oci: Oci, bundle: Bundle, create: Create, container_id: str, leaky: Leaky
) -> None:
    """Even a directory that the caller hands over on purpose cannot be the working directory: it lies outside."""
    made = bundle("ls", config={"process": {"cwd": f"/proc/self/fd/{FIRST}"}})
    done = leaky("run", "--preserve-fds", "1", "-b", made, container_id)
    assert "outside of the container's root" in refused(done)
    container = create(bundle("sleep", "60")).start()
    done = leaky("exec", "--preserve-fds", "1", "--cwd", f"/proc/self/fd/{FIRST}", container.id, "ls")
    assert "outside of the container's root" in refused(done)


@pytest.mark.parametrize("program", ["/proc/self/fd/{}/program", "fd/{}/program", "../proc/self/fd/{}/program"])
def test_cve_2024_21626_program(
    oci: Oci, bundle: Bundle, container_id: str, leaky: Leaky, host: Path, program: str
) -> None:
    """The program itself is named through a descriptor."""
    script = host / "program"
    script.write_text("#!/bin/busybox echo\n")
    script.chmod(0o755)
    for number in range(FIRST, LAST + 1, 4):
        made = bundle(program.format(number), config={"process": {"cwd": "/proc/self" if program[0] == "f" else "/"}})
        done = leaky("run", "-b", made, container_id)
        refused(done)
        assert "program" not in done.stdout


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_no_descriptor_but_those_that_were_asked_for(
    oci: Oci, bundle: Bundle, create: Create, container_id: str, leaky: Leaky, keep: int
) -> None:
    """run, exec and a container that waits have 0, 1, 2 and as many more as --preserve-fds says."""
    command = ["sh", "-c", "cd /proc/self/fd && echo *"]  # the shell's own descriptor of this directory is not there
    expected = {str(number) for number in range(3 + keep)}
    flags = ("--preserve-fds", str(keep))
    done = leaky("run", *flags, "-b", bundle(*command), container_id)
    assert set(done.stdout.split()) - {str(3 + keep)} == expected

    waiting = Container(oci, f"{container_id}-waiting")
    made = bundle("sleep", "60")
    quiet: dict[str, Any] = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert leaky("create", *flags, "-b", made, waiting.id, **quiet).returncode == 0
    held = {name: os.readlink(f"/proc/{waiting.pid}/fd/{name}") for name in os.listdir(f"/proc/{waiting.pid}/fd")}
    own = {n for n, t in held.items() if t.endswith(("/exec.fifo", "/start.error")) or t.startswith("socket:")}
    assert len(own) == 3 and set(held) - own == expected, held
    waiting.start()
    assert set(os.listdir(f"/proc/{waiting.pid}/fd")) == expected
    done = leaky("exec", *flags, waiting.id, *command)
    assert set(done.stdout.split()) - {str(3 + keep)} == expected
    oci("delete", "--force", waiting.id, check=True)


def test_a_container_that_waits_keeps_no_namespace_open(create: Create, bundle: Bundle) -> None:
    """Descriptors of joined namespaces are closed once they are joined; one kept would outlive its namespace."""
    first = create(bundle("sleep", "60")).start()

    def join(config: dict[str, Any]) -> None:
        for entry, name in zip(config["linux"]["namespaces"], ("pid", "net", "ipc", "uts", "mnt"), strict=False):
            if name in ("net", "ipc", "uts"):
                entry["path"] = f"/proc/{first.pid}/ns/{name}"
        config.pop("hostname", None)

    second = create(bundle("sleep", "60", edit=join))
    targets = [os.readlink(f"/proc/{second.pid}/fd/{name}") for name in os.listdir(f"/proc/{second.pid}/fd")]
    assert not [target for target in targets if target.startswith(("net:", "ipc:", "uts:"))]
    assert os.readlink(f"/proc/{second.pid}/ns/net") == os.readlink(f"/proc/{first.pid}/ns/net")


def test_hooks_get_no_leaked_descriptor(oci: Oci, bundle: Bundle, container_id: str, leaky: Leaky) -> None:
    """What a hook of the host may hold open it may also forget: it gets its three descriptors and no more."""
    made = bundle("true")
    log = made / "log"
    command = ["sh", "-c", f"exec /bin/ls /proc/self/fd > {log}"]
    config = json.loads((made / "config.json").read_text())
    config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": command}]}
    config["hooks"]["createContainer"] = [{"path": "/bin/sh", "args": [*command[:2], f"{command[2]}-inside"]}]
    (made / "config.json").write_text(json.dumps(config))
    done = leaky("run", "-b", made, container_id)
    assert done.returncode == 0, done.stderr
    for name in ("log", "log-inside"):
        assert (made / name).read_text().split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads
