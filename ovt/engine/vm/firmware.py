"""What a machine starts from before its disk: QEMU's own BIOS, or the distribution's UEFI with variables of its own.

Which of the two an image wants is read from its first sectors. UEFI is found by the descriptions that distributions
ship for it (QEMU's docs/interop/firmware.json). Its code is shared and read-only; its variables are a qcow2 file in
the machine's home, so that snapshots can take them along. QEMU gets both as descriptors. Secure boot is not offered:
only firmware without it is taken.
"""

from __future__ import annotations

import fnmatch
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ovt.errors import HostError, NotFound, refused
from ovt.image import disk

NVRAM = "nvram.qcow2"
CODE_NODE, VARS_NODE = "firmware-code", "firmware-vars"
CODE_SET, VARS_SET = 1001, 1002  # fdsets

# Later ones replace descriptions of the same file name in earlier ones.
DESCRIPTIONS = ("/usr/share/qemu/firmware", "/etc/qemu/firmware")
# Where distributions that describe nothing keep code and template of the variables
_PLACES = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)
_UNWANTED = {"enrolled-keys", "requires-smm", "secure-boot"}

_SECTOR = 512
_CD_SECTOR = 2048
_HEAD = 1 << 20  # bytes of an image that is not raw which are looked at
_QEMU_IMG = "apt-get install qemu-utils"
_SECONDS = 60.0  # qemu-img may take for them
_ESP = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")  # C12A7328-F81F-11D2-BA4B-00A0C93EC93B
_BIOS_BOOT = b"Hah!IdontNeedEFI"  # 21686148-6449-6E6F-744E-656564454649
_LEGACY_BOOTABLE = 1 << 2  # attribute of a partition (UEFI 5.3.3)
_MBR_ESP, _MBR_ACTIVE = 0xEF, 0x80

Read = Callable[[int, int], bytes]  # offset, length → at most that many bytes


class Firmware(NamedTuple):
    """A UEFI of this host."""

    code: str
    code_format: str
    template: str  # of the variables
    template_format: str


# Which one an image wants -----------------------------------------------------------------------------------------


