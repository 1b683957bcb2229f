"""Attaching: pipes and terminals, several clients, slow ones, detaching, and leaving the terminal as it was."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ovt.engine import supervised, supervisor
from ovt.engine.attach import parse_keys
from ovt.errors import HostError, UsageError
from tests.ovt.engine.test_supervisor import BUSYBOX, child, home, output, sh, until

__all__ = ["home"]


class Client:
    """`attach` in a process of its own, as `ovt attach` is, on pipes or on a terminal of its own."""

    def __init__(self, home: str, *, tty: bool = False, **options: Any) -> None:
        program = (
            "import sys; from ovt.engine.supervisor import attach, DETACHED\n"
            f"status = attach({home!r}, 0, 1, 2, on_attached=lambda: open(sys.argv[1], 'w').close(), **{options!r})\n"
            "sys.exit(100 if status is DETACHED else status)"
        )
        self.ready = Path(home, f"ready-{time.monotonic_ns()}")
        root = Path(supervisor.__file__).parent.parent.parent
        argv = [sys.executable, "-c", program, str(self.ready)]
        self.seen = b""
        if tty:
            self.master, slave = pty.openpty()
            self.before = termios.tcgetattr(slave)
            self.slave = slave
            self.process = subprocess.Popen(
                argv, stdin=slave, stdout=slave, stderr=slave, cwd=root, start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )  # fmt: skip
        else:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
            )
        until(self.ready.exists)

    def expect(self, text: bytes) -> None:
        """Read the terminal until `text` was seen since the last call."""
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], self.seen
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


def test_pipes_carry_input_output_and_status(home: str) -> None:
    supervisor.launch(home, sh("sort; echo to stderr >&2; exit 3"), stdin=True, log=f"{home}/log")
    client = Client(home)
    out, err = client.process.communicate(b"b\na\nc\n", timeout=20)
    assert (client.process.returncode, out, err) == (3, b"a\nb\nc\n", b"to stderr\n")
    assert output(home) == b"a\nb\nc\nto stderr\n"


def test_megabytes_through_cat_both_ways(home: str) -> None:
    data = os.urandom(5_000_000)
    supervisor.launch(home, child(BUSYBOX, "cat"), stdin=True)
    client = Client(home, lossless=True)
    out, _ = client.process.communicate(data, timeout=60)
    assert client.process.returncode == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_a_lossless_client_slow_as_it_is_misses_nothing_of_a_hundred_megabytes(home: str) -> None:
    supervisor.launch(
        home, sh(f"read go; {BUSYBOX} head -c 100000000 /dev/zero | tr '\\0' x; echo end; exit 2"),
        stdin=True, log=f"{home}/log", log_max=1 << 20,
    )  # fmt: skip
    client = Client(home, lossless=True)
    assert client.process.stdin and client.process.stdout
    client.process.stdin.write(b"go\n")
    client.process.stdin.flush()
    total, last = 0, b""
    time.sleep(0.5)
    assert supervisor.exit_record(home) is None  # the guest waits for us
    while piece := client.process.stdout.read1(1 << 20):
        total += len(piece)
        time.sleep(0.001)
        last = (last + piece)[-5:]
    assert total == 100_000_004 and last == b"xend\n"
    client.process.communicate(timeout=20)
    assert client.process.returncode == 2


def test_the_end_waits_for_no_reader_and_the_reader_gets_it_all(home: str) -> None:
    # fits into the pipe of the guest and the buffers of the connection, but not all into the client's own pipe
    supervisor.launch(home, sh("read go; head -c 300000 /dev/zero; head -c 60000 /dev/zero >&2; exit 8"), stdin=True,
                      exit_command=[BUSYBOX, "touch", f"{home}/cleaned"])  # fmt: skip
    connection = supervised.connect(home, supervised.LOSSLESS)
    assert connection
    with connection[0] as client:
        client.send(b"Igo\n")
        client.settimeout(20)
        got = 0
        while True:  # read just so much that the guest can end
            try:
                assert supervisor.wait(home, 0.02).code == 8
                break
            except TimeoutError:
                got += len(client.recv(16385)) - 1
        until(lambda: Path(home, "cleaned").exists())
        until(lambda: not supervisor.alive(home))
        while (packet := client.recv(16385))[:1] != b"X":
            got += len(packet) - 1
        assert (got, packet) == (360_000, b"X\x08")


def test_a_slow_ordinary_client_is_told_what_it_missed_and_never_waited_for(home: str) -> None:
    supervisor.launch(home, sh("read go; head -c 5000000 /dev/zero; read more; echo tail; exit 1"), stdin=True)
    first = supervised.connect(home, 0)
    assert first
    with first[0] as client:
        client.settimeout(20)
        second = supervised.connect(home, supervised.LOSSLESS)
        assert second
        with second[0] as fast:
            fast.settimeout(20)
            client.send(b"Igo\n")
            got = 0
            while got < 5_000_000:
                got += len(fast.recv(16385)) - 1
        got = 0
        while (packet := client.recv(16385))[:1] != b"L":
            got += len(packet) - 1
        assert got + int.from_bytes(packet[1:], "big") == 5_000_000 and got > 100_000
        client.send(b"Imore\n")
        assert client.recv(100) == b"Otail\n"
        assert client.recv(100) == b"X\x01"


def test_without_open_stdin_nothing_is_read_and_nothing_sent(home: str) -> None:
    supervisor.launch(home, sh("readlink /proc/self/fd/0; sleep 0.5; cat; exit 5"), log=f"{home}/log")
    read, write = os.pipe()
    os.write(write, b"secret")
    assert supervisor.attach(home, read, None, None) == 5
    assert os.read(read, 10) == b"secret"
    assert output(home) == b"/dev/null\n"
    os.close(read)
    os.close(write)


def test_an_ended_guest_answers_with_its_recorded_status(home: str) -> None:
    supervisor.launch(home, sh("kill -9 $$"))
    supervisor.wait(home, 10)
    assert supervisor.attach(home, None, None, None) == 137


def test_input_survives_a_client_that_leaves_at_once(home: str) -> None:
    supervisor.launch(home, sh("sleep 0.3; cat"), stdin=True, log=f"{home}/log")
    data = b"0123456789abcde\n" * 1024
    connection = supervised.connect(home, supervised.QUIET)
    assert connection
    with connection[0] as client:
        for _ in range(9):
            client.send(b"I" + data)  # more than the pipe of the guest holds
        client.send(b"E")
    assert supervisor.wait(home, 10).code == 0
    assert output(home) == data * 9


def test_clients_beyond_the_limit_are_turned_away(home: str) -> None:
    supervisor.launch(home, sh("sleep 30"))
    connections = [supervised.connect(home, 0) for _ in range(64)]
    assert all(connections)
    with pytest.raises(HostError, match="too many"):
        supervisor.attach(home, None, None, None)
    for connection in connections:
        assert connection
        connection[0].close()
    until(lambda: (again := supervised.connect(home, 0)) and (again[0].close() or True))


@pytest.mark.parametrize("packet", [b"Igreetless", b"H", b"H\0\0", b"x" * 20000, b"W\0\0\0\0"])
def test_clients_that_speak_something_else_are_dropped(home: str, packet: bytes) -> None:
    import socket

    supervisor.launch(home, sh("read line; echo $line; exit 1"), stdin=True, log=f"{home}/log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(f"{home}/attach.sock")
        client.settimeout(10)
        client.send(packet)
        assert client.recv(10) == b""
    connection = supervised.connect(home, 0)
    assert connection
    with connection[0] as client:
        client.send(b"?unknown kinds are ignored")
        client.send(b"W\0")
        client.send(b"Ifine\n")
        assert client.recv(100) == b"Ofine\n"


def test_signals_go_where_they_are_told(home: str) -> None:
    guest = sh("trap 'echo int; exit 4' INT; echo on; while :; do sleep 0.05; done")
    known = supervisor.launch(home, guest, log=f"{home}/log")
    until(lambda: output(home))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    handler = signal.getsignal(signal.SIGINT)
    status = supervisor.attach(home, None, None, None, forward_signals=lambda n: os.kill(known.child_pid, n))
    timer.join()
    assert status == 4
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_terminal_echo_line_editing_size_and_exit(home: str) -> None:
    script = "echo ready; while read line; do echo got $line; stty size; done; exit 6"
    supervisor.launch(home, sh(script), tty=True, stdin=True, log=f"{home}/log")
    client = Client(home, tty=True)
    until(lambda: b"ready" in output(home))
    client.size(33, 77)
    client.type(b"hello\r")
    client.expect(b"hello\r\n")  # the guest's terminal echoes, ours does not
    client.expect(b"got hello\r\n")
    client.expect(b"33 77\r\n")
    client.size(44, 88)
    client.type(b"again\r")
    client.expect(b"44 88\r\n")
    client.type(b"\x04")
    assert client.process.wait(20) == 6
    assert termios.tcgetattr(client.slave) == client.before
    client.close()


def test_two_clients_see_and_type_into_one_terminal(home: str) -> None:
    supervisor.launch(home, child(BUSYBOX, "cat"), tty=True, stdin=True)
    first, second = Client(home, tty=True), Client(home, tty=True)
    first.type(b"from first\r")
    for client in (first, second):
        client.expect(b"from first\r\nfrom first\r\n")
    second.type(b"from second\r")
    for client in (first, second):
        client.expect(b"from second\r\nfrom second\r\n")
    first.type(b"\x10\x11")
    assert first.process.wait(20) == 100
    second.type(b"\x04")
    assert second.process.wait(20) == 0
    first.close()
    second.close()


def test_detaching_leaves_the_guest_and_the_terminal_alone(home: str) -> None:
    supervisor.launch(home, child(BUSYBOX, "cat", "-v"), tty=True, stdin=True)
    client = Client(home, tty=True)
    client.type(b"\x10a")  # a beginning of the keys that goes on differently is input
    client.expect(b"^Pa")
    client.type(b"\x10\x10\x11")  # and so is the first of two beginnings
    assert client.process.wait(20) == 100
    assert termios.tcgetattr(client.slave) == client.before
    assert supervisor.alive(home)
    client.close()
    other = Client(home, tty=True, detach_keys="x,y")
    other.type(b"\x10xx\r")
    other.expect(b"^Pa^P^Pxx\r\n")  # what the first had typed is still there
    other.type(b"xy")
    assert other.process.wait(20) == 100
    other.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_client_gives_the_terminal_back(home: str, number: signal.Signals) -> None:
    supervisor.launch(home, child(BUSYBOX, "cat"), tty=True, stdin=True)
    client = Client(home, tty=True)
    assert termios.tcgetattr(client.slave) != client.before
    client.process.send_signal(number)
    # Python turns SIGINT into KeyboardInterrupt and ends by it all the same
    assert client.process.wait(20) == -number
    assert termios.tcgetattr(client.slave) == client.before
    assert supervisor.alive(home)
    client.close()


def test_a_terminal_without_open_input_stays_cooked_and_takes_nothing(home: str) -> None:
    supervisor.launch(home, sh("tty; read -t 1 line; echo got=$line"), tty=True, log=f"{home}/log")
    client = Client(home, tty=True)
    client.type(b"nothing\r")
    assert client.process.wait(20) == 0
    assert b"got=\r\n" in output(home) and b"nothing" not in output(home)
    client.close()


def test_a_terminal_that_nobody_has_open_for_a_while_comes_back(home: str) -> None:
    script = "t=$(tty); echo one; exec <&- >&- 2>&-; sleep 0.5; echo two >$t; exit 3"
    supervisor.launch(home, sh(script), tty=True, log=f"{home}/log")
    assert supervisor.wait(home, 20).code == 3
    assert output(home) == b"one\r\ntwo\r\n"


def test_a_terminal_by_console_socket_as_an_oci_runtime_sends_it(home: str) -> None:
    import socket

    deep = os.path.join(home, "x" * 120)
    os.mkdir(deep)

    def make(stdio: supervisor.Stdio) -> int:
        master, slave = os.openpty()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(stdio.console_socket())
            socket.send_fds(client, [b"/dev/pts/ptmx"], [master])
        os.close(master)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for fd in range(3):
                os.dup2(slave, fd)
            os.execv(BUSYBOX, ["sh", "-c", "echo on a terminal; test -t 0 && exit 12"])
        os.close(slave)
        return pid

    for directory in (home, deep):
        supervisor.launch(directory, make, tty=True, log=f"{directory}/log")
        assert supervisor.wait(directory, 10).code == 12
        assert output(directory) == b"on a terminal\r\n"
        assert "console.sock" not in os.listdir(directory)


def test_a_runtime_that_sends_no_terminal_is_an_error(home: str) -> None:
    with pytest.raises(HostError, match="without the terminal"):
        supervisor.launch(home, lambda stdio: subprocess.Popen([BUSYBOX, "sleep", "30"]).pid, tty=True)


def test_detach_keys_are_named_as_people_know_them() -> None:
    assert parse_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert parse_keys("a,ctrl-@,ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_") == b"a\x00\x1b\x1c\x1d\x1e\x1f"
    assert parse_keys("") == b""
    for wrong in ("ctrl-", "ctrl-1", "ab", "a,,b", "é"):
        with pytest.raises(UsageError):
            parse_keys(wrong)
