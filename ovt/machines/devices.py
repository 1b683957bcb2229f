"""attach, detach, resize, limit, insert, eject and link: devices of a machine, whatever state it is in.

On a machine that runs they are plugged, on a stopped one recorded for its next start. Each change is written down
before it is made and confirmed afterwards (ovt.engine.vm.attached), so that a command that is killed leaves a device
that is attached and recorded, or neither. A machine that was never started has no hardware yet: what its owner asked
for is changed (wanted_devices).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ovt.engine.vm import attached, blockgraph, diskrecords, disks, hostdevs, nics, saved
from ovt.engine.vm.hardware import FILE, Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.engine.vm.snapshot_changes import read
from ovt.engine.vm.snapshot_tree import chains
from ovt.errors import StateError, UsageError
from ovt.image import disk as images
from ovt.machines import wanted_devices as wanted
from ovt.machines.snapshots import tidy
from ovt.model import LIVE, Disk, Instance, Kind, Machine, Nic, require

if TYPE_CHECKING:
    from ovt.host import Host

Record = dict[str, Any]
_MOST_PORTS = 32


class Opened(NamedTuple):
    """A machine whose devices are to be changed: locked, with its record settled."""

    host: Host
    instance: Instance
    home: str
    hardware: Hardware | None  # None: it was never started
    qmp: Qmp | None  # None: it does not run

    @property
    def run(self) -> float:
        """This life of QEMU, see attached.mark."""
        return self.instance.started

    def frozen(self) -> Hardware:
        """The hardware of a machine that has been started before."""
        if self.hardware is None:
            raise StateError("it has not been started yet: it has no hardware", f"ovt start {self.instance.name}")
        return self.hardware

    def save(self) -> None:
        """Write the hardware down."""
        self.frozen().save(self.home)

    def ask(self, machine: Machine) -> None:
        """Keep other wishes for a machine that was never started, if they can be fulfilled."""
        changed = self.instance._replace(spec=self.instance.spec._replace(machine=machine))
        self.host.vms.plan(changed, self.home)
        self.host.store.save(changed, durable=True)


@contextmanager
def opened(host: Host, reference: str) -> Iterator[Opened]:
    """Lock the machine and put in order what killed commands have left of its devices and snapshots."""
    with host.store.locked(reference) as instance:
        if instance.kind is not Kind.VM:
            raise UsageError("it is a container, and device is for virtual machines", "ovt ps shows which is which")
        status = host.store.observe(instance)
        require("device", instance.name, status)
        home = host.store.home(instance.id)
        if status in LIVE:
            with host.vms.qmp(instance) as qmp:
                tidy(home, qmp)
                yield Opened(host, instance, home, attached.settle(qmp, home, instance.started), qmp)
            return
        host.vms.cleanup(instance, home)
        if saved.exists(home):
            raise StateError(
                "its memory is on the disk, and fits only the devices that it has now",
                f"ovt start {instance.name}, then change them",
            )
        tidy(home, None)
        started = os.path.exists(f"{home}/{FILE}")
        yield Opened(host, instance, home, Hardware.load(home) if started else None, None)


# come and go


def attach_disk(host: Host, reference: str, disk: Disk) -> str:
    """Give a machine a disk or a CD-ROM drive; its id. Errors as of diskrecords.prepare and disks.plug; StateError for
    a bus that takes nothing while the machine runs, HostError when it has no place left."""
    with opened(host, reference) as at:
        if at.hardware is None:
            machine, id = wanted.add_disk(at.instance.spec.machine, disk)
            at.ask(machine)
        else:
            id = _attach_disk(at, at.hardware, disk)
    host.journal.write("attach", at.instance.id, at.instance.name, device=id, sort=disk.device)
    return id


def _attach_disk(at: Opened, hardware: Hardware, disk: Disk) -> str:
    disk = wanted.disk_id(disk, [device["id"] for device in [*hardware.devices(), *hardware.dimms]])
    if at.qmp is not None and blockgraph.cold({"bus": disk.bus}):
        raise StateError(
            "a sata disk cannot be plugged into a running machine",
            "attach it while the machine is stopped, or use bus virtio, scsi or nvme",
        )
    controller = diskrecords.new_controller([disk], hardware.controllers, hardware.vcpus)
    if controller:
        # before anything is made: what is wrong with the disk is found here
        _prepare(at, hardware, disk, [controller], make=False)
        _attach(at, hardware, hardware.controllers, {**controller, "port": _port(at, hardware)})
    record = _prepare(at, hardware, disk, hardware.controllers, make=True)
    try:
        if diskrecords.needs_port(record):
            record["port"] = _port(at, hardware)
        _attach(at, hardware, hardware.disks, record)
    except BaseException:
        if disk.device == "disk" and (disk.mode == "overlay" or not disk.source) and record not in hardware.disks:
            os.unlink(f"{at.home}/{record['chain'][-1]['path']}")  # it was made a moment ago, and is empty
        raise
    return disk.id


def _prepare(at: Opened, hardware: Hardware, disk: Disk, controllers: list[Record], make: bool) -> Record:
    return diskrecords.prepare(
        [disk],
        at.home,
        vcpus=hardware.vcpus,
        existing=hardware.disks,
        controllers=controllers,
        allow_backing=True,  # the image is the owner's own choice, and its chain is walked and written down
        make=make,
    )[0]


def attach_nic(host: Host, reference: str, nic: Nic) -> str:
    """Give a machine a network card; its id. Errors as of nics.add and nics.plug."""
    with opened(host, reference) as at:
        if at.hardware is None:
            machine, id = wanted.add_nic(at.instance.spec.machine, nic)
            at.ask(machine)
        else:
            _room(at, at.hardware)
            record = nics.add(at.hardware, nic)
            at.hardware.nics.remove(record)
            id = record["id"]
            _attach(at, at.hardware, at.hardware.nics, record)
    host.journal.write("attach", at.instance.id, at.instance.name, device=id, sort="nic")
    return id


def attach_hostdev(host: Host, reference: str, address: str) -> str:
    """Give a machine a PCI device of the host; its id. Errors as of hostdevs.add; StateError for one that runs and was
    started without this device."""
    with opened(host, reference) as at:
        if at.hardware is None:
            id = address.lower()
            machine = at.instance.spec.machine
            at.ask(machine._replace(hostdevs=(*machine.hostdevs, id)))
        else:
            _room(at, at.hardware)
            balloon = at.hardware.balloon
            record = hostdevs.add(at.hardware, address)
            if at.qmp is not None:
                at.hardware.balloon = balloon  # what it was started with is there until it ends
            at.hardware.hostdevs.remove(record)
            id = record["id"]
            _attach(at, at.hardware, at.hardware.hostdevs, record)
    host.journal.write("attach", at.instance.id, at.instance.name, device=id, sort="hostdev")
    return id


def _attach(at: Opened, hardware: Hardware, sort: list[Record], record: Record) -> None:
    """Record and plug one device; neither is left of it when this raises."""
    sort.append(record)
    if at.qmp is None:
        at.save()
        return
    attached.mark(record, attached.ATTACH, at.run)
    at.save()
    try:
        attached.plug(at.qmp, hardware, at.home, record, at.host.vms.features, at.instance)
    except BaseException:
        if record["id"] not in disks.attached(at.qmp):  # raises itself when QEMU is gone; then the mark stays
            sort.remove(record)
            at.save()
        raise
    del record[attached.PENDING]
    at.save()


def _room(at: Opened, hardware: Hardware) -> None:
    """A stopped machine gets as many places as it needs."""
    if at.qmp is None and len([device for device in hardware.devices() if device.get("port")]) >= hardware.ports:
        hardware.ports = min(_MOST_PORTS, hardware.ports + 1)


def _port(at: Opened, hardware: Hardware) -> str:
    _room(at, hardware)
    return hardware.take_port()


def detach(
    host: Host, reference: str, id: str, timeout: float = disks.UNPLUG_SECONDS, delete: bool = False
) -> list[str]:
    """Take a device from a machine; the paths of its own images that stay, which with `delete` are only those that
    snapshots need.

    StateError when the guest does not give it back within `timeout` seconds: it is attached and recorded as before. A
    guest may still let go later, and the next command sees that.
    """
    left: list[str] = []
    with opened(host, reference) as at:
        if at.hardware is None:
            at.ask(wanted.remove(at.instance.spec.machine, id))
        else:
            left = _detach(at, at.hardware, id, timeout, delete)
    host.journal.write("detach", at.instance.id, at.instance.name, device=id)
    return left


def _detach(at: Opened, hardware: Hardware, id: str, timeout: float, delete: bool) -> list[str]:
    device = hardware.find(id)
    if device in hardware.dimms:
        raise UsageError(
            f"{id} is memory, which a guest hardly ever gives back", f"ovt update --memory SIZE {at.instance.name}"
        )
    if device in hardware.controllers and any(disk["bus"] == "scsi" for disk in hardware.disks):
        raise StateError(f"there are disks on controller {id}", "detach them first")
    if at.qmp is not None:
        status = at.qmp.command("query-status")["status"]
        if status not in ("running", "prelaunch") and device.get("bus") != "scsi":
            raise StateError(f"the guest has to give {id} back, and is {status}", f"ovt resume {at.instance.name}")
        if not blockgraph.cold(device):
            attached.mark(device, attached.DETACH, at.run)
            at.save()
        attached.unplug(at.qmp, device, timeout)
    attached.list_of(hardware, device).remove(device)
    if at.qmp is None and "address" in device and not hardware.hostdevs:
        hardware.balloon = at.instance.spec.machine.balloon  # which a host's device had kept away
    at.save()
    return _files(at, hardware, device, delete)


def _files(at: Opened, hardware: Hardware, device: Record, delete: bool) -> list[str]:
    """The device's own images that stay."""
    own = diskrecords.own_files(device) if "chain" in device else []
    if not delete:
        return [f"{at.home}/{path}" for path in own]
    needed = {layer["path"] for _, chain in chains(read(at.home), hardware.pack()) for layer in chain}
    for path in own:
        if path not in needed and os.path.exists(f"{at.home}/{path}"):
            os.unlink(f"{at.home}/{path}")
    return [f"{at.home}/{path}" for path in own if path in needed]


