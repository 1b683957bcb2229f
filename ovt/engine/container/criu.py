"""The `criu` program: finding it, running it, and saying in one line why it failed.

Knows command lines and log files, nothing of containers; that is `checkpoint.py`.
"""

from __future__ import annotations

import posix

from ovt.errors import HostError

# Engines start runtimes with an almost empty environment; criu itself needs tar, ip and iptables or nft.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The first one that exists is used; the second is where administrators have put settings for containers so far.
CONFIG_FILES = ("/etc/criu/ovt.conf", "/etc/criu/runc.conf")

_LOG_LIMIT = 16 << 20
_CONSEQUENCES = ("FAILED", "failed with", "exited unexpectedly", "killed by signal", "Can't wait")


def search_path() -> str:
    """The PATH to find criu and its helpers on."""
    path: str = posix.environ.get(b"PATH", b"").decode("utf-8", "surrogateescape")
    return path or DEFAULT_PATH


def find() -> str:
    """The path of the criu program; HostError with what to install when there is none."""
    for directory in search_path().split(":"):
        path = f"{directory}/criu"
        if directory and posix.access(path, posix.X_OK) and posix.stat(path).st_mode & 0o170000 == 0o100000:
            return path
    raise HostError("criu is not installed", 2, hint="install the package criu (version 3.16 or newer)")


def environment() -> dict[bytes, bytes]:
    """The caller's environment with a PATH."""
    return {**posix.environ, b"PATH": search_path().encode("utf-8", "surrogateescape")}


def config_arguments(annotations: dict[str, str]) -> list[str]:
    """`--config FILE` from the annotation org.criu.config (empty: none), else from the first default that exists."""
    named = annotations.get("org.criu.config")
    if named is not None:
        return ["--config", named] if named else []
    for path in CONFIG_FILES:
        if posix.access(path, posix.R_OK):
            return ["--config", path]
    return []


def require(program: str, feature: str, what: str) -> None:
    """HostError unless criu finds `feature` of `criu check` in this kernel; `what` is the option that needs it."""
    try:
        run([program, "check", "--feature", feature], "")
    except HostError as error:
        raise HostError(
            f"{what} is not possible on this kernel: {feature} is missing", 95, hint="leave it out"
        ) from error


def run(argv: list[str], log: str) -> None:
    """Run criu to its end, with its words going to `log`; HostError quotes the error that tells why."""
    null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
    complaints = posix.memfd_create("criu", posix.MFD_CLOEXEC)
    try:
        actions = [
            (posix.POSIX_SPAWN_DUP2, null, 0),
            (posix.POSIX_SPAWN_DUP2, null, 1),
            (posix.POSIX_SPAWN_DUP2, complaints, 2),
        ]
        pid = posix.posix_spawn(argv[0], argv, environment(), file_actions=actions, setsigmask=[])
        status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
        if status:
            raise failure(argv[1], status, log, complaints)
    finally:
        posix.close(null)
        posix.close(complaints)


def failure(verb: str, status: int, log: str, complaints: int) -> HostError:
    """The error for a criu that ended with `status` (negative: a signal); `complaints` holds what it printed."""
    try:
        fd = posix.open(log, posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            text = posix.read(fd, _LOG_LIMIT)
        finally:
            posix.close(fd)
    except OSError:
        text = b""
    reason = telling_error(text) or telling_error(posix.pread(complaints, _LOG_LIMIT, 0))
    how = reason or (f"exit status {status}" if status > 0 else f"killed by signal {-status}")
    return HostError(f"criu {verb} failed: {how}", hint=f"the whole story is in {log}" if text else "try: criu check")


def telling_error(log: bytes) -> str:
    """The error line of a log that says why, without its time; failing that its last line; '' when it is empty.

    Errors that CRIU can live with come first and mere consequences last, so it is the last that is not one of those.
    """
    lines = [line.strip() for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line[line.index("Error (") :] for line in lines if "Error (" in line]
    causes = [line for line in errors if not any(word in line for word in _CONSEQUENCES)]
    return (causes or errors or lines or [""])[-1]
