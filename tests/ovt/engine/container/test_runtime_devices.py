"""Devices and terminals of real containers."""

import array
import fcntl
import os
import pty
import select
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import BARE, Bundle, Oci
from tests.ovt.live import WAITING, Create, Run, refused, wait_for

pytestmark = pytest.mark.root
TTY: dict[str, Any] = {"process": {"terminal": True}}


@pytest.mark.parametrize(
    ("name", "number"), [("null", "1,3"), ("zero", "1,5"), ("full", "1,7"), ("random", "1,8"), ("urandom", "1,9"),
                         ("tty", "5,0")],
)  # fmt: skip
def test_default_device(run: Run, name: str, number: str) -> None:
    assert run("stat", "-c", "%F %t,%T %a %u", f"/dev/{name}") == f"character special file {number} 666 0"


@pytest.mark.parametrize(
    ("name", "target"),
    [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
     ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx")],
)  # fmt: skip
def test_link_in_dev(run: Run, name: str, target: str) -> None:
    assert run("readlink", f"/dev/{name}") == target


def test_default_devices_work(run: Run) -> None:
    script = "echo x > /dev/null; head -c3 /dev/zero | wc -c; echo x > /dev/full || echo full"
    assert run("sh", "-c", f"({script}) 2>/dev/null").split() == ["3", "full"]


@pytest.mark.parametrize(
    ("device", "seen"),
    [
        ({"type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6},
         "character special file 1,3 640 5 6"),
        ({"type": "u", "major": 1, "minor": 5}, "character special file 1,5 666 0 0"),
        ({"type": "b", "major": 7, "minor": 0, "fileMode": 0o660}, "block special file 7,0 660 0 0"),
        ({"type": "p", "fileMode": 0o600}, "fifo 0,0 600 0 0"),
    ],
)  # fmt: skip
def test_configured_device(run: Run, device: dict[str, Any], seen: str) -> None:
    config = {"linux": {"devices": [{"path": "/dev/deep/own", **device}]}}
    assert run("stat", "-c", "%F %t,%T %a %u %g", "/dev/deep/own", config=config) == seen


def test_a_configured_device_replaces_the_default(run: Run) -> None:
    config = {"linux": {"devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600}]}}
    assert run("stat", "-c", "%a", "/dev/null", config=config) == "600"


def test_a_device_that_was_not_granted_cannot_be_opened(run: Run) -> None:
    config = {"linux": {"devices": [{"path": "/dev/loop", "type": "b", "major": 7, "minor": 0}]}}
    assert "not permitted" in run("sh", "-c", "cat /dev/loop 2>&1 || true", config=config)


def test_a_device_that_was_granted_can_be_opened(run: Run) -> None:
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "b", "major": 7, "minor": 0, "access": "r"}]
    config = {
        "linux": {
            "devices": [{"path": "/dev/loop", "type": "b", "major": 7, "minor": 0}],
            "resources": {"devices": rules},
            # not below a group that another test may have denied devices to
            "cgroupsPath": f"/{leaks.PREFIX}-devices",
        }
    }
    script = "(exec 3< /dev/loop) && echo read; (exec 3> /dev/loop) 2>/dev/null || echo refused"
    assert run("sh", "-c", script, config=config).split() == ["read", "refused"]


def read_until(fd: int, words: bytes, seconds: float = 10) -> bytes:
    """What comes out of a terminal until `words` did, or its end."""
    out = b""
    deadline = time.monotonic() + seconds
    while words not in out:
        assert time.monotonic() < deadline, out
        if select.select([fd], [], [], 0.1)[0]:
            try:
                chunk = os.read(fd, 4096)
            except OSError:
                break
            if not chunk:
                break
            out += chunk
    return out


class Listener:
    """The other end of --console-socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(1)

    def master(self) -> int:
        self.socket.settimeout(10)
        with self.socket.accept()[0] as connection:
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_LEN(4))
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        self.socket.close()
        return int(fds[0])


@pytest.fixture
def listener(tmp_path: Path) -> Listener:
    return Listener(tmp_path / "console")


def test_console_socket(create: Create, listener: Listener) -> None:
    script = "tty; ls -l /dev/console /dev/pts/0; stty size; read x; echo got $x"
    size = {"height": 33, "width": 111}
    config = {"process": {"terminal": True, "consoleSize": size}}
    container = create("sh", "-c", script, config=config, flags=("--console-socket", listener.path))
    master = listener.master()
    try:
        container.start()
        out = read_until(master, b"33 111")
        assert b"/dev/pts/0" in out and out.count(b"136,") == 2
        os.write(master, b"words\n")
        assert b"got words" in read_until(master, b"got words")
    finally:
        os.close(master)


def test_a_console_socket_with_a_long_path(create: Create, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    short = Path(f"/proc/self/fd/{os.open(directory, os.O_PATH)}")
    listener = Listener(short / "console")
    os.close(int(short.name))
    create("true", config=TTY, flags=("--console-socket", directory / "console"))
    os.close(listener.master())


def test_the_terminal_is_the_controlling_one_and_the_console(create: Create, listener: Listener) -> None:
    script = "echo to-console > /dev/console; echo to-tty > /dev/tty; ps -o pid,tty"
    container = create("sh", "-c", script, config=TTY, flags=("--console-socket", listener.path))
    master = listener.master()
    try:
        container.start()
        out = read_until(master, b"no such words")
        assert b"to-console" in out and b"to-tty" in out and b"136,0" in out
    finally:
        os.close(master)


def test_the_terminal_belongs_to_the_user(create: Create, listener: Listener) -> None:
    config = {"process": {"terminal": True, "user": {"uid": 1000, "gid": 1000}}}
    container = create("stat", "-c", "%u %a", "/dev/pts/0", config=config, flags=("--console-socket", listener.path))
    master = listener.master()
    try:
        container.start()
        assert read_until(master, b"\n").split()[0] == b"1000"
    finally:
        os.close(master)


def test_create_with_a_terminal_and_no_socket(oci: Oci, bundle: Bundle, container_id: str) -> None:
    assert "console socket" in refused(oci("create", "-b", bundle(config=TTY), container_id))


def test_create_with_a_socket_and_no_terminal(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    done = oci("create", "--console-socket", tmp_path / "none", "-b", bundle(), container_id)
    assert "console socket" in refused(done)


def test_a_console_socket_nobody_listens_on(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    done = oci("create", "--console-socket", tmp_path / "none", "-b", bundle(config=TTY), container_id)
    assert "no such file or directory" in refused(done).lower()
    assert "does not exist" in refused(oci("state", container_id))


def on_a_terminal(runtime: Path, *arguments: object) -> tuple["subprocess.Popen[bytes]", int]:
    """Start the runtime with a terminal of 50 × 132 as its own; returns the master."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    process = subprocess.Popen(
        [runtime, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, env=BARE, start_new_session=True
    )
    os.close(slave)
    return process, master


def test_run_on_a_terminal(runtime: Path, run_root: Path, bundle: Bundle, container_id: str) -> None:
    script = "stty size; read x; echo got $x; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.05; done"
    place = bundle("sh", "-c", script, config=TTY)
    process, master = on_a_terminal(runtime, "--root", run_root, "run", "-b", place, container_id)
    try:
        assert b"50 132" in read_until(master, b"50 132")
        os.write(master, b"words\r")
        read_until(master, b"ready")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 80, 0, 0))
        os.kill(process.pid, 28)
        assert b"20 80" in read_until(master, b"20 80")
        assert process.wait(10) == 7
    finally:
        os.close(master)
        process.kill()
        process.wait()


