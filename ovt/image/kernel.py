"""The kernel that guests are booted with directly: the distribution's own, fetched once by apt into a cache.

`get` returns it unpacked, not installed, below `${XDG_CACHE_HOME:-~/.cache}/ovt/kernel`: its modules decompressed and
its ELF image taken out of the bzImage, because an emulated processor takes seconds to do the same at every boot. apt
fetches and verifies it; an own source list and own package lists are used, so that the machine's apt configuration
stays as it is. Debian 13 has what is needed, Debian 12 in backports. Without a network, and on other distributions,
the kernel that the host itself was booted from serves, if it can be read.

This knows nothing of guests: what is booted on it stands in `vmimage`.
"""

from __future__ import annotations

import contextlib
import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ovt.errors import HostError, OvtError

SUITES = {"bookworm": ("bookworm", "bookworm-backports"), "trixie": ("trixie",)}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Half of all modules, and nothing that QEMU emulates.
LEFT_OUT = ("drivers/gpu", "drivers/media", "drivers/infiniband/hw", "drivers/net/wireless", "drivers/iio", "sound")
_BOOT, _MODULES = Path("/boot"), Path("/lib/modules")
_PT_NOTE = 4
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY: where the PVH boot protocol enters (xen/include/public/elfnote.h)

Report = Callable[[str], None]  # is given one line for each step that takes time


class Kernel(NamedTuple):
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


def get(report: Report) -> Kernel:
    """The newest kernel of the cache; one is fetched if there is none, which takes a minute and about 100 MB.

    HostError if none can be had, with the reasons and what to do about them.
    """
    there = cached()
    if there:
        return there
    with locked("kernel"):
        there = cached()
        if there:
            return there
        report("fetching a kernel for guests (about 100 MB, once)")
        with half_made() as target:
            try:
                return _keep(_fetch(target), target)
            except (OvtError, OSError, subprocess.SubprocessError) as error:
                failure = error
        with half_made() as target:
            own = _own(target, report)
            if own:
                report(f"no kernel could be fetched ({failure}): the host's own {own} is used")
                return _keep(own, target)
    hint = getattr(failure, "hint", "") or "make the package archive reachable, or /boot/vmlinuz-$(uname -r) readable"
    raise HostError(f"there is no kernel to boot guests with: {failure}", hint=hint)


def cached() -> Kernel | None:
    """The newest kernel in the cache, also in the place where earlier versions kept it."""
    found = [path for place in ("kernel", "lab/kernel") for path in cache().glob(f"{place}/[!.]*/vmlinuz")]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return Kernel(newest.parent.name, newest.parent) if newest else None


def cache() -> Path:
    """The directory where fetched and built things are kept for all guests of a user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ovt"


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time makes the thing `name` of the cache."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def half_made() -> Iterator[Path]:
    """A directory beside the kernels that goes away unless it is renamed; what a killed process left goes first."""
    place = cache() / "kernel"
    place.mkdir(exist_ok=True)
    for left in place.glob(".unpack-*"):
        shutil.rmtree(left)
    target = Path(tempfile.mkdtemp(dir=place, prefix=".unpack-"))
    try:
        yield target
    finally:
        if target.exists():
            shutil.rmtree(target)


def _keep(version: str, target: Path) -> Kernel:
    final = target.with_name(version)
    if final.exists():  # without its vmlinuz, else it had been found
        shutil.rmtree(final)
    target.chmod(0o755)
    target.rename(final)
    return Kernel(version, final)


# apt -------------------------------------------------------------------------------------------------------------


def suites() -> tuple[str, ...]:
    """The suites of this Debian release that hold kernel and QEMU, the preferred one last."""
    try:
        release = Path("/etc/os-release").read_text()
    except OSError:
        release = ""
    found = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.M)
    if not found or found[1] not in SUITES:
        raise HostError("kernels are fetched from Debian 12 or 13, and this is neither")
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
    """Run apt-get or apt-cache on the own lists and return what it prints; HostError with its words if it fails."""
    place = cache() / "apt"
    (place / "lists/partial").mkdir(parents=True, exist_ok=True)
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
        sources = "".join(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in suites())
        (place / "sources.list").write_text(sources)
        done = subprocess.run(
            [program, "-q", *words, *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise HostError(f"there is no {program}: kernels are taken from Debian's packages") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("E:")] or lines[-1:] or [f"status {done.returncode}"]
        raise HostError(f"{program} {' '.join(arguments)} failed: {'; '.join(errors)}"[:2000])
    return done.stdout


def update() -> None:
    """Fetch the package lists anew; apt verifies their signatures."""
    apt("apt-get", "update", "--error-on=any")


def download(package: str, directory: Path) -> Path:
    """Fetch the newest version of a package into `directory`; apt verifies its checksum against the signed lists."""
    apt("apt-get", "download", package, cwd=directory)
    found = sorted(directory.glob(f"{package.partition('=')[0]}_*.deb"))
    if len(found) != 1:
        raise HostError(f"apt-get download {package} left {len(found)} files")
    return found[0]


def _fetch(target: Path) -> str:
    """Fetch the kernel package and unpack it into `target`; the kernel's version."""
    update()
    depends = apt("apt-cache", "depends", "linux-image-amd64")
    name = re.search(r"Depends: (linux-image-\S+)", depends)
    if not name:
        raise HostError(f"apt knows no kernel package: {depends!r}")
    package = download(name[1], target)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
        exclude = [f"--exclude=*/kernel/{part}" for part in LEFT_OUT]
        subprocess.run(
            ["tar", "-x", "-C", target, "--no-same-owner", *exclude, "--wildcards", "*/modules/*", "*/vmlinuz-*"],
            stdin=archive.stdout,
            check=True,
        )
    if archive.returncode:
        raise HostError(f"{package.name} cannot be unpacked")
    package.unlink()
    image = next(target.glob("boot/vmlinuz-*"))
    if (target / "usr/lib/modules").is_dir():  # Debian 13
        (target / "usr/lib").rename(target / "lib")
    image.rename(target / "vmlinuz")
    version = image.name.removeprefix("vmlinuz-")
    _complete(target, version)
    for left in ("boot", "usr", "etc"):
        shutil.rmtree(target / left, ignore_errors=True)  # absent or empty
    return version


