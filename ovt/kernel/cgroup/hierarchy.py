"""Which cgroup hierarchies this process sees, where they are mounted, and where in them it is itself.

Reads /proc/self/cgroup and as much of /proc/self/mountinfo as is needed, once per process. Three kinds of host:

    v1      controllers in hierarchies of their own
    hybrid  v1, and a cgroup2 mount beside it that holds what is left (systemd's `unified`); treated as v1
    v2      one cgroup2 mount, no v1 controller in use
"""

from __future__ import annotations

import posix

from ovt.errors import HostError
from ovt.kernel.cgroup.files import clean, read

_PREFERRED = "/sys/fs/cgroup"
_CHUNK = 16384


class Hierarchies:
    """The mounted cgroup hierarchies.

    `v1` maps a controller (or `name=systemd`) to its mount point, `unified` is the cgroup2 mount point or None,
    `roots` maps a mount point to the cgroup that is mounted there (`/` but for bind mounts of a subtree), `own` maps
    a controller (`""` for cgroup2) to the cgroup of this process.
    """

    __slots__ = ("v1", "unified", "roots", "own")

    def __init__(
        self,
        v1: dict[str, str] | None = None,
        unified: str | None = None,
        roots: dict[str, str] | None = None,
        own: dict[str, str] | None = None,
    ) -> None:
        self.v1 = v1 or {}
        self.unified = unified
        self.roots = roots or {}
        self.own = own or {}

    @property
    def mode(self) -> str:
        """`v2`, `v1` (also for hybrid hosts) or `none`."""
        if any(not name.startswith("name=") for name in self.v1):
            return "v1"
        if self.unified:
            return "v2"
        return "v1" if self.v1 else "none"

    def own_directory(self, controller: str) -> str:
        """The cgroup of this process below the mount of `controller` (`""`: cgroup2), `""` for the mount itself."""
        mount = self.v1.get(controller) if controller else self.unified
        own = clean(self.own.get(controller, "/"))
        root = clean(self.roots.get(mount or "", "/"))
        if root == own:
            return ""
        # Without a cgroup namespace a container sees host paths in /proc/self/cgroup, and the mount's root tells how
        # much of them lies above the mount. A root that is no prefix (`/..`) belongs to another namespace.
        if root and own.startswith(root + "/"):
            return own[len(root) :]
        return "" if root else own


def parse_own(text: str) -> dict[str, str]:
    """/proc/PID/cgroup: controller (`""` for cgroup2) to path."""
    own: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            own[name] = path
    return own


def _unescape(field: str) -> str:
    if "\\" not in field:
        return field
    first, *rest = field.split("\\")
    return first + "".join([chr(int(part[:3], 8)) + part[3:] for part in rest])


class _Collector:
    def __init__(self, own: dict[str, str]) -> None:
        self.found = Hierarchies(own=own)
        self._wanted = {name for name in own if name}

    def line(self, line: str) -> None:
        left, _, right = line.partition(" - ")
        fields = left.split()
        kind = right.split()
        if len(fields) < 5 or len(kind) < 3:
            return
        mount = _unescape(fields[4])
        if kind[0] == "cgroup2":
            names = [""]
        else:
            names = [name for name in kind[2].split(",") if name in self._wanted]
        if names:
            self._cover(mount + "/")
        for name in names:
            before = self.found.v1.get(name) if name else self.found.unified
            # A later mount of the same hierarchy is a bind mount somewhere (a root file system): keep the usual place.
            if before is not None and (before.startswith(_PREFERRED) or not mount.startswith(_PREFERRED)):
                continue
            if name:
                self.found.v1[name] = mount
            else:
                self.found.unified = mount
            self.found.roots[mount] = _unescape(fields[3])

    def _cover(self, below: str) -> None:
        """Forget the mounts that a later one hides: a private view mounts cgroup2 over v1's directory."""
        self.found.v1 = {name: mount for name, mount in self.found.v1.items() if not mount.startswith(below)}
        if (self.found.unified or "").startswith(below):
            self.found.unified = None

    @property
    def complete(self) -> bool:
        return self.found.unified is not None and len(self.found.v1) == len(self._wanted)


def parse(mountinfo: str, own: str) -> Hierarchies:
    """The hierarchies told by the texts of /proc/PID/mountinfo and /proc/PID/cgroup."""
    collector = _Collector(parse_own(own))
    for line in mountinfo.splitlines():
        if " - cgroup" in line:
            collector.line(line)
    return collector.found


_current: Hierarchies | None = None


def current() -> Hierarchies:
    """The hierarchies of this process, read on the first call. Raises HostError where /proc cannot be read."""
    global _current
    if _current is None:
        try:
            _current = _read()
        except OSError as error:
            raise HostError(
                f"cannot find the cgroup mounts: {error.filename}: {error.strerror}",
                error.errno or 0,
                "mount proc on /proc, or use --cgroup-manager disabled",
            ) from error
    return _current


def forget() -> None:
    """Read again on the next `current()`: for a process that changed its mount or cgroup namespace."""
    global _current
    _current = None


def _read() -> Hierarchies:
    collector = _Collector(parse_own(read("/proc/self/cgroup")))
    fd = posix.open("/proc/self/mountinfo", posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        rest = b""
        # A host of a thousand containers has ten thousand mounts; the cgroup ones come first, so stop after them.
        while not collector.complete and (chunk := posix.read(fd, _CHUNK)):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if b" - cgroup" in line:
                    collector.line(line.decode("utf-8", "surrogateescape"))
    except OSError as error:
        error.filename = "/proc/self/mountinfo"
        raise
    finally:
        posix.close(fd)
    return collector.found
