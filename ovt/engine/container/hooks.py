"""OCI hooks (runtime-spec, "POSIX-platform Hooks"): programs run with the container's state on their stdin."""

from __future__ import annotations

import posix
import select
import time

from ovt.errors import HostError, refused
from ovt.kernel import jsonc
from ovt.kernel.syscalls import O_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIGPIPE, _SIGXFSZ, _SIGKILL = 13, 25, 9


def run(
    config_hooks: dict[str, Any] | None, name: str, state: dict[str, Any], failures: list[str] | None = None
) -> None:
    """Run the hooks of one point in order; the first that fails ends it with HostError.

    With `failures` (poststop, where the runtime-spec wants a warning) it is noted there, and the next one runs.
    """
    hooks = (config_hooks or {}).get(name) or []
    if not hooks:
        return
    # the bundle is the working directory of hooks, as runc and crun have it
    before = posix.open(".", O_PATH | posix.O_CLOEXEC)
    try:
        posix.chdir(state["bundle"])
        for i, hook in enumerate(hooks):
            try:
                _run_one(f"{name} hook #{i} ({hook['path']})", hook, state)
            except HostError as error:
                if failures is None:
                    raise
                failures.append(error.message)
    finally:
        posix.fchdir(before)
        posix.close(before)


def _run_one(what: str, hook: dict[str, Any], state: dict[str, Any]) -> None:
    args = hook.get("args") or [hook["path"]]
    env: dict[bytes, bytes] = {}
    if hook.get("env") is None:
        env = posix.environ
    for entry in hook.get("env") or []:
        key, _, value = entry.encode().partition(b"=")
        env[key] = value
    stdin = as_stdin(state)
    out_read, out_write = posix.pipe2(posix.O_CLOEXEC)
    actions: list[tuple[Any, ...]] = [
        (posix.POSIX_SPAWN_DUP2, stdin, 0),
        (posix.POSIX_SPAWN_DUP2, out_write, 1),
        (posix.POSIX_SPAWN_DUP2, out_write, 2),
    ]
    # a hook may leave a daemon behind, which would hold on to what our caller leaked to us
    inherited = [int(name) for name in posix.listdir("/proc/self/fd")]
    actions += [(posix.POSIX_SPAWN_CLOSE, fd) for fd in inherited if fd > 2]
    try:
        pid = posix.posix_spawn(
            hook["path"], args, env, file_actions=actions, setsigmask=[], setsigdef=[_SIGPIPE, _SIGXFSZ]
        )
    except OSError as error:
        posix.close(out_read)
        raise refused(what, error) from None
    finally:
        posix.close(stdin)
        posix.close(out_write)
    try:
        output = _wait(what, pid, out_read, hook.get("timeout"))
    finally:
        posix.close(out_read)
    status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
    if status:
        words = output[-2048:].decode("utf-8", "replace").strip()
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise HostError(f"error executing {what}: {how}" + (f", output: {words}" if words else ""))


def as_stdin(state: dict[str, Any]) -> int:
    """A descriptor that gives a hook its state: a file, as a pipe is full after 64 KiB, and a hook need not read."""
    fd = posix.memfd_create("state", posix.MFD_CLOEXEC)
    raw = jsonc.dumps(state).encode()
    while raw:
        raw = raw[posix.write(fd, raw) :]
    posix.lseek(fd, 0, 0)
    return fd


def _wait(what: str, pid: int, out: int, timeout: int | None) -> bytes:
    """Collect output until the hook exits; kill it when `timeout` seconds have passed."""
    pidfd = posix.pidfd_open(pid, 0)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(out, select.POLLIN)
    deadline = time.monotonic() + timeout if timeout else None
    output = b""
    try:
        while True:
            left = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)
            ready = dict(poll.poll(left))
            if not ready:
                posix.kill(pid, _SIGKILL)
                posix.waitpid(pid, 0)
                raise HostError(f"{what}: did not end within {timeout} s and was killed")
            if out in ready:
                chunk = posix.read(out, 65536)
                output = (output + chunk)[-65536:]
                if not chunk:
                    poll.unregister(out)
            if pidfd in ready:
                return output  # not at the pipe's end: a daemon that the hook left behind may hold it, and write
    finally:
        posix.close(pidfd)
