"""How two hosts that run ovt are connected: SSH, TLS with certificates on both sides, or a unix socket.

    user@host[:port], ssh://user@host:port    `ssh HOST ovt receive`, a session of SSH for each connection
    tls://host:port                           to `ovt receive --listen tls://ADDRESS:PORT`, TLS 1.3
    unix:PATH                                 to `ovt receive --listen unix:PATH`, for tunnels of one's own

It connects and carries bytes; wire.py says which. Whoever may connect may run machines there with the rights of that
host's ovt: that is what the SSH key or the certificate stands for.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import subprocess
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

from ovt.errors import HostError, UsageError, refused
from ovt.machines import wire

if TYPE_CHECKING:
    import ssl

CONNECT = 20.0  # seconds to connect and agree on keys
_BUFFER = 1 << 20
_DEAD = 20_000  # milliseconds after which a silent TCP connection with data on the way is given up
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4", "-T")


class Tls(NamedTuple):
    """Files in PEM: this side's certificate and key, and the authority that has signed the other side's."""

    cert: str = ""
    key: str = ""
    ca: str = ""

    def context(self, server: bool) -> ssl.SSLContext:
        """TLS 1.3 with a certificate demanded of the other side; UsageError when a file is missing or wrong."""
        import ssl

        if not (self.cert and self.key and self.ca):
            raise UsageError("TLS needs certificates on both sides", "--cert FILE --key FILE --ca FILE")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # see _Way; what is carried tells by itself if it is whole
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(self.cert, self.key)
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise UsageError(f"{self.cert}, {self.key}, {self.ca}: {error.reason or error}") from None
        except OSError as error:
            raise UsageError(f"{self.cert}, {self.key} or {self.ca}: {error.strerror}") from None
        return context


class Address(NamedTuple):
    """Where the other host is and how to reach it."""

    scheme: str  # ssh | tls | unix
    host: str  # user@host for ssh, a path for unix
    port: int = 0
    tls: Tls = Tls()
    ssh_command: tuple[str, ...] = _SSH
    remote_ovt: tuple[str, ...] = ("ovt",)

    def pack(self) -> dict[str, Any]:
        """The JSON object."""
        return self._asdict()

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        """From the JSON object."""
        lists = {key: tuple(data[key]) for key in ("ssh_command", "remote_ovt")}
        return cls(**{**data, **lists, "tls": Tls(*data["tls"])})

    def __str__(self) -> str:
        return self.host if self.scheme != "unix" else f"unix:{self.host}"


def parse(text: str, tls: Tls = Tls(), ssh_command: str = "", remote_ovt: str = "") -> Address:  # noqa: B008
    """The address in what people write; UsageError."""
    options = (tls, (*shlex.split(ssh_command),) or _SSH, (*shlex.split(remote_ovt),) or ("ovt",))
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path:
            raise UsageError(f"{text!r} has no path", "unix:/run/ovt.sock")
        return Address("unix", os.path.abspath(path), 0, *options)
    try:
        parts = urlsplit(text if "://" in text else f"ssh://{text}")
        port, name = parts.port, parts.hostname
    except ValueError:
        port, name = None, None
    usable = name and parts.scheme in {"ssh", "tls"} and not parts.path.strip("/") and not name.startswith("-")
    if not usable or (parts.username or "").startswith("-") or (parts.scheme == "tls" and port is None):
        raise UsageError(f"{text!r} is not a host", "user@host, ssh://user@host:22, tls://host:16000 or unix:PATH")
    host = f"{parts.username}@{name}" if parts.username and parts.scheme == "ssh" else str(name)
    return Address(parts.scheme, host, port or 0, *options)


class Dialer:
    """Makes connections to one other host, and ends them all at `close`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._context = address.tls.context(server=False) if address.scheme == "tls" else None
        self._lock = threading.Lock()
        self._programs: list[subprocess.Popen[bytes]] = []

    def session(self) -> socket.socket:
        """A connection for messages. HostError when there is no way to the other host."""
        return self._dial(["receive"], wire.header())

    def carry(self, local: socket.socket, token: str, channel: str) -> None:
        """Connect `local`, which is given away, with a channel of a session, and return when that has begun."""
        if self.address.scheme == "ssh":
            with local:
                self._spawn(["receive", "--join", token, channel], local)
            return
        try:
            remote = self._connect(wire.header(token=token, channel=channel))
        except BaseException:
            local.close()
            raise
        threading.Thread(target=pump, args=(local, remote), daemon=True).start()

    def _dial(self, words: Sequence[str], head: bytes) -> socket.socket:
        if self.address.scheme == "unix":
            return self._connect(head)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                if self.address.scheme == "ssh":
                    self._spawn(words, theirs)
                else:
                    remote = self._connect(head)
                    threading.Thread(target=pump, args=(theirs.dup(), remote), daemon=True).start()
        except BaseException:
            ours.close()
            raise
        return ours

    def _spawn(self, words: Sequence[str], stream: socket.socket) -> None:
        port = ("-p", str(self.address.port)) if self.address.port else ()
        remote = shlex.join([*self.address.remote_ovt, *words])
        command = [*self.address.ssh_command, *port, self.address.host, remote]
        try:
            # a session of its own: ^C is for ovt, which then ends the migration in good order
            program = subprocess.Popen(command, stdin=stream.fileno(), stdout=stream.fileno(), start_new_session=True)
        except OSError as error:
            raise refused(f"{command[0]} cannot be run", error, "apt-get install openssh-client") from None
        with self._lock:
            self._programs.append(program)

    def _connect(self, head: bytes) -> socket.socket:
        where = str(self.address)
        try:
            if self.address.scheme == "unix":
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(CONNECT)
                connection.connect(self.address.host)
            else:
                connection = socket.create_connection((self.address.host, self.address.port), CONNECT)
                lively(connection)
        except OSError as error:
            hint = f"is `ovt receive --listen` running on {where}?"
            raise HostError(f"{where} cannot be reached: {error.strerror or error}", error.errno or 0, hint) from None
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_hostname=self.address.host)
            connection.sendall(head)
        except OSError as error:  # ssl.SSLError is one
            connection.close()
            reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error.strerror
            raise HostError(f"{where} is not trusted or does not trust this host: {reason or error}") from None
        return connection

    def close(self) -> None:
        """End every program that carries a connection."""
        with self._lock:
            programs, self._programs = self._programs, []
        for program in programs:
            try:
                program.wait(0.5)  # it ends by itself when its streams have
            except subprocess.TimeoutExpired:
                program.terminate()
                program.wait()


