"""Real podman on the runtime: limits, seen from the host's cgroup files and felt by the container."""

from __future__ import annotations

import json

import pytest

from tests.system.podman_host import PodmanHost

pytestmark = [pytest.mark.podman, pytest.mark.root]

MIB = 1024 * 1024


@pytest.mark.twice
def test_memory_limit(podman: PodmanHost) -> None:
    container = podman.start("--memory", "32m")
    assert podman.cgroup_file(container, "memory", "memory.limit_in_bytes", "memory.max") == str(32 * MIB)


@pytest.mark.twice
def test_out_of_memory_is_a_kill_with_137(podman: PodmanHost) -> None:
    container = podman.start("--memory", "16m", "--memory-swap", "16m", command=["tail", "/dev/zero"])
    assert podman.ok("wait", container) == "137"


def test_memory_of_the_smallest_docker_limit_starts(podman: PodmanHost) -> None:
    assert podman.output("--memory", "6m", "--", "echo", "fits") == "fits"


@pytest.mark.twice
def test_cpus(podman: PodmanHost) -> None:
    container = podman.start("--cpus", "0.5")
    assert podman.cgroup_file(container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"


def test_cpu_shares(podman: PodmanHost) -> None:
    container = podman.start("--cpu-shares", "512")
    assert podman.cgroup_file(container, "cpu", "cpu.shares", "cpu.weight") in ("512", "59", "20")


def test_cpuset(podman: PodmanHost) -> None:
    assert podman.output("--cpuset-cpus", "0", "--", "grep", "Cpus_allowed_list", "/proc/self/status").split()[1] == "0"


@pytest.mark.twice
def test_pids_limit(podman: PodmanHost) -> None:
    container = podman.start("--pids-limit", "20")
    assert podman.cgroup_file(container, "pids", "pids.max", "pids.max") == "20"
    done = podman("exec", container, "sh", "-c", "for i in $(seq 30); do sleep 1 & done; wait")
    assert "can't fork" in done.stderr


def test_ulimits(podman: PodmanHost) -> None:
    # With any --ulimit podman drops its configured defaults, so nproc must be named too where root cannot raise it.
    options = ("--ulimit", "nofile=100:200", "--ulimit", "core=0:0", "--ulimit", "nproc=512:1024")
    assert podman.output(*options, "--", "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c").split() == ["100", "200", "0"]


def test_exec_shares_the_limits(podman: PodmanHost) -> None:
    container = podman.start("--memory", "16m", "--memory-swap", "16m")
    assert podman("exec", container, "tail", "/dev/zero").returncode == 137
    assert podman.inspect(container, "{{.State.Running}}") == "true"


@pytest.mark.twice
def test_update_changes_a_running_container(podman: PodmanHost) -> None:
    container = podman.start("--memory", "64m", "--memory-swap", "128m")
    podman.ok("update", "--memory", "48m", "--cpus", "0.25", "--cpu-shares", "256", container)
    assert podman.cgroup_file(container, "memory", "memory.limit_in_bytes", "memory.max") == str(48 * MIB)
    assert podman.cgroup_file(container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "25000"
    assert podman.cgroup_file(container, "cpu", "cpu.shares", "cpu.weight") in ("256", "35", "10")
    assert podman.inspect(container, "{{.State.Running}}") == "true"


def test_update_to_an_impossible_value_is_an_error(podman: PodmanHost) -> None:
    container = podman.start()
    done = podman("update", "--cpuset-cpus", "4095", container)
    assert done.returncode != 0
    assert "cpuset" in done.stderr
    assert podman.inspect(container, "{{.State.Running}}") == "true"


@pytest.mark.twice
def test_stats_count_cpu_and_memory(podman: PodmanHost) -> None:
    container = podman.start("--memory", "64m", command=["sh", "-c", "sleep 1000 & sleep 1000"])
    podman.ok("exec", container, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do head -c 1000000 /dev/zero | md5sum; done")
    (sample,) = json.loads(podman.ok("stats", "--no-stream", "--format", "json", container))
    assert sample["pids"] == "2"
    assert sample["mem_usage"].endswith("/ 67.11MB") and not sample["mem_usage"].startswith("0")
    assert sample["cpu_percent"] != "--"


def test_no_cgroup_at_all(podman: PodmanHost, is_ovt: bool) -> None:
    if not is_ovt:
        pytest.skip("--cgroup-manager disabled is crun's and ovt's; runc has no such flag")
    assert podman.output("--cgroups", "disabled", "--", "echo", "without") == "without"
