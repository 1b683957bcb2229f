"""The options of `create` and `run` that only virtual machines have, and the Machine they ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from ovt.cli import values
from ovt.cli.context import Parsed
from ovt.errors import NotFound, UsageError
from ovt.model import Disk, Kind, Machine, Nic, Seed

_SIZE = Parsed("size", values.parse_size)
_DISK_WORDS = "SOURCE or new, then size= bus= mode= format= cache= aio= iops= bps= serial= id= iothread nodiscard"
_NIC_WORDS = "user, none, tap:NAME, bridge:NAME or macvtap:DEVICE, then mac= model= queues= id= down"
_WATCHDOG = ("reset", "shutdown", "poweroff", "pause", "none")


def _pairs(text: str, what: str, flags: tuple[str, ...], keys: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """`FIRST,key=value,flag…`: FIRST and the pairs, a flag with an empty value."""
    first, *rest = text.split(",")
    result = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if (key not in keys or not value) if equals else key not in flags:
            raise UsageError(f"{what} {text!r}: {word!r} is not known", ", ".join([*(f"{k}=" for k in keys), *flags]))
        result[key] = value
    return first, result


def parse_disk(text: str) -> Disk:
    """A value of --disk: the path of an image or `new`, and settings."""
    keys = ("size", "bus", "mode", "format", "cache", "aio", "iops", "bps", "serial", "id")
    source, given = _pairs(text, "disk", ("iothread", "nodiscard"), keys)
    size = values.parse_size(given["size"]) if "size" in given else 0
    if source == "new" and not size:
        raise UsageError(f"disk {text!r} has no size", "--disk new,size=10G")
    _one_of("bus", given, ("virtio", "scsi", "nvme", "sata"))
    _one_of("mode", given, ("overlay", "direct", "readonly"))
    _one_of("cache", given, ("writeback", "none", "writethrough", "directsync", "unsafe"))
    _one_of("aio", given, ("threads", "native", "io_uring"))
    return Disk(
        source="" if source == "new" else os.path.abspath(os.path.expanduser(source)),
        id=given.get("id", ""),
        format=given.get("format", ""),
        size=size,
        bus=given.get("bus", "virtio"),
        mode=given.get("mode", "overlay"),
        cache=given.get("cache", ""),
        aio=given.get("aio", ""),
        discard="nodiscard" not in given,
        iothread="iothread" in given,
        iops=_number("iops", given),
        bps=values.parse_size(given["bps"]) if "bps" in given else 0,
        serial=given.get("serial", ""),
    )


def parse_cdrom(text: str) -> Disk:
    """A value of --cdrom: the path of an ISO image, or `empty`."""
    source = "" if text == "empty" else os.path.abspath(os.path.expanduser(text))
    return Disk(source=source, device="cdrom", format="raw", mode="readonly")


def parse_nic(text: str) -> Nic:
    """A value of --nic: the network, and settings."""
    network, given = _pairs(text, "network card", ("down",), ("mac", "model", "queues", "id"))
    mac = given.get("mac", "").lower()
    if mac and not values.is_mac(mac):
        raise UsageError(f"{mac!r} is no hardware address of one card", "six bytes, such as 52:54:00:12:34:56")
    return Nic(
        network=network,
        id=given.get("id", ""),
        mac=mac,
        model=given.get("model", "virtio"),
        queues=_number("queues", given),
        link="down" not in given,
    )


def _one_of(key: str, given: dict[str, str], allowed: tuple[str, ...]) -> None:
    if key in given and given[key] not in allowed:
        raise UsageError(f"{key}={given[key]} is not known", f"{key}=" + "|".join(allowed))


def _number(key: str, given: dict[str, str]) -> int:
    text = given.get(key, "0")
    if not text.isdigit():
        raise UsageError(f"{key}={text} is not a number", f"{key}=4")
    return int(text)


def _many(*names: str, metavar: str, help: str, parse: Callable[[str], Any]) -> Any:
    return click.option(*names, multiple=True, metavar=metavar, help=help, type=Parsed(metavar.lower(), parse))


OPTIONS = [
    click.option("--vm", "kind", flag_value="vm", default=None, help="Make a virtual machine, whatever the image."),
    click.option("--container", "kind", flag_value="container", help="Make a container, whatever the image."),
    _many("--disk", metavar="SOURCE[,KEY=VALUE]", help=f"VM: a further disk: {_DISK_WORDS}.", parse=parse_disk),
    click.option("--root-size", type=_SIZE, default=0, help="VM: make the first disk larger than its image."),
    _many("--cdrom", metavar="ISO", help="VM: a CD-ROM drive with this image, or empty.", parse=parse_cdrom),
    _many("--nic", metavar="NETWORK[,KEY=VALUE]", help=f"VM: a network card: {_NIC_WORDS}.", parse=parse_nic),
    _many("-p", "--publish", metavar="[ADDR:]PORT:GUEST[/udp]", help="VM: a port of the host that leads to the guest.",
          parse=values.parse_publish),
    click.option("--kernel", default="", metavar="FILE", help="VM: start this kernel directly."),
    click.option("--initrd", default="", metavar="FILE", help="VM: its initramfs."),
    click.option("--cmdline", default="", metavar="TEXT", help="VM: its command line."),
    click.option("--firmware", type=click.Choice(["bios", "uefi"]), default=None, help="VM: chosen by the image."),
    click.option("--accel", type=click.Choice(["kvm", "tcg"]), default=None, help="VM: kvm where it can be."),
    click.option("--machine", default="", metavar="TYPE", help="VM: a machine type of QEMU."),
    click.option("--cpu", default="", metavar="MODEL", help="VM: a processor model of QEMU, with its flags."),
    click.option("--topology", default="", metavar="LIST", help="VM: such as sockets=1,cores=4,threads=1."),
    click.option("--max-cpus", type=int, default=0, help="VM: as far as processors can be added."),
    click.option("--max-memory", type=_SIZE, default=0, help="VM: as far as memory can be added."),
    click.option("--hugepages", is_flag=True, help="VM: take its memory from the host's huge pages."),
    click.option("--numa", type=int, default=0, metavar="NODES", help="VM: NUMA nodes it sees."),
    click.option("--hostdev", multiple=True, metavar="ADDRESS", help="VM: a PCI device of the host, 0000:01:10.0."),
    click.option("--user-data", type=click.Path(exists=True, dir_okay=False), help="VM: cloud-init's user data."),
    click.option("--network-config", type=click.Path(exists=True, dir_okay=False), help="VM: cloud-init's network."),
    click.option("--ssh-key", multiple=True, metavar="FILE|KEY", help="VM: a public key for cloud-init."),
    click.option("--cloud-init", is_flag=True, help="VM: give it a seed although nothing is set for it."),
    click.option("--watchdog", type=click.Choice(_WATCHDOG), default=None, help="VM: what its watchdog does."),
    click.option("--on-panic", type=click.Choice(["exit-failure", "shutdown", "pause", "none"]), default=None,
                 help="VM: what a crash of its kernel does."),
    click.option("--graphics", is_flag=True, help="VM: a screen, for `ovt console --vnc` and `ovt screenshot`."),
    click.option("--no-vsock", is_flag=True, help="VM: no socket to the host."),
    click.option("--no-balloon", is_flag=True, help="VM: no memory balloon."),
]  # fmt: skip


def kind_of(given: dict[str, Any]) -> Kind | None:
    """What --vm, --container or an option of machines alone say; None when the image decides."""
    machine = machine_of(given)
    if given["kind"] == "container":
        if machine != Machine():
            raise UsageError("--container with options of a virtual machine", "leave them out, or use --vm")
        return Kind.CONTAINER
    return Kind.VM if given["kind"] == "vm" or machine != Machine() else None


def machine_of(given: dict[str, Any]) -> Machine:
    """The Machine that the options ask for."""
    nics = tuple(given["nic"])
    if given["publish"]:
        nics = nics or (Nic(),)
        users = [n for n, nic in enumerate(nics) if nic.network == "user"]
        if not users:
            raise UsageError("--publish needs a card on the user network", "--nic user")
        nics = tuple(
            nic._replace(forwards=tuple(given["publish"])) if number == users[0] else nic
            for number, nic in enumerate(nics)
        )
    return Machine(
        accel=given["accel"] or "",
        type=given["machine"],
        cpu=given["cpu"],
        topology=given["topology"],
        max_vcpus=given["max_cpus"],
        max_memory=given["max_memory"],
        hugepages=given["hugepages"],
        numa=given["numa"],
        firmware=given["firmware"] or "",
        kernel=given["kernel"],
        initrd=given["initrd"],
        cmdline=given["cmdline"],
        disks=(*given["disk"], *given["cdrom"]),
        nics=nics,
        hostdevs=tuple(given["hostdev"]),
        seed=_seed(given),
        watchdog=given["watchdog"] or "",
        panic=given["on_panic"] or "",
        vsock=not given["no_vsock"],
        graphics="vnc" if given["graphics"] else "",
        balloon=not given["no_balloon"],
        root_size=given["root_size"],
    )


def _seed(given: dict[str, Any]) -> Seed | None:
    if not (given["user_data"] or given["network_config"] or given["ssh_key"] or given["cloud_init"]):
        return None
    keys = [key if key.startswith(("ssh-", "ecdsa-", "sk-")) else _text(key).strip() for key in given["ssh_key"]]
    return Seed(
        user_data=_text(given["user_data"]) if given["user_data"] else "",
        network_config=_text(given["network_config"]) if given["network_config"] else "",
        ssh_keys=tuple(keys),
    )


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", "a file, or a key that begins with ssh-") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text in UTF-8") from None
