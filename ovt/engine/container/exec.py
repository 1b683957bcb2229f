"""exec: another process in a running container.

ovt-init again, from its sealed memfd: its tape joins the container's namespaces and clones; the clone is in the
pid namespace from its first instruction and has the container's root. No Python, no host directory and no host
descriptor is ever visible to the container (CVE-2019-5736, 2024-21626).
"""

from __future__ import annotations

import posix

from ovt.errors import PayloadError, StateError
from ovt.kernel import procfs
from ovt.kernel import syscalls as sc

from . import console, paths, process, settle
from .init import Init, above
from .state import CREATED, PAUSED, RUNNING, State, write_pid_file
from .tape import Tape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.kernel.seccomp import Program

    from .labels import Labels

# Joined before the clone: a process that appears in the pid namespace with the host's root lets a neighbour with
# CAP_SYS_PTRACE reach it (/proc/PID/root). The cgroup namespace comes last: CLONE_INTO_CGROUP needs the host's view.
_OUTSIDE = ~sc.CLONE_NEWCGROUP


class Request:
    """What `exec` is asked to do besides the process itself."""

    __slots__ = (
        "cgroup",
        "console_socket",
        "ignore_paused",
        "keep_fds",
        "pid_file",
        "stdio",
        "want_terminal",
    )

    def __init__(self) -> None:
        self.cgroup: str | None = None  # a cgroup below the container's own
        self.console_socket: str | None = None
        self.ignore_paused = False
        self.keep_fds = 0
        self.pid_file: str | None = None
        self.stdio = (0, 1, 2)
        self.want_terminal = False


