"""seccomp notify: the listener descriptor of a filter handed to its agent (runtime-spec, "containerprocessstate")."""

from __future__ import annotations

import posix
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from _struct import pack

from ovt.errors import refused
from ovt.kernel import jsonc
from ovt.kernel import syscalls as sc

from .state import OCI_VERSION, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.kernel.seccomp import Program


def hand_over(pid: int, number: int, program: Program, state: State, process: dict[str, Any]) -> None:
    """Take listener `number` out of process `pid` and send it, with the state, to the agent's socket."""
    pidfd = posix.pidfd_open(pid, 0)
    try:
        listener = sc.pidfd_getfd(pidfd, number)
    finally:
        posix.close(pidfd)
    message = {
        "ociVersion": OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": program.listener_metadata or "",
        "state": {
            "ociVersion": OCI_VERSION,
            "id": state.id,
            "status": "creating" if not state.record["ready"] else "running",
            "pid": state.pid,
            "bundle": state.record["bundle"],
            "annotations": state.record["annotations"],
        },
    }
    channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        channel.connect(program.listener_path or "")
        channel.sendmsg([jsonc.dumps(message).encode()], [(SOL_SOCKET, SCM_RIGHTS, pack("i", listener))])
    except OSError as error:
        raise refused(
            f"send the seccomp listener to {program.listener_path}",
            error,
            "is the agent named in linux.seccomp.listenerPath running?",
        ) from None
    finally:
        channel.close()
        posix.close(listener)
