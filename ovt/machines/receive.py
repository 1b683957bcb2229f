"""The receiving host's side of a migration: one session, the other host asking, this one doing and answering.

Exactly one of the two hosts runs the guest, by this rule: here `cont` is given only after the other host has said
`commit`, which it says after its own guest stands still and has written down that it said so. Before, whatever ends
the session takes everything away that it made here. After, the machine is this host's: its record says so before the
guest goes on, so that `query` by a new session tells whose it is, whatever was killed in between.

In the machine's directory, incoming.json {"token", "committed", "run"} tells how far it has come.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ovt import exits
from ovt.engine.vm import agent, agent_verbs, jail, migration, process
from ovt.engine.vm.hardware import Hardware, replace_json
from ovt.engine.vm.qmp import Qmp
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError
from ovt.kernel import procfs
from ovt.machines import blockers, survey, wire
from ovt.machines.listening import Meeting, close_meeting
from ovt.machines.moving import Plan
from ovt.model import Instance, Kind, Status, is_id

if TYPE_CHECKING:
    from ovt.host import Host

RECORD = "incoming.json"
DIRECTORY = "migration"  # below a machine's home: the sockets that QEMU is lent
_TOKEN = re.compile("[0-9a-f]{32}")
_ARRIVAL = 60.0  # seconds from the source's last byte to a guest that could run


class Session:
    """One migration to this host, or one question about one."""

    def __init__(self, host: Host, control: wire.Control) -> None:
        self.host = host
        self.control = control
        self.token = ""
        self.instance: Instance | None = None
        self.committed = False
        self._directory = self._lent = ""
        self._qmp: Qmp | None = None
        self._open = ExitStack()
        self._peer = ""

    def run(self) -> None:
        """Answer until the other host says that it is done or is gone; nothing is left then but a machine that is
        this host's. Errors are told to the other host, not raised."""
        try:
            while (message := self.control.receive(wire.SILENCE))["type"] != "bye":
                self._answer(message)
            self.control.send("bye")
        except OvtError:  # gone, or it talks nonsense: there is nobody left to tell
            pass
        finally:
            self._end()

    def _answer(self, message: wire.Message) -> None:
        handlers = {
            "hello": self._hello,
            "ping": lambda message: {"type": "pong"},
            "survey": self._survey,
            "check": self._check,
            "prepare": self._prepare,
            "disks-done": self._disks_done,
            "commit": self._commit,
            "recover": self._recover,
            "abort": self._abort,
            "query": self._query,
        }
        try:
            handler = handlers.get(message["type"])
            if handler is None:
                raise HostError(f"{message['type']!r} is not understood here", hint="the same ovt on both hosts")
            answer = handler(message)
        except wire.PeerGone:
            raise
        except OvtError as error:
            self.control.send_error(error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.control.send_error(HostError(f"{message['type']} is not understood here: {error!r}"))
        except OSError as error:
            self.control.send_error(HostError(f"{error.filename or 'the host'}: {error.strerror}", error.errno or 0))
        else:
            self.control.send(answer.pop("type"), **answer)

    # before anything is made

    def _hello(self, message: wire.Message) -> dict[str, Any]:
        if message["version"] != wire.VERSION:
            raise HostError(
                f"ovt here speaks version {wire.VERSION} of the protocol, the other {message['version']}",
                hint="the same ovt on both hosts",
            )
        self._peer = str(message.get("host", ""))
        return {"type": "hello", "version": wire.VERSION, "host": os.uname().nodename}

    def _survey(self, message: wire.Message) -> dict[str, Any]:
        traces = [survey.Trace.unpack(entry) for entry in message["traces"]]
        return {"type": "surveyed", "there": {trace.path: survey.compare(trace) for trace in traces}}

    def _check(self, message: wire.Message) -> dict[str, Any]:
        found = blockers.at_target(self.host, Plan.unpack(message["plan"]))
        return {"type": "checked", "blockers": [list(blocker) for blocker in found]}

    # making it

    def _prepare(self, message: wire.Message) -> dict[str, Any]:
        """Everything up to a QEMU that waits for the memory; the files follow the message."""
        plan = Plan.unpack(message["plan"])
        if self.token:
            raise StateError("a machine is on its way already in this session")
        token = str(message["token"])
        if not is_id(plan.instance.id) or not _TOKEN.fullmatch(token):
            raise HostError("an id or a token is none")
        if found := blockers.at_target(self.host, plan):
            raise StateError("; ".join(map(str, found)), "ovt migrate --check")
        self.token = token
        try:
            home = self._begin(plan)
            self.control.send("go")
            instance = self._make(home, plan)
        except BaseException:
            self._discard()
            raise
        return {"type": "prepared", "name": instance.name}

    def _begin(self, plan: Plan) -> str:
        """Keep a record of the machine, locked until the end of this session; its directory."""
        store, own = self.host.store, os.getpid()
        id = plan.instance.id
        instance = plan.instance._replace(
            kind=Kind.VM, status=Status.CREATING, pid=own, start_time=procfs.start_time(own) or 0,
            supervisor_pid=0, supervisor_start_time=0, restart_at=0.0, stop_wanted=False, error="",
        )  # fmt: skip
        store.add(instance)
        self.instance = instance
        self._open.enter_context(store.locked(id))
        home = store.home(id)
        replace_json(f"{home}/{RECORD}", {"token": self.token, "committed": False, "run": False})
        return home

    def _make(self, home: str, plan: Plan) -> Instance:
        instance = self._here()
        hardware = self._fill(home, plan)
        job = self.host.vms.job(instance, home, hardware)
        job.incoming = True
        if plan.settings.postcopy and os.path.exists(blockers.USERFAULTFD):
            job.nodes.append(jail.node(blockers.USERFAULTFD))
        exit_command = exits.command(self.host.data, self.host.run_root, instance.id)
        guest = self.host.vms.start_machine(job, exit_command, exits.env())
        self.instance = self.host.store.save(
            instance._replace(
                supervisor_pid=guest.supervisor_pid,
                supervisor_start_time=guest.supervisor_start_time,
                rootfs={**instance.rootfs, "guest": [guest.pid, guest.start_time]},
            )
        )
        self._qmp = self._open.enter_context(process.running(home))
        self._listen(home, plan, self._qmp)
        return self.instance

    def _fill(self, home: str, plan: Plan) -> Hardware:
        """The machine's files: those that were sent, empty images for those that QEMU fills, the frozen hardware."""
        failed: OSError | None = None
        for file in plan.files:
            try:
                self._take(f"{home}/{file.path}", file.size)
            except OSError as error:  # the rest still comes in and has to be read
                failed = failed or error
        if failed is not None:
            raise failed
        for image in plan.images:
            new_image(f"{home}/{image.path}", image.size, whole=not image.disk)
        hardware = Hardware.unpack(plan.hardware)
        if hardware.cid and plan.new_id:  # the old one may be on this same host, and an address is one machine's
            hardware.cid = 3 + int.from_bytes(os.urandom(4), "little") % 0xFFFFFFF0
        for name in ("kernel", "initrd"):
            if (path := getattr(hardware, name)) and not os.path.isabs(path):
                setattr(hardware, name, f"{home}/{path}")
        hardware.save(home)
        return hardware

    def _take(self, path: str, size: int) -> None:
        failed: OSError | None = None
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            failed = error
            fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self.control.receive_file(fd, size)
        finally:
            os.close(fd)
        if failed is not None:
            raise failed

    def _listen(self, home: str, plan: Plan, qmp: Qmp) -> None:
        self._directory = f"{home}/{DIRECTORY}"
        make_directory(self._directory)
        self._lent = migration.lend_directory(qmp, self._directory)
        migration.configure(qmp, plan.settings)
        migration.listen(qmp, self._lent)
        channels = {"memory": f"{self._directory}/{migration.IN}"}
        if mirrored := [image.disk for image in plan.images if image.disk]:
            migration.export(qmp, self._lent, mirrored)
            channels["disks"] = f"{self._directory}/{migration.NBD}"
        self._open.enter_context(Meeting(self.host.run_root, self.token, channels))

    # the change-over

    def _disks_done(self, message: wire.Message) -> dict[str, Any]:
        migration.close_exports(self._machine())
        return {"type": "disks-closed"}

    def _commit(self, message: wire.Message) -> dict[str, Any]:
        """The other host's guest stands still for good, unless this fails: then it is not here and never will be."""
        qmp, instance, run = self._machine(), self._here(), bool(message["run"])
        record = f"{self.host.store.home(instance.id)}/{RECORD}"
        try:
            migration.wait_arrived(qmp, _ARRIVAL)
            replace_json(record, {"token": self.token, "committed": True, "run": run})
            migration.go(qmp, run)
        except BaseException:
            self._discard()
            raise
        self.committed, since = True, time.monotonic()  # from here on the only answer is yes
        with contextlib.suppress(OvtError, OSError):  # `query` and `repair` write it down later
            self.instance = settled(self.host, instance, Status.RUNNING if run else Status.PAUSED)
            self.host.journal.write("arrive", instance.id, instance.name, source=self._peer)
        return {"type": "committed", "since": round((time.monotonic() - since) * 1000)}

    def _recover(self, message: wire.Message) -> dict[str, Any]:
        """Post-copy has lost its connection: take the rest of the memory by another, perhaps in another session."""
        if self._qmp is None:
            self._adopt(str(message["id"]), str(message["token"]))
        migration.listen_again(self._machine(), self._lent)
        return {"type": "recovering", "token": self.token}

    def _adopt(self, id: str, token: str) -> None:
        self._open.enter_context(self.host.store.locked(id, wait=False))
        home, self.token = self.host.store.home(id), os.urandom(16).hex()
        if read_record(home).get("token") != token:
            raise NotFound("that machine has not come in such a session")
        self._qmp = self._open.enter_context(process.running(home))
        self.committed = True
        self._directory = f"{home}/{DIRECTORY}"
        make_directory(self._directory)
        self._lent = migration.lend_directory(self._qmp, self._directory)
        channels = {"memory": f"{self._directory}/{migration.IN}"}
        self._open.enter_context(Meeting(self.host.run_root, self.token, channels))

    def _here(self) -> Instance:
        if self.instance is None:
            raise StateError("no machine is on its way in this session")
        return self.instance

    def _machine(self) -> Qmp:
        if self._qmp is None:
            raise StateError("no machine is on its way in this session")
        return self._qmp

    # ends

    def _abort(self, message: wire.Message) -> dict[str, Any]:
        if self.committed:
            raise StateError("the machine runs here already")
        self._discard()
        return {"type": "aborted"}

    def _query(self, message: wire.Message) -> dict[str, Any]:
        return {"type": "owner", "state": query(self.host, str(message["id"]), str(message["token"]))}

    def _discard(self) -> None:
        instance, self.instance = self.instance, None
        self._qmp = None
        if instance is not None and not self.committed:
            remove(self.host, instance)
        self._open.close()

    def _end(self) -> None:
        qmp, home = self._qmp, os.path.dirname(self._directory)
        listens = False
        if self.committed and qmp is not None:
            with contextlib.suppress(OvtError):
                listens = bool(agent.port_open(qmp))
        self._discard()
        if self._directory and self.committed:
            clear_directory(self._directory)
        if listens:
            with contextlib.suppress(OvtError):
                agent_verbs.set_time(agent.Agent(home))  # its clock stood still while it moved


def settled(host: Host, instance: Instance, status: Status) -> Instance:
    """Write down that an arrived guest is this host's, and is in `status`."""
    pid, start_time = instance.rootfs["guest"]
    rootfs = {key: value for key, value in instance.rootfs.items() if key != "guest"}
    living = instance._replace(status=status, pid=pid, start_time=start_time, rootfs=rootfs, started=time.time())
    return host.store.save(living._replace(finished=0.0), durable=True)


def query(host: Host, id: str, token: str) -> str:
    """Whose the machine `id` is that came, or should have come, in the session `token`: `here` for certain, `nowhere`
    (it never was or will be here; what was left of it has just been removed), or `busy` (its session goes on).

    A machine that was committed and whose session was killed before it went on goes on now.
    """
    try:
        with host.store.locked(id, wait=False) as instance:
            home = host.store.home(id)
            record = read_record(home)
            if record.get("token") != token:
                return "nowhere"  # another machine, or an earlier migration of it
            if instance.status is not Status.CREATING:
                return "here"
            return repair(host, instance)
    except NotFound:
        return "nowhere"
    except Conflict:
        return "busy"


def _finish(host: Host, instance: Instance, home: str, run: bool) -> str:
    """The other host has given it up for certain, and this one was killed before it wrote down that it has it."""
    if not _has_run(home):
        try:
            with process.running(home) as qmp:
                migration.wait_arrived(qmp, 5.0)
                migration.go(qmp, run)
        except OvtError:  # it never ran here and cannot: the other host has it still
            remove(host, instance)
            return "nowhere"
    settled(host, instance, Status.RUNNING if run else Status.PAUSED)
    close_meeting(host.run_root, read_record(home)["token"])
    return "here"


def _has_run(home: str) -> bool:
    """Whether the guest has had a first instruction here, by the events that its supervisor keeps."""
    for name in (process.EVENTS, f"{process.EVENTS}.1"):
        with contextlib.suppress(FileNotFoundError):
            with open(f"{home}/{name}", "rb") as file:
                if any(b'"RESUME"' in line for line in file):
                    return True
    return False


def read_record(home: str) -> dict[str, Any]:
    """The content of incoming.json, empty without one."""
    try:
        with open(f"{home}/{RECORD}", encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}


def interrupted(host: Host, instance: Instance) -> bool:
    """Whether `instance` is what a killed session has left and nobody is at work on."""
    return host.store.observe(instance) is Status.BROKEN and bool(read_record(host.store.home(instance.id)))


def repair(host: Host, instance: Instance) -> str:
    """Finish what `interrupted` has found, only inside `locked`: `here` or `nowhere`, as `query`."""
    home = host.store.home(instance.id)
    record = read_record(home)
    if record["committed"]:
        return _finish(host, instance, home, bool(record["run"]))
    remove(host, instance)
    return "nowhere"


def remove(host: Host, instance: Instance) -> None:
    """Take away a machine that has not arrived: QEMU, files, record; only inside `locked`."""
    home = host.store.home(instance.id)
    if token := read_record(home).get("token"):
        close_meeting(host.run_root, token)
    engine = host.engine(Kind.VM)
    engine.cleanup(instance, home)
    exits.wait_for_record(home, 10.0)
    engine.destroy(instance, home)
    host.store.remove(instance)


def make_directory(path: str) -> None:
    """Make the directory for the sockets that QEMU is lent, which is another user."""
    os.makedirs(path, exist_ok=True)
    os.chmod(path, 0o777)  # nobody else gets through the machine's directory


def clear_directory(path: str) -> None:
    """Remove the sockets that QEMU was lent and their directory."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)


def new_image(path: str, size: int, whole: bool = False) -> None:
    """Make an empty qcow2 image; HostError with qemu-img's words.

    `whole`: with all its clusters, so that what QEMU writes is in the file at once, whatever kills QEMU before it
    would have written where in the file that is.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    options = ["-o", "preallocation=full"] if whole else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HostError("there is no qemu-img", hint="apt-get install qemu-utils") from None
    if done.returncode:
        raise HostError(f"{path} cannot be made: {done.stderr.strip()}")
    os.chmod(path, 0o600)


def session(host: Host, reader: int, writer: int) -> None:
    """Serve one session on two descriptors."""
    Session(host, wire.Control(reader, writer, "the sending host")).run()


def main(arguments: list[str]) -> None:
    """The session that listening.py starts for a connection: `DATA RUN`, messages on standard input and output."""
    from ovt.host import Host

    data, run = arguments
    session(Host(data, run), 0, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
