"""linux.netDevices: host NICs lent to a container, and given back with their old name, MTU and MAC."""

from __future__ import annotations

import posix

from ovt.errors import OvtError
from ovt.kernel import netdevice

from .state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def move_in(state: State, devices: dict[str, dict[str, Any]], namespace: int) -> None:
    """Move `devices` (host name: {"name": name inside}) into the network namespace, recording each first."""
    moved: list[dict[str, Any]] = state.record.setdefault("netDevices", [])

    def announce(record: dict[str, Any]) -> None:
        moved.append(record)
        state.save()

    for name, wanted in devices.items():
        netdevice.move_device(name, namespace, (wanted or {}).get("name") or "", announce)
        state.save()


def undo(state: State, namespace: int) -> None:
    """After a failed creation: every device is back on the host as it was. The first failure is raised at the end."""
    remaining = state.record.get("netDevices") or []
    failure: OvtError | None = None
    for record in list(remaining):
        try:
            netdevice.undo_move(record, namespace)
            remaining.remove(record)
        except OvtError as error:
            failure = failure or error
    if failure:
        raise failure


def move_back(state: State) -> None:
    """Give every device that was moved its old identity back on the host; virtual ones end with the namespace."""
    namespace = -1
    if state.alive():
        try:
            namespace = posix.open(f"/proc/{state.pid}/ns/net", posix.O_RDONLY | posix.O_CLOEXEC)
        except OSError:
            pass  # the process is gone and the kernel has returned physical devices already
    try:
        remaining = state.record["netDevices"]
        failure: OvtError | None = None
        for record in list(remaining):
            try:
                netdevice.restore_device(record, namespace)
                remaining.remove(record)
                state.save()
            except OvtError as error:
                failure = error
        if failure:
            raise failure
    finally:
        if namespace >= 0:
            posix.close(namespace)
