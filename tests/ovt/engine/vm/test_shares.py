"""Shared directories: what is recorded, how QEMU's container is to mount them, and that the mapping is the owner's."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ovt.engine.vm import shares
from ovt.engine.vm.hardware import Hardware
from ovt.errors import HostError, NotFound, StateError, UsageError
from ovt.model import Volume
from tests.ovt.engine.vm import bare

QEMU_UID = 0x20001234


def hardware() -> Hardware:
    return Hardware("pc-q35-7.2", "tcg", "max", 1, 1, 1, 1, 1, 1 << 26, 1 << 26, "bios", "u", "g")


def test_a_volume_becomes_a_share(tmp_path: Path) -> None:
    made = hardware()
    record = shares.add(made, Volume(str(tmp_path), "/srv", ("ro", "noexec")))
    assert record == {
        "id": "share0",
        "port": "rp0",
        "kind": "9p",
        "source": str(tmp_path),
        "target": "/srv",
        "read_only": True,
        "options": "noexec,ro",
    }
    assert shares.add(made, Volume(str(tmp_path), "/other"))["id"] == "share1"
    assert not made.shared_memory
    assert shares.guest_command(record) == "mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro share0 /srv"
    assert "read-only" in shares.describe(record)


@pytest.mark.parametrize(
    ("source", "target", "options", "said"),
    [
        ("", "/run", (), "no tmpfs volumes"),
        (".", "srv", (), "is not an absolute path"),
        (".", "/a:b", (), "has a character"),
        (".", "/srv", ("rshared",), "option 'rshared' is not known for a machine"),
        ("file", "/srv", (), "is no directory"),
    ],
)
def test_what_a_machine_cannot_have(
    tmp_path: Path, source: str, target: str, options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "file").touch()
    made = hardware()
    with pytest.raises(UsageError, match=said):
        shares.add(made, Volume(source and str(tmp_path / source), target, options))
    assert made.shares == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        shares.add(hardware(), Volume(str(tmp_path / "nothing"), "/srv"))
    made = hardware()
    directory = tmp_path / "gone"
    directory.mkdir()
    shares.add(made, Volume(str(directory), "/srv"))
    directory.rmdir()
    with pytest.raises(NotFound, match="has vanished"):
        shares.mounts(made, 0)


def test_two_volumes_on_one_target(tmp_path: Path) -> None:
    made = hardware()
    shares.add(made, Volume(str(tmp_path), "/srv"))
    with pytest.raises(UsageError, match="two volumes"):
        shares.add(made, Volume(str(tmp_path), "/srv"))


def test_an_owner_without_privileges_needs_no_mapping(tmp_path: Path) -> None:
    made = hardware()
    shares.add(made, Volume(str(tmp_path), "/srv"))
    (mount,) = shares.mounts(made, 0)
    assert mount["destination"] == "/shares/share0"
    assert "uidMappings" not in mount
    assert mount["options"] == ["rbind", "rprivate", "nosuid", "nodev", "noexec"]


@pytest.mark.root
def test_the_owner_is_qemu_inside(tmp_path: Path) -> None:
    os.chown(tmp_path, 1234, 1235)
    made = hardware()
    shares.add(made, Volume(str(tmp_path), "/srv"))
    (mount,) = shares.mounts(made, QEMU_UID)
    assert mount["uidMappings"] == [{"containerID": 1234, "hostID": QEMU_UID, "size": 1}]
    assert mount["gidMappings"] == [{"containerID": 1235, "hostID": QEMU_UID, "size": 1}]


@pytest.mark.root
def test_without_mapped_mounts_only_reading_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_can_map", lambda *words, **more: False)
    made = hardware()
    shares.add(made, Volume(str(tmp_path), "/ro", ("ro",)))
    (mount,) = shares.mounts(made, QEMU_UID)
    assert "ro" in mount["options"] and "uidMappings" not in mount
    shares.add(made, Volume(str(tmp_path), "/rw"))
    with pytest.raises(HostError, match="could not write to") as caught:
        shares.mounts(made, QEMU_UID)
    assert f"{tmp_path}:/rw:ro" in caught.value.hint


@pytest.mark.root
def test_proc_has_no_mapped_mounts() -> None:
    assert not shares._can_map("/proc/self", [{"containerID": 0, "hostID": 5, "size": 1}], [], recursive=False)


def test_virtiofs_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_VIRTIOFSD", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="virtiofsd is not installed"):
        shares.add(hardware(), Volume(str(tmp_path), "/srv", ("virtiofs",)))
    program = tmp_path / "virtiofsd"
    program.touch(0o755)
    made = hardware()
    record = shares.add(made, Volume(str(tmp_path), "/srv", ("virtiofs", "ro")))
    assert (record["kind"], record["options"]) == ("virtiofs", "ro,virtiofs")
    assert made.shared_memory
    assert shares.mounts(made, 0) == []
    assert shares.words(made) == []


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")
def test_qemu_takes_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hardware()
    monkeypatch.setattr(shares, "INSIDE", str(tmp_path))
    for name in ("share0", "share1"):
        (tmp_path / name).mkdir()
        shares.add(made, Volume(str(tmp_path), f"/{name}", ("ro",) if name == "share1" else ()))
    ports = [
        word for n in range(3) for word in ("-device", f"pcie-root-port,id=rp{n},addr={0x10 + n:#x},chassis={n + 1}")
    ]
    with bare.qemu(more=[*ports, *shares.words(made)]) as qmp:
        for share in made.shares:
            shares.plug(qmp, made, share)
        tag = qmp.command("qom-get", {"path": "/machine/peripheral/share1", "property": "mount_tag"})
        assert tag == "share1"
        with pytest.raises(StateError, match="cannot be added to a running machine"):
            shares.plug(qmp, made, {**made.shares[0], "id": "share2"})


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")
def test_virtiofsd_that_does_not_work_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid; echo no rights >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(shares, "_VIRTIOFSD", (str(program),))
    made = hardware()
    record = shares.add(made, Volume(str(tmp_path), "/srv", ("virtiofs",)))
    fds = len(os.listdir("/proc/self/fd"))
    ports = ["-device", "pcie-root-port,id=rp0,addr=0x10,chassis=1"]
    with bare.qemu(more=ports) as qmp:
        inside = len(os.listdir("/proc/self/fd"))
        with pytest.raises(HostError, match=r"virtiofsd does not serve .*: no rights"):
            shares.plug(qmp, made, record)
        assert [entry["label"] for entry in qmp.command("query-chardev") if entry["label"].startswith("share")] == []
        assert len(os.listdir("/proc/self/fd")) == inside
    assert len(os.listdir("/proc/self/fd")) == fds
    assert subprocess.run(["kill", "-0", (tmp_path / "pid").read_text().strip()], check=False).returncode
