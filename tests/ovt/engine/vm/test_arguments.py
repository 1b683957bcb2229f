"""QEMU's argument list, against golden files (`OVT_REGENERATE=1` writes them anew)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm.arguments import arguments
from ovt.engine.vm.hardware import Hardware

GOLDEN = Path(__file__).parents[3] / "golden"
FDS = {"events": 10, "commands": 11, "agent": 12}
BOOT = {**FDS, "kernel": 13, "initrd": 14, "exit": 15}


def hardware(**changes: Any) -> Hardware:
    chosen: dict[str, Any] = {
        "machine": "pc-q35-7.2", "accel": "tcg", "cpu": "Nehalem", "vcpus": 1, "max_vcpus": 2, "sockets": 2,
        "cores": 1, "threads": 1, "memory": 256 << 20, "max_memory": 4 << 30, "firmware": "none",
        "uuid": "3f1c1c3e-6f0a-4f0f-9a55-0c8d1b0e5a01", "generation": "7d0d2f4e-31c5-4b7c-8e59-0b6a4d1f9c02",
    }  # fmt: skip
    return Hardware(**{**chosen, **changes})


IMAGE = {"kernel": "/images/vmlinuz", "initrd": "/images/initrd", "cmdline": "console=ttyS0", "main_port": True}
UEFI = {"code": "/fw/code.fd", "code_format": "raw", "vars": "nvram.qcow2", "vars_format": "qcow2", "secure": False}
CASES: dict[str, tuple[Hardware, dict[str, int], dict[str, Any]]] = {
    "image": (hardware(**IMAGE), BOOT, {}),
    "kvm": (
        hardware(accel="kvm", cpu="host", vcpus=4, max_vcpus=8, cores=2, threads=2, cid=77),
        {**FDS, "vsock": 16},
        {},
    ),
    "uefi": (hardware(firmware="uefi", uefi=UEFI, graphics="vnc"), {**FDS, "code": 17, "vars": 18}, {}),
    "numa": (hardware(vcpus=2, numa=2, hugepages=True, memory=257 << 20), FDS, {}),
    "fork": (hardware(**IMAGE, forked=True), {**BOOT, "memory": 19}, {"private_memory": True, "incoming": True}),
    "incoming": (hardware(ports=9), FDS, {"incoming": True}),
    "watchdog": (hardware(watchdog="pause", panic="pause"), FDS, {}),
    "bare": (hardware(balloon=False, cid=0), {**FDS, "vsock": 16}, {}),
}


def words(name: str) -> list[str]:
    machine, fds, options = CASES[name]
    return arguments("/usr/bin/qemu-system-x86_64", machine, fds, name="a,b", **options)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    text = json.dumps(words(name), indent=1) + "\n"
    path = GOLDEN / f"vm-arguments-{name}.json"
    if os.environ.get("OVT_REGENERATE"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_stands_still_in_its_sandbox_and_knows_no_path_of_the_host(name: str) -> None:
    line = words(name)
    assert line[1] == "-S"
    assert line[line.index("-sandbox") + 1] == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert line[line.index("-name") + 1] == "a,,b,debug-threads=on"
    assert not any(path in word for word in line for path in ("/images", "/fw", "nvram.qcow2"))
    assert ("-incoming" in line) == bool(CASES[name][2].get("incoming"))


@pytest.mark.parametrize("name", CASES)
def test_no_two_devices_at_one_address(name: str) -> None:
    line = words(name)
    devices = [json.loads(line[at + 1]) for at, word in enumerate(line) if word == "-device" and line[at + 1][0] == "{"]
    places = [device["addr"] for device in devices if device.get("bus") == "pcie.0"]
    assert len(places) == len(set(places))
    assert sum(device["driver"] == "pcie-root-port" for device in devices) == CASES[name][0].ports


def test_all_memory_is_in_the_nodes() -> None:
    line = words("numa")
    objects = [json.loads(line[at + 1]) for at, word in enumerate(line) if word == "-object"]
    parts = [o for o in objects if o["id"].startswith("m0-")]
    assert sum(part["size"] for part in parts) == 257 << 20
    assert all(part["hugetlb"] for part in parts)


def test_a_fork_never_writes_to_its_templates_memory() -> None:
    line = words("fork")
    memory = json.loads(line[line.index("-object") + 1])
    assert (memory["mem-path"], memory["share"], memory["readonly"]) == ("/proc/self/fd/19", False, True)