# change


def resize(host: Host, reference: str, id: str, size: int) -> None:
    """Make a disk larger, `size` bytes. UsageError when it would become smaller, StateError for a bus that does not do
    it while the machine runs."""
    with opened(host, reference) as at:
        if at.hardware is None:
            at.ask(_grown(at.instance.spec.machine, id, size))
        else:
            disk = _disk(at.hardware, id)
            if at.qmp is not None:
                disks.resize(at.qmp, disk, size)
            else:
                _grow_image(at.home, disk, size)
    host.journal.write("resize", at.instance.id, at.instance.name, device=id, size=size)


def _grown(machine: Machine, id: str, size: int) -> Machine:
    """Other wishes: a larger disk, which is made at the first start."""
    disk = next((disk for disk in machine.disks if disk.id == id), None)
    had = (
        max(disk.size, images.probe(disk.source, allow_backing=True).virtual_size if disk.source else 0) if disk else 0
    )
    if size < had:
        raise UsageError(f"disk {id} is to have {had} bytes and cannot become smaller", "detach it and attach another")
    return wanted.change_disk(machine, id, size=size)


def _grow_image(home: str, disk: Record, size: int) -> None:
    top = disk["chain"][-1] if disk["chain"] else {}
    if blockgraph.read_only(disk) or not top:
        raise UsageError(f"disk {disk['id']} is read-only and keeps its size")
    if top.get("block"):
        raise UsageError(f"disk {disk['id']} is {top['path']}, which grows on the host")
    images.resize(os.path.join(home, top["path"]), size)


