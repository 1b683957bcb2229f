"""Devices of the host: what is looked at before one is taken, and what is written where, on a sysfs of plain files.

That the kernel does what is written there is for tests/lab/test_vm_hostdev.py.
"""

import json
import os
from pathlib import Path

import pytest

from ovt.engine.vm import hostdevs
from ovt.engine.vm.hardware import Hardware
from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError

NIC, DISK, BRIDGE = "0000:01:00.0", "0000:01:00.1", "0000:00:02.0"


class Sysfs:
    """Three devices in one IOMMU group, and a kernel that binds what it is told to bind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log: list[tuple[str, str]] = []
        for name in ("igb", "nvme", "pcieport", "vfio-pci"):
            (path / "bus/pci/drivers" / name).mkdir(parents=True)
            (path / "bus/pci/drivers" / name / "bind").touch()
        (path / "class/block").mkdir(parents=True)
        group = path / "kernel/iommu_groups/7/devices"
        group.mkdir(parents=True)
        for address, driver, kind in (
            (NIC, "igb", "0x020000"),
            (DISK, "nvme", "0x010802"),
            (BRIDGE, "pcieport", "0x060400"),
        ):
            device = self.device(address)
            device.mkdir(parents=True)
            (device / "class").write_text(kind + "\n")
            (device / "driver_override").write_text("(null)\n")
            (device / "iommu_group").symlink_to(path / "kernel/iommu_groups/7")
            (group / address).symlink_to(device)
            self.bind(address, driver)

    def __str__(self) -> str:
        return str(self.path)

    def device(self, address: str) -> Path:
        return self.path / "bus/pci/devices" / address

    def driver(self, address: str) -> str:
        link = self.device(address) / "driver"
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""

    def bind(self, address: str, driver: str) -> None:
        (self.device(address) / "driver").unlink(missing_ok=True)
        if driver:
            (self.device(address) / "driver").symlink_to(self.path / "bus/pci/drivers" / driver)

    def write(self, path: str, text: str) -> None:
        """In the place of hostdevs._write."""
        name = os.path.relpath(path, self.path)
        self.log.append((name, text))
        if name.endswith("driver_override"):
            Path(path).write_text(text if text.strip() else "(null)\n")
        elif name.endswith("driver/unbind"):
            self.bind(text, "")
        elif name.endswith("drivers_probe"):
            override = (self.device(text) / "driver_override").read_text().strip()
            self.bind(text, "" if override == "(null)" else override)
        elif name.endswith("bind"):
            self.bind(text, name.split("/")[-2])
        else:
            raise AssertionError(name)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    made = Sysfs(tmp_path / "sys")
    monkeypatch.setattr(hostdevs, "_write", made.write)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in ("one", "two"):
        (tmp_path / "instances" / name).mkdir(parents=True)
    return made


@pytest.fixture
def home(tmp_path: Path) -> str:
    return str(tmp_path / "instances/one")


def hardware() -> Hardware:
    return Hardware("pc-q35-7.2", "tcg", "max", 1, 1, 1, 1, 1, 1 << 26, 1 << 26, "bios", "u", "g")


def test_a_device_is_recorded() -> None:
    made = hardware()
    assert hostdevs.add(made, "01:10.0") == {"id": "hostdev0", "port": "rp0", "address": "0000:01:10.0"}
    assert not made.balloon
    with pytest.raises(UsageError, match="twice"):
        hostdevs.add(made, "0000:01:10.0")


@pytest.mark.parametrize("address", ["", "eth0", "1:2.3", "0000:01:10.8", "0000:01:20.0", "../../etc"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a PCI device"):
        hostdevs.add(hardware(), address)


def test_a_device_that_is_not_there(sysfs: Sysfs) -> None:
    with pytest.raises(NotFound, match=r"0000:09:00\.0"):
        hostdevs.check(["0000:09:00.0"], str(sysfs))


def test_without_an_iommu(sysfs: Sysfs) -> None:
    (sysfs.device(NIC) / "iommu_group").unlink()
    with pytest.raises(HostError, match="in no IOMMU group") as caught:
        hostdevs.check([NIC], str(sysfs))
    assert "intel_iommu=on" in caught.value.hint


def test_every_member_of_the_group_is_named(sysfs: Sysfs) -> None:
    with pytest.raises(Conflict) as caught:
        hostdevs.check([NIC], str(sysfs))
    assert f"{DISK} (nvme, must go along)" in caught.value.message
    assert f"{NIC} (igb, given)" in caught.value.message
    assert f"{BRIDGE} (pcieport, a bridge, stays)" in caught.value.message
    assert f"--hostdev {DISK}" in caught.value.hint
    hostdevs.check([NIC, DISK], str(sysfs))
    sysfs.bind(DISK, "")
    hostdevs.check([NIC], str(sysfs))


def test_a_disk_in_use_stays(sysfs: Sysfs, tmp_path: Path) -> None:
    block = sysfs.device(DISK) / "nvme/nvme0/nvme0n1"
    (block / "holders").mkdir(parents=True)
    line = Path("/proc/self/mountinfo").read_text().splitlines()[0].split()
    (block / "dev").write_text(line[2] + "\n")
    (sysfs.path / "class/block/nvme0n1").symlink_to(block)
    with pytest.raises(Conflict, match=f"disk nvme0n1 is mounted on {line[4]}"):
        hostdevs.check([NIC, DISK], str(sysfs))
    (block / "dev").write_text("4095:1\n")
    hostdevs.check([NIC, DISK], str(sysfs))
    (block / "holders/dm-0").mkdir()
    with pytest.raises(Conflict, match="disk nvme0n1 is part of dm-0"):
        hostdevs.check([NIC, DISK], str(sysfs))
    sysfs.bind(DISK, "vfio-pci")
    hostdevs.check([NIC, DISK], str(sysfs))


@pytest.fixture
def free(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    """The disk has no driver, so that the network card alone can be given."""
    sysfs.bind(DISK, "")
    return sysfs


def test_taken_and_given_back(free: Sysfs, home: str) -> None:
    hostdevs.take(home, [NIC], str(free))
    assert free.driver(NIC) == "vfio-pci"
    record = json.loads(Path(home, hostdevs.RECORD).read_text())
    assert record["taken"] == [{"address": NIC, "driver": "igb", "override": ""}]
    hostdevs.release(home, str(free))
    assert free.driver(NIC) == "igb"
    assert (free.device(NIC) / "driver_override").read_text() == "(null)\n"
    assert not Path(home, hostdevs.RECORD).exists()
    free.log.clear()
    hostdevs.release(home, str(free))
    assert free.log == []


def test_a_device_that_was_there_for_guests_stays_so(free: Sysfs, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free.bind(NIC, "vfio-pci")
    monkeypatch.setattr(hostdevs, "_refuse_taken", lambda *words: None)
    hostdevs.take(home, [NIC], str(free))
    hostdevs.release(home, str(free))
    assert free.log == []
    assert free.driver(NIC) == "vfio-pci"


def test_a_device_without_a_driver_gets_none(free: Sysfs, home: str) -> None:
    free.bind(NIC, "")
    hostdevs.take(home, [NIC], str(free))
    hostdevs.release(home, str(free))
    assert free.driver(NIC) == ""


def test_two_machines_cannot_have_one_device(free: Sysfs, home: str, tmp_path: Path) -> None:
    hostdevs.take(home, [NIC], str(free))
    free.log.clear()
    with pytest.raises(Conflict, match="is given to the machine one already"):
        hostdevs.take(str(tmp_path / "instances/two"), [NIC], str(free))
    assert free.log == []
    assert not (tmp_path / "instances/two" / hostdevs.RECORD).exists()
    assert free.driver(NIC) == "vfio-pci"


def test_a_killed_start_is_taken_back_by_the_next(free: Sysfs, home: str) -> None:
    hostdevs.take(home, [NIC], str(free))
    hostdevs.take(home, [NIC], str(free))
    hostdevs.release(home, str(free))
    assert free.driver(NIC) == "igb"


def test_all_or_nothing(sysfs: Sysfs, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: str, text: str) -> None:
        if path.endswith("drivers_probe") and text == DISK:
            raise HostError("refused", 5)
        sysfs.write(path, text)

    monkeypatch.setattr(hostdevs, "_write", write)
    with pytest.raises(HostError, match="refused"):
        hostdevs.take(home, [NIC, DISK], str(sysfs))
    assert (sysfs.driver(NIC), sysfs.driver(DISK)) == ("igb", "nvme")
    assert not Path(home, hostdevs.RECORD).exists()


def test_a_device_that_vanished_is_forgotten(free: Sysfs, home: str) -> None:
    hostdevs.take(home, [NIC], str(free))
    free.device(NIC).rename(free.path / "gone")
    hostdevs.release(home, str(free))
    assert not Path(home, hostdevs.RECORD).exists()


def test_a_damaged_record_is_told(home: str, free: Sysfs) -> None:
    Path(home, hostdevs.RECORD).write_text("{")
    with pytest.raises(OvtError, match="is damaged"):
        hostdevs.release(home, str(free))


def test_only_root_takes_devices(free: Sysfs, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="only root"):
        hostdevs.take(home, [NIC], str(free))
    assert free.log == []
