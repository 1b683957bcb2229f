"""The guest agent from the host's side: one request and one answer at a time with whatever answers in the guest.

It speaks the protocol of qemu-guest-agent (docs/interop/qemu-ga-ref) over the unix socket at which QEMU listens for the
virtio-serial port `org.qemu.guest_agent.0`. QEMU takes that connection whether or not a program in the guest has the
other end open, and one at a time; so every command that wants the agent takes a turn, guarded by a lock in the
instance's directory. Nothing that comes back is believed: answers are bounded in time and size, and texts of the guest
are made fit to print. What is done with the commands is in the modules beside this one; `agent_verbs` has the simple
ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ovt.engine.vm.qmp import Qmp, socket_path
from ovt.errors import Conflict, OvtError, StateError, refused

SOCKET = "qga.sock"
LOCK = "qga.lock"
WAITING = "qga.wait"
LONGEST = 64 << 20  # bytes of one answer; the largest honest one is two outputs of 16 MiB as base64
TURN = 30.0  # seconds to wait for another command of ovt to let go of the agent
_CHUNK = 1 << 18
_POLL = 0.005
_GREETING = 4.0  # seconds after which the agent is called again, on a new connection
# These change nothing when they are carried out late, after we have given up waiting. Anything else is sent only once
# the agent has answered: a shutdown that stays in the port's buffer would meet the guest at its next boot.
_HARMLESS = frozenset({"guest-ping", "guest-info", "guest-fsfreeze-thaw", "guest-fsfreeze-status"})


class NoAgent(StateError):
    """Nothing in the guest answers. `hint` names the alternatives; the instance's name is for the caller to put in."""

    def __init__(self, why: str = "no guest agent answers") -> None:
        super().__init__(why, "install and start qemu-guest-agent in the guest, or use `ovt console`")


class AgentError(OvtError):
    """The agent refused a command, or did not answer it as an agent does.

    `error_class` is the agent's own (CommandNotFound, nearly always GenericError), TIMEOUT when it fell silent, or
    PROTOCOL when what it sent is no answer.
    """

    TIMEOUT = "Timeout"
    PROTOCOL = "Protocol"

    def __init__(self, message: str, error_class: str = "GenericError", hint: str = "") -> None:
        super().__init__(message, hint)
        self.error_class = error_class


class About(NamedTuple):
    """What `guest-info` says: the agent's version, the commands it takes, and those its owner has forbidden."""

    version: str
    commands: frozenset[str]
    forbidden: frozenset[str]


def printable(text: object, limit: int = 256) -> str:
    """`text` of a guest as one that may go to a terminal and into JSON: no control characters, none that change the
    direction of writing, no half surrogates, at most `limit` characters; empty for what is no text."""
    if not isinstance(text, str):
        return ""
    cleaned = "".join(c if c.isprintable() else "�" for c in text[: limit + 1])
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def port_open(qmp: Qmp, chardev: str = "qga") -> bool | None:
    """Whether a program in the guest has the agent's port open, from QEMU; None when QEMU knows no such chardev."""
    for entry in qmp.command("query-chardev"):
        if entry["label"] == chardev:
            return bool(entry["frontend-open"])
    return None


