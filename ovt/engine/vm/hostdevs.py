"""PCI devices of the host that are given to a machine (VFIO): checked, taken from their drivers, and given back.

A device goes with all of its IOMMU group: what shares a group can reach each other's memory, so no member may be in the
hands of a driver of the host meanwhile. Before anything is changed every such fact has been looked at; before a driver
is unbound, it is written down in `home`/hostdevs.json, from which `release` gives the device back, after whatever end.
While a machine has such a device all of its memory is locked, and its balloon takes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ovt.engine.vm import jail
from ovt.engine.vm.hardware import Hardware, replace_json
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.engine.vm.unplug import plugged, remove_device
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, UsageError, refused
from ovt.kernel.netlink import IFF_UP, Netlink

if TYPE_CHECKING:
    from ovt.engine.vm.process import Launch

RECORD = "hostdevs.json"
DRIVER = "vfio-pci"
SYSFS = "/sys"
_ADDRESS = re.compile(r"(?:([0-9a-f]{4}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
_HARMLESS = {"", DRIVER, "pci-stub", "pcieport"}  # drivers that do no DMA of their own (vfio_dev_driver_allowed)
_BRIDGES = "0x0604"  # class of PCI-to-PCI bridges, which stay with the host


class Member(NamedTuple):
    """A device of an IOMMU group; `driver` is empty where none has it."""

    address: str
    driver: str
    bridge: bool


class Taken(NamedTuple):
    """How a device was before it was taken."""

    address: str
    driver: str
    override: str


def add(hardware: Hardware, address: str) -> dict[str, Any]:
    """Record a device in the hardware, by its address; its record. UsageError for what is no address, and for one that
    is there already; HostError without a free port."""
    match = _ADDRESS.fullmatch(address.lower())
    if match is None:
        raise UsageError(f"{address!r} is not the address of a PCI device", "such as 0000:01:10.0; see: lspci -D")
    full = f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}"
    if any(record["address"] == full for record in hardware.hostdevs):
        raise UsageError(f"device {full} is given to the machine twice", "leave one out")
    record = {"id": hardware.new_id("hostdev"), "port": hardware.take_port(), "address": full}
    hardware.hostdevs.append(record)
    hardware.balloon = False  # memory that a device may write to cannot be taken away
    return record


# what is there


def members(address: str, sysfs: str = SYSFS) -> list[Member]:
    """The device's IOMMU group, itself included. NotFound without the device, HostError without an IOMMU."""
    device = _device(address, sysfs)
    if not os.path.isdir(device):
        raise NotFound(f"there is no PCI device {address} on this host", "lspci -D")
    group = f"{device}/iommu_group/devices"
    if not os.path.isdir(group):
        raise HostError(
            f"device {address} is in no IOMMU group: nothing would keep it away from the host's memory",
            hint="turn on VT-d or AMD-Vi in the firmware; Intel also needs intel_iommu=on for the kernel",
        )
    found = []
    for name in sorted(os.listdir(group)):
        bridge = _read(f"{_device(name, sysfs)}/class").startswith(_BRIDGES)
        found.append(Member(name, _driver(name, sysfs), bridge))
    return found


def check(addresses: Sequence[str], sysfs: str = SYSFS) -> None:
    """Whether these devices can be given to one machine; nothing is changed.

    Conflict for one that the host is using or whose group has other members that it would have to go along with.
    """
    for address in addresses:
        group = members(address, sysfs)
        must = [m for m in group if m.address not in addresses and not m.bridge and m.driver not in _HARMLESS]
        if must:
            words = [_word(member, member in must, member.address in addresses) for member in group]
            more = " ".join(f"--hostdev {member.address}" for member in must)
            raise Conflict(
                f"device {address} cannot leave its IOMMU group, in which the host uses others: {'; '.join(words)}",
                f"give the whole group ({more}), or unbind the others from their drivers",
            )
    for address in addresses:
        if _driver(address, sysfs) != DRIVER:
            reason = _in_use(address, sysfs)
            if reason:
                raise Conflict(f"device {address} is in use by the host: {reason}", "free it first")


def _word(member: Member, must: bool, given: bool) -> str:
    role = "must go along" if must else "given" if given else "a bridge, stays" if member.bridge else "may stay"
    return f"{member.address} ({member.driver or 'no driver'}, {role})"


