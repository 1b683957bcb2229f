"""Sizes, durations, times and the composed options, as people write and read them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.cli import values
from ovt.errors import NotFound, UsageError
from ovt.model import Device, Ulimit, Volume


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("0", 0), ("4096", 4096), ("1b", 1), ("1k", 1024), ("1K", 1024), ("512M", 512 << 20), ("512MB", 512 << 20)],
        *[("2GiB", 2 << 30), ("1.5g", 3 << 29), ("1T", 1 << 40), ("1p", 1 << 50), (" 1m ", 1 << 20)],
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert values.parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", 10),
        ("0.5", 0.5),
        ("10s", 10),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("2d", 172800),
        ("1m1s", 61),
        ("1.5h", 5400),
    ],
)
def test_durations(text: str, expected: float) -> None:
    assert values.parse_duration(text) == pytest.approx(expected)


def test_times() -> None:
    assert values.parse_time("2026-11-22T16:00:00Z") == 1795363200
    assert values.parse_time("2026-11-22T17:00:00+01:00") == 1795363200
    assert values.parse_time("2026-11-22") == 1795305600
    assert values.parse_time("1795363200.5") == 1795363200.5
    assert values.parse_time("10m") == pytest.approx(time.time() - 600, abs=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a:/b", Volume("/a", "/b")),
        ("/a:/b:ro,nosuid", Volume("/a", "/b", ("ro", "nosuid"))),
        ("./a:/b", Volume("{cwd}/a", "/b")),
        ("~/a:/b", Volume("/home/me/a", "/b")),
    ],
)
def test_volumes(text: str, expected: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert values.parse_volume(text) == expected._replace(source=expected.source.format(cwd=tmp_path))


def test_other_composed_values() -> None:
    assert values.parse_tmpfs("/t:size=1m,mode=700") == Volume("", "/t", ("size=1m", "mode=700"))
    assert values.parse_device("/dev/fuse") == Device("/dev/fuse", "/dev/fuse", "rwm")
    assert values.parse_device("/dev/a:/dev/b:r") == Device("/dev/a", "/dev/b", "r")
    assert values.parse_device("/dev/a:rw") == Device("/dev/a", "/dev/a", "rw")
    assert values.parse_ulimit("nofile=5") == Ulimit("nofile", 5, 5)
    assert values.parse_ulimit("core=0:unlimited") == Ulimit("core", 0, -1)
    assert values.parse_host("db:10.0.0.5") == "db:10.0.0.5"
    assert values.parse_host("six:[fd00::1]") == "six:fd00::1"
    assert [values.parse_signal(text) for text in ("TERM", "sigkill", "15", "RTMIN+3")] == [15, 9, 15, 37]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *[(values.parse_size, text) for text in ("", "x", "-1", "1x", "ib", "1iib", "M", "1 2", "nan", "inf", "1e3")],
        *[(values.parse_duration, text) for text in ("", "x", "1x", "s", "1s2", "-1s", "1mx")],
        *[(values.parse_time, text) for text in ("", "yesterday", "2026-13-01")],
        *[(values.parse_volume, text) for text in ("a", "/a", ":/b", "/a:b", "/a:/b:ro:x", "/a:/../b", "/a:/")],
        *[(values.parse_tmpfs, text) for text in ("a", "", "/", "/a/../b")],
        *[(values.parse_device, text) for text in ("fuse", "/dev/a:/dev/b:/dev/c", "/dev/a:x")],
        *[(values.parse_ulimit, text) for text in ("nofile", "none=5", "nofile=x", "nofile=")],
        *[(values.parse_host, text) for text in ("db", "db:", ":10.0.0.1", "db:10.0.0", "db:evil\n1.2.3.4")],
        *[(values.parse_signal, text) for text in ("", "NOPE", "0", "999", "RTMIN+99", "RTMIN+x")],
        *[(values.parse_pair, text) for text in ("a", "=b", "")],
    ],
)
def test_what_is_none(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_the_environment(tmp_path: Path) -> None:
    environ = {"A": "1", "LC_ALL": "C", "LC_TIME": "en"}
    assert values.parse_env("B=2=3", environ) == ["B=2=3"]
    assert values.parse_env("B=", environ) == ["B="]
    assert values.parse_env("A", environ) == ["A=1"]
    assert values.parse_env("NONE", environ) == []
    assert values.parse_env("LC_*", environ) == ["LC_ALL=C", "LC_TIME=en"]
    with pytest.raises(UsageError):
        values.parse_env("=1", environ)
    (tmp_path / "env").write_text("# comment\n\nX=1\n  Y=a b \nA\nNONE\n")
    assert values.read_env_file(str(tmp_path / "env"), environ) == ["X=1", "Y=a b ", "A=1"]
    with pytest.raises(NotFound):
        values.read_env_file(str(tmp_path / "none"), environ)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0B"), (1023, "1023B"), (1024, "1.0KiB"), (1536, "1.5KiB"), (500 << 20, "500MiB"), (1 << 60, "1048576TiB")],
)
def test_how_sizes_read(count: int, expected: str) -> None:
    assert values.show_size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1, "less than a second"), (0.5, "less than a second"), (1, "1 second"), (119, "1 minute"), (7200, "2 hours")],
)
def test_how_ages_read(seconds: float, expected: str) -> None:
    assert values.show_age(seconds) == expected


def test_how_times_read() -> None:
    assert values.show_time(0) is None
    assert values.show_time(1795363200.25) == "2026-11-22T16:00:00.250Z"
