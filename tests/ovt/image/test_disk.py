"""Making, growing, converting and checking disk images, chains of them, and what is refused before qemu-img sees it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError
from ovt.image import disk

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


def qemu_img(*words: object) -> bytes:
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, check=True).stdout


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw image with something in it."""
    path = tmp_path / "base.img"
    path.write_bytes(b"base" * (MIB // 4))
    return path


def test_a_new_image_is_of_its_size_and_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    disk.create(str(path), 8 * MIB, "metadata")
    assert disk.probe(str(path)) == disk.DiskImage(str(path), "qcow2", 8 * MIB)
    assert path.stat().st_mode & 0o777 == 0o600 and os.listdir(tmp_path) == ["a.qcow2"]
    with pytest.raises(Conflict, match="exists already"):
        disk.create(str(path), MIB)


@pytest.mark.parametrize(("size", "more"), [(0, {}), (1000, {}), (1 << 63, {}), (MIB, {"preallocation": "some"})])
def test_bad_words_leave_nothing(tmp_path: Path, size: int, more: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        disk.create(str(tmp_path / "a"), size, **more)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["nbd:host", "json:{}", "-q", "a,b=c", "a b", "x" * 200])
def test_any_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    disk.create(name, MIB)
    disk.create_overlay("over", name, "qcow2", 2 * MIB)
    disk.resize(name, 2 * MIB)
    assert disk.check(name) == disk.Check(True)
    disk.convert(name, "qcow2", f"{name}.raw", "raw")
    assert (tmp_path / f"{name}.raw").stat().st_size == 2 * MIB
    assert disk.chain("over", allow_backing=True) == [(f"{tmp_path}/{name}", "qcow2"), (f"{tmp_path}/over", "qcow2")]


def test_an_overlay_reads_what_is_below_and_is_never_smaller(tmp_path: Path, base: Path) -> None:
    over, top, flat = (str(tmp_path / name) for name in ("over", "top", "flat"))
    disk.create_overlay(over, str(base), "raw")
    disk.create_overlay(top, over, "qcow2", 2 * MIB)
    assert disk.chain(top, allow_backing=True) == [(str(base), "raw"), (over, "qcow2"), (top, "qcow2")]
    with pytest.raises(OvtError, match=r"is a difference to another image, '.*over'"):
        disk.chain(top)
    with pytest.raises(UsageError, match="do not fit"):
        disk.create_overlay(str(tmp_path / "small"), over, "qcow2", 512)
    said: list[float] = []
    disk.convert(top, "", flat, "raw", said.append, allow_backing=True)
    assert Path(flat).read_bytes() == base.read_bytes() + bytes(MIB)
    assert said[-1] == 1.0 and said == sorted(said)


def test_what_a_header_names_is_not_opened(tmp_path: Path, base: Path) -> None:
    """A chain that is given wins over the header, which somebody may have changed since it was read."""
    over = tmp_path / "over"
    disk.create_overlay(str(over), str(base), "raw")
    node = disk.node([(str(over), "qcow2")])
    assert node == {"driver": "qcow2", "file": {"driver": "file", "filename": str(over)}, "backing": None}
    qemu_img("convert", "-O", "raw", "json:" + json.dumps(node), tmp_path / "flat")
    assert not any((tmp_path / "flat").read_bytes())


def test_chains_that_cannot_be(tmp_path: Path, base: Path) -> None:
    def overlay(name: str, below: str, *more: str) -> str:
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", below, *more, tmp_path / name, "1M")
        return str(tmp_path / name)

    overlay("one", "two", "-F", "qcow2")
    with pytest.raises(OvtError, match="form a loop"):
        disk.chain(overlay("two", "one", "-F", "qcow2"), allow_backing=True)
    with pytest.raises(NotFound, match=r"lost is a difference to .*/gone, which does not exist"):
        disk.chain(overlay("lost", "gone", "-F", "raw"), allow_backing=True)
    for name in ("nbd:localhost:1", 'json:{"driver":"null-co"}', "https://host/x"):
        (tmp_path / "far").unlink(missing_ok=True)
        with pytest.raises(OvtError, match="not the name of a file"):
            disk.chain(overlay("far", name, "-F", "raw"), allow_backing=True)
    below = base.name
    for number in range(65):
        below = Path(overlay(f"n{number}", below, "-F", "qcow2" if number else "raw")).name
    with pytest.raises(OvtError, match="more than 64"):
        disk.chain(str(tmp_path / below), allow_backing=True)


def test_a_recorded_format_is_believed_and_none_is_probed(tmp_path: Path) -> None:
    """A guest can write a qcow2 header into its raw disk: it must stay raw."""
    inner, named, unnamed = (str(tmp_path / name) for name in ("inner", "named", "unnamed"))
    disk.create(inner, MIB)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "inner", "-F", "raw", named, "1M")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "inner", "-o", "compat=1.1", "-F", "qcow2", unnamed, "1M")
    assert disk.chain(named, allow_backing=True)[0] == (inner, "raw")
    assert disk.chain(unnamed, allow_backing=True)[0] == (inner, "qcow2")


