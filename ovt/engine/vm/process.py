"""QEMU as a guest of the supervisor: opening what it is handed, starting it in its container, shaking hands over QMP.

`launch` is what cold starts, restored states, forks and incoming migrations have in common: it ends with a QEMU that
stands still before (or in) its first instruction and has all its devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ovt.engine import supervisor
from ovt.engine.vm import arguments, devices, firmware, jail, resize, shares
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Gone, Qmp, QmpError, listen
from ovt.errors import Conflict, HostError, NotFound

if TYPE_CHECKING:
    from ovt.engine.container.bundle import Facts
    from ovt.engine.container.runtime import Runtime

QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "qga.sock"
EVENTS = "qmp.log"
ERRORS = "qemu.log"
EXIT_STATUS = "guest-exit"
_HANDSHAKE_SECONDS = 60.0  # a loaded host starts QEMU slowly
_ERRORS_KEPT = 64 << 10
_LOCK_POLL = 0.005
_BEYOND = 0o004  # readable by anyone


class Launch:
    """Everything a start of QEMU needs, filled in by the engine before `launch`."""

    def __init__(self, id: str, name: str, home: str, features: Features, hardware: Hardware) -> None:
        self.id = id
        self.name = name
        self.home = home
        self.features = features
        self.hardware = hardware
        self.incoming = False
        self.memory = -1  # descriptor of a file that is the guest's memory
        self.private_memory = False
        self.initrd_extra = b""  # a further archive behind the initrd
        self.host_network = False
        self.cpus = 0.0
        self.cpuset = ""
        self.nodes: list[jail.Node] = []
        self.sysfs = False
        self.plug: Callable[[Qmp], None] = lambda qmp: None  # adds the devices, before the guest's first instruction
        self.load: Callable[[Qmp], None] = lambda qmp: None  # with `incoming`: brings the state


def launch(
    job: Launch,
    runtime: Runtime,
    facts: Facts,
    exit_command: list[str],
    env: Mapping[str, str],
    parent_lock: Callable[[], contextlib.AbstractContextManager[None]],
) -> supervisor.SupervisorInfo:
    """Start QEMU under a supervisor and plug in its devices. Nothing is left when this raises.

    NotFound for a kernel that has vanished, HostError with QEMU's own words when it does not start, QmpError when it
    refuses a device.
    """
    for stale in (ERRORS, EXIT_STATUS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{job.home}/{stale}")
    with contextlib.suppress(FileNotFoundError):  # the events of the run before
        os.rename(f"{job.home}/{EVENTS}", f"{job.home}/{EVENTS}.1")

    def make(stdio: supervisor.Stdio) -> int:
        with contextlib.ExitStack() as stack:
            return _make(job, runtime, facts, stdio, stack, parent_lock)

    return supervisor.launch(
        job.home,
        make,
        name=job.name,
        tty=True,
        stdin=True,
        log=f"{job.home}/log",
        exit_command=exit_command,
        env=env,
    )


def _make(
    job: Launch,
    runtime: Runtime,
    facts: Facts,
    stdio: supervisor.Stdio,
    stack: contextlib.ExitStack,
    parent_lock: Callable[[], contextlib.AbstractContextManager[None]],
) -> int:
    """In the process that becomes the supervisor: everything up to a QEMU with all its devices; its pid."""
    slave = stdio.slave()
    _raw(slave)
    ours, theirs = socket.socketpair()
    stack.enter_context(theirs)
    given = _descriptors(job, stack)
    given["events"] = theirs.fileno()
    cold, sets = devices.cold_disks(job, stack)
    given |= cold
    errors = _open_file(f"{job.home}/{ERRORS}", os.O_RDWR | os.O_CREAT | os.O_APPEND, stack)
    numbers = {name: 3 + index for index, name in enumerate(given)}
    command = arguments.arguments(
        job.features.program,
        job.hardware,
        numbers,
        name=job.name,
        incoming=job.incoming,
        private_memory=job.private_memory,
    )
    if "exit" in numbers:
        command += ["-add-fd", f"fd={numbers['exit']},set={arguments.EXIT_SET}"]
    for disk, fdset in sets.items():
        command += ["-add-fd", f"fd={numbers[disk]},set={fdset},opaque={disk}"]
    command += devices.cold_words(job.hardware, sets, job.features)
    command += shares.words(job.hardware)
    uid = 0 if facts.rootless else jail.user_id(job.id)
    root = f"{job.home}/vm"
    jail.prepare_root(root)
    config = jail.config(
        command,
        id=job.id,
        root=root,
        facts=facts,
        uid=uid,
        memory=resize.total_memory(job.hardware),
        cpus=job.cpus,
        cpuset=job.cpuset,
        host_network=job.host_network,
        nodes=job.nodes,
        mounts_of_shares=shares.mounts(job.hardware, uid),
        locked_memory=bool(job.hardware.hostdevs) or job.hardware.hugepages,
        sysfs=job.sysfs,
    )
    with parent_lock():
        state = runtime.create(
            job.id, job.home, config, stdio=(slave, slave, errors), descriptors=tuple(given.values())
        )
    pid = int(state.pid)
    try:
        runtime.start(job.id)
        theirs.close()  # else the end of QEMU would not be the end of the connection
        qmp = Qmp(ours)
        try:
            qmp.negotiate(_HANDSHAKE_SECONDS)
            job.plug(qmp)
            job.load(qmp)
        except TimeoutError:
            raise HostError(f"QEMU does not answer within {_HANDSHAKE_SECONDS:g} seconds") from None
        except QmpError as error:
            raise HostError(error.message, hint=error.hint) from None
        except Gone as error:
            said = last_words(job.home)
            raise HostError(f"QEMU ended at its start: {said}" if said else error.message, hint=error.hint) from None
        with open(f"{job.home}/{EVENTS}", "ab") as journal:
            os.fchmod(journal.fileno(), 0o600)
            journal.writelines(json.dumps(event).encode() + b"\n" for event in qmp.take_events())
        stdio.events = qmp.detach()
    except BaseException:
        runtime.delete(job.id, force=True)
        raise
    return pid


def _descriptors(job: Launch, stack: contextlib.ExitStack) -> dict[str, int]:
    """What QEMU is handed, by the names that `arguments` knows."""
    hardware = job.hardware
    given = {
        "commands": stack.enter_context(listen(f"{job.home}/{QMP_SOCKET}", backlog=16)).fileno(),
        "agent": stack.enter_context(listen(f"{job.home}/{AGENT_SOCKET}")).fileno(),
    }
    if hardware.main_port:
        given["exit"] = _open_file(f"{job.home}/{EXIT_STATUS}", os.O_WRONLY | os.O_CREAT, stack)
    if hardware.kernel:
        given["kernel"] = _readable(hardware.kernel, b"", stack)
        if hardware.initrd:
            given["initrd"] = _readable(hardware.initrd, job.initrd_extra, stack)
    if hardware.uefi:
        given["code"], given["vars"] = firmware.open_files(hardware.uefi, job.home)
        stack.callback(os.close, given["code"])
        stack.callback(os.close, given["vars"])
    if job.memory >= 0:
        given["memory"] = job.memory
    if hardware.cid and os.path.exists("/dev/vhost-vsock"):
        given["vsock"] = _open_file("/dev/vhost-vsock", os.O_RDWR, stack)
    return given


def _open_file(path: str, flags: int, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, fd)
    return fd


def _readable(path: str, extra: bytes, stack: contextlib.ExitStack) -> int:
    """A descriptor of a file that QEMU opens again by /proc/self/fd, as another user than ours: a copy in memory where
    the file's mode does not allow that, or where `extra` is to follow its content."""
    try:
        source = _open_file(path, os.O_RDONLY, stack)
    except FileNotFoundError:
        raise NotFound(f"{path} has vanished, and the machine boots from it", "put it back") from None
    if not extra and os.fstat(source).st_mode & _BEYOND:
        return source
    copy = os.memfd_create("copy", os.MFD_CLOEXEC)
    stack.callback(os.close, copy)
    size = os.fstat(source).st_size
    done = 0
    while done < size:
        sent = os.sendfile(copy, source, done, size - done)
        if not sent:
            break
        done += sent
    if extra:
        os.lseek(copy, -(-done // 4) * 4, os.SEEK_SET)  # archives of an initramfs begin at multiples of four bytes
        os.write(copy, extra)
    os.fchmod(copy, 0o444)
    return copy


def _raw(slave: int) -> None:
    """A terminal that passes every byte as it is; QEMU itself sets OPOST again, so its translations go as well."""
    tty.setraw(slave)
    import termios

    modes = termios.tcgetattr(slave)
    modes[1] = 0  # output flags
    termios.tcsetattr(slave, termios.TCSANOW, modes)


def last_words(home: str) -> str:
    """The last line that QEMU wrote to its standard error, without the time and the program's name; may be empty."""
    try:
        with open(f"{home}/{ERRORS}", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _ERRORS_KEPT))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    words = [line for line in lines if line.strip() and "warning:" not in line]
    if not words:
        return ""
    line = words[-1]
    return line.partition(": ")[2].strip() if "qemu-system" in line.partition(": ")[0] else line.strip()


@contextlib.contextmanager
def running(home: str, timeout: float = 30.0) -> Iterator[Qmp]:
    """A command connection to the machine in `home`, one command of ovt at a time.

    Gone when it has ended, Conflict when another command keeps it for `timeout` seconds.
    """
    lock = os.open(f"{home}/qmp.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout
    try:
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise Conflict("another ovt command is at work on it", "wait for its end, or see `ps` for what it is")
            time.sleep(_LOCK_POLL)
        with Qmp.connect(f"{home}/{QMP_SOCKET}", timeout) as qmp:
            yield qmp
    finally:
        os.close(lock)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_socket(path: str) -> bool:
    """Whether there is a socket at `path`."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def read_exit_status(home: str) -> int | None:
    """What the guest's main program left as its exit status; None when it told nothing that is one."""
    try:
        with open(f"{home}/{EXIT_STATUS}", "rb") as file:
            text = file.read(16).strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() and int(text) <= 255 else None
