"""Templates and forks as the engine makes them: which QEMU is started for what, and in which order it is talked to.

A fork is a machine whose first start goes on from a template's memory, mapped copy-on-write, instead of booting. From
its next cold start on it is a machine like any other, on disks of its own above the template's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ovt.engine.base import Process
from ovt.engine.vm import agent_program, agent_verbs, diskrecords, guest_view, identity, memory_state, nics, template
from ovt.engine.vm.agent import NoAgent
from ovt.engine.vm.hardware import Hardware, replace_json
from ovt.engine.vm.memory_state import Progress, Saved
from ovt.engine.vm.qmp import Gone, Qmp
from ovt.engine.vm.template import Building, Template, Templates
from ovt.errors import OvtError, StateError
from ovt.image import disk as images
from ovt.model import Instance, Spec, pack

if TYPE_CHECKING:
    from ovt.engine.base import Guest
    from ovt.engine.vm.engine import VmEngine

SOURCE = "instance.json"  # beside the template's record: the spec and the private record of what it was made from
_UNPLUG_SECONDS = 30.0
_QUIT_SECONDS = 10.0
_READY_SECONDS = 5.0  # a guest that is up may be slow to say so
_GREETING_SECONDS = 30.0  # of an emulated guest on a loaded host


def find_idle(engine: VmEngine, spec: Spec) -> str:
    """The name of the newest template of the spec's image whose guest waits for a program to run; empty without one."""
    wanted = max(1, math.ceil(spec.limits.cpus or 1))
    for chosen in Templates(engine.data).all()[::-1]:
        hardware = chosen.hardware
        if chosen.image == spec.image and (hardware["memory"], hardware["vcpus"]) == (spec.limits.memory, wanted):
            if source_of(Templates(engine.data), chosen.name)["rootfs"].get("idle"):
                return chosen.name
    return ""


