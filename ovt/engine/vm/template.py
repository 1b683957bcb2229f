"""Templates: the memory, devices and disks of a booted guest as files, from which copies go on at once.

    <data>/templates/<name>/template.json   the record, written last
    <data>/templates/<name>/memory          the guest's memory, mapped copy-on-write by every fork (where QEMU can)
    <data>/templates/<name>/state           devices, and without `memory` the memory too (see memory_state.py)
    <data>/templates/<name>/disks/          frozen layers, below which forks have layers of their own
    <data>/templates/.new-<name>.<pid>      one that is being made, locked by its maker
    <data>/templates/.gone-<name>.<pid>     one that is being removed

A fork's QEMU gets a descriptor of `memory` that is open for reading, and opens it again for reading: the file's mode
is 0444, so that QEMU, another user than ours, may do just that; no one else comes through the directory, whose mode is
0700. A template is its owner's alone: memory that two users share tells the one about the other by its timing.

Who starts QEMU and knows instances is the engine; this module has files and the three conversations over QMP.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from ovt.engine.vm import memory_state
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware, replace_json
from ovt.engine.vm.memory_state import DEVICES, Progress, Saved
from ovt.engine.vm.qmp import Qmp
from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError, refused
from ovt.model import check_name

VERSION = 1
RECORD, MEMORY, STATE, DISKS = "template.json", "memory", "state", "disks"
_NEW, _GONE = ".new-", ".gone-"
_FICLONE = 0x40049409  # ioctl: a copy that shares its blocks (linux/fs.h)


class Template(NamedTuple):
    """The record of one template. Sizes in bytes, times in seconds since the epoch."""

    name: str
    owner: int  # uid
    created: float
    image: str  # what the guest was made from, as its owner wrote it
    digest: str  # of that image; empty when it has none
    source: str  # name of the guest it was taken from
    hardware: dict[str, Any]  # Hardware.pack() of the guest as it was taken: without NICs
    state: Saved
    memory: int = 0  # size of the file `memory`; 0: there is none, and a fork loads `state` into memory of its own
    disks: tuple[str, ...] = ()  # names of the frozen layers in disks/
    version: int = VERSION

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "state": Saved.unpack(data["state"]), "disks": tuple(data["disks"])})

    def pack(self) -> dict[str, Any]:
        return {**self._asdict(), "state": self.state._asdict()}


def why_not_shared(hardware: Hardware, features: Features) -> str:
    """Why forks of such a machine cannot map one memory file; empty when they can.

    QEMU writes what it skips by `x-ignore-shared` nowhere, so all memory has to be the one file.
    """
    if not features.ignore_shared or not features.mapped_ram:
        return "this QEMU is too old to start a machine on a memory file that is only read (9.0 is needed)"
    if hardware.numa > 1 or hardware.dimms:
        return "its memory has several parts (NUMA nodes, plugged memory)"
    if hardware.hugepages:
        return "its memory is in huge pages"
    if hardware.shared_memory:
        return "its memory is shared with other processes (virtiofs)"
    return ""


@contextlib.contextmanager
def scratch(hardware: Hardware) -> Iterator[int]:
    """A descriptor of the file that is the memory of the QEMU that splits a state (see `split`).

    It is in the host's memory: loading into a file on a disk is four times slower, a page fault at a time.
    """
    fd = os.memfd_create("template", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, hardware.memory)
        yield fd
    finally:
        os.close(fd)


def split(qmp: Qmp, features: Features, state: int, saved: Saved, devices: int) -> Saved:
    """Take a saved state apart into memory and devices.

    `qmp` is of a QEMU that was started for this with `-incoming defer` and `scratch` as its shared memory: loading
    fills that, saving again without shared memory gives the rest, a few hundred KiB, into the descriptor `devices`.
    The guest never runs in it; end it afterwards. Errors as of memory_state.load and write.
    """
    if not all(backend["share"] for backend in qmp.command("query-memdev")):
        raise HostError("the memory of the QEMU that splits a state has to be a shared file")
    memory_state.load(qmp, features, state, saved)
    return memory_state.write(qmp, features, devices, DEVICES)


class Templates:
    """The templates below the directory `data` of one user."""

    def __init__(self, data: str) -> None:
        self.root = f"{data}/templates"

    def home(self, name: str) -> str:
        """The directory of a template."""
        return f"{self.root}/{name}"

    # Reading

    def load(self, name: str) -> Template:
        """NotFound; HostError for one of another user; OvtError for a damaged one."""
        check_name(name)
        home = self.home(name)
        try:
            owner = os.lstat(home).st_uid
            if owner != os.geteuid():
                raise HostError(f"template {name} belongs to uid {owner}", hint="templates are not shared")
            with open(f"{home}/{RECORD}", encoding="utf-8") as file:
                data = json.load(file)
            if data["version"] != VERSION:
                raise OvtError(f"template {name} is of version {data['version']}", "use a newer ovt")
            return Template.unpack(data)
        except FileNotFoundError:
            raise NotFound(f"there is no template {name!r}", "ovt template list") from None
        except (ValueError, TypeError, KeyError) as error:
            raise OvtError(f"template {name} is damaged: {error}", f"ovt template delete {name}") from None

    def all(self, damaged: list[str] | None = None) -> list[Template]:
        """Every template, oldest first; names of those that cannot be read are appended to `damaged`."""
        found: list[Template] = []
        for name in self._entries():
            if name.startswith("."):
                continue
            try:
                found.append(self.load(name))
            except NotFound:
                pass  # it has just been removed
            except OvtError:
                if damaged is not None:
                    damaged.append(name)
        return sorted(found, key=lambda template: (template.created, template.name))

    def find_for(self, image: str, digest: str = "", memory: int = 0, vcpus: int = 0) -> Template | None:
        """The newest template of a guest of this image, and of this many bytes and processors if they are given.

        With a digest the content of the image counts, otherwise its name.
        """
        for template in self.all()[::-1]:
            same = template.digest == digest if digest else template.image == image
            hardware = template.hardware
            if same and memory in {0, hardware["memory"]} and vcpus in {0, hardware["vcpus"]}:
                return template
        return None

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[Template]:
        """A template that cannot be deleted inside the block: long enough to write down that an instance uses it."""
        template = self.load(name)
        with self._locked(name, fcntl.LOCK_SH):
            yield template

    def open_memory(self, template: Template) -> int:
        """A descriptor for reading the memory file; -1 when there is none, and OvtError when it was cut."""
        if not template.memory:
            return -1
        fd = self._open(template, MEMORY)
        info = os.fstat(fd)
        if info.st_size != template.memory or info.st_mode & 0o222:
            os.close(fd)
            what = "can be written to" if info.st_mode & 0o222 else f"has {info.st_size} bytes"
            raise OvtError(
                f"the memory of template {template.name} is damaged: it {what}",
                f"ovt template delete {template.name}, and make it again",
            )
        return fd

    def fork(self, qmp: Qmp, features: Features, template: Template, *, progress: Progress | None = None) -> None:
        """Bring a QEMU that was started on `open_memory` with `-incoming defer` to where the template was taken.

        The guest stands still then: plug in its NICs, then `cont`.
        """
        fd = self._open(template, STATE)
        try:
            memory_state.load(qmp, features, fd, template.state, progress=progress)
        finally:
            os.close(fd)

    def _open(self, template: Template, file: str) -> int:
        try:
            return os.open(f"{self.home(template.name)}/{file}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise OvtError(
                f"the file {file!r} of template {template.name} has vanished",
                f"ovt template delete {template.name}, and make it again",
            ) from None

    # Changing

    @contextlib.contextmanager
    def new(self, name: str) -> Iterator[Building]:
        """A template in the making; it is there when `Building.finish` was called, and gone without a trace otherwise.

        Conflict when the name is taken.
        """
        check_name(name)
        if os.path.lexists(self.home(name)):
            raise Conflict(f"there is a template {name!r} already", f"ovt template delete {name}, or another name")
        path = f"{self.root}/{_NEW}{name}.{os.getpid()}"
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(root, fcntl.LOCK_SH)  # `leftovers` does not see it between these two calls
            os.mkdir(path, 0o700)
            os.mkdir(f"{path}/{DISKS}", 0o700)
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            os.close(root)
        try:
            yield Building(self.home(name), path)
        finally:
            os.close(lock)
            shutil.rmtree(path, ignore_errors=True)  # renamed away when it was finished

    def delete(self, name: str, users: Callable[[], list[str]]) -> None:
        """Remove a template, also a damaged one. Conflict while there are `users`, the names of its forks."""
        check_name(name)
        if not os.path.isdir(self.home(name)):
            raise NotFound(f"there is no template {name!r}", "ovt template list")
        with self._locked(name, fcntl.LOCK_EX):
            if used := users():
                raise Conflict(
                    f"template {name} is in use by {', '.join(used)}", f"ovt delete {' '.join(used)}, then again"
                )
            gone = f"{self.root}/{_GONE}{name}.{os.getpid()}"
            os.rename(self.home(name), gone)
            _sync(self.root)
            shutil.rmtree(gone)

    def leftovers(self, remove: bool = False) -> list[str]:
        """Paths of what a killed command has left half-made or half-removed; with `remove` they are taken away."""
        found = []
        with _flocked(self.root, fcntl.LOCK_EX) as got:
            for name in self._entries() if got else []:
                path = f"{self.root}/{name}"
                if not name.startswith((_NEW, _GONE)):
                    continue
                with _flocked(path, fcntl.LOCK_EX) as free:
                    if free:
                        found.append(path)
                        if remove:
                            shutil.rmtree(path)
        return found

    def _entries(self) -> list[str]:
        try:
            return sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _locked(self, name: str, mode: int) -> Iterator[None]:
        with _flocked(self.home(name), mode) as got:
            if got is None or not os.path.isdir(self.home(name)):
                raise NotFound(f"there is no template {name!r}", "ovt template list")
            if not got:
                raise Conflict(f"another command is at work on template {name}", "try again when it is done")
            yield


class Building:
    """The files of a template that is being made, in `path`; `finish` puts it in its place `home`."""

    def __init__(self, home: str, path: str) -> None:
        self.home = home
        self.path = path

    @contextlib.contextmanager
    def file(self, name: str, size: int = 0) -> Iterator[int]:
        """A new file of this size (all holes), open for reading and writing inside the block."""
        fd = os.open(f"{self.path}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            yield fd
        finally:
            os.close(fd)

    def keep_memory(self, scratch: int) -> None:
        """Keep what `split` has left in `scratch`; only what the guest has used takes room."""
        with self.file(MEMORY) as fd:
            _copy_data(scratch, fd)

    def remove(self, name: str) -> None:
        """Take a file away that was needed on the way only."""
        os.unlink(f"{self.path}/{name}")

    def keep_disk(self, source: str, name: str) -> str:
        """Keep a copy of a layer that nothing is written to at this moment; its path in the finished template.

        Its blocks are shared where the file system can. Not a second name for the same file: a snapshot of the source
        that is deleted would be merged into it.
        """
        target = f"{self.path}/{DISKS}/{name}"
        _copy(source, target)
        os.chmod(target, 0o444)
        return f"{self.home}/{DISKS}/{name}"

    def keep_disks(self, home: str, hardware: Hardware) -> Hardware:
        """Keep every image of a machine that lies in its `home`; the hardware that stands on the kept ones.

        `hardware` is that of the moment when the memory was saved, and the guest must stand still since.
        UsageError for a disk that is written to directly, into an image of its owner's: nobody can freeze that.
        """
        kept = hardware.copy()
        for disk in kept.disks:
            chain = disk.get("chain") or []
            read = disk.get("readonly") or disk.get("device") == "cdrom"
            if chain and not read and chain[-1]["path"].startswith("/"):
                raise UsageError(
                    f"disk {disk['id']} is {chain[-1]['path']} itself", "only disks of mode overlay go along"
                )
            for number, layer in enumerate(chain):
                if not layer["path"].startswith("/"):
                    layer["path"] = self.keep_disk(f"{home}/{layer['path']}", f"{disk['id']}.{number}")
        return kept

    def finish(self, template: Template) -> Template:
        """Write the record and put everything in its place; Conflict when another was faster."""
        if template.memory:
            memory = f"{self.path}/{MEMORY}"
            os.chmod(memory, 0o444)
            _sync(memory)
        template = template._replace(disks=tuple(sorted(os.listdir(f"{self.path}/{DISKS}"))))
        for path in (f"{self.path}/{DISKS}/{disk}" for disk in template.disks):
            _sync(path)
        _sync(f"{self.path}/{DISKS}")
        replace_json(f"{self.path}/{RECORD}", template.pack())
        try:
            os.rename(self.path, self.home)
        except OSError as error:
            if os.path.lexists(self.home):
                raise Conflict(f"there is a template {template.name!r} already", "choose another name") from None
            raise refused(self.home, error) from None
        _sync(os.path.dirname(self.home))
        return template


def record(
    name: str,
    hardware: Hardware,
    state: Saved,
    *,
    image: str,
    digest: str = "",
    source: str = "",
    shared: bool = True,
) -> Template:
    """The record of a template taken now. `hardware` without NICs, as the guest had none when it was taken.

    `shared`: there is a memory file.
    """
    memory = hardware.memory if shared else 0
    return Template(name, os.geteuid(), time.time(), image, digest, source, hardware.pack(), state, memory)


def _copy(source: str, target: str) -> None:
    """A file with the same content: its blocks shared where the file system can, its holes kept where not."""
    with open(source, "rb") as old, open(target, "xb") as new:
        os.fchmod(new.fileno(), 0o600)
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        except OSError:
            _copy_data(old.fileno(), new.fileno())


def _copy_data(old: int, new: int) -> None:
    """Fill an empty file with the content of another; holes stay holes."""
    size = os.fstat(old).st_size
    os.ftruncate(new, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(old, end, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole up to the end
        end = os.lseek(old, start, os.SEEK_HOLE)
        os.lseek(new, start, os.SEEK_SET)
        while start < end:
            start += os.sendfile(new, old, start, end - start)


@contextlib.contextmanager
def _flocked(path: str, mode: int) -> Iterator[bool | None]:
    """The lock of a directory: True with it held, False when someone else holds it, None without such a directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
            got = True
        except BlockingIOError:
            got = False
        yield got
    finally:
        os.close(fd)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
