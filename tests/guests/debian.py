"""A real Debian on a disk, as its cloud images are: systemd, cloud-init, qemu-guest-agent, the cloud kernel, GRUB.

mmdebstrap installs the release that this machine runs, from the mirror that it uses, into a directory; programs of the
new system itself (chroot) make the boot loader and the partition table, and mke2fs fills the root file system, so that
nothing is mounted and no loop device is needed. The disk starts from BIOS and from UEFI; kernel and initrd lie beside
it for a direct boot, which under emulation saves the boot loader's seconds. It is built once for each version of this
file, in `${XDG_CACHE_HOME:-~/.cache}/ovt/tests`.

Nothing of Debian is replaced. Left out is what a guest of tests has no use for and an emulated processor would spend
seconds on: translations and manuals, timers that go to the network, a getty on a screen that is not there.

    python -m tests.guests.debian        build the disk if it is not there and print where it is
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ovt.image.kernel import mirror

MIB = 1 << 20
PACKAGES = (
    "systemd-sysv",
    "udev",
    "dbus",
    "iproute2",
    "linux-image-cloud-amd64",
    "zstd",  # compresses the initrd
    "cloud-init",
    "cloud-guest-utils",  # growpart
    "fdisk",
    "e2fsprogs",
    "qemu-guest-agent",
    # what the disk is made bootable with
    "grub-common",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    "mtools",
)
CODENAMES = ("bookworm", "trixie")
ROOT = "LABEL=root"
COMMAND_LINE = f"root={ROOT} ro console=ttyS0"
LEFT_OUT = ("/usr/share/locale/*", "/usr/share/man/*", "/usr/share/doc/*", "/usr/share/i18n/locales/*")
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "systemd-binfmt.service",
    "systemd-pstore.service",
)
# There before the kernel's package makes its initrd, which otherwise brings every driver of a disk there is.
INITRD = {
    "etc/initramfs-tools/conf.d/guest": "MODULES=list\n",
    "etc/initramfs-tools/hooks/guest": (
        '#!/bin/sh\n[ "$1" = prereqs ] && exit\n. /usr/share/initramfs-tools/hook-functions\n'
        "manual_add_modules virtio_pci virtio_blk virtio_scsi sd_mod sr_mod nvme ext4\n"
    ),
}
FILES = {
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/machine-id": "",  # made anew at the first boot of each guest, without all the rest of a "first boot"
    "etc/fstab": f"{ROOT} / ext4 discard,errors=remount-ro 0 1\n",
    # What is plugged in is used at once, as on every cloud image of today.
    "etc/udev/rules.d/80-hotplug.rules": (
        'SUBSYSTEM=="cpu", ACTION=="add", TEST=="online", ATTR{online}=="0", ATTR{online}="1"\n'
        'SUBSYSTEM=="memory", ACTION=="add", TEST=="state", ATTR{state}=="offline", ATTR{state}="online"\n'
    ),
    # What would only fail here: there is no such locale, no SSH server, and GRUB did not come by its packages' scripts.
    "etc/cloud/cloud.cfg.d/90-guest.cfg": "locale: false\nssh_genkeytypes: []\ngrub_dpkg: {enabled: false}\n",
    # A guest without a network is up nevertheless, and not only after two minutes.
    "etc/systemd/system/systemd-networkd-wait-online.service.d/guest.conf": (
        "[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=10\n"
    ),
}
# Megabytes from the start of the disk: the table, GRUB for BIOS, the EFI system partition, the root, the second table.
# The root is last, so that it can grow, and yet the first by number, as in Debian's own cloud images.
BIOS_AT, ESP_AT, ROOT_AT = 1, 2, 10
ROOT_SIZE = 1024
TABLE = f"""label: gpt
14 : start={BIOS_AT}MiB, size={ESP_AT - BIOS_AT}MiB, type=21686148-6449-6E6F-744E-656564454649
15 : start={ESP_AT}MiB, size={ROOT_AT - ESP_AT}MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
1 : start={ROOT_AT}MiB, size={ROOT_SIZE}MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709
"""
GRUB_MODULES = ("part_gpt", "ext2", "search", "search_label", "linux")


class Unavailable(Exception):
    """The disk cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class DebianDisk:
    """A bootable disk, never to be written to: guests get overlays above it."""

    path: Path  # qcow2
    kernel: Path  # bzImage
    initrd: Path
    root: str = ROOT  # value of root= on the kernel's command line
    command_line: str = COMMAND_LINE