class Agent:
    """The agent of the VM whose files are in `home`. For one thread; it connects when it is first asked something.

    `sync_timeout` seconds is how long the agent may take to show that it is there (longer under emulation),
    `timeout` how long a command may take. `is_open` says False when QEMU knows that nobody in the guest listens, so
    that nobody has to wait for it; None when it does not know.
    """

    def __init__(
        self,
        home: str,
        *,
        sync_timeout: float = 3.0,
        timeout: float = 30.0,
        is_open: Callable[[], bool | None] = lambda: None,
    ) -> None:
        self.home = home
        self.sync_timeout = sync_timeout
        self.timeout = timeout
        self.is_open = is_open
        self._about: About | None = None
        self._socket: socket.socket | None = None
        self._lock = -1
        self._buffer = bytearray()
        self._scanned = 0  # of the buffer, without finding the end of a line
        self._synced = False
        self._met = False  # it has answered before: QEMU need not be asked whether it is there
        self._pending: list[str] = []  # commands without an answer yet

    # commands

    def command(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        answers: bool = True,
    ) -> Any:
        """Give a command and return its result, an error of the agent as AgentError.

        `timeout` in seconds. With `answers` False the command answers only when it fails (guest-shutdown): silence,
        and the end of QEMU, are success then. NoAgent when nothing answers at all; Conflict when another command of
        ovt keeps the agent busy.
        """
        with self.turn():
            self.send(name, arguments)
            return self.receive(timeout, silent=not answers)

    def introduce(self, commands: Sequence[tuple[str, Mapping[str, Any]]], timeout: float) -> list[Any]:
        """Greet our own agent and give it these commands in the same breath; their results.

        For a fork, where each answer waited for costs more than what is asked. It is called once, as nothing may be
        given twice: NoAgent after `timeout` seconds, AgentError of the first command that fails.
        """
        follow = b"".join(_request(name, arguments) for name, arguments in commands)
        with self.turn():
            try:
                self._greet(follow, time.monotonic() + timeout)
            except TimeoutError:
                raise NoAgent(f"no guest agent answers (within {timeout:g} s)") from None
            except _Ended:
                raise NoAgent("the connection to the guest's agent has ended: QEMU runs no more") from None
            self._synced = self._met = True
            self._pending = [name for name, _ in commands]
            return [self.receive() for _ in commands]

    def about(self) -> About:
        """The agent's version and commands, asked once."""
        if self._about is None:
            answer = self.command("guest-info")
            listed = answer.get("supported_commands") if isinstance(answer, dict) else None
            if not isinstance(listed, list):
                raise AgentError("guest-info: the agent does not say what it can do", AgentError.PROTOCOL)
            entries = [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
            commands = frozenset(entry["name"] for entry in entries if entry.get("enabled", True))
            forbidden = frozenset(entry["name"] for entry in entries) - commands
            self._about = About(printable(answer.get("version"), 64), commands, forbidden)
        return self._about

    def need(self, name: str, what: str) -> None:
        """StateError unless the agent takes command `name`, which `what` needs."""
        about = self.about()
        if name in about.forbidden:
            raise StateError(
                f"{what} needs {name}, which is forbidden to the guest's agent",
                "allow it in the guest (qemu-ga.conf, /etc/sysconfig/qemu-ga); while its disks are frozen, wait",
            )
        if name not in about.commands:
            raise StateError(
                f"{what} needs {name}, which the guest's agent (version {about.version or 'unknown'}) does not know"
            )

    # turns

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Several commands over one connection, while other commands of ovt wait; see `give_way`."""
        if self._lock >= 0:
            yield
            return
        self._take()
        try:
            yield
        finally:
            self._release()

    def give_way(self) -> None:
        """Between two commands of a long turn: let another command of ovt have its own, if one waits."""
        if self._pending or not self._others_wait():
            return
        self._release()
        time.sleep(4 * _POLL)  # those who wait look every _POLL seconds
        self._take()

    def fileno(self) -> int:
        """For poll: readable when part of an answer has come, or the connection has ended."""
        return self._connected().fileno()

    @property
    def pending(self) -> int:
        """How many commands were sent and have no answer yet."""
        return len(self._pending)

    def answered(self) -> bool:
        """Whether a whole answer is here already, so that poll would not tell of it."""
        return bool(self._pending) and b"\n" in self._buffer

    def _take(self) -> None:
        lock = self._open(LOCK)
        try:
            if not _locked(lock):
                waiting = self._open(WAITING)
                try:
                    fcntl.flock(waiting, fcntl.LOCK_SH)
                    deadline = time.monotonic() + TURN
                    while not _locked(lock):
                        if time.monotonic() > deadline:
                            raise Conflict(
                                "another ovt command keeps the guest's agent busy", "try again when that has ended"
                            )
                        time.sleep(_POLL)
                finally:
                    os.close(waiting)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def _release(self) -> None:
        self._disconnect()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _others_wait(self) -> bool:
        waiting = self._open(WAITING)
        try:
            return not _locked(waiting)
        finally:
            os.close(waiting)

    def _open(self, name: str) -> int:
        try:
            return os.open(os.path.join(self.home, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise refused(os.path.join(self.home, name), error) from error

    # requests and answers, inside a turn

    def send(self, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Give a command without waiting for its answer, which `receive` takes; inside a turn only.

        Answers come in the order of the commands. More than one may be under way where the agent is known to read on.
        """
        line = _request(name, arguments)
        try:
            if not self._pending and self._leftover():
                self._synced = False  # an answer too many, or one that somebody had given up on
            if self._synced:
                self._write(line, time.monotonic() + self.timeout)
            else:
                self._sync(line if name in _HARMLESS else b"")
                if name not in _HARMLESS:
                    self._write(line, time.monotonic() + self.timeout)
        except TimeoutError:
            self._disconnect()
            raise AgentError(f"the guest's agent does not take {name}", AgentError.TIMEOUT) from None
        except BaseException:
            self._disconnect()
            raise
        self._pending.append(name)

    def receive(self, timeout: float | None = None, silent: bool = False) -> Any:
        """The result of the oldest command that has none yet; see `command` for what is raised."""
        seconds = self.timeout if timeout is None else timeout
        name = self._pending[0]
        try:
            answer = _answer(self._line(time.monotonic() + seconds))
        except TimeoutError:
            self._disconnect()
            if silent:
                return None
            raise AgentError(
                f"the guest's agent has not answered {name} for {seconds:g} seconds",
                AgentError.TIMEOUT,
                "the guest may be busy, paused or stuck: see `ovt logs`, `ovt console`",
            ) from None
        except _Ended:
            self._disconnect()
            if silent:
                return None
            raise AgentError(
                f"the connection to the guest's agent has ended before it answered {name}", AgentError.PROTOCOL
            ) from None
        except BaseException:
            self._disconnect()
            raise
        del self._pending[0]
        if "error" not in answer:
            return answer["return"]
        error = answer["error"] if isinstance(answer["error"], dict) else {}
        words = printable(error.get("desc"), 500) or "it does not say why"
        raise AgentError(f"{name}: {words}", printable(error.get("class"), 64) or "GenericError")

    def sync(self, timeout: float) -> None:
        """Find out whether an agent is there, waiting `timeout` seconds at most; NoAgent when it is not.

        What the agent answered to others before is thrown away.
        """
        with self.turn():
            try:
                self._sync(b"", timeout)
            except BaseException:
                self._disconnect()
                raise

    def _sync(self, follow: bytes, timeout: float | None = None) -> None:
        if not self._met and self.is_open() is False:
            raise NoAgent("no program in the guest listens for ovt: the guest agent does not run (yet)")
        seconds = self.sync_timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._greet(follow, min(deadline, time.monotonic() + _GREETING))
                break
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise NoAgent(f"no guest agent answers (within {seconds:g} s)") from None
                # perhaps the agent has missed that somebody came: QEMU tells it once
                self._disconnect()
            except _Ended:
                raise NoAgent("the connection to the guest's agent has ended: QEMU runs no more") from None
        self._synced = self._met = True
        self._pending.clear()

    def _greet(self, follow: bytes, deadline: float) -> None:
        """Send a number that the agent repeats, and read until it does; TimeoutError."""
        number = secrets.randbelow(1 << 53)
        request = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode()
        # 0xFF is in no JSON text: it ends whatever half a request the agent still holds
        self._write(b"\xff" + request + b"\n" + follow, deadline)
        seen = 0
        while True:
            line = self._line(deadline)
            seen += len(line)
            if seen > LONGEST:
                raise AgentError("the guest's agent sends without end and never answers", AgentError.PROTOCOL)
            try:
                if _answer(line.rpartition(b"\xff")[2]).get("return") == number:
                    return
            except AgentError:
                pass  # the rest of an answer to somebody else

    # the wire

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = _connect(self.home, time.monotonic() + self.sync_timeout)
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._buffer.clear()
        self._scanned = 0
        self._synced = False
        self._pending.clear()

    def _leftover(self) -> bool:
        if self._socket is None:
            return False
        return bool(self._buffer) or _ready(self._socket, select.POLLIN, 0.0)

    def _write(self, data: bytes, deadline: float) -> None:
        connection = self._connected()
        view = memoryview(data)
        while view:
            try:
                view = view[connection.send(view) :]
            except BlockingIOError:
                _wait(connection, select.POLLOUT, deadline)
            except ConnectionError:
                raise NoAgent("the connection to the guest's agent has ended: QEMU runs no more") from None

    def _line(self, deadline: float) -> bytes:
        """The next line, without its end; TimeoutError at `deadline`."""
        connection = self._connected()
        while (end := self._buffer.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._buffer)
            if self._scanned > LONGEST:
                raise AgentError(f"the guest's agent sent more than {LONGEST >> 20} MiB at once", AgentError.PROTOCOL)
            _wait(connection, select.POLLIN, deadline)
            try:
                chunk = connection.recv(_CHUNK)
            except BlockingIOError:
                continue
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise _Ended
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._scanned = 0
        return line


class _Ended(Exception):
    """QEMU has closed the connection."""


def _connect(home: str, deadline: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while True:
            try:
                with socket_path(os.path.join(home, SOCKET)) as short:
                    connection.connect(short)
                return connection
            except BlockingIOError:  # QEMU's queue is full: of others than ovt, which takes turns
                if time.monotonic() > deadline:
                    raise Conflict(
                        "another program is connected to the guest's agent", f"see `fuser {home}/{SOCKET}`"
                    ) from None
                time.sleep(_POLL)
    except (FileNotFoundError, ConnectionError):
        connection.close()
        raise NoAgent("the VM has no channel to a guest agent, or does not run") from None
    except BaseException:
        connection.close()
        raise


def _request(name: str, arguments: Mapping[str, Any] | None) -> bytes:
    request = {"execute": name, **({"arguments": arguments} if arguments else {})}
    return json.dumps(request).encode() + b"\n"


def _answer(line: bytes) -> dict[str, Any]:
    """One answer out of its line: an object with `return` or `error`."""
    try:
        answer = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or ("return" not in answer and "error" not in answer):
        start = printable(line[:60].decode(errors="replace"), 60)
        raise AgentError(f"the guest's agent sent something that is no answer: {start}", AgentError.PROTOCOL)
    return answer


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ready(connection: socket.socket, event: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _wait(connection: socket.socket, event: int, deadline: float) -> None:
    if not _ready(connection, event, deadline - time.monotonic()):
        raise TimeoutError
