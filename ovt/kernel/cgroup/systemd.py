"""A container's cgroup made by systemd: a transient scope, with the limits both as unit properties and in the files.

systemd owns the tree, so the scope is asked for over D-Bus (org.freedesktop.systemd1) together with the first process;
there is no cgroup before `attach`. From then on the files below are ours by Delegate=yes, and a V1 or V2 does the work.
"""

from __future__ import annotations

import posix

from ovt.errors import ConfigError, HostError, UsageError
from ovt.kernel.cgroup.base import SIGKILL, Cgroup, check_sub
from ovt.kernel.cgroup.dbus import Bus, DBusError, system_address, user_address
from ovt.kernel.cgroup.files import clean, read_or
from ovt.kernel.cgroup.hierarchy import Hierarchies
from ovt.kernel.cgroup.unit_properties import device_policy, from_annotations, limits
from ovt.kernel.cgroup.v1 import V1
from ovt.kernel.cgroup.v2 import V2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.kernel.cgroup.unit_properties import Property

_SERVICE = "org.freedesktop.systemd1"
_ROOT = "/org/freedesktop/systemd1"
_MANAGER = (_SERVICE, _ROOT, _SERVICE + ".Manager")
_SUBGROUP = "run.oci.systemd.subgroup"

_GONE = _SERVICE + ".NoSuchUnit"
_EXISTS = _SERVICE + ".UnitExists"
_UNKNOWN = ("org.freedesktop.DBus.Error.PropertyReadOnly", "org.freedesktop.DBus.Error.UnknownProperty")


def unit_of(cgroups_path: str, container_id: str, user: bool) -> tuple[str, str]:
    """(slice, unit) for linux.cgroupsPath `slice:prefix:name`; UsageError where it has another form."""
    if not cgroups_path:
        cgroups_path = f":ovt:{container_id}"
    parts = cgroups_path.split(":")
    if len(parts) != 3 or "/" in cgroups_path or not parts[2]:
        raise UsageError(
            'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, '
            f'got "{cgroups_path}" instead',
            "give a path such as system.slice:ovt:web, or leave --systemd-cgroup out",
        )
    slice_, prefix, name = parts
    slice_ = slice_ or ("user.slice" if user else "system.slice")
    slice_path(slice_)  # so that a bad name is found now
    if not name.endswith((".scope", ".slice")):
        name = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    if name.endswith(".slice"):
        raise UsageError(f"linux.cgroupsPath names the slice {name} as the container's own unit", "name a scope")
    return slice_, name


def slice_path(name: str) -> str:
    """The directories of a slice: `a-b.slice` is /a.slice/a-b.slice, `-.slice` the root. UsageError for bad names."""
    stem = name.removesuffix(".slice")
    if stem == "-" and name != stem:
        return ""
    parts = stem.split("-")
    if name == stem or "/" in name or not all(parts):
        raise UsageError(f"invalid slice name `{name}`", "a slice is named like machine.slice or a-b.slice")
    return "".join([f"/{'-'.join(parts[: count + 1])}.slice" for count in range(len(parts))])


