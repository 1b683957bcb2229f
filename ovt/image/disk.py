"""Disk images: what they are, and making, growing, converting and checking them, all by qemu-img.

What an image is, is read by `disk_header`; qemu-img runs only on what that has let pass. It is always told the format
of every image of a chain, in node descriptions that leave nothing to the headers (docs/interop/qmp: BlockdevOptions),
so that no header and no name can make it open anything else. A new image gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError, refused
from ovt.image.disk_header import FORMATS, DiskImage, probe

__all__ = [
    "FORMATS",
    "Check",
    "DiskImage",
    "chain",
    "check",
    "convert",
    "create",
    "create_overlay",
    "node",
    "probe",
    "resize",
]

_LONGEST_CHAIN = 64  # images; each costs QEMU descriptors and every read a look
_PREALLOCATIONS = ("", "off", "metadata", "falloc", "full")
_ADDRESS_SPACE = 8 << 30  # bytes; what qemu-img may take, should an image make it ask for more and more
_QUICK = 120.0  # seconds for what reads and writes headers only
_SLOW = 24 * 3600.0  # seconds for what goes through all of the data

Progress = Callable[[float], None]  # is given the fraction that is done, 0 to 1


class Check(NamedTuple):
    """What a check of an image found. Leaks only cost space."""

    supported: bool  # whether images of this format can be checked at all
    corruptions: int = 0
    leaks: int = 0


def chain(path: str, *, allow_backing: bool = False) -> list[tuple[str, str]]:
    """The images that `path` consists of, bottom to top, as (absolute path, format); itself is the last.

    One that differs from another is refused unless `allow_backing`: then names in its header are followed, relative to
    its own directory, and each image is looked at in its turn. A recorded format is believed. NotFound for an image
    that is missing, OvtError for a loop, more than 64 images, a name that is no file's, and as `probe`.
    """
    found: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    name, format, above = os.path.abspath(path), "", ""
    while name:
        try:
            image = probe(name, format=format, allow_backing=allow_backing)
        except NotFound:
            if not above:
                raise
            raise NotFound(
                f"{above} is a difference to {name}, which does not exist", "bring it back, or qemu-img rebase"
            ) from None
        info = os.stat(name)
        if (info.st_dev, info.st_ino) in seen:
            raise OvtError(f"the images below {path} form a loop: {name} is there twice")
        if len(found) == _LONGEST_CHAIN:
            raise OvtError(f"{path} has more than {_LONGEST_CHAIN} images below it", "merge them: qemu-img convert")
        seen.add((info.st_dev, info.st_ino))
        found.append((name, image.format))
        above, format = name, image.backing_format
        name = _backing_path(name, image.backing) if image.backing else ""
    return found[::-1]


def node(images: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The block node that reads the chain `images` (bottom to top) and nothing that their headers name."""
    description: dict[str, Any] | None = None
    for path, format in images:
        driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
        below = description
        description = {"driver": format, "file": {"driver": driver, "filename": os.path.abspath(path)}}
        if below is not None or format in ("qcow2", "vmdk"):  # null: nothing, whatever the header says
            description["backing"] = below
    if description is None:
        raise UsageError("a disk has at least one image")
    return description


# Making ----------------------------------------------------------------------------------------------------------


def create(path: str, size: int, preallocation: str = "", *, format: str = "qcow2") -> None:
    """Make an empty image of `size` bytes at `path`. Conflict if something is there."""
    _check_size(size)
    if format not in ("qcow2", "raw"):
        raise UsageError(f"new images are qcow2 or raw, not {format!r}")
    if preallocation not in _PREALLOCATIONS:
        raise UsageError(f"there is no preallocation {preallocation!r}", "one of off metadata falloc full")
    options = ["-o", f"preallocation={preallocation}"] if preallocation else []
    with _fresh(path) as new:
        _qemu_img(["create", "-q", "-f", format, *options, new, str(size)], path, _SLOW)


