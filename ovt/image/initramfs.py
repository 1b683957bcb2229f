"""Initramfs archives: a cpio in the kernel's format, and the kernel modules to put into it in the order to load them.

Format: Documentation/driver-api/early-userspace/buffer-format.rst, "newc". Nothing is compressed: unpacking would cost
more than reading. Several archives may follow one another; a later one adds to the earlier ones.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ovt.errors import NotFound
from ovt.image.kernel import Kernel


class Entry(NamedTuple):
    """A file of the archive; `data` is a link's target, and `device` (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def link(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def device(name: str, major: int, minor: int) -> Entry:
    return Entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The cpio archive that holds `entries`; parents must come before what they hold. Everything is root's."""
    parts = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        parts += [head, bytes(-len(head) % 4), entry.data, bytes(-len(entry.data) % 4)]
    return b"".join(parts)


def modules(kernel: Kernel, names: Sequence[str]) -> list[Path]:
    """The files of these kernel modules and of all they depend on, in the order to insert them.

    What is built into the kernel is left out; NotFound for a module that it has in neither way.
    """
    depends: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        depends[path] = needed.split()
    by_name = {_name(path): path for path in depends}
    built_in = {_name(path) for path in (kernel.modules / "modules.builtin").read_text().split()}
    ordered: list[str] = []
    for name in names:
        module = by_name.get(_name(name))
        if module is None:
            if _name(name) in built_in:
                continue
            raise NotFound(f"kernel {kernel.version} has no module {name}")
        # modules.dep lists what a module needs with the deepest last.
        ordered += [needed for needed in [*reversed(depends[module]), module] if needed not in ordered]
    return [kernel.modules / path for path in ordered]


def _name(path: str) -> str:
    """A module's name: that of its file without suffixes, where - and _ are the same."""
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")
