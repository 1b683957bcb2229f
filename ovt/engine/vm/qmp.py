"""A synchronous client of the QEMU Machine Protocol (docs/interop/qmp-spec.rst), with events and descriptors.

Synchronous and our own because a command of ovt makes a handful of calls and ends: `qemu.qmp` brings asyncio, which
takes longer to import (70–100 ms) than all the calls take. One object is one connection, for one thread; QEMU serves
one connection of a socket at a time, so a second one waits in `connect` until the first is closed.
"""

from __future__ import annotations

import array
import collections
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ovt.errors import Conflict, HostError, OvtError

Event = dict[str, Any]
_LONGEST = 64 << 20  # bytes of one message; the largest real one, query-qmp-schema, has about 250 KB
_FDS_AT_ONCE = 1  # QEMU takes one descriptor with one command


class QmpError(OvtError):
    """QEMU refused a command; `error_class` is QMP's, nearly always GenericError."""

    def __init__(self, message: str, error_class: str = "GenericError", hint: str = "") -> None:
        super().__init__(message, hint)
        self.error_class = error_class


class Gone(HostError):
    """QEMU has ended, or closed the connection."""


@contextlib.contextmanager
def socket_path(path: str) -> Iterator[str]:
    """A path by which a unix socket at `path` can be reached however long that is: sun_path holds 107 bytes."""
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(path: str, backlog: int = 8) -> socket.socket:
    """A unix socket that listens at `path`, which only its owner can reach; what was there before is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_path(path) as short:
            if os.path.lexists(path):
                os.unlink(path)
            os.fchmod(listener.fileno(), 0o600)  # before it is bound, this sets the mode of the file to be
            listener.bind(short)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


class Qmp:
    """One connection. `events` holds what has come in and nobody has looked at, oldest first."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._numbers = itertools.count(1)
        self.events: collections.deque[Event] = collections.deque(maxlen=10_000)
        self.greeting: dict[str, Any] = {}

    @classmethod
    def connect(cls, path: str, timeout: float = 10.0) -> Qmp:
        """Reach the QEMU that listens at `path`.

        Gone when none does; Conflict when another command is connected for longer than `timeout` seconds.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            with socket_path(path) as short:
                connection.connect(short)
            client = cls(connection)
            client.negotiate(timeout)
        except TimeoutError:
            connection.close()
            raise Conflict("QEMU is busy with another command", "try again when that has ended") from None
        except (FileNotFoundError, ConnectionError):
            connection.close()
            raise Gone("QEMU does not answer: it has ended") from None
        except BaseException:
            connection.close()
            raise
        return client

    def negotiate(self, timeout: float = 10.0) -> None:
        """Read the greeting and leave negotiation mode; TimeoutError when no greeting comes."""
        message = self._receive(time.monotonic() + timeout)
        if not isinstance(message.get("QMP"), dict):
            raise HostError(f"this is no QMP server: it greets with {str(message)[:100]}")
        self.greeting = message["QMP"]
        self.command("qmp_capabilities", timeout=timeout)

    @property
    def version(self) -> tuple[int, int, int]:
        """The version of QEMU, from its greeting."""
        numbers = self.greeting["version"]["qemu"]
        return (numbers["major"], numbers["minor"], numbers["micro"])

    def fileno(self) -> int:
        return self._socket.fileno()

    def detach(self) -> int:
        """Give the connection's descriptor away; this object is closed then."""
        return self._socket.detach()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    # commands

    def command(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, fds: Sequence[int] = (), timeout: float = 60.0
    ) -> Any:
        """Make a call and return its result. `fds` (at most one) go along by SCM_RIGHTS.

        QmpError when QEMU refuses, Gone when it ended meanwhile, HostError when no answer came in `timeout` seconds:
        the connection is of no use then.
        """
        number = next(self._numbers)
        request: dict[str, Any] = {"execute": name, "id": number}
        if arguments:
            request["arguments"] = arguments
        deadline = time.monotonic() + timeout
        try:
            self._send(json.dumps(request).encode(), fds, timeout)
            while True:
                message = self._receive(deadline)
                if message.get("id") == number and ("return" in message or "error" in message):
                    break
                if "event" in message:
                    self.events.append(message)
                elif "error" in message and "id" not in message:  # QEMU could not even read it
                    break
        except TimeoutError:
            raise HostError(f"QEMU has not answered {name} for {timeout:g} seconds") from None
        if "error" in message:
            error = message["error"]
            raise QmpError(f"{name}: {error.get('desc', error)}", error.get("class", "GenericError"))
        return message["return"]

    def add_fd(self, fd: int, fdset: int | None = None, opaque: str = "") -> int:
        """Give QEMU a duplicate of `fd`; the number N of its set, which QEMU opens as /dev/fdset/N."""
        arguments: dict[str, Any] = {}
        if fdset is not None:
            arguments["fdset-id"] = fdset
        if opaque:
            arguments["opaque"] = opaque
        return int(self.command("add-fd", arguments, fds=(fd,))["fdset-id"])

    def get_fd(self, fd: int, name: str) -> None:
        """Give QEMU a duplicate of `fd` under a name, for commands that take such (netdev_add, migrate)."""
        self.command("getfd", {"fdname": name}, fds=(fd,))

    # events and jobs

    def wait_event(self, *names: str, timeout: float, where: Callable[[Event], bool] | None = None) -> Event:
        """The oldest event with one of these names that `where` holds for, taken from `events`; others stay there.

        TimeoutError when none has come in `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for event in itertools.islice(self.events, seen, None):
                seen += 1
                if event["event"] in names and (where is None or where(event)):
                    self.events.remove(event)
                    return event
            message = self._receive(deadline)
            if "event" in message:
                if len(self.events) == self.events.maxlen:
                    seen -= 1
                self.events.append(message)

    def take_events(self) -> list[Event]:
        """All events so far, without waiting."""
        with contextlib.suppress(TimeoutError):
            while True:
                message = self._receive(0.0)
                if "event" in message:
                    self.events.append(message)
        found = list(self.events)
        self.events.clear()
        return found

    def run_job(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        timeout: float = 86400.0,
        progress: Callable[[int, int], None] | None = None,
        until: str = "concluded",
    ) -> None:
        """Make a call that starts the job `arguments["job-id"]`, and see it to its end (or to `until`, such as ready).

        The job has to be one that is not dismissed by itself (`auto-dismiss` false for block jobs); at its end it is
        dismissed here. `progress` hears (done, total), in bytes for block jobs. QmpError with the job's own error;
        TimeoutError when it goes on after `timeout` seconds, and whatever happens here (also ^C) it is cancelled.
        """
        job = arguments["job-id"]
        self.command(name, arguments)
        try:
            self.watch_job(job, timeout=timeout, progress=progress, until=until)
        except QmpError:
            raise
        except BaseException:
            with contextlib.suppress(OvtError):
                self.command("job-cancel", {"id": job})
                self.watch_job(job, timeout=30.0)
            raise

    def watch_job(
        self,
        job: str,
        *,
        timeout: float = 86400.0,
        progress: Callable[[int, int], None] | None = None,
        until: str = "concluded",
    ) -> None:
        """See a running job to its end, or to the state `until`; see run_job."""
        deadline = time.monotonic() + timeout
        while True:
            found = next((entry for entry in self.command("query-jobs") if entry["id"] == job), None)
            if found is None:
                raise QmpError(f"job {job} has vanished")
            if progress:
                progress(found["current-progress"], found["total-progress"])
            if found["status"] == "concluded":
                self.command("job-dismiss", {"id": job})
                if "error" in found:
                    raise QmpError(f"{found['type']}: {found['error']}")
                return
            if found["status"] == until:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {found['status']} after {timeout:g} seconds")
            with contextlib.suppress(TimeoutError):
                self.wait_event("JOB_STATUS_CHANGE", timeout=0.2, where=lambda event: event["data"]["id"] == job)

    # the wire

    def _send(self, raw: bytes, fds: Sequence[int], timeout: float) -> None:
        self._socket.settimeout(timeout)
        if len(fds) > _FDS_AT_ONCE:
            raise ValueError("QEMU takes one descriptor at a time")
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                raw = raw[self._socket.sendmsg([raw], rights) :]
            self._socket.sendall(raw)
        except ConnectionError:
            raise Gone("QEMU has ended") from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; TimeoutError when it is not complete at `deadline`, and nothing of it is lost then."""
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.0, deadline - time.monotonic()) or 1e-6)
            try:
                chunk = self._socket.recv(1 << 16)
            except BlockingIOError:
                raise TimeoutError from None
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise Gone("QEMU has ended")
            self._buffer += chunk
            if len(self._buffer) > _LONGEST:
                raise HostError(f"QEMU sent a message of more than {_LONGEST >> 20} MiB")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            raise HostError(f"QEMU sent something that is not JSON: {line[:100]!r}") from None
        if not isinstance(message, dict):
            raise HostError(f"QEMU sent something that is no message: {line[:100]!r}")
        return message