def execute(state: State, spec: dict[str, Any], request: Request) -> tuple[int, int]:
    """Run `spec` (an OCI process) in the container: (pid, terminal master or -1). The process is the caller's child."""
    status = state.status()
    if status == PAUSED and not request.ignore_paused:
        raise StateError(f"cannot exec in a paused container: {state.id}", "resume it first, or --ignore-paused")
    if status not in (CREATED, RUNNING, PAUSED):
        raise StateError(f"cannot exec in a stopped container: container not running: {state.id}")
    record = state.record
    lowest = 3 + request.keep_fds
    opened: list[int] = []
    init: Init | None = None
    done = False
    try:
        pidfd = above(posix.pidfd_open(state.pid, 0), lowest)
        opened.append(pidfd)
        if not state.alive():
            raise StateError(f"cannot exec in a stopped container: container not running: {state.id}")
        root = posix.open(f"/proc/{state.pid}/root", paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        opened.append(above(root, lowest))
        root = opened[-1]
        program, env = _look_up(root, spec)
        master, slave = -1, -1
        if spec.get("terminal"):
            master, slave = console.open_pair(root, spec.get("consoleSize"), (spec.get("user") or {}).get("uid") or 0)
            opened += [master, slave]
        affinity = spec.get("execCPUAffinity") or {}
        mask = record["namespaces"]
        keep = [pidfd, root] if record["no_pivot"] else [pidfd]
        enter, into = _cgroup_fds(state, request.cgroup)
        enter = [above(fd, lowest) for fd in enter]
        opened += enter
        if into >= 0:
            into = above(into, lowest)
            opened.append(into)
        labels = _labels(state, spec, lowest)
        if labels:
            opened.append(labels.proc)
            keep.append(labels.proc)
        init = Init(request.stdio, [*keep, *enter, *([into] if into >= 0 else [])], lowest)
        process.set_affinity(init.pid, affinity.get("initial"))
        tape = Tape()
        zero = tape.text("0")
        for fd in enter:
            tape.call("enter the cgroup", "write", fd, zero, 1)
        if posix.geteuid() == 0:
            # a rootless runtime could not touch it any more, and has nothing that the container has not
            tape.call("become undumpable", "prctl", sc.PR_SET_DUMPABLE, 0, 0, 0, 0)
        if mask & _OUTSIDE:
            tape.call("join the container's namespaces", "setns", pidfd, mask & _OUTSIDE)
        if mask & sc.CLONE_NEWUSER:
            # at once: a host's root among the container's users would be worth tracing, sysctls go by the uid alone
            user = spec.get("user") or {}
            uid, gid = (0, 0) if record["maps_root"] else (user.get("uid") or 0, user.get("gid") or 0)
            tape.call("become a user of the user namespace", "setresgid", gid, gid, gid)
            tape.call("become a user of the user namespace", "setresuid", uid, uid, uid)
        if record["no_pivot"]:
            tape.call("enter the container's root", "fchdir", root)
            tape.call("chroot", "chroot", tape.text("."))
        tape.clone("clone into the container", sc.CLONE_PARENT, into)
        init.close_inherited(tape, [pidfd, *([labels.proc] if labels else [])])
        init.send(tape)
        pid = init.adopt_clone(tape)
        if not enter and into < 0:
            _attach_cgroup(state, pid, request.cgroup)
        process.set_affinity(pid, affinity.get("final"))
        process.apply_from_outside(pid, spec)
        final, listener = _final(state, spec, program, env, lowest)
        tape = _join(state, mask, pidfd)
        process.become_session(tape, bool(spec.get("terminal")))
        if not spec.get("terminal"):
            process.own_stdio(request.stdio, spec, _mappings(pid) if final.user_namespace else {})
        final.labels = labels
        final.no_setgroups = procfs.read(f"/proc/{pid}/setgroups").startswith("deny")
        process.finish(tape, final, init.sync_fd)
        init.send(tape, (slave,) if slave >= 0 else ())
        _, value = init.wait(tape)
        if listener is not None and listener.notify:
            from . import seccomp_agent

            seccomp_agent.hand_over(pid, value, listener, state, spec)
            init.tell()
            init.wait(tape)
        try:
            init.wait(tape, end_is_success=True)
        except OSError as error:
            raise PayloadError(f"{error.filename}: {(error.strerror or '').lower()}", 126) from None
        if master >= 0 and request.console_socket:
            console.send_master(request.console_socket, master)
        if request.pid_file:
            write_pid_file(request.pid_file, pid)
        if master >= 0 and request.want_terminal:
            opened.remove(master)
        done = True
        return pid, master if request.want_terminal else -1
    finally:
        for fd in opened:
            posix.close(fd)
        if init is not None:
            init.close()
            if not done:
                init.reap()


def _labels(state: State, spec: dict[str, Any], lowest: int) -> Labels | None:
    """Labels that the process does not name itself are those of the container."""
    names = ("apparmorProfile", "selinuxLabel")
    wanted = {name: spec.get(name) or state.template["process"].get(name) for name in names}
    if not any(wanted.values()):
        return None
    from .labels import Labels

    return Labels({**spec, **wanted}, lowest)


def _mappings(pid: int) -> dict[str, list[dict[str, int]]]:
    """The id mappings of the user namespace of `pid`, as config.linux has them."""
    out: dict[str, list[dict[str, int]]] = {}
    for kind in ("uid", "gid"):
        rows = [map(int, line.split()) for line in procfs.read(f"/proc/{pid}/{kind}_map").splitlines()]
        out[f"{kind}Mappings"] = [dict(zip(("containerID", "hostID", "size"), row, strict=True)) for row in rows]
    return out


def _look_up(root: int, spec: dict[str, Any]) -> tuple[str, list[str]]:
    env: list[str] = list(spec.get("env") or [])
    program, why = paths.find_program(root, spec.get("program") or spec["args"][0], spec.get("cwd") or "/", env)
    if not program:
        raise PayloadError(why, 126 if "permission denied" in why else 127)
    if not any(entry.startswith("HOME=") for entry in env):
        env.append(f"HOME={paths.home_of(root, (spec.get('user') or {}).get('uid') or 0)}")
    return program, env


def _cgroup_fds(state: State, sub: str | None) -> tuple[list[int], int]:
    """v1: descriptors through which a process moves itself in; v2: the directory for CLONE_INTO_CGROUP, or -1."""
    if not state.record.get("cgroup"):
        return [], -1
    from ovt.kernel import cgroup

    group = cgroup.restore(state.record["cgroup"])
    enter = group.enter_fds(sub or "")
    user_namespace = state.record["namespaces"] & sc.CLONE_NEWUSER
    return enter, -1 if enter or user_namespace else group.fd(sub or "", state.pid)


def _attach_cgroup(state: State, pid: int, sub: str | None) -> None:
    if not state.record.get("cgroup"):
        return
    from ovt.kernel import cgroup

    cgroup.restore(state.record["cgroup"]).attach(pid, sub or "", state.pid)


def _join(state: State, mask: int, pidfd: int) -> Tape:
    tape = Tape()
    settle.join_keyring(tape, state.id)
    rest = mask & ~_OUTSIDE
    if rest:
        tape.call("join the container's namespaces", "setns", pidfd, rest)
    process.personality(tape, state.template)
    return tape


def _final(
    state: State, spec: dict[str, Any], program: str, env: list[str], lowest: int
) -> tuple[process.Final, Program | None]:
    capabilities = spec.get("capabilities") or state.template["process"].get("capabilities")
    final = process.Final({**spec, "env": env, "capabilities": capabilities}, program, lowest)
    final.user_namespace = bool(state.record["namespaces"] & sc.CLONE_NEWUSER)
    profile = state.template.get("seccomp")
    if not profile:
        return final, None
    from ovt.kernel import seccomp

    root = state.path.rsplit("/", 1)[0]
    receiver = state.record["annotations"].get("run.oci.seccomp.receiver", "")
    listener = seccomp.compile(profile, cache_dir=f"{root}/.seccomp", receiver=receiver)
    final.seccomp = (listener.bpf, listener.flags, listener.notify)
    return final, listener


def run_start_hooks(state: State) -> None:
    """startContainer hooks: run inside the container, as its root, before its program (runtime-spec)."""
    from . import hooks

    for i, hook in enumerate(state.record["hooks"]["startContainer"]):
        what = f"startContainer hook #{i} ({hook['path']})"
        spec = {
            "args": hook.get("args") or [hook["path"]],
            "program": hook["path"],
            "env": hook.get("env") or [],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": state.template["process"].get("capabilities"),
        }
        stdin = hooks.as_stdin(state.oci())
        null = posix.open("/dev/null", posix.O_WRONLY | posix.O_CLOEXEC)
        request = Request()
        request.stdio = (stdin, null, null)
        try:
            pid, _ = execute(state, spec, request)
        finally:
            posix.close(stdin)
            posix.close(null)
        _wait_hook(what, pid, hook.get("timeout"))


def _wait_hook(what: str, pid: int, timeout: int | None) -> None:
    import select

    from ovt.errors import HostError

    pidfd = posix.pidfd_open(pid, 0)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    timely = bool(poll.poll(timeout * 1000 if timeout else None))
    posix.close(pidfd)
    if not timely:
        posix.kill(pid, 9)
    status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
    if not timely:
        raise HostError(f"{what}: did not end within {timeout} s and was killed")
    if status:
        raise HostError(f"error executing {what}: " + (f"exit status {status}" if status > 0 else f"signal {-status}"))
