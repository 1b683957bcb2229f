"""The runtime-spec's linux.resources as control files of cgroup v1: a plan of writes, nothing is touched here.

Not here: devices (devices.py), the order inside a group (knobs.settle). linux.resources.memory.kernel is accepted and
ignored, as the kernel does since 5.16; 0 means "not given" for sizes, shares, quota and periods, as in every runtime.
"""

from __future__ import annotations

from ovt.errors import ConfigError
from ovt.kernel.cgroup.knobs import Knob

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_THROTTLE = {
    "throttleReadBpsDevice": "blkio.throttle.read_bps_device",
    "throttleWriteBpsDevice": "blkio.throttle.write_bps_device",
    "throttleReadIOPSDevice": "blkio.throttle.read_iops_device",
    "throttleWriteIOPSDevice": "blkio.throttle.write_iops_device",
}


def plan(resources: dict[str, Any]) -> list[list[Knob]]:
    """Groups of writes, in order; inside a group the kernel decides the order."""
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
        groups += _hugepages(limits)
    if network := resources.get("network"):
        groups += _network(network)
    if rdma := resources.get("rdma"):
        groups += rdma_limits(rdma)
    return groups


def _memory(memory: dict[str, Any]) -> list[list[Knob]]:
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    if limit == -1 and swap == 0:
        swap_knob = [Knob("memory", "memory.memsw.limit_in_bytes", "-1", "memory.limit", optional=True)]
    elif swap:
        swap_knob = [Knob("memory", "memory.memsw.limit_in_bytes", str(swap), "memory.swap", optional=swap == -1)]
    else:
        swap_knob = []
    groups = []
    if limit:
        groups.append([Knob("memory", "memory.limit_in_bytes", str(limit), "memory.limit"), *swap_knob])
    elif swap_knob:
        groups.append(swap_knob)
    if memory.get("reservation"):
        groups.append([Knob("memory", "memory.soft_limit_in_bytes", str(memory["reservation"]), "memory.reservation")])
    if memory.get("kernelTCP"):
        # Gone from newer kernels together with memory.kmem.limit_in_bytes; the memory limit counts both since 4.5.
        groups.append(
            [Knob("memory", "memory.kmem.tcp.limit_in_bytes", str(memory["kernelTCP"]), "memory.kernelTCP", True)]
        )
    if memory.get("useHierarchy") is not None:
        # Always on since 5.11: there the file takes 1 only.
        wanted = bool(memory["useHierarchy"])
        groups.append([Knob("memory", "memory.use_hierarchy", str(int(wanted)), "memory.useHierarchy", wanted)])
    if memory.get("swappiness") is not None:
        swappiness = memory["swappiness"]
        if not 0 <= swappiness <= 100:
            raise ConfigError(
                "$.linux.resources.memory.swappiness",
                f"invalid memory swappiness value: {swappiness} (valid range is 0-100)",
            )
        groups.append([Knob("memory", "memory.swappiness", str(swappiness), "memory.swappiness")])
    if memory.get("disableOOMKiller") is not None:
        off = bool(memory["disableOOMKiller"])
        groups.append([Knob("memory", "memory.oom_control", str(int(off)), "memory.disableOOMKiller", not off)])
    return groups


def _cpu(cpu: dict[str, Any]) -> list[list[Knob]]:
    groups = []
    if cpu.get("idle") is not None:
        # An idle group has no shares to set, so this is decided first.
        groups.append([Knob("cpu", "cpu.idle", str(cpu["idle"]), "cpu.idle", cpu["idle"] == 0)])
    if cpu.get("shares") and not cpu.get("idle"):
        groups.append([Knob("cpu", "cpu.shares", str(cpu["shares"]), "cpu.shares")])
    bandwidth = []
    if cpu.get("period"):
        bandwidth.append(Knob("cpu", "cpu.cfs_period_us", str(cpu["period"]), "cpu.period"))
    if cpu.get("quota"):
        bandwidth.append(Knob("cpu", "cpu.cfs_quota_us", str(cpu["quota"]), "cpu.quota"))
    if cpu.get("burst") is not None:
        bandwidth.append(Knob("cpu", "cpu.cfs_burst_us", str(cpu["burst"]), "cpu.burst", cpu["burst"] == 0))
    realtime = []
    if cpu.get("realtimePeriod"):
        realtime.append(Knob("cpu", "cpu.rt_period_us", str(cpu["realtimePeriod"]), "cpu.realtimePeriod"))
    if cpu.get("realtimeRuntime"):
        realtime.append(Knob("cpu", "cpu.rt_runtime_us", str(cpu["realtimeRuntime"]), "cpu.realtimeRuntime"))
    groups += [group for group in (bandwidth, realtime) if group]
    return groups + cpuset(cpu)


