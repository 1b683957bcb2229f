"""Everything that happened, in one stream: the journal of what ovt did, and what QEMU tells of its machines.

A machine's events come from its qmp.log, which its supervisor writes; they are there from the run before last on. Their
names are QMP's in lower case behind `vm-`: vm-guest-panicked, vm-shutdown, vm-reset, vm-block-io-error …
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ovt.journal import Parse, parsed
from ovt.model import Kind

if TYPE_CHECKING:
    from ovt.host import Host

_LOGS = ("qmp.log.1", "qmp.log")
# Of the others some come many times a second, and none says what happened to the machine.
_TOLD = frozenset({
    "BLOCK_IO_ERROR", "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "GUEST_CRASHLOADED", "GUEST_PANICKED",
    "MEMORY_DEVICE_SIZE_CHANGE", "MEMORY_FAILURE", "MIGRATION", "POWERDOWN", "RESET", "RESUME", "SHUTDOWN", "STOP",
    "SUSPEND", "VSERPORT_CHANGE", "WAKEUP", "WATCHDOG",
})  # fmt: skip


def read(host: Host, since: float = 0.0, until: float = 0.0, follow: bool = False) -> Iterator[dict[str, Any]]:
    """Events of the host and of its machines' guests; see Journal.read."""

    def machines() -> Iterator[tuple[str, Parse]]:
        for instance in host.store.load_all([]):
            if instance.kind is Kind.VM:
                for name in _LOGS:
                    path = f"{host.store.home(instance.id)}/{name}"
                    yield path, partial(_guests, id=instance.id, name=instance.name)

    return host.journal.read(since, until, follow, machines)


def _guests(line: bytes, id: str, name: str) -> dict[str, Any] | None:
    event = parsed(line)
    stamp = event.get("timestamp") if event else None
    if not event or event.get("event") not in _TOLD or not isinstance(stamp, dict):
        return None
    moment = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
    word = "vm-" + event["event"].lower().replace("_", "-")
    details = {key: value for key, value in (event.get("data") or {}).items() if key not in {"time", "event", "name"}}
    return {"time": moment, "event": word, **details, "id": id, "name": name}
