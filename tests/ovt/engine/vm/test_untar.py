"""Archives out of a guest: none leads outside, none fills memory or disk, and honest ones arrive whole."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import untar
from ovt.engine.vm.untar import Cut, Target, unpack
from ovt.errors import HostError, OvtError


def entry(name: str, type: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "", **more: Any) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = type, link, len(data), 0o644
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def archive(*entries: Any, format: int = tarfile.PAX_FORMAT) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=format) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def unpacked(directory: Path, data: bytes, old: str = "", new: str = "") -> int:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack(io.BytesIO(data), Target(fd, old, new), "vm:/tree")
    finally:
        os.close(fd)


DIRECTORY = tarfile.DIRTYPE
LINK = tarfile.SYMTYPE


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path) -> Any:
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "into"}
    if (tmp_path / "outside").exists():
        assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_honest_archive(into: Path, format: int) -> None:
    long = "/".join(["n" * 90] * 2) if format == tarfile.USTAR_FORMAT else "/".join(["n" * 200] * 3)
    parts = long.split("/")
    directories = [entry("top/" + "/".join(parts[:n]), DIRECTORY, mode=0o755) for n in range(len(parts))]
    data = archive(
        *directories, entry(f"top/{long}", data=b"x" * 1000, mtime=1_500_000_000, mode=0o6751), format=format
    )
    assert unpacked(into, data, "top", "mine") == len(parts) + 1
    found = into / "mine" / long
    assert found.read_bytes() == b"x" * 1000
    assert found.stat().st_mtime == 1_500_000_000
    assert stat.S_IMODE(found.stat().st_mode) == 0o751


def test_times_below_a_second_and_sizes_of_pax(into: Path) -> None:
    info, data = entry("f", data=b"abc")
    info.pax_headers = {"mtime": "1500000000.123456789", "size": "3"}
    unpacked(into, archive((info, data)))
    assert (into / "f").stat().st_mtime_ns == 1_500_000_000_123_456_789


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../outside", data=b"x")],
        [entry("/outside", data=b"x")],
        [entry("a/../../outside", data=b"x")],
        [entry("a", LINK, link=".."), entry("a/outside", data=b"x")],
        [entry("a", LINK, link="/"), entry("a/etc/ovt-was-here", data=b"x")],
        [entry("a", DIRECTORY), entry("a/b", LINK, link="../.."), entry("a/b/outside", data=b"x")],
        [entry("a", LINK, link=".."), entry("a", DIRECTORY), entry("a/outside", data=b"x")],
        [entry("a", LINK, link="../outside"), entry("b", tarfile.LNKTYPE, link="a")],
        [entry("a", tarfile.LNKTYPE, link="../outside")],
        [entry("a", tarfile.LNKTYPE, link="/etc/passwd")],
        [entry("no/such/parent", data=b"x")],
        [entry("a", data=b"x"), entry("a/b", data=b"x")],
        [entry("a", b"Z")],
        [entry(".", LINK, link="/etc")],
    ],
)
def test_what_leads_outside_is_refused(into: Path, entries: list[Any]) -> None:
    with pytest.raises(HostError, match="vm:/tree"):
        unpacked(into, archive(*entries))
    assert not Path("/etc/ovt-was-here").exists()


def test_link_that_was_there_before_is_not_followed(into: Path, tmp_path: Path) -> None:
    (into / "a").symlink_to(tmp_path)
    with pytest.raises(HostError):
        unpacked(into, archive(entry("a", DIRECTORY), entry("a/outside", data=b"x")))
    (into / "f").symlink_to(tmp_path / "outside")
    unpacked(into, archive(entry("f", data=b"mine")))
    assert (into / "f").read_text() == "mine" and not (into / "f").is_symlink()


def test_hard_link_to_a_file_of_ours_is_refused(into: Path) -> None:
    (into / "secret").write_text("secret")
    with pytest.raises(HostError, match="did not bring"):
        unpacked(into, archive(entry("b", tarfile.LNKTYPE, link="secret")))
    assert not (into / "b").exists()


def test_hard_link_becomes_a_file(into: Path) -> None:
    data = archive(entry("top", DIRECTORY), entry("top/a", data=b"x"), entry("top/b", tarfile.LNKTYPE, link="top/a"))
    unpacked(into, data, "top", "new")
    assert (into / "new/b").read_text() == "x" and (into / "new/b").stat().st_nlink == 1


def test_only_what_was_asked_for(into: Path) -> None:
    with pytest.raises(HostError, match="was not asked for"):
        unpacked(into, archive(entry("other", data=b"x")), "top", "new")
    assert not list(into.iterdir())


def test_devices_stay_out(into: Path) -> None:
    unpacked(into, archive(entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3), entry("f", data=b"x")))
    assert [path.name for path in into.iterdir()] == ["f"]


def test_archive_that_ends_in_the_middle(into: Path) -> None:
    data = archive(entry("f", data=b"x" * 100_000))
    for size in (0, 100, 512, 1000, 50_000):
        with pytest.raises(Cut, match="ends in the middle"):
            unpacked(into, data[:size])
        assert not list(into.iterdir())


def test_lengths_are_not_believed(into: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 7 << 30
        with pytest.raises(HostError, match="too long"):
            unpacked(into, info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    info = tarfile.TarInfo("x")
    info.size = 1 << 60
    with pytest.raises(HostError, match="does not fit"):
        unpacked(into, info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)


@pytest.mark.parametrize(
    "records",
    [b"junk", b"5 a=b\n", b"9999 path=x\n", b"0 path=x\n", b"11 path=xxx", b"11 pathxxx\n\n", b"-5 path=x\n"],
)
def test_damaged_pax_headers(into: Path, records: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + archive(entry("f", data=b"x"))
    with pytest.raises(HostError, match="header is wrong"):
        unpacked(into, data)


def test_headers_without_end(into: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 0
    with pytest.raises(HostError, match="too many headers"):
        unpacked(into, info.tobuf(tarfile.USTAR_FORMAT) * 100)


def test_too_many_entries_and_no_end(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untar, "ENTRIES", 3)
    with pytest.raises(HostError, match="more than 3 entries"):
        unpacked(into, archive(*(entry(f"f{n}") for n in range(4))))
    with pytest.raises(HostError, match="after its end"):
        unpacked(into, archive(entry("f")) + b"x" * (2 << 20))


def test_strange_times(into: Path) -> None:
    for text in ("nan", "inf", "-5", "1e99", "99999999999", ""):
        info, data = entry("f", data=b"x")
        info.pax_headers = {"mtime": text}
        unpacked(into, archive((info, data)))
        assert 0 <= (into / "f").stat().st_mtime <= 1 << 33


def test_random_bytes_are_refused(into: Path) -> None:
    good = bytearray(archive(entry("d", DIRECTORY), entry("d/f", data=b"x" * 700), entry("d/l", LINK, link="f")))
    for at in range(0, 2048, 7):
        damaged = bytearray(good)
        damaged[at] ^= 0xA5
        try:
            unpacked(into, bytes(damaged))
        except OvtError:
            pass  # what matters is that nothing else is raised and nothing is made outside
