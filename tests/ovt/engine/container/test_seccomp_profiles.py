"""The default seccomp profile and the ones people bring."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import seccomp_default, seccomp_profile
from ovt.engine.container.bundle import DEFAULT_CAPABILITIES
from ovt.errors import ConfigError, NotFound
from ovt.kernel.capabilities import NAMES

PLAIN = seccomp_default.profile("x86_64", DEFAULT_CAPABILITIES)


def names(profile: dict[str, Any], action: str) -> set[str]:
    rules = [rule for rule in profile["syscalls"] if rule["action"] == action and "args" not in rule]
    return {name for rule in rules for name in rule["names"]}


def test_no_call_is_both_allowed_and_refused() -> None:
    for capabilities in (DEFAULT_CAPABILITIES, NAMES, ()):
        profile = seccomp_default.profile("x86_64", capabilities)
        assert not names(profile, "SCMP_ACT_ALLOW") & names(profile, "SCMP_ACT_ERRNO")


@pytest.mark.parametrize(
    "call",
    [
        *("mount", "umount2", "pivot_root", "setns", "unshare", "open_by_handle_at", "init_module", "finit_module"),
        *("kexec_load", "bpf", "perf_event_open", "keyctl", "add_key", "io_uring_setup", "userfaultfd", "reboot"),
        *("swapon", "settimeofday", "clock_settime", "iopl", "syslog", "acct", "fsopen", "move_mount", "pidfd_getfd"),
    ],
)
def test_what_acts_on_the_machine_is_refused(call: str) -> None:
    assert call in names(PLAIN, "SCMP_ACT_ERRNO")
    assert call not in names(PLAIN, "SCMP_ACT_ALLOW")


@pytest.mark.parametrize(
    "call",
    ["read", "openat2", "execve", "futex", "clock_nanosleep", "epoll_pwait2", "rseq", "chroot", "statx", "io_submit"],
)
def test_what_acts_on_the_caller_is_allowed(call: str) -> None:
    assert call in names(PLAIN, "SCMP_ACT_ALLOW")


def test_capabilities_open_what_they_stand_for() -> None:
    admin = names(seccomp_default.profile("x86_64", {"CAP_SYS_ADMIN"}), "SCMP_ACT_ALLOW")
    assert {"mount", "setns", "bpf", "clone", "clone3"} <= admin
    assert {"reboot", "init_module", "io_uring_setup", "keyctl"} & admin == set()
    time = names(seccomp_default.profile("x86_64", {"CAP_SYS_TIME"}), "SCMP_ACT_ALLOW")
    assert "clock_settime" in time
    assert "mount" not in time


def test_namespaces_cannot_be_made_by_clone() -> None:
    clone = [rule for rule in PLAIN["syscalls"] if rule["names"] == ["clone"]]
    assert [rule["args"][0]["op"] for rule in clone] == ["SCMP_CMP_MASKED_EQ"]
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert clone[0]["args"][0]["value"] & flag
    clone3 = next(rule for rule in PLAIN["syscalls"] if rule["names"] == ["clone3"])
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    s390 = seccomp_default.profile("s390x", ())
    assert next(rule for rule in s390["syscalls"] if rule["names"] == ["clone"])["args"][0]["index"] == 1


def test_a_call_that_is_not_known_looks_like_an_old_kernel() -> None:
    assert (PLAIN["defaultAction"], PLAIN["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_unknown_architectures_filter_their_own_calls_only() -> None:
    assert "architectures" not in seccomp_default.profile("loongarch64", ())


def test_the_profiles_compile() -> None:
    from ovt.kernel import seccomp

    for capabilities in (DEFAULT_CAPABILITIES, NAMES):
        compiled = seccomp.compile(seccomp_default.profile(os.uname().machine, capabilities), cache_dir=None)
        assert len(compiled.bpf) % 8 == 0
        assert 100 < len(compiled.bpf) // 8 < 4096


DOCKER = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {}},
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["arm_fadvise64_64"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"arches": ["s390x"]}},
        {"name": "write", "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
    ],
}


def read(path: Path, profile: object, *capabilities: str, machine: str = "x86_64", release: str = "6.1.0-1") -> Any:
    path.write_text(json.dumps(profile))
    return seccomp_profile.read(str(path), machine, capabilities, release)


def test_an_oci_profile_stays_as_it_is(tmp_path: Path) -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_LOG"}]}
    assert read(tmp_path / "p", profile) == profile


def test_a_docker_profile_is_translated(tmp_path: Path) -> None:
    made = read(tmp_path / "p", DOCKER)
    assert made["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert [rule["names"][0] for rule in made["syscalls"]] == ["read", "clone", "ptrace", "clone3", "write"]
    assert made["syscalls"][3]["errnoRet"] == 38
    assert made["syscalls"][4]["args"] == [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]
    assert set(made["syscalls"][0]) == {"names", "action"}


def test_conditions_of_a_docker_profile(tmp_path: Path) -> None:
    def called(*capabilities: str, **options: str) -> set[str]:
        made = read(tmp_path / "p", DOCKER, *capabilities, **options)
        return {rule["names"][0] for rule in made["syscalls"]}

    assert "mount" in called("CAP_SYS_ADMIN")
    assert "clone" not in called("CAP_SYS_ADMIN")
    assert "arm_fadvise64_64" in called(machine="aarch64")
    assert "clone3" not in called(machine="s390x")
    assert "ptrace" not in called(release="4.7.9")


@pytest.mark.skipif(not os.path.exists("/usr/share/containers/seccomp.json"), reason="podman is not installed")
def test_podmans_own_profile_can_be_used() -> None:
    from ovt.kernel import seccomp

    made = seccomp_profile.read("/usr/share/containers/seccomp.json", os.uname().machine, DEFAULT_CAPABILITIES)
    assert seccomp.compile(made, cache_dir=None).bpf


def test_what_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        seccomp_profile.read(str(tmp_path / "none"), "x86_64", ())
    (tmp_path / "text").write_text("{")
    with pytest.raises(ConfigError):
        seccomp_profile.read(str(tmp_path / "text"), "x86_64", ())
    with pytest.raises(ConfigError, match="defaultAction"):
        read(tmp_path / "p", {"syscalls": []})
