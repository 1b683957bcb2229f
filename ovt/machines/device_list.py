"""What devices a machine has, for people and programs: from its record, and from QEMU where it runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ovt.engine.vm import attached, disks, nics, saved
from ovt.engine.vm.hardware import FILE, Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.errors import OvtError
from ovt.image import disk as images
from ovt.machines.power import machine
from ovt.model import LIVE, Disk, Machine

if TYPE_CHECKING:
    from ovt.host import Host

Entry = dict[str, Any]


def listing(host: Host, reference: str) -> list[Entry]:
    """One entry for each device: id, sort (disk, cdrom, nic, memory, cpu, controller, hostdev, share), bus, port, what
    (image, network …), `size`, and `received` and `sent` by the guest, in bytes, None where that is not known; state is
    empty for one that is attached, else says what it waits for. Nothing is locked or changed."""
    instance = machine(host, "device", reference)
    home = host.store.home(instance.id)
    if saved.exists(home):
        return _all(saved.read(home)[0], home, None, instance.id, 0.0)
    if not os.path.exists(f"{home}/{FILE}"):
        return _wanted(instance.spec.machine)
    hardware = Hardware.load(home)
    if host.store.observe(instance) in LIVE:
        with host.vms.qmp(instance) as qmp:
            return _all(hardware, home, qmp, instance.id, instance.started)
    return _all(hardware, home, None, instance.id, 0.0)


def _entry(id: str, sort: str, what: str, **more: Any) -> Entry:
    empty = {"bus": "", "port": "", "size": None, "received": None, "sent": None, "state": ""}
    return {"id": id, "sort": sort, "what": what, **empty, **more}


def _wanted(wanted: Machine) -> list[Entry]:
    """Of a machine that was never started."""
    first = "from its first start"
    found = [_entry(disk.id, disk.device, disk.source or "", bus=disk.bus, size=_size(disk), state=first)
             for disk in wanted.disks]  # fmt: skip
    found += [_entry(nic.id, "nic", f"{nic.network} {nic.mac}", bus=nic.model, state=first) for nic in wanted.nics]
    return [*found, *(_entry(address, "hostdev", address, state=first) for address in wanted.hostdevs)]


def _size(disk: Disk) -> int | None:
    if disk.size or not disk.source:
        return disk.size or None
    return _virtual_size(disk.source, disk.format)


def _all(hardware: Hardware, home: str, qmp: Qmp | None, owner: str, run: float) -> list[Entry]:
    there = disks.attached(qmp) if qmp else set()
    sizes = disks.sizes(qmp) if qmp else {}
    done = disks.stats(qmp) if qmp else {}
    counted = nics.stats(hardware.nics, owner) if qmp else {}

    def state(device: Entry) -> str:
        if qmp is None:
            return ""
        if device["id"] not in there:
            return "not attached"  # its command was killed, or the guest has thrown it out
        return "asked back" if attached.asked_back(device, run) else ""

    found = []
    for disk in hardware.disks:
        id, chain = disk["id"], disk["chain"]
        path = os.path.join(home, chain[-1]["path"]) if chain else ""
        read, written = done.get(id, (None, None))[:2]
        size = sizes.get(id) if qmp else _virtual_size(path, chain[-1]["format"]) if chain else None
        place = disk.get("port") or f"unit {disk.get('unit', 0)}"
        entry = _entry(id, disk["device"], path, bus=disk["bus"], port=place, size=size, state=state(disk))
        limits = {key: disk.get(key) or 0 for key in ("iops", "bps")}
        found.append({**entry, "received": read, "sent": written, "chain": [layer["path"] for layer in chain]} | limits)
    for nic in hardware.nics:
        received, sent = counted.get(nic["id"]) or (None, None)
        what = f"{nic['network']} {nic['mac']}{'' if nic['link'] else ' (link down)'}"
        entry = _entry(nic["id"], "nic", what, bus=nic["model"], port=nic["port"], state=state(nic))
        found.append({**entry, "received": received, "sent": sent})
    for sort, devices in (
        ("controller", hardware.controllers),
        ("hostdev", hardware.hostdevs),
        ("share", hardware.shares),
    ):
        for device in devices:
            what = str(device.get("address") or device.get("source") or "virtio-scsi")
            found.append(_entry(device["id"], sort, what, port=device.get("port") or "", state=state(device)))
    return found if qmp is None else [*found, *_plugged(hardware)]  # a start gives it all of its memory at once


def _plugged(hardware: Hardware) -> list[Entry]:
    """Memory and processors beyond those that it was started with."""
    found = [
        _entry(dimm["id"], "memory", "plugged in", port=f"slot {dimm['slot']}", size=dimm["size"])
        for dimm in hardware.dimms
    ]
    cpus = [_entry(cpu["id"], "cpu", "plugged in", port=f"socket {cpu['socket-id']}") for cpu in hardware.plugged_vcpus]
    return [*found, *cpus]


def _virtual_size(path: str, format: str) -> int | None:
    """What a guest sees of an image; None for one that cannot be read."""
    try:
        return images.probe(path, format=format, allow_backing=True).virtual_size
    except OvtError:
        return None
