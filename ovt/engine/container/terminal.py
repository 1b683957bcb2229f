"""The caller's terminal connected to a container's, until the container's process ends."""

import fcntl
import posix
import select
from _struct import unpack

from .console import TIOCGWINSZ, TIOCSWINSZ

_PENDING = 128 << 10  # bytes; a terminal holds back less than this


def own_size() -> dict[str, int] | None:
    """The size of the caller's terminal as a consoleSize, None if descriptor 0 is none.

    The container's terminal is made with it: told only after the start, the program would see 0 × 0 for a moment.
    """
    try:
        height, width, _, _ = unpack("HHHH", fcntl.ioctl(0, TIOCGWINSZ, bytes(8)))
    except OSError:
        return None
    return {"height": height, "width": width}


def connect(master: int, pid: int) -> None:
    """Copy between descriptors 0, 1 and `master`, in raw mode if 0 is a terminal; returns at the process's end."""
    import signal
    import termios
    import tty

    saved = None
    try:
        saved = termios.tcgetattr(0)
    except termios.error:
        pass

    def resize(*_: object) -> None:
        try:
            fcntl.ioctl(master, TIOCSWINSZ, fcntl.ioctl(0, TIOCGWINSZ, bytes(8)))
        except OSError:
            pass  # descriptor 0 is no terminal

    wake_read, wake_write = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
    previous = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGWINCH, resize)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    if saved is not None:
        tty.setraw(0)
        resize()
    try:
        _copy(master, pid, wake_read)
    finally:
        if saved is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, saved)
        signal.set_wakeup_fd(previous)
        for fd in (wake_read, wake_write, master):
            posix.close(fd)


def _copy(master: int, pid: int, wake: int) -> None:
    poll = select.poll()
    poll.register(master, select.POLLIN)
    poll.register(wake, select.POLLIN)
    poll.register(0, select.POLLIN)
    pidfd = posix.pidfd_open(pid, 0)
    poll.register(pidfd, select.POLLIN)
    last = 0  # bytes read since the end of the process
    try:
        while True:
            events = dict(poll.poll())
            if wake in events:
                posix.read(wake, 512)
            if master in events:
                try:
                    data = posix.read(master, 65536)
                except OSError:  # EIO: the last user of the slave is gone
                    return
                _write_all(1, data)
                last += len(data) if pidfd in events else 0
                if last < _PENDING:
                    continue  # others that write to the terminal may never come to an end
            if 0 in events:
                data = posix.read(0, 65536)
                if data:
                    _write_all(master, data)
                else:
                    poll.unregister(0)
                    posix.write(master, b"\x04")  # end of input, as a terminal says it
            if pidfd in events:
                return  # the process ended and its last output has been read
    finally:
        posix.close(pidfd)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[posix.write(fd, data) :]
