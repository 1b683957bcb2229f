"""The life of a container at its edges: hooks that misbehave, a pause before the start, names half made."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BARE, Bundle, Oci
from tests.ovt.live import WAITING, Create, Run, refused

pytestmark = pytest.mark.root
LONG = {"annotations": {"long": "x" * 200_000}}  # more than a pipe holds


def shell(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


@pytest.mark.parametrize("name", ["createRuntime", "startContainer"])
def test_a_hook_need_not_read_a_long_state(run: Run, name: str) -> None:
    assert run("echo", "on", config={**LONG, "hooks": {name: [shell("exit 0")]}}) == "on"


def test_a_hook_reads_all_of_a_long_state(run: Run, tmp_path: Path) -> None:
    run("true", config={**LONG, "hooks": {"createRuntime": [shell(f"cat > {tmp_path}/state")]}})
    assert json.loads((tmp_path / "state").read_text())["annotations"] == LONG["annotations"]


def test_the_timeout_holds_while_the_state_is_not_read(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle("true", config={**LONG, "hooks": {"createRuntime": [shell("exec sleep 100", timeout=1)]}})
    began = time.monotonic()
    assert "did not end within 1 s" in refused(oci("create", "-b", place, container_id))
    assert time.monotonic() - began < 10


def test_a_daemon_of_a_hook_that_never_stops_writing(run: Run) -> None:
    began = time.monotonic()
    run("true", config={"hooks": {"createRuntime": [shell("timeout 5 yes & exit 0")]}})
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("name", ["prestart", "createRuntime", "createContainer", "startContainer"])
def test_poststop_hooks_run_after_a_hook_that_failed(
    oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path, name: str
) -> None:
    """The runtime-spec's lifecycle: an error, the container stopped, then on with poststop."""
    hooks = {name: [shell("exit 3")], "poststop": [shell(f"cat > {tmp_path}/after")]}
    place = bundle(*WAITING, config={"hooks": hooks})
    assert f"{name} hook #0 (/bin/sh): exit status 3" in refused(oci("run", "-b", place, container_id))
    state = json.loads((tmp_path / "after").read_text())
    assert (state["id"], state["status"]) == (container_id, "stopped")
    assert "does not exist" in refused(oci("state", container_id))


def test_paused_before_the_start(create: Create, oci: Oci) -> None:
    container = create(*WAITING)
    oci("pause", container.id, check=True)
    assert container.status == "paused"
    assert "paused state" in refused(oci("start", container.id, timeout=10))
    oci("resume", container.id, check=True)
    assert container.status == "created"
    assert container.start().status == "running"


def test_a_name_that_is_only_claimed(oci: Oci, run_root: Path, container_id: str) -> None:
    """Its record has no process yet, and its maker lives: there is nothing to signal, but delete --force removes it."""
    started = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    record = {"pid": 0, "pid_start": 0, "maker": [os.getpid(), int(started)], "ready": False, "created": "",
              "hooks": {}, "bundle": "/", "namespaces": 0, "cgroup": None}  # fmt: skip
    (run_root / container_id).mkdir(parents=True, mode=0o700)
    (run_root / container_id / "state.json").write_text(json.dumps(record))
    assert json.loads(oci("state", container_id, check=True).stdout)["status"] == "creating"
    assert "is being created" in refused(oci("kill", container_id, "KILL"))
    oci("delete", "--force", container_id, check=True)
    assert not (run_root / container_id).exists()


def test_signal_0_asks_only(create: Create, oci: Oci) -> None:
    container = create(*WAITING).start()
    oci("kill", container.id, "0", check=True)
    assert container.status == "running"
    container.stop()
    assert "not running" in refused(oci("kill", container.id, "0"))


def test_a_notify_socket_at_the_start_alone(create: Create, oci: Oci, tmp_path: Path) -> None:
    container = create(*WAITING)
    oci("start", container.id, check=True, env={**BARE, "NOTIFY_SOCKET": f"{tmp_path}/socket"})
    assert container.status == "running"


def test_exec_gives_its_pipes_to_its_user(create: Create) -> None:
    container = create(*WAITING).start()
    done = container.oci("exec", "--user", "1000:1000", container.id, "sh", "-c", "echo x > /dev/stdout", check=True)
    assert done.stdout == "x\n"


def test_exec_keeps_the_affinity_that_is_meant_for_it(create: Create) -> None:
    first = min(os.sched_getaffinity(0))
    process = {"execCPUAffinity": {"final": str(first)}, "rlimits": None}
    container = create(*WAITING, config={"process": process}).start()
    status = container.ask("grep", "Cpus_allowed_list", "/proc/self/status")
    assert status.split() == ["Cpus_allowed_list:", str(first)]


def test_a_device_that_nobody_may_open(run: Run) -> None:
    device = {"path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 0}
    assert run("stat", "-c", "%a", "/dev/own", config={"linux": {"devices": [device]}}) == "0"


def test_a_home_longer_than_any_path(oci: Oci, bundle: Bundle, container_id: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["process"]["env"] = [entry for entry in config["process"]["env"] if not entry.startswith("HOME=")]

    place = bundle("sh", "-c", "echo $HOME", edit=edit)
    (place / "rootfs/etc/passwd").write_text(f"root:x:0:0:root:/{'h' * 300_000}:/bin/sh\n")
    assert oci("run", "-b", place, container_id, check=True).stdout == "/\n"


def test_a_busy_terminal_does_not_outlive_its_process(create: Create, runtime: Path, run_root: Path) -> None:
    """Others may write to it for ever; what counts is the end of the process that was asked for."""
    container = create(*WAITING).start()
    script = "trap '' HUP; yes & exit 5"
    command = [str(runtime), "--root", str(run_root), "exec", "--tty", container.id, "sh", "-c", script]
    done = subprocess.run(command, env=BARE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=30)
    assert done.returncode == 5
