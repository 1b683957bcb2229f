"""Waiting for a container's process in the foreground: signals passed on, the terminal connected, the status taken."""

import posix
import select

from ovt.errors import OvtError


def wait(pid: int, master: int = -1) -> int:
    """Wait for the child `pid`; the exit status, 128+n for a signal. `master` is its terminal, connected to ours."""
    import signal

    def forward(number: int, frame: object) -> None:
        try:
            posix.kill(pid, number)
        except ProcessLookupError:
            pass

    skipped = {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGWINCH, signal.SIGURG}
    skipped |= {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTTOU, signal.SIGTTIN, signal.SIGTSTP}
    for number in set(signal.Signals) - skipped:
        signal.signal(number, forward)
    if master >= 0:
        from .terminal import connect

        connect(master, pid)
    while True:
        try:
            status = posix.waitpid(pid, 0)[1]
        except InterruptedError:
            continue
        except ChildProcessError:
            raise OvtError(f"process {pid} was waited for by somebody else") from None
        break
    code = posix.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


__all__ = ["select", "wait"]
