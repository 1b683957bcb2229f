"""The namespaces of a container: which are new, which are joined, and how user ids map."""

from __future__ import annotations

import posix

from ovt.errors import ConfigError, HostError, refused
from ovt.kernel import procfs
from ovt.kernel import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

FLAGS = {
    "user": sc.CLONE_NEWUSER,
    "mount": sc.CLONE_NEWNS,
    "network": sc.CLONE_NEWNET,
    "ipc": sc.CLONE_NEWIPC,
    "uts": sc.CLONE_NEWUTS,
    "pid": sc.CLONE_NEWPID,
    "cgroup": sc.CLONE_NEWCGROUP,
    "time": sc.CLONE_NEWTIME,
}
_NS_GET_NSTYPE = 0xB703


class Namespaces:
    """`new` is a mask of CLONE_NEW* flags; `joined` is a list of (type, flag, path), the user namespace first."""

    __slots__ = ("new", "joined")

    def __init__(self, config: dict[str, Any]) -> None:
        self.new = 0
        self.joined: list[tuple[str, int, str]] = []
        for entry in (config.get("linux") or {}).get("namespaces") or []:
            flag = FLAGS[entry["type"]]
            if entry.get("path"):
                self.joined.append((entry["type"], flag, entry["path"]))
            else:
                self.new |= flag
        self.joined.sort(key=lambda item: item[1] != sc.CLONE_NEWUSER)

    @property
    def mask(self) -> int:
        """All namespaces that are not the caller's."""
        mask = self.new
        for _, flag, _ in self.joined:
            mask |= flag
        return mask

    def open_joined(self) -> Iterator[tuple[str, int, int]]:
        """Descriptors of the namespaces to join: (type, flag, fd). A path that is another kind is refused."""
        import fcntl

        for kind, flag, path in self.joined:
            try:
                fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
            except OSError as error:
                raise HostError(
                    f"{kind} namespace {path}: {posix.strerror(error.errno or 0).lower()}", error.errno or 0
                ) from None
            try:
                actual = fcntl.ioctl(fd, _NS_GET_NSTYPE)
            except OSError:
                actual = 0
            if actual != flag:
                posix.close(fd)
                raise ConfigError("$.linux.namespaces", f"{path} is not a {kind} namespace")
            if kind == "mount" and posix.fstat(fd)[1:3] == posix.stat("/proc/self/ns/mnt")[1:3]:
                posix.close(fd)
                # pivot_root(2) would exchange the root of every process of the host
                raise ConfigError(
                    "$.linux.namespaces",
                    f"{path} is the mount namespace of the runtime itself",
                    "leave the mount namespace out to share the host's",
                )
            yield kind, flag, fd


def write_maps(pid: int, uid_maps: list[dict[str, Any]], gid_maps: list[dict[str, Any]]) -> None:
    """Write the id mappings of the new user namespace of `pid`; without privilege through newuidmap/newgidmap."""
    euid = posix.geteuid()
    uids, gids = _lines(uid_maps), _lines(gid_maps)
    privileged = euid == 0
    if not privileged and len(gid_maps) == 1 and gid_maps[0]["size"] == 1:
        # a process without CAP_SETGID in the parent namespace may map its own group only after this
        procfs.write(f"/proc/{pid}/setgroups", "deny")
    for name, text, maps, helper in (
        ("gid_map", gids, gid_maps, "newgidmap"),
        ("uid_map", uids, uid_maps, "newuidmap"),
    ):
        if not text:
            continue
        single = len(maps) == 1 and maps[0]["size"] == 1
        try:
            if privileged or single:
                procfs.write(f"/proc/{pid}/{name}", text)
            else:
                _run_helper(helper, pid, maps)
        except OSError as error:
            if privileged and error.errno == 1:
                # root without CAP_SETUID over the parent namespace, as in an unprivileged outer container
                _run_helper(helper, pid, maps)
                continue
            raise refused(
                f"write {name}",
                error,
                f"is {text.strip()[:100]!r} allowed by the outer user namespace?",
            ) from None


def _lines(maps: list[dict[str, Any]]) -> str:
    return "".join(f"{m['containerID']} {m['hostID']} {m['size']}\n" for m in maps)


def _run_helper(helper: str, pid: int, maps: list[dict[str, Any]]) -> None:
    """newuidmap(1): the setuid program that grants the ranges of /etc/subuid and /etc/subgid."""
    args = [helper, str(pid)]
    for m in maps:
        args += [str(m["containerID"]), str(m["hostID"]), str(m["size"])]
    for directory in ("/usr/bin", "/usr/local/bin", "/bin"):
        path = f"{directory}/{helper}"
        try:
            child = posix.posix_spawn(path, args, {b"PATH": b"/usr/bin:/bin"})
        except FileNotFoundError:
            continue
        status = posix.waitstatus_to_exitcode(posix.waitpid(child, 0)[1])
        if status:
            raise HostError(
                f"{helper} refused the mappings (exit status {status})",
                hint=f"give this user a range in /etc/sub{helper[3]}id",
            )
        return
    raise HostError(f"{helper} is not installed", hint="apt-get install uidmap")
