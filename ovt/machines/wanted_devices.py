"""Devices of a machine that was never started: changes of what its owner asked for. Pure functions on a Machine.

Its hardware is chosen at its first start; from then on `ovt.machines.devices` changes the hardware itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ovt.engine.vm import nics
from ovt.errors import Conflict, NotFound, UsageError
from ovt.model import Disk, Machine, Nic


def ids(machine: Machine) -> list[str]:
    """The ids of all its devices, hosts' ones by their address."""
    return [*(disk.id for disk in machine.disks), *(nic.id for nic in machine.nics), *machine.hostdevs]


def free_id(prefix: str, taken: Iterable[str], first: int) -> str:
    """`prefix` and the smallest unused number from `first` on."""
    known = set(taken)
    return next(f"{prefix}{n}" for n in range(first, first + len(known) + 1) if f"{prefix}{n}" not in known)


def disk_id(disk: Disk, taken: Iterable[str]) -> Disk:
    """The disk with an id; Conflict when the one that it was given is taken."""
    known = set(taken)
    if disk.id in known:
        raise Conflict(f"it has a device {disk.id} already", "choose another id")
    prefix = "cdrom" if disk.device == "cdrom" else "disk"
    return disk if disk.id else disk._replace(id=free_id(prefix, known, 1))


def add_disk(machine: Machine, disk: Disk) -> tuple[Machine, str]:
    """The machine with a further disk or drive, and its id."""
    disk = disk_id(disk, ids(machine))
    return machine._replace(disks=(*machine.disks, disk)), disk.id


def add_nic(machine: Machine, nic: Nic) -> tuple[Machine, str]:
    """The machine with a further network card, and its id."""
    if nic.id in ids(machine):
        raise Conflict(f"it has a device {nic.id} already", "choose another id")
    nic = nic._replace(id=nic.id or free_id("nic", ids(machine), 0), mac=nic.mac or nics.new_mac())
    return machine._replace(nics=(*machine.nics, nic)), nic.id


def remove(machine: Machine, id: str) -> Machine:
    """The machine without this device; NotFound."""
    if id not in ids(machine):
        raise unknown(id, ids(machine))
    return machine._replace(
        disks=tuple(disk for disk in machine.disks if disk.id != id),
        nics=tuple(nic for nic in machine.nics if nic.id != id),
        hostdevs=tuple(address for address in machine.hostdevs if address != id),
    )


def change_disk(machine: Machine, id: str, **changes: Any) -> Machine:
    """The machine with other members of this disk; NotFound."""
    if all(disk.id != id for disk in machine.disks):
        raise unknown(id, [disk.id for disk in machine.disks], "disk")
    return machine._replace(disks=tuple(disk._replace(**changes) if disk.id == id else disk for disk in machine.disks))


def change_nic(machine: Machine, id: str, **changes: Any) -> Machine:
    """The machine with other members of this card; NotFound."""
    if all(nic.id != id for nic in machine.nics):
        raise unknown(id, [nic.id for nic in machine.nics], "network card")
    return machine._replace(nics=tuple(nic._replace(**changes) if nic.id == id else nic for nic in machine.nics))


def drive(machine: Machine, id: str) -> Disk:
    """The CD-ROM drive with this id; NotFound, UsageError for a disk."""
    found = next((disk for disk in machine.disks if disk.id == id), None)
    if found is None:
        raise unknown(id, [disk.id for disk in machine.disks if disk.device == "cdrom"], "CD-ROM drive")
    if found.device != "cdrom":
        raise UsageError(f"{id} is a disk and no CD-ROM drive", "attach and detach are for disks")
    return found


def unknown(id: str, known: Iterable[str], what: str = "device") -> NotFound:
    """That there is no such device, with those that there are."""
    return NotFound(f"it has no {what} {id!r}", f"there are: {', '.join(known) or 'none'}")
