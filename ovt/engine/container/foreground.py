"""Waiting for a container's process in the foreground: signals passed on, the terminal connected, the status taken."""

import posix
from _signal import NSIG, SIG_DFL, signal  # type: ignore[import-not-found]

from ovt.errors import OvtError

# what the kernel does not let one catch (9, 19) or keeps to itself (32, 33); what means something to this process
# alone (CHLD, PIPE, URG, WINCH, TTIN, TTOU, TSTP); its own faults (SEGV, BUS, FPE, ILL)
_NOT_FORWARDED = frozenset({4, 7, 8, 9, 11, 13, 17, 19, 20, 21, 22, 23, 28, 32, 33})


def wait(pid: int, master: int = -1) -> int:
    """Wait for the child `pid`; the exit status, 128+n for a signal. `master` is its terminal, connected to ours."""

    def forward(number: int, frame: object) -> None:
        try:
            posix.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in range(1, NSIG):
        if number not in _NOT_FORWARDED:
            signal(number, forward)
    if master >= 0:
        from .terminal import connect

        connect(master, pid)
    try:
        status = posix.waitpid(pid, 0)[1]
    except ChildProcessError:
        raise OvtError(f"process {pid} was waited for by somebody else") from None
    finally:
        for number in range(1, NSIG):
            if number not in _NOT_FORWARDED:
                signal(number, SIG_DFL)
    code = posix.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
