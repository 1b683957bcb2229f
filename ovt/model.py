"""What an instance is: plain records, the states it can be in, and which verb is allowed in which state. No I/O.

An instance is a guest under a name: a container or a virtual machine. `Spec` is what its owner asked for and
changes only by `update` and `rename`; the rest of `Instance` is what happened to it. Records travel as JSON objects
that leave out whatever has its default, so that a thousand of them are read quickly.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple, Self

from ovt.errors import StateError, UsageError
from ovt.hardware_spec import Disk as Disk
from ovt.hardware_spec import Machine as Machine
from ovt.hardware_spec import Nic as Nic
from ovt.hardware_spec import Seed as Seed


class Kind(StrEnum):
    """Which engine runs the instance."""

    CONTAINER = "container"
    VM = "vm"


class Status(StrEnum):
    """Where an instance is in its life. CREATING and RESTARTING belong to a command that is at work on it."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    STOPPED = "stopped"
    SAVED = "saved"  # a machine whose memory is on the disk, where its next start goes on
    BROKEN = "broken"  # the command that was changing it was killed


LIVE = frozenset({Status.RUNNING, Status.PAUSED})
IDLE = frozenset({Status.CREATED, Status.STOPPED, Status.SAVED, Status.BROKEN})
_EVERY = frozenset(Status)
_SETTLED = LIVE | IDLE | {Status.RESTARTING}

# verb → the states it starts from, the state it leads to (None: it changes nothing)
TRANSITIONS: dict[str, tuple[frozenset[Status], Status | None]] = {
    "start": (IDLE, Status.RUNNING),
    "stop": (LIVE | {Status.RESTARTING}, Status.STOPPED),
    "restart": (_SETTLED, Status.RUNNING),
    "kill": (LIVE, None),
    "pause": (frozenset({Status.RUNNING}), Status.PAUSED),
    "resume": (frozenset({Status.PAUSED}), Status.RUNNING),
    "delete": (IDLE, None),
    "delete --force": (_EVERY, None),
    "exec": (frozenset({Status.RUNNING}), None),
    "attach": (LIVE, None),
    "stats": (LIVE, None),
    "top": (LIVE, None),
    "cp": (LIVE | IDLE, None),
    "update": (LIVE | IDLE, None),
    "rename": (_SETTLED, None),
    "inspect": (_EVERY, None),
    "logs": (_EVERY, None),
    "wait": (_EVERY, None),
    # of virtual machines alone
    "console": (LIVE, None),
    "guest": (frozenset({Status.RUNNING}), None),
    "reset": (LIVE, None),
    "suspend": (frozenset({Status.RUNNING}), None),
    "wake": (LIVE, None),
    "screenshot": (LIVE, None),
    "save": (LIVE, Status.SAVED),
    "device": (LIVE | IDLE, None),
    "snapshot": (LIVE | IDLE, None),
    "clone": (LIVE | IDLE, None),
    "template": (LIVE, None),
    "migrate": (LIVE, None),
}

_HINTS: dict[Status, str] = {
    Status.CREATING: "wait a moment, another ovt command is at work on it",
    Status.CREATED: "ovt start {name}",
    Status.RUNNING: "ovt stop {name}",
    Status.PAUSED: "ovt resume {name}",
    Status.RESTARTING: "ovt stop {name}",
    Status.STOPPED: "ovt start {name}",
    Status.SAVED: "ovt start {name}",
    Status.BROKEN: "ovt check --fix, or ovt delete --force {name}",
}
_VERB_HINTS: dict[tuple[str, Status], str] = {
    ("start", Status.PAUSED): "ovt resume {name}",
    ("start", Status.RUNNING): "ovt restart {name}",
    ("pause", Status.PAUSED): "ovt resume {name}",
    ("resume", Status.RUNNING): "ovt pause {name}",
    ("delete", Status.RUNNING): "ovt stop {name}, or ovt delete --force {name}",
    ("delete", Status.PAUSED): "ovt delete --force {name}",
    ("delete", Status.RESTARTING): "ovt stop {name}, or ovt delete --force {name}",
}


def require(verb: str, name: str, status: Status) -> None:
    """Raise StateError with the next step as hint unless `verb` is allowed in `status`."""
    if status not in TRANSITIONS[verb][0]:
        hint = _VERB_HINTS.get((verb, status)) or _HINTS[status]
        raise StateError(f"it is {status.value}", hint.format(name=name))


