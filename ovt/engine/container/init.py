"""ovt-init seen from the runtime: starting it, playing tapes on it, understanding what it reports (see init.c).

It always runs from a sealed memfd: /proc/<pid>/exe of a container process then names an unchangeable copy of a
5 KiB program and never a file of the host (CVE-2019-5736).
"""

import fcntl
import posix
from _socket import SCM_RIGHTS, SOL_SOCKET, socketpair
from _struct import pack
from errno import EINVAL

from ovt.errors import HostError
from ovt.kernel import syscalls as sc

from .tape import REPORT, TAPE_DONE, Tape

_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # SEAL, SHRINK, GROW, WRITE
_F_DUPFD_CLOEXEC = 1030
_SIGKILL = 9
_SIGPIPE, _SIGXFSZ = 13, 25  # Python ignores these two; a container must find them at their defaults

_program = -1


def _memfd() -> int:
    """A sealed in-memory copy of ovt-init, made once in a process."""
    global _program
    if _program >= 0:
        return _program
    path = f"{__file__.rsplit('/', 3)[0]}/_bin/ovt-init"
    try:
        source = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except FileNotFoundError:
        raise HostError(f"{path} is missing", hint="it is compiled at installation: run scripts/setup") from None
    text = posix.read(source, 1 << 20)
    posix.close(source)
    try:
        fd = posix.memfd_create("ovt-init", posix.MFD_CLOEXEC | posix.MFD_ALLOW_SEALING | 0x10)
    except OSError as error:
        if error.errno != EINVAL:  # MFD_EXEC came with Linux 6.3
            raise
        fd = posix.memfd_create("ovt-init", posix.MFD_CLOEXEC | posix.MFD_ALLOW_SEALING)
    posix.write(fd, text)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    _program = fd
    return fd


def above(fd: int, lowest: int) -> int:
    """`fd`, or if it is below `lowest` a duplicate that is not (the original is closed)."""
    if fd >= lowest:
        return fd
    higher = fcntl.fcntl(fd, _F_DUPFD_CLOEXEC, lowest)
    posix.close(fd)
    return higher


class Init:
    """A running ovt-init, or after a tape that clones, its child: `pid` is the one that plays."""

    def __init__(self, stdio: tuple[int, ...], keep: list[int], lowest: int) -> None:
        """Start it with `stdio` as 0, 1, 2 and so on, other descriptors below `lowest` as they are, and those in `keep`
        at their numbers."""
        ours, theirs = socketpair()
        self._socket = ours
        sync = above(theirs.detach(), lowest)
        self.sync_fd = sync
        actions: list[tuple[int, int, int]] = []
        temporary = []
        if stdio != (0, 1, 2):
            temporary = [fcntl.fcntl(fd, _F_DUPFD_CLOEXEC, lowest) for fd in stdio]
            actions += [(posix.POSIX_SPAWN_DUP2, fd, i) for i, fd in enumerate(temporary)]
        # dup2 onto itself clears close-on-exec in the child only (glibc 2.29)
        actions += [(posix.POSIX_SPAWN_DUP2, fd, fd) for fd in (sync, *keep)]
        try:
            self.spawned = posix.posix_spawn(
                f"/proc/self/fd/{_memfd()}",
                ["ovt-init", str(sync)],
                {},
                file_actions=actions,
                setsigmask=[],
                setsigdef=[_SIGPIPE, _SIGXFSZ],
            )
        finally:
            for fd in temporary:
                posix.close(fd)
            posix.close(sync)
        self.pid = self.spawned
        self._lowest = lowest

    def close_inherited(self, tape: Tape, keep: list[int]) -> None:
        """Append: close what the runtime's caller left open, and every descriptor of ours but the socket and `keep`.

        For the first moment in the container's pid namespace: a neighbour with CAP_SYS_PTRACE reaches through them.
        """
        start = self._lowest
        for fd in sorted([self.sync_fd, *keep]):
            if fd > start:
                tape.call("close_range", "close_range", start, fd - 1, 0)
            start = fd + 1
        tape.call("close_range", "close_range", start, 0xFFFFFFFF, 0)

    def play(self, tape: Tape, fds: tuple[int, ...] = ()) -> int:
        """Have the tape played to its end and return the last call's result; OSError names the call that failed."""
        self.send(tape, fds)
        return self.wait(tape)[1]

    def send(self, tape: Tape, fds: tuple[int, ...] = ()) -> None:
        """Hand over a tape, with descriptors, without waiting for it."""
        raw = tape.encode()
        try:
            if fds:
                sent = self._socket.sendmsg([raw], [(SOL_SOCKET, SCM_RIGHTS, pack(f"{len(fds)}i", *fds))])
                raw = raw[sent:]
            if raw:  # a send of nothing fails when a short-lived program has already replaced the reader
                self._socket.sendall(raw)
        except BrokenPipeError:
            raise HostError("the container's init process ended before it was set up") from None

    def wait(self, tape: Tape, end_is_success: bool = False) -> tuple[int, int]:
        """The next report: (index, value). ovt-init gone is an error, or (TAPE_DONE, 0) where it means execve."""
        raw = b""
        while len(raw) < REPORT.size:
            try:
                chunk = self._socket.recv(REPORT.size - len(raw))
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                if end_is_success:
                    return TAPE_DONE, 0
                raise HostError(
                    "the container's init process ended unexpectedly", hint="was it killed (OOM, a signal)?"
                )
            raw += chunk
        index, errno, value = REPORT.unpack(raw)
        if errno:
            raise OSError(errno, posix.strerror(errno), tape.whats[index] if index < len(tape.whats) else "")
        return index, value

    def take(self, number: int) -> int:
        """A duplicate of its descriptor `number` (pidfd_getfd)."""
        pidfd = posix.pidfd_open(self.pid, 0)
        try:
            return sc.pidfd_getfd(pidfd, number)
        finally:
            posix.close(pidfd)

    def tell(self) -> None:
        """One byte, for a tape that waits for it."""
        self._socket.sendall(b"\1")

    def adopt_clone(self, tape: Tape) -> int:
        """After a tape with `clone` was sent: reap the parent and take its child's place. Returns the child's pid."""
        pid = 0
        done = False
        while not (pid and done):
            index, value = self.wait(tape)
            if index == TAPE_DONE:
                done = True
            else:
                pid = self.pid = value
        posix.waitpid(self.spawned, 0)
        self.spawned = pid  # the number of the reaped one may be another's by now
        return pid

    def reap(self) -> None:
        """Kill what is still ours of it and collect it; for the way back out of a failure."""
        for pid in {self.pid, self.spawned}:
            try:
                posix.kill(pid, _SIGKILL)
            except ProcessLookupError:
                pass
            try:
                posix.waitpid(pid, 0)
            except ChildProcessError:
                pass  # it was reaped when its clone took over

    def close(self) -> None:
        """Let go of the socket: ovt-init ends at once unless it is past its last report."""
        self._socket.close()
