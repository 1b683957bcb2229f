"""/proc, read: process identity and state. Import-light; nothing here changes anything."""

import posix

_READ = posix.O_RDONLY | posix.O_CLOEXEC


def read(path: str, limit: int = 1 << 20) -> str:
    """The text of a small kernel file; at most `limit` bytes; undecodable bytes survive as surrogates."""
    fd = posix.open(path, _READ)
    try:
        chunks = []
        while limit > 0:
            chunk = posix.read(fd, min(limit, 65536))
            if not chunk:
                break
            chunks.append(chunk)
            limit -= len(chunk)
    finally:
        posix.close(fd)
    return b"".join(chunks).decode("utf-8", "surrogateescape")


def write(path: str, text: str, dir_fd: int | None = None) -> None:
    """Write `text` to an existing kernel file in one write(2), as most of them require."""
    fd = posix.open(path, posix.O_WRONLY | posix.O_CLOEXEC, dir_fd=dir_fd)
    try:
        posix.write(fd, text.encode("utf-8", "surrogateescape"))
    finally:
        posix.close(fd)


def stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from field 3 (state) on, or None when there is no such process (proc(5))."""
    try:
        text = read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the command name is in parentheses and may hold anything, also ")"
    return text[text.rindex(")") + 2 :].split()


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which the process began: with the pid it names one process for good (field 22)."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else None


def alive(pid: int, started: int) -> bool:
    """True when `pid` is still the process that began at `started` and has not exited (a zombie has)."""
    fields = stat_fields(pid)
    return fields is not None and int(fields[19]) == started and fields[0] not in "ZX"
