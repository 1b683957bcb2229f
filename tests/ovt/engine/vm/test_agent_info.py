"""What guests say about themselves, and what of it is believed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm.agent import Agent, NoAgent
from ovt.engine.vm.guest_info import guest_info
from tests.ovt.engine.vm.agents import OVT_GUEST, QEMU_GA, fake, ovt_guest, qemu_ga, supporting, sync_answer

ANSWERS: dict[str, Any] = {
    "guest-get-osinfo": {
        "name": "Debian GNU/Linux",
        "pretty-name": "Debian GNU/Linux 13 (trixie)",
        "id": "debian",
        "version-id": "13",
        "kernel-release": "6.12.1-amd64",
        "machine": "x86_64",
    },
    "guest-get-host-name": {"host-name": "box"},
    "guest-network-get-interfaces": [
        {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8, "ip-address-type": "ipv4"}]},
        {
            "name": "eth0",
            "hardware-address": "52:54:00:AA:bb:cc",
            "ip-addresses": [
                {"ip-address": "10.0.2.15", "prefix": 24},
                {"ip-address": "fe80::1%eth0", "prefix": 64},
            ],
            "statistics": {"rx-bytes": 10, "tx-bytes": 20},
        },
    ],
    "guest-get-fsinfo": [
        {"mountpoint": "/", "type": "ext4", "name": "vda1", "total-bytes": 100, "used-bytes": 40, "disk": []},
        {"mountpoint": "/boot", "type": "vfat", "name": "vda2"},
    ],
    "guest-get-users": [{"user": "ada", "login-time": 1700000000.5}],
    "guest-get-time": 0,
}


def answering(answers: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    def handler(request: dict[str, Any]) -> Any:
        name = request["execute"]
        if name == "guest-info":
            return supporting(*answers)
        answer = answers[name]
        if name == "guest-get-time" and answer == 0:
            answer = time.time_ns() + 5_000_000_000
        return answer if isinstance(answer, bytes) else {"return": answer}

    return handler


def test_all_of_an_honest_guest(tmp_path: Path) -> None:
    with fake(tmp_path, answering(ANSWERS)) as peer:
        info = guest_info(Agent(str(tmp_path)))
        assert peer.clients == 1
    assert abs(info.pop("clock_offset") - 5) < 1
    assert info == {
        "agent": {"version": "9.9.9"},
        "os": {
            "name": "Debian GNU/Linux 13 (trixie)",
            "id": "debian",
            "version": "13",
            "kernel": "6.12.1-amd64",
            "machine": "x86_64",
        },
        "hostname": "box",
        "interfaces": [
            {"name": "lo", "mac": "", "addresses": ["127.0.0.1/8"]},
            {
                "name": "eth0",
                "mac": "52:54:00:aa:bb:cc",
                "addresses": ["10.0.2.15/24", "fe80::1/64"],
                "received": 10,
                "sent": 20,
            },
        ],
        "filesystems": [
            {"mountpoint": "/", "type": "ext4", "device": "vda1", "total": 100, "used": 40},
            {"mountpoint": "/boot", "type": "vfat", "device": "vda2"},
        ],
        "users": [{"name": "ada", "since": 1700000000.5}],
    }


@pytest.mark.parametrize("lost", list(ANSWERS))
@pytest.mark.parametrize("lie", ["absent", "refused", "text", "number", "junk"])
def test_one_bad_answer_costs_one_part(tmp_path: Path, lost: str, lie: str) -> None:
    parts = dict(zip(ANSWERS, ("os", "hostname", "interfaces", "filesystems", "users", "clock_offset"), strict=True))
    answers = dict(ANSWERS)
    if lie == "absent":
        del answers[lost]
    else:
        raw = {
            "refused": b'{"error": {"class": "GenericError", "desc": "no"}}\n',
            "text": b'{"return": "text"}\n',
            "number": b'{"return": -5.5}\n',
            "junk": b"junk\n",
        }
        answers[lost] = raw[lie]
    with fake(tmp_path, answering(answers)):
        info = guest_info(Agent(str(tmp_path)))
    assert list(info["missing"]) == [parts[lost]]
    assert info["missing"][parts[lost]]
    assert set(parts.values()) - set(info) == {parts[lost]}


def test_hostile_values_are_cleaned_and_checked(tmp_path: Path) -> None:
    bad: dict[str, Any] = {
        "guest-get-osinfo": {"pretty-name": "\x1b]0;owned\x07" + "A" * 10_000, "id": ["x"], "machine": {}},
        "guest-get-host-name": {"host-name": "box\r\nroot:"},
        "guest-network-get-interfaces": [
            {
                "name": "\x1b[31m",
                "hardware-address": "zz:zz",
                "ip-addresses": [
                    {"ip-address": "$(reboot)", "prefix": 8},
                    {"ip-address": "10.0.0.1", "prefix": 33},
                    {"ip-address": "10.0.0.1", "prefix": True},
                    {"ip-address": 5, "prefix": 5},
                    7,
                ],
                "statistics": {"rx-bytes": -1, "tx-bytes": 1 << 70},
            },
            "junk",
            *[{"name": "x"}] * 1000,
        ],
        "guest-get-fsinfo": [{"mountpoint": "/\x9b", "type": None, "total-bytes": "9", "used-bytes": 1.5}],
        "guest-get-users": [{"user": "\u202egro", "login-time": 1e300}, {"user": 5, "login-time": True}],
        "guest-get-time": 1 << 80,
    }
    with fake(tmp_path, answering(bad)):
        info = guest_info(Agent(str(tmp_path)))
    assert info["os"]["name"].startswith("�]0;owned�AAA") and len(info["os"]["name"]) == 256
    assert set(info["os"]) == {"name"}
    assert info["hostname"] == "box��root:"
    assert info["interfaces"][0] == {"name": "�[31m", "mac": "", "addresses": []}
    assert len(info["interfaces"]) <= 256
    assert info["filesystems"] == [{"mountpoint": "/�", "type": "", "device": ""}]
    assert info["users"] == [{"name": "�gro", "since": 0.0}, {"name": "", "since": 0.0}]
    assert "no time" in info["missing"]["clock_offset"]
    json.dumps(info, allow_nan=False).encode()


def test_agent_that_falls_silent_is_not_asked_seven_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovt.engine.vm.guest_info._PATIENCE", 0.2)
    told = False

    def handler(request: dict[str, Any]) -> Any:
        return supporting(*ANSWERS) if request["execute"] == "guest-info" else None

    def sync(request: dict[str, Any]) -> bytes | None:
        nonlocal told
        first, told = not told, True
        return sync_answer(request) if first else None

    with fake(tmp_path, handler, sync) as peer:
        info = guest_info(Agent(str(tmp_path), sync_timeout=0.2))
        assert peer.seen.count("guest-sync-delimited") == 2
    assert set(info["missing"]) == {"os", "hostname", "interfaces", "filesystems", "users", "clock_offset"}


def test_no_agent(tmp_path: Path) -> None:
    with fake(tmp_path, sync=lambda request: None), pytest.raises(NoAgent):
        guest_info(Agent(str(tmp_path), sync_timeout=0.1))


def _this_machine(home: Path) -> None:
    info = guest_info(Agent(str(home)))
    assert info["hostname"] == socket.gethostname()
    assert info["os"]["kernel"] and info["agent"]["version"]
    assert "127.0.0.1/8" in {address for entry in info["interfaces"] for address in entry["addresses"]}
    assert abs(info["clock_offset"]) < 5
    assert "missing" not in info


@pytest.mark.skipif(not QEMU_GA, reason="needs qemu-ga")
def test_qemu_ga_on_this_machine(tmp_path: Path) -> None:
    with qemu_ga(tmp_path):
        _this_machine(tmp_path)


@pytest.mark.skipif(not OVT_GUEST.exists(), reason="needs ovt-guest")
def test_ovt_guest_on_this_machine(tmp_path: Path) -> None:
    with ovt_guest(tmp_path):
        _this_machine(tmp_path)
