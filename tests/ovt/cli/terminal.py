"""A command of `ovt` at a terminal that the test holds the other side of."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time


class Terminal:
    """A command at a new terminal of 24 lines and 80 columns."""

    def __init__(self, words: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                self.resize(24, 80, 0)
                os.execv(words[0], words)
            finally:
                os._exit(99)
        self.text = ""

    def resize(self, lines: int, columns: int, fd: int | None = None) -> None:
        fcntl.ioctl(self.fd if fd is None else fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def expect(self, text: str, seconds: float = 15.0) -> None:
        """Wait until `text` was shown; what came before it is gone then."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} did not come, but {self.text!r}"
            self._read(0.1)
        self.text = self.text.partition(text)[2]

    def end(self, seconds: float = 15.0) -> int:
        """Wait for the command; its exit status."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._read(0.1)
                os.close(self.fd)
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, f"it goes on: {self.text!r}"
            self._read(0.05)

    def _read(self, seconds: float) -> None:
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                self.text += os.read(self.fd, 65536).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the other side was closed
                time.sleep(seconds)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.fd)
