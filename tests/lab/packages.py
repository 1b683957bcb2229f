"""What the lab host is made of, from the distribution's own packages: QEMU to emulate it, the kernel it boots.

apt fetches and verifies both; nothing is downloaded by other means. Debian 13 has what is needed, Debian 12 has it in
backports: an own source list and own package lists are used, so that the machine's apt configuration stays as it is.
The kernel is unpacked, not installed, into `${XDG_CACHE_HOME:-~/.cache}/ovt/lab`, once, with its modules decompressed
and its ELF image taken out of the bzImage, because an emulated processor takes seconds to do the same at every boot.

    packages.py qemu      install QEMU (as root; nothing to do where it is new enough)
    packages.py kernel    fetch the kernel into the cache and print its version
"""

import contextlib
import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
QEMU_OLDEST = (8, 0)  # the first with igb, a NIC with SR-IOV
QEMU_PACKAGES = ("qemu-system-x86", "qemu-utils")
SUITES = {"bookworm": ("bookworm", "bookworm-backports"), "trixie": ("trixie",)}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Half of all modules, and nothing that QEMU emulates.
LEFT_OUT = ("drivers/gpu", "drivers/media", "drivers/infiniband/hw", "drivers/net/wireless", "drivers/iio", "sound")


class Unavailable(Exception):
    """The lab cannot be had on this machine; the message says why and what to do."""


@dataclass(frozen=True)
class Kernel:
    """A kernel unpacked in the cache. `version` is what `uname -r` says in it."""

    version: str
    directory: Path

    @property
    def vmlinux(self) -> Path:
        """Its ELF image, which QEMU starts directly (PVH boot protocol)."""
        return self.directory / "vmlinux"

    @property
    def vmlinuz(self) -> Path:
        """The bzImage, which survives a suspend to memory: QEMU loads an ELF image anew at every reset."""
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """What belongs to /lib/modules/VERSION."""
        return self.directory / "lib/modules" / self.version


def cache() -> Path:
    """The directory where fetched and built things are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ovt/lab"


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time makes the thing `name` of the cache."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# apt -------------------------------------------------------------------------------------------------------------


def suites() -> tuple[str, ...]:
    release = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.M)
    if not found or found[1] not in SUITES:
        raise Unavailable("the lab takes its kernel from Debian 12 or 13, and this is neither")
    return SUITES[found[1]]


def mirror() -> str:
    """Where this machine gets Debian from; a mirror that it was told to use is used here too."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(CODENAME)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in targets.stdout.splitlines():
        uri, origin, codename = [*line.split(), "", "", ""][:3]
        if origin == "Debian" and codename == suites()[0]:
            return uri.rstrip("/")
    return "http://deb.debian.org/debian"


