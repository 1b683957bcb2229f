"""Memory and processors that are plugged in: what is recorded of them, and that a second QEMU gets the same."""

from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import disks, resize
from ovt.engine.vm.hardware import MEMORY_UNIT, MIB, SLOTS
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import OvtError, StateError, UsageError
from ovt.model import Limits
from tests.ovt.engine.vm.bare import qemu
from tests.ovt.engine.vm.snapshot_machine import hardware

MORE = ["-smp", "1,maxcpus=3,sockets=3,cores=1,threads=1", "-m", f"slots={SLOTS},maxmem=1024M"]


def wide(**changes: Any) -> Any:
    machine = hardware()
    machine.max_vcpus = machine.sockets = 3
    machine.max_memory = 1024 * MIB
    machine.accel = "kvm"
    for key, value in changes.items():
        setattr(machine, key, value)
    return machine


@pytest.mark.qemu
def test_a_second_qemu_gets_what_the_first_chose(tmp_path: Path) -> None:
    first = wide()
    with qemu(more=MORE) as qmp:
        assert not resize.observe(qmp, first)
        assert resize._memory(qmp, first, str(tmp_path), 200 * MIB) == ["dimm0"]  # 136 more, in units of 128
        assert resize._memory(qmp, first, str(tmp_path), 400 * MIB) == ["dimm1"]
        assert resize._vcpus(qmp, first, str(tmp_path), 3) == ["cpu1", "cpu2"]
        assert not resize.observe(qmp, first)
        chosen = (qmp.command("query-memory-devices"), qmp.command("query-hotpluggable-cpus"))
    assert [(dimm["size"], dimm["slot"]) for dimm in first.dimms] == [(2 * MEMORY_UNIT, 0), (MEMORY_UNIT, 1)]
    assert first.dimms[1]["addr"] == first.dimms[0]["addr"] + 2 * MEMORY_UNIT
    assert resize.total_memory(first) == 64 * MIB + 3 * MEMORY_UNIT
    assert [cpu["socket-id"] for cpu in first.plugged_vcpus] == [1, 2]
    second = type(first).load(str(tmp_path))
    assert second == first
    with qemu(more=MORE) as qmp:
        for dimm in reversed(second.dimms):  # QEMU's own choice would follow the order
            resize.plug_dimm(qmp, second, dimm)
        for cpu in second.plugged_vcpus:
            resize.plug_vcpu(qmp, cpu)
        again = (qmp.command("query-memory-devices"), qmp.command("query-hotpluggable-cpus"))
    assert sorted(again[0], key=str) == sorted(chosen[0], key=str)
    assert again[1] == chosen[1]


@pytest.mark.qemu
def test_the_record_follows_qemu() -> None:
    machine = wide()
    machine.dimms = [{"id": "dimm7", "size": MEMORY_UNIT}]  # of a command that died before it was plugged in
    with qemu(more=MORE) as qmp:
        backend = {"qom-type": "memory-backend-ram", "id": "dimm7-memory", "size": MEMORY_UNIT}
        qmp.command("object-add", backend)
        resize.plug_dimm(qmp, machine, {"id": "dimm3", "size": MEMORY_UNIT})  # … and of one that died after
        assert resize.observe(qmp, machine)
        assert [dimm["id"] for dimm in machine.dimms] == ["dimm3"]
        assert {"dimm3-memory"} == {name for name in disks.children(qmp, "/objects") if name.startswith("dimm")}
        with pytest.raises(QmpError):
            resize.plug_dimm(qmp, machine, {"id": "dimm4", "size": 2048 * MIB})
        assert "dimm4-memory" not in disks.children(qmp, "/objects")


