"""The hierarchies of this machine: making, joining, limits that bite, freezing, killing, removing."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError, UsageError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.base import remove_tree
from ovt.kernel.cgroup.hierarchy import current
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


def test_a_life(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    first, second = child(), child()
    group.attach(first.pid)
    group = cgroup.restore(group.record())
    group.attach(second.pid)
    assert group.pids() == sorted([first.pid, second.pid])
    assert Path(f"/proc/{first.pid}/cgroup").read_text().count("/box") == len(set(_directories(group)))
    group.kill()
    assert (first.wait(), second.wait()) == (-9, -9)
    group.remove()
    assert not any(Path(directory).exists() for directory in _directories(group))
    group.remove()


def _directories(group: cgroup.Cgroup) -> list[str]:
    return list(dict.fromkeys(group.record()["paths"].values()))


def test_a_process_enters_by_itself(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    if group.mode != "v1":
        pytest.skip("v2 has CLONE_INTO_CGROUP")
    descriptors = group.enter_fds()
    process = child(
        f"for fd in range(3, 3 + {len(descriptors)}): os.write(fd, b'0')\nprint('in')\nsys.stdin.readline()"
    )
    for fd in descriptors:  # shown here with descriptors of /proc, as a runtime would with inherited ones
        os.close(fd)
    process.close()
    process = child("for path in sys.argv[1:]: open(path + '/tasks', 'w').write('0')", *_directories(group))
    assert process.go() == ""
    assert len(descriptors) == len(_directories(group))


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
    directory = group.beside.directory
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


def test_freezing_and_killing_while_frozen(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    counter = child("n = 0\nwhile True:\n    n += 1; print(n, flush=True)")
    group.attach(counter.pid)
    counter.start()
    counter.line()
    group.freeze()
    assert group.frozen()
    group.freeze()
    stat = Path(f"/proc/{counter.pid}/stat")
    before = stat.read_text().split()[13:15]
    time.sleep(0.1)
    assert stat.read_text().split()[13:15] == before
    group.kill(signal.SIGUSR1)
    assert group.frozen() and counter.process.poll() is None
    group.kill(signal.SIGKILL)
    assert counter.wait() in (-signal.SIGKILL, -signal.SIGUSR1)
    assert not group.frozen()
    group.remove()


def test_thawing_lets_run_on(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child("print('on', flush=True)")
    group.attach(process.pid)
    group.freeze()
    process.start()
    group.thaw()
    assert process.line() == "on\n"


def test_a_fork_bomb_is_killed(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    group.apply({"pids": {"limit": 60}})
    bomb = child(
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nprint('go', flush=True)\n"
        "while True:\n    try: os.fork()\n    except OSError: pass"
    )
    group.attach(bomb.pid)
    bomb.start()
    bomb.line()
    time.sleep(0.1)
    group.kill()
    assert bomb.wait() == -9
    group.remove()


def test_a_signal_reaches_everybody_but_the_sender(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    one, two = child(), child()
    group.attach(one.pid)
    group.attach(two.pid)
    group.kill(signal.SIGTERM)
    assert (one.wait(), two.wait()) == (-15, -15)
    group.kill(signal.SIGTERM)


def test_cgroups_the_container_made_go_too(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    for directory in _directories(group):
        os.makedirs(f"{directory}/sub/deeper")
    process = child()
    group.attach(process.pid, sub="sub/deeper" if group.mode == "v2" else "")
    if group.mode == "v1":
        Path(str(group.path_for("")), "sub/deeper/cgroup.procs").write_text(str(process.pid))
    assert group.pids() == [process.pid]
    assert group.pids(recursive=False) == []
    group.kill()
    process.wait()
    group.remove()
    assert not any(Path(directory).exists() for directory in _directories(group))


def test_what_is_left_is_named(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child()
    group.attach(process.pid)
    directory = str(group.path_for(""))
    with pytest.raises(HostError, match=rf"cannot remove cgroup {directory}: .*busy.*{process.pid} \(.*, state S\)"):
        remove_tree(directory, 0.05)


def test_a_cgroup_in_use_is_refused_and_left_alone(place: str, child: Callable[..., Child]) -> None:
    stranger = child()
    theirs = cgroup.new(place + "/shared", "a")
    theirs.create()
    theirs.attach(stranger.pid)
    ours = cgroup.new(place + "/shared", "b")
    with pytest.raises(HostError, match=r"container's cgroup is not empty: 1 process\(es\) found in"):
        ours.create()
    for group in (ours, cgroup.restore(ours.record())):
        group.kill()
        group.remove()
    assert stranger.process.poll() is None
    assert theirs.pids() == [stranger.pid]


def test_an_empty_cgroup_is_used_and_kept(place: str) -> None:
    theirs = cgroup.new(place + "/shared", "a")
    theirs.create()
    ours = cgroup.new(place + "/shared", "b")
    ours.create()
    cgroup.restore(ours.record()).remove()
    assert all(Path(directory).is_dir() for directory in _directories(theirs))


def test_a_frozen_cgroup_is_refused(place: str) -> None:
    theirs = cgroup.new(place + "/cold", "a")
    theirs.create()
    theirs.freeze()
    with pytest.raises(HostError, match="unexpectedly frozen") as caught:
        cgroup.new(place + "/cold", "b").create()
    assert "thaw it" in caught.value.hint
    theirs.thaw()


def test_an_interrupted_creation_is_cleared_away(place: str) -> None:
    group = cgroup.new(place + "/half", "a")
    record = group.record()
    group.create()
    cgroup.restore(record).remove()
    assert not any(Path(directory).exists() for directory in _directories(group))


def test_exec_into_a_cgroup_below(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    if not isinstance(group, V1):
        pytest.skip("v1 hierarchies differ in what they have below")
    os.mkdir(group.paths["pids"] + "/foo")
    for sub in ("foo", "pids:foo", "/foo/", "./foo"):
        process = child()
        group.attach(process.pid, sub=sub)
        lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        assert [line.rpartition("/")[2] for line in lines if ":pids:" in line] == ["foo"]
        assert [line.rpartition("/")[2] for line in lines if ":memory:" in line] == ["box"]
        process.close()
    for bad, message in (
        ("../outside", "`..` components are not allowed in the cgroup path `../outside`"),
        ("pids:foo/../..", "`..` components are not allowed"),
        ("absent", "no such cgroup `absent`"),
        ("nope:foo", "unknown cgroup controller `nope`"),
    ):
        with pytest.raises(UsageError) as caught:
            group.attach(os.getpid(), sub=bad)
        assert message in str(caught.value)


def test_a_process_that_has_ended_cannot_join(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child()
    process.close()
    with pytest.raises(HostError, match=f"cannot move process {process.pid} into cgroup .*has ended"):
        group.attach(process.pid)


UNPRIVILEGED = """
os.setgid(65534); os.setuid(65534)
sys.path.insert(0, sys.argv[1])
from ovt.kernel import cgroup
from ovt.errors import HostError
group = cgroup.new(sys.argv[2], 'web')
group.create()
group.attach(os.getpid())
group.apply({'devices': [{'allow': False}], 'pids': {'limit': -1}})
group = cgroup.restore(group.record())
try:
    group.apply({'memory': {'limit': 1 << 20}})
except HostError as error:
    print(error, '|', error.hint)
group.kill(); group.remove()
print(group.pids())
"""


def test_a_user_without_delegation(place: str, child: Callable[..., Child]) -> None:
    source = str(Path(cgroup.__file__).parents[3])
    out = child(UNPRIVILEGED, source, place + "/box").go().splitlines()
    if current().mode == "v1":
        assert out[0].startswith("cannot set linux.resources.memory.limit: cannot make cgroup /sys/fs/cgroup/memory/")
        assert "Permission denied" in out[0] and "drop the limit" in out[0]
    assert out[1:] == ["[]"]


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