def lively(connection: socket.socket) -> None:
    """Make TCP notice within seconds that the other host has gone, and send small messages at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD)


def pump(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until both sides have ended or one has failed; both are closed then.

    One thread for both directions, because one TLS connection must not be used by two at once.
    """
    with one, other, contextlib.suppress(OSError):
        one.setblocking(False)
        other.setblocking(False)
        _carry(_Way(one, other), _Way(other, one))


class _Way:
    """One direction: what was read from `source` and not yet written to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.buffer = bytearray(_BUFFER)
        self.pending = memoryview(self.buffer)[:0]
        self.ended = False  # the source has no more

    def step(self) -> bool:
        """Move what can be moved without waiting; whether anything was."""
        moved = False
        try:
            if not self.pending and not self.ended:
                count = self.source.recv_into(self.buffer)
                self.pending = memoryview(self.buffer)[:count]
                moved = True
                if not count:
                    self.ended = True
                    self._end()
            if self.pending:
                self.pending = self.pending[self.sink.send(self.pending) :]
                moved = True
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if not _wants_more(error):
                raise
        return moved

    def _end(self) -> None:
        # of TLS too only TCP's direction is ended: close_notify would end reading with some versions of OpenSSL
        socket.socket.shutdown(self.sink, socket.SHUT_WR)


def _wants_more(error: OSError) -> bool:
    import ssl

    return isinstance(error, (ssl.SSLWantReadError, ssl.SSLWantWriteError))


def _carry(there: _Way, back: _Way) -> None:
    ways = (there, back)
    while not (there.ended and back.ended):
        moved = there.step()
        if back.step() or moved:
            continue
        events: dict[int, int] = {}
        for way in ways:
            if way.pending:
                events[way.sink.fileno()] = events.get(way.sink.fileno(), 0) | select.POLLOUT
            elif not way.ended:
                events[way.source.fileno()] = events.get(way.source.fileno(), 0) | select.POLLIN
        poller = select.poll()
        for fd, mask in events.items():
            poller.register(fd, mask)
        poller.poll()
