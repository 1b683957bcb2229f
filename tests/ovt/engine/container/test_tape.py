"""The assembler of tapes with the real ovt-init playing them: every flag, every kind of argument, every negative case.

Needs no root: only what any process may do is played.
"""

import errno
import os
import posix
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.engine.container import init as inits
from ovt.engine.container.init import Init
from ovt.engine.container.tape import (
    IGNORE_ERROR,
    MAGIC,
    REPORTED,
    SKIP_IF_OK,
    TAPE_DONE,
    Received,
    Tape,
)

NOWHERE = "/no/such/directory"


@pytest.fixture(scope="module", autouse=True)
def _program() -> None:
    """The engine keeps one descriptor of its init for the life of the process."""
    inits._memfd()


@pytest.fixture
def init() -> Iterator[Init]:
    player = Init((0, 1, 2), [], 3)
    yield player
    player.close()
    player.reap()


def status(player: Init) -> int:
    """How ovt-init ended."""
    return posix.waitstatus_to_exitcode(posix.waitpid(player.pid, 0)[1])


def cwd(player: Init) -> str:
    return os.readlink(f"/proc/{player.pid}/cwd")


def test_the_result_of_the_last_call(init: Init) -> None:
    tape = Tape()
    tape.call("set umask", "umask", 0o123)
    tape.call("set umask", "umask", 0o022)
    assert init.play(tape) == 0o123


def test_an_empty_tape(init: Init) -> None:
    assert init.play(Tape()) == 0


def test_many_tapes_one_after_another(init: Init) -> None:
    for number in range(50):
        tape = Tape()
        tape.call("set umask", "umask", number)
        assert init.play(tape) == (number - 1 if number else os.umask(os.umask(0o22)))


def test_text_and_pointer(init: Init, tmp_path: Path) -> None:
    place = tmp_path / "ä b\udcff"
    place.mkdir()
    tape = Tape()
    tape.call("chdir", "chdir", tape.text(str(place)))
    init.play(tape)
    assert cwd(init) == str(place)


def test_data_is_aligned() -> None:
    tape = Tape()
    assert [tape.data(bytes(n)).offset for n in (1, 3, 8, 9, 0)] == [0, 8, 16, 24, 40]


def test_failure_names_the_call_and_ends_it(init: Init) -> None:
    tape = Tape()
    tape.call("set umask", "umask", 0)
    tape.call("go nowhere", "chdir", tape.text(NOWHERE))
    tape.call("go home", "chdir", tape.text("/"))
    with pytest.raises(FileNotFoundError) as caught:
        init.play(tape)
    assert caught.value.filename == "go nowhere"
    assert status(init) == 126


def test_ignore_error(init: Init) -> None:
    tape = Tape()
    tape.call("go nowhere", "chdir", tape.text(NOWHERE), flags=IGNORE_ERROR)
    assert init.play(tape) == -errno.ENOENT


@pytest.mark.parametrize(("first", "expected"), [("/usr", "/usr"), (NOWHERE, "/tmp")])
def test_skip_if_ok(init: Init, first: str, expected: str) -> None:
    tape = Tape()
    attempt = tape.call("try", "chdir", tape.text(first), flags=IGNORE_ERROR)
    tape.call("else", "chdir", tape.text("/tmp"), flags=SKIP_IF_OK, other=attempt.index)
    init.play(tape)
    assert cwd(init) == expected


def test_result_of_an_earlier_call(init: Init, tmp_path: Path) -> None:
    tape = Tape()
    flags = os.O_WRONLY | os.O_CREAT
    fd = tape.call("open", "openat", -100, tape.text(str(tmp_path / "file")), flags, 0o600)
    tape.call("write", "write", fd, tape.data(b"words"), 5)
    tape.call("close", "close", fd)
    init.play(tape)
    assert (tmp_path / "file").read_bytes() == b"words"


def test_received_descriptors(init: Init, tmp_path: Path) -> None:
    ends = [os.pipe() for _ in range(3)]
    try:
        tape = Tape()
        for number in range(3):
            tape.call("write", "write", Received(number), tape.data(b"%d" % number), 1)
        init.play(tape, tuple(write for _, write in ends))
        assert [os.read(read, 9) for read, _ in ends] == [b"0", b"1", b"2"]
    finally:
        for fd in sum(ends, ()):
            os.close(fd)


def test_a_descriptor_that_was_not_sent_is_none(init: Init) -> None:
    tape = Tape()
    tape.call("close", "close", Received(0))
    with pytest.raises(OSError) as caught:
        init.play(tape)
    assert caught.value.errno == errno.EBADF


def test_received_descriptors_are_closed_on_exec(init: Init) -> None:
    read, write = os.pipe()
    tape = Tape()
    tape.execve("exec", "/bin/sleep", ["sleep", "1000"], [])
    init.send(tape, (write,))
    os.close(write)
    assert os.read(read, 1) == b""  # the end: nobody holds the other one any more
    os.close(read)


