"""The cache of kernels, where they come from when it is empty, and how one is taken out of a bzImage."""

import gzip
import lzma
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.image import kernel


def elf(*notes: tuple[int, bytes]) -> bytes:
    """An ELF image with one segment of notes, as (type, name)."""
    body = b"".join(
        struct.pack("<3I", len(name), 4, kind) + name.ljust(-(-len(name) // 4) * 4, b"\0") + bytes(4)
        for kind, name in notes
    )
    head = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<Q", 64) + bytes(14) + struct.pack("<2H", 56, 1)
    return head.ljust(64, b"\0") + struct.pack("<2I6Q", 4, 0, 120, 0, 0, len(body), len(body), 4) + body


def bzimage(payload: bytes) -> bytes:
    setup = bytearray(1024)  # one setup sector behind the boot sector
    setup[0x1F1], setup[0x202:0x206] = 1, b"HdrS"
    struct.pack_into("<II", setup, 0x248, 64, len(payload) + 4)
    return bytes(setup) + bytes(64) + payload + bytes(4)


PVH = elf((1, b"GNU\0"), (18, b"Xen\0"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ovt"


def lay_out(place: Path, *names: str) -> None:
    place.mkdir(parents=True)
    for name in names:
        (place / name).touch()


def never(line: str) -> None:
    pytest.fail(f"nothing should take time: {line}")


def test_what_is_cached_is_used_and_what_is_half_made_is_not(cache: Path) -> None:
    lay_out(cache / "kernel/.unpack-x", "vmlinux", "vmlinuz")
    lay_out(cache / "kernel/1.2", "vmlinux")
    lay_out(cache / "lab/kernel/1.1", "vmlinux", "vmlinuz")
    found = kernel.get(never)
    assert found == kernel.Kernel("1.1", cache / "lab/kernel/1.1")
    assert (found.vmlinux.name, found.vmlinuz.name) == ("vmlinux", "vmlinuz")
    lay_out(cache / "kernel/1.0", "vmlinux", "vmlinuz")
    os.utime(cache / "lab/kernel/1.1/vmlinuz", (1, 1))
    assert kernel.get(never).version == "1.0"


def test_without_a_network_the_hosts_own_serves(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(target: Path) -> str:
        (target / "half").write_text("of a package")
        raise HostError("apt-get update failed: no network")

    def own(target: Path, report: object) -> str:
        assert not (target / "half").exists()
        (target / "vmlinuz").touch()
        return "5.5"

    lay_out(cache / "kernel/.unpack-killed", "x")
    monkeypatch.setattr(kernel, "_fetch", fetch)
    monkeypatch.setattr(kernel, "_own", own)
    said: list[str] = []
    assert kernel.get(said.append) == kernel.Kernel("5.5", cache / "kernel/5.5")
    assert said[1] == "no kernel could be fetched (apt-get update failed: no network): the host's own 5.5 is used"
    assert os.listdir(cache / "kernel") == ["5.5"]
    assert kernel.get(never).version == "5.5"


def test_with_neither_the_error_says_why_and_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(target: Path) -> str:
        raise HostError("no network")

    monkeypatch.setattr(kernel, "_fetch", fetch)
    monkeypatch.setattr(kernel, "_own", lambda target, report: "")
    with pytest.raises(HostError, match="no kernel to boot guests with: no network") as caught:
        kernel.get(lambda line: None)
    assert "/boot/vmlinuz" in caught.value.hint
    assert os.listdir(cache / "kernel") == []


@pytest.mark.skipif(not shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin"), reason="needs depmod")
def test_a_kernel_of_the_host_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot, target = tmp_path / "boot", tmp_path / "target"
    boot.mkdir()
    target.mkdir()
    (boot / "vmlinuz-1.3").write_bytes(bytes(4096))  # newer, and none that can be used
    (boot / "vmlinuz-1.2").write_bytes(bzimage(lzma.compress(PVH)))
    for version in ("1.2", "1.3"):
        modules = tmp_path / "lib/modules" / version
        (modules / "kernel/drivers/gpu").mkdir(parents=True)
        (modules / "build").symlink_to("/nowhere")
        for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo", "kernel/drivers/gpu/c.ko"):
            (modules / name).touch()
        (modules / "kernel/a.ko.xz").write_bytes(lzma.compress(elf()))
        (modules / "kernel/b.ko.gz").write_bytes(gzip.compress(elf()))
    monkeypatch.setattr(kernel, "_BOOT", boot)
    monkeypatch.setattr(kernel, "_MODULES", tmp_path / "lib/modules")
    said: list[str] = []
    assert kernel._own(target, said.append) == "1.2"
    assert said == [f"{boot}/vmlinuz-1.3 cannot be used: the kernel is no bzImage"]
    found = kernel.Kernel("1.2", target)
    assert found.vmlinux.read_bytes() == PVH and os.listdir(target / "lib/modules") == ["1.2"]
    assert sorted(os.listdir(found.modules / "kernel")) == ["a.ko", "b.ko", "drivers"]
    assert os.listdir(found.modules / "kernel/drivers") == [] and (found.modules / "modules.dep").exists()
    shutil.rmtree(boot)
    assert kernel._own(target, said.append) == ""


def test_the_image_in_a_bzimage() -> None:
    assert kernel.elf_image(bzimage(lzma.compress(PVH))) == PVH
    assert kernel.elf_image(bzimage(gzip.compress(PVH))) == PVH
    if shutil.which("zstd"):
        packed = subprocess.run(["zstd", "-cq"], input=PVH, capture_output=True, check=True).stdout
        assert kernel.elf_image(bzimage(packed)) == PVH
    with pytest.raises(HostError, match="not known here"):
        kernel.elf_image(bzimage(b"LZ4!" + PVH))
    with pytest.raises(HostError, match="no bzImage"):
        kernel.elf_image(bytes(4096))


def test_which_images_qemu_can_start() -> None:
    assert kernel.has_pvh_entry(PVH)
    assert not kernel.has_pvh_entry(elf((18, b"GNU\0"), (6, b"Xen\0"))) and not kernel.has_pvh_entry(b"MZ" + bytes(99))


def test_another_distribution_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SUITES", {})
    with pytest.raises(HostError, match="Debian 12 or 13, and this is neither"):
        kernel.suites()
