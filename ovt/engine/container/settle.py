"""What a new container process does for itself before anything is built around it, as steps of a tape."""

from __future__ import annotations

import posix
from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM
from _struct import pack

from ovt.kernel import syscalls as sc

from .tape import IGNORE_ERROR, Tape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_CLOCKS = {"monotonic": 1, "boottime": 7}
_KEYCTL_JOIN_SESSION_KEYRING = 1


def join_keyring(tape: Tape, container_id: str) -> None:
    """A session keyring of the container's own; kernels without keyrings go without."""
    name = tape.text(f"_ses.{container_id[:200]}")
    tape.call("join session keyring", "keyctl", _KEYCTL_JOIN_SESSION_KEYRING, name, 0, 0, 0, flags=IGNORE_ERROR)


def open_procfs(tape: Tape, data: list[str]) -> None:
    """A detached procfs of the pid namespace that plays the tape; reported are the result of its making, and its
    descriptor, minus errno on failure."""
    context = tape.call("fsopen proc", "fsopen", tape.text("proc"), sc.FSOPEN_CLOEXEC)
    for word in data:
        key, equals, value = word.partition("=")
        what = f"mount proc: option {word!r}"
        kind = sc.FSCONFIG_SET_STRING if equals else sc.FSCONFIG_SET_FLAG
        tape.call(what, "fsconfig", context, kind, tape.text(key), tape.text(value) if equals else 0, 0)
    # refused where the container does not own its pid namespace
    create = tape.call("create procfs", "fsconfig", context, sc.FSCONFIG_CMD_CREATE, 0, 0, 0, flags=IGNORE_ERROR)
    mount = tape.call("mount procfs", "fsmount", context, sc.FSMOUNT_CLOEXEC, 0, flags=IGNORE_ERROR)
    tape.call("close", "close", context, flags=IGNORE_ERROR)
    tape.report(create)
    tape.report(mount)


def loopback_up(tape: Tape) -> None:
    """Set lo up: a new network namespace has it down."""
    control = tape.call("open a socket", "socket", AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    request = tape.data(pack("16sh22x", b"lo", _IFF_UP))
    tape.call("set lo up", "ioctl", control, _SIOCSIFFLAGS, request)
    tape.call("close", "close", control)


def enter_cgroup(tape: Tape, descriptors: list[int]) -> None:
    """v1: the process moves itself, which spares the wait for a grace period that moving another one costs."""
    zero = tape.text("0")
    for fd in descriptors:
        tape.call("enter the cgroup", "write", fd, zero, 1)
        tape.call("close", "close", fd)


def enter_namespaces(tape: Tape, joined: list[tuple[str, int, int]], new: int, offsets: dict[str, Any]) -> None:
    """Join namespaces by descriptor, (type, flag, fd) each, and make a time namespace: what precedes the clone."""
    for kind, flag, fd in joined:
        if kind != "user":
            tape.call(f"join {kind} namespace", "setns", fd, flag)
    if new & sc.CLONE_NEWTIME:
        tape.call("create time namespace", "unshare", sc.CLONE_NEWTIME)
        text = "".join(
            f"{_CLOCKS[clock]} {entry.get('secs') or 0} {entry.get('nanosecs') or 0}\n"
            for clock, entry in offsets.items()
        )
        if text:
            path = tape.text("/proc/self/timens_offsets")
            fd_ = tape.call("open timens_offsets", "openat", sc.AT_FDCWD, path, posix.O_WRONLY)
            tape.call("set time offsets", "write", fd_, tape.data(text.encode()), len(text))
            tape.call("close", "close", fd_)
