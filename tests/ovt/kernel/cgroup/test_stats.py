"""Statistics read from drawn cgroup directories: the whole object, key by key."""

from pathlib import Path

import pytest

from ovt.kernel.cgroup import stats
from ovt.kernel.cgroup.v1 import V1
from ovt.kernel.cgroup.v2 import V2


def draw(root: Path, files: dict[str, str]) -> Path:
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name).write_text(content)
    return root


def test_v2(tmp_path: Path) -> None:
    pressure = "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"
    box = draw(
        tmp_path / "box",
        {
            "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\nnr_throttled 2\nthrottled_usec 7\n",
            "cpu.pressure": pressure,
            "cpuset.cpus.effective": "0-2,5\n",
            "cpuset.mems.effective": "0\n",
            "memory.max": "max\n",
            "memory.current": "1000\n",
            "memory.peak": "2000\n",
            "memory.swap.max": "0\n",
            "memory.swap.current": "5\n",
            "memory.stat": "anon 600\nfile 400\nweird -1\n",
            "memory.events": "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n",
            "memory.swap.events": "high 0\nmax 0\nfail 8\n",
            "pids.current": "4\n",
            "pids.max": "100\n",
            "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=0 dbytes=0 dios=0\nbroken\n",
            "hugetlb.2MB.current": "4096\n",
            "hugetlb.2MB.max": "max\n",
            "hugetlb.2MB.events": "max 6\n",
            "hugetlb.2MB.rsvd.current": "8192\n",
            "hugetlb.2MB.rsvd.max": "max\n",
        },
    )
    data = V2(str(tmp_path), f"/{box.name}").stats()
    unlimited = (1 << 64) - 1
    assert data == {
        "cpu": {
            "usage": {"total": 30000, "kernel": 10000, "user": 20000},
            "throttling": {"periods": 4, "throttledPeriods": 2, "throttledTime": 7000},
            "psi": {
                "some": {"avg10": 1.5, "avg60": 0.25, "avg300": 0.0, "total": 1234},
                "full": {"avg10": 0.0, "avg60": 0.0, "avg300": 0.0, "total": 9},
            },
        },
        "cpuset": {
            "cpus": [0, 1, 2, 5],
            "mems": [0],
            "cpu_exclusive": 0,
            "mem_hardwall": 0,
            "mem_exclusive": 0,
            "memory_migrate": 0,
            "memory_spread_page": 0,
            "memory_spread_slab": 0,
            "memory_pressure": 0,
            "sched_load_balance": 0,
            "sched_relax_domain_level": 0,
        },
        "memory": {
            "cache": 400,
            "usage": {"limit": unlimited, "usage": 1000, "max": 2000, "failcnt": 3},
            "swap": {"limit": unlimited, "usage": 1005, "max": 2000, "failcnt": 8},
            "kernel": {"limit": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "failcnt": 0},
            "raw": {"anon": 600, "file": 400},
            "oomKills": 1,
        },
        "pids": {"current": 4, "limit": 100},
        "blkio": {
            "ioServiceBytesRecursive": [
                {"major": 8, "op": "Read", "value": 10},
                {"major": 8, "op": "Write", "value": 20},
            ],
            "ioServicedRecursive": [{"major": 8, "op": "Read", "value": 1}, {"major": 8, "op": "Write"}],
        },
        "hugetlb": {"2MB": {"usage": 8192, "failcnt": 6}},
        "intel_rdt": {},
        "network_interfaces": None,
    }


def test_v1(tmp_path: Path) -> None:
    box = draw(
        tmp_path / "box",
        {
            "cpuacct.usage": "300\n",
            "cpuacct.usage_percpu": "100 200 \n",
            "cpuacct.usage_all": "cpu user system\n0 60 40\n1 150 50\n",
            "cpuacct.stat": "user 7\nsystem 3\n",
            "cpu.stat": "nr_periods 5\nnr_throttled 0\nthrottled_time 0\n",
            "cpuset.cpus": "0-1\n",
            "cpuset.mems": "0\n",
            "cpuset.sched_relax_domain_level": "-1\n",
            "memory.usage_in_bytes": "1000\n",
            "memory.limit_in_bytes": "5000\n",
            "memory.max_usage_in_bytes": "3000\n",
            "memory.failcnt": "2\n",
            "memory.stat": "cache 1\ntotal_cache 11\n",
            "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
            "pids.current": "3\n",
            "pids.max": "max\n",
            "blkio.throttle.io_service_bytes_recursive": "8:0 Read 100\n8:0 Write 0\nTotal 100\n",
            "blkio.bfq.io_service_bytes_recursive": "Total 0\n",
            "blkio.time_recursive": "8:16 77\n",
            "hugetlb.1GB.usage_in_bytes": "0\n",
            "hugetlb.1GB.max_usage_in_bytes": "9\n",
            "hugetlb.1GB.failcnt": "1\n",
        },
    )
    names = ("cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "hugetlb")
    data = V1(dict.fromkeys(names, str(tmp_path)), dict.fromkeys(names, str(box))).stats()
    assert data["cpu"] == {
        "usage": {
            "total": 300,
            "percpu": [100, 200],
            "percpu_kernel": [40, 50],
            "percpu_user": [60, 150],
            "kernel": 30_000_000,
            "user": 70_000_000,
        },
        "throttling": {"periods": 5},
    }
    assert data["cpuset"]["cpus"] == [0, 1]
    assert data["cpuset"]["sched_relax_domain_level"] == -1
    assert data["memory"] == {
        "cache": 11,
        "usage": {"limit": 5000, "usage": 1000, "max": 3000, "failcnt": 2},
        "swap": {"limit": 0, "failcnt": 0},
        "kernel": {"limit": 0, "failcnt": 0},
        "kernelTCP": {"limit": 0, "failcnt": 0},
        "raw": {"cache": 1, "total_cache": 11},
        "oomKills": 4,
    }
    assert data["pids"] == {"current": 3}
    assert data["blkio"] == {
        "ioServiceBytesRecursive": [{"major": 8, "op": "Read", "value": 100}, {"major": 8, "op": "Write"}],
        "ioTimeRecursive": [{"major": 8, "minor": 16, "value": 77}],
    }
    assert data["hugetlb"] == {"1GB": {"max": 9, "failcnt": 1}}


def test_nothing_there_gives_the_bare_shape(tmp_path: Path) -> None:
    data = V1({}, {}).stats()
    assert data["cpu"] == {"usage": {"kernel": 0, "user": 0}, "throttling": {}}
    assert data["hugetlb"] == {}
    assert V2(str(tmp_path), "/absent").stats()["memory"]["usage"] == {"limit": 0, "failcnt": 0}


@pytest.mark.parametrize(("text", "expected"), [("", []), ("3\n", [3]), ("0-2,7,9-10", [0, 1, 2, 7, 9, 10])])
def test_lists_of_cpus(text: str, expected: list[int]) -> None:
    assert stats.expand(text) == expected


def test_pressure_of_a_kernel_without_it() -> None:
    assert stats.psi("") == {}
