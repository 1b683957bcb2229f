"""More or less memory and processors for a machine, while it runs.

Memory above what the machine has is plugged in as DIMMs, memory below it is taken by the balloon: a DIMM that Linux
has used can hardly ever be unplugged. Processors are plugged and unplugged one by one. The guest has to bring both into
use; its agent is asked to where there is one. What was changed lasts until the next cold start, which begins with the
instance's limits.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from ovt.engine.vm import jail
from ovt.engine.vm.hardware import DEFAULT_MEMORY, MEMORY_UNIT, MIB, SLOTS, Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import HostError, StateError, UsageError
from ovt.model import Instance, Limits

if TYPE_CHECKING:
    from ovt.engine.vm.engine import VmEngine

_UNPLUG_SECONDS = 15.0  # a guest that lets go of a processor does so in less than one


def at_cold_start(hardware: Hardware, limits: Limits) -> None:
    """Give the machine what its limits say; nothing of it runs yet, so nothing needs to be plugged."""
    hardware.memory = -(-(limits.memory or DEFAULT_MEMORY) // MIB) * MIB
    hardware.max_memory = max(hardware.max_memory, hardware.memory)
    hardware.dimms = []
    hardware.plugged_vcpus = []
    hardware.vcpus = max(1, math.ceil(limits.cpus or 1))
    if hardware.vcpus > hardware.max_vcpus:
        # sockets of one core each are the default; a topology of the owner's own is kept in its proportions
        per_socket = hardware.cores * hardware.threads
        hardware.sockets = -(-hardware.vcpus // per_socket)
        hardware.max_vcpus = hardware.sockets * per_socket


def update(engine: VmEngine, qmp: Qmp, instance: Instance, limits: Limits) -> None:
    """Put new limits on a running machine. UsageError or StateError, before anything is changed, for what it cannot
    have without a restart; QmpError or HostError when QEMU or the guest refuses."""
    home = engine.home(instance)
    hardware = Hardware.load(home)
    before = instance.spec.limits
    memory = -(-(limits.memory or DEFAULT_MEMORY) // MIB) * MIB
    vcpus = max(1, math.ceil(limits.cpus or 1))
    _check(hardware, memory, vcpus)
    if limits.memory != before.memory:
        _memory(engine, qmp, hardware, home, memory)
    if vcpus != hardware.vcpus + len(hardware.plugged_vcpus):
        _vcpus(qmp, hardware, home, vcpus)
    cpus = limits.cpus if limits.cpus % 1 else 0.0
    resources = jail.resources(max(memory, total_memory(hardware)), cpus, limits.cpuset_cpus)
    if not cpus and before.cpus % 1:
        resources.setdefault("cpu", {})["quota"] = -1
    if engine.containers.cgroups.parent:
        engine.containers.runtime.update(instance.id, resources)
    elif cpus or limits.cpuset_cpus:
        raise HostError("a limit of processor time needs a cgroup, and none can be made here", hint="ovt check")


def total_memory(hardware: Hardware) -> int:
    """Bytes that the guest has, the balloon aside."""
    return hardware.memory + sum(int(dimm["size"]) for dimm in hardware.dimms)


def _check(hardware: Hardware, memory: int, vcpus: int) -> None:
    if vcpus > hardware.max_vcpus:
        raise UsageError(
            f"{vcpus} processors are more than the {hardware.max_vcpus} it was started for",
            "stop it, then `ovt update --cpus` takes effect at its start",
        )
    if vcpus < hardware.vcpus:
        raise StateError(
            f"it was started with {hardware.vcpus} processors, and those cannot be unplugged",
            "stop it first, or limit their time with --cpus and a fraction",
        )
    if memory > hardware.max_memory:
        raise UsageError(
            f"{memory >> 20} MiB are more than the {hardware.max_memory >> 20} MiB it was started for",
            "stop it, then `ovt update --memory` takes effect at its start",
        )
    more = memory - total_memory(hardware)
    if more > 0 and len(hardware.dimms) >= SLOTS:
        raise StateError(f"all {SLOTS} places for memory are taken", "stop it first: then it starts with all of it")
    if more < 0 and not hardware.balloon:
        raise StateError("it has no balloon to take memory with", "stop it first")


def _memory(engine: VmEngine, qmp: Qmp, hardware: Hardware, home: str, wanted: int) -> None:
    more = wanted - total_memory(hardware)
    if more > 0:
        size = -(-more // MEMORY_UNIT) * MEMORY_UNIT
        dimm = {"id": hardware.new_id("dimm"), "size": size}
        plug_dimm(qmp, hardware, dimm)
        hardware.dimms.append(dimm)
        hardware.save(home)
    if hardware.balloon:
        with contextlib.suppress(QmpError):  # no driver in the guest: it has all of its memory, and no less
            qmp.command("balloon", {"value": min(wanted, total_memory(hardware))})


def plug_dimm(qmp: Qmp, hardware: Hardware, dimm: dict[str, Any]) -> None:
    """Plug memory in; nothing of it is left when QEMU refuses."""
    backend: dict[str, Any] = {"qom-type": "memory-backend-ram", "id": f"{dimm['id']}-memory", "size": dimm["size"]}
    if hardware.shared_memory:
        backend |= {"qom-type": "memory-backend-memfd", "share": True}
    qmp.command("object-add", backend)
    try:
        device = {"driver": "pc-dimm", "id": dimm["id"], "memdev": backend["id"]}
        if hardware.numa > 1:
            device["node"] = 0
        qmp.command("device_add", device)
    except QmpError:
        qmp.command("object-del", {"id": backend["id"]})
        raise


def _vcpus(qmp: Qmp, hardware: Hardware, home: str, wanted: int) -> None:
    while hardware.vcpus + len(hardware.plugged_vcpus) < wanted:
        free = [slot for slot in qmp.command("query-hotpluggable-cpus") if "qom-path" not in slot]
        if not free:
            raise HostError("QEMU has no place for a further processor")
        slot = min(free, key=lambda slot: [slot["props"][key] for key in sorted(slot["props"])][::-1])
        cpu = {"id": f"cpu{hardware.vcpus + len(hardware.plugged_vcpus)}", "driver": slot["type"], **slot["props"]}
        plug_vcpu(qmp, cpu)
        hardware.plugged_vcpus.append(cpu)
        hardware.save(home)
    while hardware.vcpus + len(hardware.plugged_vcpus) > wanted:
        _unplug_vcpu(qmp, hardware.plugged_vcpus[-1]["id"])
        hardware.plugged_vcpus.pop()
        hardware.save(home)


def _unplug_vcpu(qmp: Qmp, id: str) -> None:
    qmp.command("device_del", {"id": id})
    try:
        qmp.wait_event("DEVICE_DELETED", timeout=_UNPLUG_SECONDS, where=lambda e: e["data"].get("device") == id)
    except TimeoutError:
        raise StateError(
            "the guest does not let go of a processor", "take it off line in the guest, or stop the machine first"
        ) from None


def plug_vcpu(qmp: Qmp, cpu: dict[str, Any]) -> None:
    """Plug one processor in."""
    qmp.command("device_add", cpu)
