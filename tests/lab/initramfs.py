"""The initramfs of the lab's guests: busybox, a shell script, and the kernel modules that the script needs."""

import shutil
from pathlib import Path

from ovt.image.initramfs import Entry, archive, device, directory, file, link, modules
from tests.lab.packages import Kernel, Unavailable

__all__ = ["Entry", "archive", "device", "directory", "file", "link", "modules", "with_busybox"]

APPLETS = "sh mount umount mkdir insmod switch_root cat echo ls sleep poweroff ip ifconfig grep sed"


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
