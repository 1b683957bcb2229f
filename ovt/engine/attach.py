"""Join a person's terminal, or any three descriptors, to a supervised guest; the other end is in supervisor.c.

It is not `exec`: it reaches the guest's own standard streams. Frames are packets of a SOCK_SEQPACKET socket, the
first byte is the kind.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import TYPE_CHECKING

from ovt.engine.supervised import LOSSLESS, PACKET, connect, exit_record, wait
from ovt.errors import HostError, UsageError

if TYPE_CHECKING:
    from socket import socket

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
FATAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Detached(Enum):
    """The answer of `attach` when the guest goes on without us."""

    DETACHED = "detached"


DETACHED = Detached.DETACHED


def attach(
    directory: str,
    stdin: int | None,
    stdout: int | None,
    stderr: int | None,
    *,
    detach_keys: str = "ctrl-p,ctrl-q",
    forward_signals: Callable[[int], None] | None = None,
    lossless: bool = False,
    on_attached: Callable[[], None] | None = None,
) -> int | Detached:
    """Copy between the descriptors and the guest until it ends (its exit status, 128+n on a signal) or we detach.

    stdin None sends nothing and leaves the guest's input open; a stdin that ends closes the guest's input (a
    terminal gets its end-of-file character). stdout or stderr None throws that stream away; with a guest terminal
    all output is stdout. When the guest has a terminal with open input and stdin is a terminal too, stdin is raw until
    attach returns or raises (also on SIGTERM and SIGHUP), and `detach_keys` ("" for none) detach. The size of our
    terminal at first and on SIGWINCH is passed on.

    `forward_signals(n)` is called for SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 instead of their usual
    effect, to kill() the guest; main thread only. None leaves signals alone.
    `lossless=False`: the guest never waits for us; what we are too slow to take is skipped with a one-line notice on
    stderr. `lossless=True` (foreground `run`): the guest waits when our stdout is slow, like in a pipe.
    `on_attached` is called once the supervisor has us: start a created guest there and miss none of its output.

    A guest that has ended already: its recorded exit status. BrokenPipeError when stdout or stderr was closed;
    UsageError for detach keys that are none; StateError when the supervisor is gone without a record, or goes while
    we are attached; NotFound without a supervisor.
    """
    keys = parse_keys(detach_keys)
    connection = connect(directory, LOSSLESS if lossless else 0)
    if connection is None:
        if exit_record(directory) is None and _takes_no_more(directory):
            raise HostError(f"too many clients are attached to the guest in {directory}", hint="detach one of them")
        return wait(directory).code
    guest, flags = connection
    tty, takes_input = bool(flags & 1), bool(flags & 2)
    with guest, ExitStack() as stack:
        guest.setblocking(False)
        session = _Session(guest, stdin if takes_input else None, stdout, stderr)
        session.wakeup = stack.enter_context(wakeup())
        if tty:
            session.resize()
            stack.enter_context(handlers((signal.SIGWINCH,), lambda _: session.resize()))
        if tty and session.stdin is not None and os.isatty(session.stdin):
            session.keys = keys
            stack.enter_context(raw_terminal(session.stdin))
        if forward_signals:
            stack.enter_context(handlers(FORWARDED, forward_signals))
        if on_attached:
            on_attached()
        status = session.run()
    return wait(directory).code if status is None else status


def parse_keys(text: str) -> bytes:
    """The bytes of keys such as "ctrl-p,ctrl-q" or "q": one character, or ctrl- and a letter or one of @[\\]^_."""
    keys = bytearray()
    for word in text.split(",") if text else []:
        name = word.lower().removeprefix("ctrl-")
        if word != name and len(name) == 1 and "@" <= name.upper() <= "_":
            keys.append(ord(name.upper()) - ord("@"))
        elif len(word) == 1 and word.isascii():
            keys.append(ord(word))
        else:
            raise UsageError(f"detach keys: {word!r} is no key", "write ctrl-p,ctrl-q or single characters")
    return bytes(keys)


class _Session:
    """The loop between one connection and our descriptors."""

    def __init__(self, guest: socket, stdin: int | None, stdout: int | None, stderr: int | None) -> None:
        self.guest = guest
        self.stdin = stdin
        self.outputs = {ord("O"): stdout, ord("E"): stderr}
        self.stderr = stderr
        self.terminals = [fd for fd in (stdout, stdin, stderr) if fd is not None and os.isatty(fd)]
        self.keys = b""
        self.wakeup = -1
        self._typed = 0
        self._unsent: list[bytes] = []

    def run(self) -> int | Detached | None:
        """The exit status, or None when the supervisor hung up without one."""
        while True:
            poll = select.poll()
            poll.register(self.guest, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            if self.stdin is not None and not self._unsent:
                poll.register(self.stdin, select.POLLIN)
            if self.wakeup >= 0:
                poll.register(self.wakeup, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == self.wakeup:
                    os.read(fd, PACKET)  # the handlers themselves have run by now
                elif fd == self.stdin:
                    if not self._read_stdin(fd):
                        self._send()  # what was typed before the keys
                        return DETACHED
                elif (status := self._read_guest()) is not None:
                    return status if status >= 0 else None
            self._send()

    def resize(self) -> None:
        """Tell the guest how large our terminal is; the handler of SIGWINCH."""
        for fd in self.terminals:
            size = os.get_terminal_size(fd)
            if not size.lines or not size.columns:
                return  # nobody knows: serial lines, some recorders
            # straight to the socket: this may interrupt the loop anywhere; a lost one is repaired by the next
            try:
                self.guest.send(b"W" + size.lines.to_bytes(2, "big") + size.columns.to_bytes(2, "big"))
            except (BlockingIOError, ConnectionError):
                pass
            return

    def _read_stdin(self, fd: int) -> bool:
        try:
            data = os.read(fd, PACKET)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:  # our terminal was hung up
                raise
            data = b""
        if not data:
            self.stdin = None
            self._unsent.append(b"E")
            return True
        passed, detach = self._scan(data)
        if passed:
            self._unsent.append(b"I" + passed)
        return not detach

    def _scan(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the detach keys are complete; a beginning of them is held back."""
        if not self.keys:
            return data, False
        passed = bytearray()
        for byte in data:
            if byte != self.keys[self._typed]:
                passed += self.keys[: self._typed]
                self._typed = 0
            if byte != self.keys[self._typed]:
                passed.append(byte)
                continue
            self._typed += 1
            if self._typed == len(self.keys):
                return bytes(passed), True
        return bytes(passed), False

    def _send(self) -> None:
        while self._unsent:
            packet = self._unsent[0]
            try:
                # a held-back key may make a piece longer than the supervisor takes
                self.guest.send(packet[: PACKET + 1])
            except BlockingIOError:
                return
            except ConnectionError:
                self._unsent.clear()
                self.stdin = None
                return
            rest = packet[PACKET + 1 :]
            self._unsent[:1] = [b"I" + rest] if rest else []

    def _read_guest(self) -> int | None:
        """Take one packet; the exit status once it came, -1 when the connection ended."""
        try:
            packet = self.guest.recv(PACKET + 1)
        except BlockingIOError:
            return None
        except ConnectionError:
            return -1
        if not packet:
            return -1
        if packet[0] == ord("X"):
            return packet[1]
        if packet[0] == ord("L"):
            count = int.from_bytes(packet[1:], "big")
            text = f"ovt: {count} bytes of output were skipped here, this end was too slow; the log has them\r\n"
            write_all(self.stderr, text.encode())
        elif packet[0] in self.outputs:
            write_all(self.outputs[packet[0]], packet[1:])
        return None


