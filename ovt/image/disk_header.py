"""What a disk image is, read from its own header with care: images come from anywhere, and some of them lie.

Formats: qcow2 (docs/interop/qcow2.rst of QEMU), VMDK (VMware Virtual Disk Format 5.0), VHDX ([MS-VHDX]), VHD
("vpc", Virtual Hard Disk Image Format Specification), VDI, ISO 9660, and raw for what is none of them. No program
looks at an image before this has: a header can name other files of the host, or sizes that make a reader allocate
memory without end. Such names are returned or refused, never followed; `disk` follows those that the caller allows.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from typing import NamedTuple

from ovt.errors import NotFound, OvtError, UsageError, refused

FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi")
_LARGEST = 1 << 63  # bytes; QEMU and the kernel count in signed 64 bits
_SECTOR = 512
_CONVERT = "convert it to qcow2 with the tool that made it"
# What people give for a disk image, and is none that a guest can be given.
_OTHERS = (
    (0, b"QED\0", "a QED image, which QEMU has given up", "qemu-img convert -f qed -O qcow2 OLD NEW"),
    (0, b"COWD", "a VMDK image of ESX 2", _CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels image", "qemu-img convert -f parallels -O qcow2 OLD NEW"),
    (0, b"WithouFreSpacExt", "a Parallels image", "qemu-img convert -f parallels -O qcow2 OLD NEW"),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it first: gunzip"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "unpack it first: unxz"),
    (0, b"BZh", "compressed with bzip2", "unpack it first: bunzip2"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first: unzstd"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first: unzip"),
    (257, b"ustar", "a tar archive", "unpack it first; the disks of an OVA are in it"),
)


class DiskImage(NamedTuple):
    """A disk image as its header describes it. Sizes in bytes; names as they stand in the header, none was opened."""

    path: str
    format: str  # one of FORMATS
    virtual_size: int  # what a guest sees
    backing: str = ""  # the image below it
    backing_format: str = ""  # empty: not recorded
    data_file: str = ""  # qcow2: the file with the data
    encrypted: bool = False
    iso: bool = False  # a raw image with an ISO 9660 file system: a CD-ROM
    extents: tuple[str, ...] = ()  # vmdk: other files of its own directory that hold the data


def probe(
    path: str,
    *,
    format: str = "",
    allow_backing: bool = False,
    allow_data_file: bool = False,
    allow_encrypted: bool = False,
) -> DiskImage:
    """What the image or block device `path` is.

    With a `format`, it has to be of that one; raw is believed whatever the content is, which matters for images that a
    guest has written to. The end of a raw image is filled up to whole sectors of 512 bytes in `virtual_size`.
    NotFound, UsageError for what is no image, OvtError for a damaged one and for what the caller did not allow.
    """
    if format and format not in FORMATS:
        raise UsageError(f"there is no disk format {format!r}", f"one of {' '.join(FORMATS)}")
    try:
        # O_NONBLOCK: a pipe of that name must not stop us
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no disk image {path}") from None
    except OSError as error:
        raise refused(f"cannot open disk image {path}", error) from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"{path} is neither a file nor a block device")
        found = _Reader(path, fd, os.lseek(fd, 0, os.SEEK_END)).image(format)
    finally:
        os.close(fd)
    if found.encrypted and not allow_encrypted:
        raise OvtError(f"{path} is encrypted", "convert it to an image that is not, or encrypt inside the guest")
    if found.data_file and not allow_data_file:
        raise OvtError(f"{path} keeps its data in another file, {found.data_file!r}", _CONVERT)
    if found.backing and not allow_backing:
        raise OvtError(
            f"{path} is a difference to another image, {found.backing!r}",
            "if you trust it, merge them: qemu-img convert -O qcow2 OLD NEW",
        )
    return found


class _Reader:
    """One open image of `size` bytes."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        self.path, self.fd, self.size = path, fd, size

    def image(self, format: str) -> DiskImage:
        if self.size == 0:
            raise UsageError(f"{self.path} is empty", "a disk image has at least one sector of 512 bytes")
        found = self.raw() if format == "raw" else self.recognised()
        if format and found.format != format:
            raise UsageError(f"{self.path} is a {found.format} image, not {format}")
        if not 0 < found.virtual_size < _LARGEST:
            raise self.damaged(f"says that the disk has {found.virtual_size} bytes")
        return found

    def recognised(self) -> DiskImage:
        head = os.pread(self.fd, 64 * 1024, 0)
        if head.startswith(b"QFI\xfb"):
            return self.qcow2()
        if head.startswith(b"KDMV"):
            return self.vmdk_sparse()
        if head.lstrip().lower().startswith(b"# disk descriptorfile"):
            return self.vmdk_descriptor(self.text(0, min(self.size, 1 << 20)))
        if head.startswith(b"vhdxfile"):
            return self.vhdx()
        if head[0x40:0x44] == b"\x7f\x10\xda\xbe":
            return self.vdi()
        if head.startswith(b"conectix") or self.has_vhd_footer():
            return self.vpc()
        for offset, magic, what, hint in _OTHERS:
            if head[offset : offset + len(magic)] == magic:
                raise UsageError(f"{self.path} is {what}", hint)
        return self.raw()

    def damaged(self, why: str) -> OvtError:
        return OvtError(f"disk image {self.path} is damaged: it {why}", "fetch or copy it again")

    def read(self, offset: int, length: int) -> bytes:
        """Exactly that much; offsets come from the image and may be anything."""
        if offset < 0 or offset + length > self.size:
            raise self.damaged(f"has {self.size} bytes, and its header points to {offset + length}")
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise self.damaged(f"ends at {offset + len(data)} while it is read")
        return data

    def text(self, offset: int, length: int) -> str:
        return self.read(offset, length).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")

    def raw(self) -> DiskImage:
        iso = self.size > 0x8006 and os.pread(self.fd, 5, 0x8001) == b"CD001"
        return DiskImage(self.path, "raw", -(-self.size // _SECTOR) * _SECTOR, iso=iso)

    # qcow2 ---------------------------------------------------------------------------------------------------------

    def qcow2(self) -> DiskImage:
        (version,) = struct.unpack(">I", self.read(4, 4))
        if version not in (2, 3):
            raise UsageError(f"{self.path} is a qcow image of version {version}", "versions 2 and 3 are known")
        backing_offset, backing_length, bits, size, crypt = struct.unpack(">QIIQI", self.read(8, 28))
        l1_size, l1_offset, refcount_offset, refcount_clusters, snapshots, snapshots_offset = struct.unpack(
            ">IQQIIQ", self.read(36, 36)
        )
        if not 9 <= bits <= 21:
            raise self.damaged(f"has clusters of 2^{bits} bytes")
        incompatible, header = 0, 72
        if version == 3:
            incompatible, _, _, order, header = struct.unpack(">QQQII", self.read(72, 32))
            if header < 104 or header % 8 or header > 1 << bits or order > 6:
                raise self.damaged(f"has a header of {header} bytes and refcounts of 2^{order} bits")
        if incompatible >> 5:
            raise OvtError(f"{self.path} needs features of qcow2 that are not known here ({incompatible:#x})", _CONVERT)
        if incompatible & 2:
            raise OvtError(f"{self.path} is marked as corrupt", f"qemu-img check -r all -f qcow2 {self.path}")
        covered = (1 << bits) << (bits - (4 if incompatible & 16 else 3))  # by one entry of the L1 table
        if size >= _LARGEST or l1_size * 8 > 32 << 20 or l1_size * covered < size:
            raise self.damaged(f"has an L1 table of {l1_size} entries for a disk of {size} bytes")
        tables = ((l1_offset, l1_size * 8), (refcount_offset, refcount_clusters << bits), (snapshots_offset, snapshots))
        for offset, length in tables:
            if offset % (1 << bits) or (length and offset + length > self.size):
                raise self.damaged(f"has {self.size} bytes, and a table of it lies at {offset}")
        if backing_offset and (backing_length > 1023 or backing_offset + backing_length > 1 << bits):
            raise self.damaged("has the name of its backing file outside of its header")
        backing = self.read(backing_offset, backing_length).decode("utf-8", "surrogateescape") if backing_offset else ""
        extensions = self.extensions(header, backing_offset or 1 << bits)
        data_file = extensions.get(0x44415441, b"").decode("utf-8", "surrogateescape")
        if incompatible & 4 and not data_file:
            data_file = "?"  # the format allows to leave the name to the one who opens the image
        return DiskImage(
            *(self.path, "qcow2", -(-size // _SECTOR) * _SECTOR, backing),
            extensions.get(0xE2792ACA, b"").decode("ascii", "replace"),
            data_file,
            crypt != 0,
        )

    def extensions(self, at: int, end: int) -> dict[int, bytes]:
        """The header extensions by type, which lie between `at` and `end`."""
        found: dict[int, bytes] = {}
        end = min(end, self.size)
        while at + 8 <= end:
            kind, length = struct.unpack(">II", self.read(at, 8))
            if kind == 0:
                break
            if at + 8 + length > end:
                raise self.damaged("has a header extension that does not end")
            found[kind] = self.read(at + 8, length)
            at += 8 + -(-length // 8) * 8
        return found

    # VMDK ----------------------------------------------------------------------------------------------------------

    def vmdk_sparse(self) -> DiskImage:
        """monolithicSparse or streamOptimized: header, descriptor and data in one file."""
        layout = "<4xIIQQQQIQQ"
        version, _, capacity, grain, place, length, _, _, directory = struct.unpack(layout, self.read(0, 64))
        if capacity == 0:  # QEMU then believes the descriptor, which may name any file
            raise OvtError(f"{self.path} is a VMDK header without a disk", _CONVERT)
        if directory == (1 << 64) - 1:  # written in one go: the true header follows the data
            footer = self.read(self.size - 1024, 64)
            if footer[:4] != b"KDMV":
                raise self.damaged("is a streamOptimized VMDK without its end")
            version, _, capacity, grain, _, _, _, _, directory = struct.unpack(layout, footer)
        if version not in (1, 2, 3) or not 1 <= grain <= 0x10000 or grain & (grain - 1):
            raise self.damaged(f"is a VMDK of version {version} with grains of {grain} sectors")
        if directory * _SECTOR > self.size:
            raise self.damaged("is a VMDK whose directory lies behind its end")
        text = self.text(place * _SECTOR, min(length * _SECTOR, 1 << 20)) if place else ""
        parent = _vmdk_parent(text)
        return DiskImage(self.path, "vmdk", capacity * _SECTOR, parent, "vmdk" if parent else "")

    def vmdk_descriptor(self, text: str) -> DiskImage:
        """A text that names the files with the data."""
        sectors, names = 0, []
        for line in text.splitlines():
            found = re.match(r'\s*(?:RW|RDONLY|NOACCESS)\s+(\d+)\s+(\w+)(?:\s+"([^"]*)")?', line)
            if not found:
                continue
            sectors += int(found[1])
            if found[2] == "ZERO":
                continue
            if found[2] not in ("FLAT", "SPARSE", "VMFS", "VMFSSPARSE", "SESPARSE"):
                raise OvtError(f"{self.path} has an extent of type {found[2]}", _CONVERT)
            names.append(self.extent(found[3] or "", found[2]))
        if not sectors:
            raise self.damaged("is a VMDK descriptor without extents")
        parent = _vmdk_parent(text)
        return DiskImage(
            self.path, "vmdk", sectors * _SECTOR, parent, "vmdk" if parent else "", extents=tuple(dict.fromkeys(names))
        )

    def extent(self, name: str, kind: str) -> str:
        # A colon makes it a protocol for QEMU, a link leads anywhere.
        if not name or "/" in name or ":" in name or name in (".", ".."):
            raise OvtError(f"{self.path} wants data from {name!r}, which is not a file beside it", _CONVERT)
        path = os.path.join(os.path.dirname(os.path.abspath(self.path)), name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise refused(f"cannot open {path}, which holds data of {self.path}", error) from None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise OvtError(f"{path}, which holds data of {self.path}, is no regular file")
            if kind == "SPARSE":  # it has a header, which could lead on in its turn
                part = _Reader(path, fd, info.st_size)
                if part.read(0, 4) != b"KDMV":
                    raise part.damaged(f"is no sparse extent, as {self.path} says")
                part.vmdk_sparse()
        finally:
            os.close(fd)
        return name

    # Others --------------------------------------------------------------------------------------------------------

    def vhdx(self) -> DiskImage:
        regions = self.table(192 << 10, b"regi", 16) or self.table(256 << 10, b"regi", 16)
        region = regions.get("06a27c8b90479a4bb8fe575f050f886e")  # metadata
        if region is None:
            raise self.damaged("is a VHDX without metadata")
        (start,) = struct.unpack("<Q", region[:8])
        items = self.table(start, b"metadata", 32)
        values: list[int] = []
        # virtual disk size; file parameters
        for guid, layout in ("2442a52f1bcd7648b2115dbed83bf4b8", "<Q"), ("3767a1ca36fa434db3b633f0aa44e76b", "<4xI"):
            if guid not in items:
                raise self.damaged("is a VHDX without a size")
            (offset,) = struct.unpack("<I", items[guid][:4])
            values += struct.unpack(layout, self.read(start + offset, struct.calcsize(layout)))
        if values[1] & 2:
            raise OvtError(f"{self.path} is a difference to another VHDX image", _CONVERT)
        return DiskImage(self.path, "vhdx", values[0])

    def table(self, start: int, signature: bytes, header: int) -> dict[str, bytes]:
        """A table of the VHDX format: for each GUID (hex, as stored) the 16 bytes that follow it."""
        head = self.read(start, header)
        if not head.startswith(signature):
            return {}
        (count,) = struct.unpack_from("<I", head, 8) if header == 16 else struct.unpack_from("<H", head, 10)
        if count > 2047:
            raise self.damaged(f"has a table of {count} entries")
        entries = self.read(start + header, count * 32)
        return {entries[at : at + 16].hex(): entries[at + 16 : at + 32] for at in range(0, len(entries), 32)}

    def has_vhd_footer(self) -> bool:
        """Whether the last sector is that of a VHD of fixed size: nothing else tells it from a raw image."""
        footer = os.pread(self.fd, 512, max(0, self.size - 512))
        if not footer.startswith(b"conectix") or len(footer) < 512:
            return False
        size, kind, checksum = struct.unpack_from(">Q4xII", footer, 48)
        return bool(kind == 2 and size == self.size - 512 and checksum == _vhd_checksum(footer))

    def vpc(self) -> DiskImage:
        footer = self.read(self.size - 512, 512)
        if not footer.startswith(b"conectix"):
            footer = self.read(0, 512)  # the copy; the end is missing or has 511 bytes in old ones
        start, creator, size, cylinders, heads, sectors, kind, checksum = struct.unpack_from(
            ">Q4x4s16xQHBBII", footer, 16
        )
        if checksum != _vhd_checksum(footer):
            raise self.damaged("is a VHD with a wrong checksum")
        if kind == 4:
            raise OvtError(f"{self.path} is a difference to another VHD image", _CONVERT)
        if kind not in (2, 3):
            raise self.damaged(f"is a VHD of type {kind}")
        if kind == 3 and not self.read(start, 1024).startswith(b"cxsparse"):
            raise self.damaged("is a dynamic VHD without its second header")
        # Most programs mean the geometry, some the size (and the geometry ends at 127 GiB): QEMU's block/vpc.c.
        geometry = cylinders * heads * sectors
        by_size = creator in (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS") or geometry == 65535 * 16 * 255
        return DiskImage(self.path, "vpc", size if by_size else geometry * _SECTOR)

    def vdi(self) -> DiskImage:
        version, _, kind = struct.unpack("<III", self.read(0x44, 12))
        sector, _, size, block, _, blocks = struct.unpack("<IIQIII", self.read(0x168, 28))
        if version != 0x10001 or kind not in (1, 2) or self.read(0x1A8, 32) != bytes(32):
            raise OvtError(f"{self.path} is a VDI of version {version:#x}, type {kind}, or a snapshot", _CONVERT)
        table, data = struct.unpack("<II", self.read(0x154, 8))
        if sector != _SECTOR or block != 1 << 20 or size > blocks * block or max(table + blocks * 4, data) > self.size:
            raise self.damaged(f"is a VDI of {blocks} blocks of {block} bytes for a disk of {size}")
        return DiskImage(self.path, "vdi", -(-size // _SECTOR) * _SECTOR)


def _vmdk_parent(descriptor: str) -> str:
    """The image that a VMDK is a difference to, by its descriptor; empty if to none."""
    cid = re.search(r"^\s*parentCID\s*=\s*(\w+)", descriptor, re.M | re.I)
    hint = re.search(r'^\s*parentFileNameHint\s*=\s*"([^"]*)"', descriptor, re.M | re.I)
    if hint:
        return hint[1]
    return "?" if cid and cid[1].lower() != "ffffffff" else ""


def _vhd_checksum(footer: bytes) -> int:
    """The one's complement of the sum of all bytes but those of the checksum itself."""
    return ~(sum(footer[:64]) + sum(footer[68:512])) & 0xFFFFFFFF
