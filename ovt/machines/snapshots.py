"""Snapshots by an instance's name: the verbs that lock, ask whether it may be, act and write the journal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ovt.engine.vm import attached, clones, identity, snapshots
from ovt.engine.vm.agent import Agent, port_open
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.engine.vm.snapshot_changes import read, recover
from ovt.engine.vm.snapshot_tree import Snapshot
from ovt.engine.vm.snapshots import Report, silent
from ovt.errors import StateError, UsageError
from ovt.model import IDLE, LIVE, Instance, Kind, Status, require

if TYPE_CHECKING:
    from ovt.host import Host

_SLOW_SYNC = 15.0  # seconds for an agent under emulation


def create(
    host: Host,
    reference: str,
    name: str = "",
    *,
    description: str = "",
    memory: bool = False,
    quiesce: bool = False,
    freeze_timeout: float = 30.0,
    report: Report = silent,
) -> Snapshot:
    """Take a snapshot of a machine, alive or not; see ovt.engine.vm.snapshots.take. `freeze_timeout` in seconds."""
    with opened(host, "snapshot", reference) as (instance, home, qmp):
        snapshot = take(
            host,
            home,
            qmp,
            name,
            description=description,
            memory=memory,
            quiesce=quiesce,
            freeze_timeout=freeze_timeout,
            report=report,
        )
    host.journal.write("snapshot", instance.id, instance.name, snapshot=snapshot.name)
    return snapshot


def take(
    host: Host,
    home: str,
    qmp: Qmp | None,
    name: str,
    *,
    quiesce: bool = False,
    description: str = "",
    memory: bool = False,
    freeze_timeout: float = 30.0,
    temporary: bool = False,
    report: Report = silent,
) -> Snapshot:
    """The same of a machine that is `opened`."""
    agent = None
    if quiesce:
        if qmp is None:
            raise UsageError("it is not running: its file systems are at rest", "leave out --quiesce")
        agent = _agent(home, qmp)
    return snapshots.take(
        home,
        qmp,
        host.vms.features,
        name,
        description=description,
        memory=memory,
        agent=agent,
        freeze_timeout=freeze_timeout,
        temporary=temporary,
        report=report,
    )


def listing(host: Host, reference: str) -> list[dict[str, Any]]:
    """All snapshots of a machine, parents before children; see ovt.engine.vm.snapshots.listing."""
    return snapshots.listing(_home(host, reference))


def drawing(host: Host, reference: str, label: dict[int, str]) -> list[str]:
    """The tree of snapshots as text; see snapshot_tree.draw."""
    from ovt.engine.vm.snapshot_tree import draw

    return draw(read(_home(host, reference)), label)


def show(host: Host, reference: str, name: str) -> dict[str, Any]:
    """One snapshot with the hardware that it is of; NotFound."""
    home = _home(host, reference)
    snapshot = read(home).find(name)
    entry = next(entry for entry in snapshots.listing(home) if entry["number"] == snapshot.number)
    return {**entry, "hardware": snapshot.hardware}


def lost(host: Host, reference: str) -> str:
    """What `restore` would throw away, in words."""
    return snapshots.lost(_home(host, reference))


def restore(
    host: Host, reference: str, name: str, *, force: bool = False, keep: str | None = None, report: Report = silent
) -> Snapshot:
    """Take a machine back to a snapshot; what it has become since is lost, unless `keep` names a snapshot of that to
    make before (empty: a name is made up).

    One that is alive is killed, with `force`, and started again; StateError without it.
    """
    instance, status = host.get(reference)
    _machine(instance, "snapshot")
    home = host.store.home(instance.id)
    read(home).find(name)
    alive = status in LIVE
    if alive and not force:
        raise StateError("it is running, and going back would end it", f"ovt stop {instance.name}, or --force")
    if alive and instance.spec.auto_remove:
        raise StateError("it is removed as soon as it stops (--rm)", f"ovt clone --snapshot {name} {instance.name} NEW")
    if keep is not None:
        create(host, instance.id, keep, description=f"before going back to {name}", report=report)
    if alive:
        host.stop(instance.id, 0.0)
    with host.store.locked(instance.id) as fresh:
        if host.store.observe(fresh) not in IDLE:
            raise StateError("it has been started meanwhile", "try again")
        host.vms.cleanup(fresh, home)
        generation = identity.rewound(Hardware.load(home)).generation
        snapshot = snapshots.restore(home, name, generation)
        ended = Status.SAVED if snapshot.memory else Status.STOPPED
        host.store.save(fresh._replace(status=ended, pid=0, start_time=0, restart_at=0.0), durable=True)
    host.journal.write("restore", instance.id, instance.name, snapshot=name)
    if alive:
        host.start(instance.id)
    return snapshot


def delete(host: Host, reference: str, name: str, report: Report = silent) -> Snapshot:
    """Delete a snapshot, also of a machine that runs; see ovt.engine.vm.snapshots.delete."""
    with opened(host, "snapshot", reference) as (instance, home, qmp):
        snapshot = snapshots.delete(home, qmp, name, report)
    host.journal.write("snapshot-delete", instance.id, instance.name, snapshot=name)
    return snapshot


@contextmanager
def opened(host: Host, verb: str, reference: str) -> Iterator[tuple[Instance, str, Qmp | None]]:
    """The locked instance, its home and, if it is alive, a connection to QEMU; what a killed command has left of its
    snapshots is put in order before."""
    with host.store.locked(reference) as instance:
        _machine(instance, verb)
        status = host.store.observe(instance)
        require(verb, instance.name, status)
        home = host.store.home(instance.id)
        if status in LIVE:
            with host.vms.qmp(instance) as qmp:
                tidy(home, qmp)
                attached.settle(qmp, home, instance.started)
                yield instance, home, qmp
        else:
            host.vms.cleanup(instance, home)
            tidy(home, None)
            yield instance, home, None


def tidy(home: str, qmp: Qmp | None) -> None:
    """Finish what a killed command began, and delete snapshots that were taken for copies that are done."""
    if not os.path.exists(f"{home}/snapshots/tree.json"):
        return
    recover(home, qmp)
    for snapshot in clones.prune(home).snapshots:
        if snapshot.temporary and not snapshot.dependants:  # of a copy that was killed
            snapshots.delete(home, qmp, snapshot.name)


def _machine(instance: Instance, verb: str) -> None:
    if instance.kind is not Kind.VM:
        raise UsageError(f"it is a container, and {verb} is for virtual machines", "ovt ps shows which is which")


def _home(host: Host, reference: str) -> str:
    instance, _ = host.get(reference)
    _machine(instance, "snapshot")
    return host.store.home(instance.id)


def _agent(home: str, qmp: Qmp) -> Agent:
    """The guest's agent, asked after through the connection that is there: QEMU serves one at a time."""
    slow = Hardware.load(home).accel == "tcg"
    return Agent(home, sync_timeout=_SLOW_SYNC if slow else 3.0, is_open=lambda: port_open(qmp))
