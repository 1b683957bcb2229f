"""Limits of real containers: set at creation, changed by `update`, measured by `events`, shown by a cgroup mount."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import Bundle, Oci
from tests.ovt.live import WAITING, Container, Create, Run, namespaces, refused, wait_for

pytestmark = pytest.mark.root
UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers").exists()
MIB = 1 << 20


@pytest.fixture
def container(create: Create) -> Container:
    return create(*WAITING).start()


def update(container: Container, *flags: str, **options: Any) -> None:
    done = container.oci("update", *flags, container.id, check=True, **options)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.twice
def test_limits_at_creation(create: Create) -> None:
    resources = {"memory": {"limit": 64 * MIB}, "pids": {"limit": 33}, "cpu": {"quota": 50_000, "period": 100_000}}
    container = create(*WAITING, config={"linux": {"resources": resources}})
    assert container.limit("memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert container.limit("pids", "pids.max", "pids.max") == "33"
    assert container.limit("cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"


@pytest.mark.parametrize(
    ("flag", "controller", "v1", "v2", "seen"),
    [
        (["--memory", "32M"], "memory", "memory.limit_in_bytes", "memory.max", str(32 * MIB)),
        (["--memory", "33554432"], "memory", "memory.limit_in_bytes", "memory.max", str(32 * MIB)),
        (["--memory-reservation", "16m"], "memory", "memory.soft_limit_in_bytes", "memory.low", str(16 * MIB)),
        (["--pids-limit", "44"], "pids", "pids.max", "pids.max", "44"),
        (["--pids-limit", "-1"], "pids", "pids.max", "pids.max", "max"),
        (["--cpu-quota", "20000", "--cpu-period", "50000"], "cpu", "cpu.cfs_quota_us", "cpu.max", "20000"),
        (["--cpu-share", "512"], "cpu", "cpu.shares", "cpu.weight", "512 20 59"),
        (["--cpuset-cpus", "0"], "cpuset", "cpuset.cpus", "cpuset.cpus", "0"),
        (["--cpuset-mems", "0"], "cpuset", "cpuset.mems", "cpuset.mems", "0"),
        (["--cpu-idle", "1"], "cpu", "cpu.idle", "cpu.idle", "1"),
    ],
)
def test_update_by_flags(container: Container, flag: list[str], controller: str, v1: str, v2: str, seen: str) -> None:
    update(container, *flag)
    assert container.limit(controller, v1, v2).split()[0] in seen.split()


@pytest.mark.parametrize("source", ["stdin", "file"])
def test_update_by_document(container: Container, tmp_path: Path, source: str) -> None:
    document = json.dumps({"memory": {"limit": 48 * MIB}, "pids": {"limit": 55}})
    (tmp_path / "resources.json").write_text(document)
    if source == "stdin":
        update(container, "--resources", "-", input=document)
        update(container, "--resources=-", input=document)
    else:
        update(container, f"--resources={tmp_path}/resources.json")
    assert container.limit("memory", "memory.limit_in_bytes", "memory.max") == str(48 * MIB)
    assert container.limit("pids", "pids.max", "pids.max") == "55"


@pytest.mark.twice
def test_update_leaves_the_rest_alone(container: Container) -> None:
    update(container, "--pids-limit", "66")
    update(container, "--memory", "64M")
    assert container.limit("pids", "pids.max", "pids.max") == "66"


@pytest.mark.twice
def test_update_of_a_created_container(create: Create) -> None:
    container = create(*WAITING)
    update(container, "--pids-limit", "77")
    assert container.start().limit("pids", "pids.max", "pids.max") == "77"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no limits were given"),
        (["--memory", "lots"], "--memory: 'lots' is not an amount of memory"),
        (["--pids-limit", "x"], "--pids-limit: 'x' is not a number"),
        (["--cpuset-cpus", "999"], "cpuset.cpus"),
        (["--resources", "/no/such"], "no such file or directory"),
    ],
)
def test_update_that_is_refused(container: Container, flags: list[str], words: str) -> None:
    assert words in refused(container.oci("update", *flags, container.id))


@pytest.mark.parametrize("document", ["", "[]", "{", '{"memory": 5}', '{"pids": {"limit": "many"}}'])
def test_update_by_a_malformed_document(container: Container, document: str) -> None:
    refused(container.oci("update", "--resources", "-", container.id, input=document))


def test_update_of_a_stopped_container(container: Container) -> None:
    container.stop()
    assert "not running" in refused(container.oci("update", "--pids-limit", "5", container.id))


@pytest.mark.twice
def test_statistics(container: Container) -> None:
    container.ask("true")
    event = json.loads(container.oci("events", "--stats", container.id, check=True).stdout)
    assert (event["type"], event["id"]) == ("stats", container.id)
    data = event["data"]
    assert {"cpu", "memory", "pids"} <= data.keys()
    assert data["cpu"]["usage"]["total"] > 0 and data["memory"]["usage"]["usage"] > 0
    assert data["pids"]["current"] == 1


@pytest.mark.twice
def test_statistics_come_again_and_again(container: Container, runtime: Path, run_root: Path) -> None:
    with subprocess.Popen([runtime, "--root", run_root, "events", "--interval", "100ms", container.id],
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        container.stop()
        assert process.wait(10) == 0  # it ends with the container
    assert [line["type"] for line in lines] == ["stats", "stats"]


@pytest.mark.twice
def test_out_of_memory_is_an_event(create: Create, runtime: Path, run_root: Path) -> None:
    script = "read x < /tmp/go; tail /dev/zero; sleep 1000"
    memory = {"limit": 16 * MIB, "swap": 16 * MIB}
    container = create("sh", "-c", f"mkfifo /tmp/go; {script}", config={"linux": {"resources": {"memory": memory}},
                                                                     "root": {"readonly": False}}).start()  # fmt: skip
    with subprocess.Popen([runtime, "--root", run_root, "events", "--interval", "1s", container.id],
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout
        timer = threading.Timer(20, process.kill)
        timer.start()
        json.loads(process.stdout.readline())  # the first statistics: it watches now
        container.ask("sh", "-c", "echo > /tmp/go")
        types = []
        for line in process.stdout:
            types.append(json.loads(line)["type"])
            if types[-1] == "oom":
                break
        timer.cancel()
        process.kill()
    assert types and types[-1] == "oom"


@pytest.mark.twice
@pytest.mark.parametrize("kib", [512, 1024, 2048])
def test_a_small_memory_limit_starts(run: Run, kib: int) -> None:
    resources = {"memory": {"limit": kib << 10}}
    assert run("echo", "fits", config={"linux": {"resources": resources}}) == "fits"


CGROUP_MOUNT = {"type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup",
                "options": ["nosuid", "noexec", "nodev", "ro"]}  # fmt: skip


@pytest.mark.skipif(UNIFIED, reason="the host has no hierarchy of version 1")
@pytest.mark.parametrize("namespace", ["", None])
def test_the_view_of_version_1_is_its_own_group(run: Run, namespace: str | None) -> None:
    def edit(config: dict[str, Any]) -> None:
        namespaces(config, cgroup=namespace)
        config["mounts"].append(CGROUP_MOUNT)
        config["linux"]["resources"] = {"pids": {"limit": 21}}

    script = "cat /sys/fs/cgroup/pids/pids.max; cat /sys/fs/cgroup/pids/cgroup.procs; cat /proc/self/cgroup"
    lines = run("sh", "-c", script, edit=edit).splitlines()
    assert lines[:2] == ["21", "1"]
    pids = next(line for line in lines if ":pids:" in line)
    assert pids.endswith(":/") if namespace == "" else leaks.PREFIX in pids


@pytest.mark.twice
@pytest.mark.parametrize("namespace", ["", None])
def test_the_view_is_read_only_when_asked(run: Run, namespace: str | None) -> None:
    def edit(config: dict[str, Any]) -> None:
        namespaces(config, cgroup=namespace)
        config["mounts"].append(CGROUP_MOUNT)

    inner = "/sys/fs/cgroup/x" if UNIFIED else "/sys/fs/cgroup/memory/x"
    assert run("sh", "-c", f"mkdir {inner} 2>/dev/null || echo refused", edit=edit) == "refused"


@pytest.mark.twice
def test_no_cgroup_at_all(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle("cat", "/proc/self/cgroup", edit=lambda config: namespaces(config, cgroup=None))
    out = oci("--cgroup-manager", "disabled", "run", "-b", place, container_id, check=True).stdout
    assert out == Path("/proc/self/cgroup").read_text()


@pytest.mark.twice
def test_what_needs_a_cgroup_and_has_none(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle(*WAITING)
    oci("--cgroup-manager", "disabled", "run", "-d", "-b", place, container_id, capture_output=False, check=True)
    try:
        assert "no cgroup" in refused(oci("pause", container_id))
        assert "no cgroup" in refused(oci("update", "--pids-limit", "5", container_id))
    finally:
        oci("delete", "--force", container_id, check=True)


@pytest.mark.twice
def test_a_resource_the_kernel_refuses_leaves_nothing(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle(config={"linux": {"resources": {"cpu": {"cpus": "4000"}}}})
    assert "cpuset" in refused(oci("create", "-b", place, container_id))
    assert "does not exist" in refused(oci("state", container_id))


@pytest.mark.twice
def test_processes_of_exec_are_in_the_group(container: Container) -> None:
    assert container.ask("cat", "/proc/self/cgroup") == container.ask("cat", "/proc/1/cgroup")
    wait_for(lambda: (container.cgroup("pids") / "cgroup.procs").read_text().split() == [str(container.pid)])
