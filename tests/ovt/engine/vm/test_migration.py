"""Steps of a migration on two real QEMUs that have no guest, joined by sockets in directories that they are lent."""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.engine.vm import disks as plugging
from ovt.engine.vm import migration
from ovt.engine.vm.migration import Settings
from ovt.engine.vm.qmp import QmpError, listen, socket_path
from ovt.errors import HostError, StateError
from ovt.machines.transport import pump
from tests.ovt.engine.vm.bare import CONTENT, MIB, Bare, qemu, read

pytestmark = pytest.mark.qemu
PORT = ["-device", json.dumps({"driver": "pcie-root-port", "id": "rp0", "chassis": 1})]
WORDS = b"memory that moves " * 1000
NOBODY = 65534


class Pair:
    """Two QEMUs, the second waiting, and how their sockets are joined."""

    def __init__(self, source: Bare, target: Bare, directory: Path) -> None:
        self.source, self.target = source, target
        self.directories = [directory / "here", directory / "there"]
        for path in self.directories:
            path.mkdir()
            path.chmod(0o777)
        self.lent = [
            migration.lend_directory(qmp, str(path))
            for qmp, path in zip((source, target), self.directories, strict=True)
        ]
        self.carried: list[socket.socket] = []
        self._listeners = [self._join(migration.OUT, migration.IN), self._join(migration.NBD, migration.NBD)]

    def _join(self, here: str, there: str) -> socket.socket:
        path = str(self.directories[0] / here)
        listener = listen(path)
        os.chmod(path, 0o666)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    onward = socket.socket(socket.AF_UNIX)
                    with socket_path(str(self.directories[1] / there)) as short:
                        onward.connect(short)
                    self.carried.append(onward)
                    threading.Thread(target=pump, args=(connection, onward), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return listener

    def cut(self) -> None:
        """Break every connection there is."""
        for connection in self.carried:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def configure(self, settings: Settings) -> None:
        for qmp in (self.source, self.target):
            migration.configure(qmp, settings)

    def send(self, until: str = "completed", timeout: float = 30.0) -> str:
        """See the sending side through to a state."""
        deadline = time.monotonic() + timeout
        while (state := migration.status(self.source)[0]) != until:
            assert time.monotonic() < deadline, state
            migration.wait_change(self.source, 0.05)
        return state


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    # QEMU is another user where that can be had, as in its container
    uid = NOBODY if os.geteuid() == 0 else -1
    os.chmod(tmp_path, 0o711)
    with qemu(content=WORDS, more=PORT, uid=uid) as source, qemu(more=PORT, incoming=True, uid=uid) as target:
        both = Pair(source, target, tmp_path)
        try:
            yield both
        finally:
            both.close()


@pytest.mark.parametrize("multifd", [0, 2])
def test_memory_moves_and_the_guest_waits_there_until_it_is_let_go(pair: Pair, multifd: int) -> None:
    pair.configure(Settings(multifd=multifd))
    pair.source.command("cont")
    migration.listen(pair.target, pair.lent[1])
    migration.start(pair.source, pair.lent[0])
    pair.send()
    migration.wait_arrived(pair.target)
    assert not migration.running(pair.source)
    assert not migration.running(pair.target)
    assert read(pair.target, CONTENT, len(WORDS)) == WORDS
    assert time.time() - 30 < migration.stopped_at(pair.source) <= time.time()
    migration.go(pair.target, True)
    assert migration.running(pair.target)
    assert len(pair.carried) == 1 + multifd
    total, downtime, transferred = migration.status(pair.source)[2]
    assert total >= downtime >= 0
    assert transferred > len(WORDS)


def test_a_paused_guest_stays_paused(pair: Pair) -> None:
    pair.configure(Settings())
    pair.source.command("cont")
    pair.source.command("stop")
    migration.listen(pair.target, pair.lent[1])
    migration.start(pair.source, pair.lent[0])
    pair.send()
    migration.wait_arrived(pair.target)
    migration.go(pair.target, False)
    assert not migration.running(pair.target)


def test_after_a_cancel_the_guest_goes_on_and_qemu_is_as_before(pair: Pair) -> None:
    before = migration.parameters(pair.source)
    pair.configure(Settings(bandwidth=MIB))
    pair.source.command("cont")
    migration.listen(pair.target, pair.lent[1])
    migration.start(pair.source, pair.lent[0])
    pair.send("active")
    assert migration.cancel(pair.source) == "cancelled"
    migration.run_again(pair.source)
    assert migration.running(pair.source)
    with pytest.raises(HostError, match="QEMU gave the migration up: "):
        migration.status(pair.source)
    migration.deconfigure(pair.source, before)
    migration.take_back_directories(pair.source)
    assert migration.parameters(pair.source) == before
    assert not any(entry["state"] for entry in pair.source.command("query-migrate-capabilities"))
    assert pair.source.command("query-fdsets") == []


def test_a_cut_wire_is_an_error_and_the_guest_goes_on(pair: Pair) -> None:
    pair.configure(Settings(bandwidth=MIB))
    pair.source.command("cont")
    migration.listen(pair.target, pair.lent[1])
    migration.start(pair.source, pair.lent[0])
    pair.send("active")
    pair.cut()
    with pytest.raises(HostError, match="QEMU gave the migration up: "):
        pair.send()
    migration.cancel(pair.source)
    migration.run_again(pair.source)
    assert migration.running(pair.source)


def test_the_guest_goes_on_after_all_memory_has_gone_but_nothing_was_let_go_there(pair: Pair) -> None:
    pair.configure(Settings())
    pair.source.command("cont")
    migration.listen(pair.target, pair.lent[1])
    migration.start(pair.source, pair.lent[0])
    pair.send()
    assert migration.cancel(pair.source) == "completed"
    migration.run_again(pair.source)
    assert migration.running(pair.source)
    assert not migration.running(pair.target)


def image(path: Path, content: bytes = b"") -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True, timeout=60)
    if content:
        write = f"write -P {content[0]} 0 1M"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(path)], check=True, timeout=60, capture_output=True)