def test_growing_keeps_the_data_and_shrinking_is_refused(tmp_path: Path, base: Path) -> None:
    disk.resize(str(base), MIB + 512)
    assert base.read_bytes() == b"base" * (MIB // 4) + bytes(512)
    with pytest.raises(UsageError, match="cannot be made smaller"):
        disk.resize(str(base), MIB)
    assert base.stat().st_size == MIB + 512


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vpc", "vdi"])
def test_there_and_back(tmp_path: Path, format: str) -> None:
    """8 MiB less a little, because VHD rounds up to a geometry."""
    raw = tmp_path / "a.raw"
    raw.write_bytes(os.urandom(MIB) + bytes(7 * MIB))
    disk.convert(str(raw), "raw", str(tmp_path / "b"), format)
    disk.convert(str(tmp_path / "b"), format, str(tmp_path / "c"), "raw")
    back = (tmp_path / "c").read_bytes()
    assert back[: 8 * MIB] == raw.read_bytes() and not any(back[8 * MIB :])
    assert disk.check(str(tmp_path / "b")).corruptions == 0
    with pytest.raises(UsageError, match=f"is a {format} image, not"):
        disk.convert(str(tmp_path / "b"), "vdi" if format != "vdi" else "vpc", str(tmp_path / "d"), "raw")


def test_a_corrupt_table_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    disk.create(str(path), MIB, "metadata")
    assert disk.check(str(path)) == disk.Check(True)
    with open(path, "r+b") as file:
        file.seek(0x10000)  # the refcount table
        file.write(bytes(8))
    assert disk.check(str(path)).corruptions > 0


def test_a_failure_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"cannot make .*no such file"):
        disk.create(str(tmp_path / "no/a"), MIB)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/qemu-img"
    script.write_text("#!/bin/sh\necho 'qemu-img: cannot do it: No space left on device' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(HostError, match=r"qemu-img create of .*/a failed: cannot do it: No space") as caught:
        disk.create(str(tmp_path / "a"), MIB)
    assert "make room" in caught.value.hint
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(disk, "_SLOW", 0.2)
    with pytest.raises(HostError, match="has not ended after"):
        disk.create(str(tmp_path / "a"), MIB)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        disk.create(str(tmp_path / "a"), MIB)
    assert "qemu-utils" in caught.value.hint
    assert os.listdir(tmp_path) == ["bin"]


def test_an_image_in_use_is_a_conflict(tmp_path: Path) -> None:
    path = tmp_path / "a"
    disk.create(str(path), MIB)
    opened = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "node-name": "n"})
    holder = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", opened, "--chardev", "stdio,id=m", "--monitor", "chardev=m"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        try:
            assert holder.stdout and b"QMP" in holder.stdout.readline()
            with pytest.raises(Conflict, match="is in use"):
                disk.resize(str(path), 2 * MIB)
        finally:
            holder.kill()
