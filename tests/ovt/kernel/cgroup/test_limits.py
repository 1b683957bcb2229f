"""linux.resources to control files: the plans of v1 and v2, conversions, and values that are refused."""

from typing import Any

import pytest

from ovt.errors import ConfigError
from ovt.kernel.cgroup import limits_v1, limits_v2

EVERYTHING: dict[str, Any] = {
    "memory": {
        "limit": 1 << 30,
        "reservation": 1 << 29,
        "swap": 3 << 29,
        "kernel": 1 << 28,
        "kernelTCP": 1 << 27,
        "swappiness": 10,
        "disableOOMKiller": True,
        "useHierarchy": True,
    },
    "cpu": {"shares": 512, "quota": 50000, "period": 100000, "burst": 20000, "cpus": "0-1", "mems": "0"},
    "pids": {"limit": 100},
    "blockIO": {
        "weight": 500,
        "weightDevice": [{"major": 8, "minor": 0, "weight": 300}],
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
    },
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
    "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}, "rxe3": {"hcaObjects": 9}},
}


def files(groups: list[list[Any]]) -> list[tuple[str, str]]:
    return [(knob.file, knob.value) for group in groups for knob in group]


def test_the_whole_plan_of_v1() -> None:
    resources = {
        **EVERYTHING,
        "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 5}]},
        "cpu": {**EVERYTHING["cpu"], "realtimeRuntime": 950000, "realtimePeriod": 1000000},
        "blockIO": {
            **EVERYTHING["blockIO"],
            "leafWeight": 10,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 300, "leafWeight": 20}],
        },
    }
    assert files(limits_v1.plan(resources)) == [
        ("memory.limit_in_bytes", "1073741824"),
        ("memory.memsw.limit_in_bytes", "1610612736"),
        ("memory.soft_limit_in_bytes", "536870912"),
        ("memory.kmem.tcp.limit_in_bytes", "134217728"),
        ("memory.use_hierarchy", "1"),
        ("memory.swappiness", "10"),
        ("memory.oom_control", "1"),
        ("cpu.shares", "512"),
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "50000"),
        ("cpu.cfs_burst_us", "20000"),
        ("cpu.rt_period_us", "1000000"),
        ("cpu.rt_runtime_us", "950000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "100"),
        ("blkio.weight", "500"),
        ("blkio.leaf_weight", "10"),
        ("blkio.weight_device", "8:0 300"),
        ("blkio.leaf_weight_device", "8:0 20"),
        ("blkio.throttle.read_bps_device", "8:0 1000"),
        ("blkio.throttle.write_iops_device", "8:16 0"),
        ("hugetlb.2MB.limit_in_bytes", "4194304"),
        ("hugetlb.2MB.rsvd.limit_in_bytes", "4194304"),
        ("net_cls.classid", "1048577"),
        ("net_prio.ifpriomap", "eth0 5"),
        ("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000"),
        ("rdma.max", "rxe3 hca_object=9"),
    ]


def test_the_whole_plan_of_v2() -> None:
    resources = {**EVERYTHING, "unified": {"memory.high": "900000000", "cgroup.type": "threaded"}}
    groups = limits_v2.plan(resources)
    assert files(groups) == [
        ("memory.swap.max", "536870912"),
        ("memory.max", "1073741824"),
        ("memory.low", "536870912"),
        ("cpu.weight", "59"),
        ("cpu.max", "50000 100000"),
        ("cpu.max.burst", "20000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "100"),
        ("io.bfq.weight", "500"),
        ("io.bfq.weight", "8:0 300"),
        ("io.max", "8:0 rbps=1000"),
        ("io.max", "8:16 wiops=max"),
        ("hugetlb.2MB.max", "4194304"),
        ("hugetlb.2MB.rsvd.max", "4194304"),
        ("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000"),
        ("rdma.max", "rxe3 hca_object=9"),
        ("cgroup.type", "threaded"),
        ("memory.high", "900000000"),
    ]
    assert [knob.other for group in groups for knob in group if knob.other] == [
        ("io.weight", "4950"),
        ("io.weight", "8:0 2930"),
    ]


def test_nothing_asked_nothing_planned() -> None:
    empty: dict[str, Any] = dict.fromkeys(EVERYTHING)
    zeros = {
        "memory": {"limit": 0, "swap": 0},
        "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": ""},
        "blockIO": {"weight": 0},
        "network": {},
    }
    for plan in (limits_v1.plan, limits_v2.plan):
        assert plan({}) == plan(empty) == plan(zeros) == []


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1, 1), (1024, 100), (262144, 10000), (999999, 10000)])
def test_shares_to_weight_meets_minimum_default_and_maximum(shares: int, weight: int) -> None:
    assert limits_v2.weight(shares) == weight


