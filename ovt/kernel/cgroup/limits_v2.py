"""The runtime-spec's linux.resources as control files of cgroup v2: a plan of writes, nothing is touched here.

The spec is written in the words of v1, so values are converted: memory.swap loses the memory in it, cpu.shares become
a weight, blockIO weights and throttles become io.*. What v2 has no notion of is ignored where the default asks for
nothing else (memory.kernel*, swappiness, disableOOMKiller, leaf weights) and refused where a limit would be missing.
"""

from __future__ import annotations

from ovt.errors import ConfigError
from ovt.kernel.cgroup.knobs import Knob
from ovt.kernel.cgroup.limits_v1 import cpuset, pids_limit, rdma_limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_THROTTLE = {
    "throttleReadBpsDevice": "rbps",
    "throttleWriteBpsDevice": "wbps",
    "throttleReadIOPSDevice": "riops",
    "throttleWriteIOPSDevice": "wiops",
}

# Moving processes and opening the cgroup to children is the runtime's and the container's own business.
_NOT_LIMITS = ("cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.subtree_control")


def plan(resources: dict[str, Any]) -> list[list[Knob]]:
    """Groups of writes, in order; inside a group the kernel decides the order. Raises ConfigError."""
    groups: list[list[Knob]] = []
    if memory := resources.get("memory"):
        groups += _memory(memory)
    if cpu := resources.get("cpu"):
        groups += _cpu(cpu)
    if pids := resources.get("pids"):
        groups += pids_limit(pids)
    if block := resources.get("blockIO"):
        groups += _block(block)
    if limits := resources.get("hugepageLimits"):
        groups += hugepages(limits)
    if network := resources.get("network"):
        _no_network(network)
    if rdma := resources.get("rdma"):
        groups += rdma_limits(rdma)
    if raw := resources.get("unified"):
        groups += unified(raw)
    return groups


def _size(value: int) -> str:
    return "max" if value < 0 else str(value)


def swap_max(limit: int, swap: int) -> int:
    """memory.swap.max in bytes (-1: none) from v1's memory+swap `swap`, given the memory `limit`; ConfigError."""
    if swap == -1:
        return -1
    if limit <= 0:
        raise ConfigError("$.linux.resources.memory.swap", "unable to set swap limit without memory limit")
    if swap < limit:
        raise ConfigError("$.linux.resources.memory.swap", "memory+swap limit should be >= memory limit")
    return swap - limit


def _memory(memory: dict[str, Any]) -> list[list[Knob]]:
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    groups = []
    if swap:
        value = swap_max(limit, swap)
        # Without swap accounting (or swap) the file is missing, and then no swap or any swap hold by themselves.
        groups.append([Knob("memory", "memory.swap.max", _size(value), "memory.swap", optional=value <= 0)])
    elif limit == -1:
        groups.append([Knob("memory", "memory.swap.max", "max", "memory.limit", optional=True)])
    if limit:
        groups.append([Knob("memory", "memory.max", _size(limit), "memory.limit")])
    if memory.get("reservation"):
        groups.append([Knob("memory", "memory.low", _size(memory["reservation"]), "memory.reservation")])
    return groups


def weight(shares: int) -> int:
    """cpu.weight (1..10000, default 100) from cpu.shares (2..262144, default 1024).

    A parabola over log2(shares) through (2, 1), (1024, 100) and (262144, 10000), the conversion runtimes have agreed
    on since 2025: the straight line used before it gave a default container 39, less than half a default cgroup.
    """
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    from math import ceil, log2

    exponent = log2(shares)
    return ceil(10 ** ((exponent * exponent + 125 * exponent) / 612 - 7 / 34))


