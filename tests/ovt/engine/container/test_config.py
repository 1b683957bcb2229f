"""Loading and validating a configuration: what callers write must pass, what is malformed is in tests/conformance."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import config
from ovt.errors import ConfigError, NotFound
from tests.conformance.mutations import steps_of
from tests.conformance.sample import full_config

MINIMAL = {"ociVersion": "1.0.0", "root": {"path": "rootfs"}}


def refused(value: dict[str, Any], *, rootless: bool = False) -> str:
    """The JSON path of the fault, after the message was seen to be one line that starts with it."""
    with pytest.raises(ConfigError) as caught:
        config.validate(value, rootless=rootless)
    assert str(caught.value).startswith(f"config.json: {caught.value.path}: ")
    assert "\n" not in str(caught.value)
    return caught.value.path


def changed(path: str, value: Any) -> dict[str, Any]:
    whole: Any = full_config()
    parent = whole
    *way, last = steps_of(path)
    for step in way:
        parent = parent[step]
    parent[last] = value
    return dict(whole)


# Loading --------------------------------------------------------------------------------------------------------------


def test_load_reads_the_bundle_or_another_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    (tmp_path / "other.json").write_text('{"ociVersion": "1.1.0"}')
    assert config.load(str(tmp_path)) == MINIMAL
    assert config.load(str(tmp_path), str(tmp_path / "other.json")) == {"ociVersion": "1.1.0"}


def test_load_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        config.load(str(tmp_path))
    assert str(caught.value) == f"JSON specification file {tmp_path}/config.json not found: no such file or directory"
    assert "ovt-runtime spec" in caught.value.hint


def test_load_refuses_what_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONFIG_LIMIT", 100)
    (tmp_path / "config.json").write_text("{" + " " * 100 + "}")
    with pytest.raises(ConfigError) as caught:
        config.load(str(tmp_path))
    assert str(caught.value) == "config.json: $: it is longer than 100 bytes"


def test_load_passes_other_failures_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError):
        config.load(str(tmp_path))


# What passes ----------------------------------------------------------------------------------------------------------


def test_the_least_and_the_most_pass() -> None:
    config.validate(dict(MINIMAL))
    config.validate({**MINIMAL, "process": {"cwd": "/", "args": ["sh"]}})
    config.validate(full_config())


def test_unknown_members_and_other_platforms_are_ignored() -> None:
    config.validate(
        {
            **MINIMAL,
            "vm": 5,
            "windows": [],
            "solaris": "x",
            "zos": None,
            "freebsd": {},
            "org.example": {"a": [None]},
            "process": {"cwd": "/", "args": ["x"], "commandLine": 3, "user": {"username": 7}},
            "linux": {"intelRdt": {"enableCMT": "yes"}, "future": True, "namespaces": [{"type": "pid", "x": 1}]},
        }
    )


def test_null_is_absent_and_goes() -> None:
    value = {
        **MINIMAL,
        "hostname": None,
        "mounts": None,
        "annotations": {"a": None, "b": "c"},
        "process": {"cwd": "/", "args": ["x"], "env": None, "user": {"uid": None}},
        "linux": {"namespaces": None, "resources": {"devices": None}, "seccomp": None},
    }
    config.validate(value)
    assert value == {
        **MINIMAL,
        "annotations": {"b": "c"},
        "process": {"cwd": "/", "args": ["x"], "user": {}},
        "linux": {"resources": {}},
    }


@pytest.mark.parametrize(
    "version", ["1.0.0", "1.0.2", "1.0.2-dev", "1.0.0-rc5", "1.1.0+dev", "1.3.0-rc.1+build.5", "1.99.0"]
)
def test_versions_that_callers_write(version: str) -> None:
    config.validate({**MINIMAL, "ociVersion": version})


ACCEPTED: tuple[tuple[str, Any], ...] = (
    # relative destinations are deprecated, and still written by old tools
    ("mounts.0.destination", "data"),
    ("mounts.1.options", ["idmap=uids=0-1000-1#1-2000-1;gids=0-1000-1", "bind"]),
    ("mounts.1.options", ["rbind", "rprivate", "size=65536k", "anything"]),
    ("process.env", []),
    ("process.env.0", "A=b=c\n"),
    ("process.user", {}),
    ("process.rlimits.0", {"type": "RLIMIT_NOFILE", "soft": 2**64 - 1, "hard": 2**64 - 1}),
    ("process.capabilities.bounding", ["CAP_FROM_THE_FUTURE"]),
    ("process.scheduler", {"policy": "SCHED_FIFO", "priority": 10}),
    ("process.scheduler", {"policy": "SCHED_OTHER", "nice": -5}),
    ("process.scheduler", {"policy": "SCHED_DEADLINE", "runtime": 1024, "deadline": 1024}),
    ("process.ioPriority", {"class": "IOPRIO_CLASS_IDLE"}),
    ("process.execCPUAffinity.initial", ""),
    ("process.execCPUAffinity.initial", "0-3, 7,8-31:2/4"),
    ("hostname", ""),
    ("hostname", "x" * 64),
    ("linux.namespaces.1", {"type": "network", "path": ""}),
    ("linux.devices.0.fileMode", 0o20666),
    ("linux.devices.0.type", "u"),
    ("linux.cgroupsPath", "machine.slice:libpod:0123"),
    ("linux.cgroupsPath", ""),
    ("linux.rootfsPropagation", ""),
    ("linux.rootfsPropagation", "rslave"),
    ("linux.resources.devices.0", {"allow": True}),
    ("linux.resources.devices.0", {"allow": False, "type": "a", "major": -1, "minor": -1, "access": ""}),
    ("linux.resources.cpu", {"quota": -1, "burst": 5, "cpus": "", "mems": ""}),
    ("linux.resources.cpu", {"quota": 0, "burst": 5}),
    ("linux.resources.pids.limit", 0),
    ("linux.resources.pids.limit", -1),
    ("linux.resources.hugepageLimits.0.pageSize", "64KB"),
    ("linux.intelRdt.closID", "/"),
    ("linux.memoryPolicy", {"mode": "MPOL_PREFERRED"}),
    ("linux.memoryPolicy", {"mode": "MPOL_BIND", "nodes": "0-3,7", "flags": ["MPOL_F_NUMA_BALANCING"]}),
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW"}),
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "", "syscalls": []}),
    # the path is ignored when nothing notifies (spec)
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x", "listenerMetadata": "m"}),
    ("linux.netDevices.eth7.name", "eth%d"),
    ("linux.netDevices.eth7.name", ""),
    ("linux.sysctl", {"net/ipv4/conf/eth0.100/rp_filter": "1", "net.ipv4.conf.eth0/100.arp_filter": "1"}),
    ("linux.sysctl", {"fs.mqueue.queues_max": "1", "kernel.sem": "1 2 3 4", "user.max_user_namespaces": "5"}),
    ("linux.sysctl", {"kernel.domainname": "example.org"}),
    ("linux.timeOffsets", {}),
    ("annotations", {}),
)


@pytest.mark.parametrize(("path", "value"), ACCEPTED, ids=[f"{p}={json.dumps(v)[:40]}" for p, v in ACCEPTED])
def test_accepted(path: str, value: Any) -> None:
    config.validate(changed(path, value))


def test_a_joined_user_namespace_may_come_with_its_mappings() -> None:
    config.validate(changed("linux.namespaces.5", {"type": "user", "path": "/proc/1/ns/user"}))


def test_a_joined_namespace_that_is_not_there_yet_is_for_the_join_to_report() -> None:
    config.validate(changed("linux.namespaces.1.path", "/nonexistent/net"))


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("network", "net", "net.ipv4.ip_forward"),
        ("ipc", "ipc", "kernel.msgmax"),
        ("uts", "uts", "kernel.domainname"),
        ("user", "user", "user.max_user_namespaces"),
    ],
)
def test_a_sysctl_in_the_callers_own_namespace_is_the_hosts(kind: str, file: str, name: str) -> None:
    value = {**MINIMAL, "linux": {"namespaces": [{"type": kind, "path": f"/proc/{os.getpid()}/ns/{file}"}]}}
    config.validate(value)
    value["linux"] = {**value["linux"], "sysctl": {name: "1"}}  # type: ignore[dict-item]
    assert refused(value) == f'$.linux.sysctl["{name}"]'


def test_a_new_user_namespace_without_any_mapping_maps_the_caller() -> None:
    value = {**MINIMAL, "linux": {"namespaces": [{"type": "user"}]}}
    config.validate(value)
    assert value["linux"] == {
        "namespaces": [{"type": "user"}],
        "uidMappings": [{"containerID": 0, "hostID": os.geteuid(), "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": os.getegid(), "size": 1}],
    }


def test_a_joined_user_namespace_gets_no_mappings() -> None:
    linux: dict[str, Any] = {"namespaces": [{"type": "user", "path": "/proc/1/ns/user"}]}
    config.validate({**MINIMAL, "linux": linux})
    assert linux == {"namespaces": [{"type": "user", "path": "/proc/1/ns/user"}]}


def test_notify_may_name_its_agent_in_an_annotation() -> None:
    value = full_config()
    del value["linux"]["seccomp"]["listenerPath"]
    value["annotations"]["run.oci.seccomp.receiver"] = "/run/agent.sock"
    config.validate(value)


def test_two_templates_are_not_one_name() -> None:
    config.validate(changed("linux.netDevices", {"eth7": {"name": "eth%d"}, "eth8": {"name": "eth%d"}}))


# Rootless -------------------------------------------------------------------------------------------------------------

_MAPPING = [{"containerID": 0, "hostID": 1000, "size": 1}]


def test_rootless_needs_a_user_namespace_with_mappings() -> None:
    linux: dict[str, Any] = {"namespaces": [{"type": "mount"}]}
    value = {**MINIMAL, "linux": linux}
    assert refused({**MINIMAL}, rootless=True) == "$.linux.namespaces"
    assert refused(value, rootless=True) == "$.linux.namespaces"
    linux["namespaces"].append({"type": "user"})
    assert refused(value, rootless=True) == "$.linux.uidMappings"
    linux["uidMappings"] = _MAPPING
    assert refused(value, rootless=True) == "$.linux.gidMappings"
    linux["gidMappings"] = _MAPPING
    config.validate(value, rootless=True)


def test_rootless_joins_a_user_namespace_as_it_is() -> None:
    config.validate({**MINIMAL, "linux": {"namespaces": [{"type": "user", "path": "/x"}]}}, rootless=True)


def test_rootless_gets_no_nic() -> None:
    assert refused(full_config(), rootless=True) == "$.linux.netDevices"


# The other documents --------------------------------------------------------------------------------------------------


def test_a_process_by_itself() -> None:
    config.validate_process(full_config()["process"])
    with pytest.raises(ConfigError) as caught:
        config.validate_process({"cwd": "/", "args": []})
    assert str(caught.value) == "process.json: $.args: must have at least 1 item"
    with pytest.raises(ConfigError) as caught:
        config.validate_process({"cwd": "x", "args": ["a"]}, "$.process")
    assert str(caught.value) == 'process.json: $.process.cwd: must be an absolute path, not "x"'
    with pytest.raises(ConfigError, match=r"process\.json: \$\.rlimits\[0\]\.soft: the soft limit 2 must not be above"):
        limits = [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]
        config.validate_process({"cwd": "/", "args": ["a"], "rlimits": limits})


def test_resources_by_themselves() -> None:
    config.validate_resources({})
    config.validate_resources(full_config()["linux"]["resources"])
    with pytest.raises(ConfigError) as caught:
        config.validate_resources({"pids": {"limit": "5"}})
    assert str(caught.value) == 'resources: $.pids.limit: must be an integer, not "5"'
    with pytest.raises(ConfigError, match=r"\$\.cpu\.burst: must not be larger than the quota 10"):
        config.validate_resources({"cpu": {"quota": 10, "burst": 11}})


def test_parse_names_its_document() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(b"[]", "process.json")
    assert str(caught.value) == "process.json: $: must be an object, not an array"


# Messages -------------------------------------------------------------------------------------------------------------

MESSAGES: tuple[tuple[str, Any, str], ...] = (
    ("linux.namespaces.2.type", "foo", 'unknown namespace "foo"; one of pid, network, mount, ipc, uts, user, cgroup,'),
    ("linux.namespaces.2.type", "pid", 'duplicated namespace "pid"'),
    ("process.cwd", "home", 'must be an absolute path, not "home"'),
    ("process.user.uid", True, "must be an integer, not true"),
    ("process.user.uid", 2**40, "must be from 0 to 4294967294, not 1099511627776"),
    ("process.user.uid", 99999, "99999 is not mapped in the user namespace"),
    ("process.args", "sh", 'must be an array, not "sh"'),
    ("process.args.1", None, "must be a string, not null"),
    ("process.env.0", "x\0y=1", "must not contain a NUL byte"),
    ("process.env.0", "\N{GREEK SMALL LETTER PI}\n" * 80, 'must be NAME=VALUE, not "\\u03c0\\n'),
    ("process.rlimits.1.type", "RLIMIT_NOFILE", "duplicated resource limit RLIMIT_NOFILE"),
    ("linux.cgroupsPath", "/a/../b", 'must not contain .., not "/a/../b"'),
    ("linux.sysctl.[kernel.foo]", "1", 'sysctl "kernel.foo" is not in a separate kernel namespace'),
    ("linux.resources.unified.[a/b]", "1", "the name must be a file name without any slash"),
    ("linux.timeOffsets.realtime", {}, "the name is not a clock"),
    ("linux.seccomp.syscalls.0.errnoRet", 5, "errno value specified for action SCMP_ACT_ALLOW"),
)


@pytest.mark.parametrize(("path", "value", "message"), MESSAGES, ids=[message[:40] for _, _, message in MESSAGES])
def test_messages(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.validate(changed(path, value))
    text = str(caught.value)
    assert text.startswith(f"config.json: {caught.value.path}: {message}")
    assert len(text) < 400


def test_the_first_fault_in_the_document_is_the_one() -> None:
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda whole: whole["linux"].update(maskedPaths=[1]),
        lambda whole: whole["process"].update(cwd=5),
        lambda whole: whole.update(ociVersion=1),
    ]
    paths = []
    whole = full_config()
    for edit in edits:
        edit(whole)
        paths.append(refused(whole))
    assert paths == ["$.linux.maskedPaths[0]", "$.process.cwd", "$.ociVersion"]
