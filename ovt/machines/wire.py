"""What two hosts say to each other while a machine moves: messages on one connection, one answer to each request.

A message is four bytes of length, big-endian, and so many bytes of a JSON object whose `type` says what it is. The
sending host asks, the receiving host answers; a file follows its announcement as it is. Other connections carry what
QEMU sends, unread; each begins with a line that says where it belongs (`header`). How connections are made is
transport.py's business; what the messages mean is told in migrate.py and receive.py.
"""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any

from ovt.errors import HostError, OvtError

VERSION = 1  # counts changes that the other side has to know
SILENCE = 30.0  # seconds without a word after which the receiving side takes the other for dead
PING = 3.0  # seconds between two words of the sending side
_LONGEST = 16 << 20
_CHUNK = 1 << 20
_HEADER = 4096

Message = dict[str, Any]


class PeerGone(HostError):
    """The other host does not answer any more; whether it got the last message is not known."""


class PeerRefused(HostError):
    """The other host answered that it cannot; `kind` is the name of its error's class."""

    def __init__(self, message: str, hint: str, kind: str) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class Control:
    """The connection that carries messages. `reader` and `writer` are descriptors, the same for a socket; they stay
    the caller's, who closes them."""

    def __init__(self, reader: int, writer: int, peer: str) -> None:
        self._reader = reader
        self._writer = writer
        self.peer = peer
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)

    def send(self, type: str, /, **fields: Any) -> None:
        """Send a message; PeerGone."""
        body = json.dumps({"type": type, **fields}, separators=(",", ":")).encode()
        if len(body) > _LONGEST:
            raise HostError(f"a message of {len(body) >> 20} MiB is too long")
        self._write(len(body).to_bytes(4, "big") + body)

    def receive(self, timeout: float) -> Message:
        """The next message; PeerGone when the connection ends or nothing whole has come in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        length = int.from_bytes(self._read(4, deadline), "big")
        if length > _LONGEST:
            raise HostError(f"{self.peer} does not speak ovt's protocol: a message of {length} bytes")
        try:
            message = json.loads(self._read(length, deadline))
        except ValueError:
            raise HostError(f"{self.peer} does not speak ovt's protocol: that is no JSON") from None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise HostError(f"{self.peer} does not speak ovt's protocol: that is no message")
        return message

    def call(self, type: str, expected: str, /, *, timeout: float = 60.0, **fields: Any) -> Message:
        """Send a request and return the answer, which has to be of type `expected`; PeerRefused for an error."""
        self.send(type, **fields)
        return self.answer(expected, timeout)

    def answer(self, expected: str, timeout: float = 60.0) -> Message:
        """The answer to what was sent before; see `call`."""
        message = self.receive(timeout)
        if message["type"] == "error":
            words, hint = str(message.get("message", "it does not say why")), str(message.get("hint", ""))
            raise PeerRefused(f"{self.peer}: {words}", hint, str(message.get("kind", "")))
        if message["type"] != expected:
            raise HostError(f"{self.peer} answered {message['type']!r} where {expected!r} was due")
        return message

    def send_error(self, error: OvtError) -> None:
        """Answer that it cannot be done."""
        self.send("error", message=error.message, hint=error.hint, kind=error.__class__.__name__)

    def send_file(self, fd: int, size: int) -> None:
        """Send `size` bytes from `fd` as they are; HostError when the file is shorter."""
        left = size
        while left:
            data = os.read(fd, min(left, _CHUNK))
            if not data:
                raise HostError(f"a file became {left} bytes shorter while it was sent")
            self._write(data)
            left -= len(data)

    def receive_file(self, fd: int, size: int, timeout: float = SILENCE) -> None:
        """Write the next `size` bytes to `fd`; PeerGone when nothing comes for `timeout` seconds.

        All of them are read even when the first cannot be written, so that what follows is a message again.
        """
        left, failed = size, None
        while left:
            data = self._some(min(left, _CHUNK), time.monotonic() + timeout)
            left -= len(data)
            try:
                while data and failed is None:
                    data = data[os.write(fd, data) :]
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def _read(self, count: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            parts += self._some(count - len(parts), deadline)
        return bytes(parts)

    def _some(self, most: int, deadline: float) -> bytes:
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise PeerGone(f"{self.peer} is silent")
        try:
            data = os.read(self._reader, min(most, _CHUNK))
        except BlockingIOError:
            return b""
        except OSError as error:
            raise PeerGone(f"the connection to {self.peer} is lost: {os.strerror(error.errno or 0).lower()}") from None
        if not data:
            raise PeerGone(f"{self.peer} has closed the connection")
        return data

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        poller = select.poll()
        poller.register(self._writer, select.POLLOUT)
        while view:
            if not poller.poll(SILENCE * 1000):
                raise PeerGone(f"{self.peer} takes nothing any more")
            try:
                view = view[os.write(self._writer, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                reason = os.strerror(error.errno or 0).lower()
                raise PeerGone(f"the connection to {self.peer} is lost: {reason}") from None


def header(**fields: str) -> bytes:
    """The line a connection to a listening ovt begins with: nothing for a session, token and channel for data."""
    return json.dumps({"ovt": VERSION, **fields}, separators=(",", ":")).encode() + b"\n"


def read_header(take: Any) -> dict[str, str]:
    """The first line of a connection, byte by byte from `take(1)` so that nothing behind it is read; HostError for
    anything else than ovt's."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = take(1)
        if not byte or len(line) > _HEADER:
            raise HostError("somebody connected who does not speak ovt's protocol")
        line += byte
    try:
        fields = json.loads(line)
        if fields.pop("ovt") != VERSION or not all(isinstance(value, str) for value in fields.values()):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise HostError("somebody connected who does not speak this version of ovt's protocol") from None
    return dict(fields)
