"""start, kill, pause, resume and delete of a container that exists. None of them needs more than its state record."""

from __future__ import annotations

import posix
import select
import time
from _signal import pidfd_send_signal  # type: ignore[import-not-found]
from errno import ENOENT, ENXIO, ESRCH

from ovt.errors import HostError, NotFound, OvtError, PayloadError, StateError
from ovt.kernel import procfs

from .state import CREATED, FIFO, PAUSED, RUNNING, START_ERROR, STOPPED, State, check_id, remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ovt.kernel.cgroup import Cgroup

_SIGKILL = 9


def start(state: State) -> None:
    """Let the waiting init execute the container's program; returns when it has, raises when it could not.

    The plain part of this, without hooks, is also in ovt/launcher.c; what fails there is told here.
    """
    status = state.status()
    if status != CREATED:
        if not state.waiting() and status == STOPPED:
            _raise_start_error(state)
        raise StateError(f"cannot start a container in the {status} state: {state.id}")
    if not state.template["process"].get("args"):
        raise OvtError(f"cannot start {state.id}: the configuration has no process to run")
    hooks = state.record["hooks"]
    if hooks.get("startContainer"):
        from . import exec as exec_

        try:
            exec_.run_start_hooks(state)
        except (OSError, OvtError):
            delete(state, force=True)
            raise
    fifo = f"{state.path}/{FIFO}"
    try:
        fd = posix.open(fifo, posix.O_WRONLY | posix.O_NONBLOCK | posix.O_CLOEXEC)
    except OSError as error:
        if error.errno in (ENXIO, ENOENT):
            raise StateError(f"cannot start a container that has stopped: {state.id}") from None
        raise
    try:
        posix.unlink(fifo)  # whoever unlinks it is the one who starts
    except FileNotFoundError:
        posix.close(fd)
        raise StateError(f"container {state.id} is being started by another process") from None
    try:
        posix.write(fd, b"\1")
    except BrokenPipeError:
        posix.close(fd)
        raise StateError(f"cannot start a container that has stopped: {state.id}") from None
    # the reading end closes by itself when execve succeeds, and with the process when it fails
    poll = select.poll()
    poll.register(fd, 0)
    poll.poll()
    posix.close(fd)
    _raise_start_error(state)
    if hooks.get("poststart"):
        from . import hooks as hooks_

        try:
            hooks_.run(hooks, "poststart", state.oci())
        except (OSError, OvtError):
            delete(state, force=True)
            raise


def _raise_start_error(state: State) -> None:
    try:
        report = procfs.read(f"{state.path}/{START_ERROR}").encode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return  # a restored container has none, and one whose program has ended may be deleted by now
    if not report:
        return
    errno = int.from_bytes(report[4:8], "little")
    name = state.template["process"]["args"][0]
    words = posix.strerror(errno).lower()
    raise PayloadError(f'exec: "{name}": {words}', 127 if errno == ENOENT else 126)


def kill(state: State, signal: int, everything: bool = False) -> None:
    """Signal the init process, or every process of the container."""
    status = state.status()
    if everything and state.record.get("cgroup"):
        from ovt.kernel import cgroup

        group = cgroup.restore(state.record["cgroup"])
        if group.pids():
            group.kill(signal)
            return
        if status == STOPPED:
            return  # nobody left is no error, as runc has it: containerd sends this after the end
        # a normal user's container has stayed in the cgroup of its caller
    if status == STOPPED:
        raise StateError(f"container not running: {state.id}", "its process has ended; delete it")
    if not state.pid:
        raise StateError(f"container not running: {state.id} is being created")
    try:
        pidfd = posix.pidfd_open(state.pid, 0)
    except OSError as error:
        if error.errno == ESRCH:
            raise StateError(f"container not running: {state.id}: no such process") from None
        raise
    try:
        if not state.alive():  # the pid may have been reused before it was opened
            raise StateError(f"container not running: {state.id}: process already finished")
        pidfd_send_signal(pidfd, signal)
    except ProcessLookupError:
        raise StateError(f"container not running: {state.id}: process already finished") from None
    finally:
        posix.close(pidfd)
    if signal == _SIGKILL and status == PAUSED:
        from ovt.kernel import cgroup

        cgroup.restore(state.record["cgroup"]).thaw()  # a frozen v1 process never sees its death


