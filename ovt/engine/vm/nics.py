"""Network cards of a machine: the host's side of each (a netdev) and the device, plugged over QMP at any time."""

from __future__ import annotations

import os
from typing import Any

from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import UsageError
from ovt.model import Nic

_MODELS = {"virtio": "virtio-net-pci", "e1000e": "e1000e", "e1000": "e1000", "rtl8139": "rtl8139", "igb": "igb"}
_PREFIX = "52:54:00"  # QEMU's and libvirt's own, locally administered


def new_mac() -> str:
    """A random address of the range that virtual cards use."""
    return ":".join([_PREFIX, *(f"{byte:02x}" for byte in os.urandom(3))])


def add(hardware: Hardware, nic: Nic) -> dict[str, Any]:
    """Record a card in the hardware; its record. UsageError for what is not known, HostError without a free port."""
    if nic.model not in _MODELS:
        raise UsageError(f"network card model {nic.model!r} is not known", ", ".join(_MODELS))
    kind = nic.network.partition(":")[0]
    if kind not in {"user", "none"}:
        raise UsageError(f"network {nic.network!r} is not known", "user or none")
    record = {
        "id": nic.id or hardware.new_id("nic"),
        "port": hardware.take_port(),
        "mac": nic.mac or new_mac(),
        "model": nic.model,
        "network": nic.network,
        "queues": nic.queues or 1,
        "link": nic.link,
        "forwards": list(nic.forwards),
    }
    hardware.nics.append(record)
    return record


def plug(qmp: Qmp, hardware: Hardware, nic: dict[str, Any]) -> None:
    """Connect a card; nothing of it is left when QEMU refuses."""
    netdev = f"{nic['id']}-net"
    if nic["network"] != "none":
        forwards = [{"str": _forward(text)} for text in nic["forwards"]]
        qmp.command("netdev_add", {"type": "user", "id": netdev, "hostfwd": forwards})
    device: dict[str, Any] = {"driver": _MODELS[nic["model"]], "id": nic["id"], "mac": nic["mac"], "bus": nic["port"]}
    if nic["network"] != "none":
        device["netdev"] = netdev
    if hardware.firmware == "none":
        device["romfile"] = ""  # nothing boots from it
    try:
        qmp.command("device_add", device)
        if not nic["link"]:
            qmp.command("set_link", {"name": nic["id"], "up": False})
    except QmpError:
        if nic["network"] != "none":
            qmp.command("netdev_del", {"id": netdev})
        raise


def _forward(text: str) -> str:
    """QEMU's form of PROTOCOL:ADDRESS:PORT:GUEST_PORT."""
    protocol, address, port, guest = text.split(":")
    return f"{protocol}:{address}:{port}-:{guest}"