def test_shares_to_weight_is_monotonic() -> None:
    weights = [limits_v2.weight(shares) for shares in range(2, 262145, 37)]
    assert weights == sorted(weights)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({"limit": 100, "swap": 300}, [("memory.swap.max", "200"), ("memory.max", "100")]),
        ({"limit": 100, "swap": 100}, [("memory.swap.max", "0"), ("memory.max", "100")]),
        ({"limit": 100, "swap": -1}, [("memory.swap.max", "max"), ("memory.max", "100")]),
        ({"limit": -1}, [("memory.swap.max", "max"), ("memory.max", "max")]),
        ({"limit": -1, "swap": -1}, [("memory.swap.max", "max"), ("memory.max", "max")]),
        ({"swap": -1}, [("memory.swap.max", "max")]),
        ({"limit": 100}, [("memory.max", "100")]),
        ({"reservation": -1}, [("memory.low", "max")]),
    ],
)
def test_memory_on_v2(memory: dict[str, int], expected: list[tuple[str, str]]) -> None:
    assert files(limits_v2.plan({"memory": memory})) == expected


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"swap": 300}, "unable to set swap limit without memory limit"),
        ({"limit": -1, "swap": 300}, "unable to set swap limit without memory limit"),
        ({"limit": 300, "swap": 200}, "memory\\+swap limit should be >= memory limit"),
    ],
)
def test_swap_that_cannot_be_converted(memory: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        limits_v2.plan({"memory": memory})
    assert caught.value.path == "$.linux.resources.memory.swap"


def test_unlimited_memory_on_v1_lifts_swap_too() -> None:
    (group,) = limits_v1.plan({"memory": {"limit": -1}})
    assert [(knob.file, knob.value, knob.optional) for knob in group] == [
        ("memory.limit_in_bytes", "-1", False),
        ("memory.memsw.limit_in_bytes", "-1", True),
    ]


@pytest.mark.parametrize(("limit", "value"), [(-1, "max"), (0, "max"), (7, "7")])
def test_pids(limit: int, value: str) -> None:
    for plan in (limits_v1.plan, limits_v2.plan):
        ((knob,),) = plan({"pids": {"limit": limit}})
        assert (knob.file, knob.value, knob.optional) == ("pids.max", value, limit <= 0)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"quota": 5000}, "5000"),
        ({"quota": -1}, "max"),
        ({"quota": -1, "period": 1000}, "max 1000"),
        ({"period": 1000}, "{quota} 1000"),
    ],
)
def test_cpu_max(cpu: dict[str, int], expected: str) -> None:
    assert files(limits_v2.plan({"cpu": cpu})) == [("cpu.max", expected)]


def test_an_idle_group_has_no_weight() -> None:
    assert files(limits_v1.plan({"cpu": {"idle": 1, "shares": 512}})) == [("cpu.idle", "1")]
    assert files(limits_v2.plan({"cpu": {"idle": 1, "shares": 512}})) == [("cpu.idle", "1")]
    assert files(limits_v1.plan({"cpu": {"idle": 0, "shares": 5}})) == [("cpu.idle", "0"), ("cpu.shares", "5")]


@pytest.mark.parametrize(("weight", "expected"), [(10, 1), (1000, 10000), (5, 1)])
def test_io_weight(weight: int, expected: int) -> None:
    assert limits_v2.io_weight(weight) == expected


@pytest.mark.parametrize(
    ("resources", "path"),
    [
        ({"cpu": {"realtimeRuntime": 5}}, "$.linux.resources.cpu.realtimeRuntime"),
        ({"network": {"classID": 5}}, "$.linux.resources.network.classID"),
        ({"network": {"priorities": [{"name": "lo", "priority": 1}]}}, "$.linux.resources.network.priorities"),
        ({"unified": {"a/b": "1"}}, "$.linux.resources.unified.a/b"),
        ({"unified": {"../cgroup.procs": "1"}}, "$.linux.resources.unified.../cgroup.procs"),
        ({"unified": {"cgroup.procs": "1"}}, "$.linux.resources.unified.cgroup.procs"),
        ({"unified": {"cgroup.kill": "1"}}, "$.linux.resources.unified.cgroup.kill"),
        ({"unified": {".max": "1"}}, "$.linux.resources.unified..max"),
        ({"unified": {"memory.": "1"}}, "$.linux.resources.unified.memory."),
    ],
)
def test_what_v2_refuses(resources: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        limits_v2.plan(resources)
    assert caught.value.path == path


def test_a_unified_key_without_controller_says_the_form() -> None:
    with pytest.raises(ConfigError, match=r"has not the form CONTROLLER.VALUE `NOT-A-VALID-KEY`"):
        limits_v2.plan({"unified": {"NOT-A-VALID-KEY": "x"}})


@pytest.mark.parametrize("swappiness", [-1, 101])
def test_swappiness_has_a_range(swappiness: int) -> None:
    with pytest.raises(ConfigError, match=f"invalid memory swappiness value: {swappiness} \\(valid range is 0-100\\)"):
        limits_v1.plan({"memory": {"swappiness": swappiness}})
