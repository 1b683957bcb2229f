"""Guest agents for tests, each on home/qga.sock where QEMU would listen: one that follows a script, the distribution's
qemu-ga and our own ovt-guest, both running on this machine with everything forbidden that would change it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ovt.engine.vm.agent import SOCKET
from ovt.engine.vm.qmp import listen

ROOT = Path(__file__).resolve().parents[4]
OVT_GUEST = ROOT / "ovt/_bin/ovt-guest"
QEMU_GA = os.environ.get("OVT_TEST_QEMU_GA") or shutil.which("qemu-ga", path=f"{os.environ.get('PATH')}:/usr/sbin")
DANGEROUS = (
    "guest-shutdown",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-freeze-list",
    "guest-fsfreeze-thaw",
    "guest-fstrim",
    "guest-set-time",
    "guest-suspend-disk",
    "guest-suspend-hybrid",
    "guest-suspend-ram",
    "guest-set-vcpus",
    "guest-set-memory-blocks",
    "guest-set-user-password",
    "guest-ssh-add-authorized-keys",
    "guest-ssh-remove-authorized-keys",
)

Reply = dict[str, Any] | bytes | None
Handler = Callable[[dict[str, Any]], Reply]
INFO = {"version": "9.9.9", "supported_commands": [{"name": "guest-ping", "enabled": True}]}


class FakeAgent:
    """Answers one client after another, by `handler`: an object is sent as a line of JSON, bytes as they are, None is
    silence. guest-sync-delimited and guest-info are answered by itself unless `sync` or the handler does it."""

    def __init__(self, home: Path, handler: Handler = lambda request: None, sync: Handler | None = None) -> None:
        self.home = home
        self.handler = handler
        self.sync = sync
        self.seen: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.clients = 0
        self.connected = 0
        self.most_connected = 0
        self.client: socket.socket | None = None
        self._ended = False
        self._listener = listen(str(home / SOCKET), 1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self.client is not None:
            with contextlib.suppress(OSError):
                self.client.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while not self._ended:
            try:
                self.client, _ = self._listener.accept()
            except OSError:
                return
            self.clients += 1
            with self.client, contextlib.suppress(OSError):
                self._talk(self.client)

    def _talk(self, client: socket.socket) -> None:
        buffer = b""
        while data := client.recv(1 << 16):
            buffer += data.replace(b"\xff", b"")
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                request = json.loads(line)
                name = request["execute"]
                self.seen.append(name)
                self.requests.append(request)
                reply: Reply
                if name == "guest-sync-delimited":
                    number = request["arguments"]["id"]
                    good = b"\xff" + json.dumps({"return": number}).encode() + b"\n"
                    reply = self.sync(request) if self.sync else good
                else:
                    reply = self.handler(request)
                    if reply is None and name == "guest-info":
                        reply = {"return": INFO}
                if isinstance(reply, dict):
                    reply = json.dumps(reply).encode() + b"\n"
                if reply == b"":  # hang up
                    return
                if reply:
                    client.sendall(reply)


def sync_answer(request: dict[str, Any]) -> bytes:
    """What an honest agent answers to guest-sync-delimited."""
    return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"


def supporting(*names: str) -> dict[str, Any]:
    """An answer to guest-info that lists `names`."""
    return {"return": {"version": "9.9.9", "supported_commands": [{"name": n, "enabled": True} for n in names]}}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@contextlib.contextmanager
def fake(home: Path, handler: Handler = lambda request: None, sync: Handler | None = None) -> Iterator[FakeAgent]:
    agent = FakeAgent(home, handler, sync)
    try:
        yield agent
    finally:
        agent.close()


@contextlib.contextmanager
def qemu_ga(home: Path) -> Iterator[None]:
    """The distribution's agent, on this machine."""
    assert QEMU_GA
    process = subprocess.Popen(
        [QEMU_GA, "--method=unix-listen", f"--path={SOCKET}", "--statedir=.", f"--block-rpcs={','.join(DANGEROUS)}"],
        cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not (home / SOCKET).exists():
            assert process.poll() is None and time.monotonic() < deadline, "qemu-ga does not listen"
            time.sleep(0.01)
        yield
    finally:
        process.kill()  # its handler of SIGTERM takes a lock that it may have interrupted
        process.communicate(timeout=20)


@contextlib.contextmanager
def ovt_guest(home: Path) -> Iterator[None]:
    """Our own agent, one process for each connection, as it serves a socket."""
    listener = listen(str(home / SOCKET), 1)
    served: list[subprocess.Popen[bytes]] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                argv = [OVT_GUEST, "--serve", str(client.fileno())]
                served.append(subprocess.Popen(argv, pass_fds=(client.fileno(),), cwd="/", stdin=subprocess.DEVNULL))
            served[-1].wait()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)
        for process in served:
            process.kill()
            process.wait()
        assert not thread.is_alive()
