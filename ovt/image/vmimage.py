"""The built-in `busybox` image of virtual machines: a kernel and an initramfs, and no disk.

The initramfs holds the host's static busybox, ovt's guest program as /init, and the kernel modules for what QEMU can
give to a guest. It is made for a quick boot, above all where the processor is emulated: nothing is compressed, and only
what a guest cannot start without is loaded before its program runs.

    /init                      ovt-guest
    /ovt/modules               module files to insert first, one path a line, in order
    /ovt/modules.late          the same, once the main program runs: they serve devices that may come later
    /ovt/main                  what to run, from a second archive that `main_archive` makes for each guest
    /lib/modules/VERSION       those modules and some for modprobe, which the kernel itself calls for file systems

What a guest's hardware looks like and how QEMU is started stand in ovt/engine/vm.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ovt
from ovt.errors import HostError, UsageError
from ovt.image import _cached, busybox, initramfs, kernel
from ovt.image.initramfs import Entry
from ovt.image.kernel import Kernel

# Without these there is no console but the serial one, no agent, no network and no power button.
FIRST = ("virtio_pci", "virtio_console", "virtio_net", "evdev", "button")
# Whatever QEMU can plug in, before or while the guest runs. Disks come first: they are awaited soonest.
LATE = (
    *("virtio_blk", "virtio_scsi", "sd_mod", "sr_mod", "nvme", "ahci"),
    *("virtio_balloon", "virtio_mem", "virtio_rng", "vmw_vsock_virtio_transport"),
    *("pvpanic_pci", "vmgenid", "i6300esb", "e1000e", "igbvf"),
)
# What mount and modprobe ask for by name.
ON_DEMAND = (
    *("9p", "9pnet_virtio", "virtiofs", "overlay", "loop", "ext4", "crc32c_generic", "crc32c_intel"),
    *("vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "isofs", "qemu_fw_cfg", "af_packet"),
)
# On an emulated processor this is a third off the time to /init (the kernel's tests of its ciphers are a quarter), and
# it takes nothing from the guest's security. nowatchdog: a busy host is no lockup of the guest. Two things are missing
# on purpose: mitigations=off, and tsc=reliable, which would be wrong after a migration to another host.
CMDLINE = (
    "console=ttyS0 quiet panic=-1 cryptomgr.notests initcall_blacklist=crypto_kdf108_init,jent_mod_init "
    "8250.nr_uarts=1 no_timer_check rcupdate.rcu_expedited=1 nowatchdog"
)
_SIGNATURE_END = b"~Module signature appended~\n"  # struct module_signature stands before it
_LAYOUT = 2  # counts changes of what is below: images made before them are not used again


class VmImage(NamedTuple):
    """What QEMU's -kernel, -initrd and -append are given; `version` is the kernel's."""

    kernel: str
    initrd: str
    cmdline: str
    version: str


def build(cache: str, report: Callable[[str], None]) -> VmImage:
    """The built-in image; its initramfs is made in the directory `cache` unless it is there from an earlier call.

    Fetches the kernel if need be. Several may call this at once. HostError or NotFound for a part that is missing, with
    what to do.
    """
    image = kernel.get(report)
    program, busybox_version = busybox.find()
    init = guest_program()
    inputs = f"{_LAYOUT} {image.version} {_stamp(image.vmlinux)} {busybox_version} {FIRST} {LATE} {ON_DEMAND} ".encode()
    digest = hashlib.sha256(inputs + init).hexdigest()

    def fill(directory: str) -> None:
        with open(f"{directory}/initrd", "wb") as file:
            file.write(initrd(image, program, init))

    directory = _cached(cache, f"vm-busybox-{digest[:32]}", fill)
    return VmImage(str(image.vmlinux), f"{directory}/initrd", CMDLINE, image.version)


def guest_program() -> bytes:
    """ovt-guest, the first process of the built-in image."""
    path = f"{os.path.dirname(os.path.abspath(ovt.__file__))}/_bin/ovt-guest"
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise HostError(f"{path} is not built", hint="run scripts/setup") from None


def initrd(image: Kernel, program: str, init: bytes) -> bytes:
    """The initramfs of `image`'s modules and the static busybox `program`, which starts `init`."""
    first, late = initramfs.modules(image, FIRST), initramfs.modules(image, (*FIRST, *LATE))
    carried = initramfs.modules(image, (*FIRST, *LATE, *ON_DEMAND))
    late = [path for path in late if path not in first]
    home = f"lib/modules/{image.version}"

    def listing(files: list[Path]) -> bytes:
        return "".join(f"/{home}/{path.relative_to(image.modules)}\n" for path in files).encode()

    with tempfile.TemporaryDirectory(prefix="ovt-image-") as root:
        busybox.build(program, root)
        entries = [initramfs.directory("."), *_tree(Path(root))]  # a root that is not everybody's to write
    entries += [initramfs.device("dev/console", 5, 1), initramfs.file("init", init)]
    entries += [initramfs.directory("ovt", 0o700), initramfs.file("ovt/modules", listing(first), 0o644)]
    entries += [initramfs.file("ovt/modules.late", listing(late), 0o644)]
    entries += list(_module_tree(image, carried, home))
    return initramfs.archive(entries)


