"""What `ovt check` says of hosts that lack something; each lack has a fix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import facts, readiness
from ovt.engine.container.facts import Cgroups
from ovt.engine.container.readiness import Check
from ovt.errors import HostError, NotFound
from ovt.image import busybox
from ovt.kernel import procfs


@pytest.fixture
def found(tmp_path: Path) -> Any:
    def collect(name: str) -> Check:
        return next(check for check in readiness.checks(str(tmp_path), "/run/x") if check.name == name)

    return collect


def test_every_lack_has_a_fix(tmp_path: Path) -> None:
    for check in readiness.checks(str(tmp_path), "/run/x"):
        assert check.state in {"ok", "warn", "fail"}
        assert check.detail
        assert bool(check.fix) == (check.state != "ok"), check


def test_nothing_is_left_in_the_data_directory(tmp_path: Path) -> None:
    list(readiness.checks(str(tmp_path), "/run/x"))
    assert os.listdir(tmp_path) == []


def test_an_old_kernel(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.uname()
    for release, state in (("5.11.9-x", "fail"), ("4.19.0", "fail"), ("5.12-rc1", "ok"), ("6.1.0-1", "ok")):
        changed = os.uname_result((*real[:2], release, *real[3:]))
        monkeypatch.setattr(readiness.os, "uname", lambda changed=changed: changed)
        assert found("kernel").state == state


def test_programs_that_were_not_built(found: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readiness, "_BIN", str(tmp_path))
    check = found("programs")
    assert (check.state, "ovt-init" in check.detail) == ("fail", True)


@pytest.mark.parametrize(
    ("version", "cgroups", "state"),
    [("none", Cgroups("disabled", "", False), "warn"), ("v1", Cgroups("disabled", "", False), "warn")],
)
def test_without_cgroups(
    found: Any, monkeypatch: pytest.MonkeyPatch, version: str, cgroups: Cgroups, state: str
) -> None:
    monkeypatch.setattr(facts, "cgroup_version", lambda: version)
    monkeypatch.setattr(facts, "find_cgroups", lambda run: cgroups)
    check = found("cgroup")
    assert (check.state, "no limits" in check.detail) == (state, True)


def test_a_missing_controller(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = procfs.read

    def read(path: str, limit: int = 1 << 20) -> str:
        return "cpu io pids cpuset\n" if path.endswith("cgroup.controllers") else real(path, limit)

    monkeypatch.setattr(facts, "cgroup_version", lambda: "v2")
    monkeypatch.setattr(facts, "find_cgroups", lambda run: Cgroups("cgroupfs", "/ovt", True))
    monkeypatch.setattr(procfs, "read", read)
    check = found("cgroup controllers")
    assert (check.state, check.detail, "cgroup_enable=memory" in check.fix) == ("warn", "without memory", True)


def test_a_directory_that_takes_no_overlay(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise HostError("filesystem not supported")

    monkeypatch.setattr(readiness.view, "resting", refuse)
    check = found("overlay")
    assert (check.state, "modprobe overlay" in check.fix) == ("fail", True)


def test_a_host_without_helpers(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple[str, str]:
        raise NotFound("no busybox", "apt-get install busybox-static")

    monkeypatch.setattr(busybox, "find", none)
    monkeypatch.setattr(facts, "find_init", lambda: "")
    monkeypatch.setattr(readiness.shutil, "which", lambda name: None)
    fixes = [found(name).fix for name in ("image busybox", "--init", "zstd archives")]
    assert fixes == ["apt-get install busybox-static", "apt-get install catatonit", "apt-get install zstd"]


def test_a_normal_user_without_ids(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise HostError("/etc/subuid grants me no ids", hint="as root: usermod")

    monkeypatch.setattr(facts, "rootless", lambda: True)
    monkeypatch.setattr(facts, "own_mappings", none)
    monkeypatch.setattr(readiness.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(readiness, "_number", lambda path, default: default)
    assert found("id mapping") == Check("id mapping", "fail", "/etc/subuid grants me no ids", "as root: usermod")
    monkeypatch.setattr(readiness.shutil, "which", lambda name: None)
    assert "uidmap" in found("id mapping").fix
    monkeypatch.setattr(readiness, "_number", lambda path, default: 0)
    assert "user.max_user_namespaces" in found("user namespaces").fix


def test_each_run_directory_has_a_cgroup_of_its_own() -> None:
    assert facts.find_cgroups("/run/a").parent != facts.find_cgroups("/run/b").parent or os.geteuid() != 0


def test_devices_of_the_host() -> None:
    from ovt.errors import UsageError
    from ovt.model import Device

    (null,) = facts.nodes((Device("/dev/null", "/dev/other", "r"),), False)
    assert (null.path, null.kind, null.major, null.minor, null.permissions) == ("/dev/other", "c", 1, 3, "r")
    with pytest.raises(NotFound):
        facts.nodes((Device("/dev/none-such", "/x", "r"),), False)
    with pytest.raises(UsageError):
        facts.nodes((Device("/etc/passwd", "/x", "r"),), False)
