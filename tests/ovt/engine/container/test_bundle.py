"""From options to an OCI configuration, against golden files (`OVT_REGENERATE=1` writes them anew)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import bundle, config
from ovt.engine.container.bundle import Facts, Node, User
from ovt.errors import HostError, UsageError
from ovt.model import Limits, Security, Spec, Volume
from tests.ovt.test_model import FULL

GOLDEN = Path(__file__).parents[3] / "golden"
USERNS = Facts(uid_mappings=((0, 100000, 65536),), gid_mappings=((0, 100000, 65536),))
ROOTLESS = Facts(
    cgroup_parent="",
    device_rules=False,
    rootless=True,
    uid_mappings=((0, 1000, 1), (1, 100000, 65536)),
    gid_mappings=((0, 1000, 1), (1, 100000, 65536)),
)


def make(spec: Spec, facts: Facts = Facts(), **options: Any) -> dict[str, Any]:  # noqa: B008
    return bundle.config(spec, "0123456789ab", "web", "/bundle/rootfs", facts=facts, **options)


PLAIN = Spec("busybox", ("sh",))
CASES = {
    "plain": lambda: make(PLAIN),
    "full": lambda: make(
        FULL._replace(network="none", security=FULL.security._replace(privileged=False, cap_add=("NET_ADMIN",))),
        USERNS._replace(init="/usr/bin/catatonit"),
        user=User(33, 33, (4, 5), "/srv"),
        nodes=[Node("/dev/fuse", "c", 10, 229, 0o666, 0, 0, "rw")],
        files=[("/home/hosts", "/etc/hosts")],
        seccomp={"defaultAction": "SCMP_ACT_ALLOW"},
    ),
    "privileged": lambda: make(PLAIN._replace(security=Security(privileged=True))),
    "rootless": lambda: make(PLAIN, ROOTLESS),
    "host-network": lambda: make(PLAIN._replace(network="host"), USERNS),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    made = CASES[name]()
    path = GOLDEN / f"bundle-{name}.json"
    text = json.dumps(made, indent=1) + "\n"
    if os.environ.get("OVT_REGENERATE"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_runtime_takes_it(name: str) -> None:
    config.validate(CASES[name](), rootless=name == "rootless")


def mount_at(made: dict[str, Any], target: str) -> dict[str, Any]:
    found = [mount for mount in made["mounts"] if mount["destination"] == target]
    assert len(found) == 1
    return found[0]


def test_capabilities_are_podmans_eleven() -> None:
    bounding, named = bundle.capabilities(PLAIN, Facts())
    assert sorted(bounding) == sorted(bundle.DEFAULT_CAPABILITIES)
    assert len(bounding) == 11
    assert named == []


@pytest.mark.parametrize(
    ("add", "drop", "present", "absent"),
    [
        (("net_admin",), (), "CAP_NET_ADMIN", "CAP_SYS_ADMIN"),
        (("CAP_NET_ADMIN",), ("chown",), "CAP_NET_ADMIN", "CAP_CHOWN"),
        (("ALL",), ("SYS_ADMIN",), "CAP_SYS_BOOT", "CAP_SYS_ADMIN"),
        (("NET_RAW",), ("ALL",), "CAP_NET_RAW", "CAP_CHOWN"),
    ],
)
def test_capabilities_come_and_go(add: tuple[str, ...], drop: tuple[str, ...], present: str, absent: str) -> None:
    bounding, _ = bundle.capabilities(PLAIN._replace(security=Security(cap_add=add, cap_drop=drop)), Facts())
    assert present in bounding
    assert absent not in bounding


def test_capabilities_that_cannot_be_had() -> None:
    with pytest.raises(UsageError, match="NO_SUCH"):
        bundle.capabilities(PLAIN._replace(security=Security(cap_add=("NO_SUCH",))), Facts())
    few = Facts(capabilities=("CAP_CHOWN", "CAP_KILL"))
    with pytest.raises(HostError, match="CAP_SYS_RESOURCE"):
        bundle.capabilities(PLAIN._replace(security=Security(cap_add=("SYS_RESOURCE",))), few)
    assert bundle.capabilities(PLAIN._replace(security=Security(privileged=True)), few)[0] == ["CAP_CHOWN", "CAP_KILL"]


def test_who_is_not_root_has_only_what_was_named() -> None:
    spec = PLAIN._replace(security=Security(cap_add=("NET_ADMIN",)))
    sets = make(spec, user=User(5, 5))["process"]["capabilities"]
    assert sets["effective"] == sets["permitted"] == sets["ambient"] == sets["inheritable"] == ["CAP_NET_ADMIN"]
    assert "CAP_CHOWN" in sets["bounding"]
    assert make(PLAIN)["process"]["capabilities"]["inheritable"] == []


def test_the_program() -> None:
    assert make(PLAIN._replace(entrypoint=("a", "b")))["process"]["args"] == ["a", "b", "sh"]
    with pytest.raises(UsageError):
        make(Spec("/image"))
    with pytest.raises(HostError) as caught:
        make(PLAIN._replace(init=True))
    assert caught.value.hint == "apt-get install catatonit"


def test_the_environment() -> None:
    made = make(PLAIN._replace(env=("PATH=/x", "A=1", "A=2"), tty=True), user=User(home="/srv"))["process"]["env"]
    assert {"PATH=/x", "A=2", "HOME=/srv", "HOSTNAME=web", "TERM=xterm", "container=ovt"} == set(made)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), {}),
        (Limits(memory=1 << 20), {"memory": {"limit": 1 << 20}}),
        (Limits(memory=1 << 20, memory_swap=-1), {"memory": {"limit": 1 << 20, "swap": -1}}),
        (Limits(cpus=1.5, cpuset_cpus="0-1"), {"cpu": {"quota": 150_000, "period": 100_000, "cpus": "0-1"}}),
        (Limits(pids=5), {"pids": {"limit": 5}}),
    ],
)
def test_limits(limits: Limits, expected: dict[str, Any]) -> None:
    assert bundle.limits(limits) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Limits(memory=5), Limits(memory=5), {}),
        (Limits(memory=5), Limits(memory=6), {"memory": {"limit": 6}}),
        (Limits(memory=5), Limits(), {"memory": {"limit": -1}}),
        (Limits(cpus=1), Limits(pids=3), {"pids": {"limit": 3}, "cpu": {"quota": -1, "period": 100_000}}),
        (Limits(pids=3), Limits(), {"pids": {"limit": -1}}),
    ],
)
def test_changes_of_limits(before: Limits, after: Limits, expected: dict[str, Any]) -> None:
    assert bundle.limit_changes(before, after) == expected


def test_limits_without_a_cgroup() -> None:
    with pytest.raises(HostError, match="pids") as caught:
        make(PLAIN._replace(limits=Limits(pids=3)), ROOTLESS)
    assert "ovt check" in caught.value.hint


def test_where_its_cgroup_is() -> None:
    assert make(PLAIN)["linux"]["cgroupsPath"] == "/ovt/0123456789ab"
    systemd = make(PLAIN, Facts(cgroup_parent="user.slice:ovt"))
    assert systemd["linux"]["cgroupsPath"] == "user.slice:ovt:0123456789ab"
    assert "cgroupsPath" not in make(PLAIN, ROOTLESS)["linux"]


def test_a_read_only_root_has_places_to_write() -> None:
    made = make(PLAIN._replace(read_only=True, volumes=(Volume("/data", "/tmp"),)))
    assert made["root"]["readonly"]
    assert mount_at(made, "/run")["type"] == "tmpfs"
    assert mount_at(made, "/tmp")["source"] == "/data"


def test_a_shallow_volume_does_not_cover_a_deep_one() -> None:
    made = make(PLAIN._replace(volumes=(Volume("/1", "/a/b"), Volume("/2", "/a"))))
    assert [mount["destination"] for mount in made["mounts"]][-2:] == ["/a", "/a/b"]


def test_volumes() -> None:
    made = make(PLAIN._replace(volumes=(Volume("/1", "/a", ("ro",)), Volume("/2", "/b", ("bind", "rshared")))))
    assert mount_at(made, "/a")["options"] == ["rbind", "ro", "rprivate"]
    assert mount_at(made, "/b")["options"] == ["bind", "rshared"]
    with pytest.raises(UsageError, match="'nonsense'"):
        make(PLAIN._replace(volumes=(Volume("/1", "/a", ("nonsense",)),)))


def test_selinux_labels() -> None:
    assert bundle.selinux_label(()) == bundle.selinux_label(("disable",)) == ""
    assert bundle.selinux_label(("type:spc_t", "level:s0:c1")) == "system_u:system_r:spc_t:s0:c1"
    with pytest.raises(UsageError):
        bundle.selinux_label(("colour:red",))


def test_what_confines_and_how_it_is_loosened() -> None:
    assert make(PLAIN)["linux"]["maskedPaths"]
    assert make(PLAIN)["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert make(PLAIN)["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert "seccomp" not in make(PLAIN._replace(security=Security(seccomp="unconfined")))["linux"]
    loose = make(PLAIN._replace(security=Security(privileged=True)))["linux"]
    assert not {"maskedPaths", "readonlyPaths", "seccomp"} & set(loose)


def test_namespaces() -> None:
    def kinds(made: dict[str, Any]) -> set[str]:
        return {entry["type"] for entry in made["linux"]["namespaces"]}

    assert kinds(make(PLAIN)) == {"pid", "ipc", "uts", "mount", "network", "cgroup"}
    assert "network" not in kinds(make(PLAIN._replace(network="host")))
    assert "user" in kinds(make(PLAIN, USERNS))


def test_the_hosts_file() -> None:
    text = bundle.hosts_file("web", ["db:10.0.0.5", "six:fd00::1"])
    assert "10.0.0.5\tdb\n" in text
    assert "fd00::1\tsix\n" in text
    assert "127.0.1.1\tweb\n" in text
