"""Attacks by what a container process may: capabilities it inherits, users that are misread, sizes that overflow."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.security.conftest import Create, refused, runs

pytestmark = pytest.mark.root

STATUS = ["sh", "-c", "grep Cap /proc/self/status"]
NET_ADMIN, KILL, CHOWN = 1 << 12, 1 << 5, 1 << 0


def sets(text: str) -> dict[str, int]:
    return {name: int(value, 16) for name, value in re.findall(r"Cap(\w+):\s+(\w+)", text)}


def only(**names: list[str]) -> dict[str, Any]:
    return {"process": {"capabilities": names, "user": {"uid": 0, "gid": 0}}}


@pytest.mark.parametrize("uid", [0, 1000])
def test_cve_2022_24769_and_2022_27649_and_2022_27650_nothing_is_inheritable_by_default(
    oci: Oci, bundle: Bundle, create: Create, container_id: str, uid: int
) -> None:
    """The inheritable and ambient sets are empty unless configured; also for exec, and for another user."""
    three = {name: ["CAP_KILL", "CAP_CHOWN"] for name in ("bounding", "effective", "permitted")}
    config = only(**three)
    config["process"]["user"] = {"uid": uid, "gid": uid}
    got = sets(runs(oci, bundle(*STATUS, config=config), container_id))
    assert got["Inh"] == got["Amb"] == 0 and got["Bnd"] == KILL | CHOWN
    container = create(bundle("sleep", "60", config=config)).start()
    for flags in ([], ["--cap", "CAP_NET_ADMIN"], ["--user", "1000"], ["--user", "1000", "--cap", "CAP_NET_ADMIN"]):
        got = sets(oci("exec", *flags, container.id, *STATUS, check=True).stdout)
        assert got["Inh"] == got["Amb"] == 0
        assert got["Bnd"] == KILL | CHOWN | (NET_ADMIN if "--cap" in flags else 0)


def test_cve_2022_29162_exec_cap_is_not_inheritable(oci: Oci, bundle: Bundle, create: Create) -> None:
    """`exec --cap` adds to what the process has, not to what a program with file capabilities could take over."""
    names = ("bounding", "effective", "permitted", "inheritable")
    container = create(bundle("sleep", "60", config=only(**{name: ["CAP_KILL"] for name in names}))).start()
    got = sets(oci("exec", "--cap", "CAP_NET_ADMIN", container.id, *STATUS, check=True).stdout)
    assert got["Inh"] == KILL, "the container's own"
    assert got["Eff"] == got["Prm"] == KILL | NET_ADMIN


def test_inheritable_and_ambient_are_as_configured(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """The counter-check: what is configured does arrive, so that zero above means something."""
    names = ("bounding", "effective", "permitted", "inheritable", "ambient")
    config = only(**{name: ["CAP_NET_ADMIN"] for name in names})
    config["process"]["user"] = {"uid": 1000, "gid": 1000}
    got = sets(runs(oci, bundle(*STATUS, config=config), container_id))
    assert set(got.values()) == {NET_ADMIN}


USERS = {
    "1": (1, 0),
    "1:2": (1, 2),
    "01": (1, 0),
    "65534:65534": (65534, 65534),
    "4294967294": (4294967294, 0),
}
MISREAD = ["", " ", "1 ", " 1", "+1", "-1", "1a", "a1", "0x1", "1:", ":1", "1:2:3", "1.0", "1e3", "\u00b9", "\u0661"]
MISREAD += ["1_0", "root", "1\n", "1\0" if os.name != "posix" else "1;0", "4294967295", "4294967296", "99999999999999"]


def test_cve_2026_30892_every_form_of_a_user(oci: Oci, bundle: Bundle, create: Create) -> None:
    """`exec --user 1` is user 1. What is no number is an error and never user 0."""
    container = create(bundle("sleep", "60")).start()
    for text, (uid, gid) in USERS.items():
        for flag in (["--user", text], [f"--user={text}"], ["-u", text]):
            done = oci("exec", *flag, container.id, "sh", "-c", "id -u; id -g", check=True)
            assert done.stdout.split() == [str(uid), str(gid)], text
    for text in MISREAD:
        done = oci("exec", f"--user={text}", container.id, "id", "-u")
        assert "uid" in refused(done) or "not a numeric user" in done.stderr, text
        assert not done.stdout, text


@pytest.mark.parametrize("uid", ["1", 1.5, -1, 4294967295, 4294967296, True, [1]])
def test_cve_2026_30892_a_user_in_json(oci: Oci, bundle: Bundle, create: Create, tmp_path: Path, uid: object) -> None:
    """The same in a process.json."""
    container = create(bundle("sleep", "60")).start()
    spec = {"args": ["id", "-u"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": uid, "gid": 0}}
    (tmp_path / "process.json").write_text(json.dumps(spec))
    assert "user.uid" in refused(oci("exec", "--process", tmp_path / "process.json", container.id))


def hugely(what: str) -> dict[str, Any]:
    many = [{"containerID": i, "hostID": i + 100000, "size": 1} for i in range(70000)]
    return {
        "namespace path": {"linux": {"namespaces": [{"type": "network", "path": "/" + "n" * 70000}]}},
        "mappings": {"linux": {"uidMappings": many, "gidMappings": many, "namespaces": [{"type": "user"}]}},
        "rootfs": {"root": {"path": "r" * 70000}},
        "arguments": {"process": {"args": ["true", *["x" * 100000] * 200]}},
        "environment": {"process": {"env": ["PATH=/bin", *[f"A{i}={'x' * 1000}" for i in range(20000)]]}},
        "groups": {"process": {"user": {"additionalGids": list(range(70000))}}},
        "mount options": {"mounts": [{"destination": "/m", "type": "tmpfs", "options": ["x" * 70000]}]},
        "hostname": {"hostname": "h" * 70000},
        "cgroup": {"linux": {"cgroupsPath": "/c" * 70000}},
    }[what]


HUGE = ["namespace path", "mappings", "rootfs", "arguments", "environment", "groups", "mount options", "hostname"]
HUGE += ["cgroup"]


@pytest.mark.parametrize("what", HUGE)
def test_cve_2021_43784_a_length_that_overflows(
    oci: Oci, bundle: Bundle, container_id: str, run_root: Path, what: str
) -> None:
    """Data of more than 2^16 bytes, which a 16-bit length would cut, and so smuggle what follows into other fields."""
    place = bundle("true", config=hugely(what))
    message = refused(oci("run", "-b", place, container_id))
    assert len(message) < 200000 and "unexpectedly" not in message, message[:300]
    assert not [name for name in os.listdir(run_root) if not name.startswith(".")] if run_root.exists() else True


def test_cve_2021_43784_many_mappings_arrive_whole(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """The largest number of mappings that the kernel takes (340) is exactly what the container gets."""
    maps = [{"containerID": i, "hostID": 1000 + 2 * i, "size": 1} for i in range(340)]

    def user_namespace(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"].append({"type": "user"})
        config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = maps

    place = bundle("cat", "/proc/self/uid_map", edit=user_namespace)
    for directory in [place, *place.parents]:
        if str(directory).startswith("/tmp/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    os.chmod(place / "rootfs", 0o755)
    lines = [[int(word) for word in line.split()] for line in runs(oci, place, container_id).splitlines()]
    assert lines == [[m["containerID"], m["hostID"], m["size"]] for m in maps]
