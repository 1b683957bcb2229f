"""ovt-guest outside a virtual machine: the protocol on a socket, with hostile input. Booting it is for the lab."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[4] / "ovt/_bin/ovt-guest"
MOST = (1 << 20) + 4096  # bytes of a request
CAPTURE = 16 << 20


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Guest:
    """The agent on the other end of a socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(30)
        command = [PROGRAM, "--serve", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.unread = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> bytes:
        """The next line, as it is."""
        parts = [self.unread]
        while b"\n" not in parts[-1]:
            data = self.socket.recv(1 << 20)
            assert data, "the agent has closed the connection"
            parts.append(data)
        line, _, self.unread = b"".join(parts).partition(b"\n")
        return line

    def answer(self, data: bytes) -> Any:
        self.send(data)
        return json.loads(self.receive())

    def ask(self, command: str, **arguments: Any) -> None:
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self.ask(command, **arguments)
        answer = json.loads(self.receive())
        assert "return" in answer, answer
        return answer["return"]

    def refused(self, command: str, **arguments: Any) -> str:
        self.ask(command, **arguments)
        return str(json.loads(self.receive())["error"]["desc"])

    def ended(self, pid: int) -> dict[str, Any]:
        end = time.monotonic() + 20
        while not (status := self("guest-exec-status", pid=pid))["exited"]:
            assert time.monotonic() < end, "the program did not end"
            time.sleep(0.01)
        return dict(status)

    def sh(self, script: str, **more: Any) -> dict[str, Any]:
        return self.ended(self("guest-exec", path="sh", arg=["-c", script], capture_output=True, **more)["pid"])

    def talk(self, pid: int, until: bytes = b"", **more: Any) -> tuple[bytes, bytes, dict[str, Any]]:
        """What a program says, until it says `until`, or until its end; and the last answer."""
        out, err, end = b"", b"", time.monotonic() + 20
        while True:
            answer = self("ovt-io", pid=pid, wait_ms=2000, **more)
            more = {}
            out, err = out + base64.b64decode(answer["out"]), err + base64.b64decode(answer["err"])
            if answer["exited"] or (until and until in out):
                return out, err, answer
            assert time.monotonic() < end, (out, err)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.socket.close()
    assert guest.process.wait(20) == 0  # it ends with its client, and nothing has made it crash


def test_sync_and_ping(guest: Guest) -> None:
    assert guest("guest-sync", id=2**62) == 2**62
    assert guest("guest-ping") == {}
    guest.send(b'{"execute": "guest-\xff{"execute": "guest-sync-delimited", "arguments": {"id": -7}}\n')
    assert guest.receive() == b'\xff{"return": -7}'
    assert guest.answer(b'\r\n\n{"execute":"guest-ping"}\r\n') == {"return": {}}


def test_info_lists_every_command_and_what_is_refused_here(guest: Guest) -> None:
    info = guest("guest-info")
    commands = {entry["name"]: entry for entry in info["supported_commands"]}
    assert {"guest-exec", "guest-fsfreeze-freeze", "ovt-exec", "ovt-io", "ovt-main", "ovt-identity"} <= set(commands)
    assert not commands["guest-shutdown"]["success-response"] and commands["guest-ping"]["success-response"]
    for name, entry in commands.items():
        if not entry["enabled"]:
            assert "only for the first process" in guest.refused(name)
    refused = {name for name, entry in commands.items() if not entry["enabled"]}
    assert {"guest-shutdown", "guest-suspend-ram", "guest-set-time", "ovt-main", "ovt-identity"} <= refused


def test_facts(guest: Guest) -> None:
    uname = os.uname()
    assert guest("guest-get-host-name") == {"host-name": uname.nodename}
    assert abs(guest("guest-get-time") - time.time_ns()) < 10**10
    told = guest("guest-get-osinfo")
    assert (told["kernel-release"], told["machine"]) == (uname.release, uname.machine)
    assert sum(cpu["online"] for cpu in guest("guest-get-vcpus")) == os.cpu_count()
    (lo,) = (card for card in guest("guest-network-get-interfaces") if card["name"] == "lo")
    assert {"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8} in lo["ip-addresses"]
    assert guest("guest-fsfreeze-status") == "thawed"
    assert isinstance(guest("guest-get-users"), list)
    for system in guest("guest-get-fsinfo"):
        assert system["mountpoint"].startswith("/") and system["used-bytes"] <= system["total-bytes-privileged"]


def test_exec_captures_both_streams_and_the_status(guest: Guest) -> None:
    status = guest.sh("cat; echo err >&2; exit 3", input_data=encoded(b"given"))
    assert status == {"exited": True, "exitcode": 3, "out-data": encoded(b"given"), "err-data": encoded(b"err\n")}
    assert guest.sh("kill -9 $$") == {"exited": True, "signal": 9}
    merged = guest("guest-exec", path="sh", arg=["-c", "echo a; echo b >&2"], capture_output="merged")["pid"]
    assert guest.ended(merged)["out-data"] == encoded(b"a\nb\n")
    assert "does not exist" in guest.refused("guest-exec-status", pid=merged)  # it was told once
    quiet = guest.ended(guest("guest-exec", path="echo", arg=["x"])["pid"])
    assert quiet == {"exited": True, "exitcode": 0}


def test_exec_environment_directory_and_names(guest: Guest, tmp_path: Path) -> None:
    status = guest.sh('echo "$A|$PATH|$HOME"; pwd', env=["A=1 2", "HOME=/here"], cwd=str(tmp_path))
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert base64.b64decode(status["out-data"]).decode() == f"1 2|{path}|/here\n{tmp_path}\n"
    assert "No such file" in guest.refused("guest-exec", path="no-such-program")
    assert "Permission denied" in guest.refused("guest-exec", path="/etc/passwd")
    assert "cannot enter" in guest.refused("guest-exec", path="true", cwd="/no/such")
    assert "no such user" in guest.refused("guest-exec", path="true", user="nobody-by-that-name")


@pytest.mark.root
def test_exec_as_another_user(guest: Guest) -> None:
    for user, wanted in (("nobody", "65534 65534"), ("1234", "1234 0"), ("1234:daemon", "1234 1"), ("daemon:7", "1 7")):
        status = guest.sh("echo $(id -u) $(id -g)", user=user)
        assert base64.b64decode(status["out-data"]).decode() == f"{wanted}\n"


def test_more_output_than_is_kept_is_dropped_and_said(guest: Guest) -> None:
    status = guest.sh(f"head -c {CAPTURE + 5} /dev/zero")
    assert status["out-truncated"] and len(base64.b64decode(status["out-data"])) == CAPTURE
    assert "err-truncated" not in status


def test_grandchild_that_holds_the_pipes_does_not_delay_the_end(guest: Guest) -> None:
    status = guest.sh("echo out; sleep 30 & echo $!")
    pid = int(base64.b64decode(status["out-data"]).split()[1])
    os.kill(pid, signal.SIGKILL)
    assert status["exitcode"] == 0


def test_io_with_pipes(guest: Guest) -> None:
    pid = guest("ovt-exec", path="sh", arg=["-c", "echo ready; cat; echo end >&2; exit 5"])["pid"]
    assert guest.talk(pid, b"ready\n")[0] == b"ready\n"
    data = random.Random(4).randbytes(700_000)
    out, err, answer = guest.talk(pid, input=encoded(data), eof=True)
    assert (out, err, answer["exitcode"]) == (data, b"end\n", 5)
    assert "does not exist" in guest.refused("ovt-io", pid=pid)


def test_io_with_a_terminal(guest: Guest) -> None:
    script = (
        "stty -echo; trap 'stty size; exit 4' INT; stty size; tty; echo $TERM; while :; do read line; echo $line; done"
    )
    pid = guest("ovt-exec", path="sh", arg=["-c", script], tty=True, rows=33, cols=101)["pid"]
    out, _, _ = guest.talk(pid, b"linux\r\n")
    assert out.startswith(b"33 101\r\n/dev/pts/")
    assert guest.talk(pid, b"hello\r\n", input=encoded(b"hello\n"), rows=20, cols=50)[0] == b"hello\r\n"
    out, _, answer = guest.talk(pid, input=encoded(b"\x03"))
    assert (out, answer["exitcode"]) == (b"20 50\r\n", 4)


def test_end_of_input_on_a_terminal(guest: Guest) -> None:
    pid = guest("ovt-exec", path="wc", arg=["-c"], tty=True)["pid"]
    assert guest.talk(pid, input=encoded(b"four\n"), eof=True)[2]["exitcode"] == 0


def test_io_waits_but_never_longer_than_the_next_request(guest: Guest) -> None:
    pid = guest("ovt-exec", path="sleep", arg=["60"])["pid"]
    begun = time.monotonic()
    nothing = {"out": "", "err": "", "pending": 0, "exited": False}
    assert guest("ovt-io", pid=pid, wait_ms=50) == nothing
    assert 0.04 < time.monotonic() - begun < 20
    guest.ask("ovt-io", pid=pid, wait_ms=50_000)
    guest.ask("guest-ping")
    assert json.loads(guest.receive())["return"] == nothing
    assert json.loads(guest.receive())["return"] == {}
    assert guest.talk(pid, signal=signal.SIGTERM)[2]["signal"] == signal.SIGTERM
    assert time.monotonic() - begun < 40


def test_input_that_is_not_read_is_told_and_limited(guest: Guest) -> None:
    pid = guest("ovt-exec", path="sleep", arg=["60"])["pid"]
    piece, refusal = encoded(bytes(750_000)), None
    for _ in range(10):
        guest.ask("ovt-io", pid=pid, input=piece)
        answer = json.loads(guest.receive())
        if refusal := answer.get("error"):
            break
        assert answer["return"]["pending"] > 0
    assert refusal is not None and "does not read" in refusal["desc"]
    assert guest.talk(pid, signal=signal.SIGKILL)[2]["signal"] == signal.SIGKILL


def test_program_waits_when_its_output_is_not_fetched(guest: Guest) -> None:
    pid = guest("ovt-exec", path="sh", arg=["-c", "head -c 3000000 /dev/zero; echo done >&2"])["pid"]
    time.sleep(0.3)
    assert guest("guest-ping") == {}
    first = guest("ovt-io", pid=pid)
    assert 0 < len(base64.b64decode(first["out"])) < 1 << 20 and first["err"] == ""
    out, err, _ = guest.talk(pid)
    assert len(base64.b64decode(first["out"])) + len(out) == 3_000_000 and err == b"done\n"


def test_files(guest: Guest, tmp_path: Path) -> None:
    path, data = tmp_path / "file", random.Random(3).randbytes(500_000)
    handle = guest("guest-file-open", path=str(path), mode="wb+")
    assert guest("guest-file-write", handle=handle, buf_b64=encoded(data)) == {"count": len(data), "eof": False}
    assert guest("guest-file-write", handle=handle, buf_b64=encoded(b"abc"), count=1)["count"] == 1
    assert guest("guest-file-flush", handle=handle) == {}
    assert path.read_bytes() == data + b"a"
    assert guest("guest-file-seek", handle=handle, offset=-2, whence="end") == {"position": 499_999, "eof": False}
    read = guest("guest-file-read", handle=handle, count=10)
    assert read == {"count": 2, "buf-b64": encoded(data[-1:] + b"a"), "eof": True}
    assert guest("guest-file-seek", handle=handle, offset=0, whence=0)["position"] == 0
    read = guest("guest-file-read", handle=handle, count=16 << 20)
    assert base64.b64decode(read["buf-b64"]) == data + b"a" and read["eof"]
    assert guest("guest-file-close", handle=handle) == {}
    assert "has not been found" in guest.refused("guest-file-read", handle=handle)


def test_file_errors(guest: Guest, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handle = guest("guest-file-open", path=str(fifo))  # would wait for a writer
    assert guest("guest-file-read", handle=handle)["count"] == 0
    assert "No such file" in guest.refused("guest-file-open", path=str(tmp_path / "nothing"))
    assert "invalid file open mode" in guest.refused("guest-file-open", path="/etc/passwd", mode="rx")
    assert "must be from" in guest.refused("guest-file-read", handle=handle, count=1 << 40)
    assert "not base64" in guest.refused("guest-file-write", handle=handle, buf_b64="a===")
    assert "whence" in guest.refused("guest-file-seek", handle=handle, offset=0, whence="middle")
    handles = [guest("guest-file-open", path="/dev/null") for _ in range(100)]
    assert guest("guest-file-read", handle=handles[-1])["eof"]
    assert len(list(Path(f"/proc/{guest.process.pid}/fd").iterdir())) < 80  # clients that died do not use them up


@pytest.mark.parametrize(
    ("request_line", "wanted"),
    [
        (b"{", "Invalid JSON"),
        (b'{"execute": "guest-ping"} x', "more than one value"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" + b"0," * 20_000 + b"0]", "too many values"),
        (b'"\\ud800"', "surrogate"),
        (b'{"execute": "a\\u0000b"}', "NUL"),
        (b'{"execute": "a\0b"}', "control character"),
        (b"{'execute': 1}", "without a name"),
        (b"\x80\x81", "not JSON"),
        (b"01", "not a number"),
        (b"[]", "not an object"),
        (b"{}", "lacks 'execute'"),
        (b'{"execute": 5}', "lacks 'execute'"),
        (b'{"execute": "guest-ping", "arguments": []}', "must be an object"),
        (b'{"execute": "guest-ping", "arguments": {"x": 1}}', "'x' is unexpected"),
        (b'{"execute": "guest-sync", "arguments": {"id": "1"}}', "expected: integer"),
        (b'{"execute": "guest-sync", "arguments": {"id": 1e3}}', "expected: integer"),
        (b'{"execute": "guest-sync", "arguments": {"id": 9223372036854775808}}', "expected: integer"),
        (b'{"execute": "guest-sync"}', "'id' is missing"),
        (b'{"execute": "guest-exec", "arguments": {"path": "true", "arg": ["a", 1]}}', "array of strings"),
        (b'{"execute": "guest-exec", "arguments": {"path": "cat", "input-data": "YQ"}}', "not base64"),
        (b'{"execute": "guest-exec", "arguments": {"path": "cat", "capture-output": "all"}}', "does not accept"),
        (b'{"execute": "guest-exec-status", "arguments": {"pid": 1}}', "PID 1 does not exist"),
        (b'{"execute": "ovt-io", "arguments": {"pid": -1}}', "does not exist"),
        (b'{"execute": "ovt-io", "arguments": {"pid": 0, "signal": 65}}', "from 1 to 64"),
        (b'{"x": "' + b"y" * MOST + b'"}', "longer than"),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_bad_request_gets_one_error_and_nothing_else(guest: Guest, request_line: bytes, wanted: str) -> None:
    error = guest.answer(request_line + b"\n")["error"]
    assert error["class"] == "GenericError" and wanted in error["desc"]
    assert guest("guest-sync", id=1) == 1


def test_unknown_command_has_a_class_of_its_own(guest: Guest) -> None:
    error = guest.answer('{"execute": "guest-\u00fc\\ud83d\\ude00\\n"}\n'.encode())["error"]
    assert error["class"] == "CommandNotFound" and "guest-\u00fc\U0001f600\n" in error["desc"]


def test_largest_request_passes(guest: Guest, tmp_path: Path) -> None:
    handle = guest("guest-file-open", path=str(tmp_path / "file"), mode="w")
    assert guest("guest-file-write", handle=handle, buf_b64=encoded(bytes(768 << 10)))["count"] == 768 << 10


def test_names_that_are_not_utf8_make_valid_answers(guest: Guest) -> None:
    guest.send(b'{"execute": "guest-file-open", "arguments": {"path": "/no/\xfe\xed\xa0\x80"}}\n')
    assert "/no/\ufffd\ufffd\ufffd\ufffd" in json.loads(guest.receive())["error"]["desc"]


def test_client_that_does_not_read_is_waited_for(guest: Guest) -> None:
    count = 3000
    line = json.dumps({"execute": "guest-info"}).encode() + b"\n"
    child = os.fork()
    if child == 0:
        try:
            guest.send(line * count)
        finally:
            os._exit(0)
    time.sleep(0.3)
    for _ in range(count):
        assert b"supported_commands" in guest.receive()
    assert os.waitpid(child, 0)[1] == 0
    resident = Path(f"/proc/{guest.process.pid}/statm").read_text().split()[1]
    assert int(resident) * os.sysconf("SC_PAGE_SIZE") < 8 << 20


def test_many_programs_at_once_and_then_one_error(guest: Guest) -> None:
    pids = [guest("ovt-exec", path="sleep", arg=["60"])["pid"] for _ in range(128)]
    assert "running already" in guest.refused("guest-exec", path="true")
    for pid in pids:
        guest("ovt-io", pid=pid, signal=signal.SIGKILL)
    assert guest.talk(pids[0])[2]["signal"] == signal.SIGKILL
    assert guest.sh("echo again")["exitcode"] == 0


SEEDS = [
    {"execute": "guest-sync", "arguments": {"id": 1234567}},
    {"execute": "guest-exec-status", "arguments": {"pid": 99999999}},
    {"execute": "guest-file-open", "arguments": {"path": "/dev/null", "mode": "r"}},
    {"execute": "guest-file-read", "arguments": {"handle": 1, "count": 10}},
    {"execute": "guest-file-seek", "arguments": {"handle": 1, "offset": 0, "whence": {"name": "set"}}},
    {"execute": "guest-file-write", "arguments": {"handle": 1, "buf-b64": "aGVsbG8gd29ybGQ="}},
    {"execute": "ovt-io", "arguments": {"pid": 1, "input": "aGVsbG8=", "eof": True, "wait-ms": 1}},
    {"execute": "ovt-identity", "arguments": {"mac": "52:54:00:12:34:56", "entropy": "AAAA"}},
    {"execute": "x\u00e9\U0001f600\n", "arguments": [None, True, -1.5e3, {"a": []}]},
    {"execute": "guest-get-osinfo"},
]


def test_mutated_requests_neither_crash_nor_confuse_it(guest: Guest) -> None:
    chance = random.Random(20261122)
    pieces = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\\",
        b"\\u12",
        b"\\ud83d",
        b"\0",
        b"\xff",
        b"9" * 30,
        b"\r",
        b"=",
    ]
    for number in range(4000):
        seed = json.dumps(chance.choice(SEEDS), ensure_ascii=chance.random() < 0.5).encode()
        line = bytearray(seed)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(line) + 1)
            match chance.randrange(4):
                case 0:
                    line[at:at] = chance.choice(pieces)
                case 1:
                    del line[at : at + chance.randint(1, 9)]
                case 2:
                    line[at : at + 1] = chance.randbytes(1)
                case _:
                    line[at:at] = line[: chance.randint(0, 40)]
        mark = f'{{"execute": "guest-sync", "arguments": {{"id": {number}}}}}\n'.encode()
        guest.send(bytes(line).replace(b"\n", b" ") + b"\n" + mark)
        while json.loads(guest.receive().lstrip(b"\xff")).get("return") != number:
            pass


def test_it_refuses_to_run_as_an_ordinary_program() -> None:
    done = subprocess.run([PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("usage: ovt-guest")


def test_it_is_small() -> None:
    assert PROGRAM.stat().st_size < 900 << 10
