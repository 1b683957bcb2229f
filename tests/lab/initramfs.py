"""Initramfs archives: a cpio in the kernel's format, and the kernel modules to put into it in the order to load them.

Format: Documentation/driver-api/early-userspace/buffer-format.rst, "newc". Nothing is compressed: unpacking would cost
more than reading.
"""

import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from tests.lab.packages import Kernel, Unavailable

APPLETS = "sh mount umount mkdir insmod switch_root cat echo ls sleep poweroff ip ifconfig grep sed"


@dataclass(frozen=True)
class Entry:
    """A file of the archive; `data` is a link's target, and `device` (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, data: bytes, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def link(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def device(name: str, major: int, minor: int) -> Entry:
    return Entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))


def archive(entries: list[Entry]) -> bytes:
    """The cpio archive that holds `entries`; parents must come before what they hold."""
    parts = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        parts += [head, bytes(-len(head) % 4), entry.data, bytes(-len(entry.data) % 4)]
    return b"".join(parts)


def modules(kernel: Kernel, names: list[str]) -> list[Path]:
    """The files of these kernel modules and of all they depend on, in the order to insert them."""
    depends: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        depends[path] = needed.split()
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in depends}
    built_in = (kernel.modules / "modules.builtin").read_text()
    ordered: list[str] = []
    for name in names:
        path = by_name.get(name.replace("-", "_"))
        if path is None:
            if f"/{name}.ko" in built_in or f"/{name.replace('_', '-')}.ko" in built_in:
                continue
            raise Unavailable(f"kernel {kernel.version} has no module {name}")
        # modules.dep lists what a module needs with the deepest last.
        ordered += [needed for needed in [*reversed(depends[path]), path] if needed not in ordered]
    return [kernel.modules / path for path in ordered]


def with_busybox(init: str, kernel: Kernel, names: list[str], more: list[Entry] | None = None) -> bytes:
    """An archive with busybox, `init` as a shell script, and the modules `names`, which `/modules` inserts.

    The script starts with nothing mounted; a line `. /modules` in it loads the modules.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise Unavailable("there is no busybox (Debian package busybox-static): run scripts/setup")
    files = modules(kernel, names)
    entries = [directory(name) for name in ("bin", "dev", "proc", "sys", "lib", "new", "low", "up")]
    entries += [device("dev/console", 5, 1), file("bin/busybox", Path(busybox).read_bytes())]
    entries += [link(f"bin/{applet}", "busybox") for applet in APPLETS.split()]
    entries += [file(f"lib/{path.name}", path.read_bytes(), 0o644) for path in files]
    entries += [file("modules", "".join(f"insmod /lib/{path.name}\n" for path in files).encode(), 0o644)]
    entries += [file("init", init.encode()), *(more or [])]
    return archive(entries)