def disk(path: Path) -> dict[str, object]:
    return {"id": "root", "device": "disk", "port": "rp0", "chain": [{"path": str(path), "format": "qcow2"}]}


@pytest.fixture
def with_disks(pair: Pair, tmp_path: Path) -> Pair:
    image(tmp_path / "source.qcow2", b"a")
    image(tmp_path / "target.qcow2")
    plugging.plug(pair.source, str(tmp_path), disk(tmp_path / "source.qcow2"))
    plugging.plug(pair.target, str(tmp_path), disk(tmp_path / "target.qcow2"))
    pair.configure(Settings(disks=True))
    pair.source.command("cont")
    migration.listen(pair.target, pair.lent[1])
    migration.export(pair.target, pair.lent[1], ["root"])
    return pair


def begin_mirror(pair: Pair) -> list[migration.Disk]:
    mirrored = [migration.disks(pair.source)["root"]]
    migration.start_mirrors(pair.source, pair.lent[0], mirrored)
    deadline = time.monotonic() + 30
    while not migration.mirrors(pair.source, mirrored)[0]:
        assert time.monotonic() < deadline
        migration.wait_change(pair.source, 0.05)
    return mirrored


def write(pair: Pair, pattern: int, offset: str) -> None:
    """As the guest would."""
    line = f'qemu-io -d /machine/peripheral/root/virtio-backend "write -P {pattern} {offset} 64k"'
    said = pair.source.command("human-monitor-command", {"command-line": line})
    assert "wrote" in said or not said, said


