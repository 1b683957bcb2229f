"""BIOS or UEFI: which one an image wants, which UEFI the host has, and what QEMU is told of it."""

import json
import os
import struct
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import firmware
from ovt.engine.vm.features import find_program
from ovt.engine.vm.firmware import Firmware
from ovt.errors import HostError, NotFound
from ovt.image import disk

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
BOOT_CODE = b"\xeb\x63\x90"


def mbr(*partitions: tuple[int, int], code: bytes = b"") -> bytes:
    """A boot sector; a partition is (active, type)."""
    entries = b"".join(struct.pack("<B3xB3xII", active, kind, 2048, 2048) for active, kind in partitions)
    return code.ljust(446, b"\0") + entries.ljust(64, b"\0") + b"\x55\xaa"


def gpt(*partitions: tuple[str, int], code: bytes = b"") -> bytes:
    """The beginning of a disk; a partition is (type, attributes)."""
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QIII", 2, 128, 128, 0)
    entries = b"".join(
        (uuid.UUID(kind).bytes_le + bytes(16) + struct.pack("<QQQ", 2048, 4095, attributes)).ljust(128, b"\0")
        for kind, attributes in partitions
    )
    return mbr((0, 0xEE), code=code) + header.ljust(512, b"\0") + entries.ljust(128 * 128, b"\0")


def cd(*sections: tuple[int, int], hybrid: bytes = b"") -> bytes:
    """A CD-ROM with a boot catalog; a section is (platform, boot indicator), the first one the default entry."""
    boot = b"\0CD001\1EL TORITO SPECIFICATION".ljust(0x47, b"\0") + struct.pack("<I", 900)
    catalog = bytes((1, sections[0][0])).ljust(30, b"\0") + b"\x55\xaa" + bytes((sections[0][1],)).ljust(32, b"\0")
    for number, (platform, indicator) in enumerate(sections[1:], 2):
        last = number == len(sections)
        catalog += struct.pack("<BBH28x", 0x91 if last else 0x90, platform, 1) + bytes((indicator,)).ljust(32, b"\0")
    head = hybrid.ljust(16 * 2048, b"\0") + b"\1CD001".ljust(2048, b"\0") + boot.ljust(2048, b"\0")
    head += b"\xffCD001".ljust(2048, b"\0")
    return head.ljust(900 * 2048, b"\0") + catalog.ljust(2048, b"\0")


