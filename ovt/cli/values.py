"""How people write sizes, durations, times, and the composed options of `run`; and how they like to read them."""

from __future__ import annotations

import os
import time

from ovt.errors import NotFound, UsageError
from ovt.model import Device, Ulimit, Volume

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ULIMITS = (
    *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue"),
    *("nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)


def parse_size(text: str) -> int:
    """Bytes from `512M`, `2GiB`, `1.5g`, `4096`; units are always of 1024. UsageError otherwise."""
    lower = text.strip().lower()
    number = lower.rstrip("bkmgtpi")
    unit = lower[len(number) :]
    short = unit.removesuffix("ib") if unit != "ib" else "?"
    short = short.removesuffix("b") if len(short) > 1 else short
    try:
        if short not in _UNITS or not number[:1].isdigit() or not number.replace(".", "", 1).isdigit():
            raise ValueError
        return round(float(number) * _UNITS[short])
    except ValueError:
        raise UsageError(f"{text!r} is not a size", "such as 512M, 2GiB or 4096") from None


def parse_duration(text: str) -> float:
    """Seconds from `10`, `10s`, `1h30m`, `500ms`, `2d`. UsageError otherwise."""
    total, rest = 0.0, text.strip().lower()
    if rest and rest.replace(".", "", 1).isdigit():
        return float(rest)
    try:
        if not rest:
            raise ValueError
        while rest:
            end = next(i for i, c in enumerate(rest) if not (c.isdigit() or c == "."))
            unit = next(
                u for u in _SECONDS if rest.startswith(u, end) and not rest[end + len(u) : end + len(u) + 1].isalpha()
            )
            total += float(rest[:end]) * _SECONDS[unit]
            rest = rest[end + len(unit) :]
        return total
    except (ValueError, StopIteration):
        raise UsageError(f"{text!r} is not a duration", "such as 10s, 5m or 1h30m") from None


def parse_time(text: str) -> float:
    """Seconds since the epoch from RFC 3339 (`2026-11-22T16:00:00Z`, also without time or zone: then UTC), from a
    number of seconds since the epoch, or from a duration: so long ago. UsageError otherwise."""
    import datetime

    if text.replace(".", "", 1).isdigit() and float(text) > 1e8:
        return float(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        try:
            return time.time() - parse_duration(text)
        except UsageError:
            raise UsageError(
                f"{text!r} is neither a time nor a duration", "such as 2026-11-22T16:00:00Z, or 10m for ten minutes ago"
            ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def parse_volume(text: str) -> Volume:
    """`SOURCE:TARGET[:OPTION,…]`; the source may be relative to the present directory."""
    parts = text.split(":")
    if len(parts) not in {2, 3} or not parts[0] or not parts[1].startswith("/"):
        raise UsageError(f"{text!r} is not a volume", "SOURCE:TARGET[:OPTIONS], the target an absolute path")
    options = tuple(part for part in parts[2].split(",") if part) if len(parts) == 3 else ()
    return Volume(os.path.abspath(os.path.expanduser(parts[0])), _target(parts[1], text), options)


def parse_tmpfs(text: str) -> Volume:
    """`TARGET[:OPTION,…]` with the options of tmpfs(5)."""
    target, _, options = text.partition(":")
    if not target.startswith("/"):
        raise UsageError(f"{text!r} is not a tmpfs", "TARGET[:OPTIONS], the target an absolute path")
    return Volume("", _target(target, text), tuple(part for part in options.split(",") if part))


def _target(path: str, text: str) -> str:
    if ".." in path.split("/") or not path.strip("/"):
        raise UsageError(f"{text!r}: {path} cannot be a target", "an absolute path below / without ..")
    return path


def parse_device(text: str) -> Device:
    """`PATH[:TARGET][:PERMISSIONS]`."""
    parts = text.split(":")
    permissions = "rwm"
    if len(parts) > 1 and set(parts[-1]) <= set("rwm") and parts[-1]:
        permissions = parts.pop()
    if len(parts) > 2 or not all(part.startswith("/") for part in parts):
        raise UsageError(f"{text!r} is not a device", "/dev/NAME[:/dev/TARGET][:rwm]")
    return Device(parts[0], parts[-1], permissions)


def parse_ulimit(text: str) -> Ulimit:
    """`NAME=SOFT[:HARD]`, `unlimited` or -1 for no limit."""
    name, equals, values = text.partition("=")
    soft, _, hard = values.partition(":")
    try:
        if not equals or name not in _ULIMITS:
            raise ValueError
        numbers = [-1 if word == "unlimited" else int(word) for word in (soft, hard or soft)]
    except ValueError:
        raise UsageError(f"{text!r} is not a limit", f"NAME=SOFT[:HARD] with one of {', '.join(_ULIMITS)}") from None
    return Ulimit(name, numbers[0], numbers[1])


def parse_signal(text: str) -> int:
    """A signal's number from `TERM`, `SIGTERM`, `15` or `RTMIN+3`."""
    import signal

    word = text.upper().removeprefix("SIG")
    base, plus, offset = word.partition("+")
    try:
        number = int(word) if word.isdigit() else int(signal.Signals[f"SIG{base}"]) + (int(offset) if plus else 0)
        if not 0 < number <= signal.SIGRTMAX:
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(f"there is no signal {text!r}", "such as TERM, KILL, HUP, or kill -l for all") from None
    return number


def parse_pair(text: str) -> str:
    """`KEY=VALUE`, as it is."""
    key, equals, _ = text.partition("=")
    if not key or not equals:
        raise UsageError(f"{text!r} is not KEY=VALUE")
    return text


def parse_env(text: str, environ: dict[str, str]) -> list[str]:
    """The KEY=VALUE strings for `KEY=VALUE`, `KEY` (taken from `environ`, nothing when it is not there), `PREFIX*`."""
    key, equals, _ = text.partition("=")
    if not key:
        raise UsageError(f"{text!r} is not an environment variable", "KEY=VALUE, or KEY to pass on ovt's own")
    if equals:
        return [text]
    if key.endswith("*"):
        return [f"{name}={value}" for name, value in environ.items() if name.startswith(key[:-1])]
    return [f"{key}={environ[key]}"] if key in environ else []


def read_env_file(path: str, environ: dict[str, str]) -> list[str]:
    """The variables in a file of `KEY=VALUE` or `KEY` lines; empty ones and those that begin with # are skipped."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise NotFound(f"there is no environment file {path}") from None
    result = []
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            result += parse_env(line.lstrip(), environ)
    return result


def parse_host(text: str) -> str:
    """`NAME:ADDRESS`, as it is."""
    import ipaddress

    name, colon, address = text.partition(":")
    try:
        if not name or not colon:
            raise ValueError
        ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        raise UsageError(f"{text!r} is not a host entry", "NAME:ADDRESS, such as db:10.0.0.5") from None
    return f"{name}:{address.strip('[]')}"


def parse_publish(text: str) -> str:
    """PROTOCOL:ADDRESS:PORT:GUEST from `8080:80`, `127.0.0.1:8080:80`, `5353:53/udp`. UsageError otherwise."""
    ports, _, protocol = text.partition("/")
    *address, port, guest = ports.rsplit(":", 2) if ":" in ports else ("", "")
    numbers = [int(part) if part.isdigit() else 0 for part in (port, guest)]
    if protocol not in {"", "tcp", "udp"} or not all(0 < number < 65536 for number in numbers):
        raise UsageError(f"{text!r} does not say which port leads to which", "[ADDRESS:]PORT:GUEST_PORT[/udp]")
    where = address[0] if address else "127.0.0.1"  # the whole network only when that is said
    import socket

    try:
        socket.inet_pton(socket.AF_INET, where)
    except OSError:
        raise UsageError(f"{where!r} is no IPv4 address", "127.0.0.1:8080:80") from None
    return f"{protocol or 'tcp'}:{where}:{numbers[0]}:{numbers[1]}"


def is_mac(text: str) -> bool:
    """Whether `text` is the hardware address of one card: six bytes, not a group's, not zero."""
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and set(part) <= set("0123456789abcdef") for part in parts):
        return False
    return not int(parts[0], 16) & 1 and any(part != "00" for part in parts)


def show_size(count: float) -> str:
    """`12.3MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError("unreachable")


def show_age(seconds: float) -> str:
    """`5 minutes`: the largest unit that fits, rounded down."""
    for size, name in ((86400 * 7, "week"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        count = int(seconds // size)
        if count > 0:
            return f"{count} {name}{'s' if count > 1 else ''}"
    return "less than a second"


def show_time(moment: float) -> str | None:
    """RFC 3339 in UTC with milliseconds; None for never."""
    if not moment:
        return None
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    return f"{whole}.{int(moment % 1 * 1000):03d}Z"
