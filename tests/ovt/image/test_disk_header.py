"""What headers say, against what qemu-img says of the same images, and headers that lie."""

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import NotFound, OvtError, UsageError
from ovt.image.disk_header import DiskImage, probe

MIB = 1 << 20
KINDS = {
    "raw": ["-f", "raw"],
    "qcow2": ["-f", "qcow2"],
    "qcow2 of old": ["-f", "qcow2", "-o", "compat=0.10,cluster_size=512"],
    "qcow2 with extended L2": ["-f", "qcow2", "-o", "extended_l2=on,cluster_size=2M"],
    "monolithicSparse": ["-f", "vmdk"],
    "monolithicFlat": ["-f", "vmdk", "-o", "subformat=monolithicFlat"],
    "twoGbMaxExtentSparse": ["-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"],
    "streamOptimized": ["-f", "vmdk", "-o", "subformat=streamOptimized"],
    "vhdx": ["-f", "vhdx"],
    "dynamic VHD": ["-f", "vpc"],
    "fixed VHD": ["-f", "vpc", "-o", "subformat=fixed"],
    "VHD by size": ["-f", "vpc", "-o", "force_size=on"],
    "vdi": ["-f", "vdi"],
    "static vdi": ["-f", "vdi", "-o", "static=on"],
}
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


def make(path: Path, *words: str, size: str = "10M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *words, str(path), size], check=True, capture_output=True)
    return path


def patch(path: Path, offset: int, layout: str, *values: int) -> Path:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(layout, *values))
    return path


@needs_qemu_img
@pytest.mark.parametrize("size", ["10M", "5000M"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_qemu_img_says(tmp_path: Path, kind: str, size: str) -> None:
    if "static" in kind or "fixed" in kind:
        size = "12M"
    path = make(tmp_path / "a", *KINDS[kind], size=size)
    found = probe(str(path))
    said = json.loads(subprocess.run(["qemu-img", "info", "--output=json", "-f", found.format, path], stdout=-1).stdout)
    assert found.format == KINDS[kind][1]
    assert found == DiskImage(str(path), found.format, said["virtual-size"], extents=found.extents)
    assert bool(found.extents) == (kind in ("monolithicFlat", "twoGbMaxExtentSparse"))
    assert probe(str(path), format=found.format) == found and probe(str(path), format="raw").format == "raw"


@needs_qemu_img
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("raw", "fixed VHD")])
def test_a_shortened_image_is_an_error_and_never_a_crash(tmp_path: Path, kind: str) -> None:
    whole = make(tmp_path / "a", *KINDS[kind]).read_bytes()
    path = tmp_path / "b"
    for length in (3, 70, 100, 600, 1100, 70_000, 200_000):
        if length >= len(whole) - 512:
            continue
        path.write_bytes(whole[:length])
        try:
            found = probe(str(path))
        except OvtError as error:
            assert str(path) in str(error) or str(tmp_path) in str(error)
        else:  # too little is left to know what it was, or all of the tables
            assert found.format == "raw" or kind in ("monolithicSparse", "vdi", "static vdi", "dynamic VHD"), length


@needs_qemu_img
@pytest.mark.parametrize(
    ("offset", "layout", "value", "words"),
    [
        (4, ">I", 9, "of version 9"),
        (8, ">Q", 1 << 40, "name of its backing file outside"),
        (20, ">I", 8, r"clusters of 2\^8"),
        (20, ">I", 40, r"clusters of 2\^40"),
        (24, ">Q", 1 << 63, "L1 table of"),
        (24, ">Q", 0, "has 0 bytes"),
        (24, ">Q", 1 << 40, "L1 table of 1 entries"),
        (32, ">I", 1, "is encrypted"),
        (36, ">I", 0xFFFFFFFF, "L1 table of 4294967295"),
        (40, ">Q", 1 << 50, "a table of it lies at"),
        (40, ">Q", 0x30001, "a table of it lies at"),
        (48, ">Q", 1 << 62, "a table of it lies at"),
        (56, ">I", 1 << 31, "a table of it lies at"),
        (60, ">IQ", 1, "a table of it lies at"),
        (72, ">Q", 2, "marked as corrupt"),
        (72, ">Q", 4, "keeps its data in another file"),
        (72, ">Q", 1 << 40, "features of qcow2 that are not known"),
        (96, ">I", 7, "refcounts of"),
        (100, ">I", 1 << 20, "header of 1048576 bytes"),
        (112, ">II", 0x44415441, "extension that does not end"),
    ],
)
def test_qcow2_headers_that_lie(tmp_path: Path, offset: int, layout: str, value: int, words: str) -> None:
    path = make(tmp_path / "a", "-f", "qcow2")
    patch(path, offset, layout, value, *([1 << 40 if layout == ">IQ" else 0xFFFF0000] if len(layout) == 3 else []))
    with pytest.raises(OvtError, match=words) as caught:
        probe(str(path))
    assert caught.value.hint


