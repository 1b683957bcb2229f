"""Unpacking a tar archive as root: what is kept, and attacks that must not leave the directory."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError, OvtError, UsageError
from ovt.image import archive

Entries = Callable[[tarfile.TarFile], None]


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **members: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 1_000_000
    for key, value in members.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def directory(tar: tarfile.TarFile, name: str, **members: object) -> None:
    add(tar, name, type=tarfile.DIRTYPE, **{"mode": 0o755, **members})


def link(tar: tarfile.TarFile, name: str, target: str, hard: bool = False) -> None:
    add(tar, name, type=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def unpack(root: Path, entries: Entries, mode: str = "w") -> list[str]:
    path = root.parent / "image.tar"
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        entries(tar)
    said: list[str] = []
    archive.unpack(str(path), str(root), said.append)
    return said


def whole(tar: tarfile.TarFile) -> None:
    directory(tar, "./", mode=0o750)
    directory(tar, "etc", mode=0o711)
    add(tar, "etc/passwd", b"root", mode=0o644)
    add(tar, "bin/su", b"#!", mode=0o4755)
    link(tar, "bin/sh", "su")
    link(tar, "bin/hard", "bin/su", hard=True)
    add(tar, "fifo", type=tarfile.FIFOTYPE, mode=0o620)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_what_is_kept(root: Path, mode: str) -> None:
    assert unpack(root, whole, mode) == []
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert stat.S_IMODE((root / "etc").stat().st_mode) == 0o711
    assert (root / "etc").stat().st_mtime == 1_000_000
    assert (root / "etc/passwd").read_text() == "root"
    assert (root / "etc/passwd").stat().st_mtime == 1_000_000
    assert stat.S_IMODE((root / "bin/su").stat().st_mode) == 0o4755
    assert os.readlink(root / "bin/sh") == "su"
    assert (root / "bin/hard").stat().st_ino == (root / "bin/su").stat().st_ino
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)


def test_zstd_by_its_program(root: Path) -> None:
    path = root.parent / "image.tar"
    with tarfile.open(path, "w") as tar:
        whole(tar)
        add(tar, "padding", os.urandom(300_000))
    subprocess.run(["zstd", "-q", path, "-o", f"{path}.zst"], check=True)
    archive.unpack(f"{path}.zst", str(root))
    assert (root / "padding").stat().st_size == 300_000
    damaged = Path(f"{path}.zst").read_bytes()[:-50_000]
    Path(f"{path}.zst").write_bytes(damaged)
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(OvtError):
        archive.unpack(f"{path}.zst", str(root))


def test_zstd_without_its_program(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "a").write_bytes(b"\x28\xb5\x2f\xfd rest")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="zstd") as caught:
        archive.unpack(str(root.parent / "a"), str(root))
    assert caught.value.hint == "apt-get install zstd"


@pytest.mark.root
def test_owners_and_capabilities_are_kept(root: Path) -> None:
    # VFS_CAP_REVISION_2, effective, permitted CAP_NET_RAW (linux/capability.h)
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

    def entries(tar: tarfile.TarFile) -> None:
        headers = {
            "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
            "SCHILY.xattr.user.note": "kept",
            "SCHILY.xattr.user.overlay.redirect": "/etc",
            "SCHILY.xattr.trusted.overlay.opaque": "y",
        }
        add(tar, "ping", b"elf", uid=5, gid=6, mode=0o755, pax_headers=headers)
        directory(tar, "home", uid=7, gid=8)
        add(tar, "l", type=tarfile.SYMTYPE, linkname="ping", uid=9, gid=10)

    unpack(root, entries)
    assert (root / "ping").stat().st_uid == 5
    assert (root / "home").stat().st_gid == 8
    assert (root / "l").lstat().st_uid == 9
    assert os.getxattr(root / "ping", "security.capability") == capability
    assert set(os.listxattr(root / "ping")) == {"security.capability", "user.note"}


@pytest.mark.root
def test_device_nodes_are_left_out_and_counted(root: Path) -> None:
    def entries(tar: tarfile.TarFile) -> None:
        add(tar, "dev/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0)
        add(tar, "dev/mem", type=tarfile.CHRTYPE, devmajor=1, devminor=1)
        add(tar, "etc/a", b"")

    assert "2 device nodes" in unpack(root, entries)[0]
    assert not (root / "dev").exists()


# attacks


def dotdot(tar: tarfile.TarFile) -> None:
    add(tar, "../outside/new", b"x")


def dotdot_inside(tar: tarfile.TarFile) -> None:
    add(tar, "a/../../outside/new", b"x")


def hard_link_outside(tar: tarfile.TarFile) -> None:
    link(tar, "secret", "../outside/secret", hard=True)


@pytest.mark.parametrize("entries", [dotdot, dotdot_inside, hard_link_outside])
def test_names_that_lead_outside_are_refused(root: Path, entries: Entries) -> None:
    with pytest.raises(HostError, match=r"outside|upwards"):
        unpack(root, entries)
    assert os.listdir(root.parent / "outside") == ["secret"]


def absolute(tar: tarfile.TarFile) -> None:
    add(tar, "/new", b"x")


def through_a_relative_link(tar: tarfile.TarFile) -> None:
    link(tar, "way", "../outside")
    add(tar, "way/new", b"x")


def through_an_absolute_link(tar: tarfile.TarFile) -> None:
    link(tar, "way", "/")
    add(tar, "way/new", b"x")


def over_a_link(tar: tarfile.TarFile) -> None:
    link(tar, "new", "../outside/secret")
    add(tar, "new", b"x")


def over_a_hard_link_of_a_link(tar: tarfile.TarFile) -> None:
    link(tar, "first", "../outside/secret")
    link(tar, "new", "first", hard=True)
    add(tar, "new", b"x")


@pytest.mark.parametrize("entries", [absolute, through_an_absolute_link, over_a_link, over_a_hard_link_of_a_link])
def test_what_points_outside_is_made_inside(root: Path, entries: Entries) -> None:
    unpack(root, entries)
    assert (root / "new").read_text() == "x"
    assert not (root / "new").is_symlink()
    assert (root.parent / "outside/secret").read_text() == "secret"


def test_a_link_to_a_parent_is_resolved_below_the_root(root: Path) -> None:
    def entries(tar: tarfile.TarFile) -> None:
        directory(tar, "outside")
        through_a_relative_link(tar)

    unpack(root, entries)
    assert (root / "outside/new").read_text() == "x"
    assert os.listdir(root.parent / "outside") == ["secret"]


def test_a_hard_link_to_a_link_that_leads_outside_stays_a_link(root: Path) -> None:
    def entries(tar: tarfile.TarFile) -> None:
        link(tar, "first", "/outside/secret")
        link(tar, "second", "first", hard=True)

    unpack(root, entries)
    assert os.readlink(root / "second") == "/outside/secret"


def test_a_directory_in_the_place_of_a_link(root: Path) -> None:
    def entries(tar: tarfile.TarFile) -> None:
        link(tar, "etc", "../outside")
        directory(tar, "etc")
        add(tar, "etc/new", b"x")

    unpack(root, entries)
    assert (root / "etc/new").read_text() == "x"
    assert os.listdir(root.parent / "outside") == ["secret"]


# what is no root file system


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b broken", b"\xfd7zXZ\0 broken", b"BZh9 broken"])
def test_what_is_no_archive(root: Path, content: bytes) -> None:
    (root.parent / "a").write_bytes(content)
    with pytest.raises(OvtError, match=r"archive|empty") as caught:
        archive.unpack(str(root.parent / "a"), str(root))
    assert caught.value.hint


def test_an_archive_that_ends_in_the_middle(root: Path) -> None:
    path = root.parent / "image.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "big", b"x" * 100_000)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(OvtError):
        archive.unpack(str(path), str(root))


@pytest.mark.parametrize("name", ["manifest.json", "oci-layout"])
def test_a_saved_image_says_what_to_do(root: Path, name: str) -> None:
    with pytest.raises(UsageError, match="saved container image") as caught:
        unpack(root, lambda tar: add(tar, name, b"[]"))
    assert "podman export" in caught.value.hint


def test_an_empty_archive(root: Path) -> None:
    with pytest.raises(OvtError, match="empty"):
        unpack(root, lambda tar: None)
