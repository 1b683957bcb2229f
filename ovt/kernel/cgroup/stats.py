"""The numbers of a cgroup, in the JSON shape of `runc events --stats` (its `data` object), for v1 and v2.

Sizes are bytes, CPU times nanoseconds, pressure totals microseconds as the kernel writes them. Only what the kernel
offers is there: a controller that is not mounted or enabled leaves zeros, as consumers of that format expect.
"""

from __future__ import annotations

import posix

from ovt.kernel.cgroup.base import Cgroup
from ovt.kernel.cgroup.files import exists, read_or

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNLIMITED = (1 << 64) - 1
_TICK_NS = 10_000_000  # cpuacct.stat counts in USER_HZ, which is 100 on every architecture Linux exposes


def collect(group: Cgroup) -> dict[str, Any]:
    """The statistics of `group`."""
    data = (_v2 if group.mode == "v2" else _v1)(group)
    # Filled by the runtime's other parts, if at all; consumers of the format expect the keys.
    data["intel_rdt"] = {}
    data["network_interfaces"] = None
    return data


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is zero or empty, which the format leaves out."""
    return {key: value for key, value in values.items() if value}


def flat(text: str) -> dict[str, int]:
    """A flat-keyed file: `key value` lines; other lines are left out."""
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdigit():
            values[key] = int(value)
    return values


def number(path: str, unlimited: int = _UNLIMITED) -> int:
    """A file of one number; `max` is `unlimited`, a missing or empty file 0."""
    text = read_or(path).strip()
    return unlimited if text == "max" else int(text) if text.isdigit() else 0


def _v1(group: Cgroup) -> dict[str, Any]:
    cpu, account = group.path_for("cpu"), group.path_for("cpuacct")
    data: dict[str, Any] = {"cpu": _cpu_v1(cpu, account)}
    if path := group.path_for("cpuset"):
        data["cpuset"] = {
            "cpus": expand(read_or(path + "/cpuset.cpus")),
            "mems": expand(read_or(path + "/cpuset.mems")),
            **{name: _signed(f"{path}/cpuset.{name}") for name in _CPUSET},
        }
    if path := group.path_for("memory"):
        data["memory"] = _memory_v1(path)
    if path := group.path_for("pids"):
        data["pids"] = _pids(path)
    if path := group.path_for("blkio"):
        data["blkio"] = _blkio_v1(path)
    data["hugetlb"] = _hugetlb(group.path_for("hugetlb"), v2=False)
    return data


_CPUSET = (
    "cpu_exclusive",
    "mem_hardwall",
    "mem_exclusive",
    "memory_migrate",
    "memory_spread_page",
    "memory_spread_slab",
    "memory_pressure",
    "sched_load_balance",
    "sched_relax_domain_level",
)


def _signed(path: str) -> int:
    return int(read_or(path).strip() or 0)


def _cpu_v1(cpu: str | None, account: str | None) -> dict[str, Any]:
    usage: dict[str, Any] = {"kernel": 0, "user": 0}
    throttling: dict[str, int] = {}
    if account:
        ticks = flat(read_or(account + "/cpuacct.stat"))
        percpu = read_or(account + "/cpuacct.usage_all").splitlines()[1:]
        times = {
            "total": number(account + "/cpuacct.usage"),
            "percpu": [int(word) for word in read_or(account + "/cpuacct.usage_percpu").split()],
            "percpu_kernel": [int(line.split()[2]) for line in percpu],
            "percpu_user": [int(line.split()[1]) for line in percpu],
        }
        usage = {
            **_filled(times),
            "kernel": ticks.get("system", 0) * _TICK_NS,
            "user": ticks.get("user", 0) * _TICK_NS,
        }
    if cpu:
        stat = flat(read_or(cpu + "/cpu.stat"))
        throttling = {
            "periods": stat.get("nr_periods", 0),
            "throttledPeriods": stat.get("nr_throttled", 0),
            "throttledTime": stat.get("throttled_time", 0),
        }
    return {"usage": usage, "throttling": _filled(throttling)}


_MEMORY = ("limit_in_bytes", "usage_in_bytes", "max_usage_in_bytes", "failcnt")


def _entry(limit: int, usage: int, peak: int, fails: int) -> dict[str, int]:
    return {"limit": limit, **_filled({"usage": usage, "max": peak}), "failcnt": fails}


def _memory_v1(path: str) -> dict[str, Any]:
    raw = flat(read_or(path + "/memory.stat"))
    events = flat(read_or(path + "/memory.oom_control"))

    def entry(prefix: str) -> dict[str, int]:
        return _entry(*[number(f"{path}/{prefix}.{name}") for name in _MEMORY])

    cache = raw.get("total_cache", raw.get("cache", 0))
    data: dict[str, Any] = {
        **_filled({"cache": cache}),
        "usage": entry("memory"),
        "swap": entry("memory.memsw"),
        "kernel": entry("memory.kmem"),
        "kernelTCP": entry("memory.kmem.tcp"),
        "raw": raw,
    }
    if "oom_kill" in events:  # Linux 4.13
        data["oomKills"] = events["oom_kill"]
    return data


def _pids(path: str) -> dict[str, int]:
    return _filled({"current": number(path + "/pids.current"), "limit": number(path + "/pids.max", 0)})


_BLKIO = {
    "ioServiceBytesRecursive": ("bfq.io_service_bytes", "io_service_bytes", "throttle.io_service_bytes"),
    "ioServicedRecursive": ("bfq.io_serviced", "io_serviced", "throttle.io_serviced"),
    "ioQueueRecursive": ("bfq.io_queued", "io_queued"),
    "ioServiceTimeRecursive": ("bfq.io_service_time", "io_service_time"),
    "ioWaitTimeRecursive": ("bfq.io_wait_time", "io_wait_time"),
    "ioMergedRecursive": ("bfq.io_merged", "io_merged"),
    "ioTimeRecursive": ("bfq.time", "time"),
    "sectorsRecursive": ("bfq.sectors", "sectors"),
}


def _blkio_v1(path: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, names in _BLKIO.items():
        for name in names:
            # The scheduler in use fills one family of files and leaves the others empty or all zero.
            entries = _block_entries(read_or(f"{path}/blkio.{name}_recursive"))
            if entries:
                data[key] = entries
                break
    return data


def _block_entries(text: str) -> list[dict[str, Any]]:
    entries = []
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) not in (3, 4) or words[0] == "Total":
            continue
        operation = words[2] if len(words) == 4 else ""
        entries.append(_block_entry(words[0], words[1], operation, words[-1]))
    return entries


def _block_entry(major: str, minor: str, operation: str, value: str) -> dict[str, Any]:
    return _filled({"major": int(major), "minor": int(minor), "op": operation, "value": int(value)})


def _hugetlb(path: str | None, v2: bool) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if not path or not exists(path):
        return data
    usage = "current" if v2 else "usage_in_bytes"
    for name in posix.listdir(path):
        prefix, _, last = name.rpartition(f".{usage}")
        if not prefix.startswith("hugetlb.") or last or prefix.endswith(".rsvd"):
            continue
        size = prefix[len("hugetlb.") :]
        fails = flat(read_or(f"{path}/{prefix}.events")).get("max", 0) if v2 else number(f"{path}/{prefix}.failcnt")
        # Reservation accounting says more where the kernel has it (5.7): usage alone misses what is promised.
        if read_or(f"{path}/{prefix}.rsvd.{usage}"):
            prefix += ".rsvd"
        peak = 0 if v2 else number(f"{path}/{prefix}.max_usage_in_bytes")
        data[size] = {**_filled({"usage": number(f"{path}/{prefix}.{usage}"), "max": peak}), "failcnt": fails}
    return data


def expand(listed: str) -> list[int]:
    """The kernel's list format: `0-2,5` is [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _v2(group: Cgroup) -> dict[str, Any]:
    path = group.path_for("")
    if path is None:
        return {"cpu": {"usage": {"kernel": 0, "user": 0}, "throttling": {}}}
    stat = flat(read_or(path + "/cpu.stat"))
    data: dict[str, Any] = {
        "cpu": {
            "usage": {
                "total": stat.get("usage_usec", 0) * 1000,
                "kernel": stat.get("system_usec", 0) * 1000,
                "user": stat.get("user_usec", 0) * 1000,
            },
            "throttling": _filled(
                {
                    "periods": stat.get("nr_periods", 0),
                    "throttledPeriods": stat.get("nr_throttled", 0),
                    "throttledTime": stat.get("throttled_usec", 0) * 1000,
                }
            ),
        },
        "cpuset": {
            "cpus": expand(read_or(path + "/cpuset.cpus.effective")),
            "mems": expand(read_or(path + "/cpuset.mems.effective")),
            **dict.fromkeys(_CPUSET, 0),
        },
        "memory": _memory_v2(path),
        "pids": _pids(path),
        "blkio": _io_v2(path),
        "hugetlb": _hugetlb(path, v2=True),
    }
    for key, name in (("cpu", "cpu"), ("memory", "memory"), ("blkio", "io")):
        pressure = psi(read_or(f"{path}/{name}.pressure"))
        if pressure:
            data[key]["psi"] = pressure
    return data


