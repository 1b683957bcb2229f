"""kill -9 of the runtime, of its builder and of ovt-init, at places spread over create, start, exec and delete.

Whatever the place: within two seconds no process is left but those of a container that `state` reports, `state`
gives one clear answer, `delete --force` succeeds, and then nothing is left on the host.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import usage
from tests import leaks
from tests.conftest import BARE, Bundle, Oci
from tests.crash.tracer import Run, points

pytestmark = pytest.mark.root

CREATE, START, EXEC, DELETE = 22, 6, 10, 12
STATUSES = {"creating", "created", "running", "stopped", "paused"}
lengths: dict[str, tuple[int, int]] = {}


class Scene:
    """One container, the commands on it, and what the host looked like before."""

    def __init__(self, runtime: Path, run_root: Path, oci: Oci, container_id: str, bundle: Path, base: Path) -> None:
        self.command = [str(runtime), "--root", str(run_root)]
        self.run_root = run_root
        self.oci = oci
        self.id = container_id
        self.bundle = bundle
        self.error = run_root.parent / "error"
        self.mounts = host_mounts()
        self.before = leaks.Snapshot(base)

    def words(self, verb: str) -> list[str]:
        return {
            "create": ["create", "--pid-file", str(self.run_root.parent / "pid"), "-b", str(self.bundle), self.id],
            "start": ["start", self.id],
            "exec": ["exec", "--detach", self.id, "sleep", "60"],
            "delete": ["delete", "--force", self.id],
        }[verb]

    def prepare(self, verb: str) -> None:
        """Everything up to the verb."""
        steps: dict[str, list[str]] = {"create": [], "start": ["create"], "exec": ["create", "start"]}
        for step in steps.get(verb, ["create", "start"]):
            # no pipes: the container inherits them, and their end would be waited for
            with open(self.error, "wb") as error:
                done = subprocess.run(
                    [*self.command, *self.words(step)], env=BARE, check=False, timeout=30,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=error,
                )
            assert done.returncode == 0, self.error.read_text()

    def traced(self, verb: str, role: str = "main", at: int = -1) -> Run:
        with open(self.error, "wb") as error:
            return Run(
                [*self.command, *self.words(verb)], role, at, watch=str(self.run_root), env=BARE,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=error,
            )

    def state(self) -> dict[str, Any] | None:
        """The answer of `state`, which must be one: a status, or that there is no such container."""
        done = self.oci("state", self.id)
        if done.returncode:
            assert done.stderr.count("\n") == 1 and "does not exist" in done.stderr, done.stderr
            return None
        state: dict[str, Any] = json.loads(done.stdout)
        assert state["status"] in STATUSES, state
        return state

    def check_processes(self) -> None:
        """Only the reported container lives, with what was executed in it."""
        deadline = time.monotonic() + 2
        while True:
            leaks.reap()
            state = self.state()
            known: set[int] = set()
            if state and state["status"] != "stopped":
                listed = self.oci("ps", "--format", "json", self.id)
                known = {state["pid"], *(json.loads(listed.stdout) or [] if listed.returncode == 0 else [])}
            left = {pid: what for pid, what in leaks.descendants().items() if pid not in self.before.processes | known}
            if not left:
                return
            assert time.monotonic() < deadline, f"{left} beside {state}"
            time.sleep(0.02)

    def check_gone(self) -> None:
        """`delete --force` removes it all, and its name can be used again."""
        self.oci("list", check=True)
        if self.state() is None:  # what is left then is for `ovt check` to find
            assert self.entries() == set(usage.unrecorded(str(self.run_root)))
        self.oci("delete", "--force", self.id, check=True)
        assert self.state() is None
        assert leaks.left_behind(self.before) == []
        assert host_mounts() <= self.mounts
        assert usage.unrecorded(str(self.run_root)) == []
        assert self.entries() == set()
        self.oci("run", "-b", self.bundle_that_ends(), self.id, check=True)

    def entries(self) -> set[str]:
        return set(os.listdir(self.run_root)) - {".seccomp"} if self.run_root.exists() else set()

    def bundle_that_ends(self) -> Path:
        path = self.bundle / "config.json"
        config = json.loads(path.read_text())
        config["process"]["args"] = ["true"]
        path.write_text(json.dumps(config))
        return self.bundle


def host_mounts() -> set[str]:
    """Mounts of the host that a container could have left; other programs make theirs in other places."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return {point for point in points if not point.startswith(("/var/", "/run/", "/tmp/"))}


