"""The QMP client, against a server that follows a script."""

import array
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm.qmp import Gone, Qmp, QmpError, listen, socket_path
from ovt.errors import Conflict, HostError

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 9}}, "capabilities": []}}


class Server:
    """QEMU's end. Nothing here waits for longer than the socket's time limit."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(10)

    def say(self, *messages: dict[str, Any]) -> None:
        self.connection.sendall(b"".join(json.dumps(m).encode() + b"\r\n" for m in messages))

    def hear(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self.connection.recv(1 << 16))
        return line


@pytest.fixture
def pair() -> Iterator[tuple[Qmp, Server]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Qmp(ours), Server(theirs)


def behind(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data}


def test_negotiates(pair: tuple[Qmp, Server]) -> None:
    qmp, server = pair
    server.say(GREETING, {"return": {}, "id": 1})
    qmp.negotiate(5)
    assert qmp.version == (7, 2, 9)
    assert server.hear() == {"execute": "qmp_capabilities", "id": 1}


@pytest.mark.parametrize(
    ("greeting", "words"),
    [(b"SSH-2.0\n", "not JSON"), (b"[1]\n", "no message"), (b'{"hello": 1}\n', "no QMP server")],
)
def test_garbage_for_a_greeting(pair: tuple[Qmp, Server], greeting: bytes, words: str) -> None:
    qmp, server = pair
    server.connection.sendall(greeting)
    with pytest.raises(HostError, match=words):
        qmp.negotiate(5)


def test_an_answer_in_pieces_with_events_between(pair: tuple[Qmp, Server]) -> None:
    qmp, server = pair

    def answer() -> None:
        server.hear()
        server.say(event("STOP"))
        server.connection.sendall(b'{"return": {"a"')
        server.connection.sendall(b': 1}, "id": 1}\n{"event": "RES')
        server.connection.sendall(b'UME", "data": {}}\n')

    thread = behind(answer)
    assert qmp.command("x", {"b": 2}, timeout=5) == {"a": 1}
    thread.join()
    assert [e["event"] for e in qmp.take_events()] == ["STOP", "RESUME"]
    assert not qmp.events


def test_no_answer(pair: tuple[Qmp, Server]) -> None:
    with pytest.raises(HostError, match="has not answered stop for"):
        pair[0].command("stop", timeout=0.1)


def test_end(pair: tuple[Qmp, Server]) -> None:
    qmp, server = pair
    server.connection.close()
    with pytest.raises(Gone):
        qmp.command("stop", timeout=5)


def test_error(pair: tuple[Qmp, Server]) -> None:
    qmp, server = pair
    server.say({"error": {"class": "DeviceNotFound", "desc": "no such"}, "id": 1})
    with pytest.raises(QmpError, match="device_del: no such") as caught:
        qmp.command("device_del", {"id": "x"}, timeout=5)
    assert caught.value.error_class == "DeviceNotFound"


def test_descriptor(pair: tuple[Qmp, Server], tmp_path: Path) -> None:
    qmp, server = pair
    (tmp_path / "f").write_text("content")
    server.say({"return": {"fdset-id": 7, "fd": 3}, "id": 1})
    with open(tmp_path / "f") as file:
        assert qmp.add_fd(file.fileno(), opaque="o") == 7
    raw, rights, _, _ = server.connection.recvmsg(4096, socket.CMSG_SPACE(16))
    assert json.loads(raw)["arguments"] == {"opaque": "o"}
    (fd,) = array.array("i", rights[0][2])
    assert os.read(fd, 99) == b"content"
    os.close(fd)


def test_waits_for_one_event_and_keeps_the_order_of_others(pair: tuple[Qmp, Server]) -> None:
    qmp, server = pair
    server.say(*(event("E", n=n) for n in (1, 2)), event("F"), event("E", n=3))
    found = qmp.wait_event("E", timeout=5, where=lambda e: e["data"]["n"] == 2)
    assert found == event("E", n=2)
    assert qmp.wait_event("F", timeout=5) == event("F")
    assert qmp.take_events() == [event("E", n=1), event("E", n=3)]
    with pytest.raises(TimeoutError):
        qmp.wait_event("E", timeout=0.05)


@pytest.mark.parametrize("error", ["", "no space"])
def test_job(pair: tuple[Qmp, Server], error: str) -> None:
    qmp, server = pair
    job = {"id": "j", "type": "commit", "current-progress": 4, "total-progress": 9, "status": "running"}
    done = {**job, "current-progress": 9, "status": "concluded", **({"error": error} if error else {})}
    server.say({"return": {}, "id": 1}, {"return": [job], "id": 2}, event("JOB_STATUS_CHANGE", id="j"))
    server.say({"return": [done], "id": 3}, {"return": {}, "id": 4})
    heard: list[tuple[int, int]] = []

    def run() -> None:
        qmp.run_job("block-commit", {"job-id": "j"}, timeout=5, progress=lambda *two: heard.append(two))

    if error:
        with pytest.raises(QmpError, match="commit: no space"):
            run()
    else:
        run()
    assert heard == [(4, 9), (9, 9)]
    assert b"job-dismiss" in server.connection.recv(1 << 16)


def test_busy_gone_and_a_long_path(tmp_path: Path) -> None:
    home = tmp_path / ("d" * 120)
    home.mkdir()
    with pytest.raises(Gone):
        Qmp.connect(f"{home}/qmp.sock", 1)
    with listen(f"{home}/qmp.sock"):
        assert (home / "qmp.sock").stat().st_mode & 0o777 == 0o600
        with pytest.raises(Conflict, match="busy"):
            Qmp.connect(f"{home}/qmp.sock", 0.1)
    with socket_path(f"{home}/qmp.sock") as short:
        assert len(short) < 108
