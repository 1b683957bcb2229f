"""Whether a configuration asks for its cgroup to be given to the container, and to whom.

The rules are the runtime-spec's (config-linux.md, "Cgroup ownership"). Only reads the configuration;
`Cgroup.delegate` does it, on v2 alone: what v1 delegates cannot be limited any more.
"""

from __future__ import annotations

from ovt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANNOTATION = "run.oci.delegate-cgroup"


def requested(config: dict[str, Any]) -> tuple[int, int, str] | None:
    """(host uid, host gid, cgroup below the container's own that is given away), or None.

    Asked for by the annotation, whose value is that cgroup below, or by a new cgroup namespace together with a
    writable cgroup mount on /sys/fs/cgroup, which is about the container's cgroup itself: "". The owner is the host's
    name of process.user. ConfigError for a path with `..` or a user that is not mapped.
    """
    linux = config.get("linux") or {}
    sub = (config.get("annotations") or {}).get(ANNOTATION)
    if sub is None:
        if not (_own_namespace(linux) and _writable_mount(config.get("mounts") or [])):
            return None
        sub = ""
    if ".." in sub.split("/"):
        raise ConfigError(f"$.annotations.{ANNOTATION}", f"{ANNOTATION}: `..` components are not allowed in `{sub}`")
    user = (config.get("process") or {}).get("user") or {}
    return (
        _on_host(user.get("uid") or 0, linux.get("uidMappings"), "uid"),
        _on_host(user.get("gid") or 0, linux.get("gidMappings"), "gid"),
        sub,
    )


def _own_namespace(linux: dict[str, Any]) -> bool:
    return any(entry["type"] == "cgroup" and not entry.get("path") for entry in linux.get("namespaces") or ())


def _writable_mount(mounts: list[dict[str, Any]]) -> bool:
    return any(
        mount["destination"].rstrip("/") == "/sys/fs/cgroup"
        and mount.get("source") == "cgroup"
        and "ro" not in (mount.get("options") or ())
        for mount in mounts
    )


def _on_host(number: int, mappings: list[dict[str, int]] | None, key: str) -> int:
    if not mappings:
        return number
    for entry in mappings:
        if entry["containerID"] <= number < entry["containerID"] + entry["size"]:
            return entry["hostID"] + number - entry["containerID"]
    raise ConfigError(f"$.process.user.{key}", f"{key} {number} is not mapped in linux.{key}Mappings")
