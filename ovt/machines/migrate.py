"""The sending host's side of a migration, in order: look, plan, have the machine made, copy disks, send, hand over.

Until `commit` is sent, whatever goes wrong ends with the guest running here and nothing there; what holds after that
is told in outgoing.py. Nothing is printed: `progress` hears how far it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ovt.engine.vm import attached, migration, process
from ovt.engine.vm.firmware import NVRAM
from ovt.engine.vm.hardware import replace_json
from ovt.engine.vm.migration import Progress, Settings
from ovt.errors import HostError, OvtError, StateError
from ovt.kernel import procfs
from ovt.machines import blockers, moving, outgoing, postcopy, survey, wire
from ovt.machines.moving import Blocker, Plan
from ovt.machines.receive import DIRECTORY, make_directory
from ovt.machines.relay import Relay
from ovt.machines.transport import Address
from ovt.model import Instance, Kind, require

if TYPE_CHECKING:
    from ovt.host import Host

_PREPARE = 180.0  # seconds for a loaded host to start QEMU
_COMMIT = 120.0
_CLEANING = 5.0  # for the other host to take away what a killed session has left
_TICK = 0.2


class Options(NamedTuple):
    """What the owner asked for; times in seconds, 0 for never."""

    settings: Settings = Settings()
    with_disks: bool = False
    postcopy_after: float = 0.0  # 0: after the first pass over the memory
    timeout: float = 0.0  # for disks and memory to get there
    keep: bool = False  # the machine stays here too, stopped
    new_id: bool = False
    trust: bool = False  # files of the same path are the same file


class Outcome(NamedTuple):
    """How a migration went: milliseconds, bytes."""

    name: str
    id: str  # there
    total: int
    downtime: int  # as QEMU counts: until the memory is there
    pause: int  # from the guest's last instruction here to its first there, and half a round trip
    transferred: int


class Blocked(StateError):
    """Things stand against the migration; nothing was begun."""

    def __init__(self, found: list[Blocker]) -> None:
        remedies = [blocker.remedy for blocker in found if blocker.remedy]
        super().__init__("; ".join(map(str, found)), remedies[0] if remedies else "")
        self.blockers = found


_DEFAULTS = Options()


def check(host: Host, reference: str, address: Address, options: Options = _DEFAULTS) -> list[Blocker]:
    """Everything that stands against a migration, asked of both hosts; with nothing found, the other host has made
    the machine once for a trial and taken it away again. The guest notices nothing."""
    with host.store.locked(reference) as instance, ExitStack() as stack:
        move = _Move(host, instance, address, options, lambda progress: None, stack)
        found = move.find_blockers()
        if not found:
            try:
                move.prepare()
            except wire.PeerRefused as error:
                found = [Blocker("trial", error.message, error.hint)]
            else:
                move.control.call("abort", "aborted", timeout=_PREPARE)
        move.control.call("bye", "bye")
        return found


def migrate(
    host: Host,
    reference: str,
    address: Address,
    options: Options = _DEFAULTS,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Move a living machine to the host at `address`; ^C cancels.

    Blocked before anything begins. HostError and others after the guest goes on here again. outgoing.Undecided when
    the other host was lost in the moment of the change-over.
    """
    with host.store.locked(reference) as instance:
        with ExitStack() as stack:
            move = _Move(host, instance, address, options, progress, stack)
            if found := move.find_blockers():
                raise Blocked(found)
            outcome = move.go()
        with _undisturbed():
            outgoing.given_up(host, instance, options.keep)
        host.journal.write("migrate", instance.id, instance.name, to=str(address), pause=outcome.pause)
        return outcome


