"""NOTIFY_SOCKET (sd_notify(3)) for containers: a socket of our own inside, its messages passed on to the caller's.

`create` mounts a directory of the state directory at /run/notify; `start` listens there until the service says
READY=1, passes that on with the service's pid as the host knows it, and leaves.
"""

from __future__ import annotations

import posix
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM, socket

from ovt.errors import HostError
from ovt.kernel.syscalls import O_PATH

from .state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DIRECTORY = "notify"
INSIDE = "/run/notify"


def prepare(state_path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Make the directory and return `config` with its mount and the variable in it."""
    directory = f"{state_path}/{DIRECTORY}"
    posix.mkdir(directory, 0o755)
    mount = {
        "destination": INSIDE,
        "source": directory,
        "type": "bind",
        "options": ["bind", "nosuid", "noexec", "nodev", "ro"],
    }
    process = config.get("process") or {}
    env = [entry for entry in process.get("env") or [] if not entry.startswith("NOTIFY_SOCKET=")]
    process = {**process, "env": [*env, f"NOTIFY_SOCKET={INSIDE}/notify.sock"]}
    return {**config, "mounts": [*(config.get("mounts") or []), mount], "process": process}


def expected(root: str, container_id: str) -> bool:
    """True when `create` had a NOTIFY_SOCKET too: without its directory the container has nowhere to write to."""
    try:
        posix.stat(f"{root}/{container_id}/{DIRECTORY}")
    except FileNotFoundError:
        return False
    return True


class Proxy:
    """`with Proxy(...)` binds the socket before the container starts; `wait_ready` returns after READY=1."""

    def __init__(self, root: str, container_id: str, host_socket: str) -> None:
        self._state = State.load(root, container_id)
        self._host = host_socket
        self._socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)

    def __enter__(self) -> Proxy:
        directory = posix.open(f"{self._state.path}/{DIRECTORY}", O_PATH | posix.O_CLOEXEC)
        try:
            # by descriptor: the state directory's path may be longer than the 108 bytes of sun_path
            self._socket.bind(f"/proc/self/fd/{directory}/notify.sock")
            posix.chmod(f"/proc/self/fd/{directory}/notify.sock", 0o777)
        finally:
            posix.close(directory)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait_ready(self) -> None:
        """Pass messages on until READY=1 was among them or the container has ended."""
        self._socket.settimeout(0.1)
        while True:
            try:
                message = self._socket.recv(65536)
            except TimeoutError:
                if not self._state.alive():
                    return
                continue
            if any(line == b"READY=1" for line in message.split(b"\n")):
                self._send(b"MAINPID=%d\nREADY=1" % self._state.pid)
                return

    def _send(self, message: bytes) -> None:
        address = self._host if not self._host.startswith("@") else "\0" + self._host[1:]
        out = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
        try:
            out.sendto(message, address)
        except OSError as error:
            raise HostError(f"pass READY=1 on to {self._host}: {posix.strerror(error.errno or 0)}") from None
        finally:
            out.close()
