"""Namespaces of real containers: new ones, those joined by path, user mappings, clocks."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.ovt.live import WAITING, Create, Edit, Run, namespace_of, namespaces, refused

pytestmark = pytest.mark.root
PROC_NAMES = {"mount": "mnt", "network": "net"}
KINDS = ["pid", "network", "ipc", "uts", "mount", "cgroup", "time", "user"]
MAPS: dict[str, Any] = {
    "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
}


def edit(**changes: str | None) -> Edit:
    return lambda config: namespaces(config, **changes)


def in_user_namespace(config: dict[str, Any]) -> None:
    namespaces(config, user="")
    config["linux"] |= MAPS


@pytest.fixture
def donor() -> Iterator[int]:
    """A process that has every kind of namespace of its own, the user namespace mapped one to one."""
    kinds = ["--net", "--ipc", "--uts", "--cgroup", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with subprocess.Popen(
        ["unshare", *kinds, "--time", "busybox", "sh", "-c", "hostname donor; echo; exec sleep 1000"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield int(children[0])
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_new(run: Run, kind: str) -> None:
    name = PROC_NAMES.get(kind, kind)
    make = in_user_namespace if kind == "user" else edit(**{kind: ""})
    assert run("readlink", f"/proc/self/ns/{name}", edit=make) != namespace_of("self", name)


@pytest.mark.parametrize("kind", ["network", "ipc", "uts", "cgroup", "time"])
def test_of_the_host(run: Run, kind: str) -> None:
    name = PROC_NAMES.get(kind, kind)
    changes: dict[str, Any] = {"hostname": None} if kind == "uts" else {}
    assert run("readlink", f"/proc/self/ns/{name}", config=changes, edit=edit(**{kind: None})) == namespace_of(
        "self", name
    )


@pytest.mark.parametrize("kind", ["pid", "network", "ipc", "uts", "cgroup", "time", "mount"])
def test_joined(run: Run, donor: int, kind: str) -> None:
    name = PROC_NAMES.get(kind, kind)
    changes: dict[str, Any] = {"hostname": None} if kind == "uts" else {}
    path = f"/proc/{donor}/ns/{name}"
    assert run("readlink", f"/proc/self/ns/{name}", config=changes, edit=edit(**{kind: path})) == os.readlink(path)


def test_pid_namespace_is_seen(run: Run) -> None:
    assert run("sh", "-c", "echo $$; ls -d /proc/[0-9]*").split() == ["1", "/proc/1"]


def test_joined_pid_namespace_shows_its_neighbours(run: Run, donor: int) -> None:
    seen = run("cat", "/proc/1/comm", edit=edit(pid=f"/proc/{donor}/ns/pid"))
    assert seen == "sleep"


def test_user_namespace_of_another_container(create: Create, run: Run) -> None:
    other = create(*WAITING, edit=in_user_namespace).start()
    pid = other.pid
    joined = run("cat", "/proc/self/uid_map", edit=edit(user=f"/proc/{pid}/ns/user"))
    assert joined.split() == ["0", "100000", "65536"]


def test_a_path_of_another_kind_is_refused(oci: Oci, bundle: Bundle, container_id: str) -> None:
    wrong = bundle(edit=edit(network="/proc/self/ns/uts"))
    assert "/proc/self/ns/uts is not a network namespace" in refused(oci("run", "-b", wrong, container_id))


def test_a_missing_path_is_refused(oci: Oci, bundle: Bundle, container_id: str) -> None:
    wrong = bundle(edit=edit(network="/run/netns/no-such"))
    message = refused(oci("run", "-b", wrong, container_id))
    assert "network namespace /run/netns/no-such: no such file or directory" in message


def test_host_and_domain_name(run: Run) -> None:
    config = {"hostname": "inner", "domainname": "example.org"}
    names = run("cat", "/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname", config=config)
    assert names.split() == ["inner", "example.org"]


def test_loopback_is_up(run: Run) -> None:
    assert "127.0.0.1" in run("ip", "-4", "addr", "show", "dev", "lo")


def test_user_mappings(run: Run) -> None:
    out = run("sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -g", edit=in_user_namespace)
    assert out.split() == ["0", "100000", "65536", "0", "200000", "65536", "0", "0"]


def test_the_process_is_somebody_else_outside(create: Create) -> None:
    container = create(*WAITING, edit=in_user_namespace).start()
    status = Path(f"/proc/{container.pid}/status").read_text()
    assert "Uid:\t100000\t" in status and "Gid:\t200000\t" in status


def test_several_mappings_and_a_user(run: Run) -> None:
    config = {
        "process": {"user": {"uid": 1000, "gid": 1000}},
        "linux": {
            "uidMappings": [
                {"containerID": 0, "hostID": 100000, "size": 1000},
                {"containerID": 1000, "hostID": 0, "size": 1},
            ],
            "gidMappings": MAPS["gidMappings"],
        },
    }
    out = run("sh", "-c", "cat /proc/self/uid_map; id -u", config=config, edit=edit(user=""))
    assert out.split() == ["0", "100000", "1000", "1000", "0", "1", "1000"]


def test_devices_in_a_user_namespace(run: Run) -> None:
    script = "echo x > /dev/null; head -c4 /dev/zero | wc -c; head -c2 /dev/urandom | wc -c; stat -c %a /dev/null"
    assert run("sh", "-c", script, edit=in_user_namespace).split() == ["4", "2", "666"]


def test_time_offsets(run: Run) -> None:
    config = {"linux": {"timeOffsets": {"boottime": {"secs": 1_000_000_000}, "monotonic": {"secs": 7}}}}
    out = run("sh", "-c", "cat /proc/uptime; cat /proc/self/timens_offsets", config=config, edit=edit(time=""))
    assert float(out.split()[0]) > 1_000_000_000
    assert out.splitlines()[1:] and "1000000000" in out and "monotonic           7" in out


def test_exec_is_in_all_of_them(create: Create) -> None:
    def every(config: dict[str, Any]) -> None:
        in_user_namespace(config)
        namespaces(config, time="")

    container = create(*WAITING, edit=every).start()
    names = ["pid", "net", "ipc", "uts", "mnt", "cgroup", "time", "user"]
    seen = container.ask("sh", "-c", f"for n in {' '.join(names)}; do readlink /proc/self/ns/$n; done").split()
    assert seen == [namespace_of(container.pid, name) for name in names]


def test_without_a_mount_namespace_the_root_is_entered(run: Run) -> None:
    def none(config: dict[str, Any]) -> None:
        namespaces(config, mount=None, pid=None)
        config["mounts"] = []
        config["linux"]["maskedPaths"] = config["linux"]["readonlyPaths"] = []
        config["root"]["readonly"] = False

    assert run("cat", "/etc/passwd", edit=none).startswith("root:x:0:0:root:/root:/bin/sh")


def test_a_tmpfs_that_is_writable_in_a_user_namespace(run: Run) -> None:
    """The filesystems of the container's own mount namespace belong to its root."""
    assert run("sh", "-c", "touch /dev/shm/x; stat -c %u /dev/shm/x", edit=in_user_namespace) == "0"


def test_proc_of_the_own_pid_namespace_and_that_of_the_host(run: Run) -> None:
    assert run("cat", "/proc/1/comm") == "cat"
    assert run("cat", "/proc/1/comm", edit=edit(pid=None)) == Path("/proc/1/comm").read_text().strip()
