"""A machine's memory goes to a file and comes back; nothing is lost when that fails."""

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.engine.vm import memory_state
from ovt.engine.vm.features import Features, probe
from ovt.engine.vm.memory_state import MAPPED, STREAM, Saved
from ovt.engine.vm.qmp import Qmp
from ovt.errors import HostError, OvtError, StateError
from tests.ovt.engine.vm import bare

pytestmark = pytest.mark.qemu

CONTENT = random.Random(4).randbytes(2 * bare.MIB)
SLOW = 4 * bare.MIB  # bytes per second: so that saving takes half a second


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return probe(str(tmp_path_factory.mktemp("features")))


def older(features: Features) -> Features:
    """What is known of a QEMU before mapped-ram."""
    return features._replace(mapped_ram=False, multifd=False)


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_state, "_UNLIMITED", SLOW)


def running(qmp: Qmp) -> bool:
    return bool(qmp.command("query-status")["running"])


def saved_file(features: Features, path: Path, memory: int = bare.MEMORY) -> Saved:
    with bare.qemu(content=CONTENT, memory=memory) as qmp:
        return memory_state.save_file(qmp, features, str(path))


def load(features: Features, path: Path, saved: Saved, memory: int = bare.MEMORY) -> bytes:
    with bare.qemu(incoming=True, memory=memory) as qmp, open(path, "rb") as file:
        memory_state.load(qmp, features, file.fileno(), saved)
        return bare.read(qmp, bare.CONTENT, len(CONTENT))


