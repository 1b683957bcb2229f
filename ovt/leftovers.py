"""What killed commands leave behind, found and finished: half-made instances, guests that nobody watches, their traces.

A command that is at work holds its instance's lock: what is locked is never taken for a leftover.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from ovt.engine import supervised
from ovt.engine.base import Leftover
from ovt.errors import Conflict, NotFound
from ovt.model import LIVE, Instance, Kind, Spec, Status

if TYPE_CHECKING:
    from ovt.host import Host


def find(host: Host, fix: bool = False) -> list[Leftover]:
    """Everything left behind; with `fix` it is finished or taken away at once."""
    found = _unfinished(host, fix)
    damaged: list[str] = []
    for instance in host.store.load_all(damaged):
        try:
            with host.store.locked(instance.id, wait=False) as fresh:
                found += _of_instance(host, fresh, fix)
        except (Conflict, NotFound):
            continue  # being changed, or just deleted
    for id in damaged:
        found.append(Leftover("record", id, f"its record cannot be read: ovt delete --force {id} removes it"))
    from ovt.machines import templates

    found += [Leftover("template", path, "half made or half removed") for path in templates.leftovers(host, fix)]
    found += host.engine(Kind.CONTAINER).leftovers(lambda id: os.path.isdir(host.store.home(id)), fix)
    return found


def _unfinished(host: Host, fix: bool) -> list[Leftover]:
    found = []
    for path in host.store.unfinished():
        name = os.path.basename(path)
        if os.path.islink(path):
            found.append(Leftover("name", name, "no instance has it"))
            if fix:
                os.unlink(path)
            continue
        id = name.removeprefix(".new-").removeprefix(".gone-")
        half = "made" if name.startswith(".new-") else "removed"
        found.append(Leftover("instance", id, f"half {half}"))
        if fix:
            ghost = Instance(id, "", Kind.CONTAINER, 0.0, Spec(""))
            engine = host.engine(Kind.CONTAINER)
            engine.cleanup(ghost, path)
            engine.destroy(ghost, path)
            shutil.rmtree(path)
    return found


def _of_instance(host: Host, instance: Instance, fix: bool) -> list[Leftover]:
    """Only inside `locked`."""
    home = host.store.home(instance.id)
    status = host.store.observe(instance)

    def clean(new: Status) -> None:
        host.engine(instance.kind).cleanup(instance, home)
        host.store.save(instance._replace(status=new, pid=0, start_time=0))

    if instance.kind is Kind.VM and (moving := _moving(host, instance, fix)):
        return moving
    if status is Status.BROKEN and instance.rootfs.get("half_made"):

        def remove() -> None:
            host.engine(instance.kind).cleanup(instance, home)
            host.engine(instance.kind).destroy(instance, home)
            host.store.remove(instance)

        return _finish(instance, "half made: the command that made it was killed", fix, remove)
    if status is Status.BROKEN:
        new = Status.STOPPED if instance.started else Status.CREATED
        return _finish(instance, "the command that changed it was killed", fix, lambda: clean(new))
    if instance.status in LIVE and not _watched(home):
        reason = "its supervisor was killed while it ran" if status in LIVE else "nobody wrote down its end"
        if status in LIVE and instance.kind is Kind.VM:
            # nothing is taken from its guest: it goes on without a log, and saving it is the way to a new supervisor
            way = f"ovt save {instance.name}, then ovt start {instance.name}"
            return [Leftover("instance", instance.name, f"{reason}: {way}")]
        return _finish(instance, reason, fix, lambda: clean(Status.STOPPED))
    if status not in LIVE and instance.status not in LIVE and status is not Status.RESTARTING:
        if host.engine(instance.kind).status(instance) in {*LIVE, Status.CREATED}:
            return _finish(instance, f"it is {status.value}, and its container lives", fix, lambda: clean(status))
    return []


def _moving(host: Host, instance: Instance, fix: bool) -> list[Leftover]:
    """A migration, to here or from here, whose command was killed."""
    from ovt.machines import receive

    if receive.interrupted(host, instance):
        reason = "ovt receive was killed while it came in"
        if fix:
            reason = f"{reason}: {receive.repair(host, instance)}"
        return [Leftover("instance", instance.name, reason)]
    if os.path.exists(f"{host.store.home(instance.id)}/outgoing.json"):
        # whose it is now, only the other host can tell
        reason = f"ovt migrate was killed while it moved: ovt migrate --resolve {instance.name}"
        return [Leftover("instance", instance.name, reason)]
    return []


def _watched(home: str) -> bool:
    try:
        return supervised.alive(home)
    except NotFound:
        return False


def _finish(instance: Instance, reason: str, fix: bool, action: Callable[[], None]) -> list[Leftover]:
    if fix:
        action()
    return [Leftover("instance", instance.name, reason)]