def holds(path: Path, pattern: int, offset: str) -> bool:
    command = ["qemu-io", "-f", "qcow2", "-c", f"read -P {pattern} {offset} 64k", str(path)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "Pattern verification failed" not in done.stdout


def test_a_disk_moves_with_what_is_written_meanwhile(with_disks: Pair, tmp_path: Path) -> None:
    pair = with_disks
    found = migration.disks(pair.source)["root"]
    assert (found.size, found.read_only) == (8 * MIB, False)
    mirrored = begin_mirror(pair)
    migration.lock_step(pair.source, mirrored)
    write(pair, 0x62, "4M")
    migration.start(pair.source, pair.lent[0])
    pair.send("pre-switchover")
    assert not migration.running(pair.source)
    migration.finish_mirrors(pair.source, mirrored)
    migration.close_exports(pair.target)
    migration.go_on(pair.source)
    pair.send()
    migration.wait_arrived(pair.target)
    migration.go(pair.target, True)
    pair.source.command("quit")
    pair.target.command("quit")
    assert holds(tmp_path / "target.qcow2", ord("a"), "0")
    assert holds(tmp_path / "target.qcow2", 0x62, "4M")


def test_giving_up_before_the_change_over_leaves_the_disk_and_the_guest(with_disks: Pair, tmp_path: Path) -> None:
    pair = with_disks
    mirrored = begin_mirror(pair)
    migration.start(pair.source, pair.lent[0])
    pair.send("pre-switchover")
    migration.cancel(pair.source)
    migration.drop_mirrors(pair.source, mirrored)
    migration.run_again(pair.source)
    assert migration.running(pair.source)
    nodes = {node["node-name"] for node in pair.source.command("query-named-block-nodes")}
    assert not any(name.startswith("migrate-") for name in nodes)
    assert pair.source.command("query-jobs") == []
    write(pair, 0x63, "2M")


def test_a_mirror_whose_wire_is_cut_says_which_disk(with_disks: Pair) -> None:
    pair = with_disks
    mirrored = begin_mirror(pair)
    pair.cut()
    write(pair, 0x64, "3M")
    deadline = time.monotonic() + 30
    with pytest.raises(HostError, match="disk root cannot be copied: "):
        while time.monotonic() < deadline:
            migration.mirrors(pair.source, mirrored)
            migration.wait_change(pair.source, 0.05)
    migration.drop_mirrors(pair.source, mirrored)
    assert migration.running(pair.source)


def test_an_unknown_disk_is_not_exported(pair: Pair) -> None:
    with pytest.raises(HostError, match="no disk other"):
        migration.export(pair.target, pair.lent[1], ["other"])


def test_what_never_arrives_is_an_error(pair: Pair) -> None:
    migration.configure(pair.target, Settings())
    migration.listen(pair.target, pair.lent[1])
    with pytest.raises(HostError, match=r"has not arrived within 0\.1 seconds"):
        migration.wait_arrived(pair.target, 0.1)
    with pytest.raises(HostError, match="nothing to recover"):
        migration.listen_again(pair.target, pair.lent[1])


def test_settings_that_do_not_go_together_are_refused(pair: Pair) -> None:
    with pytest.raises(QmpError):
        migration.configure(pair.source, Settings(downtime=10**9))


@pytest.mark.root
def test_nothing_above_the_lent_directory_can_be_reached(pair: Pair, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    address = {"type": "unix", "data": {"path": f"{pair.lent[1]}/../escaped"}}
    pair.target.command("nbd-server-start", {"addr": address})
    assert not (tmp_path / "escaped").exists()
    assert (pair.directories[1] / "escaped").is_socket()


@pytest.mark.root
def test_post_copy_goes_on_after_its_wire_was_cut(tmp_path: Path) -> None:
    """The rest of the memory takes another connection. The guest there does not run yet: under TCG it would wait for
    a missing page with QEMU's big lock held, and no command would be answered."""
    with qemu(content=WORDS, memory=256 * MIB) as source, qemu(incoming=True, memory=256 * MIB) as target:
        pair = Pair(source, target, tmp_path)
        try:
            pair.configure(Settings(bandwidth=4 * MIB, postcopy=True))
            for qmp in (source, target):
                qmp.command("migrate-set-parameters", {"max-postcopy-bandwidth": 256 << 10})
            source.command("cont")
            migration.listen(target, pair.lent[1])
            migration.start(source, pair.lent[0])
            pair.send("active")
            migration.start_postcopy(source)
            pair.send("postcopy-active")
            migration.wait_arrived(target)
            with pytest.raises(StateError, match="no way back"):
                migration.cancel(source)
            pair.cut()
            pair.send("postcopy-paused")
            migration.listen_again(target, pair.lent[1])
            source.command("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
            migration.send_again(source, pair.lent[0])
            pair.send()
            migration.go(target, True)
            assert read(target, CONTENT, len(WORDS)) == WORDS
            assert migration.running(target)
            assert not migration.running(source)
        finally:
            pair.close()


def test_device_ids() -> None:
    assert migration.device_id("/machine/peripheral/root/virtio-backend") == "root"
    assert migration.device_id("cdrom1") == "cdrom1"
    assert migration.device_id("/machine/system.flash1") == ""
