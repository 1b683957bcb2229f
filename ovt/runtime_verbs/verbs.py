"""start, state, kill, delete, pause, resume."""

import posix

from ovt.engine.container.runtime import Runtime
from ovt.errors import UsageError
from ovt.kernel import jsonc
from ovt.runtime import Globals, warn

_SIGNALS = [
    "HUP",
    "INT",
    "QUIT",
    "ILL",
    "TRAP",
    "ABRT",
    "BUS",
    "FPE",
    "KILL",
    "USR1",
    "SEGV",
    "USR2",
    "PIPE",
    "ALRM",
    "TERM",
    "STKFLT",
    "CHLD",
    "CONT",
    "STOP",
    "TSTP",
    "TTIN",
    "TTOU",
    "URG",
    "XCPU",
    "XFSZ",
    "VTALRM",
    "PROF",
    "WINCH",
    "IO",
    "PWR",
    "SYS",
]


def runtime(globals_: Globals) -> Runtime:
    """The engine as the global options have it."""
    return Runtime(globals_.root, globals_.cgroup_manager)


def signal_number(text: str) -> int:
    """`9`, `KILL`, `SIGKILL`, `RTMIN+3`, 0 to ask only; UsageError otherwise."""
    if text.isascii() and text.isdigit():
        if int(text) > 64:
            raise UsageError(f"unknown signal {text!r}")
        return int(text)
    name = text.upper().removeprefix("SIG")
    if name in _SIGNALS:
        return _SIGNALS.index(name) + 1
    aliases = {"IOT": 6, "POLL": 29, "CLD": 17}
    if name in aliases:
        return aliases[name]
    for base, start, sign in (("RTMIN", 34, 1), ("RTMAX", 64, -1)):
        offset = name.removeprefix(base).lstrip("+-") if name.startswith(base) else None
        if offset is not None and (not offset or offset.isdigit()) and 34 <= start + sign * int(offset or 0) <= 64:
            return start + sign * int(offset or 0)
    raise UsageError(f"unknown signal {text!r}")


def start(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    notify = posix.environ.get(b"NOTIFY_SOCKET")
    engine = runtime(globals_)
    if notify:
        from ovt.engine.container import notify as notify_
        from ovt.engine.container.state import check_id

        check_id(words[0])
        if notify_.expected(engine.root, words[0]):
            with notify_.Proxy(engine.root, words[0], notify.decode("utf-8", "surrogateescape")) as proxy:
                engine.start(words[0])
                proxy.wait_ready()
            return 0
    engine.start(words[0])
    return 0


def state(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    text = jsonc.dumps(runtime(globals_).state(words[0]), 2)
    posix.write(1, f"{text}\n".encode())
    return 0


def kill(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    text = (options.get("signal") or options.get("s") or words[1:] or ["TERM"])[-1]
    number = signal_number(text)
    engine = runtime(globals_)
    for container_id in _chosen(engine, options, words[0]):
        engine.kill(container_id, number, everything="all" in options or "a" in options)
    return 0


def delete(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    engine = runtime(globals_)
    for container_id in _chosen(engine, options, words[0]):
        warn(globals_, engine.delete(container_id, force="force" in options or "f" in options))
    return 0


def _chosen(engine: Runtime, options: dict[str, list[str]], word: str) -> list[str]:
    """The containers meant: one by its name, or with --regex all whose name the expression is found in."""
    if "regex" not in options:
        return [word]
    import re

    try:
        pattern = re.compile(word)
    except re.error as error:
        raise UsageError(f"--regex: {word!r}: {error}") from None
    return [entry["id"] for entry in engine.list() if pattern.search(entry["id"])]


def pause(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    runtime(globals_).pause(words[0])
    return 0


def resume(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    runtime(globals_).resume(words[0])
    return 0