def _cpu(cpu: dict[str, Any]) -> list[list[Knob]]:
    for key in ("realtimeRuntime", "realtimePeriod"):
        if cpu.get(key):
            raise ConfigError(f"$.linux.resources.cpu.{key}", "realtime limits are not supported on cgroup v2")
    groups = []
    if cpu.get("idle") is not None:
        groups.append([Knob("cpu", "cpu.idle", str(cpu["idle"]), "cpu.idle", cpu["idle"] == 0)])
    if cpu.get("shares") and not cpu.get("idle"):
        groups.append([Knob("cpu", "cpu.weight", str(weight(cpu["shares"])), "cpu.shares")])
    bandwidth = []
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 0
    if quota:
        limit = str(quota) if quota > 0 else "max"
        # A quota alone keeps the period in force.
        value, key = (f"{limit} {period}", "cpu.quota and cpu.period") if period else (limit, "cpu.quota")
        bandwidth.append(Knob("cpu", "cpu.max", value, key))
    elif period:
        bandwidth.append(Knob("cpu", "cpu.max", f"{KEEP_QUOTA} {period}", "cpu.period"))
    if cpu.get("burst") is not None:
        bandwidth.append(Knob("cpu", "cpu.max.burst", str(cpu["burst"]), "cpu.burst", cpu["burst"] == 0))
    if bandwidth:
        groups.append(bandwidth)
    return groups + cpuset(cpu)


# cpu.max takes no period without a quota: V2.apply puts the quota in force here.
KEEP_QUOTA = "{quota}"


def io_weight(value: int) -> int:
    """io.weight (1..10000) from a blkio weight (10..1000): both ends meet."""
    return 1 + (max(value, 10) - 10) * 9999 // 990


def _block(block: dict[str, Any]) -> list[list[Knob]]:
    groups = []
    if block.get("weight"):
        groups += _weights("", block["weight"], "blockIO.weight")
    for device in block.get("weightDevice") or ():
        if device.get("weight"):
            groups += _weights(f"{device['major']}:{device['minor']} ", device["weight"], "blockIO.weightDevice")
    for key, word in _THROTTLE.items():
        for device in block.get(key) or ():
            value = f"{device['major']}:{device['minor']} {word}={device['rate'] or 'max'}"
            groups.append([Knob("io", "io.max", value, f"blockIO.{key}")])
    return groups


def _weights(prefix: str, value: int, key: str) -> list[list[Knob]]:
    # BFQ's file has v1's range; io.weight belongs to iocost and has another one.
    iocost = ("io.weight", f"{prefix}{io_weight(value)}")
    return [[Knob("io", "io.bfq.weight", f"{prefix}{value}", key, other=iocost)]]


def hugepages(limits: list[dict[str, Any]]) -> list[list[Knob]]:
    """linux.resources.hugepageLimits: usage, and reservations where the kernel counts them (5.7)."""
    groups = []
    for entry in limits:
        size, value = entry["pageSize"], str(entry["limit"])
        for name in (f"hugetlb.{size}.max", f"hugetlb.{size}.rsvd.max"):
            groups.append([Knob("hugetlb", name, value, "hugepageLimits", ".rsvd." in name)])
    return groups


def _no_network(network: dict[str, Any]) -> None:
    for key in ("classID", "priorities"):
        if network.get(key):
            raise ConfigError(
                f"$.linux.resources.network.{key}",
                "network classes and priorities are not supported on cgroup v2",
                "mark packets by cgroup path instead (nftables: socket cgroupv2)",
            )


def unified(raw: dict[str, str]) -> list[list[Knob]]:
    """linux.resources.unified: each key is a file of the cgroup, written as it is."""
    groups: list[list[Knob]] = []
    for key, value in raw.items():
        path = f"$.linux.resources.unified.{key}"
        if "/" in key:
            raise ConfigError(path, f"the key `{key}` must be a file name without a slash")
        controller, dot, rest = key.partition(".")
        if not (controller and dot and rest):
            raise ConfigError(path, f"the specified key has not the form CONTROLLER.VALUE `{key}`")
        if key in _NOT_LIMITS:
            raise ConfigError(path, f"{key} is not a limit")
        knob = Knob("" if controller == "cgroup" else controller, key, value, f"unified.{key}")
        # The type must be settled before any limit: a threaded cgroup offers fewer files.
        groups.insert(0, [knob]) if key == "cgroup.type" else groups.append([knob])
    return groups
