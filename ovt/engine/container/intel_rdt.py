"""linux.intelRdt: cache and memory bandwidth allocation, where the host has resctrl mounted."""

from __future__ import annotations

import posix

from ovt.errors import HostError, refused
from ovt.kernel import procfs

from .state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def apply(state: State, config: dict[str, Any], pid: int) -> None:
    """Put `pid` into the class of service the configuration names, making it with its schemata if it is ours."""
    mount = _mount_point()
    name = config.get("closID") or state.id
    directory = f"{mount}/{name}" if name != "/" else mount
    schemata = [*(config.get("schemata") or [])]
    schemata += [line for line in (config.get("l3CacheSchema"), config.get("memBwSchema")) if line]
    ours = False
    try:
        posix.mkdir(directory, 0o755)
        ours = True
    except FileExistsError:
        if config.get("closID") and not schemata:
            pass
    except OSError as error:
        raise refused(f"linux.intelRdt: make {directory}", error) from None
    state.record["intelRdt"] = {"directory": directory, "remove": ours}
    state.save()
    try:
        for line in schemata:
            procfs.write(f"{directory}/schemata", f"{line}\n")
        procfs.write(f"{directory}/tasks", str(pid))
        if config.get("enableMonitoring"):
            group = f"{directory}/mon_groups/{state.id}"
            posix.mkdir(group, 0o755)
            state.record["intelRdt"]["monitoring"] = group
            procfs.write(f"{group}/tasks", str(pid))
    except OSError as error:
        raise refused(f"linux.intelRdt: write {directory}", error, _last_status(mount)) from None


def update(state: State, schemata: list[str]) -> None:
    """Change the schemata of the container's class of service."""
    record = state.record.get("intelRdt")
    if not record:
        raise HostError(f"container {state.id} has no linux.intelRdt to update")
    try:
        for line in schemata:
            procfs.write(f"{record['directory']}/schemata", f"{line}\n")
    except OSError as error:
        raise refused(f"linux.intelRdt: write {record['directory']}/schemata", error) from None


def remove(record: dict[str, Any]) -> None:
    """Remove the groups that `apply` made."""
    for path in (record.get("monitoring"), record["directory"] if record["remove"] else None):
        if path:
            try:
                posix.rmdir(path)
            except FileNotFoundError:
                pass


def _mount_point() -> str:
    for line in procfs.read("/proc/self/mountinfo").split("\n"):
        fields = line.split(" - ")
        if len(fields) == 2 and fields[1].startswith("resctrl "):
            return fields[0].split(" ")[4]
    raise HostError(
        "linux.intelRdt: resctrl is not mounted", hint="mount -t resctrl resctrl /sys/fs/resctrl (needs a CPU with RDT)"
    )


def _last_status(mount: str) -> str:
    try:
        return procfs.read(f"{mount}/info/last_cmd_status").strip()
    except OSError:
        return ""
