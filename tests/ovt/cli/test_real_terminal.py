"""`ovt` at a terminal: run -it, attach and detach, exec -it, resizing."""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Callable, Iterator

import pytest

from tests.ovt.cli.place import Place
from tests.ovt.cli.terminal import Terminal

pytestmark = pytest.mark.root

CTRL_P_Q = b"\x10\x11"
Open = Callable[..., Terminal]


@pytest.fixture
def terminal(real_ovt: Place) -> Iterator[Open]:
    made: list[Terminal] = []

    def start(*words: str) -> Terminal:
        made.append(Terminal([*real_ovt.words, *words]))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def test_run_at_a_terminal(terminal: Open) -> None:
    shell = terminal("run", "-it", "--rm", "--name", "web", "busybox", "sh")
    shell.expect("/ # ")
    shell.type(b"tty; stty size; echo $TERM $(( 6 * 7 ))\n")
    shell.expect("/dev/")
    shell.expect("24 80\n")
    shell.expect("xterm 42")
    shell.resize(50, 100)
    shell.type(b"sleep 0.3; stty size\n")
    shell.expect("50 100\n")
    shell.type(b"exit 5\n")
    assert shell.end() == 5


def test_keys_reach_the_program(terminal: Open) -> None:
    shell = terminal("run", "-it", "--rm", "busybox", "sh", "-c", "trap 'echo interrupted; exit 3' INT; echo up; cat")
    shell.expect("up")
    shell.type(b"\x03")
    shell.expect("interrupted")
    assert shell.end() == 3


def test_detach_and_attach(terminal: Open, real_ovt: Place) -> None:
    shell = terminal("run", "-it", "--name", "web", "busybox", "sh")
    shell.expect("/ # ")
    shell.type(b"A=kept\n" + CTRL_P_Q)
    shell.expect("detached from web; ovt attach web goes back")
    assert shell.end() == 0
    assert real_ovt.status("web") == "running"
    again = terminal("attach", "web")
    again.type(b"echo $A; exit 6\n")
    again.expect("kept")
    assert again.end() == 6
    assert real_ovt.out("wait", "web") == "6"


def test_the_terminal_is_given_back(terminal: Open) -> None:
    shell = terminal("run", "-it", "--rm", "busybox", "sh", "-c", "echo up; read x")
    before = termios.tcgetattr(shell.fd)[3]
    shell.expect("up")
    raw = termios.tcgetattr(shell.fd)[3]
    assert before & termios.ICANON
    assert not raw & termios.ICANON
    shell.type(b"\n")
    while os.waitpid(shell.pid, os.WNOHANG) == (0, 0):
        assert shell.pid
        shell._read(0.05)
    after = termios.tcgetattr(shell.fd)[3]
    shell.pid = 0
    os.close(shell.fd)
    assert after & termios.ICANON


def test_exec_at_a_terminal(terminal: Open, real_ovt: Place) -> None:
    real_ovt("run", "-d", "--name", "web", "busybox", "sleep", "100")
    shell = terminal("exec", "-it", "web", "sh")
    shell.expect("/ # ")
    shell.type(b"stty size; tty\n")
    shell.expect("24 80\n")
    shell.expect("/dev/")
    shell.resize(30, 90)
    shell.type(b"sleep 0.3; stty size\n")
    shell.expect("30 90\n")
    shell.type(b"exit 4\n")
    assert shell.end() == 4


def test_exec_without_a_terminal_of_its_own_does_not_get_ours(terminal: Open, real_ovt: Place) -> None:
    real_ovt("run", "-d", "--name", "web", "busybox", "sleep", "100")
    shell = terminal("exec", "-i", "web", "sh", "-c", "read x; echo got $x; tty; ls -l /proc/self/fd/1; exit 2")
    shell.type(b"words\n")
    shell.expect("got words")
    shell.expect("not a tty")
    shell.expect("pipe:")
    assert shell.end() == 2


def test_signals_reach_a_program_without_a_terminal(real_ovt: Place, terminal: Open) -> None:
    program = "trap 'echo told; exit 8' TERM; echo up; while :; do sleep 0.05; done"
    shell = terminal("run", "--rm", "busybox", "sh", "-c", program)
    shell.expect("up")
    os.kill(shell.pid, signal.SIGTERM)
    shell.expect("told")
    assert shell.end() == 8


def test_a_terminal_needs_one(real_ovt: Place) -> None:
    done = real_ovt("run", "-it", "--rm", "busybox", check=False)
    assert done.returncode == 125
    assert "not a terminal" in done.stderr