def psi(text: str) -> dict[str, dict[str, float]]:
    """A pressure file: `some` and `full`, each with avg10, avg60, avg300 (percent) and total (microseconds)."""
    pressure = {}
    for line in text.splitlines():
        kind, *words = line.split()
        values = dict([word.split("=") for word in words])
        pressure[kind] = {key: int(value) if key == "total" else float(value) for key, value in values.items()}
    return pressure


def _memory_v2(path: str) -> dict[str, Any]:
    raw = flat(read_or(path + "/memory.stat"))
    events = flat(read_or(path + "/memory.events"))
    swap_events = flat(read_or(path + "/memory.swap.events"))
    limit, usage = number(path + "/memory.max"), number(path + "/memory.current")
    peak = number(path + "/memory.peak")
    data: dict[str, Any] = {
        **_filled({"cache": raw.get("file", 0)}),
        "usage": _entry(limit, usage, peak, events.get("max", 0)),
        # The format is v1's, where swap means memory and swap together.
        "swap": _entry(
            min(number(path + "/memory.swap.max") + limit, _UNLIMITED),
            number(path + "/memory.swap.current") + usage,
            number(path + "/memory.swap.peak") + peak,
            swap_events.get("fail", 0),
        ),
        "kernel": _entry(0, 0, 0, 0),
        "kernelTCP": _entry(0, 0, 0, 0),
        "raw": raw,
    }
    if "oom_kill" in events:
        data["oomKills"] = events["oom_kill"]
    return data


_IO = {
    "rbytes": ("ioServiceBytesRecursive", "Read"),
    "wbytes": ("ioServiceBytesRecursive", "Write"),
    "rios": ("ioServicedRecursive", "Read"),
    "wios": ("ioServicedRecursive", "Write"),
}


def _io_v2(path: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for line in read_or(path + "/io.stat").splitlines():
        device, *words = line.split()
        major, colon, minor = device.partition(":")
        if not (colon and major.isdigit() and minor.isdigit()):
            continue
        for word in words:
            key, _, value = word.partition("=")
            if key in _IO:
                name, operation = _IO[key]
                data.setdefault(name, []).append(_block_entry(major, minor, operation, value))
    return data
