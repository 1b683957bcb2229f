"""When a configuration asks for its cgroup, and who gets it."""

from typing import Any

import pytest

from ovt.errors import ConfigError
from ovt.kernel.cgroup.delegation import requested

MOUNT = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "rw"]}


def config(**changes: Any) -> dict[str, Any]:
    linux = {"namespaces": [{"type": "pid"}, {"type": "cgroup"}], **changes.pop("linux", {})}
    return {"linux": linux, "mounts": [MOUNT], "process": {"user": {"uid": 5, "gid": 6}}, **changes}


def test_a_namespace_and_a_writable_mount() -> None:
    assert requested(config()) == (5, 6, "")


def test_ids_are_the_hosts() -> None:
    mappings = [{"containerID": 0, "hostID": 9000, "size": 5}, {"containerID": 5, "hostID": 100, "size": 2}]
    assert requested(config(linux={"uidMappings": mappings, "gidMappings": mappings})) == (100, 101, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"linux": {"namespaces": [{"type": "pid"}]}},
        {"linux": {"namespaces": [{"type": "cgroup", "path": "/proc/1/ns/cgroup"}]}},
        {"mounts": []},
        {"mounts": [{**MOUNT, "options": ["ro"]}]},
        {"mounts": [{**MOUNT, "destination": "/mnt"}]},
        {"mounts": [{**MOUNT, "source": "/sys/fs/cgroup"}]},
        {"mounts": None, "linux": {"namespaces": None}},
    ],
)
def test_not_asked_for(changes: dict[str, Any]) -> None:
    assert requested(config(**changes)) is None


def test_by_annotation_with_a_cgroup_below() -> None:
    asked = config(mounts=[], annotations={"run.oci.delegate-cgroup": "guest/inner"}, process={})
    assert requested(asked) == (0, 0, "guest/inner")


@pytest.mark.parametrize("path", ["..", "../../../victim", "a/../b"])
def test_the_cgroup_stays_below(path: str) -> None:
    with pytest.raises(ConfigError, match=r"delegate-cgroup: `..` components are not allowed"):
        requested(config(annotations={"run.oci.delegate-cgroup": path}))


def test_a_user_that_is_not_mapped() -> None:
    with pytest.raises(ConfigError, match=r"uid 5 is not mapped in linux.uidMappings") as caught:
        requested(config(linux={"uidMappings": [{"containerID": 0, "hostID": 9000, "size": 5}]}))
    assert caught.value.path == "$.process.user.uid"
