"""Where connections arrive on the receiving host, and how those that carry data find their session.

A session is a process of its own with its messages on standard input and output: `ovt receive`, started by SSH or by
`listen` here. While a machine is on its way its session holds a meeting, a unix socket named by its token, and gives
whoever comes there the connection to QEMU that he asks for; from then on QEMU's bytes pass by the session.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ovt import exits
from ovt.engine.vm.qmp import listen as listen_at
from ovt.engine.vm.qmp import socket_path
from ovt.errors import HostError, NotFound, OvtError, UsageError, refused
from ovt.machines import transport, wire

if TYPE_CHECKING:
    import ssl

_MEETINGS = "receive"  # below the run root
_PATIENCE = 10.0  # seconds for a connection to say what it wants


class Meeting:
    """The place for one session's data connections; `channels` are names and the sockets that QEMU listens on."""

    def __init__(self, run: str, token: str, channels: Mapping[str, str]) -> None:
        os.makedirs(f"{run}/{_MEETINGS}", mode=0o700, exist_ok=True)
        self._place = (run, token)
        self._channels = channels
        self._listener = listen_at(f"{run}/{_MEETINGS}/{token}", 64)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *ignored: object) -> None:
        close_meeting(*self._place)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(5.0)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                connection.settimeout(_PATIENCE)
                self._introduce(connection)

    def _introduce(self, connection: socket.socket) -> None:
        name = connection.recv(256).decode()
        if name not in self._channels:
            connection.sendall(b"there is no such channel")
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as qemu:
            try:
                with socket_path(self._channels[name]) as path:
                    qemu.connect(path)
            except OSError as error:
                connection.sendall(f"QEMU does not answer: {error.strerror}".encode())
                return
            socket.send_fds(connection, [b"ok"], [qemu.fileno()])


def close_meeting(run: str, token: str) -> None:
    """Take away the place of a session, also of a killed one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{run}/{_MEETINGS}/{token}")


def meet(run: str, token: str, channel: str) -> socket.socket:
    """A connection to the QEMU of the session `token`; NotFound when there is no such session, HostError."""
    if not token.isalnum():
        raise UsageError(f"{token!r} is no session")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_PATIENCE)
        try:
            with socket_path(f"{run}/{_MEETINGS}/{token}") as path:
                asking.connect(path)
            asking.sendall(channel.encode())
            answer, fds, _, _ = socket.recv_fds(asking, 256, 1)
        except FileNotFoundError:
            raise NotFound("there is no such session: it has ended") from None
        except OSError as error:
            raise HostError(f"the session does not answer: {error.strerror or error}", error.errno or 0) from None
    if not fds:
        raise HostError(answer.decode(errors="replace") or "the session has ended")
    return socket.socket(fileno=fds[0])


def join(run: str, token: str, channel: str, reader: int, writer: int) -> None:
    """Carry a data connection between two descriptors and its session, until both directions have ended."""
    qemu = meet(run, token, channel)

    def inward() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(reader, 1 << 20):
                qemu.sendall(data)
        with contextlib.suppress(OSError):
            qemu.shutdown(socket.SHUT_WR)

    with qemu:
        threading.Thread(target=inward, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := qemu.recv(1 << 20):
                while data:
                    data = data[os.write(writer, data) :]


def listen(
    data: str,
    run: str,
    text: str,
    tls: transport.Tls = transport.Tls(),  # noqa: B008
    ready: Callable[[str], None] = lambda where: None,
    complain: Callable[[str], None] = lambda line: None,
) -> None:
    """Take connections at `tls://ADDRESS:PORT` or `unix:PATH` for ever. `ready` hears the address, port 0 filled in.

    Every session is a process of its own, which a killed listener does not take along. UsageError, HostError.
    """
    address = transport.parse(text, tls)
    context = address.tls.context(server=True) if address.scheme == "tls" else None
    if address.scheme == "ssh":
        raise UsageError("SSH needs nobody to listen: sshd starts `ovt receive`", "tls://ADDRESS:PORT or unix:PATH")
    with _bind(address) as listener:
        port = listener.getsockname()[1] if context else 0
        ready(f"tls://{address.host}:{port}" if context else str(address))
        while True:
            connection, _ = listener.accept()
            arguments = (connection, context, data, run, complain)
            threading.Thread(target=_welcome, args=arguments, daemon=True).start()


def _bind(address: transport.Address) -> socket.socket:
    try:
        if address.scheme == "unix":
            return listen_at(address.host, 64)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server((address.host, address.port), family=family, backlog=64)
    except OSError as error:
        raise refused(f"cannot listen at {address}", error) from None


def _welcome(
    connection: socket.socket, context: ssl.SSLContext | None, data: str, run: str, complain: Callable[[str], None]
) -> None:
    connection.settimeout(transport.CONNECT)
    try:
        if context is not None:
            transport.lively(connection)
            connection = context.wrap_socket(connection, server_side=True)
        fields = wire.read_header(connection.recv)
        if "token" in fields:
            transport.pump(connection, meet(run, fields["token"], fields.get("channel", "")))
        else:
            _session(connection, data, run)
    except OvtError as error:
        complain(str(error))
        connection.close()
    except OSError as error:  # ssl.SSLError is one
        complain(f"a connection was refused: {error}")
        connection.close()


def _session(connection: socket.socket, data: str, run: str) -> None:
    ours, theirs = socket.socketpair()
    command = [os.path.abspath(sys.executable), "-P", "-m", "ovt.machines.receive", data, run]
    with theirs:
        child = subprocess.Popen(
            command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=exits.env(), start_new_session=True
        )
    transport.pump(connection, ours)
    child.wait()