@pytest.mark.parametrize("value", [7, -1, 1 << 40])
def test_report(init: Init, value: int) -> None:
    tape = Tape()
    tape.report(value)
    init.send(tape)
    assert init.wait(tape) == (REPORTED, value)
    assert init.wait(tape) == (TAPE_DONE, 0)


def test_report_of_a_result(init: Init) -> None:
    tape = Tape()
    tape.report(tape.call("set umask", "umask", 0o77))
    init.send(tape)
    assert init.wait(tape)[1] == os.umask(os.umask(0o22))


@pytest.mark.parametrize(("expected", "error"), [(ord("/"), None), (ord("("), errno.ENOENT)])
def test_check_byte(init: Init, expected: int, error: int | None) -> None:
    tape = Tape()
    at = tape.data(b"/here")
    tape.check_byte("where am I", at, expected, errno.ENOENT)
    if error is None:
        assert init.play(tape) == 0
        return
    with pytest.raises(OSError) as caught:
        init.play(tape)
    assert (caught.value.errno, caught.value.filename) == (error, "where am I")
    assert status(init) == 126


def test_relocation(init: Init) -> None:
    """writev-like: a structure in the data that points into the data; here the vectors of execve."""
    read, write = os.pipe()
    tape = Tape()
    tape.call("dup", "dup3", Received(0), 1, 0)
    tape.execve("exec", "/bin/sh", ["sh", "-c", 'echo "$0 $1 $V"', "a", "b c"], ["V=value"])
    init.send(tape, (write,))
    os.close(write)
    with os.fdopen(read) as output:
        assert output.read() == "a b c value\n"
    assert init.wait(tape, end_is_success=True) == (TAPE_DONE, 0)


def test_relocate_within_a_structure() -> None:
    tape = Tape()
    structure = tape.data(bytes(16))
    text = tape.text("target")
    tape.relocate(structure, 8, text)
    magic, ops, relocations, length = struct.unpack_from("=4I", raw := tape.encode())
    assert (magic, ops, relocations, length) == (MAGIC, 0, 1, 23)
    assert struct.unpack_from("=II", raw, 16) == (8, 16)


def test_failure_of_execve(init: Init) -> None:
    tape = Tape()
    tape.execve('exec: "x"', NOWHERE, ["x"], [])
    init.send(tape)
    with pytest.raises(FileNotFoundError) as caught:
        init.wait(tape, end_is_success=True)
    assert caught.value.filename == 'exec: "x"'


def test_clone_parent_ends_and_the_child_plays_on(init: Init) -> None:
    tape = Tape()
    tape.clone("clone", 0x00008000)  # CLONE_PARENT: a sibling, so a child of ours
    tape.call("chdir", "chdir", tape.text("/usr"))
    init.send(tape)
    spawned = init.pid
    child = init.adopt_clone(tape)
    assert child != spawned and cwd(init) == "/usr"
    assert not Path(f"/proc/{spawned}").exists()


def test_report_to_a_file(init: Init, tmp_path: Path) -> None:
    with open(tmp_path / "errors", "wb") as errors:
        tape = Tape()
        tape.report_to(17)
        tape.call("go nowhere", "chdir", tape.text(NOWHERE))
        keep = Tape()
        keep.call("dup", "dup3", Received(0), 17, 0)
        init.play(keep, (errors.fileno(),))
        init.send(tape)
        assert status(init) == 126
    index, error, _ = struct.unpack("=Iiq", (tmp_path / "errors").read_bytes())
    assert (index, error) == (1, errno.ENOENT)


def header(ops: int, relocations: int = 0, length: int = 0, magic: int = MAGIC) -> bytes:
    return struct.pack("=4I", magic, ops, relocations, length)


@pytest.mark.parametrize(
    "raw",
    [
        header(0, magic=MAGIC + 1),
        header(4097),
        header(0, relocations=(16 << 20) // 8 + 1),
        header(0, length=(16 << 20) + 1),
        header(0xFFFFFFFF),
        b"\0" * 16,
        header(1)[:10],
        header(1) + b"\0" * 10,
        header(0, length=100) + b"\0" * 99,
    ],
    ids=["magic", "operations", "relocations", "data", "overflow", "zeros", "short header", "short tape", "short data"],
)
def test_what_is_no_tape_ends_it(raw: bytes) -> None:
    player = Init((0, 1, 2), [], 3)
    player._socket.sendall(raw)
    player._socket.shutdown(socket.SHUT_WR)
    try:
        assert status(player) == 125
    finally:
        player.close()


def test_a_runtime_that_is_gone_ends_it() -> None:
    player = Init((0, 1, 2), [], 3)
    player.close()
    assert status(player) == 125


@pytest.mark.parametrize("arguments", [[], [""]])
def test_called_by_hand(arguments: list[str]) -> None:
    pid = posix.posix_spawn(f"/proc/self/fd/{inits._memfd()}", ["ovt-init", *arguments], {})
    assert posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1]) == 125


def test_it_is_a_sealed_copy(init: Init) -> None:
    assert os.readlink(f"/proc/{init.pid}/exe").startswith("/memfd:ovt-init")
    with pytest.raises(PermissionError):
        os.write(inits._memfd(), b"x")
