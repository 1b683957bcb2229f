"""The one store of instances: a directory each, written so that a kill at any point leaves something to finish.

    <root>/instances/<id>/instance.json   the record, replaced atomically and flushed to the disk
    <root>/instances/<id>/lock            flock(2) of whoever changes the instance
    <root>/instances/.new-<id>            an instance that is being made
    <root>/instances/.gone-<id>           an instance that is being removed
    <root>/names/<name>                   symbolic link whose text is the id: the name is taken
    <root>/lock                           flock(2) while names or instances come and go

It knows records and files, not engines: what else lies in an instance's directory belongs to others. `observe` tells
a dead instance by /proc alone, so that listing a thousand costs a thousand small reads and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ovt.errors import Conflict, HostError, NotFound, OvtError
from ovt.kernel import procfs
from ovt.model import ID_LENGTH, LIVE, Instance, Status, is_id, pack

_RECORD = "instance.json"


class Store:
    """Instances below the directory `root`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.instances = f"{root}/instances"
        self.names = f"{root}/names"

    def home(self, id: str) -> str:
        """The directory of instance `id`."""
        return f"{self.instances}/{id}"

    # reading

    def ids(self) -> list[str]:
        """The ids of all instances, in no order."""
        try:
            return [name for name in os.listdir(self.instances) if is_id(name)]
        except FileNotFoundError:
            return []

    def load(self, id: str) -> Instance:
        """The record of `id` as last written; NotFound, or OvtError when it cannot be read as a record."""
        path = f"{self.instances}/{id}/{_RECORD}"
        try:
            text = _read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no instance {id}", "ovt ps -a lists them") from None
        try:
            return Instance.unpack(json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise OvtError(f"{path} is damaged: {error}", f"ovt delete --force {id}") from error

    def load_all(self, damaged: list[str] | None = None) -> list[Instance]:
        """Every instance, oldest first; one that goes away meanwhile is left out. The ids of those whose record is
        damaged or missing are appended to `damaged`."""
        found = []
        for id in self.ids():
            try:
                found.append(self.load(id))
            except OvtError as error:
                if damaged is not None and (not isinstance(error, NotFound) or os.path.isdir(self.home(id))):
                    damaged.append(id)
        found.sort(key=lambda instance: (instance.created, instance.id))
        return found

    def resolve(self, reference: str) -> str:
        """The id for a name, an id or a unique prefix of one; NotFound or Conflict."""
        if "/" not in reference and reference not in {"", ".", ".."}:
            try:
                return os.readlink(f"{self.names}/{reference}")
            except OSError:
                pass  # not a name: perhaps an id
            if is_id(reference):
                if os.path.isdir(self.home(reference)):
                    return reference
            elif len(reference) < ID_LENGTH:
                matches = [id for id in self.ids() if id.startswith(reference)]
                if len(matches) == 1:
                    return matches[0]
                if matches:
                    raise Conflict(
                        f"{reference!r} is the beginning of {len(matches)} ids",
                        "give more digits: " + " ".join(matches),
                    )
        raise NotFound(f"there is no instance {reference!r}", "ovt ps -a lists them")

    def observe(self, instance: Instance) -> Status:
        """The status as it is now: one whose process has died without anyone writing that down is STOPPED if it was
        running, BROKEN if a command died while it changed it."""
        status = instance.status
        if status in LIVE:
            return status if self.lives(instance.pid, instance.start_time) else Status.STOPPED
        if status in {Status.CREATING, Status.RESTARTING}:
            return status if self.lives(instance.pid, instance.start_time) else Status.BROKEN
        return status

    @staticmethod
    def lives(pid: int, start_time: int) -> bool:
        """Whether `pid` is still the process that started at `start_time` and has not ended."""
        return pid > 0 and procfs.alive(pid, start_time)

    # changing

    def add(self, instance: Instance) -> None:
        """Keep a new instance; Conflict when the name is taken."""
        new = f"{self.instances}/.new-{instance.id}"
        os.makedirs(self.instances, mode=0o700, exist_ok=True)
        os.makedirs(self.names, mode=0o700, exist_ok=True)
        with self.exclusive():
            self._claim(instance.name, instance.id)
            try:
                os.mkdir(new, 0o700)
                write_json(f"{new}/{_RECORD}", pack(instance))
                os.rename(new, self.home(instance.id))
            except OSError as error:
                os.unlink(f"{self.names}/{instance.name}")
                raise HostError(f"{self.instances}: {error.strerror}", error.errno or 0) from error
            sync_directory(self.instances)

    @contextmanager
    def locked(self, reference: str, wait: bool = True) -> Iterator[Instance]:
        """The fresh record of an instance, kept from all other changes until the block ends.

        `wait=False` raises Conflict at once when another command holds it.
        """
        id = self.resolve(reference)
        fd = self._lock(id, wait)
        try:
            yield self.load(id)
        finally:
            os.close(fd)

    def save(self, instance: Instance, durable: bool = False) -> Instance:
        """Replace the record; only inside `locked`.

        After a power failure the record is whole, the new one or the one before. Only with `durable` is it the new
        one for certain: what its owner asked for must last, what runs is over then anyway.
        """
        write_json(f"{self.home(instance.id)}/{_RECORD}", pack(instance), durable)
        return instance

    def rename(self, instance: Instance, name: str) -> Instance:
        """Give the instance another name; only inside `locked`. Conflict when it is taken."""
        with self.exclusive():
            self._claim(name, instance.id)
            renamed = self.save(instance._replace(name=name), durable=True)
            self._release(instance.name, instance.id)
        return renamed

    def remove(self, instance: Instance) -> None:
        """Forget the instance and remove its directory; only inside `locked`."""
        self.discard(instance.id, instance.name)

    def discard(self, id: str, name: str = "") -> None:
        """Remove the directory of `id`, whatever state it is in, and the names that lead to it."""
        import shutil

        gone = f"{self.instances}/.gone-{id}"
        with self.exclusive():
            for taken in [name] if name else _listdir(self.names):
                self._release(taken, id)
            if os.path.isdir(self.home(id)):
                os.rename(self.home(id), gone)
                sync_directory(self.instances)
        shutil.rmtree(gone)

    def unfinished(self) -> list[str]:
        """Paths left by a command that was killed: half-made and half-removed instances, names that lead nowhere."""
        halves = (".new-", ".gone-")
        found = [f"{self.instances}/{name}" for name in _listdir(self.instances) if name.startswith(halves)]
        with self.exclusive():  # `add` claims the name before the directory has its own
            for name in _listdir(self.names):
                if not os.path.isdir(self.home(os.readlink(f"{self.names}/{name}"))):
                    found.append(f"{self.names}/{name}")
        return found

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held while names and instances come and go."""
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        fd = os.open(f"{self.root}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _claim(self, name: str, id: str) -> None:
        path = f"{self.names}/{name}"
        try:
            os.symlink(id, path)
            return
        except FileExistsError:
            holder = os.readlink(path)
        if os.path.isdir(self.home(holder)):
            raise Conflict(f"the name {name!r} is taken by {holder}", f"choose another, or ovt rename {name} NEW")
        os.unlink(path)  # left by a command that was killed
        os.symlink(id, path)

    def _release(self, name: str, id: str) -> None:
        path = f"{self.names}/{name}"
        if os.path.islink(path) and os.readlink(path) == id:
            os.unlink(path)

    def _lock(self, id: str, wait: bool) -> int:
        path = f"{self.home(id)}/lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise NotFound(f"there is no instance {id}", "ovt ps -a lists them") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not os.path.exists(path) or not os.path.samestat(os.fstat(fd), os.stat(path)):
                raise NotFound(f"the instance {id} has just been deleted")
        except BlockingIOError:
            os.close(fd)
            raise Conflict(f"another ovt command is at work on {id}", "wait for it, then try again") from None
        except BaseException:
            os.close(fd)
            raise
        return fd


def write_json(path: str, value: Any, durable: bool = True) -> None:
    """Replace the file `path` by a JSON document so that a reader, or the next boot, sees the old or the new whole.

    `durable` waits until the next boot is sure to see the new one.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb", buffering=0) as file:
        file.write(json.dumps(value, separators=(",", ":")).encode())
        os.fsync(fd)
    os.rename(temporary, path)
    if durable:
        sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Make renames in the directory `path` outlive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a third of the cost of open() and a file object
    try:
        data = os.read(fd, 65536)
        while len(data) % 65536 == 0 and (more := os.read(fd, 65536)):
            data += more
        return data
    finally:
        os.close(fd)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
