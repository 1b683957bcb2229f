"""All devices of a machine that go into root ports, at once: recorded at its first start, plugged at every start."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ovt.engine.base import Stats
from ovt.engine.vm import nics
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.model import Instance

if TYPE_CHECKING:
    from ovt.engine.vm.engine import VmEngine
    from ovt.engine.vm.process import Launch


def add_all(hardware: Hardware, instance: Instance, home: str, features: Features, dry: bool) -> None:
    """Record every device that the owner asked for; unless `dry`, make the files that belong to them."""
    machine = instance.spec.machine
    hardware.ports = 32  # for the choice of places; `grow_ports` makes it what is needed
    for nic in machine.nics:
        nics.add(hardware, nic)
    hardware.ports = 0


def describe(hardware: Hardware, home: str) -> list[str]:
    """One line for each device."""
    return [f"network card {nic['id']}: {nic['model']}, {nic['mac']}, on {nic['network']}" for nic in hardware.nics]


def prepare_launch(job: Launch) -> None:
    """What devices need of QEMU's container."""


def plug_all(qmp: Qmp, hardware: Hardware, home: str, features: Features) -> None:
    """Plug every recorded device into a machine that has not begun."""
    for nic in hardware.nics:
        nics.plug(qmp, hardware, nic)


def stats(engine: VmEngine, instance: Instance, read: Stats) -> Stats:
    """What the cgroup says, with the guest's memory, disks and network in the place of QEMU's own."""
    return read._replace(network_received=0, network_sent=0)


_: Any = os
