"""Programs in a guest: by any qemu-guest-agent and by our own, both running on this machine; and what liars do."""

from __future__ import annotations

import fcntl
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.base import Process
from ovt.engine.vm import agent_exec
from ovt.engine.vm.agent import Agent, AgentError
from ovt.engine.vm.agent_exec import Streams, execute
from ovt.engine.vm.agent_program import collect
from ovt.errors import OvtError, PayloadError, StateError, UsageError
from tests.ovt.engine.vm.agents import OVT_GUEST, QEMU_GA, ROOT, b64, fake, ovt_guest, qemu_ga, supporting

SERVERS: dict[str, Callable[[Path], Any]] = {"qemu-ga": qemu_ga, "ovt-guest": ovt_guest}
REAL = [
    pytest.param("qemu-ga", marks=pytest.mark.skipif(not QEMU_GA, reason="needs qemu-ga")),
    pytest.param("ovt-guest", marks=pytest.mark.skipif(not OVT_GUEST.exists(), reason="needs ovt-guest")),
]
OWN = REAL[1:]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(params=REAL)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where a real agent listens."""
    with SERVERS[request.param](tmp_path):
        yield tmp_path


@pytest.fixture(params=OWN)
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with SERVERS[request.param](tmp_path):
        yield tmp_path


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Path]:
    if not QEMU_GA:
        pytest.skip("needs qemu-ga")
    with qemu_ga(tmp_path):
        yield tmp_path


class Ran:
    def __init__(self, status: int, out: bytes, err: bytes, notes: list[str]) -> None:
        self.status, self.out, self.err, self.notes = status, out, err, notes


@contextmanager
def _spooled(name: Path, data: bytes = b"") -> Iterator[int]:
    name.write_bytes(data)
    fd = os.open(name, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def run(home: Path, *command: str, data: bytes | None = None, detach: bool = False, **options: Any) -> Ran:
    notes: list[str] = []
    process = Process(command, stdin=data is not None, **options)
    with _spooled(home / "in", data or b"") as stdin, _spooled(home / "out") as out, _spooled(home / "err") as err:
        status = execute(Agent(str(home)), process, streams=Streams(stdin, out, err), detach=detach, note=notes.append)
    return Ran(status, (home / "out").read_bytes(), (home / "err").read_bytes(), notes)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# both kinds


def test_output_errors_and_status(home: Path) -> None:
    ran = run(home, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (ran.status, ran.out, ran.err, ran.notes) == (7, b"out\n", b"err\n", [])


def test_no_output(home: Path) -> None:
    assert run(home, "true").status == 0
    assert run(home, "false").status == 1


def test_arguments_are_kept_as_they_are(home: Path) -> None:
    words = ["", "a b", "*", "$HOME", "'\"", "-c", "--", "new\nline", "ü", "\\n"]
    ran = run(home, "printf", "[%s]", *words)
    assert ran.out.decode() == "".join(f"[{word}]" for word in words)


def test_program_that_is_killed(home: Path) -> None:
    assert run(home, "sh", "-c", "kill -9 $$").status == 137


def test_input(home: Path) -> None:
    assert run(home, "cat", data=b"\x00binary\xff\n" * 1000).out == b"\x00binary\xff\n" * 1000
    assert run(home, "wc", "-c", data=b"").out.split() == [b"0"]
    assert run(home, "cat").out == b""  # without --stdin there is none, and no waiting for any


def test_much_input_and_output(home: Path) -> None:
    data = os.urandom(3 << 20)
    assert run(home, "cat", data=data).out == data


def test_program_that_does_not_read_its_input(home: Path) -> None:
    assert run(home, "true", data=b"x" * (6 << 20)).status == 0


def test_environment(home: Path) -> None:
    ran = run(home, "sh", "-c", 'echo "$A|$B|$PATH|$HOME"', env=("A=1=2", "B=x y"))
    assert (
        ran.out
        == b"1=2|x y|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin|" + (ran.out.rsplit(b"|", 1)[1])
    )
    assert run(home, "/bin/sh", "-c", "echo $PATH", env=("PATH=/bin",)).out == b"/bin\n"


def test_working_directory(home: Path) -> None:
    assert run(home, "pwd", workdir="/usr/share").out == b"/usr/share\n"
    assert run(home, "pwd").out == b"/\n"
    with pytest.raises(PayloadError, match="directory") as caught:
        run(home, "pwd", workdir="/no/such")
    assert caught.value.exit_status == 126
    with pytest.raises(UsageError, match="not absolute"):
        run(home, "pwd", workdir="relative")


@needs_root
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("nobody", "uid=65534 gid=65534"),
        ("12345", "uid=12345 gid=0"),
        ("12345:54321", "uid=12345 gid=54321"),
        ("nobody:daemon", "uid=65534 gid=1"),
    ],
)
def test_user(home: Path, user: str, ids: str) -> None:
    ran = run(home, "sh", "-c", 'echo "uid=$(id -u) gid=$(id -g)"', user=user)
    assert ran.out.decode() == ids + "\n"


@needs_root
def test_user_that_is_not_there(home: Path) -> None:
    for user in ("no-such-user", "nobody:no-such-group"):
        with pytest.raises(PayloadError) as caught:
            run(home, "true", user=user)
        assert caught.value.exit_status == 126
        assert "no" in str(caught.value)
    with pytest.raises(UsageError, match="is no user"):
        run(home, "true", user="$(reboot)")


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(
    ("program", "words", "status"),
    [
        ("no-such-program", "executable file not found in $PATH", 127),
        ("/no/such/program", "no such file or directory", 127),
        ("/etc/passwd", "permission denied", 126),
    ],
)
def test_program_that_cannot_be_run(home: Path, program: str, words: str, status: int, detach: bool) -> None:
    with pytest.raises(PayloadError) as caught:
        run(home, program, detach=detach)
    assert str(caught.value) == f'exec: "{program}": {words}'
    assert caught.value.exit_status == status


def test_127_of_the_program_itself_is_its_status(home: Path) -> None:
    assert run(home, "sh", "-c", "echo gone >&2; exit 127").status == 127


def test_detached_program_goes_on(home: Path) -> None:
    mark = home / "mark"
    ran = run(home, "sh", "-c", f"sleep 0.2; pwd >{mark}.new; mv {mark}.new {mark}", detach=True, workdir="/usr")
    assert ran.status > 1 and not ran.out
    until(mark.exists)
    assert mark.read_text() == "/usr\n"


def test_collect(home: Path) -> None:
    done = collect(Agent(str(home)), ("/bin/sh", "-c", "echo a; echo b >&2; exit 3"))
    assert done == (3, b"a\n", b"b\n", False)
    with pytest.raises(AgentError, match=r"sleep has not ended in the guest in 0\.1 seconds"):
        collect(Agent(str(home)), ("sleep", "5"), 0.1)


def test_signals_go_to_the_program(home: Path) -> None:
    ready = home / "ready"
    script = f"trap 'echo got it; exit 5' TERM; touch {ready}; while :; do sleep 0.05; done"
    threading.Thread(target=lambda: (until(ready.exists), os.kill(os.getpid(), signal.SIGTERM))).start()
    ran = run(home, "sh", "-c", script)
    assert (ran.status, ran.out) == (5, b"got it\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_commands_have_their_turn_meanwhile(plain: Path) -> None:
    done = threading.Event()

    def ask() -> None:
        Agent(str(plain)).command("guest-ping")
        done.set()

    other = threading.Thread(target=ask)
    other.start()
    before = time.monotonic()
    assert run(plain, "sleep", "1.5").status == 0
    assert done.is_set() and time.monotonic() - before < 20
    other.join()


# our own agent


class Terminal:
    """`execute` with --tty in a process of its own, on a terminal of its own."""

    def __init__(self, home: Path, *command: str) -> None:
        program = (
            "import sys; from ovt.engine.base import Process; from ovt.engine.vm.agent import Agent\n"
            "from ovt.engine.vm.agent_exec import execute\n"
            f"sys.exit(execute(Agent({str(home)!r}), Process({command!r}, tty=True, stdin=True)))"
        )
        self.master, slave = pty.openpty()
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env={**os.environ, "TERM": "vt220"},
        )  # fmt: skip
        self.seen = b""

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096)
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_terminal(own: Path) -> None:
    terminal = Terminal(own, "sh", "-c", 'stty size; echo "$TERM"; tty; read a; echo "<$a>"; exec cat')
    try:
        terminal.expect(b"33 101\r\nvt220\r\n/dev/pts/")
        assert not termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        terminal.type(b"hello\r")
        terminal.expect(b"<hello>\r\n")
        terminal.type(b"line\r")
        terminal.expect(b"line\r\nline\r\n")
        terminal.type(b"\x03")  # the guest's terminal makes a signal of it, not ours
        assert terminal.process.wait(20) == 130
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_terminal_changes_size(own: Path) -> None:
    terminal = Terminal(own, "sh", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done")
    try:
        terminal.expect(b"ready")
        fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))
        terminal.expect(b"20 70")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(20) == 143
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_output_comes_as_it_is_made(own: Path) -> None:
    ours, theirs = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    command = Process(("sh", "-c", "echo first; read line; echo second"), stdin=True)
    feed, fed = os.pipe()
    status: list[int] = []
    thread = threading.Thread(
        target=lambda: status.append(execute(Agent(str(own)), command, streams=Streams(feed, theirs, null)))
    )
    thread.start()
    try:
        assert os.read(ours, 100) == b"first\n"
        os.write(fed, b"go\n")
        assert os.read(ours, 100) == b"second\n"
    finally:
        os.close(fed)
        thread.join(20)
        for fd in (ours, theirs, null, feed):
            os.close(fd)
    assert status == [0]


def test_reader_that_goes_away_ends_the_program(own: Path) -> None:
    ours, theirs = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    os.close(ours)
    try:
        status = execute(Agent(str(own)), Process(("yes",)), streams=Streams(null, theirs, null))
    finally:
        os.close(theirs)
        os.close(null)
    assert status == 128 + signal.SIGPIPE


# any other agent


def test_no_terminal_without_our_agent(plain: Path) -> None:
    with pytest.raises(StateError, match="no terminals") as caught:
        run(plain, "sh", tty=True)
    assert "ovt console" in caught.value.hint and "ssh" in caught.value.hint


def test_too_much_input(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_exec, "INPUT_LIMIT", 1 << 20)
    assert run(plain, "wc", "-c", data=b"x" * (1 << 20)).out.split() == [b"1048576"]
    with pytest.raises(StateError, match="more than 1 MiB") as caught:
        run(plain, "cat", data=b"x" * ((1 << 20) + 1))
    assert "ovt cp" in caught.value.hint


def test_too_much_output_is_told(plain: Path) -> None:
    ran = run(plain, "head", "-c", str(17 << 20), "/dev/zero")
    assert ran.status == 0 and len(ran.out) == 16 << 20
    assert ran.notes == ["the guest's agent keeps 16 MiB of output: the rest is lost"]


@needs_root
def test_user_by_su_where_there_is_no_setpriv(plain: Path) -> None:
    bin = plain / "bin"
    bin.mkdir()
    for tool in ("sh", "id", "su", "grep", "head", "getent", "true"):
        (bin / tool).symlink_to(subprocess.check_output(["/bin/sh", "-c", f"command -v {tool}"], text=True).strip()
                                if tool != "true" else "/bin/true")  # fmt: skip
    for path in (plain, *plain.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/") and not path.stat().st_mode & 0o1000:
            path.chmod(path.stat().st_mode | 0o111)
    env = (f"PATH={bin}",)
    ran = run(plain, "sh", "-c", '/usr/bin/id -u; echo "$1"', "sh", "-l", user="nobody", env=env)
    assert ran.out == b"65534\n-l\n"
    with pytest.raises(PayloadError, match="no setpriv"):
        run(plain, "sh", user="12345", env=env)


# liars


def lying(**answers: Any) -> Callable[[dict[str, Any]], Any]:
    def handler(request: dict[str, Any]) -> Any:
        name = request["execute"]
        if name == "guest-info":
            return supporting("guest-exec", "guest-exec-status")
        return answers[name.replace("-", "_")]

    return handler


@pytest.mark.parametrize(
    "status",
    [
        [],
        {"exited": True, "out-data": "%%%"},
        {"exited": True, "out-data": 5},
        {"exited": True, "out-data": "ü"},
        {"exited": True, "err-data": ["a"]},
    ],
)
def test_damaged_status(tmp_path: Path, status: Any) -> None:
    with fake(tmp_path, lying(guest_exec={"return": {"pid": 5}}, guest_exec_status={"return": status})):
        with pytest.raises(AgentError) as caught:
            run(tmp_path, "true")
    assert caught.value.error_class == AgentError.PROTOCOL


@pytest.mark.parametrize(("told", "status"), [(0, 0), (255, 255), (256, 255), (-1, 255), ("x", 255), (None, 255)])
def test_strange_exit_codes(tmp_path: Path, told: Any, status: int) -> None:
    done = {"return": {"exited": True, "exitcode": told, "out-data": b64(b"x")}}
    with fake(tmp_path, lying(guest_exec={"return": {"pid": 5}}, guest_exec_status=done)):
        assert run(tmp_path, "true").status == status


@pytest.mark.parametrize("answer", [{}, {"pid": "5"}, {"pid": 0}, {"pid": -1}, 5])
def test_no_pid(tmp_path: Path, answer: Any) -> None:
    with (
        fake(tmp_path, lying(guest_exec={"return": answer})),
        pytest.raises(AgentError, match=r"name the process|no object"),
    ):
        run(tmp_path, "true")


def test_guest_that_was_started_again_meanwhile(tmp_path: Path) -> None:
    gone = {"error": {"class": "GenericError", "desc": "Invalid parameter 'pid'"}}
    with fake(tmp_path, lying(guest_exec={"return": {"pid": 5}}, guest_exec_status=gone)):
        with pytest.raises(StateError, match="started again meanwhile"):
            run(tmp_path, "true")


def test_programs_are_forbidden(tmp_path: Path) -> None:
    told = {"return": {"version": "9", "supported_commands": [{"name": "guest-exec", "enabled": False}]}}
    with fake(tmp_path, lambda request: told), pytest.raises(StateError, match="guest-exec, which is forbidden"):
        run(tmp_path, "true")


def test_guest_without_a_shell(tmp_path: Path) -> None:
    def handler(request: dict[str, Any]) -> Any:
        match request["execute"]:
            case "guest-info":
                return supporting("guest-exec", "guest-exec-status")
            case "guest-exec" if request["arguments"]["path"] == "/bin/sh":
                return {"error": {"desc": "Failed to execute child process (No such file or directory)"}}
            case "guest-exec":
                assert "env" not in request["arguments"]
                return {"return": {"pid": 9}}
        return {"return": {"exited": True, "exitcode": 4, "out-data": b64(b"direct")}}

    with fake(tmp_path, handler):
        ran = run(tmp_path, "C:\\program.exe", "/x")
        assert (ran.status, ran.out) == (4, b"direct")
        with pytest.raises(StateError, match="no /bin/sh"):
            run(tmp_path, "program", workdir="/")


def test_guest_that_lies_about_its_streams(tmp_path: Path) -> None:
    def handler(request: dict[str, Any]) -> Any:
        match request["execute"]:
            case "guest-info":
                return supporting("ovt-exec", "ovt-io")
            case "ovt-exec":
                return {"return": {"pid": 9}}
        return {"return": {"out": 5, "err": "", "exited": False}}

    with fake(tmp_path, handler), pytest.raises(OvtError, match="out is not base64"):
        run(tmp_path, "true")
