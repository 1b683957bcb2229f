"""ovt-runtime: the command line of an OCI runtime, as podman, conmon, containerd, docker and CRI-O call it.

The contract is runc's: same flags, same exit statuses, same words where callers look for them. Nothing but the
result goes to stdout; an error is one line on stderr, or one JSON object in --log. Every verb has its own function
and imports what it needs; there is no option parser, because building one costs more than most verbs do.
"""

from __future__ import annotations

import posix
import sys

from ovt import __version__
from ovt.errors import OvtError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPEC_VERSION = "1.3.0"


class Globals:
    """The options before the verb."""

    __slots__ = ("cgroup_manager", "debug", "failure", "log", "log_format", "root", "systemd_cgroup")

    def __init__(self) -> None:
        self.root: str | None = None
        self.log = ""
        self.log_format = "text"
        self.debug = False
        self.cgroup_manager = "cgroupfs"
        self.systemd_cgroup = False
        self.failure = 1  # the exit status of a failure; exec has 255, to be told from the program's own


_GLOBAL_VALUES = frozenset({"root", "log", "log-format", "cgroup-manager", "rootless", "criu", "log-level"})
_GLOBAL_SWITCHES = frozenset({"debug", "systemd-cgroup", "help", "h", "version", "v"})


def split(
    args: list[str], values: frozenset[str], switches: frozenset[str], rest: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Separate options from words: `--name value`, `--name=value`, one or two dashes; a switch may have =true/false.

    With `rest`, everything from the second word on is left alone (the command of `exec`). Values collect in lists.
    """
    options: dict[str, list[str]] = {}
    words: list[str] = []
    i = 0
    while i < len(args):
        arg = args[i]
        i += 1
        if arg == "--":
            words += args[i:]
            break
        if not arg.startswith("-") or arg == "-":
            words.append(arg)
            if rest:
                words += args[i:]
                break
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        if name in switches:
            if not equals or value in ("true", "1"):
                options[name] = ["true"]
            elif value not in ("false", "0"):
                raise UsageError(f"invalid boolean value {value!r} for --{name}")
        elif name in values:
            if not equals:
                if i == len(args):
                    raise UsageError(f"flag needs an argument: --{name}")
                value = args[i]
                i += 1
            options.setdefault(name, []).append(value)
        else:
            raise UsageError(f"unknown option: {arg}")
    return options, words


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status. Never raises."""
    globals_ = Globals()
    try:
        _keep_stdio_open()
        return _dispatch(sys.argv[1:] if argv is None else argv, globals_)
    except OvtError as error:
        _complain(globals_, f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
        return globals_.failure
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(globals_, f"{where}{posix.strerror(error.errno or 0).lower()}")
        return globals_.failure
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _complain(globals_, f"internal error: {type(error).__name__}: {error}")
        if globals_.debug:
            raise
        return globals_.failure


def _dispatch(args: list[str], globals_: Globals) -> int:
    options, words = split(args, _GLOBAL_VALUES, _GLOBAL_SWITCHES, rest=True)
    if "version" in options or "v" in options:
        _print_version()
        return 0
    globals_.root = options.get("root", [""])[-1] or None
    globals_.log = options.get("log", [""])[-1]
    globals_.log_format = options.get("log-format", ["text"])[-1]
    globals_.debug = "debug" in options
    if globals_.log_format not in ("text", "json"):
        raise UsageError(f"unknown log-format {globals_.log_format!r}", "text or json")
    if globals_.log:
        posix.close(_open_log(globals_))  # a log that cannot be written is told before anything is done
    globals_.systemd_cgroup = "systemd-cgroup" in options
    globals_.cgroup_manager = options.get("cgroup-manager", ["systemd" if globals_.systemd_cgroup else "cgroupfs"])[-1]
    if not words or "help" in options or "h" in options or words[0] == "help":
        from ovt.runtime_verbs import help_text

        posix.write(1, help_text.overview().encode())
        return 0 if words or options else 1
    verb, rest = words[0], words[1:]
    from ovt import runtime_verbs

    return runtime_verbs.run(verb, rest, globals_)


def _print_version() -> None:
    posix.write(1, f"ovt-runtime version {__version__}\ncommit: v{__version__}\nspec: {_SPEC_VERSION}\n".encode())


def _keep_stdio_open() -> None:
    """A caller that closed 0, 1 or 2 must not have a file of ours land there."""
    for fd in range(3):
        try:
            posix.fstat(fd)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)


def warn(globals_: Globals, messages: list[str]) -> None:
    """Tell what went wrong without making the command fail."""
    for message in messages:
        _complain(globals_, f"warning: {message}", "warning")


def _complain(globals_: Globals, message: str, level: str = "error") -> None:
    """One line on stderr; with --log also there, in its format, once."""
    line = " ".join(message.split("\n"))
    if globals_.log:
        try:
            _write_log(globals_, line, level)
        except OSError as error:
            line += f" (and cannot write {globals_.log}: {posix.strerror(error.errno or 0)})"
    try:
        posix.write(2, f"ovt-runtime: {line}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # nobody listens


def _write_log(globals_: Globals, line: str, level: str) -> None:
    from ovt.engine.container.state import now

    if globals_.log_format == "json":
        from ovt.kernel import jsonc

        text = jsonc.dumps({"level": level, "msg": line, "time": now()})
    else:
        text = f'time="{now()}" level={level} msg="{line}"'
    fd = _open_log(globals_)
    try:
        posix.write(fd, f"{text}\n".encode("utf-8", "surrogateescape"))
    finally:
        posix.close(fd)


def _open_log(globals_: Globals) -> int:
    return posix.open(globals_.log, posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC, 0o600)
