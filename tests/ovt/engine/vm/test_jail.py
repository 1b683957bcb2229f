"""The configuration of the container that QEMU runs in."""

import json
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container.bundle import Facts
from ovt.engine.vm import jail
from ovt.errors import HostError


def config(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "id": "abc", "root": "/run/x/root", "facts": Facts(), "uid": 536870912, "memory": 1 << 30, "cpus": 0.0,
        "cpuset": "", "host_network": False,
    }  # fmt: skip
    return jail.config(["/usr/bin/qemu-system-x86_64", "-S"], **{**options, **changes})


def test_process_may_nothing() -> None:
    process = config()["process"]
    assert not any(process["capabilities"].values())
    assert process["noNewPrivileges"] is True
    assert process["user"] == {"uid": 536870912, "gid": 536870912}
    assert {"type": "RLIMIT_CORE", "soft": 0, "hard": 0} in process["rlimits"]


def test_nothing_of_the_host_can_be_written_to() -> None:
    made = config()
    assert made["root"]["readonly"] is True
    bound = [mount for mount in made["mounts"] if mount["type"] == "bind"]
    assert any(mount["source"] == "/usr" for mount in bound)
    for mount in bound:
        assert {"ro", "nosuid", "nodev"} <= set(mount["options"])
        assert mount["source"].startswith(("/usr", "/lib", "/bin", "/sbin", "/etc/ld.so", "/etc/alternatives"))


def test_namespaces() -> None:
    def kinds(**changes: Any) -> set[str]:
        return {entry["type"] for entry in config(**changes)["linux"]["namespaces"]}

    assert {"pid", "ipc", "uts", "mount", "network"} <= kinds()
    assert kinds() - kinds(host_network=True) == {"network"}


def test_system_calls_devices_and_memory() -> None:
    linux = config(nodes=[jail.Node("/dev/kvm", 10, 232)])["linux"]
    assert "io_uring_setup" in json.dumps(linux["seccomp"])
    first, *allowed = linux["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert allowed == [{"allow": True, "type": "c", "major": 10, "minor": 232, "access": "rw"}]
    assert linux["resources"]["memory"]["limit"] > 1 << 30


def test_users(tmp_path: Path) -> None:
    path = tmp_path / "uid_map"
    path.write_text("0 0 4294967295\n")
    ids = {jail.user_id(f"{number:x}", str(path)) for number in range(1, 50)}
    assert len(ids) == 49
    assert min(ids) > 65536
    path.write_text("0 100000 65536\n")
    ids = {jail.user_id(f"{number:x}", str(path)) for number in range(1, 50)}
    assert len(ids) == 49
    assert all(32768 <= number < 65536 for number in ids)
    path.write_text("0 1000 1\n")
    with pytest.raises(HostError, match="4096"):
        jail.user_id("1", str(path))
