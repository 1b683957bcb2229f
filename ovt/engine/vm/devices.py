"""All devices of a machine that go into root ports, at once: recorded at its first start, plugged at every start.

What each sort of device is, is in its own module; this one knows their order.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ovt.engine.base import Stats
from ovt.engine.vm import blockgraph, diskrecords, disks, hostdevs, nics, resize, seed, shares
from ovt.engine.vm.diskfiles import open_chain
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import OvtError
from ovt.model import Disk, Instance, Seed

if TYPE_CHECKING:
    from ovt.engine.vm.engine import VmEngine
    from ovt.engine.vm.process import Launch

SEED = "seed.iso"
_COLD_SETS = 2000  # numbers of the fdsets of disks that are on the command line, above those that QEMU chooses


def add_all(hardware: Hardware, instance: Instance, home: str, dry: bool) -> None:
    """Record every device that the owner asked for; unless `dry`, make the files that belong to them."""
    machine = instance.spec.machine
    hardware.ports = 32  # for the choice of places; `grow_ports` makes it what is needed
    wanted = [
        disk._replace(size=disk.size or machine.root_size) if disk.id == "root" else disk for disk in machine.disks
    ]
    if machine.seed is not None and not dry:
        hardware.seed = True
        wanted.append(_seed(machine.seed, instance, home))
    controller = diskrecords.new_controller(wanted, hardware.controllers, hardware.vcpus)
    if controller:
        hardware.controllers.append({**controller, "port": hardware.take_port()})
    records = diskrecords.prepare(
        wanted,
        home,
        vcpus=hardware.vcpus,
        controllers=hardware.controllers,
        allow_backing=True,  # the image is the owner's own choice, and its chain is walked and written down
        make=not dry,
    )
    for record in records:
        if diskrecords.needs_port(record):
            record["port"] = hardware.take_port()
        hardware.disks.append(record)
    for nic in machine.nics:
        nics.add(hardware, nic)
    for volume in instance.spec.volumes:
        shares.add(hardware, volume)
    for address in machine.hostdevs:
        hostdevs.add(hardware, address)
    hostdevs.check([record["address"] for record in hardware.hostdevs])
    hardware.ports = 0


def _seed(wanted: Seed, instance: Instance, home: str) -> Disk:
    """The disk on which the guest's cloud-init finds what is set for it.

    On virtio-blk, not a CD-ROM: cloud-init looks before udev has loaded drivers, and the kernels of cloud images bring
    that driver in their initramfs, while many have none for a SATA or SCSI drive.
    """
    path = f"{home}/{SEED}"
    content = seed.make(wanted, instance.spec.hostname or instance.name, f"ovt-{instance.id}")
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.rename(f"{path}.tmp", path)
    return Disk(path, "seed", "disk", "raw", mode="readonly")


def describe(hardware: Hardware, home: str) -> list[str]:
    """One line for each device."""
    lines = []
    for disk in hardware.disks:
        images = " over ".join(layer["path"] for layer in reversed(disk["chain"])) or "empty"
        lines.append(f"{disk['device']} {disk['id']}: {disk['bus']}, {images}")
    lines += [nics.describe(nic) for nic in hardware.nics]
    lines += [shares.describe(share) for share in hardware.shares]
    lines += [hostdevs.describe(hostdev) for hostdev in hardware.hostdevs]
    return lines


def prepare_launch(job: Launch) -> None:
    """What devices need of QEMU's container."""
    hostdevs.prepare(job)


def cold_disks(job: Launch, stack: ExitStack) -> tuple[dict[str, int], dict[str, int]]:
    """Disks that only a command line takes (SATA): their descriptors by name, and the fdset of each name."""
    given: dict[str, int] = {}
    sets: dict[str, int] = {}
    for disk in job.hardware.disks:
        if blockgraph.cold(disk):
            for number, fd in enumerate(open_chain(job.home, disk)):
                stack.callback(os.close, fd)
                name = f"{disk['id']}-file{number}"
                given[name] = fd
                sets[name] = _COLD_SETS + len(sets)
    return given, sets


def cold_words(hardware: Hardware, sets: dict[str, int], features: Features) -> list[str]:
    """Their part of the command line."""
    words: list[str] = []
    for disk in hardware.disks:
        if blockgraph.cold(disk):
            own = [sets[f"{disk['id']}-file{number}"] for number in range(len(disk["chain"]))]
            words += blockgraph.words(disk, own, io_uring=features.io_uring)
    return words


def plug_all(qmp: Qmp, hardware: Hardware, home: str, features: Features, incoming: bool, owner: str = "") -> None:
    """Plug every recorded device into a machine that has not begun."""
    for controller in hardware.controllers:
        disks.plug_controller(qmp, controller)
    for disk in hardware.disks:
        if not blockgraph.cold(disk):
            disks.plug(qmp, home, disk, io_uring=features.io_uring)
        elif disk.get("iops") or disk.get("bps"):
            disks.throttle(qmp, disk, disk["iops"], disk["bps"])
    for nic in hardware.nics:
        nics.plug(qmp, hardware, nic, owner=owner, features=features)
    for share in hardware.shares:
        shares.plug(qmp, hardware, share)
    for hostdev in hardware.hostdevs:
        hostdevs.plug(qmp, hardware, hostdev)
    for dimm in hardware.dimms:
        resize.plug_dimm(qmp, hardware, dimm)
    for cpu in hardware.plugged_vcpus:
        resize.plug_vcpu(qmp, cpu)
    if hardware.firmware != "none" and not incoming:
        qmp.command("system_reset")  # what was plugged is in the firmware's order of booting only from here on
        qmp.wait_event("RESET", timeout=30.0)


def stats(engine: VmEngine, instance: Instance, read: Stats) -> Stats:
    """What the cgroup says, with the guest's memory, disks and network in the place of QEMU's own."""
    hardware = Hardware.load(engine.home(instance))
    memory_limit = resize.total_memory(hardware)
    block_read = block_write = exits = 0
    try:
        with engine.qmp(instance, 5.0) as qmp:
            for counts in disks.stats(qmp).values():
                block_read += counts[0]
                block_write += counts[1]
            exits = _exits(qmp) if hardware.accel == "kvm" else 0
            if hardware.balloon:
                try:
                    memory_limit = int(qmp.command("query-balloon")["actual"])
                except QmpError:
                    pass  # its driver is not there yet: the guest has all of its memory
    except OvtError:
        return read  # busy or just ended; the cgroup's figures stand
    counted = [counts for counts in nics.stats(hardware.nics, instance.id).values() if counts]
    return read._replace(
        memory_limit=memory_limit,
        block_read=block_read,
        block_write=block_write,
        network_received=sum(counts[0] for counts in counted),
        network_sent=sum(counts[1] for counts in counted),
        exits=exits,
    )


def _exits(qmp: Qmp) -> int:
    """How often the guest's processors have left it for the host, since its start."""
    wanted = {"target": "vcpu", "providers": [{"provider": "kvm", "names": ["exits"]}]}
    return sum(int(entry["value"]) for one in qmp.command("query-stats", wanted) for entry in one["stats"])