def apt(program: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run apt-get or apt-cache on the lab's own lists and return what it prints; Unavailable with its words if not."""
    place = cache() / "apt"
    (place / "lists/partial").mkdir(parents=True, exist_ok=True)
    sources = "".join(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in suites())
    (place / "sources.list").write_text(sources)
    options = {
        "Dir::Etc::sourcelist": place / "sources.list",
        "Dir::Etc::sourceparts": "/nonexistent",
        "Dir::Etc::preferencesparts": "/nonexistent",
        "Dir::State::Lists": place / "lists",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Default-Release": suites()[-1],
        "APT::Sandbox::User": "root",  # the user _apt cannot enter a cache below a home directory
        "DPkg::Lock::Timeout": 300,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    try:
        done = subprocess.run(
            [program, "-q", *words, *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise Unavailable(f"there is no {program}: the lab takes its kernel from Debian's packages") from None
    if done.returncode:
        raise Unavailable(f"{program} {' '.join(arguments)} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


def update() -> None:
    """Fetch the package lists anew; apt verifies their signatures."""
    apt("apt-get", "update", "--error-on=any")


def download(package: str, directory: Path) -> Path:
    """Fetch the newest version of a package into `directory`; apt verifies its checksum against the signed lists."""
    apt("apt-get", "download", package, cwd=directory)
    found = sorted(directory.glob(f"{package.partition('=')[0]}_*.deb"))
    if len(found) != 1:
        raise Unavailable(f"apt-get download {package} left {len(found)} files")
    return found[0]


# QEMU ------------------------------------------------------------------------------------------------------------


def qemu_version() -> tuple[int, int] | None:
    """The version of the installed QEMU, None where there is none."""
    program = shutil.which(QEMU)
    if program is None:
        return None
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", words)
    return (int(found[1]), int(found[2])) if found else None


def require_qemu() -> str:
    """The path of a QEMU that can emulate the lab host."""
    version = qemu_version()
    if version is None or version < QEMU_OLDEST:
        had = "there is none" if version is None else f"this one is {version[0]}.{version[1]}"
        raise Unavailable(f"the lab needs {QEMU} {QEMU_OLDEST[0]} or newer and {had}: run scripts/setup --test")
    program = shutil.which(QEMU)
    assert program
    return program


def install_qemu() -> None:
    version = qemu_version()
    if version and version >= QEMU_OLDEST and shutil.which("qemu-img"):
        return
    command = f"apt-get install -t {suites()[-1]} {' '.join(QEMU_PACKAGES)}"
    if os.geteuid():
        raise Unavailable(f"QEMU is missing or too old and this is not root; as root: {command}")
    print(f"setup: installing Debian packages from {suites()[-1]}: {' '.join(QEMU_PACKAGES)}", file=sys.stderr)
    with locked("kernel"):
        update()
    apt("apt-get", "install", "-y", "--no-install-recommends", *QEMU_PACKAGES)


# The kernel ------------------------------------------------------------------------------------------------------


def elf_image(bzimage: bytes) -> bytes:
    """The vmlinux that a bzImage carries compressed (Documentation/arch/x86/boot.rst: payload_offset)."""
    if bzimage[0x202:0x206] != b"HdrS":
        raise Unavailable("the kernel package holds no bzImage")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length - 4]  # the last four bytes are the size, not part of the stream
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        done = subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=True)
        return done.stdout
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompress(payload, 31)
    raise Unavailable(f"the kernel is compressed in a way that is not known here ({payload[:4].hex()})")


def unpack(package: Path, target: Path) -> Kernel:
    """Lay out a kernel package as `Kernel` describes."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
        exclude = [f"--exclude=*/kernel/{part}" for part in LEFT_OUT]
        subprocess.run(
            ["tar", "-x", "-C", target, "--no-same-owner", *exclude, "--wildcards", "*/modules/*", "*/vmlinuz-*"],
            stdin=archive.stdout,
            check=True,
        )
    if archive.returncode:
        raise Unavailable(f"{package.name} cannot be unpacked")
    image = next(target.glob("boot/vmlinuz-*"))
    version = image.name.removeprefix("vmlinuz-")
    (target / "vmlinux").write_bytes(elf_image(image.read_bytes()))
    if (target / "usr/lib/modules").is_dir():  # Debian 13
        (target / "usr/lib").rename(target / "lib")
    compressed = [str(path) for path in target.rglob("*.ko.xz")]
    if compressed:
        names = "\0".join(compressed).encode()
        subprocess.run(["xargs", "-0", "-n", "200", "-P", "2", "xz", "-d"], input=names, check=True)
    depmod(target, version)
    image.rename(target / "vmlinuz")
    for name in ("boot", "usr", "etc"):
        shutil.rmtree(target / name, ignore_errors=True)
    return Kernel(version, target)


def depmod(target: Path, version: str) -> None:
    """Write the index that modprobe reads."""
    program = shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise Unavailable("there is no depmod (Debian package kmod): run scripts/setup --test")
    subprocess.run([program, "-b", target, version], check=True)


def cached() -> Kernel | None:
    """The newest kernel in the cache."""
    # pathlib's * takes dot files too, and those are unfinished.
    found = sorted(cache().glob("kernel/[!.]*/vmlinuz"), key=lambda path: path.stat().st_mtime)
    return Kernel(found[-1].parent.name, found[-1].parent) if found else None


def kernel() -> Kernel:
    """The lab's kernel, fetched if the cache has none. Raises Unavailable."""
    try:
        return find_or_fetch()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the lab's kernel cannot be had: {error}") from error


def find_or_fetch() -> Kernel:
    with locked("kernel"):
        there = cached()
        if there:
            return there
        print("lab: fetching the kernel (about 100 MB, once)", file=sys.stderr)
        update()
        depends = apt("apt-cache", "depends", "linux-image-amd64")
        name = re.search(r"Depends: (linux-image-\S+)", depends)
        if not name:
            raise Unavailable(f"apt knows no kernel package: {depends!r}")
        place = cache() / "kernel"
        place.mkdir(exist_ok=True)
        for unfinished in place.glob(".*"):
            shutil.rmtree(unfinished)
        with tempfile.TemporaryDirectory(dir=place, prefix=".download-") as download_directory:
            package = download(name[1], Path(download_directory))
            target = Path(tempfile.mkdtemp(dir=place, prefix=".unpack-"))
            made = unpack(package, target)
            target.chmod(0o755)
            target.rename(place / made.version)
        return Kernel(made.version, place / made.version)


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["qemu"]:
            install_qemu()
        elif arguments == ["kernel"]:
            print(kernel().version)
        else:
            print("usage: packages.py qemu | kernel", file=sys.stderr)
            return 2
    except Unavailable as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
