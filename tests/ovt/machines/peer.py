"""A receiving host that fails when it is told to: between a sending ovt and real sessions of `ovt receive`.

It takes connections at a unix socket as `ovt receive --listen` does, and reads the messages that pass.
"""

import contextlib
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from ovt import exits
from ovt.machines import listening, transport, wire


class Fault(NamedTuple):
    """What happens to the first message of a type."""

    type: str = ""
    when: str = "before"  # before the session gets it | after: when it has been answered, and the answer is lost
    kill: bool = False  # the session is killed, else it only loses its connection
    away: bool = False  # from then on nobody can be reached, until `back`


class Peer:
    """Serve below `directory`, whose data and run roots are `data` and `run` in it."""

    def __init__(self, directory: Path, fault: Fault | None = None, cut: str = "") -> None:
        self.data, self.run = str(directory / "data"), str(directory / "run")
        self.path = str(directory / "peer.sock")
        self.fault = fault
        self.cut = cut  # a channel for data whose connections end at once
        self.seen: list[str] = []
        self.hit = threading.Event()
        self.away = False
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._start(self._serve)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *ignored: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(40.0)
        self._listener.close()

    @property
    def address(self) -> transport.Address:
        return transport.parse(f"unix:{self.path}")

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._start(self._welcome, connection)

    def _welcome(self, connection: socket.socket) -> None:
        fields = wire.read_header(connection.recv)
        if self.away or fields.get("channel") == self.cut:
            connection.close()
        elif "token" in fields:
            transport.pump(connection, listening.meet(self.run, fields["token"], fields["channel"]))
        else:
            self._session(connection)

    def _session(self, connection: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "ovt.machines.receive", self.data, self.run]
        with theirs:
            child = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=exits.env())
        with connection, ours, contextlib.suppress(OSError, EOFError):
            while True:
                self._exchange(connection, ours, child)
        child.wait(60)

    def _exchange(self, connection: socket.socket, session: socket.socket, child: "subprocess.Popen[bytes]") -> None:
        """One request and its answer."""
        raw, message = frame(connection)
        kind = message["type"]
        self.seen.append(kind)
        fault = self.fault if self.fault and self.fault.type == kind else None
        if fault and fault.when == "before":
            self._fail(fault, child)
        session.sendall(raw)
        answer, words = frame(session)
        if words["type"] == "go":
            connection.sendall(answer)
            left = sum(file["size"] for file in message["plan"]["files"])
            while left:
                data = connection.recv(min(left, 1 << 20))
                if not data:
                    raise EOFError
                session.sendall(data)
                left -= len(data)
            answer, words = frame(session)
        if fault:
            self._fail(fault, child)
        connection.sendall(answer)

    def _fail(self, fault: Fault, child: "subprocess.Popen[bytes]") -> None:
        self.fault = None
        self.away = fault.away
        if fault.kill:
            child.kill()
            child.wait()
        self.hit.set()
        raise EOFError


def frame(connection: socket.socket) -> tuple[bytes, wire.Message]:
    """The next message, as bytes and read; EOFError at the end."""
    head = exactly(connection, 4)
    body = exactly(connection, int.from_bytes(head, "big"))
    return head + body, json.loads(body)


def exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
