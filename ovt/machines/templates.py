"""Templates of booted guests, and forks of them: machines that go on at once where the template was taken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ovt.engine.vm import forks, identity, nics
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.memory_state import Progress
from ovt.engine.vm.template import Template, Templates
from ovt.errors import Conflict, UsageError
from ovt.model import Instance, Kind, Limits, Spec, check_name, made_up_name, require

if TYPE_CHECKING:
    from ovt.host import Host

_BOOT_SECONDS = 300.0


def take(host: Host, reference: str, name: str = "", progress: Progress | None = None) -> Template:
    """Keep a running, ready guest as the template `name` (the instance's own when not given); the guest goes on.

    Conflict when the name is taken, NoAgent when the guest is not up, StateError for one that shares something with the
    host that no copy can have.
    """
    with host.store.locked(reference) as instance:
        if instance.kind is not Kind.VM:
            raise UsageError("it is a container, and templates are of virtual machines")
        require("template", instance.name, host.store.observe(instance))
        name = name or instance.name
        with Templates(host.data).new(name) as building:
            made = forks.take(host.vms, instance, host.store.home(instance.id), building, name, progress)
    host.journal.write("template", instance.id, instance.name, template=name)
    return made


def of_image(
    host: Host,
    image: str,
    name: str = "",
    *,
    memory: int = 0,
    cpus: float = 0.0,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Template:
    """Boot a guest of an image that waits for a program to run, and keep it as a template; `run` of the image forks it.

    Only the built-in image has such a guest. The instance it is taken from is removed.
    """
    from ovt.image import BUSYBOX
    from ovt.machines import power

    if image != BUSYBOX:
        raise UsageError(f"only a guest of {BUSYBOX} waits for a program", "boot the image, then: ovt template VM")
    name = check_name(name or image)
    if os.path.lexists(Templates(host.data).home(name)):
        raise Conflict(f"there is a template {name!r} already", f"ovt template delete {name}, or another name")
    spec = Spec(image, network="user", limits=Limits(cpus=cpus, memory=memory))
    engine = host.vms
    spec, rootfs = engine.prepare(spec)
    rootfs.pop("template", None)
    instance = _add(host, spec._replace(command=()), {**rootfs, "idle": True}, "")
    try:
        host.start(instance.id)
        power.wait_for(host, instance.id, "agent", _BOOT_SECONDS, report)
        return take(host, instance.id, name, progress)
    finally:
        host.delete(instance.id, force=True)


def fork(host: Host, template: str, name: str = "", command: Sequence[str] = ()) -> Instance:
    """A new machine, running, that goes on where the template was taken, with an identity of its own.

    `command` is for a guest that waits for a program: UsageError for another one, whose program goes on.
    """
    templates = Templates(host.data)
    with templates.held(template) as chosen:
        source = forks.source_of(templates, template)
        spec: Spec = source["spec"]
        rootfs: dict[str, Any] = source["rootfs"]
        if command and not rootfs.get("idle"):
            raise UsageError(
                "its guest runs a program already, and goes on with that", "leave the command out, and use ovt exec"
            )
        hardware = Hardware.unpack(chosen.hardware)
        who = identity.fresh(len(spec.machine.nics), vsock=bool(hardware.cid))
        cards = tuple(nic._replace(mac=nics.new_mac()) for nic in spec.machine.nics)
        machine = spec.machine._replace(nics=cards)
        spec = spec._replace(machine=machine, command=tuple(command) or spec.command, auto_remove=False)
        instance = _add(host, spec, {**rootfs, **who.kept(), "template": template}, name)
    try:
        return host.start(instance.id)
    except BaseException:
        host.delete(instance.id, force=True)
        raise


def users(host: Host, name: str) -> list[str]:
    """The names of the instances that stand on a template."""
    return sorted(instance.name for instance in host.store.load_all() if instance.rootfs.get("template") == name)


def delete(host: Host, name: str) -> None:
    """Remove a template; Conflict while instances stand on it."""
    Templates(host.data).delete(name, lambda: users(host, name))
    host.journal.write("template-delete", "", name)


def _add(host: Host, spec: Spec, rootfs: dict[str, Any], name: str) -> Instance:
    if name:
        check_name(name)
    for _ in range(20):
        chosen = name or made_up_name(int.from_bytes(os.urandom(4), "little"))
        instance = Instance(os.urandom(6).hex(), chosen, Kind.VM, time.time(), spec, rootfs=rootfs)
        try:
            host.store.add(instance)
        except Conflict:
            if name:
                raise
            continue
        host.journal.write("create", instance.id, instance.name, image=spec.image)
        return instance
    raise Conflict("no free name was found in twenty tries", "give one")


def leftovers(host: Host, remove: bool = False) -> list[str]:
    """What a killed command has left half-made or half-removed."""
    return Templates(host.data).leftovers(remove)