def pack(record: Any) -> dict[str, Any]:
    """The JSON object of a NamedTuple: nested records become objects, defaults are left out."""
    result: dict[str, Any] = {}
    for name, value in zip(record._fields, record, strict=True):
        if name in record._field_defaults and value == record._field_defaults[name]:
            continue
        if hasattr(value, "_fields"):
            value = pack(value)
        elif isinstance(value, tuple):
            value = [pack(item) if hasattr(item, "_fields") else item for item in value]
        result[name] = value
    return result


class Limits(NamedTuple):
    """Resource limits; 0 or an empty string means no limit. Sizes in bytes."""

    cpus: float = 0.0  # processors' worth of time
    cpuset_cpus: str = ""  # processors it may run on, in the kernel's list format, "0-3,6"
    memory: int = 0
    memory_swap: int = 0  # memory and swap together; -1 for unlimited swap
    pids: int = 0

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


RESTART_POLICIES = ("no", "on-failure", "always", "unless-stopped")


class Restart(NamedTuple):
    """When to start an instance again after its program has ended by itself."""

    policy: str = "no"  # no | on-failure | always | unless-stopped
    maximum: int = 0  # on-failure only: so many tries, 0 for no end

    @classmethod
    def parse(cls, text: str) -> Restart:
        """From `no`, `always`, `unless-stopped`, `on-failure` or `on-failure:5`."""
        policy, colon, count = text.partition(":")
        if policy not in RESTART_POLICIES or (colon and (policy != "on-failure" or not count.isdigit())):
            raise UsageError(
                f"restart policy {text!r} is not known", "one of no, on-failure[:N], always, unless-stopped"
            )
        return cls(policy, int(count) if colon else 0)

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Restart:
        return cls(**data)

    def wants(self, exit_code: int, restarts: int) -> bool:
        """Whether to start again, after `restarts` earlier restarts, when the program ended with `exit_code`."""
        if self.policy == "on-failure":
            return exit_code != 0 and (not self.maximum or restarts < self.maximum)
        return self.policy in {"always", "unless-stopped"}

    def __str__(self) -> str:
        return f"{self.policy}:{self.maximum}" if self.maximum else self.policy


class Volume(NamedTuple):
    """A host path (or a fresh tmpfs, when `source` is empty) shown inside the instance at `target`."""

    source: str
    target: str
    options: tuple[str, ...] = ()

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Volume:
        return cls(data["source"], data["target"], tuple(data.get("options", ())))


class Device(NamedTuple):
    """A host device node shown inside the instance; `permissions` of r(ead), w(rite), m(knod)."""

    source: str
    target: str
    permissions: str = "rwm"

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Device:
        return cls(**data)


class Ulimit(NamedTuple):
    """One resource limit of setrlimit(2): `name` without RLIMIT_, lower case; -1 for unlimited."""

    name: str
    soft: int
    hard: int

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Ulimit:
        return cls(**data)


class Security(NamedTuple):
    """How far the guest is kept from the host."""

    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    seccomp: str = ""  # a profile's path, or "unconfined"; empty for the default profile
    apparmor: str = ""
    label: tuple[str, ...] = ()  # SELinux: user:, role:, type:, level: or disable
    no_new_privileges: bool = False
    userns: str = ""  # "auto": a user namespace with a range of ids of its own

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Security:
        lists: dict[str, Any] = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists})


_TUPLES = ("entrypoint", "command", "env", "sysctls", "add_hosts")
_NO_MACHINE = Machine()


class Spec(NamedTuple):
    """What the owner of an instance asked for. Pairs are `KEY=VALUE` strings; sizes in bytes, times in seconds."""

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None  # None: the image's; empty: none
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    tty: bool = False
    stdin: bool = False
    hostname: str = ""
    network: str = "none"
    add_hosts: tuple[str, ...] = ()
    init: bool = False
    read_only: bool = False
    volumes: tuple[Volume, ...] = ()
    devices: tuple[Device, ...] = ()
    ulimits: tuple[Ulimit, ...] = ()
    sysctls: tuple[str, ...] = ()
    shm_size: int = 64 << 20
    limits: Limits = Limits()
    security: Security = Security()
    restart: Restart = Restart()
    auto_remove: bool = False
    stop_signal: int = 0  # 0: the image's, or TERM
    stop_timeout: float = 10.0
    rootfs_in_place: bool = False  # run on the image directory itself instead of on a layer above it
    machine: Machine = _NO_MACHINE  # of a virtual machine only
    boot_order: int = 0  # at the start of the host: the higher ones first
    boot_delay: float = 0.0  # seconds that the next one waits for this one then

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Spec:
        data = dict(data)
        for name in _TUPLES:
            if data.get(name) is not None:
                data[name] = tuple(data[name])
        for name, record in (("volumes", Volume), ("devices", Device), ("ulimits", Ulimit)):
            if name in data:
                data[name] = tuple(record.unpack(item) for item in data[name])
        for name, part in (("limits", Limits), ("security", Security), ("restart", Restart), ("machine", Machine)):
            if name in data:
                data[name] = part.unpack(data[name])
        return cls(**data)


