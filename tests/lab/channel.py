"""The wire between a lab host and who uses it: commands in, output and exit status out, over one byte stream.

The stream is a virtio-serial port inside and a socket outside. Stdlib only: the agent inside is started with `-I -S`,
where every module costs tenths of a second.

A frame is one letter, the length of its payload as 4 bytes big endian, the payload. One command runs at a time.

    to the agent     R  a command, JSON: argv, env, cwd, terminal (rows and columns) or null
                     I  bytes for its standard input; empty: end of file
                     W  JSON [rows, columns]: its terminal has a new size
                     S  JSON number: a signal for its process group
    from the agent   H  hello, JSON: the agent is there and waits for commands
                     O  bytes of its standard output (or of its terminal)
                     E  bytes of its standard error
                     D  done, JSON number: the exit status, or 128 + the signal
                     !  JSON text: the command could not be started
"""

import errno
import json
import os
import select
import struct
import time

HEAD = struct.Struct(">cI")
CHUNK = 32 * 1024


def port(name: str) -> str:
    """The device of a virtio-serial port inside, by the name that QEMU gave it."""
    for entry in os.listdir("/sys/class/virtio-ports"):
        with open(f"/sys/class/virtio-ports/{entry}/name") as file:
            if file.read().strip() == name:
                return f"/dev/{entry}"
    raise FileNotFoundError(errno.ENOENT, "no virtio-serial port", name)


class Closed(Exception):
    """The other end is gone."""


class TimedOut(Exception):
    """Nothing came in time."""


class Channel:
    """Frames over a file descriptor that may be non-blocking; `fd` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.buffer = b""

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        left = memoryview(HEAD.pack(kind, len(payload)) + payload)
        while left:
            try:
                left = left[os.write(self.fd, left[:CHUNK]) :]
            except BlockingIOError:
                select.select([], [self.fd], [])
            except (BrokenPipeError, ConnectionResetError):
                raise Closed from None

    def send_json(self, kind: bytes, value: object) -> None:
        self.send(kind, json.dumps(value).encode())

    def next(self) -> tuple[bytes, bytes] | None:
        """The next whole frame that has been read, if there is one."""
        if len(self.buffer) < HEAD.size:
            return None
        kind, length = HEAD.unpack_from(self.buffer)
        end = HEAD.size + length
        if len(self.buffer) < end:
            return None
        payload, self.buffer = self.buffer[HEAD.size : end], self.buffer[end:]
        return kind, payload

    def fill(self) -> None:
        """Read what is there; the descriptor must be readable."""
        try:
            data = os.read(self.fd, CHUNK)
        except (ConnectionResetError, BlockingIOError):
            data = b""
        if not data:
            raise Closed
        self.buffer += data

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for the next frame, at most `timeout` seconds. Raises Closed, TimedOut."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            frame = self.next()
            if frame:
                return frame
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.fd], [], [], left)[0]:
                raise TimedOut
            self.fill()
