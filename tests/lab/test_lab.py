"""The lab itself, from outside: its command, what it does when a host crashes or hangs, that nothing is left of it."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import channel, machine, packages
from tests.lab.pair import Hosts

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "scripts/lab"


@pytest.fixture(autouse=True)
def _available() -> None:
    try:
        packages.require_qemu()
        packages.kernel()
    except packages.Unavailable as error:
        pytest.skip(str(error))


def qemus() -> set[int]:
    """The lab hosts that this test run has started, told from those of others by an environment variable."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                program = (entry / "cmdline").read_bytes().partition(b"\0")[0]
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if program.endswith(b"qemu-system-x86_64") and f"LAB_TEST={os.getpid()}".encode() in environment:
                found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LAB_TEST", str(os.getpid()))
    yield
    end = time.monotonic() + 5
    while qemus() and time.monotonic() < end:
        time.sleep(0.05)
    assert not qemus()


@pytest.mark.lab(outside=True)
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_that_crashes_or_hangs_fails_the_test_it_was_at() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/lab/faults/broken.py"],
        cwd=ROOT,
        env={**os.environ, "CI": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = dict(re.findall(r"::(\S+?(?:\[.*\])?) (PASSED|FAILED|SKIPPED|ERROR)", done.stdout))
    assert outcomes == {
        "test_passes": "PASSED",
        "test_fails[a b]": "FAILED",
        "test_fails[\\xfc]": "FAILED",
        "test_skips": "SKIPPED",
        "test_tears_down_badly": "ERROR",
        "test_crashes": "FAILED",
        "test_after_the_crash": "PASSED",
        "test_hangs": "FAILED",
        "test_after_the_hang": "PASSED",
    }, done.stdout
    assert "printed inside a b" in done.stdout
    assert "while cleaning up" in done.stdout
    assert "lab1: crashed" in done.stdout and "sysrq: Trigger a crash" in done.stdout
    assert "lab1: hung: nothing from it for 36 s" in done.stdout and "ovt: about to hang" in done.stdout
    assert "boots: 3" in done.stdout


@pytest.mark.lab(outside=True)
@pytest.mark.slow
def test_a_command_gets_input_and_gives_output_and_status() -> None:
    script = "cat; echo problem >&2; uname -n; exit 7"
    done = subprocess.run([LAB, "--", "sh", "-c", script], input=b"\0\xff words\n", capture_output=True, check=False)
    assert done.returncode == 7
    assert done.stdout == b"\0\xff words\nlab1\n"
    assert re.search(rb"^lab: up after \d+ s, \d+ s of processor time\nproblem\n$", done.stderr), done.stderr


@pytest.mark.lab(outside=True)
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_shell_is_a_terminal_and_ends_with_its_shell() -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["SHELL"] = "/bin/sh"
        os.execv(LAB, [LAB, "shell"])
    output = b""

    def until(pattern: bytes) -> None:
        nonlocal output
        end = time.monotonic() + 110
        while not re.search(pattern, output):
            assert time.monotonic() < end, output
            if select.select([fd], [], [], 1)[0]:
                output += os.read(fd, 4096)

    try:
        until(rb"(?s)processor time\r\n.*[#%$] $")
        assert b"lab: booting, " in output
        output = b""
        os.write(fd, b"tty; sleep 100\n")
        until(rb"/dev/pts/0\r\n")
        os.write(fd, b"\x03")
        until(rb"(?s)\^C.*[#%$] $")
        os.write(fd, b"exit 5\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    finally:
        os.close(fd)


@pytest.mark.lab(outside=True)
def test_nothing_is_left_when_it_is_killed() -> None:
    with subprocess.Popen([LAB, "--", "true"], stderr=subprocess.DEVNULL, start_new_session=True) as lab:
        while not qemus():
            assert lab.poll() is None
            time.sleep(0.05)
        os.killpg(lab.pid, signal.SIGKILL)


@pytest.mark.parametrize(("arguments", "status"), [(["--"], 2), (["nonsense"], 2), (["--help"], 0), (["shell"], 2)])
def test_a_wrong_call_boots_nothing(arguments: list[str], status: int) -> None:
    done = subprocess.run([LAB, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "scripts/lab" in done.stderr and not done.stdout


def test_a_qemu_that_does_not_start_is_told_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COMMAND_LINE", "x")
    monkeypatch.setattr(machine, "TCG_CPU", "no-such-processor")
    words = r"(?s)lab1: ended while it booted.*no-such-processor"
    with Hosts() as host, pytest.raises(machine.Failed, match=words):
        host.wait_for_boot()


def test_channel_frames_survive_any_cut() -> None:
    ours, theirs = os.pipe()
    try:
        sender, receiver = channel.Channel(theirs), channel.Channel(ours)
        sender.send(b"O", bytes(range(256)) * 20)
        sender.send_json(b"D", 3)
        assert receiver.receive(1) == (b"O", bytes(range(256)) * 20)
        assert receiver.receive(1) == (b"D", b"3")
        with pytest.raises(channel.TimedOut):
            receiver.receive(0.01)
        os.close(theirs)
        with pytest.raises(channel.Closed):
            receiver.receive(1)
    finally:
        os.close(ours)


def test_every_emulated_feature_stands_in_contributing_with_its_option_and_its_test() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("| emulated | by QEMU's option | seen by |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) >= 12
    wiring = machine.Wiring(1, 2, 3, 4, 5, 6, 7, [8, 9])
    image = packages.Kernel("1.2", Path("/kernel"))
    words = " ".join(machine.arguments("qemu", image, 1, wiring, kvm=False))
    for feature, options, tests in rows:
        for option in re.findall(r"`(.*?)`", options):
            assert option in words, feature
        for test in tests.split(", "):
            file, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / "tests/lab" / file).read_text(), feature


def test_with_kvm_the_host_processor_is_used() -> None:
    image = packages.Kernel("1.2", Path("/kernel"))
    words = machine.arguments("qemu", image, 2, machine.Wiring(1, 2, 3, 4, 5, 6, 7), kvm=True)
    assert words[words.index("-accel") + 1] == "kvm" and words[words.index("-cpu") + 1] == "host"
    assert words[words.index("-machine") + 1] == "q35,kernel-irqchip=split"  # what interrupt remapping needs
    assert "lab.host=lab2" in words[words.index("-append") + 1]


@pytest.mark.slow
@pytest.mark.lab(outside=True)
def test_a_command_ends_though_others_hold_its_output() -> None:
    script = "sleep 1000 & echo one; (while :; do echo more; done) & exit 4"
    done = subprocess.run([LAB, "--", "sh", "-c", script], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 4 and b"one\n" in done.stdout
