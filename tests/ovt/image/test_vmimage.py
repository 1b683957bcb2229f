"""The built-in image of virtual machines: what is in it, how it is cached, and that a guest boots from it."""

import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest

import ovt
from ovt.errors import HostError, UsageError
from ovt.image import busybox, initramfs, kernel, vmimage

INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for list in modules modules.late; do while read file; do insmod "$file" || echo "fails: $file"; done </ovt/$list; done
modprobe nonsense 2>/dev/null && echo "modprobe finds anything"
mkdir /t; mount -t ext4 /dev/nothing /t 2>/dev/null; mount -t 9p -o trans=virtio nothing /t 2>/dev/null
grep -w -e ext4 -e 9p /proc/filesystems | sed 's/^.*\\t/has /'
test -d /sys/class/virtio-ports || echo "no virtio-console"
echo "root $(stat -c %a /) main $(stat -c %a /ovt/main)"
tr '\\0' '|' </ovt/main; echo; echo THE-END
poweroff -f
"""


def unpack(archive: bytes, target: Path, pattern: str = "*") -> Path:
    """The files of an archive below `target`; device nodes are left out, they are root's to make."""
    words = ["busybox", "cpio", "-id", "--quiet", pattern]
    subprocess.run(words, input=archive, cwd=target, capture_output=True, check=True)
    return target


def test_main_says_what_runs(tmp_path: Path) -> None:
    archive = vmimage.main_archive(
        ["sh", "-c", "echo a\nb"],
        env=["A=1", "B=\udcff"],
        cwd="/tmp",
        user="1:2",
        hostname="web",
        tty=True,
        shares=["t0:/mnt:ro"],
        poweroff=True,
    )
    assert (unpack(archive, tmp_path) / "ovt/main").read_bytes() == (
        b"arg=sh\0arg=-c\0arg=echo a\nb\0env=A=1\0env=B=\xff\0cwd=/tmp\0user=1:2\0hostname=web\0tty=1\0"
        b"share=t0:/mnt:ro\0poweroff=1\0"
    )
    assert (tmp_path / "ovt/main").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="NUL byte"):
        vmimage.main_archive(["a\0env=B"])


def test_an_idle_guest_has_nothing_to_run(tmp_path: Path) -> None:
    assert (unpack(vmimage.main_archive(), tmp_path) / "ovt/main").read_bytes() == b"tty=0\0"


def test_a_signature_is_taken_off_and_nothing_else() -> None:
    end = bytes(8) + struct.pack(">I", 5) + b"~Module signature appended~\n"
    assert vmimage.unsigned(b"\x7fELF module" + b"12345" + end) == b"\x7fELF module"
    assert vmimage.unsigned(b"\x7fELF module") == b"\x7fELF module"


@pytest.fixture
def image() -> kernel.Kernel:
    found = kernel.cached()
    if found is None:
        pytest.skip("needs the kernel that scripts/setup --test fetches")
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a package ovt whose guest program can be set."""
    (tmp_path / "ovt/_bin").mkdir(parents=True)
    monkeypatch.setattr(ovt, "__file__", str(tmp_path / "ovt/__init__.py"))
    return tmp_path / "ovt"


def test_it_is_made_once_for_what_it_is_made_of(tmp_path: Path, package: Path, image: kernel.Kernel) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(HostError, match="ovt-guest is not built") as caught:
        vmimage.build(cache, print)
    assert "scripts/setup" in caught.value.hint
    (package / "_bin/ovt-guest").write_bytes(b"one")
    made: list[vmimage.VmImage] = []
    threads = [threading.Thread(target=lambda: made.append(vmimage.build(cache, print))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and len(set(made)) == 1
    first = made[0]
    assert (first.kernel, first.version) == (str(image.vmlinux), image.version)
    assert Path(first.initrd).stat().st_size > 5 << 20
    before = Path(first.initrd).stat().st_mtime_ns
    assert vmimage.build(cache, print) == first and Path(first.initrd).stat().st_mtime_ns == before
    (package / "_bin/ovt-guest").write_bytes(b"two")
    assert vmimage.build(cache, print).initrd != first.initrd


def test_first_modules_are_not_late_ones_and_all_are_there(tmp_path: Path, image: kernel.Kernel) -> None:
    archive = vmimage.initrd(image, busybox.find()[0], b"")
    for pattern in ("ovt/*", "lib/modules/*"):
        unpack(archive, tmp_path, pattern)
    first, late = ((tmp_path / "ovt" / name).read_text().split() for name in ("modules", "modules.late"))
    assert any(path.endswith("/virtio_net.ko") for path in first) and not set(first) & set(late)
    named = {path.rpartition("/")[2] for path in late}
    assert {"virtio_blk.ko", "nvme.ko", "ahci.ko", "virtio_balloon.ko", "virtio_mem.ko", "i6300esb.ko"} <= named
    home = tmp_path / "lib/modules" / image.version
    indexed = {line.partition(":")[0] for line in (home / "modules.dep").read_text().splitlines()}
    there = {str(path.relative_to(home)) for path in home.rglob("*.ko")}
    assert (
        there == indexed and {path.removeprefix(f"/lib/modules/{image.version}/") for path in (*first, *late)} < there
    )
    assert not any((home / path).read_bytes().endswith(b"appended~\n") for path in there)


@pytest.mark.qemu
@pytest.mark.slow
def test_a_guest_boots(tmp_path: Path, image: kernel.Kernel) -> None:
    program = busybox.find()[0]
    archive = vmimage.initrd(image, program, INIT.encode()) + vmimage.main_archive(["echo", "a b"], hostname="web")
    (tmp_path / "initrd").write_bytes(archive)
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu
    done = subprocess.run(
        [
            *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "192M"),
            *("-kernel", str(image.vmlinux), "-initrd", str(tmp_path / "initrd"), "-append", vmimage.CMDLINE),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=110,
        check=False,
    )
    # without the kernel's own words, of which the failing mounts are worth one
    said = [line.strip() for line in done.stdout.decode().splitlines() if not line.startswith("[")]
    assert said == ["has ext4", "has 9p", "root 755 main 600", "arg=echo|arg=a b|hostname=web|tty=0|", "THE-END"]


def test_the_archives_first_entry_is_the_root(image: kernel.Kernel) -> None:
    """Else anybody in the guest could write to /: that is how the kernel makes it."""
    assert vmimage.initrd(image, busybox.find()[0], b"").startswith(initramfs.archive([initramfs.directory(".")])[:110])