# The host's own kernel -------------------------------------------------------------------------------------------


def _own(target: Path, report: Report) -> str:
    """Copy the host's newest readable kernel that QEMU can start into `target`; its version, empty if there is none.

    The running one comes first: its modules are the surest to be there.
    """
    running = os.uname().release
    images = sorted(_BOOT.glob("vmlinuz-*"), key=lambda path: (path.name.endswith(f"-{running}"), path.name))
    for image in reversed(images):
        version = image.name.removeprefix("vmlinuz-")
        modules = _MODULES / version
        if not os.access(image, os.R_OK) or not (modules / "modules.builtin").is_file():
            continue
        try:
            shutil.copyfile(image, target / "vmlinuz")
            shutil.copytree(modules, target / "lib/modules" / version, ignore=_not_copied)
            _complete(target, version)
        except (OvtError, OSError, subprocess.SubprocessError) as error:
            report(f"{image} cannot be used: {error}")
            shutil.rmtree(target / "lib", ignore_errors=True)
            continue
        return version
    return ""


def _not_copied(directory: str, names: list[str]) -> list[str]:
    """What no guest needs of `names` in a directory of modules: LEFT_OUT and the links to the kernel's source."""
    parts = tuple(f"/kernel/{part}" for part in LEFT_OUT)
    return [name for name in names if name in ("build", "source") or f"{directory}/{name}".endswith(parts)]


# Unpacking -------------------------------------------------------------------------------------------------------


def _complete(target: Path, version: str) -> None:
    """Make a vmlinuz and its modules below `target` what `Kernel` describes."""
    elf = elf_image((target / "vmlinuz").read_bytes())
    if not has_pvh_entry(elf):
        raise HostError(f"kernel {version} is built without CONFIG_PVH, so QEMU cannot start it directly")
    (target / "vmlinux").write_bytes(elf)
    for suffix, command in (("xz", ["xz", "-dq"]), ("zst", ["zstd", "-dq", "--rm"]), ("gz", ["gzip", "-dq"])):
        compressed = [str(path) for path in (target / "lib").rglob(f"*.ko.{suffix}")]
        if compressed:
            names = "\0".join(compressed).encode()
            subprocess.run(["xargs", "-0", "-n", "200", "-P", "2", *command], input=names, check=True)
    depmod(target, version)


def elf_image(bzimage: bytes) -> bytes:
    """The vmlinux that a bzImage carries compressed (Documentation/arch/x86/boot.rst: payload_offset)."""
    if bzimage[0x202:0x206] != b"HdrS":
        raise HostError("the kernel is no bzImage")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length - 4]  # the last four bytes are the size, not part of the stream
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            return subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=True).stdout
        except FileNotFoundError:
            raise HostError("there is no zstd to unpack the kernel", hint="apt-get install zstd") from None
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompress(payload, 31)
    raise HostError(f"the kernel is compressed in a way that is not known here ({payload[:4].hex()})")


def has_pvh_entry(elf: bytes) -> bool:
    """Whether a 64 bit little-endian ELF image has the note by which QEMU's -kernel finds the PVH entry."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return False
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<2H", elf, 54)
    for index in range(count):
        kind, _, start, _, _, length = struct.unpack_from("<2I4Q", elf, table + index * size)
        at, end = start, min(start + length, len(elf)) - 12
        while kind == _PT_NOTE and at <= end:
            name_size, data_size, note = struct.unpack_from("<3I", elf, at)
            if note == _PHYS32_ENTRY and elf[at + 12 : at + 12 + name_size] == b"Xen\0":
                return True
            at += 12 + -(-name_size // 4) * 4 + -(-data_size // 4) * 4
    return False


def depmod(target: Path, version: str) -> None:
    """Write the index that modprobe reads."""
    program = shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise HostError("there is no depmod", hint="apt-get install kmod")
    subprocess.run([program, "-b", target, version], check=True)
