"""The state directory of a container: `<root>/<id>/` (runtime-spec, "State").

    state.json   what must be known to find, finish or remove the container; replaced atomically
    exec.json    what `exec` takes from the configuration: its process, seccomp and personality; never changes
    exec.fifo    exists until `start`: a container with it is `created`
    plain        exists when all that `start` has to do is to write into the FIFO (see plain.py)
    start.error  ovt-init's last words when the program could not be executed

What is written here is enough for `delete` after a kill -9 at any point: the record is made before anything else
is, and extended before each thing that would have to be undone. The status is never stored, it is derived.
"""

from __future__ import annotations

import posix
import time
from errno import EEXIST

from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError, refused
from ovt.kernel import jsonc, procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION = "1.3.0"
STATE = "state.json"
TEMPLATE = "exec.json"
FIFO = "exec.fifo"
PLAIN = "plain"
START_ERROR = "start.error"

CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"

_ESSENTIAL = (("pid", int), ("namespaces", int), ("bundle", str), ("created", str), ("hooks", dict), ("maker", list))
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-")
_REST = _FIRST | {"."}


def check_id(container_id: str) -> None:
    """Container names as runc and crun take them, at most 1024 characters; UsageError otherwise."""
    if not container_id:
        raise UsageError("container ID cannot be empty")
    good = len(container_id) <= 1024 and container_id[0] in _FIRST and _REST.issuperset(container_id)
    if not good:
        raise UsageError(f"invalid container ID format: {container_id!r}", "use letters, digits and _ + - .")


def default_root() -> str:
    """/run/ovt, or for a normal user $XDG_RUNTIME_DIR/ovt; root of a user namespace is one (podman without root)."""
    if posix.geteuid() == 0 and not in_user_namespace():
        return "/run/ovt"
    base = posix.environ.get(b"XDG_RUNTIME_DIR", b"").decode("utf-8", "surrogateescape")
    return f"{base}/ovt" if base else f"/tmp/ovt-{posix.geteuid()}"


def in_user_namespace() -> bool:
    """True when this process is not in the initial user namespace, whose map covers all ids."""
    return procfs.read("/proc/self/uid_map").split() != ["0", "0", "4294967295"]


def make_root(root: str) -> None:
    """Create `root` with mode 0700; refuse one that another user could have put in place."""
    made = ""
    for part in root.split("/"):
        made += part + "/"
        try:
            posix.mkdir(made, 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise refused(
                f"cannot make the state directory {root}",
                error,
                "choose another with --root",
            ) from None
    for status in (posix.lstat(root), posix.stat(root)):
        # who can exchange a record can have any process killed and any hook run
        if status.st_uid not in (0, posix.geteuid()):
            raise HostError(
                f"the state directory {root} belongs to uid {status.st_uid}", hint="choose another with --root"
            )
    if status.st_mode & 0o1002 == 0o0002:
        raise HostError(f"the state directory {root} can be changed by everybody", hint=f"chmod 700 {root}")


class State:
    """One container's directory and its record (a dict, kept as JSON)."""

    __slots__ = ("_template", "id", "path", "record")

    def __init__(
        self, root: str, container_id: str, record: dict[str, Any], template: dict[str, Any] | None = None
    ) -> None:
        self.id = container_id
        self.path = f"{root}/{container_id}"
        self.record = record
        self._template = template

    @property
    def template(self) -> dict[str, Any]:
        """exec.json: {"process", "seccomp", "personality"}; apart, as profiles are long and most verbs need none."""
        if self._template is None:
            self._template = jsonc.loads(procfs.read(f"{self.path}/{TEMPLATE}", 16 << 20))
        return self._template

    # making, loading, removing

    @classmethod
    def make(cls, root: str, container_id: str, record: dict[str, Any], template: dict[str, Any]) -> State:
        """Claim the name: the directory comes into being with its record in it. Conflict when the name is taken."""
        make_root(root)
        maker, started = record["maker"]
        temporary = f"{root}/.{container_id[:200]}.{maker}.{started}"
        state = cls(root, container_id, record, template)
        if _exists(state.path):
            raise Conflict(f"container with given ID already exists: {container_id}")
        posix.mkdir(temporary, 0o700)
        try:
            _write(f"{temporary}/{STATE}", jsonc.dumps(record))
            _write(f"{temporary}/{TEMPLATE}", jsonc.dumps(template))
            posix.rename(temporary, state.path)  # onto an existing non-empty directory: ENOTEMPTY or EEXIST
        except OSError as error:
            remove_tree(temporary)
            if error.errno in (EEXIST, 39):
                raise Conflict(f"container with given ID already exists: {container_id}") from None
            raise
        return state

    @classmethod
    def load(cls, root: str, container_id: str) -> State:
        """Read the record. NotFound when there is none; OvtError when it is damaged."""
        check_id(container_id)
        path = f"{root}/{container_id}/{STATE}"
        try:
            record = jsonc.loads(procfs.read(path, 16 << 20))
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"container does not exist: {container_id}") from None
        except ValueError as error:
            raise OvtError(
                f"container {container_id}: {path} is damaged: {error}", f"remove it: delete --force {container_id}"
            ) from None
        if not isinstance(record, dict) or not all(type(record.get(name)) is kind for name, kind in _ESSENTIAL):
            raise OvtError(
                f"container {container_id}: {path} is not a state record", f"remove it: delete --force {container_id}"
            )
        return cls(root, container_id, record)

    def save(self) -> None:
        """Replace the record atomically."""
        _write(f"{self.path}/{STATE}", jsonc.dumps(self.record))

    def remove(self) -> None:
        """Remove the directory; the record goes last, so that an interrupted removal can be repeated."""
        remove_tree(self.path, last=STATE)

    # what can be derived

    @property
    def pid(self) -> int:
        """The init process on the host; 0 before there is one."""
        pid: int = self.record["pid"]
        return pid

    def alive(self) -> bool:
        """True while the init process that this record means has not exited."""
        return self.pid > 0 and procfs.alive(self.pid, self.record["pid_start"])

    def waiting(self) -> bool:
        """True until `start` was called."""
        return _exists(f"{self.path}/{FIFO}")

    def status(self) -> str:
        """The OCI status, from the process, the FIFO and the freezer."""
        if not self.alive():
            # between the claim of the name and the birth of the process another runtime may be at work on it
            maker = self.record.get("maker")
            if self.pid == 0 and maker and procfs.alive(maker[0], maker[1]):
                return CREATING
            return STOPPED
        if not self.record.get("ready"):
            return CREATING
        if self.record.get("cgroup") and self._frozen():
            return PAUSED
        return CREATED if self.waiting() else RUNNING

    def _frozen(self) -> bool:
        from ovt.kernel import cgroup

        return cgroup.restore(self.record["cgroup"]).frozen()

    def oci(self) -> dict[str, Any]:
        """The state as the runtime-spec has it, with the additions that callers of runc read."""
        status = self.status()
        return {
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "pid": self.pid if status != STOPPED else 0,
            "status": status,
            "bundle": self.record["bundle"],
            "rootfs": self.record.get("rootfs", ""),
            "created": self.record["created"],
            "annotations": self.record.get("annotations") or {},
            "owner": self.record.get("owner", ""),
        }


