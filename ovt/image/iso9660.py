"""A CD-ROM image of a few files in one directory, for guests that read their settings from one.

Three descriptions of the same files stand on it, because readers differ: ISO 9660 level 1 (ECMA-119) with upper-case
8.3 names, which is the base of all; the Rock Ridge extension of it (IEEE P1282), where Linux and BSD find the true
names and modes; Joliet with UCS-2 names, for Windows and for kernels built without Rock Ridge. The same files always
give the same bytes: every date is the same and nothing random is written.

This only writes, only from memory, and knows no directories below the first, no symbolic links, nothing bootable.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from ovt.errors import UsageError

_SECTOR = 2048
_DESCRIPTORS = 16  # the sectors before belong to the system that boots from the disc
_PATH_TABLES = 19  # little and big endian, for either tree of names
_TREES = 23
_DATE = bytes((100, 1, 1, 0, 0, 0, 0))  # 2000-01-01 00:00:00 UTC (ECMA-119 9.1.5)
_LONG_DATE = b"2000010100000000\0"  # the same (8.4.26.1)
_NO_DATE = b"0" * 16 + b"\0"
_DIRECTORY = 2  # file flag
_ITSELF, _PARENT = b"\0", b"\1"
_DIRECTORY_MODE, _FILE_MODE = 0o040500, 0o100400  # what is on it may be secret, and is for the guest's root to read
# Indicators that Rock Ridge is used: SP in the first record, ER with the extension's name (SUSP 5.3, 5.5)
_ROCK_RIDGE = b"SP\x07\x01\xbe\xef\x00" + struct.pack("<2s6B", b"ER", 18, 1, 10, 0, 0, 1) + b"RRIP_1991A"


class _File(NamedTuple):
    name: str
    short: bytes
    sector: int
    size: int


def iso(label: str, files: Mapping[str, bytes]) -> bytes:
    """An ISO 9660 image with Rock Ridge and Joliet whose volume is named `label` and holds `files`, name → content.

    UsageError for a label or a name that such an image cannot carry: a label has 1 to 16 ASCII characters; a name 1 to
    64 of UCS-2, and none of `*/:;?\\` or control characters.
    """
    if not (1 <= len(label) <= 16 and label.isascii() and label.isprintable()):
        raise UsageError(f"{label!r} cannot be the label of a CD-ROM image", "1 to 16 printable ASCII characters")
    shorts: dict[str, bytes] = {}
    for name in sorted(files):
        _check(name)
        shorts[name] = _short(name, set(shorts.values()))
    by_short = sorted(files, key=lambda name: shorts[name])
    by_ucs2 = sorted(files, key=_ucs2)

    # Sizes first: where a file begins is known only when both directories' sizes are.
    unplaced = [_File(name, shorts[name], 0, 0) for name in by_short]
    rock_size, joliet_size = len(_rock_ridge(0, 0, unplaced)), len(_joliet(0, 0, unplaced))
    rock_root = _TREES
    joliet_root = rock_root + rock_size // _SECTOR
    end = joliet_root + joliet_size // _SECTOR
    placed: dict[str, _File] = {}
    for name in by_short:
        placed[name] = _File(name, shorts[name], end, len(files[name]))
        end += -(-len(files[name]) // _SECTOR)

    image = bytearray(_DESCRIPTORS * _SECTOR)
    image += _descriptor(1, label, end, _PATH_TABLES, rock_root, rock_size)
    image += _descriptor(2, label, end, _PATH_TABLES + 2, joliet_root, joliet_size)
    image += _padded(b"\xffCD001\x01")
    for root in (rock_root, joliet_root):
        for order in "<>":
            image += _padded(struct.pack(f"{order}BBIH", 1, 0, root, 1) + b"\0\0")
    image += _rock_ridge(rock_root, rock_size, [placed[name] for name in by_short])
    image += _joliet(joliet_root, joliet_size, [placed[name] for name in by_ucs2])
    for name in by_short:
        image += _padded(files[name])
    return bytes(image)


def _check(name: str) -> None:
    try:
        fits = 1 <= len(_ucs2(name)) <= 128
    except UnicodeEncodeError:
        fits = False  # half a surrogate pair
    wrong = any(letter in "*/:;?\\" or not letter.isprintable() or ord(letter) > 0xFFFF for letter in name)
    if not fits or wrong or name in (".", ".."):
        raise UsageError(f"{name!r} cannot be the name of a file on a CD-ROM image")


def _ucs2(name: str) -> bytes:
    return name.encode("utf-16-be")


def _short(name: str, taken: set[bytes]) -> bytes:
    """A name of level 1 (at most 8.3, A to Z, digits, underscore) with its version, unlike those taken."""
    stem, _, extension = name.upper().rpartition(".") if "." in name else (name.upper(), "", "")
    stem, extension = ("".join(x if x.isascii() and x.isalnum() else "_" for x in part) for part in (stem, extension))
    number, tail = 0, ""
    while (short := f"{stem[: 8 - len(tail)]}{tail}.{extension[:3]};1".encode()) in taken:
        number += 1
        tail = str(number)
    return short


def _rock_ridge(sector: int, size: int, files: list[_File]) -> bytes:
    directory = _mode(_DIRECTORY_MODE, 2)
    records = [
        _record(_ITSELF, sector, size, _DIRECTORY, _ROCK_RIDGE + directory),
        _record(_PARENT, sector, size, _DIRECTORY, directory),
    ]
    for file in files:
        name = file.name.encode()
        more = struct.pack("<2s3B", b"NM", 5 + len(name), 1, 0) + name + _mode(_FILE_MODE, 1)
        records.append(_record(file.short, file.sector, file.size, 0, more))
    return _directory(records)


def _joliet(sector: int, size: int, files: list[_File]) -> bytes:
    records = [_record(_ITSELF, sector, size, _DIRECTORY), _record(_PARENT, sector, size, _DIRECTORY)]
    records += [_record(_ucs2(file.name), file.sector, file.size, 0) for file in files]
    return _directory(records)


def _directory(records: list[bytes]) -> bytes:
    """Records one after the other, none across the border of two sectors."""
    made = bytearray()
    for record in records:
        if len(made) % _SECTOR + len(record) > _SECTOR:
            made = bytearray(_padded(made))
        made += record
    return _padded(made)


def _record(name: bytes, sector: int, size: int, flags: int, system_use: bytes = b"") -> bytes:
    """A directory record (9.1); both lengths are even."""
    body = _both32(sector) + _both32(size) + _DATE + struct.pack("<3B", flags, 0, 0) + _both16(1)
    body += struct.pack("<B", len(name)) + name + b"\0" * (1 - len(name) % 2) + system_use
    body += b"\0" * (len(body) % 2)
    return struct.pack("<BB", 2 + len(body), 0) + body


def _mode(mode: int, links: int) -> bytes:
    """The PX entry of Rock Ridge: mode, links, owner, group."""
    return struct.pack("<2s2B", b"PX", 36, 1) + _both32(mode) + _both32(links) + _both32(0) + _both32(0)


def _descriptor(kind: int, label: str, sectors: int, tables: int, root: int, size: int) -> bytes:
    """A primary (1) or Joliet's supplementary (2) volume descriptor (8.4, 8.5); its two path tables follow another."""

    def text(value: str, length: int) -> bytes:
        return value.encode().ljust(length) if kind == 1 else _ucs2(value.ljust(length // 2)).ljust(length, b"\0")

    return _padded(
        struct.pack("<B5sBB", kind, b"CD001", 1, 0)
        + text("", 32)
        + text(label, 32)
        + bytes(8)
        + _both32(sectors)
        + (b"" if kind == 1 else b"%/E").ljust(32, b"\0")  # UCS-2 level 3
        + _both16(1)
        + _both16(1)
        + _both16(_SECTOR)
        + _both32(10)  # bytes of a path table with one directory
        + struct.pack("<II", tables, 0)
        + struct.pack(">II", tables + 1, 0)
        + _record(_ITSELF, root, size, _DIRECTORY)
        + b"".join(text("", length) for length in (128, 128, 128, 128, 37, 37, 37))
        + _LONG_DATE * 2
        + _NO_DATE * 2
        + b"\1"
    )


def _padded(data: bytes | bytearray) -> bytes:
    return bytes(data) + bytes(-len(data) % _SECTOR)


def _both16(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _both32(value: int) -> bytes:
    return struct.pack("<I", value) + struct.pack(">I", value)
