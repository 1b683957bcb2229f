"""exec."""

from __future__ import annotations

from ovt.engine.container.state import State
from ovt.errors import UsageError
from ovt.runtime import Globals
from ovt.runtime_verbs import number, value
from ovt.runtime_verbs.verbs import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_ID = 2**32 - 1


def exec_(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    globals_.failure = 255
    engine = runtime(globals_)
    container_id = words[0]
    process = _process(engine.root, container_id, options, words[1:])
    detach = "detach" in options or "d" in options
    if "tty" in options or "t" in options:
        process["terminal"] = True
    console_socket = value(options, "console-socket") or None
    wanted = {
        "cgroup": value(options, "cgroup") or None,
        "console_socket": console_socket,
        "ignore_paused": "ignore-paused" in options,
        "keep_fds": number(options, "preserve-fds") or 0,
        "pid_file": value(options, "pid-file") or None,
        "want_terminal": bool(process.get("terminal")) and not detach and not console_socket,
    }
    if wanted["want_terminal"]:
        from ovt.engine.container import terminal

        size = terminal.own_size()
        if size:
            process["consoleSize"] = size
    if detach:
        engine.exec_terminal(container_id, process, **wanted)
        return 0
    from ovt.engine.container import foreground

    with foreground.Signals() as signals:
        pid, master = engine.exec_terminal(container_id, process, **wanted)
        signals.to(pid)
        return foreground.wait(pid, master)


def _process(root: str, container_id: str, options: dict[str, list[str]], command: list[str]) -> dict[str, Any]:
    """The OCI process: from --process, or the container's own changed by the flags."""
    path = value(options, "process", "p")
    if path:
        from ovt.engine.container import config as configs
        from ovt.kernel import jsonc

        return configs.parse(jsonc.read_file(path, configs.CONFIG_LIMIT), "process.json")
    if not command:
        raise UsageError("exec: name a command, or a file with --process")
    process = {**State.load(root, container_id).template["process"], "args": command, "terminal": False}
    process.pop("consoleSize", None)
    if value(options, "cwd"):
        process["cwd"] = value(options, "cwd")
    process["env"] = [*(process.get("env") or []), *options.get("env", []), *options.get("e", [])]
    user = value(options, "user", "u")
    if user is not None:
        process["user"] = {**(process.get("user") or {}), **_user(user)}
    gids = [*options.get("additional-gids", []), *options.get("g", [])]
    if gids:
        user_entry = process.setdefault("user", {})
        user_entry["additionalGids"] = [*(user_entry.get("additionalGids") or []), *(_id(gid) for gid in gids)]
    caps = [*options.get("cap", []), *options.get("c", [])]
    if caps:
        # never inheritable (CVE-2022-29162)
        sets = {name: list(names) for name, names in (process.get("capabilities") or {}).items()}
        for name in ("bounding", "effective", "permitted"):
            sets[name] = [*sets.get(name, []), *caps]
        process["capabilities"] = sets
    if "no-new-privs" in options:
        process["noNewPrivileges"] = True
    for flag, key in (("apparmor", "apparmorProfile"), ("process-label", "selinuxLabel")):
        if value(options, flag):
            process[key] = value(options, flag)
    return process


def _user(text: str) -> dict[str, Any]:
    uid, colon, gid = text.partition(":")
    out = {"uid": _id(uid)}
    if colon:
        out["gid"] = _id(gid)
    return out


def _id(text: str) -> int:
    """A user or group id, strictly: `1` must never be read as anything else (CVE-2026-30892)."""
    if not text.isascii() or not text.isdigit() or int(text) > _MAX_ID:
        raise UsageError(f"{text!r} is not a numeric user or group id", "write --user UID[:GID]")
    return int(text)
