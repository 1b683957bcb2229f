"""Clones: new instances from a machine or one of its snapshots, each with an identity of its own."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from ovt.engine.vm import clones, identity
from ovt.engine.vm import seed as cloud_init
from ovt.engine.vm.devices import SEED
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.snapshot_changes import read
from ovt.engine.vm.snapshot_tree import Snapshot
from ovt.engine.vm.snapshots import Report, silent
from ovt.errors import NotFound, OvtError, StateError
from ovt.kernel import procfs
from ovt.machines.snapshots import opened, take, tidy
from ovt.model import Instance, Kind, Spec, Status, check_name, made_up_name

if TYPE_CHECKING:
    from ovt.host import Host

HALF_MADE = "half_made"  # in Instance.rootfs until the clone has all its files


def clone(
    host: Host,
    reference: str,
    name: str = "",
    *,
    linked: bool = False,
    snapshot: str = "",
    quiesce: bool = False,
    report: Report = silent,
) -> Instance:
    """Make a new machine, not started, from a snapshot, or from the present state of one that may be running.

    A full clone (the default) has images of its own and needs nothing of its source; a linked one takes no time and no
    space, and keeps the snapshot that it stands on from being deleted. Without `snapshot` one is taken: for a full
    clone only for as long as it is copied from. Conflict when the name is taken. A command that is killed leaves an
    instance that is broken, which `ovt check --fix` and `delete --force` remove.
    """
    if name:
        check_name(name)
    name = name or made_up_name(int.from_bytes(os.urandom(4), "little"))
    with opened(host, "clone", reference) as (source, home, qmp):
        if linked and source.spec.auto_remove:
            raise StateError("it is removed as soon as it stops (--rm), and its disks with it", "leave out --linked")
        own = os.getpid()
        instance = Instance(
            os.urandom(6).hex(),
            name,
            Kind.VM,
            time.time(),
            source.spec,
            status=Status.CREATING,
            pid=own,
            start_time=procfs.start_time(own) or 0,
            labels=dict(source.labels),
            rootfs={HALF_MADE: True},
        )
        host.store.add(instance)  # first: nobody takes its mark on the snapshot for one of a clone that has gone
        try:
            if snapshot:
                chosen = read(home).find(snapshot)
            else:
                text = f"for the {'linked ' if linked else ''}clone {name}"
                free = _free_name(home, f"clone-{name}")
                # it goes when nothing stands on it any more
                chosen = take(host, home, qmp, free, description=text, quiesce=quiesce, temporary=True, report=report)
            clones.pin(home, read(home), chosen, instance.id, name)
        except BaseException:
            host.store.remove(instance)
            raise
    try:
        with host.store.locked(instance.id):
            try:
                instance = _fill(host, instance, source, home, chosen, linked, report)
            except BaseException:
                host.store.remove(instance)
                raise
    finally:
        if not linked or not os.path.isdir(host.store.home(instance.id)):
            _let_go(host, source, chosen.number, instance.id)
    host.journal.write("clone", instance.id, name, source=source.name, linked=linked)
    return instance


def _let_go(host: Host, source: Instance, number: int, id: str) -> None:
    """The clone needs the snapshot no more; one that was taken for it goes. That a full disk keeps it from going is
    no failure of the clone: it is tried again with the next change."""
    try:
        with opened(host, "clone", source.id) as (_, home, qmp):
            clones.unpin(home, number, id)
            tidy(home, qmp)
    except OvtError as error:
        host.report(f"the snapshot that was copied stays in {source.name} for now: {error}")


def _fill(
    host: Host, instance: Instance, source: Instance, home: str, snapshot: Snapshot, linked: bool, report: Report
) -> Instance:
    new = host.store.home(instance.id)
    frozen = Hardware.unpack(snapshot.hardware)
    cids, macs = _taken(host)
    who = identity.fresh(len(frozen.nics), vsock=bool(frozen.cid), cids=cids, macs=macs)
    hardware = identity.renew(frozen, who)
    clones.build(home, snapshot, new, hardware, linked=linked, report=report)
    spec = _renewed(source.spec, instance.id, who.macs)
    if spec.machine.seed is not None and os.path.exists(f"{new}/{SEED}"):
        text = cloud_init.make(spec.machine.seed, spec.hostname or instance.name, f"ovt-{instance.id}")
        with open(f"{new}/{SEED}", "wb") as file:
            file.write(text)
    rootfs = {key: value for key, value in source.rootfs.items() if key != "guest"}
    done = instance._replace(status=Status.CREATED, pid=0, start_time=0, spec=spec, rootfs={**rootfs, **who.kept()})
    return host.store.save(done, durable=True)


def _renewed(spec: Spec, id: str, macs: tuple[str, ...]) -> Spec:
    """What its owner asked for, with the clone's own addresses and instance-id."""
    machine = spec.machine
    if len(macs) == len(machine.nics):
        cards = tuple(nic._replace(mac=mac) for nic, mac in zip(machine.nics, macs, strict=True))
        machine = machine._replace(nics=cards)
    if machine.seed is not None:
        machine = machine._replace(seed=identity.reseeded(machine.seed, id))
    return spec._replace(machine=machine, auto_remove=False)


def _taken(host: Host) -> tuple[set[int], set[str]]:
    """The vsock and network addresses of the machines of this host."""
    cids: set[int] = set()
    macs: set[str] = set()
    for id in host.store.ids():
        try:
            hardware = Hardware.load(host.store.home(id))
        except NotFound:
            continue
        except OvtError:  # a damaged one: random addresses meet its own by no chance worth speaking of
            continue
        cids.add(hardware.cid)
        macs.update(str(nic["mac"]) for nic in hardware.nics if nic.get("mac"))
    return cids, macs


def _free_name(home: str, wanted: str) -> str:
    names = {snapshot.name for snapshot in read(home).snapshots}
    tries = (f"{wanted[:56]}-{number}" if number > 1 else wanted[:60] for number in range(1, len(names) + 2))
    return next(name for name in tries if name not in names)
