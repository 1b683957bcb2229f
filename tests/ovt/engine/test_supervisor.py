"""The supervisor's life: launch, log, exit record, orphans, being killed; with real processes and the real binary."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovt.engine import supervisor
from ovt.engine.supervised import start_time
from ovt.engine.supervisor import Stdio
from ovt.errors import ConfigError, HostError, NotFound, OvtError, PayloadError, StateError

BUSYBOX = "/usr/bin/busybox"


def child(*argv: str) -> Callable[[Stdio], int]:
    """A make_child that runs argv the way an engine would."""

    def make(stdio: Stdio) -> int:
        ends = (stdio.slave(),) * 3 if stdio.tty else (stdio.stdin, stdio.stdout, stdio.stderr)
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for number, fd in enumerate(ends):
                    os.dup2(fd, number)
                if stdio.tty:
                    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal
                os.execve(argv[0], argv, {"PATH": os.environ["PATH"]})  # readline gives pytest LINES and COLUMNS
            finally:
                os._exit(127)
        return pid

    return make


def sh(script: str) -> Callable[[Stdio], int]:
    return child(BUSYBOX, "sh", "-c", script)


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[str]:
    """An instance directory; nothing that a test started in it outlives the test."""
    yield str(tmp_path)
    for directory in [str(record.parent) for record in tmp_path.rglob("supervisor.json")]:
        known = supervisor.info(directory)
        for pid, started in ((known.child_pid, known.child_start_time), (known.pid, known.start_time)):
            if start_time(pid) == started:
                os.kill(pid, signal.SIGKILL)
        until(lambda: start_time(known.pid) != known.start_time)  # noqa: B023 (called before the next round)


def run(home: str, script: str, **options: object) -> supervisor.ExitRecord:
    supervisor.launch(home, sh(script), log=f"{home}/log", **options)  # type: ignore[arg-type]
    return supervisor.wait(home, 30)


def output(home: str, stream: str | None = None) -> bytes:
    return b"".join(r.data for r in supervisor.read_log(f"{home}/log") if stream in (None, r.stream))


@pytest.mark.parametrize("code", [0, 1, 7, 127, 255])
def test_exit_codes_are_recorded(home: str, code: int) -> None:
    before = time.time()
    record = run(home, f"exit {code}")
    assert (record.code, record.signal) == (code, None)
    assert record.pid == supervisor.info(home).child_pid
    stamp = supervisor.LogRecord(record.finished, "", b"").time_ns / 1e9
    assert before - 1 < stamp < time.time() + 1
    until(lambda: not supervisor.alive(home))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_signal_is_recorded_like_a_shell_does(home: str, number: signal.Signals) -> None:
    record = run(home, f"kill -{int(number)} $$")
    assert (record.code, record.signal) == (128 + number, number)
    assert json.loads(Path(home, "exit.json").read_text()).keys() == {"pid", "code", "signal", "finished"}


def test_the_log_keeps_streams_lines_and_parts_apart(home: str) -> None:
    run(home, "echo one; echo two >&2; printf three; sleep 0.1; printf ' and'; sleep 0.1; echo ' more'; printf end")
    lines = [line.split(" ", 3)[1:] for line in Path(home, "log").read_text().splitlines()]
    assert [line for line in lines if line[0] == "stderr"] == [["stderr", "F", "two"]]
    assert [line[1:] for line in lines if line[0] == "stdout"] == [
        ["F", "one"], ["P", "three"], ["P", " and"], ["F", " more"], ["P", "end"],
    ]  # fmt: skip
    assert output(home, "stdout") == b"one\nthree and more\nend"
    times = [r.time for r in supervisor.read_log(f"{home}/log")]
    assert times == sorted(times)


def test_binary_output_comes_back_byte_for_byte(home: str, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1_000_000)
    tmp_path.joinpath("data").write_bytes(data)
    run(home, f"cat {tmp_path}/data")
    assert output(home) == data
    assert max(len(line) for line in Path(home, "log").read_bytes().split(b"\n")) <= 16384 + 40


def test_a_hundred_megabytes_in_a_bounded_log_end_with_the_last_line(home: str) -> None:
    program = "import sys\nfor n in range(1000): sys.stdout.write(f'{n:099d}\\n' * 1000)\nprint('the end')"
    supervisor.launch(
        home, child(sys.executable, "-c", program), log=f"{home}/log", log_max=1 << 20, log_files=3
    )  # fmt: skip
    assert supervisor.wait(home, 60).code == 0
    files = sorted(p.name for p in Path(home).glob("log*"))
    assert files == ["log", "log.1", "log.2"]
    assert all(Path(home, name).stat().st_size <= 1 << 20 for name in files)
    lines = output(home).splitlines()
    assert lines[-1] == b"the end"
    numbers = [int(line) for line in lines[:-1]]
    # one run of numbers without a gap: a thousand of each, but the first, which rotation cut
    assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[0], 1000))
    assert all(numbers.count(n) == 1000 for n in range(numbers[0] + 1, 1000))


def test_one_file_means_that_a_full_log_starts_anew(home: str) -> None:
    run(home, "i=0; while [ $i -lt 500 ]; do echo line $i; i=$((i+1)); done", log_max=4096, log_files=1)
    assert [p.name for p in Path(home).glob("log*")] == ["log"]
    assert output(home).endswith(b"line 499\n")


def test_without_a_log_nothing_is_written(home: str) -> None:
    supervisor.launch(home, sh("echo hello"))
    assert supervisor.wait(home, 10).code == 0
    until(lambda: not supervisor.alive(home))
    assert sorted(os.listdir(home)) == ["exit.json", "supervisor.json"]
    with pytest.raises(NotFound):
        next(supervisor.read_log(f"{home}/log"))


def test_a_torn_record_of_a_killed_predecessor_does_not_spoil_the_next(home: str) -> None:
    Path(home, "log").write_bytes(b"2026-11-22T16:00:00.000000000Z stdout F torn he")
    run(home, "echo whole")
    assert output(home) == b"torn he\nwhole\n"


def test_output_before_the_end_is_kept_while_grandchildren_hold_the_pipe(home: str) -> None:
    started = time.monotonic()
    run(home, "sleep 30 & head -c 60000 /dev/zero; echo; echo last words")
    assert time.monotonic() - started < 10
    assert output(home) == bytes(60000) + b"\nlast words\n"


def test_grandchildren_that_never_stop_talking_do_not_delay_the_end(home: str) -> None:
    supervisor.launch(home, sh("yes & echo $! >&2"), log=f"{home}/log", log_max=1 << 20)
    assert supervisor.wait(home, 10).code == 0


def test_orphans_are_reaped(home: str) -> None:
    supervisor.launch(home, sh("(sleep 0.1 & echo orphan $!) ; sleep 30"), log=f"{home}/log")
    until(lambda: b"orphan" in output(home))
    orphan = int(output(home).split()[1])
    until(lambda: not os.path.exists(f"/proc/{orphan}"))
    assert supervisor.alive(home)


def test_the_environment_of_a_supervisor(home: str) -> None:
    known = supervisor.launch(home, sh("sleep 30"), name="a-long-guest-name", log=f"{home}/log", stdin=True)
    proc = Path(f"/proc/{known.pid}")
    assert (proc / "comm").read_text() == "ovt:a-long-gues\n"
    assert b"a-long-guest-name" in (proc / "cmdline").read_bytes()
    assert os.readlink(proc / "cwd") == "/"
    assert os.getsid(known.pid) == known.pid != os.getsid(0)

    def links() -> list[str]:
        return sorted(os.readlink(proc / "fd" / fd).split(":")[0] for fd in os.listdir(proc / "fd"))

    expected = ["/dev/null"] * 3 + ["pipe"] * 3 + ["socket", "anon_inode", home, home, f"{home}/log"]
    until(lambda: links() == sorted(expected))  # it closes the last one, --ready, after launch knows
    assert os.stat(f"{home}/attach.sock").st_mode & 0o777 == 0o600


def test_it_shrugs_off_hangup_and_passes_on_termination(home: str) -> None:
    guest = sh("trap 'echo told; exit 3' TERM; echo on; while :; do sleep 0.05; done")
    known = supervisor.launch(home, guest, log=f"{home}/log")
    until(lambda: output(home))
    os.kill(known.pid, signal.SIGHUP)
    os.kill(known.pid, signal.SIGPIPE)
    time.sleep(0.1)
    assert supervisor.alive(home)
    os.kill(known.pid, signal.SIGTERM)
    assert supervisor.wait(home, 10).code == 3
    assert output(home) == b"on\ntold\n"


def test_the_exit_command_follows_with_its_own_environment(home: str) -> None:
    script = (
        f"exec > {home}/seen; cat {home}/exit.json; tr '\\0' '\\n' < /proc/$$/environ;grep Sig /proc/self/status; umask"
    )
    mask = os.umask(0o027)
    try:
        run(home, "exit 5", exit_command=[BUSYBOX, "sh", "-c", script], env={"A": "b"})
    finally:
        os.umask(mask)
    until(lambda: not supervisor.alive(home))
    seen = Path(home, "seen").read_text()
    assert '"code": 5' in seen and "\nA=b\n" in seen and "PATH" not in seen
    assert "SigBlk:\t0000000000000000" in seen and "SigIgn:\t0000000000000000" in seen
    assert seen.endswith("0027\n")


def test_alive_while_the_exit_command_runs(home: str) -> None:
    run(home, "exit 0", exit_command=[BUSYBOX, "sleep", "0.5"])
    assert supervisor.exit_record(home) and supervisor.alive(home)
    until(lambda: not supervisor.alive(home))


def test_a_directory_far_beyond_the_limit_of_sun_path(home: str) -> None:
    deep = os.path.join(home, *["x" * 100] * 5)
    os.makedirs(deep)
    supervisor.launch(deep, sh("read line; exit 4"), stdin=True)
    read, write = os.pipe()
    os.write(write, b"go\n")
    assert supervisor.attach(deep, read, None, None) == 4
    os.close(read)
    os.close(write)
    assert supervisor.wait(deep, 10).code == 4


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ConfigError("$.linux", "is odd", "mend it"), ConfigError, "config.json: $.linux: is odd"),
        (PayloadError("no such program", 127, "install it"), PayloadError, "no such program"),
        (FileNotFoundError(2, "No such file or directory", "/x"), HostError, "/x: No such file or directory"),
        (ZeroDivisionError("by zero"), OvtError, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), OvtError, "KeyboardInterrupt: "),
    ],
)
def test_a_failure_to_make_the_guest_reaches_the_caller(
    home: str, error: BaseException, kind: type[OvtError], text: str
) -> None:
    def make(stdio: Stdio) -> int:
        raise error

    with pytest.raises(kind) as caught:
        supervisor.launch(home, make)
    assert type(caught.value) is kind and str(caught.value) == text
    if isinstance(error, OvtError):
        assert vars(caught.value) == vars(error)
    with pytest.raises(NotFound):
        supervisor.alive(home)


def test_a_supervisor_that_cannot_start_takes_the_guest_with_it(home: str) -> None:
    def make(stdio: Stdio) -> int:
        pid = sh("sleep 30")(stdio)
        Path(home, "pid").write_text(str(pid))
        return pid

    with pytest.raises(HostError, match="--log: errno 2"):
        supervisor.launch(home, make, log=f"{home}/no/such/log")
    assert not os.path.exists(f"/proc/{Path(home, 'pid').read_text()}")


def test_a_guest_of_somebody_else_is_refused(home: str) -> None:
    with subprocess.Popen([BUSYBOX, "sleep", "30"]) as stranger:
        with pytest.raises(HostError, match="not a child"):
            supervisor.launch(home, lambda stdio: stranger.pid)
        stranger.kill()


def test_a_launcher_that_dies_early_leaves_no_guest(home: str) -> None:
    def make(stdio: Stdio) -> int:
        pid = sh("sleep 30")(stdio)
        Path(home, "made").write_text(str(pid))
        time.sleep(0.5)
        return pid

    launcher = os.fork()
    if launcher == 0:
        supervisor.launch(home, make, exit_command=[BUSYBOX, "touch", f"{home}/cleaned"])
        os._exit(0)
    until(lambda: Path(home, "made").exists())
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    until(lambda: Path(home, "cleaned").exists())
    assert supervisor.wait(home, 10).signal == signal.SIGKILL


def test_waiting_has_a_limit(home: str) -> None:
    supervisor.launch(home, sh("sleep 30"))
    with pytest.raises(TimeoutError):
        supervisor.wait(home, 0.2)
    with pytest.raises(NotFound):
        supervisor.wait(f"{home}/nobody", 0.2)


def test_a_killed_supervisor_is_noticed_by_everyone(home: str) -> None:
    known = supervisor.launch(home, sh("echo on; sleep 30"), log=f"{home}/log")
    until(lambda: output(home))
    following = supervisor.read_log(f"{home}/log", follow=True)
    assert next(following).data == b"on\n"
    killer = subprocess.Popen([BUSYBOX, "sh", "-c", f"sleep 0.3; kill -9 {known.pid}"])
    with pytest.raises(StateError, match="unknown"):
        supervisor.attach(home, None, None, None)
    killer.wait()
    assert not supervisor.alive(home) and supervisor.exit_record(home) is None
    assert list(following) == []
    with pytest.raises(StateError):
        supervisor.wait(home)
    # and the next launch in the same directory is not disturbed by what is left
    os.kill(known.child_pid, signal.SIGKILL)
    supervisor.launch(home, sh("echo again; exit 6"), log=f"{home}/log")
    assert supervisor.wait(home, 10).code == 6
    assert output(home) == b"on\nagain\n"


def test_kill_at_any_time_leaves_whole_files(home: str) -> None:
    dice = random.Random(2)
    recorded = 0
    for _ in range(40):
        known = supervisor.launch(
            home, sh("i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done"),
            log=f"{home}/log", log_max=8192, log_files=2,
        )  # fmt: skip
        time.sleep(dice.random() * 0.02)
        try:
            os.kill(known.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        until(lambda: not supervisor.alive(home))
        if supervisor.exit_record(home):
            recorded += 1
            assert supervisor.wait(home, 0).code == 0
        else:
            with pytest.raises(StateError):
                supervisor.wait(home, 0)
        for record in supervisor.read_log(f"{home}/log"):
            assert record.data.startswith(b"line ")
    assert 0 < recorded < 40


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize(
    "point",
    ["openat:when=4", "openat:when=5", "bind", "listen", "fallocate", "write:when=1", "write:when=2", "write:when=3",
     "waitid", "wait4:when=2", "pwrite64", "ftruncate", "fsync:when=1", "renameat2", "fsync:when=2", "unlinkat",
     "execve"],
)  # fmt: skip
def test_kill_within_a_system_call_leaves_whole_files(home: str, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    killing = Path(home, "killing")
    call, _, when = point.partition(":")
    options = f"-e trace={call} -e inject={call}:signal=KILL:{when or 'when=1'}"
    killing.write_text(f'#!/bin/sh\nexec strace -D -o {home}/trace {options} {supervisor.PROGRAM} "$@"\n')
    killing.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "PROGRAM", str(killing))
        try:
            known = supervisor.launch(
                home, sh("sleep 0.1; echo one; sleep 0.1; echo two"), log=f"{home}/log", exit_command=[BUSYBOX, "true"]
            )
        except HostError:
            known = supervisor.info(home)
    until(lambda: not supervisor.alive(home))
    until(lambda: "killed by SIGKILL" in Path(home, "trace").read_text())
    if record := supervisor.exit_record(home):
        assert record.code == 0
    else:
        with pytest.raises(StateError):
            supervisor.wait(home)
    if Path(home, "log").exists():
        assert output(home) in (b"", b"one\n", b"one\ntwo\n")
    until(lambda: start_time(known.child_pid) != known.child_start_time)
    assert run(home, "echo new; exit 3").code == 3
    assert output(home).endswith(b"new\n")


@pytest.mark.root
def test_a_full_disk_costs_log_records_and_nothing_else(home: str) -> None:
    disk = f"{home}/disk"
    os.mkdir(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        script = (
            "i=0; while [ $i -lt 4000 ]; do echo this is line number $i of many; i=$((i+1)); done;"
            f"touch {home}/written; while [ ! -e {home}/freed ]; do sleep 0.02; done; echo after; exit 9"
        )
        Path(disk, "ballast").write_bytes(bytes(100_000))
        supervisor.launch(disk, sh(script), log=f"{disk}/log", log_max=1 << 20)
        until(lambda: Path(home, "written").exists())
        assert b"number 100 " in output(disk) and b"number 3999 " not in output(disk)
        os.unlink(f"{disk}/ballast")
        Path(home, "freed").touch()
        assert supervisor.wait(disk, 20).code == 9
        records = list(supervisor.read_log(f"{disk}/log"))
        assert records[-1].data == b"after\n"
        lost = b"were lost: the log could not be written, errno 28"
        assert any(r.stream == "stderr" and lost in r.data for r in records)
        until(lambda: not supervisor.alive(disk))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_the_exit_is_recorded_on_a_full_disk(home: str) -> None:
    disk = f"{home}/disk"
    os.mkdir(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        known = supervisor.launch(disk, sh("sleep 30"))
        with open(f"{disk}/fill", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        os.kill(known.child_pid, signal.SIGTERM)
        assert supervisor.wait(disk, 10).signal == signal.SIGTERM
        until(lambda: not supervisor.alive(disk))
    finally:
        subprocess.run(["umount", disk], check=True)
