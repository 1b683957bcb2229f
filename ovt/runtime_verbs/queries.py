"""list, ps, events, spec, features."""

import posix

from ovt.errors import HostError, OvtError, UsageError
from ovt.kernel import jsonc
from ovt.runtime import Globals
from ovt.runtime_verbs import value
from ovt.runtime_verbs.verbs import runtime


def _print(text: str) -> None:
    raw = f"{text}\n".encode("utf-8", "surrogateescape")
    while raw:
        raw = raw[posix.write(1, raw) :]


def list_(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    entries = runtime(globals_).list()
    if "quiet" in options or "q" in options:
        for entry in entries:
            _print(entry["id"])
        return 0
    form = value(options, "format", "f") or "table"
    if form == "json":
        _print(jsonc.dumps(entries))
    elif form == "table":
        rows: list[tuple[str, ...]] = [("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")]
        for entry in entries:
            rows.append(tuple(str(entry.get(key, "")) for key in ("id", "pid", "status", "bundle", "created", "owner")))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        for row in rows:
            _print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        raise UsageError(f"invalid format option: {form}", "table or json")
    return 0


def ps(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    pids = runtime(globals_).pids(words[0])
    arguments = words[1:]
    form = value(options, "format", "f") or "table"
    # runc and crun take their own flags also behind the container's name
    if arguments[:1] in (["--format"], ["-f"]) and len(arguments) > 1:
        form, arguments = arguments[1], arguments[2:]
    elif arguments and arguments[0].startswith(("--format=", "-f=")):
        form, arguments = arguments[0].partition("=")[2], arguments[1:]
    if form == "json":
        _print(jsonc.dumps(pids))
        return 0
    if form != "table":
        raise UsageError(f"invalid format option: {form}", "table or json")
    _print("\n".join(_table(pids, arguments or ["-ef"])))
    return 0


def _table(pids: list[int], arguments: list[str]) -> list[str]:
    """ps(1)'s own table, the rows of the container kept."""
    read, write = posix.pipe2(posix.O_CLOEXEC)
    path = next((p for p in ("/usr/bin/ps", "/bin/ps") if _exists(p)), None)
    if path is None:
        raise HostError("ps is not installed on the host", hint="apt-get install procps, or ask for --format json")
    child = posix.posix_spawn(
        path, ["ps", *arguments], posix.environ, file_actions=[(posix.POSIX_SPAWN_DUP2, write, 1)]
    )
    posix.close(write)
    raw = b""
    while chunk := posix.read(read, 65536):
        raw += chunk
    posix.close(read)
    if posix.waitstatus_to_exitcode(posix.waitpid(child, 0)[1]):
        raise OvtError(f"ps {' '.join(arguments)} failed")
    lines = raw.decode("utf-8", "replace").rstrip("\n").split("\n")
    header = lines[0].split()
    if "PID" not in header:
        raise OvtError("ps printed no PID column", "choose ps options that show PID")
    column = header.index("PID")
    wanted = {str(pid) for pid in pids}
    return [lines[0], *(line for line in lines[1:] if line.split(None, column + 1)[column] in wanted)]


def _exists(path: str) -> bool:
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def events(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    engine = runtime(globals_)
    container_id = words[0]
    if "stats" in options:
        _print(jsonc.dumps({"type": "stats", "id": container_id, "data": engine.stats(container_id)}))
        return 0
    interval = _seconds(value(options, "interval") or "5s")
    while True:
        try:
            for event in engine.events(container_id, interval):
                _print(jsonc.dumps({"type": event["type"], "id": container_id, "data": event.get("data")}))
            _print(jsonc.dumps({"type": "stats", "id": container_id, "data": engine.stats(container_id)}))
        except (OvtError, OSError):
            if engine.state(container_id)["status"] == "stopped":
                return 0
            raise


def _seconds(text: str) -> float:
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        digits = text.removesuffix(unit)
        if digits != text and digits.replace(".", "", 1).isdigit() and float(digits) > 0:
            return float(digits) * factor
    raise UsageError(f"--interval: {text!r} is not a duration", "write 500ms, 5s or 1m")


def spec(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    from ovt.engine.container import spec as specs

    path = value(options, "config", "f") or f"{value(options, 'bundle', 'b') or '.'}/config.json"
    text = jsonc.dumps(specs.spec(rootless="rootless" in options), 4)
    try:
        fd = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise OvtError(f"file {path} exists", "remove it first") from None
    raw = f"{text}\n".encode()
    while raw:
        raw = raw[posix.write(fd, raw) :]
    posix.close(fd)
    return 0


def features(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    from ovt.engine.container import features as features_

    _print(jsonc.dumps(features_.features(), 4))
    return 0
