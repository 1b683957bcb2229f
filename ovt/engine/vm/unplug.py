"""Taking a device out of a running machine: asked of the guest, which may take its time, refuse, or not be there."""

from __future__ import annotations

from typing import Any

from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import StateError


def remove_device(qmp: Qmp, id: str, timeout: float, hint: str = "") -> None:
    """device_del, and wait at most `timeout` seconds until the guest has let go.

    A device that is gone already is no error. StateError with `hint` when the guest refuses or does not answer: then
    the device stays, and it may still go later.
    """
    for event in [event for event in qmp.events if event["event"] == "DEVICE_DELETED" and _of(event, id)]:
        qmp.events.remove(event)  # an earlier device of that name
    try:
        qmp.command("device_del", {"id": id})
    except QmpError as error:
        if error.error_class == "DeviceNotFound":
            return
        if "already in the process of unplug" not in error.message:
            raise
    try:
        event = qmp.wait_event(
            "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", timeout=timeout, where=lambda event: _of(event, id)
        )
    except TimeoutError:
        if not plugged(qmp, id):
            return
        raise StateError(
            f"the guest has not given {id} back in {timeout:g} seconds: it stays attached",
            hint or "try again; a guest that does not run or knows no hotplug never answers",
        ) from None
    if event["event"] != "DEVICE_DELETED":
        raise StateError(f"the guest refuses to give {id} back: it stays attached", hint)


def plugged(qmp: Qmp, id: str) -> bool:
    """Whether the machine has the device."""
    there = qmp.command("qom-list", {"path": "/machine/peripheral"})
    return any(entry["name"] == id for entry in there)


def _of(event: dict[str, Any], id: str) -> bool:
    return bool(event["data"].get("device") == id)
