"""Drive an interactive program through a real pseudo-terminal, as a person at a keyboard would."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType


class Terminal:
    """A program whose stdin, stdout, stderr and controlling terminal are one new pty.

    Use as a context manager: leaving it kills the program if it is still there.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, rows: int = 24, columns: int = 80
    ) -> None:
        self.argv = list(argv)
        self.output = ""
        self._master, slave = pty.openpty()
        self.resize(rows, columns)
        self._process = subprocess.Popen(
            self.argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=None if env is None else dict(env),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def resize(self, rows: int, columns: int) -> None:
        """Set the window size; the kernel sends SIGWINCH to the foreground process group."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        """Type `text`; control characters as themselves, e.g. "\\x03" for Ctrl-C."""
        os.write(self._master, text.encode())

    def expect(self, pattern: str, timeout: float = 15) -> re.Match[str]:
        """Read until the regular expression `pattern` is found; what precedes and includes it is consumed."""
        deadline = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.output)
            if found:
                self.output = self.output[found.end() :]
                return found
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{' '.join(self.argv)}: no {pattern!r} in {timeout} s; got {self.output!r}")

    def wait(self, timeout: float = 15) -> int:
        """Read until the program ends; return its exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        return self._process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, timeout))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the last slave descriptor is closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)