@needs_qemu_img
def test_what_is_elsewhere_is_told_when_allowed(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    path = make(tmp_path / "a", "-f", "qcow2", "-b", str(tmp_path / "base"), "-F", "raw")
    with pytest.raises(OvtError, match="difference to another image"):
        probe(str(path))
    found = probe(str(path), allow_backing=True)
    assert (found.backing, found.backing_format) == (str(tmp_path / "base"), "raw")
    path = make(tmp_path / "b", "-f", "qcow2", "-o", f"data_file={tmp_path}/data")
    with pytest.raises(OvtError, match=r"another file, '.*/data'"):
        probe(str(path))
    assert probe(str(path), allow_data_file=True).data_file == f"{tmp_path}/data"
    path = make(tmp_path / "c.vmdk", "-f", "vmdk", "-b", str(make(tmp_path / "d.vmdk", "-f", "vmdk")), "-F", "vmdk")
    with pytest.raises(OvtError, match=r"difference to another image, '.*/d.vmdk'"):
        probe(str(path))


def descriptor(path: Path, *extents: str) -> str:
    path.write_text("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n" + "\n".join(extents) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["/etc/shadow", "../x", "sub/x", "nbd:host", "link", "", "..", "pipe"])
def test_a_vmdk_reads_only_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OvtError):
        probe(descriptor(tmp_path / "a.vmdk", f'RW 20 FLAT "{name}" 0'))


def test_a_vmdk_descriptor_is_summed_up(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(5120))
    found = probe(descriptor(tmp_path / "a.vmdk", 'RW 10 FLAT "one" 0', "RW 6 ZERO", 'RDONLY 4 FLAT "one" 0'))
    assert (found.format, found.virtual_size, found.extents) == ("vmdk", 20 * 512, ("one",))
    for line, words in (
        ('RW 10 SPARSE "one" 0', "no sparse extent"),
        ('RW 10 SPARSE "b.vmdk" 0', "no sparse extent"),  # a descriptor again, which could name itself
        ('RW 10 VMFSRDM "one" 0', "extent of type VMFSRDM"),
        ('RW 10 FLAT "two" 0', "no such file"),
        ("nothing", "without extents"),
    ):
        with pytest.raises(OvtError, match=words):
            probe(descriptor(tmp_path / "b.vmdk", line))


@needs_qemu_img
def test_a_sparse_vmdk_without_a_disk_is_refused(tmp_path: Path) -> None:
    """QEMU would believe its descriptor, which may name any file."""
    path = make(tmp_path / "a", "-f", "vmdk")
    with pytest.raises(OvtError, match="header without a disk"):
        probe(str(patch(path, 12, "<Q", 0)))
    path = make(tmp_path / "b", "-f", "vmdk")
    header = path.read_bytes()[:512]
    patch(path, 56, "<Q", (1 << 64) - 1)
    with pytest.raises(OvtError, match="without its end"):
        probe(str(path))
    with open(path, "ab") as file:  # the footer, and the marker of the end
        file.write(header + bytes(512))
    assert probe(str(path)).virtual_size == 10 * MIB


@needs_qemu_img
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("vdi", lambda path: patch(path, 0x4C, "<I", 4), "or a snapshot"),
        ("vdi", lambda path: patch(path, 0x178, "<I", 512), "blocks of 512 bytes"),
        ("vdi", lambda path: patch(path, 0x180, "<I", 1 << 31), "blocks of"),
        ("dynamic VHD", lambda path: patch(path, 512, ">Q", 0), "without its second header"),
        ("dynamic VHD", lambda path: patch(path, path.stat().st_size - 460, ">Q", 1), "wrong checksum"),
        ("vhdx", lambda path: patch(patch(path, 192 << 10, "<I", 0), 256 << 10, "<I", 0), "without metadata"),
        ("vhdx", lambda path: patch(path, (192 << 10) + 8, "<I", 1 << 31), "a table of"),
    ],
)
def test_other_headers_that_lie(tmp_path: Path, kind: str, change: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(OvtError, match=words):
        probe(str(change(make(tmp_path / "a", *KINDS[kind]))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"QED\0" + bytes(600), "QED"),
        (b"\xfd7zXZ\0" + bytes(600), "compressed with xz"),
        (bytes(257) + b"ustar" + bytes(600), "tar archive"),
    ],
)
def test_what_is_no_disk_image(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        probe(str(tmp_path / "a"))
    assert caught.value.hint


def test_raw_images_and_cdroms(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    assert probe(str(path)) == DiskImage(str(path), "raw", 1024)
    path.write_bytes(bytes(0x8001) + b"CD001" + bytes(2048))
    assert probe(str(path)).iso
    with pytest.raises(UsageError, match="is a raw image, not qcow2"):
        probe(str(path), format="qcow2")
    with pytest.raises(UsageError, match="no disk format 'qed'"):
        probe(str(path), format="qed")


def test_only_files_and_block_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UsageError, match="neither a file nor a block device"):
            probe(str(path))
    with pytest.raises(NotFound):
        probe(str(tmp_path / "none"))