def main_archive(
    command: Sequence[str] = (),
    *,
    env: Sequence[str] = (),
    cwd: str = "",
    user: str = "",
    hostname: str = "",
    tty: bool = False,
    shares: Sequence[str] = (),
    poweroff: bool = False,
) -> bytes:
    """The archive to append to the initrd of one guest: /ovt/main, which says what runs in it.

    `env` are NAME=VALUE, `shares` are TAG:TARGET:OPTIONS; without `command` the guest serves its agent alone.
    UsageError for a NUL byte in any of them.
    """
    pairs = [("arg", word) for word in command] + [("env", word) for word in env]
    pairs += [(key, value) for key, value in (("cwd", cwd), ("user", user), ("hostname", hostname)) if value]
    pairs += [("tty", "1" if tty else "0"), *(("share", share) for share in shares)]
    pairs += [("poweroff", "1")] if poweroff else []
    for key, value in pairs:
        if "\0" in value:
            raise UsageError(f"{key} {value!r} has a NUL byte in it")
    content = b"".join(os.fsencode(f"{key}={value}") + b"\0" for key, value in pairs)
    return initramfs.archive([initramfs.file("ovt/main", content, 0o600)])


def _tree(root: Path) -> Iterator[Entry]:
    """All below `root`, as root's."""
    for path in sorted(root.rglob("*")):  # a directory sorts before what it holds
        name, mode = str(path.relative_to(root)), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            yield initramfs.link(name, os.readlink(path))
        elif stat.S_ISDIR(mode):
            yield Entry(name, mode)
        else:
            yield Entry(name, mode, path.read_bytes())


def _module_tree(image: Kernel, files: Sequence[Path], home: str) -> Iterator[Entry]:
    """The module files below `home` and an index of them alone: modprobe reads all of it at every call."""
    paths = [path.relative_to(image.modules) for path in files]
    parents = {parent for path in paths for parent in path.parents if parent != Path(".")}
    yield from (initramfs.directory(name) for name in ("lib", "lib/modules", home))
    yield from (initramfs.directory(f"{home}/{parent}") for parent in sorted(parents))
    for path, file in zip(paths, files, strict=True):
        yield initramfs.file(f"{home}/{path}", unsigned(file.read_bytes()), 0o644)
    carried, names = {str(path) for path in paths}, {path.stem.replace("-", "_") for path in paths}
    depends = [line for line in _lines(image, "modules.dep") if line.partition(":")[0] in carried]
    aliases = [line for line in _lines(image, "modules.alias") if line.split()[-1].replace("-", "_") in names]
    for index, lines in (("dep", depends), ("alias", aliases), ("builtin", _lines(image, "modules.builtin"))):
        yield initramfs.file(f"{home}/modules.{index}", "".join(lines).encode(), 0o644)


def unsigned(module: bytes) -> bytes:
    """A kernel module without the signature at its end (include/linux/module_signature.h).

    Whoever could change a module here could change /init, so it protects nothing, and an emulated processor takes 50 ms
    to verify one. The kernel marks itself as tainted by an unsigned module.
    """
    if not module.endswith(_SIGNATURE_END):
        return module
    end = len(module) - len(_SIGNATURE_END) - 12
    (signature,) = struct.unpack_from(">I", module, end + 8)
    return module[: end - signature]


def _lines(image: Kernel, name: str) -> list[str]:
    return (image.modules / name).read_text().splitlines(keepends=True)


def _stamp(path: Path) -> str:
    info = path.stat()
    return f"{info.st_size:x}-{info.st_mtime_ns:x}"
