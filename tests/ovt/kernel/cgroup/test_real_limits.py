"""Limits in the hierarchies of this machine: they arrive, they bite, and what cannot be set tells why."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.v1 import V1

from .conftest import Child

pytestmark = pytest.mark.root

MIB = 1 << 20
EAT = "block = bytearray(200 << 20)\nprint('ate', len(block), flush=True)"
FORK = """
import errno
made = []
try:
    for _ in range(20):
        pid = os.fork()
        if not pid:
            sys.stdin.read(); os._exit(0)
        made.append(pid)
except OSError as error:
    print(len(made), errno.errorcode[error.errno])
for pid in made:
    os.kill(pid, 9); os.waitpid(pid, 0)
"""
BURN = """
import time
end = time.monotonic() + 0.8
while time.monotonic() < end: pass
"""


def need(group: cgroup.Cgroup, controller: str) -> str:
    directory = group.path_for(controller)
    if directory is None or not any(controller in name for name in os.listdir(directory)):
        pytest.skip(f"needs the {controller} controller")
    return directory


def test_memory_is_limited_and_kills_are_told(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    need(group, "memory")
    eater = child(EAT)
    group.attach(eater.pid)
    group.apply({"memory": {"limit": 20 * MIB, "swap": 20 * MIB}})
    events = group.events(timeout=10)
    eater.start()
    assert eater.wait() == -9
    assert next(events) == {"type": "oom"}
    events.close()
    stats = group.stats()
    assert stats["memory"]["usage"]["limit"] == 20 * MIB
    assert stats["memory"]["oomKills"] >= 1
    assert stats["memory"]["usage"]["max"] > 10 * MIB


def test_events_end_with_the_cgroup(group: cgroup.Cgroup) -> None:
    need(group, "memory")
    events = group.events(timeout=20)
    started = time.monotonic()
    group.remove()
    assert list(events) == []
    assert time.monotonic() - started < 5
    with pytest.raises(HostError, match="cannot watch for out-of-memory kills"):
        group.events()


def test_events_end_in_time(group: cgroup.Cgroup) -> None:
    need(group, "memory")
    assert list(group.events(timeout=0.05)) == []


def test_events_end_when_the_cgroup_goes_meanwhile(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    directory = need(group, "memory")
    remover = child("import time; time.sleep(0.3); os.rmdir(sys.argv[1])", directory)
    remover.start()
    started = time.monotonic()
    assert list(group.events(timeout=20)) == []
    assert time.monotonic() - started < 5
    assert remover.wait() == 0


def test_memory_limits_go_up_and_down_in_either_order(group: cgroup.Cgroup) -> None:
    directory = need(group, "memory")
    if group.mode != "v1":
        pytest.skip("memory and swap bound one another on v1 only")
    for limit, swap in ((100, 200), (300, 400), (350, 350), (50, 60), (-1, 0)):
        resources = {"memory": {"limit": limit * MIB if limit > 0 else -1, "swap": swap * MIB}}
        group.apply(resources, update=True)
        found = [int(Path(directory, f"memory.{x}limit_in_bytes").read_text()) // MIB for x in ("", "memsw.")]
        assert found == [limit, swap] if limit > 0 else min(found) > 1 << 40


def test_an_impossible_memory_limit_tells_why(group: cgroup.Cgroup) -> None:
    need(group, "memory")
    group.apply({"memory": {"limit": 100 * MIB, "swap": 100 * MIB}})
    if group.mode == "v1":
        with pytest.raises(HostError, match=r"linux.resources.memory.limit to `209715200`.*Invalid argument"):
            group.apply({"memory": {"limit": 200 * MIB}}, update=True)


def test_check_before_update(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    need(group, "memory")
    holder = child("block = bytearray(30 << 20)\nprint('ready', flush=True)\nsys.stdin.readline()")
    group.attach(holder.pid)
    holder.start()
    assert holder.line() == "ready\n"
    with pytest.raises(HostError, match="rejecting memory limit 1048576 < usage"):
        group.apply({"memory": {"limit": MIB, "checkBeforeUpdate": True}}, update=True)
    assert holder.process.poll() is None


def test_processes_are_limited(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    need(group, "pids")
    forker = child(FORK)
    group.apply({"pids": {"limit": 5}})
    group.attach(forker.pid)
    assert forker.go() == "4 EAGAIN\n"
    group.apply({"pids": {"limit": -1}}, update=True)
    assert "limit" not in group.stats()["pids"]


def test_cpu_is_limited(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    need(group, "cpu")
    burner = child(BURN)
    group.attach(burner.pid)
    group.apply({"cpu": {"quota": 10000, "period": 100000}})
    burner.go()
    stats = group.stats()["cpu"]
    assert stats["throttling"]["throttledPeriods"] >= 2
    assert 0 < stats["usage"]["total"] < 500_000_000


def test_cpu_values_arrive_and_contradictions_tell_why(group: cgroup.Cgroup) -> None:
    directory = need(group, "cpu")
    if group.mode != "v1":
        pytest.skip("v1 files")

    def values() -> list[int]:
        names = ("cfs_quota_us", "cfs_period_us", "cfs_burst_us")
        return [int(Path(directory, f"cpu.{name}").read_text()) for name in names]

    group.apply({"cpu": {"quota": 20000, "period": 50000, "burst": 15000, "shares": 77}})
    assert values() == [20000, 50000, 15000]
    group.apply({"cpu": {"quota": 5000, "burst": 2000}}, update=True)
    assert values() == [5000, 50000, 2000]
    group.apply({"cpu": {"quota": -1, "burst": 0}}, update=True)
    assert values() == [-1, 50000, 0]
    assert Path(directory, "cpu.shares").read_text() == "77\n"
    with pytest.raises(HostError, match=r"linux.resources.cpu.burst to `9000`: write to .*cpu.cfs_burst_us"):
        group.apply({"cpu": {"quota": 5000, "burst": 9000}}, update=True)


def test_a_narrow_parent_first_takes_the_quota(place: str) -> None:
    outer, inner = cgroup.new(place + "/outer", "outer"), cgroup.new(place + "/outer/inner", "inner")
    outer.create()
    inner.create()
    if inner.mode != "v1":
        pytest.skip("v1 bounds a child's share by its parent's")
    outer.apply({"cpu": {"quota": 50000, "period": 100000}}, update=True)
    inner.apply({"cpu": {"quota": 25000, "period": 100000}})
    # The new period alone would be 25000/40000, more than the parent's half.
    inner.apply({"cpu": {"quota": 20000, "period": 40000}}, update=True)
    with pytest.raises(HostError, match=r"linux.resources.cpu.quota to `90000`.*Invalid argument"):
        inner.apply({"cpu": {"quota": 90000}}, update=True)


def test_cpusets_are_inherited_and_set(place: str, child: Callable[..., Child]) -> None:
    deep = cgroup.new(place + "/a/b/c", "c")
    deep.create()
    directory = need(deep, "cpuset")
    process = child("print(sorted(os.sched_getaffinity(0)))")
    deep.attach(process.pid)
    deep.apply({"cpu": {"cpus": "0", "mems": "0"}})
    assert process.go() == "[0]\n"
    assert Path(directory, "cpuset.cpus").read_text() == "0\n"
    with pytest.raises(HostError, match=r"linux.resources.cpu.cpus to `4095`"):
        deep.apply({"cpu": {"cpus": "4095"}}, update=True)


def test_hugepages_on_a_hybrid_host(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    if not isinstance(group, V1) or group.beside is None or "hugetlb" in group.paths:
        pytest.skip("needs a hybrid host with hugetlb in its cgroup2 mount")
    process = child()
    group.attach(process.pid)
    group.apply({"hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}]})
    directory = "".join(group.beside)
    assert Path(directory, "hugetlb.2MB.max").read_text() == f"{4 * MIB}\n"
    again = cgroup.restore(group.record())
    other = child()
    again.attach(other.pid)
    assert again.enter_fds() == []
    members = Path(directory, "cgroup.procs").read_text().split()
    assert sorted(map(int, members)) == sorted([process.pid, other.pid])
    again.kill()
    process.wait(), other.wait()
    again.remove()
    assert not Path(directory).exists()


def test_a_missing_controller_is_named(group: cgroup.Cgroup) -> None:
    if not isinstance(group, V1) or "net_cls" in group.paths:
        pytest.skip("needs a v1 host without net_cls")
    with pytest.raises(HostError, match="requested cgroup controller `net_cls` is not available") as caught:
        group.apply({"network": {"classID": 5}})
    assert caught.value.hint


def test_unified_keys_on_v1(group: cgroup.Cgroup) -> None:
    if not isinstance(group, V1):
        pytest.skip("needs cgroup v1")
    if group.beside:
        with pytest.raises(HostError, match="requested cgroup controller `memory` is not available"):
            group.apply({"unified": {"memory.high": "1000000"}})
    group.beside = None
    with pytest.raises(HostError, match="cannot use unified on cgroup v1"):
        group.apply({"unified": {"memory.high": "1000000"}})


def test_stats_have_the_shape_consumers_read(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child("block = bytearray(8 << 20); print(sum(range(10 ** 6)), flush=True)\nsys.stdin.readline()")
    group.attach(process.pid)
    process.start()
    process.line()
    stats = group.stats()
    assert list(stats)[:1] == ["cpu"]
    assert {"cpu", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"} <= set(stats)
    assert stats["cpu"]["usage"]["total"] > 1_000_000
    if group.mode == "v1":
        assert sum(stats["cpu"]["usage"]["percpu"]) >= stats["cpu"]["usage"]["total"]
    assert stats["pids"]["current"] == 1
    assert stats["memory"]["usage"]["usage"] > 0
    assert stats["memory"]["raw"]["total_rss" if group.mode == "v1" else "anon"] > 0
