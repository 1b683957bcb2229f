"""Waiting for a container's process in the foreground: signals passed on, the terminal connected, the status taken."""

from __future__ import annotations

import posix
from _signal import NSIG, SIG_DFL, pidfd_send_signal, signal  # type: ignore[import-not-found]

from ovt.errors import OvtError

# what the kernel does not let one catch (9, 19) or keeps to itself (32, 33); what means something to this process
# alone (CHLD, PIPE, URG, WINCH, TTIN, TTOU, TSTP); its own faults (SEGV, BUS, FPE, ILL)
_NOT_FORWARDED = frozenset({4, 7, 8, 9, 11, 13, 17, 19, 20, 21, 22, 23, 28, 32, 33})
_FORWARDED = [number for number in range(1, NSIG) if number not in _NOT_FORWARDED]


class Signals:
    """`with Signals() as signals:` passes signals on to a process; what comes before `to` names it is kept for it."""

    def __init__(self) -> None:
        self._pidfd = -1
        self._early: list[int] = []

    def __enter__(self) -> Signals:
        for number in _FORWARDED:
            signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _FORWARDED:
            signal(number, SIG_DFL)
        if self._pidfd >= 0:
            posix.close(self._pidfd)

    def to(self, pid: int) -> None:
        """From now on to `pid`, whose first signals are those that have come already."""
        self._pidfd = posix.pidfd_open(pid, 0)
        for number in self._early:
            self._forward(number)

    def _forward(self, number: int, frame: object = None) -> None:
        if self._pidfd < 0:
            self._early.append(number)
            return
        try:
            pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass


def wait(pid: int, master: int = -1) -> int:
    """Wait for the child `pid`; the exit status, 128+n for a signal. `master` is its terminal, connected to ours."""
    if master >= 0:
        from .terminal import connect

        connect(master, pid)
    try:
        status = posix.waitpid(pid, 0)[1]
    except ChildProcessError:
        raise OvtError(f"process {pid} was waited for by somebody else") from None
    code = posix.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