def write_all(fd: int | None, data: bytes) -> None:
    """Write all of `data`, waiting where the other end is slow; None throws it away."""
    while fd is not None and data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def _takes_no_more(directory: str) -> bool:
    from ovt.engine.supervised import SOCKET

    return os.path.lexists(os.path.join(directory, SOCKET)) and connect(directory, 0) is None


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


@contextmanager
def wakeup() -> Iterator[int]:
    """A descriptor that becomes readable with every signal: one that comes just before poll() must not wait in it."""
    if not _in_main_thread():
        yield -1
        return
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


@contextmanager
def handlers(numbers: tuple[signal.Signals, ...], call: Callable[[int], object]) -> Iterator[None]:
    """Call `call` for these signals; nothing outside the main thread, where Python allows no handlers."""
    if not _in_main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda received, _: call(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Raw mode, given back on every way out; a signal that would end us gives it back first."""
    import termios
    import tty

    before = termios.tcgetattr(fd)

    def die(number: int) -> None:
        termios.tcsetattr(fd, termios.TCSANOW, before)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    fatal = tuple(number for number in FATAL if signal.getsignal(number) is signal.SIG_DFL)
    with handlers(fatal, die):
        try:
            tty.setraw(fd, termios.TCSADRAIN)  # not TCSAFLUSH: what was typed ahead is for the guest
            yield
        finally:
            # not TCSAFLUSH: what was typed ahead belongs to whoever reads the terminal next
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
