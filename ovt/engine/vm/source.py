"""What a machine boots from, found from what a person wrote: disk image, installer, kernel, or the built-in image."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ovt.engine.vm import nics
from ovt.engine.vm.hardware import Hardware
from ovt.errors import NotFound, UsageError
from ovt.image import BUSYBOX
from ovt.model import Disk, Instance, Machine, Nic, Spec

NOTHING = "none"  # an image that is not there: the machine boots what its options name
BUILTIN_MEMORY = 256 << 20


def resolve(spec: Spec, cache: str, report: Callable[[str], None]) -> tuple[Spec, dict[str, Any]]:
    """The spec with everything filled in that the image decides, and what the engine keeps of it.

    NotFound for a file that is not there, UsageError for one that no machine boots.
    """
    machine = spec.machine
    found: dict[str, Any] = {}
    if spec.image == BUSYBOX:
        from ovt.image import vmimage

        built = vmimage.build(cache, report)
        machine = machine._replace(
            kernel=machine.kernel or built.kernel,
            initrd=machine.initrd or built.initrd,
            cmdline=" ".join(filter(None, (built.cmdline, machine.cmdline))),
            firmware=machine.firmware or "none",
        )
        if not spec.limits.memory:
            spec = spec._replace(limits=spec.limits._replace(memory=BUILTIN_MEMORY))
        command = (*(spec.entrypoint or ()), *spec.command) or ("sh",)
        spec = spec._replace(command=command, entrypoint=None)
        found["builtin"] = True
    else:
        if spec.command or spec.entrypoint:
            raise UsageError(
                "a machine runs what is installed on its disk, not a command", f"ovt exec NAME {' '.join(spec.command)}"
            )
        if spec.image != NOTHING:
            spec, machine = _disk(spec, machine)
    for name in ("kernel", "initrd"):
        path = getattr(machine, name)
        if path:
            path = os.path.abspath(path)
            if not os.path.isfile(path):
                raise NotFound(f"there is no {name} {path}", f"give the path of a file with --{name}")
            machine = machine._replace(**{name: path})
    if machine.initrd and not machine.kernel:
        raise UsageError("--initrd without --kernel", "give both")
    found["firmware"] = machine.firmware or _firmware(machine)
    machine = machine._replace(disks=_named(machine.disks), nics=_cards(spec, machine))
    if not machine.disks and not machine.kernel:
        raise UsageError("the machine has nothing to boot from", "give a disk image, or --kernel")
    return spec._replace(machine=machine), found


def _disk(spec: Spec, machine: Machine) -> tuple[Spec, Machine]:
    path = os.path.abspath(os.path.expanduser(spec.image))
    if os.path.isdir(path):
        raise UsageError(f"{spec.image} is a directory", "leave out --vm to run it as a container")
    if not os.path.exists(path):
        raise NotFound(f"there is no image {spec.image!r}", "a disk image, an installer's ISO, busybox, or none")
    from ovt.image import disk

    image = disk.probe(path, allow_backing=True)
    mode = "direct" if spec.rootfs_in_place else "overlay"
    if image.iso:
        first = Disk(path, device="cdrom", format="raw", mode="readonly")
    else:
        first = Disk(path, format=image.format, mode=mode)
    return spec._replace(image=path), machine._replace(disks=(first, *machine.disks))


def _named(disks: tuple[Disk, ...]) -> tuple[Disk, ...]:
    """The disks with an id each."""
    result: list[Disk] = []
    taken = {disk.id for disk in disks}
    for disk in disks:
        if not disk.id:
            if disk.device == "disk" and "root" not in taken and not any(d.device == "disk" for d in result):
                id = "root"
            else:
                prefix = "cdrom" if disk.device == "cdrom" else "disk"
                id = next(f"{prefix}{n}" for n in range(1, len(disks) + 2) if f"{prefix}{n}" not in taken)
            disk = disk._replace(id=id)
            taken.add(id)
        result.append(disk)
    ids = [disk.id for disk in result]
    for id in ids:
        if ids.count(id) > 1:
            raise UsageError(f"two disks have the id {id!r}", "give each its own")
    return tuple(result)


def _cards(spec: Spec, machine: Machine) -> tuple[Nic, ...]:
    """The network cards: those asked for, or one on the network that the instance is to have."""
    cards = machine.nics
    if not cards and spec.network != "none":
        cards = (Nic(network=spec.network),)
    return tuple(
        nic._replace(id=nic.id or f"nic{number}", mac=nic.mac or nics.new_mac()) for number, nic in enumerate(cards)
    )


def _firmware(machine: Machine) -> str:
    if machine.kernel:
        return "none"
    from ovt.engine.vm import firmware

    first = next((disk for disk in machine.disks if disk.source), None)
    return firmware.choose(first.source, first.format) if first else "bios"


def main_archive(instance: Instance, hardware: Hardware) -> bytes:
    """What the built-in image is told beside its initrd: the program to run. Nothing for another guest."""
    if not instance.rootfs.get("builtin"):
        return b""
    from ovt.image import vmimage

    spec = instance.spec
    shares = [f"{share['id']}:{share['target']}:{share['options']}" for share in hardware.shares]
    return vmimage.main_archive(
        spec.command,  # none in the guest of which a template is made
        env=spec.env,
        cwd=spec.workdir,
        user=spec.user,
        hostname=spec.hostname or instance.name,
        tty=spec.tty,
        shares=shares,
        poweroff=True,
    )