def sweep(root: str, container_id: str) -> None:
    """Remove what a `make` or `remove` of this name left behind when it was killed half way."""
    path = f"{root}/{container_id}"
    # not there at all: what may appear now is another's new container
    if _exists(path) and not _exists(f"{path}/{STATE}"):
        remove_tree(path)
    prefix = f".{container_id[:200]}."
    try:
        names = posix.listdir(root)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(prefix):
            pid, _, started = name[len(prefix) :].partition(".")
            if pid.isdigit() and started.isdigit() and not procfs.alive(int(pid), int(started)):
                remove_tree(f"{root}/{name}")


def list_ids(root: str) -> list[str]:
    """The names below `root`, sorted; temporary ones left out."""
    try:
        names = posix.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if not name.startswith(".") and _exists(f"{root}/{name}/{STATE}"))


def now() -> str:
    """The time as RFC 3339 in UTC with nanoseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    t = time.gmtime(seconds)
    return f"{t[0]:04}-{t[1]:02}-{t[2]:02}T{t[3]:02}:{t[4]:02}:{t[5]:02}.{nanoseconds:09}Z"


def remove_tree(path: str, last: str = "") -> None:
    """Remove a directory of ours without following links; the entry `last` goes last. Missing is fine."""
    try:
        names = posix.listdir(path)
    except FileNotFoundError:
        return
    for name in sorted(names, key=last.__eq__):
        entry = f"{path}/{name}"
        try:
            if posix.lstat(entry).st_mode & 0o170000 == 0o040000:
                remove_tree(entry)
            else:
                posix.unlink(entry)
        except FileNotFoundError:
            pass
    try:
        posix.rmdir(path)
    except FileNotFoundError:
        pass


def _exists(path: str) -> bool:
    try:
        posix.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{posix.getpid()}"
    fd = posix.open(temporary, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o600)
    try:
        raw = text.encode("utf-8", "surrogateescape")
        while raw:
            raw = raw[posix.write(fd, raw) :]
    finally:
        posix.close(fd)
    posix.rename(temporary, path)


def write_pid_file(path: str, pid: int) -> None:
    """The pid in digits, no newline (containerd parses the whole file as a number), replaced atomically."""
    directory, _, name = path.rpartition("/")
    temporary = f"{directory}/.{name}.{posix.getpid()}" if directory else f".{name}.{posix.getpid()}"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC  # in /tmp, a link may lie in wait
    try:
        fd = posix.open(temporary, flags, 0o644)
    except FileExistsError:
        posix.unlink(temporary)
        fd = posix.open(temporary, flags, 0o644)
    try:
        posix.write(fd, str(pid).encode())
        posix.rename(temporary, path)
    except OSError:
        posix.unlink(temporary)
        raise
    finally:
        posix.close(fd)
