"""Where root file systems come from: a directory, a tar archive, or the built-in `busybox`.

`resolve` turns what a person wrote into an `Image`: layers of directories that nobody changes, and the defaults for
what runs on them. Archives are unpacked once into a cache, under the digest of their bytes; registries are not known
here.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ovt.errors import NotFound, OvtError, UsageError
from ovt.model import Kind

BUSYBOX = "busybox"
_TEMPORARY = ".new-"
_ISO = 0x8000  # where the first descriptor of an ISO 9660 file system is

Report = Callable[[str], None]  # is given one line for each step that takes time
Mapped = Callable[[Callable[[], None]], None]  # runs a function with the owner's ids mapped


class Image(NamedTuple):
    """Directories that make a root file system, topmost first, and the defaults of what runs on it."""

    reference: str
    layers: tuple[str, ...]
    cached: bool  # the layers are ovt's own, not the directory that was named
    digest: str = ""
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


def kind(reference: str) -> Kind:
    """What an instance of this image is to be: a machine if it is a disk image, else a container."""
    path = os.path.abspath(os.path.expanduser(reference))
    if reference == BUSYBOX or not os.path.isfile(path):
        return Kind.CONTAINER
    with open(path, "rb") as file:
        head = file.read(_ISO + 6)
    disk = (
        head.startswith((b"QFI\xfb", b"KDMV", b"COWD", b"# Disk DescriptorFile", b"vhdxfile", b"conectix"))
        or head[0x40:0x44] == b"\x7f\x10\xda\xbe"  # VDI
        or head[_ISO + 1 : _ISO + 6] == b"CD001"
        or (head[510:512] == b"\x55\xaa" and head[257:262] != b"ustar")  # a boot sector
        or path.endswith((".raw", ".img"))
    )
    return Kind.VM if disk else Kind.CONTAINER


def resolve(reference: str, cache: str, report: Report, mapped: Mapped) -> Image:
    """The image that `reference` names: `busybox`, or the path of a directory or a tar archive.

    `cache` is where archives are unpacked. `mapped` runs what writes files with other owners: directly for root, in
    a user namespace for anyone else. NotFound, UsageError for what is no image, OvtError for a damaged archive.
    """
    if reference == BUSYBOX:
        from ovt.image import busybox

        program, version = busybox.find()
        layer = _cached(cache, f"busybox-{version}", lambda root: mapped(lambda: busybox.build(program, root)))
        return Image(reference, (layer,), True, "", ("sh",))
    path = os.path.abspath(os.path.expanduser(reference))
    if os.path.isdir(path):
        return Image(path, (path,), False, "", ("/bin/sh",))
    if os.path.isfile(path):
        from ovt.image import archive

        digest = archive.digest(path)

        def fill(root: str) -> None:
            report(f"unpacking {reference}")
            mapped(lambda: archive.unpack(path, root, report))

        return Image(path, (_cached(cache, digest, fill),), True, f"sha256:{digest}", ("/bin/sh",))
    if os.path.exists(path):
        raise UsageError(f"{reference} is neither a directory nor a file", "give a root file system or a tar archive")
    raise NotFound(
        f"there is no image {reference!r}", "a directory with a root file system, a tar archive of one, or busybox"
    )


def half_made(cache: str) -> list[str]:
    """Directories left in the cache by a command that was killed while it unpacked."""
    found = []
    for name in _listdir(cache):
        if name.startswith(_TEMPORARY):
            with _exclusive(cache, name.removeprefix(_TEMPORARY), wait=False) as mine:
                if mine:
                    found.append(f"{cache}/{name}")
    return found


def _cached(cache: str, key: str, fill: Callable[[str], None]) -> str:
    """The directory `<cache>/<key>`, made by `fill` if it is not there; whole or absent, also after a kill."""
    final = f"{cache}/{key}"
    if os.path.isdir(final):
        return final
    os.makedirs(cache, mode=0o711, exist_ok=True)
    with _exclusive(cache, key):
        if os.path.isdir(final):
            return final
        temporary = f"{cache}/{_TEMPORARY}{key}"
        if os.path.isdir(temporary):
            import shutil

            shutil.rmtree(temporary)
        os.mkdir(temporary)
        os.chmod(temporary, 0o755)  # whatever the caller's umask
        try:
            fill(temporary)
            os.rename(temporary, final)
        except OvtError:
            import shutil

            shutil.rmtree(temporary, ignore_errors=True)  # what stays is found by half_made; the error matters more
            raise
    return final


@contextmanager
def _exclusive(cache: str, key: str, wait: bool = True) -> Iterator[bool]:
    fd = os.open(f"{cache}/.lock-{key}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