class Instance(NamedTuple):
    """One guest. Times are seconds since the epoch, 0 for never; a pid always stands beside its start time (clock
    ticks since boot, field 22 of /proc/PID/stat), so that a reused pid is never taken for it."""

    id: str
    name: str
    kind: Kind
    created: float
    spec: Spec
    status: Status = Status.CREATED  # as last written; `Store.observe` sees deaths that nobody has written yet
    pid: int = 0  # the guest's first process, or the command at work while CREATING or RESTARTING
    start_time: int = 0
    supervisor_pid: int = 0
    supervisor_start_time: int = 0
    started: float = 0.0
    finished: float = 0.0
    exit_code: int = -1  # of the last run, 128 + n for signal n; -1 before the first
    oom_killed: bool = False
    restarts: int = 0  # by the policy, since the last start by hand
    restart_at: float = 0.0
    stop_wanted: bool = False  # stopped by hand: the restart policy keeps still
    error: str = ""  # why the last start failed
    labels: dict[str, str] = {}
    rootfs: dict[str, Any] = {}  # how the engine finds the root file system; private to the engine

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Instance:
        return cls(
            **{
                **data,
                "kind": Kind(data["kind"]),
                "status": Status(data.get("status", Status.CREATED)),
                "spec": Spec.unpack(data["spec"]),
            }
        )


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
ID_LENGTH = 12


def check_name(name: str) -> str:
    """`name` if it follows the host-name rule (RFC 1123: dotted labels of letters, digits and inner hyphens), is at
    most 64 characters and cannot be taken for an id; UsageError otherwise."""
    labels = name.split(".")
    good = 0 < len(name) <= 64 and all(
        0 < len(label) <= 63 and _NAME_CHARACTERS.issuperset(label) and label[0] != "-" and label[-1] != "-"
        for label in labels
    )
    if not good:
        raise UsageError(
            f"name {name!r} is not a host name",
            "letters, digits and inner hyphens, dots between labels, at most 64 characters",
        )
    if is_id(name):
        raise UsageError(f"name {name!r} looks like an id", "choose one that is not twelve hexadecimal digits")
    return name


def is_id(text: str) -> bool:
    """Whether `text` has the form of an instance's id."""
    return len(text) == ID_LENGTH and all(c in "0123456789abcdef" for c in text)


def retry_delay(restarts: int) -> float:
    """Seconds to wait before restart number `restarts` (from 0): doubling from 0.1 s, at most a minute."""
    return float(min(60.0, 0.1 * 2 ** min(restarts, 16)))


_FIRST = (
    "amber bold brave bright brisk calm clear clever cool cosy crisp curious eager early fair fast fine fond fresh "
    "gentle glad golden grand green happy honest keen kind light lively lucky mellow merry mild neat nimble noble "
    "patient plain proud quick quiet ready rosy sharp silver smooth snug solid sturdy sunny swift tidy warm wise"
)
_SECOND = (
    "acorn anchor apple arrow badger beacon birch bridge brook cedar cliff clover comet coral crane creek dune eagle "
    "ember falcon fern finch forest fox garden grove harbor hazel heron hill island kestrel lake lantern maple "
    "meadow moss oak otter owl peak pebble pine plum pond quartz raven reef river robin sparrow spring stone summit "
    "thistle tulip valley willow wren"
)


def made_up_name(number: int) -> str:
    """A name such as `quiet-otter`, picked by `number`."""
    first, second = _FIRST.split(), _SECOND.split()
    return f"{first[number % len(first)]}-{second[number // len(first) % len(second)]}"
