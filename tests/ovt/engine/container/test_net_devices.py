"""linux.netDevices with real containers: a veth is the NIC that the host lends."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import init
from ovt.engine.container.create import _Creation
from ovt.engine.container.runtime import Runtime
from ovt.errors import Conflict, HostError, NotFound
from ovt.kernel.netlink import Netlink

pytestmark = pytest.mark.root
NIC = f"nic{os.getpid()}"
WIRE = f"wire{os.getpid()}"


@pytest.fixture(scope="module")
def stub() -> None:
    """The engine keeps one descriptor of its init for the life of the process; have it before a test is watched."""
    init._memfd()


@pytest.fixture
def nic() -> Iterator[str]:
    subprocess.run(["ip", "link", "add", NIC, "mtu", "1400", "type", "veth", "peer", "name", WIRE], check=True)
    subprocess.run(["ip", "addr", "add", "192.0.2.7/24", "dev", NIC], check=True)
    subprocess.run(["ip", "link", "set", NIC, "up"], check=True)
    yield NIC
    subprocess.run(["ip", "link", "del", WIRE], capture_output=True)


@pytest.fixture
def engine(tmp_path: Path, stub: None) -> Iterator[Runtime]:
    runtime = Runtime(str(tmp_path / "run"))
    yield runtime
    runtime.delete("net", force=True)


def create(engine: Runtime, directory: Path, devices: dict[str, Any]) -> int:
    (directory / "rootfs/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", directory / "rootfs/bin/busybox")
    spec = {
        "ociVersion": "1.3.0",
        "root": {"path": "rootfs"},
        "process": {"args": ["/bin/busybox", "true"], "cwd": "/"},
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "network")],
            "cgroupsPath": f"/ovt-test-{os.getpid()}",
            "netDevices": devices,
        },
    }
    (directory / "config.json").write_text(json.dumps(spec))
    return engine.create("net", str(directory)).pid


def test_a_container_has_the_nic_under_its_own_name(engine: Runtime, tmp_path: Path, nic: str) -> None:
    pid = create(engine, tmp_path, {nic: {"name": "eth0"}})
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    with Netlink(namespace) as inside, Netlink() as outside:
        moved = inside.link("eth0")
        assert moved.up and moved.mtu == 1400
        assert [entry["address"] for entry in inside.addresses(moved.index)] == ["192.0.2.7"]
        assert outside.find(nic) is None
    os.close(namespace)
    (record,) = json.loads((tmp_path / "run/net/state.json").read_text())["netDevices"]
    assert (record["name"], record["newName"], record["mtu"]) == (nic, "eth0", 1400)
    engine.delete("net", force=True)
    assert not (tmp_path / "run/net").exists()


@pytest.mark.parametrize("second", ["no-such-nic", "lo-again"])
def test_a_nic_that_cannot_be_lent_gives_the_others_back(
    engine: Runtime, tmp_path: Path, nic: str, second: str
) -> None:
    devices = {nic: {"name": "eth0"}, WIRE: {"name": "lo"}} if second == "lo-again" else {nic: {}, second: {}}
    with pytest.raises(Conflict if second == "lo-again" else NotFound):
        create(engine, tmp_path, devices)
    assert not (tmp_path / "run/net").exists()
    with Netlink() as outside:
        back = outside.link(nic)
        assert back.up and back.mtu == 1400
        assert [entry["address"] for entry in outside.addresses(back.index)] == ["192.0.2.7"]


def test_a_creation_that_fails_later_gives_the_nic_back(
    engine: Runtime, tmp_path: Path, nic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise HostError("refused by the test")

    monkeypatch.setattr(_Creation, "_finish", refuse)
    with pytest.raises(HostError, match="refused by the test"):
        create(engine, tmp_path, {nic: {"name": "eth0"}})
    assert not (tmp_path / "run/net").exists()
    with Netlink() as outside:
        assert outside.link(nic).up