def cpuset(cpu: dict[str, Any]) -> list[list[Knob]]:
    """linux.resources.cpu.cpus and .mems: the same two files in v1 and v2."""
    return [[Knob("cpuset", f"cpuset.{key}", cpu[key], f"cpu.{key}")] for key in ("cpus", "mems") if cpu.get(key)]


def pids_limit(pids: dict[str, Any]) -> list[list[Knob]]:
    """linux.resources.pids: a positive limit, or none for -1 and, as every runtime in use reads it, for 0."""
    limit = pids.get("limit")
    if limit is None:
        return []
    return [[Knob("pids", "pids.max", str(limit) if limit > 0 else "max", "pids.limit", limit <= 0)]]


def _block(block: dict[str, Any]) -> list[list[Knob]]:
    groups = []
    if block.get("weight"):
        value = str(block["weight"])
        bfq = ("blkio.bfq.weight", value)
        groups.append([Knob("blkio", "blkio.weight", value, "blockIO.weight", other=bfq)])
    if block.get("leafWeight"):
        groups.append([Knob("blkio", "blkio.leaf_weight", str(block["leafWeight"]), "blockIO.leafWeight")])
    for device in block.get("weightDevice") or ():
        number = f"{device['major']}:{device['minor']}"
        if device.get("weight"):
            value = f"{number} {device['weight']}"
            bfq = ("blkio.bfq.weight_device", value)
            groups.append([Knob("blkio", "blkio.weight_device", value, "blockIO.weightDevice", other=bfq)])
        if device.get("leafWeight"):
            value = f"{number} {device['leafWeight']}"
            groups.append([Knob("blkio", "blkio.leaf_weight_device", value, "blockIO.weightDevice")])
    for key, file in _THROTTLE.items():
        for device in block.get(key) or ():
            value = f"{device['major']}:{device['minor']} {device['rate']}"
            groups.append([Knob("blkio", file, value, f"blockIO.{key}")])
    return groups


def _hugepages(limits: list[dict[str, Any]]) -> list[list[Knob]]:
    groups = []
    for entry in limits:
        size, value = entry["pageSize"], str(entry["limit"])
        for name in (f"hugetlb.{size}.limit_in_bytes", f"hugetlb.{size}.rsvd.limit_in_bytes"):
            groups.append([Knob("hugetlb", name, value, "hugepageLimits", ".rsvd." in name)])
    return groups


def _network(network: dict[str, Any]) -> list[list[Knob]]:
    groups = []
    if network.get("classID") is not None:
        groups.append([Knob("net_cls", "net_cls.classid", str(network["classID"]), "network.classID")])
    for entry in network.get("priorities") or ():
        value = f"{entry['name']} {entry['priority']}"
        groups.append([Knob("net_prio", "net_prio.ifpriomap", value, "network.priorities")])
    return groups


def rdma_limits(rdma: dict[str, Any]) -> list[list[Knob]]:
    """linux.resources.rdma: rdma.max of v1 and v2 are the same file."""
    groups = []
    for device, limits in rdma.items():
        words = [device]
        if limits.get("hcaHandles") is not None:
            words.append(f"hca_handle={limits['hcaHandles']}")
        if limits.get("hcaObjects") is not None:
            words.append(f"hca_object={limits['hcaObjects']}")
        groups.append([Knob("rdma", "rdma.max", " ".join(words), "rdma")])
    return groups
