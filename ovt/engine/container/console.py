"""Terminals: a pair made in the container's own devpts, and the master handed to whoever asked for it."""

from __future__ import annotations

import fcntl
import posix
from _struct import pack

from ovt.errors import HostError, refused

from . import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TIOCSWINSZ = 0x5414
TIOCGWINSZ = 0x5413
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441
_DEVPTS_MAGIC_MAJORS = range(136, 144)


def open_pair(root: int, size: dict[str, Any] | None, uid: int = 0) -> tuple[int, int]:
    """(master, slave) of a new terminal in the devpts that `root` shows at /dev/pts; `size` is config's consoleSize.

    The slave is opened from the master (TIOCGPTPEER), never by a path the container could have bent (CVE-2025-52565).
    """
    multiplexer = posix.makedev(5, 2)
    try:
        master = paths.open_checked(root, "dev/pts/ptmx", posix.O_RDWR | posix.O_NOCTTY, 0o020000, multiplexer)
    except OSError:
        try:
            master = paths.open_checked(root, "dev/ptmx", posix.O_RDWR | posix.O_NOCTTY, 0o020000, multiplexer)
        except OSError as error:
            raise refused(
                "open a terminal in the container: /dev/pts/ptmx",
                error,
                "process.terminal needs a devpts mount at /dev/pts",
            ) from None
    slave = -1
    try:
        fcntl.ioctl(master, TIOCSPTLCK, pack("i", 0))
        slave = fcntl.ioctl(master, TIOCGPTPEER, posix.O_RDWR | posix.O_NOCTTY | posix.O_CLOEXEC)
        if posix.major(posix.fstat(slave).st_rdev) not in _DEVPTS_MAGIC_MAJORS:
            raise HostError("the container's terminal is not a pseudo-terminal")
        if size and size.get("height") is not None:
            fcntl.ioctl(master, TIOCSWINSZ, pack("HHHH", size["height"] & 0xFFFF, size["width"] & 0xFFFF, 0, 0))
        if uid:
            posix.chown(slave, uid, -1)
    except BaseException:
        for fd in (master, slave):
            if fd >= 0:
                posix.close(fd)
        raise
    return master, slave


def send_master(socket_path: str, master: int) -> None:
    """Send `master` over the UNIX socket of --console-socket, with the path of the terminal as the message."""
    import _socket

    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
    try:
        directory, _, name = socket_path.rpartition("/")
        if len(socket_path) > 100:  # sun_path holds 108 bytes
            fd = posix.open(directory or ".", paths.O_PATH | posix.O_CLOEXEC)
            try:
                channel.connect(f"/proc/self/fd/{fd}/{name}")
            finally:
                posix.close(fd)
        else:
            channel.connect(socket_path)
        channel.sendmsg([b"/dev/ptmx"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, pack("i", master))])
    except OSError as error:
        raise HostError(f"send the terminal to {socket_path}: {error.strerror or error}", error.errno or 0) from None
    finally:
        channel.close()