def create_overlay(path: str, backing: str, backing_format: str, size: int = 0) -> None:
    """Make a qcow2 at `path` for the differences to `backing`, `size` bytes large (0: as the image below).

    Conflict if something is at `path`; UsageError if `size` is less than what is below.
    """
    below = probe(backing, format=backing_format, allow_backing=True)
    if size and size < below.virtual_size:
        raise UsageError(
            f"{backing} has {below.virtual_size} bytes, which do not fit into a disk of {size}",
            "give at least the size of the image",
        )
    size = size or below.virtual_size
    _check_size(size)
    # -u: it need not open what is below, whose size and format it is told
    words = ["create", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", os.path.abspath(backing)]
    with _fresh(path) as new:
        _qemu_img([*words, new, str(size)], path, _QUICK)


def resize(path: str, size: int) -> None:
    """Make the disk in the image `path` `size` bytes large. UsageError for less than it has: that would lose data."""
    _check_size(size)
    images = chain(path, allow_backing=True)
    had = probe(path, format=images[-1][1], allow_backing=True).virtual_size
    if size < had:
        raise UsageError(f"{path} has {had} bytes, and cannot be made smaller than that", "make a new disk and copy")
    if size > had:
        _qemu_img(["resize", "-q", _filename(images), str(size)], path, _QUICK)
        _sync(path)


def convert(
    source: str,
    format: str,
    target: str,
    target_format: str,
    progress: Progress | None = None,
    *,
    allow_backing: bool = False,
) -> None:
    """Copy the disk in `source`, which is of `format` (empty: by its header), into a new image `target`.

    What lies below `source` is merged into it, and not allowed by default. Conflict if something is at `target`.
    """
    if target_format not in FORMATS:
        raise UsageError(f"there is no disk format {target_format!r}", f"one of {' '.join(FORMATS)}")
    if format:
        probe(source, format=format, allow_backing=allow_backing)
    images = [(os.path.abspath(source), "raw")] if format == "raw" else chain(source, allow_backing=allow_backing)
    with _fresh(target) as new:
        _qemu_img(["convert", "-p", "-O", target_format, _filename(images), new], source, _SLOW, progress)


def check(path: str) -> Check:
    """Whether the image `path` fits together inside; the images below it are not looked at."""
    image = probe(path, allow_backing=True)
    result = _qemu_img(
        ["check", "--output=json", _filename([(path, image.format)])], path, _SLOW, allowed=(0, 2, 3, 63)
    )
    if result.status == 63:
        return Check(False)
    try:
        report = json.loads(result.output)
    except ValueError:
        raise HostError(f"qemu-img check of {path} reports what is no JSON") from None
    return Check(True, report.get("corruptions", 0) + report.get("check-errors", 0), report.get("leaks", 0))


# The gate --------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    status: int
    output: str


def _qemu_img(
    arguments: list[str],
    what: str,
    timeout: float,
    progress: Progress | None = None,
    allowed: tuple[int, ...] = (0,),
) -> _Result:
    """Run qemu-img; HostError with its words unless its status is `allowed`, or after `timeout` seconds.

    Every file name among `arguments` is absolute or a node description: neither can be taken for a protocol.
    """
    import resource

    program = shutil.which("qemu-img")
    if program is None:
        raise HostError("disk images need qemu-img, and this host has none", hint="apt-get install qemu-utils")
    process = subprocess.Popen(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    with process:
        try:
            with contextlib.suppress(ProcessLookupError):  # it may have ended already
                resource.prlimit(process.pid, resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
            output, errors = _listen(process, time.monotonic() + timeout, progress)
            status = process.wait()
        except TimeoutError:
            raise HostError(f"qemu-img {arguments[0]} of {what} has not ended after {timeout:.0f} s") from None
        finally:
            process.kill()  # if it still runs, as after an interrupt
    if status not in allowed:
        lines = (errors.strip() or output.strip() or f"it ended with status {status}").splitlines()
        words = lines[-1].removeprefix("qemu-img: ")
        if "Is another process using the image" in errors:
            raise Conflict(f"disk image {what} is in use by another program", "stop the machine that it belongs to")
        hint = "make room, or choose another place" if "No space left" in words else ""
        raise HostError(f"qemu-img {arguments[0]} of {what} failed: {words}", hint=hint)
    return _Result(status, output)


def _listen(process: subprocess.Popen[bytes], deadline: float, progress: Progress | None) -> tuple[str, str]:
    """What a program writes to its two outputs until it closes them. TimeoutError."""
    if process.stdout is None or process.stderr is None:
        raise HostError("qemu-img was started without pipes")
    heard = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    first, second = heard
    open_ones = [first, second]
    while open_ones:
        ready = select.select(open_ones, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            raise TimeoutError
        for fd in ready:
            data = os.read(fd, 65536)
            heard[fd] = (heard[fd] + data)[-(1 << 20) :]
            if not data:
                open_ones.remove(fd)
            elif fd == first and progress:
                told = re.findall(rb"\((\d+(?:\.\d+)?)/100%\)", heard[fd][-len(data) - 16 :])
                if told:
                    progress(min(1.0, float(told[-1]) / 100))
    return heard[first].decode(errors="replace"), heard[second].decode(errors="replace")


@contextlib.contextmanager
def _fresh(path: str) -> Iterator[str]:
    """A new file, for the owner alone, that becomes `path` when the block ends well, and goes away if not."""
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise Conflict(f"{path} exists already", "choose another name, or remove it")
    new = f"{os.path.dirname(path)}/.{os.path.basename(path)}.{os.getpid()}.new"
    try:
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise refused(f"cannot make {path}", error) from None
    try:
        yield new
        _sync(new)
        os.rename(new, path)
        _sync(os.path.dirname(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _filename(images: Sequence[tuple[str, str]]) -> str:
    """A chain as a file name for qemu-img."""
    return "json:" + json.dumps(node(images))


def _backing_path(image: str, name: str) -> str:
    """The file that `image` means by the backing name in its header; OvtError for what is no file's name."""
    if name == "?" or ":" in name.partition("/")[0]:
        raise OvtError(f"{image} is a difference to {name!r}, which is not the name of a file")
    return os.path.normpath(os.path.join(os.path.dirname(image), name))


def _check_size(size: int) -> None:
    if size <= 0 or size % 512 or size >= 1 << 63:
        raise UsageError(f"a disk cannot have {size} bytes", "a positive multiple of 512, below 8 EiB")
