"""A migration away from this host once it has begun: its record, and how it is ended on this side, either way.

outgoing.json in the machine's directory: {"token", "id", "address", "committed", "run", "keep", "before", "pid",
"start_time"}. While it is there the machine is being moved, or was when `ovt migrate` was killed. Once it says
`committed` the guest may run on the other host: it goes on here only after that host has said that it is not there
and never will be. Nobody guesses: when it cannot be asked, the guest stands still here until `resolve` could ask.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from ovt import exits
from ovt.engine.vm import migration, process
from ovt.engine.vm.qmp import Gone, Qmp
from ovt.errors import HostError, OvtError, StateError
from ovt.machines import postcopy, wire
from ovt.machines.receive import DIRECTORY, clear_directory, make_directory
from ovt.machines.relay import Relay
from ovt.machines.transport import Address, Dialer
from ovt.model import Instance, Kind, Status

if TYPE_CHECKING:
    from ovt.host import Host

RECORD = "outgoing.json"
_PATIENCE = wire.SILENCE + 15.0  # by then a session that was cut off has ended
_CANCEL = 60.0


class Undecided(OvtError):
    """Whether the guest runs on the other host is not known; it stands still here."""


def read(home: str) -> dict[str, Any]:
    """The record, empty without one."""
    try:
        with open(f"{home}/{RECORD}", encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}


def connect(address: Address, stack: ExitStack) -> tuple[Dialer, wire.Control]:
    """A session with the other host; `stack` ends it. HostError when it cannot be had."""
    dialer = Dialer(address)
    stack.callback(dialer.close)
    connection = stack.enter_context(dialer.session())
    control = wire.Control(connection.fileno(), connection.fileno(), str(address))
    try:
        control.call("hello", "hello", version=wire.VERSION, host=os.uname().nodename)
    except wire.PeerGone as error:
        hint = "does `ssh HOST ovt version` work?" if address.scheme == "ssh" else "is `ovt receive --listen` running?"
        raise HostError(error.message, hint=hint) from None
    return dialer, control


def session(address: Address, stack: ExitStack) -> wire.Control:
    """As `connect`, for those who need no more than the messages."""
    return connect(address, stack)[1]


def owner(address: Address, id: str, token: str, patience: float = _PATIENCE) -> str:
    """Ask the other host whose the machine is: `here` (its own), `nowhere` (not its own, for good: it has taken away
    what it had), or empty when it could not be asked for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OvtError), ExitStack() as stack:
            _, control = connect(address, stack)
            state = str(control.call("query", "owner", id=id, token=token)["state"])
            control.call("bye", "bye")
            if state in {"here", "nowhere"}:
                return state
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.5)


def undecided(name: str, address: Address) -> Undecided:
    """The error for a guest that stands still here because nobody can tell whether it runs there."""
    return Undecided(
        f"{address} was lost in the moment of the change-over: {name} may run there, and stands still here",
        f"ovt migrate --resolve {name} asks again; ovt delete --force {name} when you see it run there",
    )


def go_on(qmp: Qmp, home: str, record: dict[str, Any]) -> None:
    """Let the guest go on here, as if nothing had been: QEMU set as before, and the record removed.

    QmpError or HostError when QEMU cannot; the record stays then.
    """
    migration.cancel(qmp)
    migration.drop_mirrors(qmp, list(migration.disks(qmp).values()))
    if record["run"]:
        migration.run_again(qmp)
    migration.deconfigure(qmp, record["before"])
    migration.take_back_directories(qmp)
    clear_directory(f"{home}/{DIRECTORY}")
    forget(home)


def forget(home: str) -> None:
    """Remove the record."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{home}/{RECORD}")


def given_up(host: Host, instance: Instance, keep: bool) -> None:
    """End what is left here of a machine that is the other host's; with `keep` it stays as a stopped one.

    Only inside `locked`. Safe to repeat: the record goes last.
    """
    home = host.store.home(instance.id)
    engine = host.engine(Kind.VM)
    stopped = instance._replace(status=Status.STOPPED, pid=0, start_time=0, stop_wanted=True, finished=time.time())
    host.store.save(stopped, durable=True)  # or its restart policy would start it again
    engine.cleanup(instance, home)
    exits.wait_for_record(home, 10.0)
    clear_directory(f"{home}/{DIRECTORY}")
    if keep:
        forget(home)
        return
    engine.destroy(instance, home)
    host.store.remove(stopped)


def resolve(host: Host, reference: str) -> str:
    """Finish a migration whose `ovt migrate` was killed or lost the other host: `here` or `there`, where it is now.

    StateError when there is none, Undecided when the other host cannot be asked.
    """
    with host.store.locked(reference) as instance:
        home = host.store.home(instance.id)
        record = read(home)
        if not record:
            raise StateError("no migration of it was interrupted")
        address = Address.unpack(record["address"])
        state = owner(address, record["id"], record["token"], _PATIENCE if record["committed"] else 0.0)
        if state == "here":
            _send_rest(home, record, address)
            given_up(host, instance, record["keep"])
            host.journal.write("migrate", instance.id, instance.name, to=str(address))
            return "there"
        if record["committed"] and not state:
            raise undecided(instance.name, address)
        try:
            with process.running(home) as qmp:
                go_on(qmp, home, record)
        except Gone:
            forget(home)  # it has ended meanwhile, as any guest may
        return "here"


def _send_rest(home: str, record: dict[str, Any], address: Address) -> None:
    """If it was in post-copy, the guest there still needs memory that is here."""
    with contextlib.suppress(Gone), process.running(home) as qmp, ExitStack() as stack:
        if not qmp.command("query-migrate").get("status", "none").startswith("postcopy"):
            return
        directory = f"{home}/{DIRECTORY}"
        make_directory(directory)
        dialer = Dialer(address)
        stack.callback(dialer.close)
        relay = stack.enter_context(Relay(dialer, record["token"], {"memory": f"{directory}/{migration.OUT}"}))
        lent = migration.lend_directory(qmp, directory)
        postcopy.send_rest(qmp, lent, relay, record, None, partial(session, address))


def cancel(host: Host, reference: str) -> None:
    """Have the `ovt migrate` that moves this machine stop, and wait until the guest goes on here.

    StateError when none does, HostError when it does not stop.
    """
    id = host.store.resolve(reference)
    home = host.store.home(id)
    record = read(home)
    if not record or not host.store.lives(record["pid"], record["start_time"]):
        hint = f"ovt migrate --resolve {reference}" if record else ""
        raise StateError("no migration of it is under way", hint)
    os.kill(record["pid"], signal.SIGINT)
    deadline = time.monotonic() + _CANCEL
    while host.store.lives(record["pid"], record["start_time"]):
        if time.monotonic() > deadline:
            raise HostError(f"the migration (pid {record['pid']}) has not ended within {_CANCEL:g} seconds")
        time.sleep(0.05)
    if not os.path.exists(home):
        raise StateError("it was too late: the machine is on the other host")