def pause(state: State) -> None:
    """Freeze every process."""
    status = state.status()
    if status not in (RUNNING, CREATED):
        raise StateError(f"cannot pause a container in the {status} state: container not running: {state.id}")
    from . import plain

    plain.forget(state)
    _cgroup(state, "pause").freeze()


def resume(state: State) -> None:
    """Thaw it."""
    status = state.status()
    if status != PAUSED:
        raise StateError(f"cannot resume a container in the {status} state: container not paused: {state.id}")
    _cgroup(state, "resume").thaw()


def _cgroup(state: State, verb: str) -> Cgroup:
    from ovt.kernel import cgroup

    if not state.record.get("cgroup"):
        raise StateError(f"cannot {verb} {state.id}: it has no cgroup", "it was made with cgroups disabled")
    return cgroup.restore(state.record["cgroup"])


def delete(state: State, force: bool = False) -> list[str]:
    """Remove everything the container had. A running one only with `force`, which kills it first.

    Returns warnings: by the runtime-spec a poststop hook that fails is no reason to fail.

    Repeating an interrupted deletion is fine: each thing is removed if it is still there, the record last. Of a stopped
    container without hooks the same is done in ovt/launcher.c; plain.py says when.
    """
    status = state.status()
    if status != STOPPED:
        if not force and status != CREATED:
            raise StateError(
                f"cannot delete container {state.id} that is not stopped: {status}", "stop it first, or delete --force"
            )
        _kill_and_wait(state)
    record = state.record
    if record.get("netDevices"):
        from . import net_devices

        net_devices.move_back(state)
    if record.get("cgroup"):
        from ovt.kernel import cgroup

        group = cgroup.restore(record["cgroup"])
        if not record["cgroup"].get("made", True):
            # the maker was killed between making the directories and saying so. Its init is gone in a moment; whoever
            # stays was there before, and then the directories are not ours
            for _ in range(100):
                if not group.pids():
                    group = cgroup.restore({**record["cgroup"], "made": True})
                    break
                time.sleep(0.005)
        elif group.pids():
            # processes that outlive their init: it shared the host's pid namespace
            group.kill(_SIGKILL)
        group.remove()
    if record.get("intelRdt"):
        from . import intel_rdt

        intel_rdt.remove(record["intelRdt"])
    stopped = {**state.oci(), "status": STOPPED, "pid": 0} if record["hooks"].get("poststop") else None
    state.remove()
    warnings: list[str] = []
    if stopped:
        from . import hooks as hooks_

        hooks_.run(record["hooks"], "poststop", stopped, warnings)
    return warnings


def _kill_and_wait(state: State) -> None:
    try:
        kill(state, _SIGKILL, everything=bool(state.record.get("cgroup")))
    except StateError:
        pass  # it ended in the meantime
    deadline = time.monotonic() + 10
    pause_ = 0.0005
    moved = False
    while state.alive():
        if time.monotonic() > deadline - 9.8 and not moved:
            moved = True
            if _exiting(state.pid):
                # dead, but for a process of its pid namespace that somebody outside has not waited for: an `exec`
                # whose caller does not reap. It has left its cgroup and all other namespaces, and nothing runs on
                return
            if state.record.get("cgroup"):
                # somebody has put it into a frozen cgroup of his own (v1), where it never sees its death
                _bring_home(state)
        if time.monotonic() > deadline:
            fields = procfs.stat_fields(state.pid)
            raise HostError(
                f"container {state.id}: process {state.pid} (state {fields[0] if fields else '?'}) does not die",
                hint="a process in state D waits for a device or a network filesystem; delete again when it is back",
            )
        time.sleep(pause_)
        pause_ = min(pause_ * 2, 0.05)


def _exiting(pid: int) -> bool:
    """True from the moment on at which exit(2) began (PF_EXITING of the flags, field 9 of /proc/PID/stat)."""
    fields = procfs.stat_fields(pid)
    return fields is None or bool(int(fields[6]) & 0x4)


def _bring_home(state: State) -> None:
    from ovt.kernel import cgroup

    try:
        cgroup.restore(state.record["cgroup"]).attach(state.pid)
    except (OSError, OvtError):
        pass  # it was worth a try; what keeps it is told when the time is up


def delete_damaged(root: str, container_id: str) -> None:
    """Remove a state directory whose record cannot be read. NotFound when there is none."""
    check_id(container_id)
    path = f"{root}/{container_id}"
    try:
        posix.lstat(path)
    except FileNotFoundError:
        raise NotFound(f"container does not exist: {container_id}") from None
    remove_tree(path)