@pytest.fixture
def scene(
    runtime: Path, run_root: Path, oci: Oci, container_id: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Scene]:
    def make(**changes: Any) -> Scene:
        place = bundle("sleep", "60", config=changes.pop("config", None), **changes)
        return Scene(runtime, run_root, oci, container_id, place, tmp_path_factory.getbasetemp())

    return make


SceneMaker = Callable[..., Scene]


def length(scene: Scene, verb: str, role: str = "main", key: str = "") -> tuple[int, int]:
    """(first call that concerns the container, number of calls) of an undisturbed run; one dry run for each kind."""
    key = key or f"{verb} {role}"
    if key not in lengths:
        run = scene.traced(verb, role)
        assert run.status == 0, scene.error.read_text()
        first = run.mark if role == "main" else 0
        assert first >= 0
        lengths[key] = first, len(run.calls)
        leaks.reap()
        scene.oci("delete", "--force", scene.id, check=True)
        leaks.reap()
        scene.prepare(verb)
    return lengths[key]


def kill(scene: Scene, verb: str, point: int, count: int, key: str = "") -> None:
    scene.prepare(verb)
    first, total = length(scene, verb, key=key)
    at = points(first, total, count)[min(point, total - first - 1)]
    run = scene.traced(verb, at=at)
    assert run.status == -signal.SIGKILL or at >= len(run.calls), "it ran to its end, though the place was on its way"
    scene.check_processes()
    scene.check_gone()


@pytest.mark.parametrize("point", range(CREATE))
def test_create(scene: SceneMaker, point: int) -> None:
    kill(scene(), "create", point, CREATE)


@pytest.mark.parametrize("point", range(START))
def test_start(scene: SceneMaker, point: int) -> None:
    """The launcher's own start, which is a dozen system calls without Python."""
    kill(scene(), "start", point, START)


@pytest.mark.parametrize("point", range(START))
def test_start_with_hooks(scene: SceneMaker, point: int) -> None:
    """The start that Python makes."""
    hooks = {"hooks": {"poststart": [{"path": "/bin/true", "args": ["true"]}]}}
    kill(scene(config=hooks), "start", point, START, key="start with hooks")


@pytest.mark.parametrize("point", range(EXEC))
def test_exec(scene: SceneMaker, point: int) -> None:
    kill(scene(), "exec", point, EXEC)


@pytest.mark.parametrize("point", range(DELETE))
def test_delete(scene: SceneMaker, point: int) -> None:
    kill(scene(), "delete", point, DELETE)


def user_namespace(config: dict[str, Any]) -> None:
    config["linux"]["namespaces"] += [{"type": "user"}, {"type": "cgroup"}]
    config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1000}]


@pytest.mark.parametrize("point", range(6))
def test_create_with_a_user_namespace(scene: SceneMaker, point: int) -> None:
    kill(scene(edit=user_namespace), "create", point, 6, key="create with a user namespace")


@pytest.mark.parametrize("role", ["builder", "init", "container"])
@pytest.mark.parametrize("point", range(6))
def test_a_helper_of_create(scene: SceneMaker, role: str, point: int) -> None:
    """A helper dies instead: `create` itself says so in one line, and has already cleaned up."""
    here = scene()
    first, total = length(here, "create", role)
    run = here.traced("create", role, points(first, total, 6)[min(point, total - 1)])
    leaks.reap()
    if run.status == 0:  # after its last report: the container is made, and lives unless it was the one that died
        allowed = ("created",) if role == "builder" else ("stopped", "created")
        assert (here.state() or {}).get("status") in allowed
    else:
        text = here.error.read_text()
        assert run.status == 1 and text.count("\n") == 1 and text.startswith("ovt-runtime: "), text
        assert "internal error" not in text and ("unexpectedly" in text or "ended" in text or "no such" in text), text
        assert here.state() is None
    here.check_gone()


@pytest.mark.parametrize("point", range(5))
def test_the_init_of_exec(scene: SceneMaker, point: int) -> None:
    """The same for exec: one line, and the container lives on."""
    here = scene()
    here.prepare("exec")
    first, total = length(here, "exec", "init")
    run = here.traced("exec", "init", points(first, total, 5)[min(point, total - 1)])
    leaks.reap()
    if run.status:
        text = here.error.read_text()
        assert text.count("\n") == 1 and text.startswith("ovt-runtime: ") and "internal error" not in text, text
    state = here.state()
    assert state and state["status"] == "running"
    here.check_processes()
    here.check_gone()
