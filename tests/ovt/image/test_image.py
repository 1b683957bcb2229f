"""What a reference names, the built-in busybox, and the cache of unpacked archives."""

import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt import image
from ovt.errors import HostError, NotFound, OvtError, UsageError
from ovt.image import busybox

ELF64 = b"\x7fELF\x02\x01" + bytes(26) + (64).to_bytes(8, "little") + bytes(14) + b"\x38\x00" + b"\x01\x00" + bytes(6)


def directly(function: Callable[[], None]) -> None:
    function()


def resolve(reference: str, cache: Path, said: list[str] | None = None) -> image.Image:
    return image.resolve(reference, str(cache), (said if said is not None else []).append, directly)


def test_a_directory_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rootfs").mkdir()
    monkeypatch.chdir(tmp_path)
    found = resolve("./rootfs", tmp_path / "cache")
    assert (found.reference, found.layers, found.digest) == (f"{tmp_path}/rootfs", (f"{tmp_path}/rootfs",), "")
    assert not (tmp_path / "cache").exists()


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "file", "file")
    said: list[str] = []
    first = resolve(f"{tmp_path}/a.tar", tmp_path / "cache", said)
    again = resolve(f"{tmp_path}/a.tar", tmp_path / "cache", said)
    assert first == again
    assert said == [f"unpacking {tmp_path}/a.tar"]
    assert os.listdir(first.layers[0]) == ["file"]
    assert first.digest.removeprefix("sha256:") == os.path.basename(first.layers[0])


def test_a_bad_archive_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("not an archive")
    with pytest.raises(OvtError):
        resolve(f"{tmp_path}/a.tar", tmp_path / "cache")
    assert [name for name in os.listdir(tmp_path / "cache") if not name.startswith(".lock")] == []
    assert image.half_made(str(tmp_path / "cache")) == []


def test_a_killed_unpacking_is_seen_and_repeated(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "file", "file")
    found = resolve(f"{tmp_path}/a.tar", tmp_path / "cache")
    half = f"{tmp_path}/cache/.new-{os.path.basename(found.layers[0])}"
    os.rename(found.layers[0], half)
    os.unlink(f"{half}/file")
    assert image.half_made(str(tmp_path / "cache")) == [half]
    resolve(f"{tmp_path}/a.tar", tmp_path / "cache")
    assert os.listdir(found.layers[0]) == ["file"]
    assert image.half_made(str(tmp_path / "cache")) == []


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        resolve("alpine", tmp_path)
    assert "busybox" in caught.value.hint
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError):
        resolve(f"{tmp_path}/fifo", tmp_path)


def test_busybox_has_every_applet_and_works(tmp_path: Path) -> None:
    before = os.umask(0o077)
    found = resolve("busybox", tmp_path / "cache")
    os.umask(before)
    root = Path(found.layers[0])
    assert root.stat().st_mode & 0o777 == (root / "usr/bin").stat().st_mode & 0o777 == 0o755
    program, _ = busybox.find()
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    places = {name for directory in ("bin", "sbin", "usr/bin", "usr/sbin") for name in os.listdir(root / directory)}
    assert set(listed) - {"linuxrc"} <= places
    for directory in ("bin", "sbin", "usr/bin", "usr/sbin"):
        for entry in (root / directory).iterdir():
            assert entry.resolve() == root / "bin/busybox"
    assert found.command == ("sh",)
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert resolve("busybox", tmp_path / "cache") == found


def test_a_static_program_is_told_from_a_dynamic_one() -> None:
    assert busybox.is_static(Path("/bin/busybox").read_bytes())
    assert not busybox.is_static(Path("/usr/bin/env").read_bytes())
    assert not busybox.is_static(b"#!/bin/sh\n")
    assert busybox.is_static(ELF64 + (1).to_bytes(4, "little") + bytes(52))
    assert not busybox.is_static(ELF64 + (3).to_bytes(4, "little") + bytes(52))


def test_a_host_without_busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busybox, "_PLACES", (str(tmp_path / "busybox"),))
    with pytest.raises(NotFound) as missing:
        busybox.find()
    (tmp_path / "busybox").write_bytes(Path("/usr/bin/env").read_bytes())
    with pytest.raises(HostError, match="shared libraries") as dynamic:
        busybox.find()
    assert missing.value.hint == dynamic.value.hint == "apt-get install busybox-static"
