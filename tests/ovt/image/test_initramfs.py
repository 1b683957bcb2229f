"""The cpio archive as another program reads it, and the order of kernel modules."""

import subprocess
from pathlib import Path

import pytest

from ovt.errors import NotFound
from ovt.image import initramfs
from ovt.image.kernel import Kernel


def test_another_program_reads_it(tmp_path: Path) -> None:
    entries = [
        initramfs.directory("d", 0o700),
        initramfs.file("d/f", b"text", 0o640),
        initramfs.file("d/odd", b"12345"),
        initramfs.link("d/l", "f"),
    ]
    busybox = subprocess.run(
        ["busybox", "cpio", "-idm"], input=initramfs.archive(entries), cwd=tmp_path, capture_output=True, check=False
    )
    assert busybox.returncode == 0, busybox.stderr
    assert (tmp_path / "d/f").read_text() == "text" and (tmp_path / "d/f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d/odd").read_bytes() == b"12345" and (tmp_path / "d").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "d/l").readlink() == Path("f")


def test_archives_can_follow_one_another() -> None:
    """The kernel looks for the next archive at a multiple of four bytes."""
    assert len(initramfs.archive([initramfs.file("abc", b"x")])) % 4 == 0


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    made = Kernel("1.2", tmp_path)
    made.modules.mkdir(parents=True)
    (made.modules / "modules.dep").write_text(
        "kernel/a.ko:\nkernel/b-b.ko: kernel/a.ko\nkernel/c.ko: kernel/b-b.ko kernel/a.ko\nkernel/d.ko: kernel/a.ko\n"
    )
    (made.modules / "modules.builtin").write_text("kernel/in-side.ko\n")
    return made


def test_modules_come_after_what_they_need_and_once(kernel: Kernel) -> None:
    def names(*wanted: str) -> list[str]:
        return [path.name for path in initramfs.modules(kernel, wanted)]

    assert names("c", "d", "b_b") == ["a.ko", "b-b.ko", "c.ko", "d.ko"]
    assert names("in_side", "b-b") == ["a.ko", "b-b.ko"]
    with pytest.raises(NotFound, match=r"kernel 1\.2 has no module side"):
        names("side")
