"""The host: one object with every verb, for the command line and for programs; it composes store, journal and engine.

    host = Host()
    host.run("busybox", ["true"])                # 0, the exit status
    web = host.launch("busybox", ["httpd", "-f"], name="web")
    host.stop("web"); host.delete("web")

Every method takes a name, an id or a unique beginning of one. The order of each verb is chosen so that a kill -9 at
any point leaves what `list`, `delete` with force and `leftovers` can see and finish. Policy lives here and in
`ovt.exits`; how guests are made lives in the engine. Nothing is printed: `report` is given one line for slow steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ovt import exits, image
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, refused
from ovt.journal import Journal
from ovt.kernel import procfs
from ovt.model import IDLE, LIVE, Instance, Kind, Limits, Restart, Spec, Status, check_name, made_up_name, require
from ovt.roots import default_data, default_run
from ovt.store import Store

if TYPE_CHECKING:
    from ovt.engine.attach import Detached
    from ovt.engine.base import Engine, Leftover, Process, Stats
    from ovt.engine.guest_log import LogRecord
    from ovt.engine.vm.engine import VmEngine

_SIGKILL, _SIGTERM = 9, 15
_KILL_WAIT = 10.0  # seconds a killed guest may take to end


def _new_name() -> str:
    return made_up_name(int.from_bytes(os.urandom(4), "little"))


class Host:
    """The instances below `data`, with run-time state below `run`. Engines are made when they are first needed."""

    def __init__(
        self,
        data: str = "",
        run: str = "",
        *,
        engine: Engine | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.data = os.path.abspath(data or default_data())
        self.run_root = os.path.abspath(run or default_run())
        self.report = report
        self.store = Store(self.data)
        self.journal = Journal(self.data)
        self._engines: dict[Kind, Engine] = {engine.kind: engine} if engine else {}

    def engine(self, kind: Kind) -> Engine:
        """What runs guests of this kind."""
        if kind not in self._engines:
            from ovt.engine.container.engine import ContainerEngine

            os.makedirs(self.run_root, mode=0o700, exist_ok=True)
            if kind is Kind.VM:
                from ovt.engine.vm.engine import VmEngine

                containers = self.engine(Kind.CONTAINER)
                if not isinstance(containers, ContainerEngine):
                    containers = ContainerEngine(self.run_root, f"{self.data}/images", self.report)
                self._engines[kind] = VmEngine(containers, self.data, self.report)
            else:
                self._engines[kind] = ContainerEngine(self.run_root, f"{self.data}/images", self.report)
        return self._engines[kind]

    def _of(self, instance: Instance) -> Engine:
        return self.engine(instance.kind)

    @property
    def vms(self) -> VmEngine:
        """The engine of virtual machines, with what only machines can do."""
        from ovt.engine.vm.engine import VmEngine

        engine = self.engine(Kind.VM)
        assert isinstance(engine, VmEngine)
        return engine

    # instances come and go

    def create(
        self, spec: Spec, name: str = "", labels: Mapping[str, str] | None = None, kind: Kind | None = None
    ) -> Instance:
        """Keep a new instance, not started. Conflict when the name is taken; an empty name is made up.

        Without `kind` the image decides: a machine from a disk image, a container from everything else.
        """
        if name:
            check_name(name)
        kind = kind or image.kind(spec.image)
        spec, rootfs = self.engine(kind).prepare(spec)
        for _ in range(20):
            instance = Instance(
                os.urandom(6).hex(),
                name or _new_name(),
                kind,
                time.time(),
                spec,
                labels=dict(labels or {}),
                rootfs=rootfs,
            )
            try:
                self.store.add(instance)
            except Conflict:
                if name:
                    raise
                continue
            self.journal.write("create", instance.id, instance.name, image=spec.image)
            return instance
        raise Conflict("no free name was found in twenty tries", "give one with --name")

    def plan(self, spec: Spec, name: str = "", kind: Kind | None = None) -> list[str]:
        """What creating and starting such an instance would do, one line each."""
        kind = kind or image.kind(spec.image)
        engine = self.engine(kind)
        spec, rootfs = engine.prepare(spec)
        name = check_name(name) if name else _new_name()
        instance = Instance("0" * 12, name, kind, 0.0, spec, rootfs=rootfs)
        return [f"instance {name} in {self.store.instances}", *engine.plan(instance, self.store.home("ID"))]

    def delete(self, reference: str, force: bool = False) -> Instance | None:
        """Remove an instance; with `force` also one that is alive or damaged. The record, None for a damaged one."""
        try:
            with self.store.locked(reference) as instance:
                status = self.store.observe(instance)
                require("delete --force" if force else "delete", instance.name, status)
                if instance.kind is Kind.VM:
                    self._not_needed(instance)
                self._remove(instance)
                return instance
        except (NotFound, StateError, HostError):
            raise
        except OvtError:  # a damaged record
            if not force:
                raise
            id = self.store.resolve(reference)
            ghost = Instance(id, "", Kind.CONTAINER, 0.0, Spec(""))
            engine = self.engine(
                Kind.CONTAINER
            )  # a machine is a container as well, and its files go with the directory
            engine.cleanup(ghost, self.store.home(id))
            engine.destroy(ghost, self.store.home(id))
            self.store.discard(id)
            return None

    def _not_needed(self, instance: Instance) -> None:
        from ovt.engine.vm import clones

        if names := clones.dependants(self.store.home(instance.id)):
            raise StateError(f"linked clones stand on its disks: {', '.join(names)}", "delete those first")

    def _remove(self, instance: Instance) -> None:
        home = self.store.home(instance.id)
        self._of(instance).cleanup(instance, home)
        exits.wait_for_record(home, _KILL_WAIT)  # the supervisor writes there until then
        self._of(instance).destroy(instance, home)
        self.store.remove(instance)
        self.journal.write("delete", instance.id, instance.name)

    def rename(self, reference: str, name: str) -> Instance:
        """Give an instance another name; its host name stays what it was made with."""
        check_name(name)
        with self.store.locked(reference) as instance:
            require("rename", instance.name, self.store.observe(instance))
            renamed = self.store.rename(instance, name)
        self.journal.write("rename", renamed.id, name, old=instance.name)
        return renamed

    # life

    def start(self, reference: str) -> Instance:
        """Start an instance detached."""
        with self.store.locked(reference) as instance:
            require("start", instance.name, self.store.observe(instance))
            return self._go(self._make(instance, restarts=0))

    def start_attached(
        self, reference: str, stdin: int | None, lossless: bool = True, keys: str = ""
    ) -> int | Detached:
        """Start an instance joined to this process's streams; its exit status, or DETACHED after the detach keys."""
        from ovt.engine import supervisor

        with ExitStack() as stack:
            instance = stack.enter_context(self.store.locked(reference))
            require("start", instance.name, self.store.observe(instance))
            made = self._make(instance, restarts=0)
            home = self.store.home(made.id)

            def go() -> None:
                self._go(made)
                stack.close()  # from here on others may stop it

            forward = None if made.spec.tty else lambda number: self._of(made).signal(made, number)
            code = supervisor.attach(
                home, stdin, 1, 2, detach_keys=keys, forward_signals=forward, lossless=lossless, on_attached=go
            )
        return self._of(made).exit_code(made, home, code) if isinstance(code, int) else code

    def _make(self, instance: Instance, restarts: int) -> Instance:
        """From an idle instance to one whose program waits; only inside `locked`."""
        home = self.store.home(instance.id)
        self._of(instance).cleanup(instance, home)  # what a killed command may have left
        own = os.getpid()
        instance = self.store.save(
            instance._replace(
                status=Status.CREATING,
                pid=own,
                start_time=procfs.start_time(own) or 0,
                restarts=restarts,
                stop_wanted=False,
                error="",
            )
        )
        try:
            guest = self._of(instance).create(
                instance, home, exits.command(self.data, self.run_root, instance.id), exits.env()
            )
        except OvtError as error:
            self._failed(instance, error)
            raise
        except OSError as error:
            failure = refused(error.filename or self.data, error)
            self._failed(instance, failure)
            raise failure from None
        return self.store.save(
            instance._replace(
                supervisor_pid=guest.supervisor_pid,
                supervisor_start_time=guest.supervisor_start_time,
                rootfs={**instance.rootfs, "guest": [guest.pid, guest.start_time]},
            )
        )

    def _go(self, instance: Instance) -> Instance:
        pid, start_time = instance.rootfs["guest"]
        rootfs = {key: value for key, value in instance.rootfs.items() if key != "guest"}
        try:
            self._of(instance).start(instance)
        except OvtError as error:
            self._of(instance).cleanup(instance, self.store.home(instance.id))
            self._failed(instance._replace(rootfs=rootfs), error)
            raise
        started = self.store.save(
            instance._replace(
                status=Status.RUNNING, pid=pid, start_time=start_time, started=time.time(), finished=0.0, rootfs=rootfs
            )
        )
        self.journal.write("start", instance.id, instance.name, pid=pid)
        return started

    def _failed(self, instance: Instance, error: OvtError) -> None:
        status = Status.STOPPED if instance.started else Status.CREATED
        self.store.save(instance._replace(status=status, pid=0, start_time=0, error=error.message))
        self.journal.write("fail", instance.id, instance.name, error=error.message)

    def launch(
        self, image: str, command: Sequence[str] = (), *, name: str = "", kind: Kind | None = None, **options: Any
    ) -> Instance:
        """Create and start an instance in the background; `options` are members of Spec."""
        instance = self.create(Spec(image=image, command=tuple(command), **options), name, kind=kind)
        return self.start(instance.id)

    def run(
        self, image: str, command: Sequence[str] = (), *, name: str = "", kind: Kind | None = None, **options: Any
    ) -> int:
        """Run an instance joined to this process's streams, and remove it; its exit status."""
        spec = Spec(image=image, command=tuple(command), **{"auto_remove": True, **options})
        instance = self.create(spec, name, kind=kind)
        code = self.start_attached(instance.id, 0 if instance.spec.stdin else None)
        self.settle(instance.id)
        return code if isinstance(code, int) else 0

    def attach(self, reference: str, stdin: int | None, keys: str, forward: bool = True) -> int | Detached:
        """Join this process's streams to a living instance; its exit status, or DETACHED after the detach keys."""
        from ovt.engine import supervisor

        instance = self._allowed("attach", reference)
        forward = forward and not instance.spec.tty
        pass_on = (lambda number: self._of(instance).signal(instance, number)) if forward else None
        home = self.store.home(instance.id)
        code = supervisor.attach(home, stdin, 1, 2, detach_keys=keys, forward_signals=pass_on)
        return self._of(instance).exit_code(instance, home, code) if isinstance(code, int) else code

    def stop(self, reference: str, timeout: float | None = None) -> Instance:
        """Ask an instance to end, kill it after `timeout` seconds (its own by default); fine when it is not alive."""
        with self.store.locked(reference) as instance:
            status = self.store.observe(instance)
            if status in IDLE:
                return self.store.save(instance._replace(stop_wanted=True))
            require("stop", instance.name, status)
            instance = self.store.save(instance._replace(stop_wanted=True))
            if status is Status.RESTARTING:
                instance = self.store.save(instance._replace(status=Status.STOPPED, pid=0, start_time=0))
                self.journal.write("stop", instance.id, instance.name)
                return instance
            self._of(instance).signal(instance, instance.spec.stop_signal or _SIGTERM)
            if status is Status.PAUSED:
                self._of(instance).freeze(instance, False)
                instance = self.store.save(instance._replace(status=Status.RUNNING))
        home = self.store.home(instance.id)
        if not exits.wait_for_record(home, instance.spec.stop_timeout if timeout is None else timeout):
            self._of(instance).signal(instance, _SIGKILL, everyone=True)
            exits.wait_for_record(home, _KILL_WAIT)
        self.journal.write("stop", instance.id, instance.name)
        self.settle(instance.id)
        return instance

    def restart(self, reference: str, timeout: float | None = None) -> Instance:
        """Stop an instance if it is alive, then start it."""
        id = self.store.resolve(reference)
        instance = self.store.load(id)
        require("restart", instance.name, self.store.observe(instance))
        if instance.spec.auto_remove and self.store.observe(instance) in LIVE:
            raise StateError("it is removed as soon as it stops (--rm)", "run it again instead")
        self.stop(id, timeout)
        return self.start(id)

    def kill(self, reference: str, signal: int = _SIGKILL) -> Instance:
        """Send a signal to the first process of an instance."""
        with self.store.locked(reference) as instance:
            require("kill", instance.name, self.store.observe(instance))
            if signal in {_SIGKILL, instance.spec.stop_signal or _SIGTERM}:
                instance = self.store.save(instance._replace(stop_wanted=True))
            self._of(instance).signal(instance, signal)
        self.journal.write("kill", instance.id, instance.name, signal=signal)
        return instance

    def pause(self, reference: str) -> Instance:
        """Stop all processes of an instance where they are."""
        return self._freeze("pause", reference, True, Status.PAUSED)

    def resume(self, reference: str) -> Instance:
        """Let a paused instance go on."""
        return self._freeze("resume", reference, False, Status.RUNNING)

    def _freeze(self, verb: str, reference: str, frozen: bool, status: Status) -> Instance:
        with self.store.locked(reference) as instance:
            require(verb, instance.name, self.store.observe(instance))
            self._of(instance).freeze(instance, frozen)
            instance = self.store.save(instance._replace(status=status))
        self.journal.write(verb, instance.id, instance.name)
        return instance

    def update(self, reference: str, limits: Mapping[str, Any], restart: Restart | None = None) -> Instance:
        """Change members of Limits, and the restart policy, of an instance in any settled state."""
        with self.store.locked(reference) as instance:
            status = self.store.observe(instance)
            require("update", instance.name, status)
            wanted: Limits = instance.spec.limits._replace(**limits)
            if status in LIVE:
                self._of(instance).update(instance, wanted)
            spec = instance.spec._replace(limits=wanted, restart=restart or instance.spec.restart)
            instance = self.store.save(instance._replace(spec=spec), durable=True)
        self.journal.write("update", instance.id, instance.name)
        return instance

    def wait(self, reference: str) -> int:
        """Wait until an instance is not alive (and not to be restarted); the exit status of its last run."""
        id = self.store.resolve(reference)
        code = -1
        while True:
            try:
                instance = self.store.load(id)
            except NotFound:
                if code < 0:
                    raise
                return code  # removed by itself at its end
            status = self.store.observe(instance)
            if status in IDLE and instance.status not in LIVE:
                return instance.exit_code
            if instance.status in LIVE:  # alive, or dead and removed with its record as soon as it is settled
                home = self.store.home(id)
                record = exits.wait_for_record(home, 1.0 if status in LIVE else 0.0)
                code = self._of(instance).exit_code(instance, home, record.code) if record else code
            else:
                time.sleep(0.05)
            self.settle(id)

    def settle(self, id: str) -> Instance | None:
        """Write down the end of a guest that has ended; the record, None when someone did already or it lives."""
        return exits.settle(self, id)

    # inside

    def exec(self, reference: str, process: Process, detach: bool = False) -> int:
        """Run a program in a living instance; its exit status, or with `detach` its pid."""
        instance = self._allowed("exec", reference)
        self.journal.write("exec", instance.id, instance.name, command=list(process.command))
        return self._of(instance).exec(instance, self.store.home(instance.id), process, detach)

    def copy_into(self, source: str, reference: str, target: str) -> None:
        """Copy the host's `source` to the path `target` in an instance."""
        self._copy(reference, source, target, True)

    def copy_from(self, reference: str, source: str, target: str) -> None:
        """Copy the path `source` in an instance to the host's `target`."""
        self._copy(reference, source, target, False)

    def _copy(self, reference: str, source: str, target: str, into: bool) -> None:
        instance = self._allowed("cp", reference)
        alive = self.store.observe(instance) in LIVE
        self._of(instance).copy(instance, self.store.home(instance.id), alive, source, target, into)

    # questions

    def list(self) -> list[tuple[Instance, Status]]:
        """Every instance with its present status, oldest first."""
        return [(instance, self.store.observe(instance)) for instance in self.store.load_all()]

    def get(self, reference: str) -> tuple[Instance, Status]:
        """One instance with its present status."""
        instance = self.store.load(self.store.resolve(reference))
        return instance, self.store.observe(instance)

    def stats(self, reference: str) -> Stats:
        """What a living instance uses now."""
        instance = self._allowed("stats", reference)
        return self._of(instance).stats(instance)

    def processes(self, reference: str) -> Sequence[dict[str, Any]]:
        """All processes in an instance; see Engine.processes."""
        instance = self._allowed("top", reference)
        return self._of(instance).processes(instance)

    def logs(self, reference: str, **options: Any) -> Iterator[LogRecord]:
        """What an instance has written; see ovt.engine.guest_log.read_log for `options`."""
        from ovt.engine.guest_log import read_log

        instance, _ = self.get(reference)
        path = f"{self.store.home(instance.id)}/log"
        return read_log(path, **options) if os.path.exists(path) else iter(())

    def events(self, since: float = 0.0, until: float = 0.0, follow: bool = False) -> Iterator[dict[str, Any]]:
        """What happened to instances; see ovt.events."""
        from ovt import events

        return events.read(self, since, until, follow)

    def leftovers(self, fix: bool = False) -> Sequence[Leftover]:
        """What killed commands have left; with `fix` it is finished or taken away."""
        from ovt import leftovers

        return leftovers.find(self, fix)

    def _allowed(self, verb: str, reference: str) -> Instance:
        instance, status = self.get(reference)
        require(verb, instance.name, status)
        return instance
