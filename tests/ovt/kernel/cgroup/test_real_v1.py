"""Rules of the v1 hierarchies that only a kernel has, and of a hybrid host's: limits, devices, entering by oneself."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError, UsageError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.hierarchy import current
from ovt.kernel.cgroup.v1 import V1

from .conftest import Child
from .test_devices import ALLOW_ALL, DENY_ALL
from .test_devices_real import KMSG_READ, PROBE
from .test_real import directories
from .test_real_limits import MIB, need

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(current().mode != "v1", reason="the host has no controller in a v1 hierarchy"),
]


def test_a_process_enters_by_itself(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    descriptors = group.enter_fds()
    process = child(
        f"for fd in range(3, 3 + {len(descriptors)}): os.write(fd, b'0')\nprint('in')\nsys.stdin.readline()"
    )
    for fd in descriptors:  # shown here with descriptors of /proc, as a runtime would with inherited ones
        os.close(fd)
    process.close()
    process = child("for path in sys.argv[1:]: open(path + '/tasks', 'w').write('0')", *directories(group))
    assert process.go() == ""
    assert len(descriptors) == len(directories(group))


def test_exec_into_a_cgroup_below(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    assert isinstance(group, V1)
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


def test_memory_limits_go_up_and_down_in_either_order(group: cgroup.Cgroup) -> None:
    directory = need(group, "memory")
    for limit, swap in ((100, 200), (300, 400), (350, 350), (50, 60), (-1, 0)):
        resources = {"memory": {"limit": limit * MIB if limit > 0 else -1, "swap": swap * MIB}}
        group.apply(resources, update=True)
        found = [int(Path(directory, f"memory.{x}limit_in_bytes").read_text()) // MIB for x in ("", "memsw.")]
        assert found == [limit, swap] if limit > 0 else min(found) > 1 << 40


def test_cpu_values_arrive_and_contradictions_tell_why(group: cgroup.Cgroup) -> None:
    directory = need(group, "cpu")

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
    outer.apply({"cpu": {"quota": 50000, "period": 100000}}, update=True)
    inner.apply({"cpu": {"quota": 25000, "period": 100000}})
    # The new period alone would be 25000/40000, more than the parent's half.
    inner.apply({"cpu": {"quota": 20000, "period": 40000}}, update=True)
    with pytest.raises(HostError, match=r"linux.resources.cpu.quota to `90000`.*Invalid argument"):
        inner.apply({"cpu": {"quota": 90000}}, update=True)


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
    assert isinstance(group, V1)
    if group.beside:
        with pytest.raises(HostError, match="requested cgroup controller `memory` is not available"):
            group.apply({"unified": {"memory.high": "1000000"}})
    group.beside = None
    with pytest.raises(HostError, match="cannot use unified on cgroup v1"):
        group.apply({"unified": {"memory.high": "1000000"}})


def test_v1_really_denies(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    if not isinstance(group, V1) or "devices" not in group.paths:
        pytest.skip("needs the devices hierarchy of cgroup v1")

    def probe() -> str:
        process = child(PROBE)
        group.attach(process.pid)
        return process.go().strip()

    group.apply({"devices": [DENY_ALL]})
    assert probe() == "yes no no"
    group.apply({"devices": [DENY_ALL, KMSG_READ]}, update=True)
    assert probe() == "yes yes no"
    group.apply({"devices": [DENY_ALL]}, update=True)
    assert probe() == "yes no no"
    listed = Path(group.paths["devices"], "devices.list").read_text()
    group.apply({"pids": {"limit": 50}}, update=True)
    assert Path(group.paths["devices"], "devices.list").read_text() == listed
    group.apply({"devices": [ALLOW_ALL]}, update=True)
    assert probe() == "yes yes yes"


def test_v1_below_a_narrower_parent(place: str) -> None:
    parent = cgroup.new(place + "/outer", "outer")
    inner = cgroup.new(place + "/outer/inner", "inner")
    if not isinstance(inner, V1) or "devices" not in inner.paths:
        pytest.skip("needs the devices hierarchy of cgroup v1")
    parent.create()
    directory = parent.path_for("devices")
    Path(f"{directory}/devices.deny").write_text("a")
    Path(f"{directory}/devices.allow").write_text("c 1:3 rwm")
    inner.create()
    inner.apply({})  # the default devices that the parent lacks were not asked for by anybody
    assert Path(inner.paths["devices"], "devices.list").read_text() == "c 1:3 rwm\n"
    with pytest.raises(HostError, match=r"write `c 1:11 r` to .*devices.allow: Operation not permitted"):
        inner.apply({"devices": [KMSG_READ]}, update=True)
