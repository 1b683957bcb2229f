"""What of a machine has to move to another host: decided from its hardware and from what the other host has already.

Pure: records and rules. Files that both hosts see stay where they are; what only this host has is copied, small files
over the control connection, disks by QEMU while the guest runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from ovt.engine.vm.firmware import NVRAM
from ovt.engine.vm.migration import Settings
from ovt.model import Instance, pack

SEED = "seed.iso"
_BOOT = ("kernel", "initrd")


class Blocker(NamedTuple):
    """Why a machine cannot move: on what, why, and what would help."""

    what: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class Image(NamedTuple):
    """A qcow2 image that is made empty on the other host: path below the machine's home, bytes that its disk has."""

    path: str
    size: int
    disk: str = ""  # the device whose content QEMU copies into it; empty: the machine's own state fills it


class File(NamedTuple):
    """A file that is sent as it is: path below the machine's home there, bytes, and its path here."""

    path: str
    size: int
    source: str = ""


class Plan(NamedTuple):
    """Everything the receiving host needs to make the machine."""

    instance: Instance
    hardware: dict[str, Any]
    settings: Settings
    images: tuple[Image, ...] = ()
    files: tuple[File, ...] = ()
    flags: tuple[str, ...] = ()  # of this host's processor, where the guest's is `host`
    new_id: bool = False

    def pack(self) -> dict[str, Any]:
        """The JSON object; paths of this host stay here."""
        return {
            "instance": pack(self.instance),
            "hardware": self.hardware,
            "settings": self.settings._asdict(),
            "images": [image._asdict() for image in self.images],
            "files": [{"path": file.path, "size": file.size} for file in self.files],
            "flags": list(self.flags),
            "new_id": self.new_id,
        }

    @classmethod
    def unpack(cls, data: Mapping[str, Any]) -> Self:
        """From the JSON object; TypeError, KeyError or ValueError when it is none."""
        plan = cls(
            Instance.unpack(data["instance"]),
            dict(data["hardware"]),
            Settings(**data["settings"]),
            tuple(Image(**image) for image in data["images"]),
            tuple(File(**file) for file in data["files"]),
            tuple(data["flags"]),
            bool(data["new_id"]),
        )
        named = [(image.path, image.size) for image in plan.images] + [(file.path, file.size) for file in plan.files]
        for path, size in named:
            if os.path.isabs(path) or os.path.normpath(path) != path or path.startswith("..") or size < 0:
                raise ValueError(f"{path!r} is no path below a machine's directory")
        return plan


def paths(hardware: Mapping[str, Any]) -> dict[str, bool]:
    """Every file outside the machine's own directory that it uses, with whether it is written to."""
    found = {str(hardware[name]): False for name in _BOOT if hardware.get(name)}
    if hardware.get("uefi"):
        found[hardware["uefi"]["code"]] = False
    for disk in hardware["disks"]:
        for number, layer in enumerate(disk.get("chain") or []):
            if os.path.isabs(layer["path"]):
                top = number == len(disk["chain"]) - 1 and not read_only(disk)
                found[layer["path"]] = found.get(layer["path"], False) or top
    return found


def read_only(disk: Mapping[str, Any]) -> bool:
    """Whether the guest cannot write to it."""
    return bool(disk.get("readonly")) or disk.get("device") == "cdrom"


def arrange(
    instance: Instance,
    home: str,
    hardware: Mapping[str, Any],
    there: Mapping[str, str],
    sizes: Mapping[str, int],
    settings: Settings,
    with_disks: bool,
    trust: bool = False,
) -> tuple[Plan, list[Blocker]]:
    """The plan, and what stands against it on the side of the files.

    `there` says for every path what the other host has (survey.compare), `sizes` the bytes of every disk by device
    id and of the UEFI variables under the name of their file. `trust`: files that are there count as the same.
    """
    hardware = {**hardware, "disks": [dict(disk) for disk in hardware["disks"]]}
    images: list[Image] = []
    files: list[File] = []
    blockers: list[Blocker] = []

    def usable(path: str, written: bool) -> bool:
        answer = there.get(path, "missing")
        return answer == "same" or (answer == "equal" and not written) or (trust and answer != "missing")

    for disk in hardware["disks"]:
        chain = disk.get("chain") or []
        fixed = read_only(disk)
        if all(os.path.isabs(layer["path"]) for layer in chain) and all(
            usable(layer["path"], not fixed and layer is chain[-1]) for layer in chain
        ):
            continue
        if fixed and len(chain) == 1 and not os.path.isabs(chain[0]["path"]):
            own = f"{home}/{chain[0]['path']}"
            files.append(File(chain[0]["path"], os.stat(own).st_size, own))
        elif fixed:
            missing = [layer["path"] for layer in chain if not usable(layer["path"], False)]
            words = ", ".join(f"{path} is {_said(there.get(path, 'missing'))} there" for path in missing)
            blockers.append(Blocker(f"disk {disk['id']}", words, "copy the file, or eject or detach the disk"))
        elif with_disks:
            path = f"disks/{disk['id']}.qcow2"
            images.append(Image(path, sizes[disk["id"]], disk["id"]))
            disk["chain"] = [{"path": path, "format": "qcow2"}]
        else:
            blockers.append(Blocker(f"disk {disk['id']}", _why(chain, there), "--with-disks copies it"))
    for name in _BOOT:
        path = str(hardware.get(name) or "")
        if path and not usable(path, False):
            files.append(File(name, os.stat(path).st_size, path))
            hardware[name] = name  # made absolute there
    if hardware.get("uefi"):
        images.append(Image(NVRAM, sizes[NVRAM]))
        code = hardware["uefi"]["code"]
        if not usable(code, False):
            words = f"{code} is {_said(there.get(code, 'missing'))} there"
            blockers.append(Blocker("firmware", words, "the same version of UEFI (ovmf) on both hosts"))
    if os.path.exists(f"{home}/{SEED}") and SEED not in {file.path for file in files}:
        files.append(File(SEED, os.stat(f"{home}/{SEED}").st_size, f"{home}/{SEED}"))
    settings = settings._replace(disks=any(image.disk for image in images))
    return Plan(instance, hardware, settings, tuple(images), tuple(files)), blockers


def _why(chain: list[dict[str, Any]], there: Mapping[str, str]) -> str:
    for layer in chain:
        if not os.path.isabs(layer["path"]):
            return "it lies in this host's own directory of the machine"
    words = [f"{layer['path']} is {_said(there.get(layer['path'], 'missing'))} there" for layer in chain]
    return ", ".join(words)


def _said(answer: str) -> str:
    return {
        "missing": "missing",
        "other": "another file",
        "equal": "only a copy",
        "unknown": "not known to be the same file",
        "same": "the same file",
    }.get(answer, answer)
