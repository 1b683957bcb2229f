"""CVE-2022-47952, 2023-25809: what a container sees of the host's cgroups, and a caller without rights of its files."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BARE, Bundle, Oci
from tests.security.conftest import HOST_PROGRAMS, Create, refused, runs

pytestmark = pytest.mark.root

# every place below /sys/fs/cgroup where this process can make a directory, and every process listed below it
PROBE = """
for d in $(find /sys/fs/cgroup -type d); do mkdir $d/evil 2>/dev/null && { echo made $d; rmdir $d/evil; }; done
for f in $(find /sys/fs/cgroup -name cgroup.procs); do sed 's/^/saw /' $f; done
find /sys/fs/cgroup -name release_agent | while read f; do (echo /evil > $f) 2>/dev/null && echo agent $f; done
true
"""


def cgroup_mount(options: list[str], *, namespace: bool) -> Any:
    def edit(config: dict[str, Any]) -> None:
        for mount in config["mounts"]:
            if mount["destination"] == "/sys/fs/cgroup":
                mount["options"] = options
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "cgroup"]
        if namespace:
            config["linux"]["namespaces"].append({"type": "cgroup"})

    return edit


def in_container(oci: Oci, bundle: Bundle, container_id: str, edit: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"made": set(), "saw": set(), "agent": set()}
    for line in runs(oci, bundle("sh", "-c", PROBE, edit=edit), container_id).splitlines():
        kind, _, what = line.partition(" ")
        found[kind].add(what)
    return found


@pytest.mark.twice
@pytest.mark.parametrize("namespace", [True, False], ids=["own namespace", "host's namespace"])
def test_cve_2023_25809_read_only(oci: Oci, bundle: Bundle, container_id: str, namespace: bool) -> None:
    """The default mount: no directory can be made in any hierarchy, no foreign process is seen."""
    options = ["nosuid", "noexec", "nodev", "ro"]
    found = in_container(oci, bundle, container_id, cgroup_mount(options, namespace=namespace))
    assert not found["made"] and not found["agent"]
    # a process of another pid namespace is shown as 0
    assert "1" in found["saw"] and "0" not in found["saw"], "only what runs in the container, by its own numbers"


@pytest.mark.twice
@pytest.mark.parametrize("namespace", [True, False], ids=["own namespace", "host's namespace"])
def test_cve_2023_25809_writable(oci: Oci, bundle: Bundle, create: Create, container_id: str, namespace: bool) -> None:
    """A writable mount that was asked for: it is the container's own cgroup and nothing beside or above it."""
    options = ["nosuid", "noexec", "nodev", "rw"]
    found = in_container(oci, bundle, container_id, cgroup_mount(options, namespace=namespace))
    assert found["made"], "the mount is writable: the check above can fail"
    assert not found["agent"] and "0" not in found["saw"]
    container = create(bundle("sleep", "60", edit=cgroup_mount(options, namespace=namespace))).start()
    for line in Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = line.split(" - ")[1].split()[0]
        if kind in ("cgroup", "cgroup2"):
            # mountinfo of the host's view: the root of the mount is the container's cgroup
            assert "ovt-test" in fields[3], line


@pytest.mark.twice
@pytest.mark.parametrize("namespace", [True, False], ids=["own namespace", "host's namespace"])
def test_cve_2023_25809_without_a_cgroup_of_its_own(
    oci: Oci, bundle: Bundle, container_id: str, namespace: bool
) -> None:
    """With cgroups disabled the container stays in its caller's cgroup: even a mount asked for writable is not."""
    options = ["nosuid", "noexec", "nodev", "rw"]
    place = bundle("sh", "-c", PROBE, edit=cgroup_mount(options, namespace=namespace))
    done = oci("--cgroup-manager", "disabled", "run", "-b", place, container_id, check=True)
    lines = {line.split()[0] for line in done.stdout.splitlines()}
    assert "saw" in lines and not lines & {"made", "agent"}


@pytest.mark.twice
def test_cve_2023_25809_sysfs_of_the_host(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """A user namespace with the host's network: /sys must be the host's, and what is mounted below it read-only too.

    Id 0 of the namespace is the host's root here, so that only the mounts protect the host's control groups.
    """

    def edit(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
        config["linux"]["namespaces"].append({"type": "user"})
        config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [
            {"containerID": 0, "hostID": 0, "size": 65536}
        ]
        config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]

    found = in_container(oci, bundle, container_id, edit)
    assert "0" in found["saw"], "the host's cgroups are visible there"
    assert not found["made"] and not found["agent"]


def test_cve_2022_47952_no_oracle_for_files(runtime: Path, tmp_path: Path) -> None:
    """For a caller without rights, a file that he may not see and one that is not there give the same answer.

    Nothing of ovt is setuid, so this cannot but hold; a helper that opened paths with more rights would break it.
    """
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    (secret / "exists").mkdir()
    (secret / "exists/config.json").write_text("{}")
    answers = []
    for name in ("exists", "missing"):
        command = ["--root", f"/tmp/ovt-test-{os.getpid()}-nobody", "create", "-b", secret / name, "x"]
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", runtime, *command],
            env=BARE, cwd="/", capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=30,
        )
        answers.append(refused(done).replace(name, "NAME"))
    assert answers[0] == answers[1], answers
    assert "secret" in answers[0] and "permission denied" in answers[0].lower()
    for program in HOST_PROGRAMS:
        assert not program.stat().st_mode & 0o6000
