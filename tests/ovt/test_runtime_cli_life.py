"""start, kill, delete, pause and resume of real containers, also many at once."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import Bundle, Oci
from tests.ovt.live import WAITING, Create, namespaces, refused, wait_for

pytestmark = pytest.mark.root
TRAPS = """
for s in TERM INT HUP USR1 35; do trap "echo got $s; exit 3" $s; done
echo ready; while :; do sleep 0.02; done
"""


@pytest.mark.parametrize(
    ("words", "name"),
    [([], "TERM"), (["TERM"], "TERM"), (["SIGINT"], "INT"), (["1"], "HUP"), (["sigusr1"], "USR1"),
     (["--signal", "USR1"], "USR1"), (["RTMIN+1"], "35"), (["SIGRTMIN+1"], "35"), (["RTMAX-29"], "35")],
)  # fmt: skip
def test_kill(create: Create, words: list[str], name: str) -> None:
    container = create("sh", "-c", TRAPS).start()
    wait_for(lambda: "ready" in container.output())
    flags = [word for word in words if word.startswith("-")]
    rest = words[len(flags) + 1 :] if flags else words
    container.oci("kill", *words[: len(words) - len(rest)], container.id, *rest, check=True)
    wait_for(lambda: container.status == "stopped")
    assert f"got {name}" in container.output()


@pytest.mark.parametrize("form", ["9", "KILL", "SIGKILL"])
def test_kill_for_good(create: Create, form: str) -> None:
    container = create("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.02; done").start()
    wait_for(lambda: "ready" in container.output())
    container.oci("kill", container.id, form, check=True)
    wait_for(lambda: container.status == "stopped")


@pytest.mark.parametrize("form", ["NOSUCH", "65", "-1", "RTMIN+40", "SIG"])
def test_no_signal(create: Create, form: str) -> None:
    container = create(*WAITING)
    refused(container.oci("kill", container.id, form))
    assert container.status == "created"


def test_signal_0_asks_only(create: Create) -> None:
    container = create(*WAITING).start()
    container.oci("kill", container.id, "0", check=True)
    assert container.status == "running"
    container.stop()
    assert "container not running" in refused(container.oci("kill", container.id, "0"))


def test_kill_of_a_created_container(create: Create) -> None:
    container = create(*WAITING)
    container.stop()
    assert "stopped" in refused(container.oci("start", container.id))


def test_kill_of_a_stopped_container(create: Create) -> None:
    container = create(*WAITING).start()
    container.stop()
    assert "container not running" in refused(container.oci("kill", container.id, "9"))
    container.oci("kill", "--all", container.id, "9", check=True)


@pytest.mark.parametrize("everything", [(), ("--all",)])
def test_kill_of_a_paused_container(create: Create, everything: tuple[str, ...]) -> None:
    container = create(*WAITING).start()
    container.oci("pause", container.id, check=True)
    container.oci("kill", *everything, container.id, "KILL", check=True)
    wait_for(lambda: container.status == "stopped")


def test_kill_all_reaches_every_process(create: Create) -> None:
    def host_pids(config: dict[str, Any]) -> None:
        namespaces(config, pid=None)

    container = create("sh", "-c", "sleep 1000 & sleep 1000 & wait", edit=host_pids).start()

    def pids() -> list[int]:
        numbers: list[int] = json.loads(container.oci("ps", "--format", "json", container.id, check=True).stdout)
        return numbers

    wait_for(lambda: len(pids()) == 3)
    container.oci("kill", "--all", container.id, "KILL", check=True)
    wait_for(lambda: not [pid for pid in pids() if Path(f"/proc/{pid}/root/bin").exists()])


def test_delete_of_a_stopped_container(create: Create, oci: Oci, run_root: Path) -> None:
    container = create("true").start()
    wait_for(lambda: container.status == "stopped")
    done = oci("delete", container.id, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert not (run_root / container.id).exists()
    assert "does not exist" in refused(oci("delete", container.id))


def test_delete_of_a_created_container(create: Create, oci: Oci) -> None:
    container = create(*WAITING)
    oci("delete", container.id, check=True)
    assert "does not exist" in refused(oci("state", container.id))


def test_delete_of_a_running_container(create: Create, oci: Oci) -> None:
    container = create(*WAITING).start()
    assert "is not stopped: running" in refused(oci("delete", container.id))
    assert container.status == "running"
    oci("delete", "--force", container.id, check=True)
    assert "does not exist" in refused(oci("state", container.id))


def test_delete_by_force_of_a_paused_container(create: Create, oci: Oci) -> None:
    container = create(*WAITING).start()
    oci("pause", container.id, check=True)
    assert "is not stopped: paused" in refused(oci("delete", container.id))
    oci("delete", "--force", container.id, check=True)


def test_delete_by_force_of_what_is_not_there(oci: Oci, container_id: str) -> None:
    done = oci("delete", "--force", container_id, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_delete_removes_the_cgroups(create: Create, oci: Oci) -> None:
    container = create(*WAITING).start()
    directories = [container.cgroup(name) for name in ("memory", "pids", "freezer")]
    assert all(directory.is_dir() for directory in directories)
    oci("delete", "--force", container.id, check=True)
    assert not any(directory.exists() for directory in directories)


def test_pause_stops_time(create: Create) -> None:
    container = create("sh", "-c", "while :; do echo x; sleep 0.01; done").start()
    wait_for(container.output)
    container.oci("pause", container.id, check=True)
    before = container.output()
    time.sleep(0.1)
    assert container.output() == before
    container.oci("resume", container.id, check=True)
    wait_for(lambda: container.output() != before)


def test_pause_and_resume_in_the_wrong_state(create: Create) -> None:
    container = create(*WAITING).start()
    assert "not paused" in refused(container.oci("resume", container.id))
    container.oci("pause", container.id, check=True)
    assert "paused" in refused(container.oci("pause", container.id))
    container.oci("resume", container.id, check=True)
    container.stop()
    assert "not running" in refused(container.oci("pause", container.id))


def test_start_twice(create: Create) -> None:
    container = create(*WAITING).start()
    assert "running" in refused(container.oci("start", container.id))
    container.stop()
    assert "stopped" in refused(container.oci("start", container.id))


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_run_has_the_exit_status(oci: Oci, bundle: Bundle, container_id: str, code: int) -> None:
    assert oci("run", "-b", bundle("sh", "-c", f"exit {code}"), container_id).returncode == code
    assert "does not exist" in refused(oci("state", container_id))


def test_run_has_the_signal(oci: Oci, bundle: Bundle, container_id: str) -> None:
    # process 1 of a namespace is spared its own signals
    place = bundle("sh", "-c", "kill -KILL $$; exit 5")
    assert oci("run", "-b", place, container_id).returncode == 5
    place = bundle("sh", "-c", "kill -KILL $$; exit 5", edit=lambda config: namespaces(config, pid=None))
    assert oci("run", "-b", place, container_id).returncode == 128 + 9


def test_run_keep(oci: Oci, bundle: Bundle, container_id: str) -> None:
    oci("run", "--keep", "-b", bundle(), container_id, check=True)
    assert json.loads(oci("state", container_id, check=True).stdout)["status"] == "stopped"
    oci("delete", container_id, check=True)


def test_run_detached(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    oci("run", "--detach", "--pid-file", tmp_path / "pid", "-b", bundle(*WAITING), container_id,
        capture_output=False, check=True)  # fmt: skip
    state = json.loads(oci("state", container_id, check=True).stdout)
    assert (state["status"], str(state["pid"])) == ("running", (tmp_path / "pid").read_text())
    oci("delete", "--force", container_id, check=True)


def test_run_passes_signals_on(runtime: Path, run_root: Path, bundle: Bundle, container_id: str) -> None:
    place = bundle("sh", "-c", "trap 'exit 9' USR1; echo ready; while :; do sleep 0.02; done")
    with subprocess.Popen([runtime, "--root", run_root, "run", "-b", place, container_id],
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout and process.stdout.readline() == "ready\n"
        status = Path(f"/proc/{process.pid}/status")
        wait_for(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> 9 & 1)
        process.send_signal(10)
        assert process.wait(10) == 9


def test_config_elsewhere(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    place = bundle("echo", "moved")
    (place / "config.json").rename(tmp_path / "other.json")
    out = oci("run", "--config", tmp_path / "other.json", "-b", place, container_id, check=True).stdout
    assert out == "moved\n"


def test_the_bundle_is_the_working_directory_by_default(oci: Oci, bundle: Bundle, container_id: str) -> None:
    assert oci("run", container_id, cwd=bundle("echo", "here"), check=True).stdout == "here\n"


def test_a_bundle_without_configuration(oci: Oci, container_id: str, tmp_path: Path) -> None:
    assert "config.json" in refused(oci("create", "-b", tmp_path, container_id))


# several at once -----------------------------------------------------------------------------------------------------


def statuses(oci: Oci, *calls: Sequence[object]) -> list[int]:
    """Exit statuses of calls made at the same time. No pipes: created containers would hold them open."""
    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [
            pool.submit(oci, *call, capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for call in calls
        ]
        return [job.result().returncode for job in jobs]


def test_twenty_creates_at_once(oci: Oci, bundle: Bundle, container_id: str) -> None:
    names = [f"{container_id}-{number}" for number in range(20)]
    places = [bundle(*WAITING, config={"linux": {"cgroupsPath": f"/{leaks.PREFIX}/{name}"}}) for name in names]
    try:
        calls = [["create", "-b", p, n] for p, n in zip(places, names, strict=True)]
        assert statuses(oci, *calls) == [0] * 20
        entries = json.loads(oci("list", "--format", "json", check=True).stdout)
        assert sorted(entry["id"] for entry in entries) == sorted(names)
        assert len({entry["pid"] for entry in entries}) == 20
        assert {entry["status"] for entry in entries} == {"created"}
    finally:
        assert statuses(oci, *[["delete", "--force", name] for name in names]) == [0] * 20


def test_one_of_two_creates_of_the_same_name_wins(oci: Oci, bundle: Bundle, container_id: str) -> None:
    for _ in range(5):
        places = [bundle(*WAITING) for _ in range(2)]
        assert sorted(statuses(oci, *[["create", "-b", place, container_id] for place in places])) == [0, 1]
        state = json.loads(oci("state", container_id, check=True).stdout)
        assert state["status"] == "created" and Path(f"/proc/{state['pid']}").exists()
        oci("delete", "--force", container_id, check=True)


def test_one_of_two_starts_wins(create: Create, tmp_path: Path) -> None:
    for _ in range(5):
        container = create("sh", "-c", "echo once; exec sleep 1000")
        assert sorted(statuses(container.oci, ["start", container.id], ["start", container.id])) == [0, 1]
        wait_for(container.output)
        assert container.output().count("once") == 1


def test_one_of_two_deletes_does_not_disturb_the_other(create: Create, oci: Oci) -> None:
    for _ in range(3):
        container = create(*WAITING).start()
        assert statuses(oci, *[["delete", "--force", container.id]] * 2) == [0, 0]
        assert "does not exist" in refused(oci("state", container.id))


def test_many_execs_at_once(create: Create) -> None:
    container = create(*WAITING).start()
    with ThreadPoolExecutor(8) as pool:
        out = list(pool.map(lambda number: container.ask("echo", str(number)), range(16)))
    assert out == [str(number) for number in range(16)]
    assert os.path.exists(f"/proc/{container.pid}")
