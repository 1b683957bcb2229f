"""Reading logs: order over rotations, following, times, tails; the writer is the real supervisor where it matters."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from ovt.engine import supervisor
from ovt.engine.supervisor import LogRecord, read_log
from tests.ovt.engine.test_supervisor import home, sh, until

__all__ = ["home"]

SECOND = 1_000_000_000
START = 1_795_363_200 * SECOND  # 2026-11-22T16:00:00Z


def line(second: int, text: str, stream: str = "stdout", tag: str = "F") -> str:
    return f"2026-11-22T16:00:{second:02d}.000000001Z {stream} {tag} {text}\n"


def texts(path: Path, **options: object) -> list[bytes]:
    return [record.data for record in read_log(str(path), **options)]  # type: ignore[arg-type]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log.2").write_text(line(0, "zero") + line(1, "one"))
    (tmp_path / "log.1").write_text(line(2, "two", "stderr") + line(3, "thr", tag="P"))
    (tmp_path / "log").write_text(line(4, "ee") + line(5, "") + line(6, "six", tag="P"))
    (tmp_path / "log.old").write_text(line(9, "somebody else's"))
    return tmp_path / "log"


def test_rotated_files_are_one_log(log: Path) -> None:
    assert texts(log) == [b"zero\n", b"one\n", b"two\n", b"thr", b"ee\n", b"\n", b"six"]
    assert [r.stream for r in read_log(str(log))] == ["stdout"] * 2 + ["stderr"] + ["stdout"] * 4


def test_times_are_nanoseconds() -> None:
    assert LogRecord("2026-11-22T16:00:00.000000001Z", "stdout", b"").time_ns == START + 1


def test_since_and_until(log: Path) -> None:
    assert texts(log, since_ns=START + 2 * SECOND, until_ns=START + 4 * SECOND) == [b"two\n", b"thr"]
    assert texts(log, since_ns=START + 1 + 6 * SECOND) == [b"six"]
    assert texts(log, until_ns=START + 1) == []
    assert texts(log, since_ns=START + 60 * SECOND) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (0, []),
        (1, [b"six"]),
        (2, [b"\n", b"six"]),
        (3, [b"thr", b"ee\n", b"\n", b"six"]),
        (4, [b"two\n", b"thr", b"ee\n", b"\n", b"six"]),
        (6, [b"zero\n", b"one\n", b"two\n", b"thr", b"ee\n", b"\n", b"six"]),
        (99, [b"zero\n", b"one\n", b"two\n", b"thr", b"ee\n", b"\n", b"six"]),
    ],
)
def test_tail_counts_lines_not_records(log: Path, lines: int, expected: list[bytes]) -> None:
    assert texts(log, tail=lines) == expected


@pytest.mark.parametrize("tail", [1, 2, 1000, 1999, 2000, 2001, 5000])
def test_tail_over_blocks_of_any_size(tmp_path: Path, tail: int) -> None:
    lines = [line(n % 60, "x" * (n * 37 % 2000)) for n in range(2000)]
    (tmp_path / "log").write_text("".join(lines) + "torn")
    expected = [text[40:].encode() for text in lines][-tail:]
    assert texts(tmp_path / "log", tail=tail) == expected


def test_a_line_longer_than_a_block_of_the_reader(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line(0, "a") + line(1, "b" * 200_000) + line(2, "c"))
    assert texts(tmp_path / "log", tail=2) == [b"b" * 200_000 + b"\n", b"c\n"]


def test_lines_that_are_not_cri_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        b"\n\xff\xfe\nhello\n" + line(1, "fine").encode() + b"2026-11-22T16:00:01.000000001Z stdout X no\n"
        b"2026-11-22T16:00:01Z stdout F no\n" + line(2, "").encode() + b"2026-11-22T16:00:03.0000"
    )  # fmt: skip
    assert texts(tmp_path / "log") == [b"fine\n", b"\n"]


def test_following_ends_with_a_guest_that_is_no_more(log: Path) -> None:
    assert len(texts(log, follow=True)) == 7


@pytest.mark.parametrize("files", [2, 9])
def test_following_over_rotations_misses_and_repeats_nothing(home: str, files: int) -> None:
    # slow enough for a reader that looks every 50 ms: no file is dropped before it was read
    script = "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); [ $((i % 50)) = 0 ] && sleep 0.01; done"
    supervisor.launch(home, sh(script), log=f"{home}/log", log_max=20_000 if files == 2 else 5_000, log_files=files)
    seen = texts(Path(home, "log"), follow=True)
    assert b"".join(seen).split() == [str(n).encode() for n in range(2000)]
    assert Path(home, "log.1").exists()


def test_following_a_tail_waits_for_the_end(home: str) -> None:
    supervisor.launch(home, sh("echo a; echo b; echo c; read go; echo d; exit 1"), stdin=True, log=f"{home}/log")
    until(lambda: b"c\n" in texts(Path(home, "log")))
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.extend(texts(Path(home, "log"), follow=True, tail=1)))
    reader.start()
    time.sleep(0.2)
    assert reader.is_alive()
    read, write = os.pipe()
    os.write(write, b"go\n")
    os.close(write)
    assert supervisor.attach(home, read, None, None) == 1
    os.close(read)
    reader.join(10)
    assert seen == [b"c\n", b"d\n"]


def test_following_stops_at_a_time(home: str) -> None:
    supervisor.launch(home, sh("while :; do echo tick; sleep 0.05; done"), log=f"{home}/log")
    end = time.time_ns() + SECOND // 2
    assert all(r.time_ns < end for r in read_log(f"{home}/log", follow=True, until_ns=end))
    assert time.time_ns() >= end and supervisor.alive(home)
