"""What QEMU has beside what hardware.json says: devices that come and go while a machine runs.

QEMU and the record cannot change in one step. So the record says beforehand what is about to happen, as the member
`pending` of the device: {"verb", "run"}, and with "insert" the new chain and the node that was in the drive. A command
that is killed leaves that behind, and the next one asks QEMU how it ended (`settle`): attached and recorded, or
neither. A mark of an earlier run of QEMU says nothing any more: what is recorded was plugged in at its start.

A guest may let go of a device long after it was asked to and after the command has given up; the mark "detach" stays
for that. A device that a guest throws out by itself stays recorded: its next start has it again.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ovt.engine.vm import disks, hostdevs, nics, resize, shares
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.engine.vm.unplug import remove_device
from ovt.errors import OvtError
from ovt.model import Instance

PENDING = "pending"
ATTACH, DETACH, INSERT = "attach", "detach", "insert"
Record = dict[str, Any]


def mark(device: Record, verb: str, run: float, **more: Any) -> None:
    """Note what is about to be done; `run` tells this life of QEMU from others (Instance.started)."""
    device[PENDING] = {"verb": verb, "run": run, **more}


def asked_back(device: Record, run: float) -> bool:
    """Whether the guest was asked to give it back and has not yet."""
    pending = device.get(PENDING) or {}
    return bool(pending.get("verb") == DETACH and pending.get("run") == run)


def settle(qmp: Qmp, home: str, run: float) -> Hardware:
    """The record as QEMU has it, after finishing or taking back what a killed command began."""
    hardware = Hardware.load(home)
    changed = resize.observe(qmp, hardware)
    there = disks.attached(qmp)
    for sort in lists(hardware):
        for device in list(sort):
            if PENDING in device:
                changed |= _settle(qmp, sort, device, device["id"] in there, run)
    if changed:
        hardware.save(home)
    return hardware


def _settle(qmp: Qmp, sort: list[Record], device: Record, there: bool, run: float) -> bool:
    """Decide about one device; whether the record has changed."""
    pending = device[PENDING]
    if pending["run"] != run:
        del device[PENDING]
    elif pending["verb"] == INSERT:
        del device[PENDING]
        if medium_node(qmp, device) != pending["before"]:
            device["chain"] = pending["chain"]
        disks.remove_unused(qmp, device)
    elif there and pending["verb"] == DETACH:
        return False  # the guest has been asked, and may still let go
    elif there:
        _finish(qmp, device)
        del device[PENDING]
    else:
        try:
            remove_backend(qmp, device)
        except OvtError:
            return False  # a block job uses its image: the record stays as long as that
        sort.remove(device)
    return True


def _finish(qmp: Qmp, device: Record) -> None:
    """What comes after device_add, again."""
    if "chain" in device:
        disks.throttle(qmp, device, device.get("iops") or 0, device.get("bps") or 0)
    elif not device.get("link", True):
        qmp.command("set_link", {"name": device["id"], "up": False})


def remove_backend(qmp: Qmp, device: Record) -> None:
    """The host's side of a device that QEMU does not have, or not any more."""
    if "chain" in device:
        disks.remove_backend(qmp, device["id"])
    elif "mac" in device:
        with contextlib.suppress(QmpError):  # it was never made
            qmp.command("netdev_del", {"id": f"{device['id']}-net"})


def medium_node(qmp: Qmp, disk: Record) -> str:
    """The node that is in a CD-ROM drive; empty for none."""
    inserted = disks.medium(qmp, disk)
    return str(inserted["node-name"]) if inserted else ""


def lists(hardware: Hardware) -> list[list[Record]]:
    """The lists of the record that devices come into and leave."""
    return [hardware.controllers, hardware.disks, hardware.nics, hardware.hostdevs, hardware.shares]


def list_of(hardware: Hardware, device: Record) -> list[Record]:
    """The list that this device is in."""
    return next(sort for sort in lists(hardware) if any(entry is device for entry in sort))


def plug(qmp: Qmp, hardware: Hardware, home: str, device: Record, features: Features, instance: Instance) -> None:
    """Plug in a device of the record; nothing of it is left when QEMU refuses."""
    if "chain" in device:
        disks.plug(qmp, home, device, io_uring=features.io_uring)
    elif "mac" in device:
        nics.plug(qmp, hardware, device, owner=instance.id, features=features, pid=instance.pid)
    elif "address" in device:
        hostdevs.plug(qmp, hardware, device)
    else:
        disks.plug_controller(qmp, device)


def unplug(qmp: Qmp, device: Record, timeout: float) -> None:
    """Take a device from the guest; see disks.unplug."""
    if "chain" in device:
        disks.unplug(qmp, device, timeout)
    elif "mac" in device:
        nics.unplug(qmp, device, timeout)
    elif "address" in device:
        hostdevs.unplug(qmp, device, timeout)
    elif "target" in device:
        shares.unplug(qmp, device, timeout)
    else:
        remove_device(qmp, device["id"], timeout)