def test_what_cannot_be_had_is_said_before() -> None:
    plugged = [{"id": f"cpu{n}", "socket-id": n} for n in (1, 2)]
    with pytest.raises(UsageError, match="4 processors are more than the 3"):
        resize._check(wide(), 64 * MIB, 4, True)
    with pytest.raises(StateError, match="started with 2"):
        resize._check(wide(vcpus=2), 64 * MIB, 1, True)
    with pytest.raises(StateError, match="stands still"):
        resize._check(wide(plugged_vcpus=plugged), 64 * MIB, 2, False)
    with pytest.raises(StateError, match="emulated"):
        resize._check(wide(plugged_vcpus=plugged, accel="tcg"), 64 * MIB, 2, True)
    with pytest.raises(UsageError, match="more than the 1024 MiB"):
        resize._check(wide(), 1025 * MIB, 1, True)
    with pytest.raises(UsageError, match="128 MiB at a time"):
        resize._check(wide(), 1000 * MIB, 1, True)  # 936 more would be 1024 in whole units
    with pytest.raises(UsageError, match="too few"):
        resize._check(wide(), 8 * MIB, 1, True)
    full = [{"id": f"dimm{n}", "size": MIB} for n in range(SLOTS)]
    with pytest.raises(StateError, match="all 8 places"):
        resize._check(wide(dimms=full), 200 * MIB, 1, True)
    with pytest.raises(StateError, match="no balloon"):
        resize._check(wide(balloon=False), 32 * MIB, 1, True)
    resize._check(wide(plugged_vcpus=plugged), 960 * MIB, 1, True)


def test_a_cold_start_has_everything_from_the_beginning() -> None:
    machine = wide(dimms=[{"id": "dimm0", "size": MEMORY_UNIT}], plugged_vcpus=[{"id": "cpu1"}])
    resize.at_cold_start(machine, Limits(cpus=3.5, memory=2048 * MIB + 1))
    assert (machine.dimms, machine.plugged_vcpus) == ([], [])
    assert (machine.memory, machine.max_memory) == (2049 * MIB, 2049 * MIB)
    assert (machine.vcpus, machine.max_vcpus, machine.sockets) == (4, 4, 4)


class Told(Qmp):
    """Answers of a QEMU whose guest does what a test says with its processor."""

    def __init__(self, *events: dict[str, Any], leaves: bool) -> None:
        import collections

        self.events = collections.deque(events)
        self.leaves = leaves

    def command(self, name: str, arguments: Any = None, **ignored: Any) -> Any:
        gone = name == "qom-list" and self.leaves and not self.events
        return [] if gone else [{"name": "cpu1"}]

    def wait_event(self, *names: str, timeout: float, where: Any = None) -> dict[str, Any]:
        if not self.events:
            raise TimeoutError
        return self.events.popleft()


def ost(status: int) -> dict[str, Any]:
    return {"event": "ACPI_DEVICE_OST", "data": {"info": {"device": "cpu1", "source": 3, "status": status}}}


def test_a_processor_is_gone_when_qemu_has_it_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # as seen with QEMU 10.0: the event names the APIC alone
    deleted = {"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/cpu1/lapic"}}
    resize._unplug_vcpu(Told(ost(0x84), deleted, leaves=True), "cpu1")
    with pytest.raises(StateError, match="refuses"):
        resize._unplug_vcpu(Told(ost(0x84), ost(1), leaves=False), "cpu1")
    monkeypatch.setattr(resize, "_UNPLUG_SECONDS", 0.0)
    with pytest.raises(StateError, match="does not let go"):
        resize._unplug_vcpu(Told(leaves=False), "cpu1")


class Guest:
    """An agent with two processors, one of them off line, which may refuse."""

    def __init__(self, refuses: bool = False) -> None:
        self.online = [True, False]
        self.refuses = refuses

    def command(self, name: str, arguments: Any = None) -> Any:
        if name == "guest-set-vcpus":
            if self.refuses:
                raise OvtError("no")
            for entry in arguments["vcpus"]:
                self.online[entry["logical-id"]] = entry["online"]
            return None
        return [{"logical-id": n, "online": online, "can-offline": n > 0} for n, online in enumerate(self.online)]


def test_what_is_off_line_is_brought_on_line() -> None:
    words = ("guest-get-vcpus", "guest-set-vcpus", "vcpus", "logical-id")
    assert resize._switch_on(Guest(), *words) == 2  # type: ignore[arg-type]
    with pytest.raises(OvtError):
        resize._switch_on(Guest(refuses=True), *words)  # type: ignore[arg-type]
