"""Network cards of a machine: their records, and the devices that the guest sees, plugged at any time over QMP.

What is behind a card on the host is in `netdevs`. What the guest can see of it (queues, MTU) is decided when the card
is recorded and stays, whatever becomes of the host's networks; a network that cannot give that any more is an error.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ovt.engine.vm import netdevs
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.engine.vm.unplug import plugged, remove_device
from ovt.errors import UsageError
from ovt.model import Nic

_MODELS = {"virtio": "virtio-net-pci", "e1000e": "e1000e", "e1000": "e1000", "rtl8139": "rtl8139", "igb": "igb"}
_PREFIX = "52:54:00"  # QEMU's and libvirt's own, locally administered
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")  # an odd first byte would be a group's
_MOST_QUEUES = 8  # by themselves; each is three interrupts and a thread of the host
_USUAL_MTU = 1500  # bytes


def new_mac() -> str:
    """A random address of the range that virtual cards use."""
    return ":".join([_PREFIX, *(f"{byte:02x}" for byte in os.urandom(3))])


def add(hardware: Hardware, nic: Nic) -> dict[str, Any]:
    """Record a card in the hardware; its record. UsageError for what is not known or contradicts itself, NotFound for
    a network that is not there, HostError without a free port."""
    if nic.model not in _MODELS:
        raise UsageError(f"network card model {nic.model!r} is not known", ", ".join(_MODELS))
    mac = (nic.mac or new_mac()).lower()
    if not _MAC.fullmatch(mac):
        raise UsageError(f"{nic.mac!r} is not the address of a network card", f"such as {new_mac()}")
    if any(other["mac"] == mac for other in hardware.nics):
        raise UsageError(f"two network cards have the address {mac}", "give each its own")
    if nic.forwards and netdevs.kind(nic.network) != "user":
        raise UsageError(
            f"network {nic.network!r} forwards no ports: the guest is reached at its own address",
            "leave the ports out, or use the network user",
        )
    for text in nic.forwards:
        netdevs.parse_forward(text)
    network = netdevs.inspect(nic.network)
    able = network.multi_queue and nic.model == "virtio"
    if nic.queues > 1 and not able:
        raise UsageError(f"a {nic.model} card on {nic.network} has one queue", "leave out the number of queues")
    if nic.queues < 0 or nic.queues > 256:
        raise UsageError(f"{nic.queues} queues", "1 to 256")
    id = nic.id or hardware.new_id("nic")
    if any(device["id"] == id for device in hardware.devices()):
        raise UsageError(f"there are two devices with the id {id!r}", "give each its own")
    taken = {other.get("number") for other in hardware.nics}
    record = {
        "id": id,
        "port": hardware.take_port(),
        "mac": mac,
        "model": nic.model,
        "network": nic.network,
        "number": next(n for n in range(len(taken) + 1) if n not in taken),
        "queues": nic.queues or (min(hardware.vcpus, _MOST_QUEUES) if able else 1),
        "mtu": network.mtu if network.mtu != _USUAL_MTU and nic.model == "virtio" else 0,
        "link": nic.link,
        "forwards": list(nic.forwards),
    }
    hardware.nics.append(record)
    return record


def need_host_network(networks: Iterable[str]) -> bool:
    """Whether QEMU has to be in the host's network namespace for cards on these networks: its own user network makes
    its connections there."""
    return "user" in networks and netdevs.passt() is None


def plug(
    qmp: Qmp,
    hardware: Hardware,
    nic: dict[str, Any],
    *,
    owner: str = "",
    features: Features | None = None,
    pid: int = 0,
) -> None:
    """Connect a card; nothing of it is left when this raises.

    `owner` is the instance's id, after which a tap is named. `pid` is that of a QEMU which runs already, for which not
    every network can be had any more (StateError). Conflict for a tap or a port of the host that is taken.
    """
    id = nic["id"]
    device = _device(hardware, nic)
    netdev = f"{id}-net"
    with contextlib.ExitStack() as stack:
        made = netdevs.open_network(nic, owner, features, pid)
        if made is not None:
            stack.callback(made.close)
            _add_netdev(qmp, netdev, made)
            device["netdev"] = netdev
    try:
        qmp.command("device_add", device)
        if not nic["link"]:
            qmp.command("set_link", {"name": id, "up": False})
    except QmpError:
        if plugged(qmp, id):
            with contextlib.suppress(QmpError):
                qmp.command("device_del", {"id": id})
        if "netdev" in device:
            qmp.command("netdev_del", {"id": netdev})
        raise


def _device(hardware: Hardware, nic: dict[str, Any]) -> dict[str, Any]:
    device: dict[str, Any] = {"driver": _MODELS[nic["model"]], "id": nic["id"], "mac": nic["mac"], "bus": nic["port"]}
    if nic["queues"] > 1:
        # an interrupt for each direction of each queue, one for the control queue, one for changes of configuration
        device |= {"mq": True, "vectors": 2 * nic["queues"] + 2}
    if nic.get("mtu"):
        device["host_mtu"] = nic["mtu"]
    if hardware.firmware == "none":
        device["romfile"] = ""  # nothing boots from it
    return device


def _add_netdev(qmp: Qmp, netdev: str, made: netdevs.Netdev) -> None:
    """Hand QEMU the descriptors under names of their own, and let it make the netdev from them."""
    arguments = {"id": netdev, **made.arguments}
    names: list[str] = []
    try:
        for key, fds in made.fds.items():
            own = [f"{netdev}-{key}{number}" for number in range(len(fds))]
            for fd, name in zip(fds, own, strict=True):
                qmp.get_fd(fd, name)
                names.append(name)
            made.name(arguments, key, own)
        qmp.command("netdev_add", arguments)
    except QmpError:
        for name in names:
            with contextlib.suppress(QmpError):  # those that QEMU has taken it has closed
                qmp.command("closefd", {"fdname": name})
        raise


def unplug(qmp: Qmp, nic: dict[str, Any], timeout: float) -> None:
    """Take a card out. StateError when the guest has not let go within `timeout` seconds: then it stays as it is."""
    remove_device(qmp, nic["id"], timeout, "take the interface down in the guest and try again")
    if nic["network"] != "none":
        try:
            qmp.command("netdev_del", {"id": f"{nic['id']}-net"})
        except QmpError as error:
            if error.error_class != "DeviceNotFound" and "not found" not in error.message:
                raise


def set_link(qmp: Qmp, nic: dict[str, Any], up: bool) -> None:
    """Plug the cable in or pull it out, as the guest sees it. The record is changed too; the caller keeps it."""
    qmp.command("set_link", {"name": nic["id"], "up": up})
    nic["link"] = up


def stats(nics: list[dict[str, Any]], owner: str) -> dict[str, tuple[int, int] | None]:
    """Bytes that the guest has received and sent, by the id of the card; None where the host does not count them.

    Taps are counted by the kernel, from the host's side: what the host has sent, the guest has received. User networks
    and macvtaps are not; `merge` takes the guest's word for those.
    """
    return {nic["id"]: netdevs.counters(nic, owner) for nic in nics}


def merge(
    counted: Mapping[str, tuple[int, int] | None], nics: list[dict[str, Any]], interfaces: list[dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """`stats` with the gaps filled from the guest's agent (`guest_info`'s interfaces); a card that nobody counts is not
    in the answer."""
    by_mac = {entry.get("mac"): entry for entry in interfaces}
    found = {id: counts for id, counts in counted.items() if counts is not None}
    for nic in nics:
        entry = by_mac.get(nic["mac"])
        if nic["id"] not in found and entry and "received" in entry and "sent" in entry:
            found[nic["id"]] = (int(entry["received"]), int(entry["sent"]))
    return found


def describe(nic: dict[str, Any]) -> str:
    """One line for people."""
    queues = f", {nic['queues']} queues" if nic["queues"] > 1 else ""
    mtu = f", MTU {nic['mtu']}" if nic.get("mtu") else ""
    forwards = "".join(f", {text}" for text in nic["forwards"])
    down = "" if nic["link"] else ", link down"
    return f"network card {nic['id']}: {nic['model']}, {nic['mac']}, on {nic['network']}{queues}{mtu}{forwards}{down}"