def choose(path: str, format: str = "") -> str:
    """`bios` or `uefi`: what the image at `path` starts from; `bios` where both would do or neither is certain.

    An empty `format` is read from the header. NotFound and OvtError as `ovt.image.disk.chain`; HostError when the
    image cannot be read.
    """
    images = [(os.path.abspath(path), "raw")] if format == "raw" else disk.chain(path, allow_backing=True)
    if format and format != images[-1][1]:
        images[-1] = (images[-1][0], format)
    if images[-1][1] != "raw":
        head = _head(images)
        return choose_by(lambda offset, length: head[offset : offset + length])
    try:
        fd = os.open(images[-1][0], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no disk image {path}") from None
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    try:
        return choose_by(lambda offset, length: os.pread(fd, length, offset))
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    finally:
        os.close(fd)


def choose_by(read: Read) -> str:
    """The same of what `read` reads: a disk with a GPT or an MBR, or a CD-ROM (El Torito)."""
    first, header = read(0, _SECTOR), read(_SECTOR, 92)
    if read(16 * _CD_SECTOR, 6)[1:] == b"CD001":  # some have partitions too, to be written to USB sticks
        return _by_el_torito(read)
    if header.startswith(b"EFI PART"):
        return _by_gpt(read, header)
    if first[510:512] == b"\x55\xaa" and any(first[446:510]):
        partitions = [first[at : at + 16] for at in range(446, 510, 16)]
        has_esp = any(partition[4] == _MBR_ESP for partition in partitions)
        legacy = any(first[:440]) or any(partition[0] == _MBR_ACTIVE for partition in partitions)
        return "uefi" if has_esp and not legacy else "bios"
    return "bios"


def _by_gpt(read: Read, header: bytes) -> str:
    """The boot code of a protective MBR says nothing: every Windows writes it. Partitions for BIOS do."""
    table, count, size = struct.unpack_from("<QII", header, 72)
    if not 128 <= size <= 4096 or count > 1024:
        return "bios"
    entries = read(table * _SECTOR, count * size)
    found = "bios"
    for at in range(0, len(entries) - 127, size):
        kind = entries[at : at + 16]
        (attributes,) = struct.unpack_from("<Q", entries, at + 48)
        if kind == _BIOS_BOOT or (any(kind) and attributes & _LEGACY_BOOTABLE):
            return "bios"
        if kind == _ESP:
            found = "uefi"
    return found


def _by_el_torito(read: Read) -> str:
    """The first section's platform, and those of the sections that follow (El Torito 1.0, figures 2 to 5)."""
    for number in range(17, 32):
        descriptor = read(number * _CD_SECTOR, _CD_SECTOR)
        if len(descriptor) < _CD_SECTOR or descriptor[0] == 255:
            return "bios"
        if descriptor[0] == 0 and descriptor[7:30] == b"EL TORITO SPECIFICATION":
            break
    else:
        return "bios"
    (catalog_at,) = struct.unpack_from("<I", descriptor, 0x47)
    catalog = read(catalog_at * _CD_SECTOR, _CD_SECTOR)
    entries = [catalog[at : at + 32] for at in range(0, len(catalog) - 31, 32)]
    if len(entries) < 2 or entries[0][0] != 1:
        return "bios"
    platforms = {entries[0][1]} if entries[1][0] == 0x88 else set()
    at = 2
    while at < len(entries) and entries[at][0] in (0x90, 0x91):
        more = struct.unpack_from("<H", entries[at], 2)[0]
        if any(entry[0] == 0x88 for entry in entries[at + 1 : at + 1 + more]):
            platforms.add(entries[at][1])
        at += 1 + more
    return "uefi" if 0xEF in platforms and 0 not in platforms else "bios"


def _head(images: Sequence[tuple[str, str]]) -> bytes:
    """The beginning of the disk in a chain of images, as qemu-img reads it, and of nothing that their headers name."""
    with tempfile.TemporaryDirectory(prefix="ovt-") as place:
        source = f"if=json:{json.dumps(disk.node(images))}"
        words = ["qemu-img", "dd", "-U", "-O", "raw", f"bs={_HEAD}", "count=1", source, f"of={place}/head"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_SECONDS)
        except FileNotFoundError:
            raise HostError(
                "disk images need qemu-img, and this host has none", hint="apt-get install qemu-utils"
            ) from None
        except subprocess.TimeoutExpired:
            raise HostError(f"qemu-img has not read {images[-1][0]} in {_SECONDS:.0f} s") from None
        if done.returncode:
            why = (done.stderr.strip() or f"it ended with status {done.returncode}").splitlines()[-1]
            raise HostError(f"qemu-img cannot read {images[-1][0]}: {why.removeprefix('qemu-img: ')}")
        with open(f"{place}/head", "rb") as file:
            return file.read(_HEAD)


# Which UEFI this host has -----------------------------------------------------------------------------------------


def find(
    machine: str, descriptions: Sequence[str] = DESCRIPTIONS, places: Sequence[tuple[str, str]] = _PLACES
) -> Firmware:
    """The UEFI for a machine type such as `pc-q35-10.0` or `q35`. HostError where there is none."""
    machine = machine if machine.startswith("pc-") else f"pc-{machine}-"
    files: dict[str, str] = {}
    for directory in descriptions:
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            continue
        files.update((name, f"{directory}/{name}") for name in names if name.endswith(".json"))
    for name in sorted(files):
        found = _described(files[name], machine)
        if found and os.path.isfile(found.code) and os.path.isfile(found.template):
            return found
    for code, template in places:
        if os.path.isfile(code) and os.path.isfile(template):
            return Firmware(code, "raw", template, "raw")
    raise HostError("this host has no UEFI for virtual machines", hint="apt-get install ovmf, or --firmware bios")


def _described(path: str, machine: str) -> Firmware | None:
    """What a description offers for this machine without secure boot; None for nothing, and for an empty file, which
    is how an administrator hides one. HostError for a description that is none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if not text.strip():
            return None
        data = json.loads(text)
        mapping = data["mapping"]
        fits = any(
            target["architecture"] == "x86_64" and any(fnmatch.fnmatch(machine, name) for name in target["machines"])
            for target in data["targets"]
        )
        if "uefi" not in data["interface-types"] or not fits or _UNWANTED & set(data["features"]):
            return None
        if mapping["device"] != "flash" or mapping.get("mode", "split") != "split":
            return None
        code, template = mapping["executable"], mapping["nvram-template"]
        return Firmware(code["filename"], code["format"], template["filename"], template["format"])
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostError(
            f"{path} is no description of a firmware: {error!r}", hint="hide it by an empty file in /etc/qemu/firmware"
        ) from None


# A machine's own --------------------------------------------------------------------------------------------------


def prepare(firmware: Firmware, home: str) -> dict[str, str]:
    """Make the variables in `home` if there are none; what is to be kept as `Hardware.uefi`."""
    if not os.path.exists(f"{home}/{NVRAM}"):
        disk.convert(firmware.template, firmware.template_format, f"{home}/{NVRAM}", "qcow2")
    return record(firmware)


def record(firmware: Firmware) -> dict[str, str]:
    """The same without making anything, for a plan."""
    return {"code": firmware.code, "code_format": firmware.code_format}


def open_files(uefi: Mapping[str, str], home: str) -> tuple[int, int]:
    """Descriptors of code and variables. NotFound when one of them has vanished, HostError when it cannot be opened."""
    fds: list[int] = []
    for path, flags in ((uefi["code"], os.O_RDONLY), (f"{home}/{NVRAM}", os.O_RDWR)):
        try:
            fds.append(os.open(path, flags | os.O_CLOEXEC))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, FileNotFoundError):
                raise NotFound(f"the machine's UEFI is gone: there is no {path}", "apt-get install ovmf") from None
            raise refused(f"cannot open {path}", error) from None
    return fds[0], fds[1]


def arguments(uefi: Mapping[str, str], code: int, variables: int) -> list[str]:
    """Words of QEMU's command line for the descriptors of `open_files`, as QEMU has them."""
    words = ["-add-fd", f"fd={code},set={CODE_SET}", "-add-fd", f"fd={variables},set={VARS_SET}"]
    for node in blockdevs(uefi):
        words += ["-blockdev", json.dumps(node)]
    return words


def machine_options() -> list[str]:
    """What belongs to -machine then."""
    return [f"pflash0={CODE_NODE}", f"pflash1={VARS_NODE}"]


def blockdevs(uefi: Mapping[str, str]) -> list[dict[str, Any]]:
    """The block nodes of code and variables, whose descriptors are in CODE_SET and VARS_SET."""
    code: dict[str, Any] = {
        "driver": uefi["code_format"],
        "node-name": CODE_NODE,
        "read-only": True,
        "file": {"driver": "file", "filename": f"/dev/fdset/{CODE_SET}", "read-only": True},
    }
    if uefi["code_format"] == "qcow2":
        code["backing"] = None
    variables = {
        "driver": "qcow2",
        "node-name": VARS_NODE,
        "backing": None,
        "file": {"driver": "file", "filename": f"/dev/fdset/{VARS_SET}"},
    }
    return [code, variables]
