"""Run a function in a new user namespace, with the ids that /etc/subuid and /etc/subgid grant the caller.

For work on files of a rootless container, whose owners are the caller's subordinate ids; containers themselves get
their namespaces from their runtime. The function runs in a forked child: only its failure comes back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ovt import errors
from ovt.errors import HostError, OvtError
from ovt.kernel.syscalls import CLONE_NEWNS, CLONE_NEWUSER, unshare

Mapping = tuple[int, int, int]  # inside, outside, count


def subordinate(path: str, user: str, number: int) -> list[tuple[int, int]]:
    """The (first, count) ranges that the file `path` (subuid(5), subgid(5)) grants `user`, by name or number."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    ranges = []
    for line in lines:
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in {user, str(number)} and fields[1].isdigit() and fields[2].isdigit():
            ranges.append((int(fields[1]), int(fields[2])))
    return ranges


def mappings(own: int, ranges: Sequence[tuple[int, int]]) -> tuple[Mapping, ...]:
    """Root inside is the caller `own` outside; the subordinate ranges follow from 1 on."""
    result: list[Mapping] = [(0, own, 1)]
    inside = 1
    for first, count in ranges:
        result.append((inside, first, count))
        inside += count
    return tuple(result)


def run_mapped(uids: Sequence[Mapping], gids: Sequence[Mapping], function: Callable[[], None]) -> None:
    """Run `function` as root of a new user and mount namespace; OvtError of the function is raised here as itself."""
    ready_read, ready_write = os.pipe()
    mapped_read, mapped_write = os.pipe()
    result_read, result_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for fd in (ready_read, mapped_write, result_read):
                os.close(fd)
            _child(ready_write, mapped_read, result_write, function)
        finally:
            os._exit(1)
    for fd in (ready_write, mapped_read, result_write):
        os.close(fd)
    try:
        if os.read(ready_read, 1):
            _write_maps(pid, uids, gids)
            os.write(mapped_write, b"1")
    finally:
        os.close(ready_read)
        os.close(mapped_write)  # without the byte the child gives up
        failure = b""
        while chunk := os.read(result_read, 65536):
            failure += chunk
        os.close(result_read)
        _, status = os.waitpid(pid, 0)
    if failure:
        kind, message, hint = failure.decode("utf-8", "surrogateescape").split("\0")
        error = getattr(errors, kind, OvtError)
        if error in {errors.ConfigError, errors.PayloadError}:
            error = OvtError
        raise error(message, hint=hint)
    if status != 0:
        raise HostError(f"the helper in the user namespace ended with status {os.waitstatus_to_exitcode(status)}")


def _child(ready: int, mapped: int, result: int, function: Callable[[], None]) -> None:
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        os.write(ready, b"1")
        if os.read(mapped, 1):
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            function()
    except OvtError as error:
        _send(result, type(error).__name__, error.message, error.hint)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _send(result, "HostError", f"{where}{error.strerror}", "")
    except Exception as error:
        _send(result, "OvtError", f"{type(error).__name__}: {error}", "")
    os._exit(0)


def _send(fd: int, *fields: str) -> None:
    os.write(fd, "\0".join(fields).encode("utf-8", "surrogateescape"))


def _write_maps(pid: int, uids: Sequence[Mapping], gids: Sequence[Mapping]) -> None:
    if os.geteuid() == 0:
        for name, mapping in (("uid_map", uids), ("gid_map", gids)):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii", buffering=-1) as file:
                file.write("".join(f"{inside} {outside} {count}\n" for inside, outside, count in mapping))
        return
    import subprocess

    for program, mapping in (("newuidmap", uids), ("newgidmap", gids)):
        words = [str(number) for triple in mapping for number in triple]
        try:
            done = subprocess.run([program, str(pid), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise HostError(f"{program} is missing", hint="apt-get install uidmap") from None
        if done.returncode != 0:
            raise HostError(f"{program}: {done.stderr.strip()}", hint="ovt check names what /etc/subuid lacks")
