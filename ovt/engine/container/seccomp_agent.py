"""seccomp notify: the listener descriptor of a filter handed to its agent (runtime-spec, "containerprocessstate")."""

import posix
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from _struct import pack

from ovt.errors import HostError
from ovt.kernel import jsonc
from ovt.kernel import syscalls as sc

from .state import OCI_VERSION, State


def hand_over(pid: int, number: int, program, state: State, process: dict) -> None:  # type: ignore[no-untyped-def]
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
        channel.connect(program.listener_path)
        channel.sendmsg([jsonc.dumps(message).encode()], [(SOL_SOCKET, SCM_RIGHTS, pack("i", listener))])
    except OSError as error:
        raise HostError(
            f"send the seccomp listener to {program.listener_path}: {posix.strerror(error.errno or 0).lower()}",
            error.errno or 0,
            "is the agent named in linux.seccomp.listenerPath running?",
        ) from None
    finally:
        channel.close()
        posix.close(listener)
