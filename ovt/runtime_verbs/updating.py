"""update: new limits for a living container, from a JSON document or from flags."""

from __future__ import annotations

import posix

from ovt.errors import UsageError
from ovt.kernel import jsonc
from ovt.runtime import Globals
from ovt.runtime_verbs import number, value
from ovt.runtime_verbs.verbs import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# flag: (section, member of linux.resources); numbers
_NUMBERS = {
    "blkio-weight": ("blockIO", "weight"),
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-share": ("cpu", "shares"),
    "cpu-shares": ("cpu", "shares"),
    "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
    "cpu-idle": ("cpu", "idle"),
    "memory": ("memory", "limit"),
    "memory-reservation": ("memory", "reservation"),
    "memory-swap": ("memory", "swap"),
    "kernel-memory": ("memory", "kernel"),
    "kernel-memory-tcp": ("memory", "kernelTCP"),
    "pids-limit": ("pids", "limit"),
}
_TEXTS = {"cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems")}
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def update(globals_: Globals, options: dict[str, list[str]], words: list[str]) -> int:
    document = value(options, "resources", "r")
    resources = _from_flags(options) if document is None else _from_document(document)
    engine = runtime(globals_)
    engine.update(words[0], resources)
    schemata = [text for text in (value(options, "l3-cache-schema"), value(options, "mem-bw-schema")) if text]
    if schemata:
        from ovt.engine.container import intel_rdt
        from ovt.engine.container.state import State

        intel_rdt.update(State.load(engine.root, words[0]), schemata)
    return 0


def _from_document(path: str) -> dict[str, Any]:
    from ovt.engine.container import config as configs

    if path == "-":
        raw = b""
        while chunk := posix.read(0, 65536):
            raw += chunk
    else:
        raw = jsonc.read_file(path, configs.CONFIG_LIMIT)
    return configs.parse(raw, "resources")


def _from_flags(options: dict[str, list[str]]) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    for flag, (section, member) in _NUMBERS.items():
        given = _amount(options, flag) if section == "memory" else number(options, flag)
        if given is not None:
            resources.setdefault(section, {})[member] = given
    for flag, (section, member) in _TEXTS.items():
        text = value(options, flag)
        if text:
            resources.setdefault(section, {})[member] = text
    if not resources and not value(options, "l3-cache-schema", "mem-bw-schema"):
        raise UsageError("update: no limits were given", "use --resources FILE, or flags such as --memory 512M")
    return resources


def _amount(options: dict[str, list[str]], flag: str) -> int | None:
    """Bytes: a number, with an optional unit (`512M`); -1 is unlimited."""
    text = (value(options, flag) or "").lower().removesuffix("ib")
    if not text:
        return None
    unit = _UNITS.get(text[-1])
    digits = text[:-1] if unit else text
    if not digits.lstrip("-").isdigit():
        raise UsageError(f"--{flag}: {text!r} is not an amount of memory", "write bytes, or 512M, 2G")
    return int(digits) * (unit or 1)