def _in_use(address: str, sysfs: str) -> str:
    """What the host does with the device; empty when nothing that its loss would hurt."""
    device = os.path.realpath(_device(address, sysfs))
    with contextlib.suppress(FileNotFoundError), Netlink() as netlink:
        for name in _nets(device):
            link = netlink.find(name)
            if link and link.flags & IFF_UP and netlink.addresses(link.index):
                return f"network device {name} is up and has an address"
            if link and link.master:
                return f"network device {name} is in {netlink.link_at(link.master).name}"
    for name in os.listdir(f"{sysfs}/class/block"):
        block = os.path.realpath(f"{sysfs}/class/block/{name}")
        if block.startswith(f"{device}/"):
            if os.path.isdir(f"{block}/holders") and os.listdir(f"{block}/holders"):
                return f"disk {name} is part of {', '.join(sorted(os.listdir(f'{block}/holders')))}"
            where = _mounted(name, _read(f"{block}/dev"))
            if where:
                return f"disk {name} is mounted on {where}"
    return ""


def _nets(device: str) -> Iterator[str]:
    """Network devices below a PCI device, also below its virtio device or port."""
    for directory in (device, *(f"{device}/{name}" for name in os.listdir(device) if name.startswith("virtio"))):
        if os.path.isdir(f"{directory}/net"):
            yield from sorted(os.listdir(f"{directory}/net"))


def _mounted(name: str, number: str, mountinfo: str = "/proc/self/mountinfo", swaps: str = "/proc/swaps") -> str:
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.partition(" - ")
            words = fields.split()
            if words[2] == number or rest.split()[1] == f"/dev/{name}":
                return words[4]
    with open(swaps, encoding="utf-8", errors="surrogateescape") as file:
        return "swap" if any(line.split()[0] == f"/dev/{name}" for line in file) else ""


def _device(address: str, sysfs: str) -> str:
    return f"{sysfs}/bus/pci/devices/{address}"


def _driver(address: str, sysfs: str) -> str:
    try:
        return os.path.basename(os.readlink(f"{_device(address, sysfs)}/driver"))
    except FileNotFoundError:
        return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise refused(f"write {text.strip()!r} to {path}", error) from None


# taking and giving back


def prepare(job: Launch) -> None:
    """Take the machine's devices from the host, and let QEMU's container have them. Nothing is changed when this
    raises: Conflict for a device that is in use, see `check`; HostError where VFIO is not to be had."""
    addresses = [record["address"] for record in job.hardware.hostdevs]
    if not addresses:
        return
    take(job.home, addresses)
    try:
        job.nodes.append(jail.node("/dev/vfio/vfio"))
        for group in sorted({_group(address, SYSFS) for address in addresses}):
            job.nodes.append(jail.node(f"/dev/vfio/{group}"))
    except OSError as error:
        release(job.home)
        raise HostError(f"{error.filename}: {error.strerror}", error.errno or 0, "modprobe vfio-pci") from None
    job.sysfs = True


def take(home: str, addresses: Sequence[str], sysfs: str = SYSFS) -> None:
    """Bind the devices to vfio-pci, and write down in `home` what they were bound to."""
    if os.geteuid():
        raise HostError("only root can take devices from the host's drivers", errno.EPERM, "run ovt as root")
    release(home, sysfs)  # of a start that was killed
    with contextlib.ExitStack() as stack:
        for address in sorted(addresses):  # in one order, so that two machines cannot wait for each other
            members(address, sysfs)
            stack.enter_context(_locked(_device(address, sysfs)))
        check(addresses, sysfs)
        _refuse_taken(home, addresses, sysfs)
        if not os.path.isdir(f"{sysfs}/bus/pci/drivers/{DRIVER}"):
            _load_driver(sysfs)
        before = [
            Taken(address, _driver(address, sysfs), _override(address, sysfs))
            for address in addresses
            if _driver(address, sysfs) != DRIVER
        ]
        owned = {"devices": list(addresses), "taken": [taken._asdict() for taken in before]}
        replace_json(f"{home}/{RECORD}", owned)
        try:
            for taken in before:
                _bind(taken.address, sysfs)
        except BaseException:
            release(home, sysfs)
            raise


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _refuse_taken(home: str, addresses: Sequence[str], sysfs: str) -> None:
    """Conflict when another machine has one of the devices, or anyone has its group."""
    parent = os.path.dirname(os.path.abspath(home))
    for other in sorted(os.listdir(parent)):
        if other == os.path.basename(os.path.abspath(home)):
            continue
        both = sorted(set(addresses).intersection(_load(f"{parent}/{other}").get("devices", ())))
        if both:
            raise Conflict(f"device {both[0]} is given to the machine {other} already", f"ovt stop {other}")
    for address in addresses:
        if _driver(address, sysfs) == DRIVER:
            path = f"/dev/vfio/{_group(address, sysfs)}"
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise Conflict(f"device {address} is in use by another program", f"fuser {path}") from None
                raise refused(f"open {path}", error) from None


