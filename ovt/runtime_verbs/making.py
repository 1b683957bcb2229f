"""create and run."""

from __future__ import annotations

import posix

from ovt.errors import UsageError
from ovt.runtime import Globals, warn
from ovt.runtime_verbs import number, value
from ovt.runtime_verbs.verbs import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.engine.container.runtime import Runtime


def _options(options: dict[str, list[str]]) -> dict[str, Any]:
    keep = number(options, "preserve-fds") or 0
    listen = posix.environ.get(b"LISTEN_FDS", b"")
    if listen.isdigit():
        keep += int(listen)
    if keep < 0:
        raise UsageError("--preserve-fds: the number of descriptors cannot be negative")
    return {
        "console_socket": value(options, "console-socket") or None,
        "keep_fds": keep,
        "no_new_keyring": "no-new-keyring" in options,
        "no_pivot": "no-pivot" in options,
        "pid_file": value(options, "pid-file") or None,
        "config_path": value(options, "config", "f"),
        "listen_fds": int(listen) if listen.isdigit() else 0,
        "notify_socket": posix.environ.get(b"NOTIFY_SOCKET", b"").decode("utf-8", "surrogateescape"),
    }


def _bundle(options: dict[str, list[str]]) -> str:
    return value(options, "bundle", "b") or posix.getcwd()


def create(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    runtime(globals_).create(words[0], _bundle(options), **_options(options))
    return 0


def run(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    engine = runtime(globals_)
    detach = "detach" in options or "d" in options
    wanted = _options(options)
    from ovt.engine.container import config as configs

    bundle = _bundle(options)
    config = configs.load(bundle, wanted.pop("config_path"))
    process = config.get("process")
    terminal = isinstance(process, dict) and bool(process.get("terminal"))
    foreground_terminal = terminal and not detach and not wanted["console_socket"]
    if foreground_terminal:
        from ovt.engine.container import terminal as terminals

        wanted["want_terminal"] = True
        size = terminals.own_size()
        if size:
            config["process"]["consoleSize"] = size
    if detach:
        _start(engine, words[0], bundle, config, wanted)
        return 0
    from ovt.engine.container import foreground

    with foreground.Signals() as signals:
        pid, master = _start(engine, words[0], bundle, config, wanted)
        try:
            signals.to(pid)
            status = foreground.wait(pid, master)
        except BaseException:
            if "keep" not in options:
                engine.delete(words[0], force=True)
            raise
    if "keep" not in options:
        warn(globals_, engine.delete(words[0], force=True))
    return status


def _start(
    engine: Runtime, container_id: str, bundle: str, config: dict[str, Any], wanted: dict[str, Any]
) -> tuple[int, int]:
    """Create and start; (pid, terminal master). A container that cannot be started is removed."""
    state, master = engine.create_terminal(container_id, bundle, config, **wanted)
    try:
        engine.start(container_id)
    except BaseException:
        engine.delete(container_id, force=True)
        raise
    return state.pid, master
