"""The verbs of ovt-runtime: one table, and a function each in the modules beside it.

Flags that other runtimes have and that mean nothing here are accepted and do nothing, because callers pass them.
"""

from ovt.errors import UsageError
from ovt.runtime import Globals, split

# verb: (module, flags with a value, switches, "the rest is a command", least words, most words, usage, help)
_NO: frozenset[str] = frozenset()
_FUNCTIONS = {"exec": "exec_", "list": "list_"}  # names that Python has taken
VERBS: dict[str, tuple[str, frozenset[str], frozenset[str], bool, int, int, str, str]] = {
    "create": (
        "making",
        frozenset({"bundle", "b", "config", "f", "console-socket", "pid-file", "preserve-fds"}),
        frozenset({"no-pivot", "no-new-keyring", "no-subreaper"}),
        False,
        1,
        1,
        "[flags] CONTAINER",
        "make a container from a bundle; it waits for start",
    ),
    "run": (
        "making",
        frozenset({"bundle", "b", "config", "f", "console-socket", "pid-file", "preserve-fds"}),
        frozenset({"no-pivot", "no-new-keyring", "no-subreaper", "detach", "d", "keep"}),
        False,
        1,
        1,
        "[flags] CONTAINER",
        "create and start a container and wait for it",
    ),
    "start": ("verbs", _NO, _NO, False, 1, 1, "CONTAINER", "run the program of a created container"),
    "state": ("verbs", _NO, _NO, False, 1, 1, "CONTAINER", "print the state as JSON"),
    "kill": (
        "verbs",
        frozenset({"signal", "s"}),
        frozenset({"all", "a", "regex"}),
        False,
        1,
        2,
        "[--all] CONTAINER [SIGNAL]",
        "send a signal",
    ),
    "delete": (
        "verbs",
        _NO,
        frozenset({"force", "f", "regex"}),
        False,
        1,
        1,
        "[--force] CONTAINER",
        "remove a container",
    ),
    "pause": ("verbs", _NO, _NO, False, 1, 1, "CONTAINER", "freeze all processes"),
    "resume": ("verbs", _NO, _NO, False, 1, 1, "CONTAINER", "thaw all processes"),
    "exec": (
        "executing",
        frozenset(
            {
                "process",
                "p",
                "pid-file",
                "console-socket",
                "cwd",
                "env",
                "e",
                "user",
                "u",
                "additional-gids",
                "g",
                "cap",
                "c",
                "apparmor",
                "process-label",
                "preserve-fds",
                "cgroup",
            }
        ),
        frozenset({"detach", "d", "tty", "t", "no-new-privs", "ignore-paused", "no-subreaper"}),
        True,
        1,
        1 << 30,
        "[flags] CONTAINER [COMMAND …]",
        "run another process in a container",
    ),
    "list": (
        "queries",
        frozenset({"format", "f"}),
        frozenset({"quiet", "q"}),
        False,
        0,
        0,
        "[--format table|json] [--quiet]",
        "list containers",
    ),
    "ps": (
        "queries",
        frozenset({"format", "f"}),
        _NO,
        True,
        1,
        1 << 30,
        "[--format table|json] CONTAINER [ps options]",
        "list processes",
    ),
    "update": (
        "updating",
        frozenset(
            {
                "resources",
                "r",
                "blkio-weight",
                "cpu-period",
                "cpu-quota",
                "cpu-burst",
                "cpu-share",
                "cpu-shares",
                "cpu-rt-period",
                "cpu-rt-runtime",
                "cpuset-cpus",
                "cpuset-mems",
                "cpu-idle",
                "kernel-memory",
                "kernel-memory-tcp",
                "memory",
                "memory-reservation",
                "memory-swap",
                "pids-limit",
                "l3-cache-schema",
                "mem-bw-schema",
            }
        ),
        _NO,
        False,
        1,
        2,
        "[flags] CONTAINER",
        "change limits; --resources - reads them from stdin",
    ),
    "events": (
        "queries",
        frozenset({"interval"}),
        frozenset({"stats"}),
        False,
        1,
        1,
        "[--stats] [--interval 5s] CONTAINER",
        "print events or statistics as JSON lines",
    ),
    "spec": (
        "queries",
        frozenset({"bundle", "b", "config", "f"}),
        frozenset({"rootless"}),
        False,
        0,
        0,
        "[--rootless] [--bundle DIR]",
        "write a config.json to start from",
    ),
    "features": ("queries", _NO, _NO, False, 0, 0, "", "print what this runtime supports as JSON"),
    "checkpoint": (
        "checkpointing",
        frozenset(
            {
                "image-path",
                "work-path",
                "parent-path",
                "status-fd",
                "page-server",
                "manage-cgroups-mode",
                "empty-ns",
                "network-lock",
            }
        ),
        frozenset(
            {
                "leave-running",
                "tcp-established",
                "tcp-skip-in-flight",
                "link-remap",
                "ext-unix-sk",
                "shell-job",
                "lazy-pages",
                "file-locks",
                "pre-dump",
                "auto-dedup",
            }
        ),
        False,
        1,
        1,
        "[flags] CONTAINER",
        "save a running container with CRIU",
    ),
    "restore": (
        "checkpointing",
        frozenset(
            {
                "bundle",
                "b",
                "config",
                "f",
                "console-socket",
                "image-path",
                "work-path",
                "manage-cgroups-mode",
                "pid-file",
                "empty-ns",
                "lsm-profile",
                "lsm-mount-context",
                "preserve-fds",
                "network-lock",
            }
        ),
        frozenset(
            {
                "tcp-established",
                "tcp-close",
                "ext-unix-sk",
                "shell-job",
                "lazy-pages",
                "file-locks",
                "detach",
                "d",
                "no-pivot",
                "no-subreaper",
                "auto-dedup",
                "link-remap",
            }
        ),
        False,
        1,
        1,
        "[flags] CONTAINER",
        "bring a checkpointed container back",
    ),
}


def run(verb: str, args: list[str], globals_: Globals) -> int:
    """Parse the options of `verb`, import its module, call it."""
    entry = VERBS.get(verb)
    if entry is None:
        raise UsageError(f"unknown command {verb}", f"commands: {' '.join(VERBS)}")
    module_name, values, switches, rest, least, most, usage, _ = entry
    options, words = split(args, values, switches | {"help", "h"}, rest)
    if "help" in options or ("h" in options and "h" not in values):
        from ovt.runtime_verbs import help_text

        help_text.show(verb)
        return 0
    if not least <= len(words) <= most:
        raise UsageError(f"usage: ovt-runtime {verb} {usage}")
    module = __import__(f"ovt.runtime_verbs.{module_name}", None, None, [""])
    status: int = getattr(module, _FUNCTIONS.get(verb, verb))(globals_, options, words)
    return status


def value(options: dict[str, list[str]], *names: str) -> str | None:
    """The last value given under any of `names`."""
    for name in names:
        if name in options:
            return options[name][-1]
    return None


def number(options: dict[str, list[str]], *names: str) -> int | None:
    """The same as an integer; UsageError when it is not one."""
    text = value(options, *names)
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--{names[0]}: {text!r} is not a number") from None
