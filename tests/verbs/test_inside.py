"""Reaching into living instances, the same for containers and machines: exec, attach, cp."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.verbs.conftest import Open
from tests.verbs.shared import Verbs

pytestmark = pytest.mark.root

CTRL_P_Q = b"\x10\x11"


def test_exec(ovt: Verbs) -> None:
    ovt.start()
    script = "cat; echo $A; pwd; id -u; echo err >&2; exit 4"
    options = ("-i", "-e", "A=1", "-w", "/etc", "-u", "nobody")
    done = ovt("exec", *options, "web", "sh", "-c", script, input="in\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (4, "in\n1\n/etc\n65534\n", "err\n")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nosuch"], 127, "executable file not found"),
        (["/etc/passwd"], 126, "permission denied"),
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
    ],
)
def test_exit_statuses_of_exec(ovt: Verbs, words: list[str], status: int, said: str) -> None:
    ovt.start()
    done = ovt("exec", "web", *words, check=False)
    assert done.returncode == status
    assert said in done.stderr


def test_exec_passes_bytes_both_ways(ovt: Verbs) -> None:
    ovt.start()
    data = bytes(range(256)) * 1024
    done = ovt("exec", "-i", "web", "cat", input=data, text=False)
    assert done.stdout == data


def test_exec_with_much_output(ovt: Verbs) -> None:
    ovt.start()
    done = ovt("exec", "web", "head", "-c", "10485760", "/dev/zero", text=False)
    assert done.stdout == bytes(10 << 20)


def test_exec_in_the_background(ovt: Verbs) -> None:
    ovt.start()
    pid = int(ovt.out("exec", "-d", "web", "sh", "-c", "echo here > /tmp/mark"))
    ovt.wait_for(lambda: ovt.out("exec", "web", "cat", "/tmp/mark", check=False) == "here")
    assert pid > 0
    if not ovt.vm:
        os.waitpid(pid, 0)  # an orphan, which this test run adopts: unreaped it would keep its pid namespace


def test_exec_at_a_terminal(ovt: Verbs, terminal: Open) -> None:
    ovt.start()
    shell = terminal("exec", "-it", "web", "sh")
    shell.expect("# ")
    shell.type(b"stty size; tty\n")
    shell.expect("24 80\n")
    shell.expect("/dev/")
    shell.resize(30, 90)
    shell.type(b"sleep 0.5; stty size\n")
    shell.expect("30 90\n")
    shell.type(b"exit 4\n")
    assert shell.end() == 4


def test_detach_and_attach(ovt: Verbs, terminal: Open) -> None:
    shell = terminal("run", *ovt.flags, "-it", "--name", "web", "busybox", "sh")
    shell.expect("# ")
    shell.type(b"A=kept\n")
    shell.expect("# ")
    shell.type(CTRL_P_Q)
    shell.expect("detached from web; ovt attach web goes back")
    assert shell.end() == 0
    assert ovt.status("web") == "running"
    again = terminal("attach", "web")
    again.type(b"echo is $A; exit 6\n")
    again.expect("is kept")
    assert again.end() == 6
    assert ovt.out("wait", "web") == "6"


def test_attach_shows_what_comes_and_ends_with_its_status(ovt: Verbs) -> None:
    ovt.start("trap 'echo bye; exit 7' TERM; echo started; while :; do echo tick; sleep 0.2; done")
    process = subprocess.Popen([*ovt.words, "attach", "--no-stdin", "web"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "tick\n"
        ovt("stop", "web")
        assert process.stdout.read().splitlines()[-1] == "bye"
    assert process.wait(20) == 7


# cp


def test_cp_of_a_file(ovt: Verbs, tmp_path: Path) -> None:
    ovt.start()
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a").chmod(0o750)
    ovt("cp", str(tmp_path / "a"), "web:/tmp/b")
    ovt("cp", "web:/tmp/b", str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == data
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o750


def test_cp_of_directories(ovt: Verbs, tmp_path: Path) -> None:
    ovt.start()
    (tmp_path / "dir/sub").mkdir(parents=True)
    (tmp_path / "dir/sub/a").write_text("a")
    ovt("cp", str(tmp_path / "dir"), "web:/tmp")  # into a directory that is there
    assert ovt.out("exec", "web", "cat", "/tmp/dir/sub/a") == "a"
    ovt("exec", "web", "sh", "-c", "echo b > /tmp/dir/sub/b; ln -s sub /tmp/dir/link")
    ovt("cp", "web:/tmp/dir/.", str(tmp_path / "back"))
    assert sorted(os.listdir(tmp_path / "back/sub")) == ["a", "b"]
    assert os.readlink(tmp_path / "back/link") == "sub"


def test_cp_of_what_is_not_there(ovt: Verbs, tmp_path: Path) -> None:
    ovt.start()
    for words in (("web:/nosuch", str(tmp_path / "x")), (str(tmp_path / "nosuch"), "web:/tmp")):
        done = ovt("cp", *words, check=False)
        assert done.returncode == 1
        assert "nosuch" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