def source_of(templates: Templates, name: str) -> dict[str, Any]:
    """`spec` and `rootfs` of the instance that a template was made from; OvtError when that is not known."""
    path = f"{templates.home(name)}/{SOURCE}"
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        return {"spec": Spec.unpack(data["spec"]), "rootfs": dict(data["rootfs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OvtError(f"template {name} is damaged: {error}", f"ovt template delete {name}") from None


def take(
    engine: VmEngine, instance: Instance, home: str, building: Building, name: str, progress: Progress | None
) -> Template:
    """Make the files of a template from a running machine, which goes on. NoAgent for a guest that is not ready."""
    hardware = Hardware.load(home)
    _check(hardware)
    guest_view.wait(home, instance, _READY_SECONDS, lambda line: None)  # an unready guest makes no use of a template
    shared = not template.why_not_shared(hardware, engine.features)
    with engine.qmp(instance) as qmp, _without_cards(qmp, hardware):
        running = bool(qmp.command("query-status")["running"])
        try:
            with building.file("full" if shared else template.STATE) as state:
                saved = memory_state.save(qmp, engine.features, state, progress=progress)
            # in this state QEMU has written everything to the images and lets go of them
            kept = building.keep_disks(home, hardware)
        finally:
            if running:
                qmp.command("cont")
    kept.nics, kept.shares = [], []
    if shared:
        saved = _split(engine, instance, building, kept, saved)
        building.remove("full")
    rootfs = _without(instance.rootfs, "guest", "template")
    if instance.spec.command:
        rootfs.pop("idle", None)  # its program runs, and goes on in every fork
    source = {"spec": pack(instance.spec), "rootfs": rootfs}
    replace_json(f"{building.path}/{SOURCE}", source)
    return building.finish(
        template.record(name, kept, saved, image=instance.spec.image, source=instance.name, shared=shared)
    )


def _check(hardware: Hardware) -> None:
    if hardware.hostdevs:
        raise StateError("a device of the host is passed through to it, and no copy can have that", "detach it first")
    if hardware.shares:
        raise StateError(
            "it shares directories with the host, which are part of its memory's state", "detach them first"
        )


def _without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


@contextlib.contextmanager
def _without_cards(qmp: Qmp, hardware: Hardware) -> Iterator[None]:
    """Unplug the network cards meanwhile: else every fork would come up with the address of the first."""
    gone = []
    try:
        for nic in hardware.nics:
            nics.unplug(qmp, nic, _UNPLUG_SECONDS)
            gone.append(nic)
        yield
    finally:
        for nic in gone:
            nics.plug(qmp, hardware, nic)


def _split(engine: VmEngine, instance: Instance, building: Building, hardware: Hardware, saved: Saved) -> Saved:
    """Take the saved state apart in a QEMU of its own, in which the guest never runs."""
    home = f"{building.path}/split"
    os.mkdir(home, 0o700)
    own = hardware.copy()
    for disk in own.disks:
        disk["chain"] = _above(disk, home, {building.home: building.path})
    helper = instance._replace(id=os.urandom(6).hex(), name=f"{instance.name}-split")
    with (
        template.scratch(own) as memory,
        building.file(template.STATE) as devices,
        open(f"{building.path}/full", "rb") as full,
    ):
        result: list[Saved] = []
        job = engine.job(helper, home, own)
        job.incoming = True
        job.memory = memory
        guest = engine.start_machine(job, [], {})
        try:
            from ovt.engine.vm.process import running

            with running(home) as qmp:
                result.append(template.split(qmp, engine.features, full.fileno(), saved, devices))
                with contextlib.suppress(Gone):
                    qmp.command("quit")
        finally:
            _end(engine, helper, home, guest)
        building.keep_memory(memory)
    shutil.rmtree(home)
    return result[0]


def _end(engine: VmEngine, helper: Instance, home: str, guest: Guest) -> None:
    from ovt.engine import supervised

    with contextlib.suppress(TimeoutError, OvtError):
        supervised.wait(home, _QUIT_SECONDS)
    engine.containers.cleanup(helper._replace(pid=guest.pid, start_time=guest.start_time), home)


def _above(disk: dict[str, Any], home: str, moved: dict[str, str]) -> list[dict[str, Any]]:
    """The chain of a disk with a new image of the machine in `home` on top, unless nothing is written to it."""
    chain = [dict(layer) for layer in disk["chain"]]
    for layer in chain:
        for old, new in moved.items():
            if layer["path"].startswith(f"{old}/"):
                layer["path"] = new + layer["path"].removeprefix(old)
    if not chain or disk.get("readonly") or disk["device"] == "cdrom":
        return chain
    os.makedirs(f"{home}/{diskrecords.DIRECTORY}", exist_ok=True)
    path = f"{diskrecords.DIRECTORY}/{disk['id']}.qcow2"
    images.create_overlay(f"{home}/{path}", chain[-1]["path"], chain[-1]["format"])
    return [*chain, {"path": path, "format": "qcow2"}]


def start(
    engine: VmEngine,
    instance: Instance,
    home: str,
    exit_command: list[str],
    env: dict[str, str],
) -> Guest:
    """Start a machine at the template that its record names, up to where only `start` is missing.

    NotFound when the template is gone, OvtError when it is damaged.
    """
    templates = Templates(engine.data)
    with templates.held(instance.rootfs["template"]) as chosen:
        frozen = Hardware.unpack(chosen.hardware)
        who = identity.Identity(
            instance.rootfs["uuid"], instance.rootfs["generation"], instance.rootfs["cid"] if frozen.cid else 0
        )
        hardware = identity.renew(frozen, who)
        shutil.rmtree(f"{home}/{diskrecords.DIRECTORY}", ignore_errors=True)  # of a start that was killed
        for disk in hardware.disks:
            disk["chain"] = _above(disk, home, {})
        hardware.forked = True
        job = engine.job(instance, home, hardware)
        job.incoming = True
        job.memory = templates.open_memory(chosen)
        job.private_memory = job.memory >= 0
        cards = instance.spec.machine.nics
        plug: Callable[[Qmp], None] = job.plug

        def restore(qmp: Qmp) -> None:
            templates.fork(qmp, engine.features, chosen)
            for nic in cards:
                nics.plug(qmp, hardware, nics.add(hardware, nic), owner=instance.id, features=engine.features)
            hardware.save(home)

        job.plug, job.load = plug, restore
        job.host_network = nics.need_host_network(nic.network for nic in cards)
        try:
            return engine.start_machine(job, exit_command, env)
        finally:
            if job.memory >= 0:
                os.close(job.memory)


def introduce(engine: VmEngine, instance: Instance, home: str) -> None:
    """Tell a fork's guest who it is now, and what to run; a guest without an agent stays what the template was."""
    spec = instance.spec
    hostname = spec.hostname or instance.name
    connection = guest_view.agent(home)
    if instance.rootfs.get("builtin"):
        runs = instance.rootfs.get("idle") and spec.command
        program = Process(spec.command, spec.env, spec.workdir, spec.user, spec.tty) if runs else None
        # cards bring their addresses
        agent_program.introduce(connection, identity.guest_arguments(hostname), program, _GREETING_SECONDS)
        return
    try:
        agent_verbs.set_time(connection)
        words = ("env", *identity.guest_environment(hostname), "sh", "-c", identity.GUEST_SCRIPT)
        done = agent_program.collect(connection, words)
        if done.status:
            engine.report(f"{instance.name} kept the name of its template: {done.err.decode(errors='replace').strip()}")
    except NoAgent:
        engine.report(f"{instance.name} has no agent that could give it a name of its own: it kept its template's")
