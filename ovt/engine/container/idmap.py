"""User namespaces for id-mapped mounts: a mount's own mappings, or those of the container."""

from __future__ import annotations

import posix

from ovt.errors import ConfigError, HostError, refused
from ovt.kernel import procfs
from ovt.kernel import syscalls as sc

from . import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def namespace_for(mount: mounts.Mount, container_pid: int) -> int:
    """A descriptor of the user namespace whose mappings `mount` asks for; `container_pid` 0 when it has none.

    Mappings in the mount's own `uidMappings`/`gidMappings`, or as crun writes them in the option
    (`idmap=uids=0-1000-10;gids=…`, numbers inside-outside-length, a leading @ relative to the container's mappings).
    """
    uids, gids = mount.config.get("uidMappings"), mount.config.get("gidMappings")
    if mount.options.idmap:
        uids, gids = _parse(mount, container_pid)
    if uids or gids:
        return make(_lines(uids or gids or []), _lines(gids or uids or []))
    if not container_pid:
        raise ConfigError(f"{mount.path}.options", "idmap needs mappings: the container has no user namespace")
    return posix.open(f"/proc/{container_pid}/ns/user", posix.O_RDONLY | posix.O_CLOEXEC)


def make(uid_map: str, gid_map: str) -> int:
    """A new user namespace with these maps (lines of /proc/PID/uid_map), held by nothing but the descriptor."""
    ready, tell_ready = posix.pipe2(posix.O_CLOEXEC)
    hold, release = posix.pipe2(posix.O_CLOEXEC)
    pid = posix.fork()
    if pid == 0:
        try:
            posix.close(release)
            sc.unshare(sc.CLONE_NEWUSER)
            posix.write(tell_ready, b"1")
            posix.read(hold, 1)
        finally:
            posix._exit(0)
    posix.close(tell_ready)
    posix.close(hold)
    try:
        if not posix.read(ready, 1):
            raise HostError("make a user namespace for an id-mapped mount: not allowed here")
        try:
            procfs.write(f"/proc/{pid}/uid_map", uid_map)
            procfs.write(f"/proc/{pid}/gid_map", gid_map)
        except OSError as error:
            raise refused(f"id-mapped mount: {uid_map.strip()!r}", error) from None
        return posix.open(f"/proc/{pid}/ns/user", posix.O_RDONLY | posix.O_CLOEXEC)
    finally:
        posix.close(ready)
        posix.close(release)
        posix.waitpid(pid, 0)


def _lines(maps: list[dict[str, Any]]) -> str:
    return "".join(f"{m['containerID']} {m['hostID']} {m['size']}\n" for m in maps)


def _parse(mount: mounts.Mount, container_pid: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {"uids": [], "gids": []}
    for part in (mount.options.idmap or "").split(";"):
        kind, _, ranges = part.partition("=")
        if kind not in out:
            raise ConfigError(f"{mount.path}.options", f"unknown idmap kind {kind!r}; uids or gids")
        for entry in ranges.split("#"):
            relative = entry.startswith("@")
            numbers = entry.lstrip("@").split("-")
            if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
                raise ConfigError(f"{mount.path}.options", f"idmap range {entry!r} is not INSIDE-OUTSIDE-LENGTH")
            inside, outside, size = map(int, numbers)
            if relative:
                outside = _translate(container_pid, kind[:3], outside, mount)
            out[kind].append({"containerID": inside, "hostID": outside, "size": size})
    return out["uids"], out["gids"]


def _translate(pid: int, kind: str, inside: int, mount: mounts.Mount) -> int:
    """What the container's id `inside` is on the host."""
    if pid:
        for line in procfs.read(f"/proc/{pid}/{kind}_map").splitlines():
            first, host, size = map(int, line.split())
            if first <= inside < first + size:
                return host + inside - first
    raise ConfigError(f"{mount.path}.options", f"idmap: {kind} {inside} is not mapped in the container")
