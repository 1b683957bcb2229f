"""Out-of-memory kills of a cgroup as they happen. The kernel's notification, no polling loop.

v2: memory.events becomes readable with POLLPRI. v1: an eventfd registered in cgroup.event_control counts; the kernel
also fires it when the cgroup is removed.
"""

from __future__ import annotations

import posix
from errno import ENODEV, ENOENT

from ovt.errors import HostError
from ovt.kernel.cgroup.base import Cgroup, refused
from ovt.kernel.cgroup.files import exists, read_or, write
from ovt.kernel.cgroup.stats import flat
from ovt.kernel.syscalls import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_EVENTFD2 = 290 if posix.uname().machine == "x86_64" else 19
_CLOEXEC_NONBLOCK = posix.O_CLOEXEC | posix.O_NONBLOCK


class OomWatch:
    """A pollable counter of out-of-memory kills since the watch began.

    `fd` and `poll_mask` are for a poll loop of the caller's; then `take()` tells what is new. Use as a context manager.
    """

    __slots__ = ("_count", "_source", "directory", "fd", "poll_mask")

    def __init__(self, group: Cgroup) -> None:
        directory = group.path_for("memory")
        if directory is None or not (exists(directory + "/memory.oom_control") or exists(directory + "/memory.events")):
            raise HostError(
                "cannot watch for out-of-memory kills: the container has no memory cgroup",
                ENOENT,
                "mount or enable the memory controller",
            )
        self.directory = directory
        self._source = -1
        try:
            if group.mode == "v2":
                self.fd = posix.open(directory + "/memory.events", posix.O_RDONLY | posix.O_CLOEXEC)
                self.poll_mask = 2  # POLLPRI
            else:
                self._watch_v1()
        except OSError as error:
            raise refused(f"cannot watch for out-of-memory kills in {directory}", error) from error
        self._count = self._read()

    def _watch_v1(self) -> None:
        self.fd = syscall(_EVENTFD2, 0, _CLOEXEC_NONBLOCK)
        self.poll_mask = 1  # POLLIN
        try:
            self._source = posix.open(self.directory + "/memory.oom_control", posix.O_RDONLY | posix.O_CLOEXEC)
            write(self.directory + "/cgroup.event_control", f"{self.fd} {self._source}")
        except OSError:
            self.close()
            raise

    def _read(self) -> int:
        if self._source == -1:
            try:
                text = posix.pread(self.fd, 4096, 0).decode()
            except OSError as error:
                if error.errno != ENODEV:  # the cgroup is gone
                    raise
                return self._count
            return flat(text).get("oom_kill", 0)
        return flat(read_or(self.directory + "/memory.oom_control")).get("oom_kill", 0)

    def take(self) -> int:
        """How many kills there were since the last call."""
        notified = 0
        if self._source != -1:
            try:
                notified = int.from_bytes(posix.read(self.fd, 8), "little")
            except BlockingIOError:
                notified = 0
        count = self._read()
        new, self._count = count - self._count, max(count, self._count)
        # v1 fires before it kills, so the count may lag behind; with the OOM killer off it never rises at all.
        if new <= 0 and notified and exists(self.directory):
            self._count += notified if self._kills() else 0
            return notified
        return max(new, 0)

    def _kills(self) -> bool:
        return flat(read_or(self.directory + "/memory.oom_control")).get("oom_kill_disable", 0) == 0

    def gone(self) -> bool:
        """Whether the cgroup has been removed."""
        return not exists(self.directory)

    def close(self) -> None:
        """Stop watching."""
        for fd in (self.fd, self._source):
            if fd != -1:
                posix.close(fd)
        self.fd = self._source = -1

    def __enter__(self) -> OomWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Events:
    """An iterator of `{"type": "oom"}`, watching from the moment it is made; `close()` ends it early."""

    __slots__ = ("_due", "_end", "_poller", "_watch")

    def __init__(self, group: Cgroup, timeout: float | None = None) -> None:
        from select import poll
        from time import monotonic

        self._watch = OomWatch(group)
        self._poller = poll()
        self._poller.register(self._watch.fd, self._watch.poll_mask)
        self._end = None if timeout is None else monotonic() + timeout
        self._due = 0

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    def __del__(self) -> None:
        if hasattr(self, "_watch"):  # not when there was nothing to watch
            self.close()

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> dict[str, Any]:
        from time import monotonic

        while not self._due:
            # Removal of a v2 cgroup wakes nobody, so look for it now and then.
            wait = 1.0 if self._end is None else min(1.0, self._end - monotonic())
            if self._watch.fd == -1 or wait <= 0 or self._watch.gone():
                self.close()
                raise StopIteration
            if self._poller.poll(int(wait * 1000) + 1):
                self._due = self._watch.take()
        self._due -= 1
        return {"type": "oom"}
