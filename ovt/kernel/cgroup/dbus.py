"""A synchronous D-Bus client over a Unix socket: enough to ask systemd for units, and no more.

One connection, one caller, method calls with their replies and the signals that come in between. No descriptor
passing, no service side, no introspection. Authentication is EXTERNAL without a claimed identity: the bus looks at the
socket's credentials, which is right in a user namespace too, where the caller does not know its own uid outside.
"""

from __future__ import annotations

import posix
from _socket import AF_UNIX, SOCK_STREAM, socket

from ovt.errors import HostError
from ovt.kernel.cgroup.dbus_wire import (
    CALL,
    DESTINATION,
    ERROR,
    ERROR_NAME,
    INTERFACE,
    MEMBER,
    PATH,
    REPLY_SERIAL,
    RETURN,
    SIGNAL,
    SIGNATURE,
    Message,
    decode,
    message_length,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
_LOGIN = "the bus is another user's: unset DBUS_SESSION_BUS_ADDRESS, or run as its user"
SYSTEM_ADDRESS = "unix:path=/run/dbus/system_bus_socket"


class DBusError(HostError):
    """The other side answered with an error; `name` is its D-Bus name."""

    def __init__(self, name: str, message: str, hint: str = "") -> None:
        super().__init__(message, 0, hint)
        self.name = name


def system_address() -> str:
    """The address of the system bus."""
    return posix.environ.get(b"DBUS_SYSTEM_BUS_ADDRESS", b"").decode("utf-8", "surrogateescape") or SYSTEM_ADDRESS


def user_address() -> str:
    """The address of the user's bus: the environment's, or the socket in XDG_RUNTIME_DIR."""
    address = posix.environ.get(b"DBUS_SESSION_BUS_ADDRESS", b"").decode("utf-8", "surrogateescape")
    runtime = posix.environ.get(b"XDG_RUNTIME_DIR", b"").decode("utf-8", "surrogateescape")
    return address or f"unix:path={runtime or f'/run/user/{posix.getuid()}'}/bus"


def socket_names(address: str) -> list[str]:
    """The sockets an address names (`unix:path=/a;unix:abstract=b`), an abstract one with a leading NUL."""
    names = []
    for server in address.split(";"):
        transport, _, rest = server.partition(":")
        pairs = dict([pair.partition("=")[::2] for pair in rest.split(",")])
        for key, prefix in (("path", ""), ("abstract", "\0")):
            if transport == "unix" and key in pairs:
                names.append(prefix + _unescape(pairs[key]))
    return names


def _unescape(value: str) -> str:
    first, *rest = value.split("%")
    return first + "".join([chr(int(part[:2], 16)) + part[2:] for part in rest])


class Bus:
    """A connection to a message bus. Every method raises HostError, or DBusError for an error reply."""

    __slots__ = ("_buffer", "_serial", "_socket", "address", "name", "signals", "timeout")

    def __init__(self, address: str, timeout: float = 30.0) -> None:
        """Connect and say Hello. `timeout` (seconds) is how long a reply may take."""
        self.address = address
        self.timeout = timeout
        self.signals: list[Message] = []
        self._buffer = b""
        self._serial = 0
        self._socket = self._connect()
        try:
            self._authenticate()
            self.name: str = self.call(*_BUS, "Hello")[0]
        except BaseException:
            self._socket.close()
            raise

    def _connect(self) -> socket:
        names = socket_names(self.address)
        failure = "no Unix socket in that address"
        for name in names:
            connection = socket(AF_UNIX, SOCK_STREAM)
            connection.settimeout(self.timeout)
            try:
                connection.connect(name)
                return connection
            except OSError as error:
                connection.close()
                failure = f"{name}: {error.strerror or error}"
        raise HostError(
            f"cannot reach systemd over D-Bus at {self.address}: {failure}",
            0,
            "use --cgroup-manager cgroupfs (without --systemd-cgroup), or start systemd and its bus",
        )

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):  # not when there was nobody to connect to
            self._socket.close()

    def _authenticate(self) -> None:
        self._send(b"\0AUTH EXTERNAL\r\nDATA\r\n")
        lines = b""
        while lines.count(b"\r\n") < 2 and b"REJECTED" not in lines and b"ERROR" not in lines:
            lines += self._receive()
        if b"\r\nOK " not in b"\r\n" + lines:
            said = lines.decode("ascii", "replace").strip()
            raise HostError(f"the bus at {self.address} refused the login: {said}", 13, _LOGIN)
        self._send(b"BEGIN\r\n")

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._hung_up(error.strerror or str(error), error.errno or 0) from error

    def _hung_up(self, reason: str, errno: int = 0) -> HostError:
        return HostError(
            f"the bus at {self.address} hung up: {reason}", errno, "see the log of dbus or dbus-broker, then try again"
        )

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(65536)
        except TimeoutError as error:
            raise HostError(
                f"no answer from {self.address} within {self.timeout:g} s", 110, "look for a blocked systemd or dbus"
            ) from error
        except OSError as error:
            raise self._hung_up(error.strerror or str(error), error.errno or 0) from error
        if not data:
            raise self._hung_up("end of file")
        return data

    def send(self, destination: str, path: str, interface: str, member: str, signature: str = "", *body: Any) -> int:
        """Send a method call; its serial, for `reply`. Calls may be sent ahead of their predecessors' replies."""
        self._serial += 1
        fields = {PATH: path, DESTINATION: destination, INTERFACE: interface, MEMBER: member}
        if signature:
            fields[SIGNATURE] = signature
        self._send(Message(CALL, self._serial, fields, body).encode())
        return self._serial

    def reply(self, serial: int) -> tuple[Any, ...]:
        """The values that answer the call `serial`; replies to earlier calls that nobody fetched are dropped."""
        while True:
            message = self._next()
            if message.kind not in (RETURN, ERROR) or message.fields.get(REPLY_SERIAL) != serial:
                continue
            if message.kind == ERROR:
                name = message.fields.get(ERROR_NAME, "")
                text = message.body[0] if message.body and isinstance(message.body[0], str) else name
                raise DBusError(name, text)
            return message.body

    def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", *body: Any
    ) -> tuple[Any, ...]:
        """Call a method and wait for its answer."""
        return self.reply(self.send(destination, path, interface, member, signature, *body))

    def add_match(self, rule: str) -> None:
        """Have the bus pass on signals that match; they gather in `signals`."""
        self.call(*_BUS, "AddMatch", "s", rule)

    def wait_signal(self, member: str) -> tuple[Any, ...]:
        """The values of the next signal of that name, gathered or still to come."""
        while True:
            for index, message in enumerate(self.signals):
                if message.fields.get(MEMBER) == member:
                    del self.signals[index]
                    return message.body
            self._next()

    def _next(self) -> Message:
        while len(self._buffer) < 16 or len(self._buffer) < message_length(self._buffer):
            self._buffer += self._receive()
        length = message_length(self._buffer)
        message = decode(self._buffer[:length])
        self._buffer = self._buffer[length:]
        if message.kind == SIGNAL:
            self.signals.append(message)
        return message