def limit(host: Host, reference: str, id: str, iops: int | None = None, bps: int | None = None) -> None:
    """Limit a disk to so many operations and bytes per second; 0 for no limit, None for what it was."""
    changes = {key: value for key, value in (("iops", iops), ("bps", bps)) if value is not None}
    for key, value in changes.items():
        blockgraph.check_limit(id, key, value)
    with opened(host, reference) as at:
        if at.hardware is None:
            at.ask(wanted.change_disk(at.instance.spec.machine, id, **changes))
        else:
            disk = _disk(at.hardware, id)
            new = {"iops": disk.get("iops") or 0, "bps": disk.get("bps") or 0, **changes}
            if at.qmp is not None:
                disks.throttle(at.qmp, disk, new["iops"], new["bps"])
            disk.update(new)
            at.save()
    host.journal.write("limit", at.instance.id, at.instance.name, device=id, **changes)


def insert(host: Host, reference: str, id: str, path: str, *, force: bool = False) -> None:
    """Put the image `path` into a CD-ROM drive, in place of what is in there; empty: only take that out. See
    disks.change_medium for `force` and errors."""
    with opened(host, reference) as at:
        if at.hardware is None:
            drive = wanted.drive(at.instance.spec.machine, id)
            at.ask(wanted.change_disk(at.instance.spec.machine, drive.id, source=path))
        else:
            _change_medium(at, _disk(at.hardware, id), path, force)
    verb = "insert" if path else "eject"
    host.journal.write(verb, at.instance.id, at.instance.name, device=id, **({"image": path} if path else {}))


def _change_medium(at: Opened, disk: Record, path: str, force: bool) -> None:
    if disk["device"] != "cdrom":
        raise UsageError(f"{disk['id']} is a disk and no CD-ROM drive", "attach and detach are for disks")
    medium = Disk(path, disk["id"], "cdrom", "raw", bus=disk["bus"], mode="readonly")
    chain = diskrecords.prepare([medium], at.home, make=False)[0]["chain"] if path else []
    if at.qmp is not None:
        before = attached.medium_node(at.qmp, disk)
        attached.mark(disk, attached.INSERT, at.run, chain=chain, before=before)
        at.save()
        try:
            disks.change_medium(
                at.qmp, at.home, disk, chain or None, force=force, io_uring=at.host.vms.features.io_uring
            )
        except BaseException:
            if attached.medium_node(at.qmp, disk) == before:
                del disk[attached.PENDING]
                at.save()
            raise
        del disk[attached.PENDING]
    disk["chain"] = chain
    at.save()


def link(host: Host, reference: str, id: str, up: bool) -> None:
    """Pull out or put back the cable of a network card."""
    with opened(host, reference) as at:
        if at.hardware is None:
            at.ask(wanted.change_nic(at.instance.spec.machine, id, link=up))
        else:
            nic = next((nic for nic in at.hardware.nics if nic["id"] == id), None)
            if nic is None:
                raise wanted.unknown(id, [nic["id"] for nic in at.hardware.nics], "network card")
            nic["link"] = up
            if at.qmp is not None:
                nics.set_link(at.qmp, nic, up)
            at.save()
    host.journal.write("link", at.instance.id, at.instance.name, device=id, up=up)


def _disk(hardware: Hardware, id: str) -> Record:
    for disk in hardware.disks:
        if disk["id"] == id:
            return disk
    raise wanted.unknown(id, [disk["id"] for disk in hardware.disks], "disk")