@pytest.mark.parametrize("able", [lambda features: features, older], ids=["mapped-ram", "stream"])
@pytest.mark.filterwarnings("default")
def test_what_was_in_memory_is_there_again(
    able: Callable[[Features], Features], features: Features, tmp_path: Path
) -> None:
    features = able(features)
    path = tmp_path / "state"
    heard: list[tuple[int, int]] = []
    with bare.qemu(content=CONTENT) as qmp:
        qmp.command("cont")
        saved = memory_state.save_file(
            qmp, features, str(path), progress=lambda done, total: heard.append((done, total))
        )
        assert qmp.command("query-status")["status"] == "postmigrate"
    assert saved.format == (MAPPED if features.mapped_ram else STREAM)
    assert saved.memory == bare.MEMORY
    assert os.listdir(tmp_path) == ["state"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert heard[-1][0] == heard[-1][1] > bare.MEMORY
    assert load(features, path, saved) == CONTENT


def test_a_mapped_file_has_room_for_all_memory_and_holds_what_is_used(features: Features, tmp_path: Path) -> None:
    if not features.mapped_ram:
        pytest.skip("needs mapped-ram")
    saved_file(features, tmp_path / "state")
    info = (tmp_path / "state").stat()
    assert info.st_size > bare.MEMORY
    assert info.st_blocks * 512 < 16 * bare.MIB


def test_the_guest_goes_on_afterwards_and_can_be_saved_again(features: Features, tmp_path: Path) -> None:
    with bare.qemu() as qmp:
        qmp.command("cont")
        memory_state.save_file(qmp, features, str(tmp_path / "one"))
        memory_state.save_file(qmp, features, str(tmp_path / "two"))  # not continued between
        assert not running(qmp)
        qmp.command("cont")
        assert running(qmp)


def test_it_can_be_saved_again_and_again(features: Features, tmp_path: Path) -> None:
    """With multifd, QEMU 10.0 aborts by an assertion, mostly within ten times."""
    with bare.qemu() as qmp:

        def look(done: int, total: int) -> None:
            states = {entry["capability"]: entry["state"] for entry in qmp.command("query-migrate-capabilities")}
            assert not states["multifd"]

        qmp.command("cont")
        for _ in range(20):
            memory_state.save_file(qmp, features, str(tmp_path / "state"), progress=look)
            qmp.command("cont")
        assert running(qmp)


def test_settings_are_as_before_but_for_multifd(features: Features, tmp_path: Path) -> None:
    """What a live migration that failed has left on; with multifd on, QEMU's clean-up after a file would crash it."""

    def settings() -> tuple[dict[str, bool], int]:
        states = {entry["capability"]: entry["state"] for entry in qmp.command("query-migrate-capabilities")}
        return states, qmp.command("query-migrate-parameters")["max-bandwidth"]

    with bare.qemu() as qmp:
        on = [{"capability": name, "state": True} for name in ("auto-converge", "multifd")]
        qmp.command("migrate-set-capabilities", {"capabilities": on})
        states, rate = settings()
        assert states["multifd"]
        for name in ("one", "two"):
            memory_state.save_file(qmp, features, str(tmp_path / name))
        assert settings() == ({**states, "multifd": False}, rate)
        assert qmp.command("query-fdsets") == []


def test_interrupt_leaves_the_guest_running_and_no_file(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)

    def interrupt(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with bare.qemu(content=CONTENT) as qmp:
        qmp.command("cont")
        with pytest.raises(KeyboardInterrupt):
            memory_state.save_file(qmp, features, str(tmp_path / "state"), progress=interrupt)
        assert running(qmp)
        assert os.listdir(tmp_path) == []
        assert qmp.command("query-fdsets") == []
        monkeypatch.undo()
        memory_state.save_file(qmp, features, str(tmp_path / "state"))


def test_interrupt_leaves_a_paused_guest_paused(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with bare.qemu(content=CONTENT) as qmp:
        with pytest.raises(KeyboardInterrupt):
            memory_state.save_file(qmp, features, str(tmp_path / "state"), progress=interrupt)
        assert not running(qmp)


def test_too_slow_is_an_error_and_the_guest_goes_on(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)
    with bare.qemu(content=CONTENT) as qmp:
        qmp.command("cont")
        with pytest.raises(HostError, match=r"has not been saved within 0.1 seconds"):
            memory_state.save_file(qmp, features, str(tmp_path / "state"), timeout=0.1)
        assert running(qmp)
    assert os.listdir(tmp_path) == []


@pytest.mark.root
def test_a_full_disk_leaves_the_guest_running_and_no_file(features: Features, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", tmp_path], check=True)
    try:
        with bare.qemu(content=CONTENT) as qmp:
            qmp.command("cont")
            with pytest.raises(HostError, match=r"cannot be saved: .*No space left on device") as caught:
                memory_state.save_file(qmp, features, str(tmp_path / "state"))
            assert "free some space" in caught.value.hint
            assert running(qmp)
            assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_qemu_killed_while_it_saves_is_one_error(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)
    with bare.qemu(content=CONTENT) as qmp:
        killer = threading.Timer(0.2, os.kill, (qmp.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(HostError, match="QEMU has ended"):
            memory_state.save_file(qmp, features, str(tmp_path / "state"))
        killer.join()
    assert os.listdir(tmp_path) == []


def test_what_blocks_is_told_and_nothing_happens(features: Features, tmp_path: Path) -> None:
    nvme = ["-blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on", "-device", "nvme,drive=n,serial=s"]
    with bare.qemu(more=nvme) as qmp:
        qmp.command("cont")
        with pytest.raises(StateError, match=r"cannot be saved: .*non-migratable device.*nvme"):
            memory_state.save_file(qmp, features, str(tmp_path / "state"))
        assert running(qmp)
    assert os.listdir(tmp_path) == []


def test_loading_needs_the_same_size_of_memory(features: Features, tmp_path: Path) -> None:
    saved = saved_file(features, tmp_path / "state")
    with pytest.raises(OvtError, match="of a machine with 64 MiB of memory, this one has 128 MiB"):
        load(features, tmp_path / "state", saved, memory=2 * bare.MEMORY)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def devices_changed(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(b"changed")


def foreign(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\x7fELF")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"is damaged: it has \d+ bytes and was written with \d+"),
        (devices_changed, "is damaged: its content has changed"),
        (foreign, "is no saved state of a machine"),
    ],
)
def test_a_damaged_file_is_one_error_before_qemu_sees_it(
    damage: Callable[[Path], None], message: str, features: Features, tmp_path: Path
) -> None:
    saved = saved_file(features, tmp_path / "state")
    damage(tmp_path / "state")
    with open(tmp_path / "state", "rb") as file, pytest.raises(OvtError, match=message):
        memory_state.check(file.fileno(), saved, features)


def test_what_qemu_refuses_is_one_error(features: Features, tmp_path: Path) -> None:
    saved = saved_file(features, tmp_path / "state")
    with (
        bare.qemu(incoming=True, more=["-device", "virtio-rng-pci"], machine="pc") as qmp,
        open(tmp_path / "state", "rb") as file,
        pytest.raises(HostError, match="the state cannot be loaded: "),
    ):
        memory_state.load(qmp, features, file.fileno(), saved)


def test_a_form_that_this_qemu_cannot_load(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"")
    with open(path, "rb") as file:
        for form, words in (
            (MAPPED, "saved by QEMU 9.0"),
            ("devices", "x-ignore-shared"),
            ("x", "form that is not known"),
        ):
            with pytest.raises(OvtError, match=words):
                memory_state.check(
                    file.fileno(), Saved(form, 0, "", 0), features._replace(mapped_ram=False, ignore_shared=False)
                )


def test_record_survives_json_and_a_damaged_one_is_told() -> None:
    saved = Saved(MAPPED, 5, "d", 6, "10.0.2")
    assert Saved.unpack(saved._asdict()) == saved
    with pytest.raises(OvtError, match="damaged"):
        Saved.unpack({"size": 3})
