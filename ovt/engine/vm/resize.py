"""More or less memory and processors for a machine, while it runs.

Memory above what the machine has is plugged in as DIMMs, memory below it is taken by the balloon: a DIMM that Linux
has used can hardly ever be unplugged. Processors are plugged and unplugged one by one. The guest has to bring both into
use; its agent is asked to where there is one. What was changed lasts until the next cold start, which begins with the
instance's limits.

Which DIMMs and processors there are is always asked of QEMU (`observe`), so that no command that died half-way can
leave a record that says otherwise; the record holds the addresses that QEMU chose, for a restored machine.

Linux from the end of 2025 on takes no processor while it runs unless it knows its hypervisor, and emulation (TCG) is
none that it knows; with KVM it does.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ovt.engine.vm import disks, jail
from ovt.engine.vm.agent import Agent, NoAgent, port_open
from ovt.engine.vm.hardware import DEFAULT_MEMORY, LEAST_MEMORY, MEMORY_UNIT, MIB, SLOTS, Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import HostError, OvtError, StateError, UsageError
from ovt.model import Instance, Limits

if TYPE_CHECKING:
    from ovt.engine.vm.engine import VmEngine

_UNPLUG_SECONDS = 15.0  # a guest that lets go of a processor does so in less than one
_NOTICE_SECONDS = 5.0  # for the guest's kernel to answer that it has seen what was plugged in
_SLOW_SYNC = 15.0  # seconds for an agent under emulation
_BACKEND = re.compile(r"(dimm\d+)-memory")
_EJECT, _EJECTED, _EJECTING = 3, 0, 0x84  # source and states of _OST (ACPI 6.5, 6.3.5)


def at_cold_start(hardware: Hardware, limits: Limits) -> None:
    """Give the machine what its limits say; nothing of it runs yet, so nothing needs to be plugged."""
    hardware.memory = -(-(limits.memory or DEFAULT_MEMORY) // MIB) * MIB
    if hardware.memory < LEAST_MEMORY:
        raise UsageError(f"{hardware.memory >> 20} MiB of memory are too few for a machine", "ovt update --memory 256M")
    hardware.max_memory = max(hardware.max_memory, hardware.memory)
    hardware.dimms = []
    hardware.plugged_vcpus = []
    hardware.forked = False
    hardware.vcpus = max(1, math.ceil(limits.cpus or 1))
    if hardware.vcpus > hardware.max_vcpus:
        # sockets of one core each are the default; a topology of the owner's own is kept in its proportions
        per_socket = hardware.cores * hardware.threads
        hardware.sockets = -(-hardware.vcpus // per_socket)
        hardware.max_vcpus = hardware.sockets * per_socket


def update(engine: VmEngine, qmp: Qmp, instance: Instance, limits: Limits) -> None:
    """Put new limits on a running machine. UsageError or StateError, before anything is changed, for what it cannot
    have without a restart; QmpError, HostError or StateError when QEMU or the guest refuses, and nothing but what was
    done until then has changed."""
    home = engine.home(instance)
    hardware = Hardware.load(home)
    if observe(qmp, hardware):
        hardware.save(home)
    before = instance.spec.limits
    memory = -(-(limits.memory or DEFAULT_MEMORY) // MIB) * MIB
    vcpus = max(1, math.ceil(limits.cpus or 1))
    running = qmp.command("query-status")["status"] == "running"
    _check(hardware, memory, vcpus, running)
    more: list[str] = []
    if limits.memory != before.memory:
        more += _memory(qmp, hardware, home, memory)
    if vcpus != hardware.vcpus + len(hardware.plugged_vcpus):
        more += _vcpus(qmp, hardware, home, vcpus)
    cpus = limits.cpus if limits.cpus % 1 else 0.0
    resources = jail.resources(max(memory, total_memory(hardware)), cpus, limits.cpuset_cpus)
    if not cpus and before.cpus % 1:
        resources.setdefault("cpu", {})["quota"] = -1
    if engine.containers.cgroups.parent:
        engine.containers.runtime.update(instance.id, resources)
    elif cpus or limits.cpuset_cpus:
        raise HostError("a limit of processor time needs a cgroup, and none can be made here", hint="ovt check")
    if more and running:
        _bring_into_use(qmp, hardware, home, more, engine.report)


def total_memory(hardware: Hardware) -> int:
    """Bytes that the guest has, the balloon aside."""
    return hardware.memory + sum(int(dimm["size"]) for dimm in hardware.dimms)


def observe(qmp: Qmp, hardware: Hardware) -> bool:
    """Put the DIMMs and processors that QEMU has into the record, with the places it chose; whether that changed it.

    What a command left of a DIMM that died before it was plugged in is removed.
    """
    dimms = []
    for entry in qmp.command("query-memory-devices"):
        data = entry["data"]
        if entry["type"] == "dimm" and data.get("id"):
            dimms.append({key: data[key] for key in ("id", "size", "slot", "addr", "node")})
    cpus = []
    for slot in qmp.command("query-hotpluggable-cpus"):
        place, _, id = slot.get("qom-path", "").rpartition("/")
        if place == "/machine/peripheral":
            cpus.append({"id": id, "driver": slot["type"], **slot["props"]})
    used = {dimm["id"] for dimm in dimms}
    for name in disks.children(qmp, "/objects"):
        if (match := _BACKEND.fullmatch(name)) and match[1] not in used:
            qmp.command("object-del", {"id": name})
    found = (sorted(dimms, key=lambda dimm: dimm["slot"]), sorted(cpus, key=_number))
    changed = found != (hardware.dimms, hardware.plugged_vcpus)
    hardware.dimms, hardware.plugged_vcpus = found
    return changed


def _check(hardware: Hardware, memory: int, vcpus: int, running: bool) -> None:
    if memory < LEAST_MEMORY:
        raise UsageError(f"{memory >> 20} MiB of memory are too few for a machine", "--memory 256M")
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
    if vcpus < hardware.vcpus + len(hardware.plugged_vcpus):
        if hardware.accel == "tcg":  # QEMU 10.0 has room for so many threads in its life, and aborts at the next plug
            raise StateError(
                "an emulated processor cannot be unplugged: QEMU would not survive that another one comes later",
                "stop it first, or take it off line in the guest",
            )
        if not running:
            raise StateError("a guest that stands still cannot let go of a processor", "ovt resume NAME")
    more = memory - total_memory(hardware)
    if memory > hardware.max_memory or total_memory(hardware) + _dimm_size(more) > hardware.max_memory:
        raise UsageError(
            f"{memory >> 20} MiB are more than the {hardware.max_memory >> 20} MiB it was started for"
            + (f" (it grows by {MEMORY_UNIT >> 20} MiB at a time)" if memory <= hardware.max_memory else ""),
            "stop it, then `ovt update --memory` takes effect at its start",
        )
    if more > 0 and len(hardware.dimms) >= SLOTS:
        raise StateError(f"all {SLOTS} places for memory are taken", "stop it first: then it starts with all of it")
    if more < 0 and not hardware.balloon:
        raise StateError("it has no balloon to take memory with", "stop it first")


def _dimm_size(more: int) -> int:
    return -(-more // MEMORY_UNIT) * MEMORY_UNIT if more > 0 else 0


def _memory(qmp: Qmp, hardware: Hardware, home: str, wanted: int) -> list[str]:
    """Plug or balloon; the ids of what was plugged in."""
    more = wanted - total_memory(hardware)
    added: list[str] = []
    if more > 0:
        id = hardware.new_id("dimm")
        plug_dimm(qmp, hardware, {"id": id, "size": _dimm_size(more)})
        observe(qmp, hardware)
        hardware.save(home)
        added.append(id)
    if hardware.balloon:
        with contextlib.suppress(QmpError):  # no driver in the guest: it has all of its memory, and no less
            qmp.command("balloon", {"value": min(wanted, total_memory(hardware))})
    return added


def plug_dimm(qmp: Qmp, hardware: Hardware, dimm: dict[str, Any]) -> None:
    """Plug memory in, at its recorded place if it has one; nothing of it is left when QEMU refuses."""
    backend: dict[str, Any] = {"qom-type": "memory-backend-ram", "id": f"{dimm['id']}-memory", "size": dimm["size"]}
    if hardware.shared_memory or hardware.hugepages:
        backend |= {"qom-type": "memory-backend-memfd", "share": hardware.shared_memory}
        if hardware.hugepages:
            backend |= {"hugetlb": True, "hugetlbsize": 2 * MIB}
    qmp.command("object-add", backend)
    try:
        device = {"driver": "pc-dimm", "id": dimm["id"], "memdev": backend["id"]}
        device |= {key: dimm[key] for key in ("slot", "addr") if key in dimm}
        if hardware.numa > 1:
            device["node"] = dimm.get("node", 0)
        qmp.command("device_add", device)
    except QmpError:
        qmp.command("object-del", {"id": backend["id"]})
        raise


def _vcpus(qmp: Qmp, hardware: Hardware, home: str, wanted: int) -> list[str]:
    """Plug or unplug; the ids of what was plugged in."""
    added = []
    while hardware.vcpus + len(hardware.plugged_vcpus) < wanted:
        free = [slot for slot in qmp.command("query-hotpluggable-cpus") if "qom-path" not in slot]
        if not free:
            raise HostError("QEMU has no place for a further processor")
        slot = min(free, key=lambda slot: [slot["props"].get(key, 0) for key in ("socket-id", "core-id", "thread-id")])
        taken = {cpu["id"] for cpu in hardware.plugged_vcpus}
        id = next(f"cpu{n}" for n in range(hardware.vcpus, hardware.max_vcpus) if f"cpu{n}" not in taken)
        plug_vcpu(qmp, {"id": id, "driver": slot["type"], **slot["props"]})
        observe(qmp, hardware)
        hardware.save(home)
        added.append(id)
    while hardware.vcpus + len(hardware.plugged_vcpus) > wanted:
        _unplug_vcpu(qmp, hardware.plugged_vcpus[-1]["id"])
        observe(qmp, hardware)
        hardware.save(home)
    return added


def _number(cpu: dict[str, Any]) -> int:
    return int(cpu["id"].removeprefix("cpu"))


def _unplug_vcpu(qmp: Qmp, id: str) -> None:
    """Take a processor away; StateError when the guest keeps it."""
    qmp.command("device_del", {"id": id})
    deadline = time.monotonic() + _UNPLUG_SECONDS
    while id in disks.attached(qmp):  # QEMU tells by an event only that the processor's APIC has gone
        for event in [event for event in qmp.events if event["event"] == "ACPI_DEVICE_OST"]:
            told = event["data"]["info"]
            if told.get("device") == id and told["source"] == _EJECT:
                qmp.events.remove(event)
                if told["status"] not in (_EJECTED, _EJECTING):
                    raise StateError("the guest refuses to let go of a processor", "it may be the only one in use")
        if time.monotonic() > deadline:
            raise StateError(
                "the guest does not let go of a processor", "take it off line in the guest, or stop the machine first"
            )
        with contextlib.suppress(TimeoutError):
            qmp.wait_event("DEVICE_DELETED", timeout=0.1)


def plug_vcpu(qmp: Qmp, cpu: dict[str, Any]) -> None:
    """Plug one processor in."""
    qmp.command("device_add", cpu)


def _bring_into_use(qmp: Qmp, hardware: Hardware, home: str, added: list[str], report: Callable[[str], None]) -> None:
    """Wait until the guest has seen what was `added`, and have its agent bring it on line. What does not work is told
    and is no failure: the machine has what was asked for."""
    unseen = [id for id in added if not _seen(qmp, id)]
    if unseen:
        report(f"its guest has not noticed {', '.join(unseen)}: it takes none while it runs, or is still booting")
    agent = Agent(home, sync_timeout=_SLOW_SYNC if hardware.accel == "tcg" else 3.0, is_open=lambda: port_open(qmp))
    try:
        _switch_on(agent, "guest-get-memory-blocks", "guest-set-memory-blocks", "mem-blks", "phys-index")
        online = _switch_on(agent, "guest-get-vcpus", "guest-set-vcpus", "vcpus", "logical-id")
    except NoAgent:
        report("its guest has no agent that brings into use what was added: it has to do so by itself")
        return
    except OvtError as error:
        report(f"its agent did not bring into use what was added: {error}")
        return
    wanted = hardware.vcpus + len(hardware.plugged_vcpus)
    if online < wanted and any(id.startswith("cpu") for id in added):
        report(f"its guest uses {online} of {wanted} processors, its kernel takes no more before it is started again")


def _seen(qmp: Qmp, id: str) -> bool:
    """Whether the guest has answered to a device that was plugged in (ACPI's _OST)."""
    try:
        qmp.wait_event(
            "ACPI_DEVICE_OST", timeout=_NOTICE_SECONDS, where=lambda event: event["data"]["info"].get("device") == id
        )
    except TimeoutError:
        return False
    return True


def _switch_on(agent: Agent, ask: str, set: str, argument: str, number: str) -> int:
    """Bring on line what the agent says is off line; how many are on line then."""
    entries = agent.command(ask)
    off = [{number: entry[number], "online": True} for entry in entries if not entry["online"]]
    if off:
        agent.command(set, {argument: off})
        entries = agent.command(ask)
    return sum(1 for entry in entries if entry["online"])