def cache() -> Path:
    """The directory where built guests are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ovt/tests"


def codename() -> str:
    """The Debian release of this machine."""
    release = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.M)
    if not found or found[1] not in CODENAMES:
        raise Unavailable("the Debian guest is made from the packages of Debian 12 or 13, and this is neither")
    return found[1]


def debian_disk() -> DebianDisk:
    """The disk, built if the cache has none. Raises Unavailable."""
    key = f"debian-{codename()}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
    place = cache()
    disk = DebianDisk(*(place / f"{key}.{suffix}" for suffix in ("qcow2", "vmlinuz", "initrd")))
    with _locked(place / ".debian.lock"):
        if not disk.path.exists():  # it comes last
            _require()
            print("tests: building the Debian guest (a minute or two, once)", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=place, prefix=".building-") as directory:
                made = _build(Path(directory))
                for source, target in ((made.kernel, disk.kernel), (made.initrd, disk.initrd), (made.path, disk.path)):
                    source.replace(target)
    return disk


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require() -> None:
    if os.geteuid():
        raise Unavailable("building the Debian guest needs root")
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in ("mmdebstrap", "mke2fs", "qemu-img") if not shutil.which(name, path=search)]
    if missing:
        raise Unavailable(f"there is no {missing[0]} to build the Debian guest with: run scripts/setup --test")


def _run(*words: object, stdin: str | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run([*map(str, words)], input=stdin, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        tail = (done.stdout + done.stderr).strip()[-2000:]
        raise Unavailable(f"building the Debian guest failed: {words[0]} ended with {done.returncode}:\n{tail}")
    return done.stdout


def _build(place: Path) -> DebianDisk:
    tree = place / "tree"
    _install(tree)
    core, esp = _boot_loader(tree)
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    initrd = next((tree / "boot").glob("initrd.img-*"))
    made = DebianDisk(place / "disk.qcow2", place / "vmlinuz", place / "initrd")
    shutil.copy(kernel, made.kernel)
    shutil.copy(initrd, made.initrd)
    boot_sector = (tree / "usr/lib/grub/i386-pc/boot.img").read_bytes()

    raw = tree / "disk.raw"  # where sfdisk of the new system sees it
    raw.touch()
    os.truncate(raw, (ROOT_AT + ROOT_SIZE + 1) * MIB)
    _run("chroot", tree, "sfdisk", "--quiet", "/disk.raw", stdin=TABLE)
    raw = raw.rename(place / "disk.raw")
    _write_loader(raw, boot_sector, core)
    with open(raw, "r+b") as file:
        file.seek(ESP_AT * MIB)
        file.write(esp)
    # GRUB cannot read these two, which newer versions of mke2fs turn on.
    options = ("-O", "^metadata_csum_seed,^orphan_file", "-E", f"offset={ROOT_AT * MIB},lazy_itable_init=1")
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", *options, "-d", tree, raw, f"{ROOT_SIZE}M")
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, made.path)
    return made


def _install(tree: Path) -> None:
    before = tree.parent / "before"
    _write(before, INITRD)
    (before / "etc/initramfs-tools/hooks/guest").chmod(0o755)
    proxies = [line for line in _run("apt-config", "dump", "--no-empty", "Acquire").splitlines() if "::Proxy" in line]
    _run(
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--architectures=amd64",
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        *(f"--aptopt={line}" for line in proxies),
        f'--setup-hook=cp -r {shlex.quote(str(before))}/. "$1"',
        codename(),
        tree,
        mirror(),
    )
    _write(tree, FILES)
    units = tree / "etc/systemd/system"
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    _run("chroot", tree, "systemctl", "enable", "systemd-networkd.service")


def _write(tree: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(content)


def _boot_loader(tree: Path) -> tuple[bytes, bytes]:
    """GRUB's core for BIOS, and an EFI system partition that holds it as the one removable media have."""
    version = next((tree / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    (tree / "grub.cfg").write_text(
        "search.fs_label root root\n"
        f"linux /boot/vmlinuz-{version} {COMMAND_LINE}\n"
        f"initrd /boot/initrd.img-{version}\n"
        "boot\n"
    )
    make = ("chroot", tree, "grub-mkimage", "-c", "/grub.cfg", "-p", "/boot/grub")
    _run(*make, "-O", "i386-pc", "-o", "/core.img", "biosdisk", *GRUB_MODULES)
    _run(*make, "-O", "x86_64-efi", "-o", "/core.efi", *GRUB_MODULES)
    sectors = (ROOT_AT - ESP_AT) * MIB // 512
    fat = ("chroot", tree, "mformat", "-C", "-i", "/esp.img", "-v", "ESP", "-T", sectors, "-h", 2, "-s", 32, "::")
    _run(*fat)
    _run("chroot", tree, "mmd", "-i", "/esp.img", "::/EFI", "::/EFI/BOOT")
    _run("chroot", tree, "mcopy", "-i", "/esp.img", "/core.efi", "::/EFI/BOOT/BOOTX64.EFI")
    made = (tree / "core.img").read_bytes(), (tree / "esp.img").read_bytes()
    for name in ("grub.cfg", "core.img", "core.efi", "esp.img"):
        (tree / name).unlink()
    return made


def _write_loader(disk: Path, boot_sector: bytes, core: bytes) -> None:
    """What grub-install does for BIOS: the boot sector names the sector of the core, the core that of its rest."""
    if len(core) > (ESP_AT - BIOS_AT) * MIB:
        raise Unavailable(f"GRUB's core of {len(core)} bytes is larger than its partition")
    first = BIOS_AT * MIB // 512
    patched = bytearray(core)
    struct.pack_into("<Q", patched, 0x1F4, first + 1)
    sector = bytearray(boot_sector[:440])  # behind it are the disk's signature and the protective partition
    struct.pack_into("<Q", sector, 0x5C, first)
    with open(disk, "r+b") as file:
        file.write(sector)
        file.seek(first * 512)
        file.write(patched)


def main() -> int:
    try:
        print(debian_disk().path)
    except Unavailable as error:
        print(f"tests: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
