"""The standard streams of a program that `exec` runs in a container, joined to this process's own.

Files and pipes are handed to the program as they are. A terminal of the host never is: the program could read what
its owner types elsewhere and change its modes; it gets pipes instead, or with a terminal of its own that terminal's
other side, and the bytes are copied here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK = 65536


class Streams:
    """Three descriptors for the program in `given`; `run` copies until it has ended."""

    def __init__(self, stdin: bool, tty: bool) -> None:
        self._ours: list[int] = []  # this side of the pipes
        self._theirs: list[int] = []
        self._pairs: list[tuple[int, int]] = []
        null = self._keep(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        self._stdin = stdin
        if tty:
            self.given = (null, null, null)
            return
        self.given = (self._input(null), self._output(1), self._output(2))

    def _keep(self, fd: int) -> int:
        self._theirs.append(fd)
        return fd

    def _input(self, null: int) -> int:
        if not self._stdin:
            return null
        if not os.isatty(0):
            return 0
        theirs, ours = os.pipe()
        self._ours.append(ours)
        self._pairs.append((0, ours))
        return self._keep(theirs)

    def _output(self, fd: int) -> int:
        if not os.isatty(fd):
            return fd
        ours, theirs = os.pipe()
        self._ours.append(ours)
        self._pairs.append((ours, fd))
        return self._keep(theirs)

    def close(self) -> None:
        """Give up all descriptors; safe to repeat."""
        for fd in (*self._theirs, *self._ours):
            os.close(fd)
        self._theirs, self._ours = [], []

    def run(self, pid: int, master: int = -1) -> int:
        """Copy until the child `pid` has ended; its exit status, 128 + n for signal n. `master` is its terminal."""
        for fd in self._theirs:
            os.close(fd)
        self._theirs = []
        with ExitStack() as stack:
            stack.enter_context(_forwarding(pid))
            if master >= 0:
                self._ours.append(master)
                self._pairs = [(master, 1)]
                if self._stdin:
                    self._pairs.append((0, master))
                    if os.isatty(0):
                        stack.enter_context(_raw(0))
                stack.enter_context(_sizes(master))
            ended = os.pidfd_open(pid)
            self._ours.append(ended)
            self._copy(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return 128 - code if code < 0 else code

    def _copy(self, ended: int) -> None:
        sources = dict(self._pairs)
        while True:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            for fd in sources:
                poll.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poll.poll()]
            moved = False
            for fd in ready:
                if fd == ended:
                    continue
                data = _read(fd)
                if data and _write(sources[fd], data):
                    moved = moved or fd != 0
                    continue
                target = sources.pop(fd)
                if fd == 0 and os.isatty(target):
                    os.write(target, b"\x04")  # the end of a terminal's input is a character
                elif fd == 0:
                    self._ours.remove(target)
                    os.close(target)
            if ended in ready and not moved:
                return


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        if error.errno == errno.EIO:  # the other side of the terminal was closed
            return b""
        raise


def _write(fd: int, data: bytes) -> bool:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            return False  # nobody takes it any more
        raise
    return True


@contextmanager
def _handlers(numbers: tuple[signal.Signals, ...], call: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        call(number)

    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: signals are not ours to handle
        yield
        return
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextmanager
def _forwarding(pid: int) -> Iterator[None]:
    def forward(number: int) -> None:
        try:
            os.kill(pid, number)  # our own unreaped child: the pid cannot have been used again
        except ProcessLookupError:
            pass

    with _handlers(_FORWARDED, forward):
        yield


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)  # not TCSAFLUSH: what was typed ahead is for the guest
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _sizes(master: int) -> Iterator[None]:
    source = next((fd for fd in (0, 1, 2) if os.isatty(fd)), -1)

    def pass_on(number: int = 0) -> None:
        if source >= 0:
            size = fcntl.ioctl(source, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(master, termios.TIOCSWINSZ, size)

    pass_on()
    with _handlers((signal.SIGWINCH,), pass_on):
        yield