class _Move:
    """One migration while it goes on; `stack` ends what it opened."""

    def __init__(
        self,
        host: Host,
        instance: Instance,
        address: Address,
        options: Options,
        progress: Callable[[Progress], None],
        stack: ExitStack,
    ) -> None:
        if instance.kind is not Kind.VM:
            raise StateError("it is a container, and only machines can move while they run")
        require("migrate", instance.name, host.store.observe(instance))
        self.home = host.store.home(instance.id)
        if outgoing.read(self.home):
            raise StateError("an earlier migration of it was interrupted", f"ovt migrate --resolve {instance.name}")
        self.host, self.instance, self.address, self.options = host, instance, address, options
        self._tell = progress
        self._pinged = time.monotonic()
        self._began = time.monotonic()
        self.qmp = stack.enter_context(process.running(self.home))
        self.dialer, self.control = outgoing.connect(address, stack)
        self.token = os.urandom(16).hex()
        self.run = False
        self.disks = migration.disks(self.qmp)
        self.plan = Plan(instance, {}, options.settings)

    # before anything is begun

    def find_blockers(self) -> list[Blocker]:
        """Decide what has to move (`plan`), and find what stands against it on both hosts."""
        hardware = attached.settle(self.qmp, self.home, self.instance.started).pack()
        if not migration.has_vsock(self.qmp):  # this host had none to give it
            hardware["cid"] = 0
        found = blockers.at_source(self.qmp, hardware, self.home)
        status = self.qmp.command("query-status")["status"]
        if status not in {"running", "paused"}:
            found.append(Blocker("guest", f"it is {status}", "wake it, or end it"))
        self.run = status == "running"
        plan, more = moving.arrange(
            self.instance,
            self.home,
            hardware,
            self._survey(moving.paths(hardware)),
            {NVRAM: migration.nvram_size(self.qmp), **{id: disk.size for id, disk in self.disks.items()}},
            self.options.settings,
            self.options.with_disks,
            self.options.trust,
        )
        flags = blockers.cpu_flags() if str(hardware["cpu"]).split(",")[0] == "host" else ()
        id = os.urandom(6).hex() if self.options.new_id else self.instance.id
        self.plan = plan._replace(instance=self.instance._replace(id=id), flags=flags, new_id=self.options.new_id)
        found += more + blockers.settings_refused(self.qmp, self.plan.settings)
        answer = self.control.call("check", "checked", plan=self.plan.pack())
        return found + [Blocker(*entry) for entry in answer["blockers"]]

    def _survey(self, paths: dict[str, bool]) -> dict[str, str]:
        """What the other host has at these paths; see survey.compare."""
        with survey.traces(paths) as traces:
            there = self._ask_traces(traces)
            unsure = [trace for trace in traces if there[trace.path] == "unknown" and not paths[trace.path]]
            return {**there, **self._ask_traces(survey.with_digests(unsure))} if unsure else there

    def _ask_traces(self, traces: list[survey.Trace]) -> dict[str, str]:
        answer = self.control.call("survey", "surveyed", traces=[trace._asdict() for trace in traces])
        return {trace.path: str(answer["there"].get(trace.path, "missing")) for trace in traces}

    def prepare(self) -> None:
        """Have the machine made on the other host."""
        try:
            self._prepare()
        except wire.PeerGone:
            with _undisturbed():  # a session that was killed has left what it had made
                outgoing.owner(self.address, self.plan.instance.id, self.token, _CLEANING)
            raise

    def _prepare(self) -> None:
        self.control.call("prepare", "go", plan=self.plan.pack(), token=self.token)
        for file in self.plan.files:
            fd = os.open(file.source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.control.send_file(fd, file.size)
            finally:
                os.close(fd)
        self.control.answer("prepared", _PREPARE)

    # the migration

    def go(self) -> Outcome:
        """Move it, or let it go on here and raise why."""
        self.prepare()
        own = os.getpid()
        record = {
            "token": self.token, "id": self.plan.instance.id, "address": self.address.pack(), "committed": False,
            "run": self.run, "keep": self.options.keep, "before": migration.parameters(self.qmp), "pid": own,
            "start_time": procfs.start_time(own) or 0,
        }  # fmt: skip
        mirrored = [self.disks[image.disk] for image in self.plan.images if image.disk]
        directory = f"{self.home}/{DIRECTORY}"
        make_directory(directory)
        channels = {"memory": f"{directory}/{migration.OUT}"}
        if mirrored:
            channels["disks"] = f"{directory}/{migration.NBD}"
        with Relay(self.dialer, self.token, channels) as relay:
            try:
                replace_json(f"{self.home}/{outgoing.RECORD}", record)
                lent = migration.lend_directory(self.qmp, directory)
                migration.configure(self.qmp, self.plan.settings)
                self._copy_disks(lent, mirrored)
                stopped = self._send_memory(lent, mirrored)
                with _undisturbed():
                    since = self._commit(record)
            except outgoing.Undecided:
                raise
            except BaseException as error:
                with _undisturbed():
                    self._undo(record)
                if relay.error and isinstance(error, OvtError):
                    raise HostError(f"{error.message}: {relay.error}") from error
                raise
            pause = max(0, round((time.time() - stopped) * 1000) - since)
            with _undisturbed():
                result = postcopy.send_rest(
                    self.qmp, lent, relay, record, self.control, partial(outgoing.session, self.address), self._tell
                )
        with contextlib.suppress(OvtError):
            self.control.call("bye", "bye", timeout=5.0)
        counts = (result.total, result.downtime, pause, result.transferred)
        return Outcome(self.instance.name, self.plan.instance.id, *counts)

    def _copy_disks(self, lent: str, mirrored: list[migration.Disk]) -> None:
        if not mirrored:
            return
        migration.start_mirrors(self.qmp, lent, mirrored, self.plan.settings.bandwidth)
        before, began = 0, time.monotonic()
        ready = False
        while not ready:
            self._keep_up("the disks are not there")
            ready, remaining, total = migration.mirrors(self.qmp, mirrored)
            elapsed = time.monotonic() - began
            rate = max(0, total - remaining - before) / elapsed if elapsed else 0.0
            self._tell(Progress("disks", remaining, total, rate=rate, elapsed=elapsed))
            if not ready:
                migration.wait_change(self.qmp, _TICK)
        migration.lock_step(self.qmp, mirrored)

    def _send_memory(self, lent: str, mirrored: list[migration.Disk]) -> float:
        """Until the guest stands still here and only the other host's `cont` is missing; when that began (epoch)."""
        migration.start(self.qmp, lent)
        began, postcopy, released = time.monotonic(), False, False
        while True:
            state, progress, _ = migration.status(self.qmp)
            self._tell(progress)
            if state == "pre-switchover":
                if released:  # QEMU needs a moment to leave this state
                    continue
                released = True
                migration.finish_mirrors(self.qmp, mirrored)
                mirrored = []
                self.control.call("disks-done", "disks-closed")
                migration.go_on(self.qmp)
            elif migration.switched(state):
                return migration.stopped_at(self.qmp)
            elif self._postcopy_due(postcopy, progress, time.monotonic() - began):
                migration.start_postcopy(self.qmp)
                postcopy = True
            elif mirrored:
                migration.mirrors(self.qmp, mirrored)
            if not postcopy:
                self._keep_up(_too_slow(progress))
            migration.wait_change(self.qmp, _TICK)

    def _postcopy_due(self, begun: bool, progress: Progress, elapsed: float) -> bool:
        if begun or not self.plan.settings.postcopy or progress.phase != "memory" or not progress.total:
            return False
        after = self.options.postcopy_after
        return elapsed >= after if after else progress.passes > 1

    def _keep_up(self, late: str) -> None:
        """Tell the other host that this one lives; HostError when the time is up."""
        now = time.monotonic()
        if self.options.timeout and now - self._began > self.options.timeout:
            hint = "--auto-converge, --postcopy, a longer --downtime or --timeout"
            raise HostError(f"{late} within {self.options.timeout:g} seconds", hint=hint)
        if now - self._pinged > wire.PING:
            self.control.call("ping", "pong", timeout=wire.SILENCE)
            self._pinged = now

    def _commit(self, record: dict[str, object]) -> int:
        """The change-over: returns when the guest is the other host's, with the milliseconds that it has run there.

        Raises when it is not and never will be, and outgoing.Undecided when that cannot be known.
        """
        record["committed"] = True
        replace_json(f"{self.home}/{outgoing.RECORD}", record)
        try:
            return int(self.control.call("commit", "committed", timeout=_COMMIT, run=self.run)["since"])
        except wire.PeerRefused:
            raise
        except OvtError as error:
            state = outgoing.owner(self.address, str(record["id"]), str(record["token"]))
            if state == "nowhere":
                raise
            if not state:
                raise outgoing.undecided(self.instance.name, self.address) from error
            return 0

    def _undo(self, record: dict[str, object]) -> None:
        """The guest goes on here, and nothing is left there."""
        try:
            outgoing.go_on(self.qmp, self.home, record)
        finally:
            try:
                self.control.call("abort", "aborted", timeout=_PREPARE)
            except OvtError:  # its session may be gone without having cleaned up
                outgoing.owner(self.address, str(record["id"]), str(record["token"]), patience=_CLEANING)


def _too_slow(progress: Progress) -> str:
    return (
        f"the memory is not there, {progress.remaining >> 20} of {progress.total >> 20} MiB are missing (the guest "
        f"writes {progress.dirty_rate / 2**20:.0f} MiB/s, {progress.rate / 2**20:.0f} MiB/s are sent)"
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """^C and TERM wait until the end of the block; only in the main thread is there anything to hold back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