def test_interrupt_on_a_terminal(runtime: Path, run_root: Path, bundle: Bundle, container_id: str) -> None:
    place = bundle("sh", "-c", "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done", config=TTY)
    process, master = on_a_terminal(runtime, "--root", run_root, "run", "-b", place, container_id)
    try:
        read_until(master, b"ready")
        os.write(master, b"\x03")
        assert process.wait(10) == 9
    finally:
        os.close(master)
        process.kill()
        process.wait()


def test_run_with_a_terminal_inside_and_pipes_outside(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle("sh", "-c", "tty; cat", config=TTY)
    done = oci("run", "-b", place, container_id, input="through\n", check=True)
    assert "/dev/pts/0" in done.stdout and "through" in done.stdout


def test_exec_on_a_terminal(runtime: Path, run_root: Path, create: Create) -> None:
    container = create(*WAITING).start()
    process, master = on_a_terminal(
        runtime, "--root", run_root, "exec", "-t", container.id, "sh", "-c", "tty; stty size; exit 5"
    )
    try:
        out = read_until(master, b"50 132")
        assert b"/dev/pts/0" in out
        assert process.wait(10) == 5
    finally:
        os.close(master)
        process.kill()
        process.wait()


def test_exec_with_a_console_socket(create: Create, listener: Listener, tmp_path: Path) -> None:
    container = create(*WAITING).start()
    pid_file = tmp_path / "pid"
    container.oci(
        "exec", "--tty", "--detach", "--pid-file", pid_file, "--console-socket", listener.path, container.id,
        "sh", "-c", "tty; read x", check=True, capture_output=False,
    )  # fmt: skip
    master = listener.master()
    try:
        assert b"/dev/pts/" in read_until(master, b"/dev/pts/")
    finally:
        os.close(master)
    wait_for(lambda: not Path(f"/proc/{pid_file.read_text()}/root").exists())