class Systemd(Cgroup):
    """`inside` is the V1 or V2 of the scope, None before `attach`, for which `pending` and `lent` keep what was asked.

    `refused` says that a unit of that name is, or may be, somebody else's: systemd would not start the scope, or
    whoever made it was killed before its paths were recorded. Ours then ends with its last process.
    """

    __slots__ = (
        *("address", "bus", "inside", "lent", "listening", "mounts", "pending", "properties", "refused", "slice"),
        *("subgroup", "unit"),
    )

    manager = "systemd"

    def __init__(self, slice_: str, unit: str, address: str, mounts: Hierarchies) -> None:
        self.slice = slice_
        self.unit = unit
        self.address = address
        self.mounts = mounts
        self.subgroup = ""
        self.properties: list[Property] = []
        self.pending: dict[str, Any] | None = None
        self.lent: tuple[int, int, str] | None = None
        self.refused = False
        self.inside: V1 | V2 | None = None
        self.bus: Bus | None = None
        self.listening = False

    @classmethod
    def new(cls, cgroups_path: str, container_id: str, annotations: dict[str, str], mounts: Hierarchies) -> Systemd:
        """The scope to be for linux.cgroupsPath `slice:prefix:name`, with the annotations' properties."""
        user = posix.geteuid() != 0
        slice_, unit = unit_of(cgroups_path, container_id, user)
        group = cls(slice_, unit, user_address() if user else system_address(), mounts)
        group.properties = from_annotations(annotations)
        subgroup = annotations.get(_SUBGROUP, "")
        if ".." in subgroup.split("/"):
            raise ConfigError(f"$.annotations.{_SUBGROUP}", f"`..` components are not allowed in `{subgroup}`")
        group.subgroup = check_sub(subgroup)
        return group

    @property
    def mode(self) -> str:
        return self.inside.mode if self.inside else self.mounts.mode

    def record(self) -> dict[str, Any]:
        inside = self.inside.record() if self.inside else {"mode": self.mode, "paths": {}, "made": False}
        return {**inside, "manager": "systemd", "slice": self.slice, "unit": self.unit, "bus": self.address}

    @classmethod
    def restored(cls, record: dict[str, Any]) -> Systemd:
        """The object that gave `record`."""
        group = cls(record["slice"], record["unit"], record["bus"], Hierarchies())
        if record["paths"]:
            group.inside = V2.restored(record) if record["mode"] == "v2" else V1.restored(record)
        else:
            group.refused = True
        return group

    def _bus(self) -> Bus:
        if self.bus is None:
            self.bus = Bus(self.address)
        return self.bus

    def _listen(self) -> Bus:
        """The bus, with the ends of jobs passed on; asked for once, as systemd refuses a second time."""
        bus = self._bus()
        if not self.listening:
            bus.add_match(f"type='signal',sender='{_SERVICE}',interface='{_SERVICE}.Manager',member='JobRemoved'")
            bus.call(*_MANAGER, "Subscribe")
            self.listening = True
        return bus

    def create(self) -> None:
        """Only checks that systemd can be asked: the scope comes with its first process."""
        if self.mounts.mode == "none":
            raise HostError("no cgroup file system is mounted", 0, "mount one on /sys/fs/cgroup")
        self._bus()

    def attach(self, pid: int, sub: str = "", init: int = 0) -> None:
        if self.inside is None:
            self._start(pid)
            if self.lent:
                self.delegate(*self.lent)
            if not sub:
                return
        self._need().attach(pid, sub, init)

    def _start(self, pid: int) -> None:
        own: list[Property] = [
            ("Description", ("s", f"ovt container {self.unit}")),
            ("Slice", ("s", self.slice)),
            ("Delegate", ("b", True)),
            ("PIDs", ("au", [pid])),
            ("DefaultDependencies", ("b", False)),
            *((name, ("b", True)) for name in ("CPUAccounting", "MemoryAccounting", "TasksAccounting")),
            (("IOAccounting" if self.mode == "v2" else "BlockIOAccounting"), ("b", True)),
        ]
        resources = self.pending or {}
        wanted = limits(resources, self.mode) + device_policy(resources.get("devices"))
        self._start_scope(own + self.properties, wanted)
        control_group = self._control_group()
        self.inside = self._group(control_group + self.subgroup)
        self.inside.adopt()
        self.inside.attach(pid)
        if self.pending is not None:
            self.inside.apply(self.pending)

    def _start_scope(self, fixed: list[Property], wanted: list[Property]) -> None:
        bus = self._listen()
        reset = False
        while True:
            try:
                job = bus.call(
                    *_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", self.unit, "replace", fixed + wanted, []
                )[0]
                break
            except DBusError as error:
                kept = [entry for entry in wanted if not _named(error, entry[0])]
                if error.name in _UNKNOWN and len(kept) < len(wanted):
                    # An older systemd: the limit is written to the file anyway.
                    wanted = kept
                elif error.name == _EXISTS and not reset:
                    reset = True  # left behind failed by a container of that name
                    self._quietly("ResetFailedUnit", "s", self.unit)
                else:
                    self.refused = True
                    raise self._error("start", error) from error
        self._wait(job, "start")

    def _wait(self, job: str, verb: str) -> None:
        while True:
            _, path, _, result = self._bus().wait_signal("JobRemoved")
            if path == job:
                break
        if result not in ("done", "skipped"):
            raise HostError(
                f"systemd could not {verb} {self.unit}: the job ended as `{result}`",
                0,
                f"see: journalctl -u {self.unit}",
            )

    def _error(self, verb: str, error: DBusError) -> HostError:
        hint = f"see: systemctl status {self.unit}"
        if error.name == _EXISTS:
            hint = "choose another container name, or remove the one that has it"
        elif error.name.endswith((".AccessDenied", ".InteractiveAuthorizationRequired")):
            hint = "the bus or polkit forbids it: run as root, or use the user's own systemd"
        return HostError(f"systemd could not {verb} {self.unit}: {error} ({error.name})", 0, hint)

    def _quietly(self, method: str, signature: str, *body: Any) -> str:
        """Call a manager method for a unit that may be gone; its first value, or empty."""
        try:
            values = self._bus().call(*_MANAGER, method, signature, *body)
        except DBusError as error:
            if error.name == _GONE:
                return ""
            raise self._error(method, error) from error
        return values[0] if values else ""

    def _control_group(self) -> str:
        try:
            unit = self._bus().call(*_MANAGER, "GetUnit", "s", self.unit)[0]
            path: str = self._bus().call(
                _SERVICE, unit, "org.freedesktop.DBus.Properties", "Get", "ss", _SERVICE + ".Scope", "ControlGroup"
            )[0]
        except DBusError as error:
            raise self._error("find the cgroup of", error) from error
        return path or f"{slice_path(self.slice)}/{self.unit}"

    def _group(self, path: str) -> V1 | V2:
        path = clean(path)
        mounts = self.mounts
        if mounts.mode == "v2":
            assert mounts.unified is not None
            root = clean(mounts.roots.get(mounts.unified, "/"))
            return V2(mounts.unified, path.removeprefix(root))
        places = {name: mount for name, mount in mounts.v1.items() if name[:5] != "name=" or name == "name=systemd"}
        paths = {name: mount + path.removeprefix(clean(mounts.roots.get(mount, "/"))) for name, mount in places.items()}
        return V1(places, paths, (mounts.unified, path) if mounts.unified else None)

    def fd(self, sub: str = "", init: int = 0) -> int:
        return self.inside.fd(sub, init) if self.inside else -1

    def enter_fds(self, sub: str = "") -> list[int]:
        return self.inside.enter_fds(sub) if self.inside else []

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        if self.inside is None:
            self.pending = resources
            return
        resources = self._whole_bandwidth(resources)
        properties = limits(resources, self.mode)
        devices = not update or resources.get("devices") is not None
        if devices:
            properties += device_policy(resources.get("devices"))
        # systemd rewrites v1 device lists by denying all first; nobody must run into that gap.
        pause = devices and self.mode == "v1" and not self.frozen() and self.path_for("freezer") is not None
        if pause:
            self.freeze()
        try:
            self._set(properties)
        finally:
            if pause:
                self.thaw()
        self.inside.apply(resources, update=update)

    def _whole_bandwidth(self, resources: dict[str, Any]) -> dict[str, Any]:
        """`resources` where a CPU quota or period that comes alone has the other one with it, as it is in force.

        systemd knows a share of the processor's time, of which a change of either alone says nothing.
        """
        cpu = resources.get("cpu") or {}
        if bool(cpu.get("quota")) == bool(cpu.get("period")):
            return resources
        directory = self.path_for("cpu")
        if self.mode == "v2":
            quota, _, period = read_or(f"{directory}/cpu.max").strip().partition(" ")
        else:
            quota, period = [read_or(f"{directory}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if not (quota and period):
            return resources
        limit = cpu.get("quota") or int(quota.replace("max", "-1"))
        return {**resources, "cpu": {**cpu, "quota": limit, "period": cpu.get("period") or int(period)}}

    def _set(self, properties: list[Property]) -> None:
        while properties:
            try:
                self._bus().call(*_MANAGER, "SetUnitProperties", "sba(sv)", self.unit, True, properties)
                # systemd answers first and writes afterwards, rounded to its units and with its own device program.
                # Its next answer comes behind that: nothing is written over what is in the files from then on.
                self._bus().call(_SERVICE, _ROOT, "org.freedesktop.DBus.Peer", "Ping")
                return
            except DBusError as error:
                kept = [entry for entry in properties if not _named(error, entry[0])]
                if error.name not in _UNKNOWN or len(kept) == len(properties):
                    raise self._error("set properties of", error) from error
                properties = kept

    def pids(self, recursive: bool = True) -> list[int]:
        return self.inside.pids(recursive) if self.inside else []

    def _need(self) -> V1 | V2:
        if self.inside is None:
            raise HostError(f"the scope {self.unit} has not been started", 0, "create the container again")
        return self.inside

    def freeze(self) -> None:
        self._need().freeze()

    def thaw(self) -> None:
        self._need().thaw()

    def frozen(self) -> bool:
        return self.inside is not None and self.inside.frozen()

    def kill(self, signal: int = SIGKILL) -> None:
        if self.inside:
            self.inside.kill(signal)

    def remove(self) -> None:
        """Stop the unit, which by then holds nobody, and remove what is left of its directories."""
        if self.refused:
            if self.bus:
                self.bus.close()
                self.bus = None
                self.listening = False
            return
        bus = self._listen()
        if job := self._quietly("StopUnit", "ss", self.unit, "replace"):
            self._wait(job, "stop")
        self._quietly("ResetFailedUnit", "s", self.unit)
        if self.inside:
            self.inside.remove()
        bus.close()
        self.bus = None
        self.listening = False

    def path_for(self, controller: str) -> str | None:
        return self.inside.path_for(controller) if self.inside else None

    def delegate(self, uid: int, gid: int, sub: str = "") -> None:
        if self.inside is None:
            self.lent = (uid, gid, sub)
        else:
            self.inside.delegate(uid, gid, sub)


def _named(error: DBusError, name: str) -> bool:
    """Whether the message of `error` is about the property `name`."""
    return name in error.message.replace(",", " ").replace("'", " ").split()
