"""Limits in the hierarchies of this machine: they arrive, they bite, and what cannot be set tells why."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel import cgroup

from .conftest import Child

pytestmark = [pytest.mark.root, pytest.mark.twice]

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