MAD = gpt((ESP, 0)).replace(struct.pack("<II", 128, 128), struct.pack("<II", 1 << 31, 1))  # entries of one byte
IMAGES = {
    "nothing": (b"", "bios"),
    "empty": (bytes(1 << 20), "bios"),
    "boot code": (mbr((0x80, 0x83), code=BOOT_CODE), "bios"),
    "an active partition": (mbr((0x80, 0xEF)), "bios"),
    "an ESP in an MBR": (mbr((0, 0xEF), (0, 0x83)), "uefi"),
    "an ESP in an MBR with boot code": (mbr((0, 0xEF), code=BOOT_CODE), "bios"),
    "a file system without partitions": (b"\xeb\x3c\x90MSDOS5.0".ljust(510, b"\0") + b"\x55\xaa", "bios"),
    "GPT with an ESP": (gpt((LINUX, 0), (ESP, 0)), "uefi"),
    "Windows": (gpt((ESP, 0), code=b"\x33\xc0\x8e\xd0"), "uefi"),
    "Debian's cloud image": (gpt((LINUX, 0), (BIOS_BOOT, 0), (ESP, 0), code=BOOT_CODE), "bios"),
    "syslinux on GPT": (gpt((ESP, 4), code=BOOT_CODE), "bios"),
    "GPT with data": (gpt((LINUX, 0)), "bios"),
    "GPT with a mad table": (MAD, "bios"),
    "CD for BIOS": (cd((0, 0x88)), "bios"),
    "CD for UEFI": (cd((0xEF, 0x88)), "uefi"),
    "CD for both": (cd((0, 0x88), (0xEF, 0x88)), "bios"),
    "CD for both, UEFI first": (cd((0xEF, 0x88), (0, 0x88)), "bios"),
    "CD whose BIOS entry does not boot": (cd((0, 0), (0xEF, 0x88)), "uefi"),
    "CD for UEFI with partitions": (cd((0xEF, 0x88), hybrid=gpt((LINUX, 0))), "uefi"),
    "CD with data": (b"\0" * 32768 + b"\1CD001".ljust(2048, b"\0") + b"\xffCD001".ljust(2048, b"\0"), "bios"),
    "CD that ends early": (cd((0xEF, 0x88))[: 18 * 2048], "bios"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_by_image(tmp_path: Path, name: str) -> None:
    content, expected = IMAGES[name]
    path = tmp_path / "disk.img"
    path.write_bytes(content)
    assert firmware.choose(str(path), "raw") == expected


@pytest.mark.qemu
@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vpc", "vdi"])
def test_in_every_format(tmp_path: Path, format: str) -> None:
    raw, path = tmp_path / "disk.img", tmp_path / "disk"
    raw.write_bytes(gpt((ESP, 0)).ljust(2 << 20, b"\0"))
    disk.convert(str(raw), "raw", str(path), format)
    assert firmware.choose(str(path), format) == "uefi"
    assert firmware.choose(str(path)) == "uefi"


@pytest.mark.qemu
def test_an_overlay_starts_as_what_is_below_it(tmp_path: Path) -> None:
    raw, overlay = tmp_path / "disk.img", tmp_path / "overlay"
    raw.write_bytes(gpt((ESP, 0)).ljust(2 << 20, b"\0"))
    disk.create_overlay(str(overlay), str(raw), "raw")
    assert firmware.choose(str(overlay)) == "uefi"


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        firmware.choose(str(tmp_path / "no"), "raw")


@pytest.mark.qemu
def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    disk.create(str(path), 1 << 30)
    content = bytearray(path.read_bytes())
    struct.pack_into(">Q", content, 40, 0x10001)  # the L1 table's offset is no multiple of a cluster
    path.write_bytes(content)
    with (
        pytest.raises((HostError, firmware.disk_error)) if hasattr(firmware, "disk_error") else pytest.raises(Exception)
    ):
        firmware.choose(str(path), "qcow2")


def describe(directory: Path, name: str, code: Path, **changes: Any) -> None:
    """Write a description and the files that it names."""
    template = code.with_suffix(".vars")
    for path in (code, template):
        path.write_bytes(bytes(65536))
    data = {
        "description": "",
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": str(template), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3", "verbose-dynamic"],
        "tags": [],
    }
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps({**data, **changes}))


def found(tmp_path: Path, machine: str = "pc-q35-10.0") -> str:
    directories = (str(tmp_path / "usr"), str(tmp_path / "etc"))
    return Path(firmware.find(machine, directories, ()).code).name