def _group(address: str, sysfs: str) -> str:
    return os.path.basename(os.readlink(f"{_device(address, sysfs)}/iommu_group"))


def _override(address: str, sysfs: str) -> str:
    text = _read(f"{_device(address, sysfs)}/driver_override")
    return "" if text == "(null)" else text


def _load_driver(sysfs: str) -> None:
    done = subprocess.run(["modprobe", DRIVER], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if not os.path.isdir(f"{sysfs}/bus/pci/drivers/{DRIVER}"):
        said = done.stderr.strip() or "it is not there afterwards"
        raise HostError(f"the driver {DRIVER} cannot be loaded: {said}", hint="use a kernel that has it")


def _bind(address: str, sysfs: str) -> None:
    device = _device(address, sysfs)
    _write(f"{device}/driver_override", DRIVER)
    if _driver(address, sysfs):
        _write(f"{device}/driver/unbind", address)
    _write(f"{sysfs}/bus/pci/drivers_probe", address)
    if _driver(address, sysfs) != DRIVER:
        raise HostError(f"device {address} does not go to {DRIVER}", hint="dmesg says why")


def release(home: str, sysfs: str = SYSFS) -> None:
    """Give back what `take` took; safe to repeat. Only after QEMU's end: until then the kernel waits for it.

    A device that has vanished meanwhile is none of our business any more. HostError when a driver does not take its
    device back; the record stays then, and the others have been given back.
    """
    failed: OvtError | None = None
    for entry in reversed(_load(home).get("taken", [])):
        taken = Taken(**entry)
        if not os.path.isdir(_device(taken.address, sysfs)):
            continue
        try:
            _give_back(taken, sysfs)
        except OvtError as error:
            failed = error
    if failed is not None:
        raise failed
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{home}/{RECORD}")


def _give_back(taken: Taken, sysfs: str) -> None:
    device = _device(taken.address, sysfs)
    _write(f"{device}/driver_override", f"{taken.override}\n")
    driver = _driver(taken.address, sysfs)
    if driver == taken.driver:
        return
    if driver:
        _write(f"{device}/driver/unbind", taken.address)
    if taken.driver:
        own = f"{sysfs}/bus/pci/drivers/{taken.driver}/bind"
        _write(own if os.path.exists(own) else f"{sysfs}/bus/pci/drivers_probe", taken.address)


def _load(home: str) -> dict[str, Any]:
    try:
        with open(f"{home}/{RECORD}", encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
            return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise OvtError(f"{home}/{RECORD} is damaged: {error}", "bind the devices by hand, then remove it") from None


# the device in the machine


def plug(qmp: Qmp, hardware: Hardware, record: Mapping[str, Any]) -> None:
    """Connect a device that QEMU's container has (`prepare`). Conflict when another program has it, HostError when the
    guest's memory cannot be locked, StateError for a machine whose container was made without it."""
    device = {"driver": "vfio-pci", "id": record["id"], "host": record["address"], "bus": record["port"]}
    if hardware.firmware == "none":
        device["rombar"] = 0  # nothing boots from it
    try:
        qmp.command("device_add", device)
    except QmpError as error:
        address, reason = record["address"], error.message.removeprefix("device_add: ")
        if "Cannot allocate memory" in reason or "-12" in reason:
            raise HostError(
                f"device {address}: the guest's memory cannot be locked: {reason}",
                errno.ENOMEM,
                f"all {hardware.memory >> 20} MiB are locked for a device: give it less, or raise the host's limit",
            ) from None
        if "busy" in reason:
            raise Conflict(f"device {address} is in use by another program", "fuser -v /dev/vfio/*") from None
        if "No such file or directory" in reason or "no such host device" in reason:
            raise StateError(
                f"device {address} cannot be added to a running machine: its container was made without it",
                "stop it first, then add the device",
            ) from None
        raise


def unplug(qmp: Qmp, record: Mapping[str, Any], timeout: float) -> None:
    """Take a device out. StateError when the guest has not let go within `timeout` seconds: then it stays. The host
    gets it back at the machine's end, with the others of its group."""
    if plugged(qmp, record["id"]):
        remove_device(qmp, record["id"], timeout, "unload its driver in the guest and try again")


def describe(record: Mapping[str, Any], sysfs: str = SYSFS) -> str:
    """One line for people."""
    device = _device(record["address"], sysfs)
    what = f"{_read(f'{device}/vendor')[2:]}:{_read(f'{device}/device')[2:]}" if os.path.isdir(device) else "not there"
    return f"device {record['id']}: PCI device {record['address']} of the host ({what})"