def test_the_first_description_that_fits_is_taken(tmp_path: Path) -> None:
    usr = tmp_path / "usr"
    describe(usr, "10-ms.json", tmp_path / "ms", features=["enrolled-keys", "requires-smm", "secure-boot"])
    describe(usr, "20-secure.json", tmp_path / "secure", features=["requires-smm", "secure-boot"])
    describe(usr, "30-arm.json", tmp_path / "arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    describe(usr, "40-bios.json", tmp_path / "bios", **{"interface-types": ["bios"]})
    describe(usr, "45-memory.json", tmp_path / "memory", mapping={"device": "memory", "filename": "/x"})
    describe(usr, "50-gone.json", tmp_path / "gone")
    (tmp_path / "gone").unlink()
    describe(usr, "60-plain.json", tmp_path / "plain")
    describe(usr, "70-later.json", tmp_path / "later")
    (usr / "README").write_text("no description")
    assert found(tmp_path) == "plain"
    assert found(tmp_path, "q35") == "plain"


def test_the_administrators_descriptions_replace_and_hide(tmp_path: Path) -> None:
    describe(tmp_path / "usr", "10.json", tmp_path / "first")
    describe(tmp_path / "usr", "20.json", tmp_path / "second")
    describe(tmp_path / "etc", "20.json", tmp_path / "own")
    (tmp_path / "etc/10.json").touch()
    assert found(tmp_path) == "own"


def test_a_broken_description_is_named_with_the_way_around_it(tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/10.json").write_text('{"mapping": []}')
    with pytest.raises(HostError, match=r"10\.json is no description of a firmware") as caught:
        found(tmp_path)
    assert "/etc/qemu/firmware" in caught.value.hint


def test_without_descriptions_the_known_places_are_tried(tmp_path: Path) -> None:
    code, template = tmp_path / "CODE", tmp_path / "VARS"
    places = [("/nonexistent/a", "/nonexistent/b"), (str(code), str(template))]
    code.touch()
    with pytest.raises(HostError, match="no UEFI") as caught:
        firmware.find("q35", (str(tmp_path / "no"),), places)
    assert "apt-get install ovmf" in caught.value.hint
    template.touch()
    assert firmware.find("q35", (), places) == Firmware(str(code), "raw", str(template), "raw")


@pytest.fixture
def uefi(tmp_path: Path) -> Firmware:
    """Files as a UEFI has them, with nothing of use inside."""
    (tmp_path / "code").write_bytes(b"\x90" * 65536)
    (tmp_path / "template").write_bytes(b"v" * 65536)
    return Firmware(str(tmp_path / "code"), "raw", str(tmp_path / "template"), "raw")


def test_words_of_the_command_line() -> None:
    code = '{"driver": "file", "filename": "/dev/fdset/1001", "read-only": true}'
    variables = '{"driver": "file", "filename": "/dev/fdset/1002"}'
    assert firmware.arguments({"code": "/x", "code_format": "raw"}, 7, 8) == [
        *("-add-fd", "fd=7,set=1001", "-add-fd", "fd=8,set=1002"),
        *("-blockdev", f'{{"driver": "raw", "node-name": "firmware-code", "read-only": true, "file": {code}}}'),
        *("-blockdev", f'{{"driver": "qcow2", "node-name": "firmware-vars", "backing": null, "file": {variables}}}'),
    ]
    assert firmware.blockdevs({"code": "/x", "code_format": "qcow2"})[0]["backing"] is None


@pytest.mark.qemu
def test_the_variables_are_made_once(tmp_path: Path, uefi: Firmware) -> None:
    kept = firmware.prepare(uefi, str(tmp_path))
    own = tmp_path / firmware.NVRAM
    image = disk.probe(str(own))
    assert (image.format, image.virtual_size) == ("qcow2", 65536)
    before = own.stat()
    assert firmware.prepare(uefi, str(tmp_path)) == kept == firmware.record(uefi)
    assert own.stat().st_ino == before.st_ino


@pytest.mark.qemu
def test_qemu_takes_code_and_variables_as_descriptors(tmp_path: Path, uefi: Firmware) -> None:
    kept = firmware.prepare(uefi, str(tmp_path))
    code, variables = firmware.open_files(kept, str(tmp_path))
    try:
        words = [find_program(), "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32", "-qmp", "stdio"]
        words += ["-machine", ",".join(["q35", *firmware.machine_options()])]
        words += firmware.arguments(kept, code, variables)
        said = '{"execute": "qmp_capabilities"}{"execute": "query-block"}{"execute": "quit"}'
        done = subprocess.run(
            words, input=said, capture_output=True, text=True, timeout=60, check=False, pass_fds=(code, variables)
        )
    finally:
        os.close(code)
        os.close(variables)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    (blocks,) = (answer["return"] for answer in answers if isinstance(answer.get("return"), list))
    flash = {block["inserted"]["node-name"]: block["inserted"]["ro"] for block in blocks if "inserted" in block}
    assert flash == {"firmware-code": True, "firmware-vars": False}


@pytest.mark.qemu
def test_a_uefi_that_has_gone(tmp_path: Path, uefi: Firmware) -> None:
    kept = firmware.prepare(uefi, str(tmp_path))
    os.unlink(uefi.code)
    with pytest.raises(NotFound, match=r"UEFI is gone: there is no .*code"):
        firmware.open_files(kept, str(tmp_path))
