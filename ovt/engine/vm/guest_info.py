"""What a running guest says about itself through its agent: system, names, addresses, file systems, people, clock.

A guest may say anything: texts are made fit to print, numbers and addresses are checked, lists are cut. An agent that
lacks one command, or lies in one answer, loses that part alone, and `missing` says why.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from ovt.engine.vm.agent import Agent, AgentError, NoAgent, printable

_PATIENCE = 5.0  # seconds for one question
_MOST = 256  # entries of a list
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5,19}")


def guest_info(agent: Agent) -> dict[str, Any]:
    """What the guest says; NoAgent when nothing answers.

    agent        {"version"}
    os           {"name", "id", "version", "kernel", "machine"}, texts
    hostname     text
    interfaces   [{"name", "mac", "addresses": ["10.0.2.15/24", …], "received", "sent"}], bytes where the agent counts
    filesystems  [{"mountpoint", "type", "device", "total", "used"}], bytes; without the last two where not told
    users        [{"name", "since"}], seconds since the epoch
    clock_offset seconds that the guest's clock is ahead of the host's
    missing      {part: why}
    Parts that the guest does not tell are not there.
    """
    parts: dict[str, Callable[[Agent], Any]] = {
        "os": _system,
        "hostname": lambda agent: printable(_object(_ask(agent, "guest-get-host-name")).get("host-name"), 255),
        "interfaces": _interfaces,
        "filesystems": _filesystems,
        "users": _users,
        "clock_offset": _clock,
    }
    with agent.turn():
        found: dict[str, Any] = {"agent": {"version": agent.about().version}}
        missing: dict[str, str] = {}
        silent = ""
        for part, ask in parts.items():
            if silent:
                missing[part] = silent
                continue
            try:
                found[part] = ask(agent)
            except NoAgent as error:  # it answered at first: it fell silent, and the rest would only take time
                missing[part] = silent = str(error)
            except AgentError as error:
                missing[part] = str(error)
    if missing:
        found["missing"] = missing
    return found


def _ask(agent: Agent, name: str) -> Any:
    if name not in agent.about().commands:
        raise AgentError(f"{name}: the guest's agent does not know it, or must not answer it", "CommandNotFound")
    return agent.command(name, timeout=_PATIENCE)


def _system(agent: Agent) -> dict[str, str]:
    told = _object(_ask(agent, "guest-get-osinfo"))
    names = {"name": "pretty-name", "id": "id", "version": "version-id", "kernel": "kernel-release"}
    found = {ours: printable(told.get(theirs)) for ours, theirs in (*names.items(), ("machine", "machine"))}
    found["name"] = found["name"] or printable(told.get("name"))
    return {name: text for name, text in found.items() if text}


def _interfaces(agent: Agent) -> list[dict[str, Any]]:
    found = []
    for entry in _objects(_ask(agent, "guest-network-get-interfaces")):
        mac = entry.get("hardware-address")
        mac = mac.lower() if isinstance(mac, str) and len(mac) < 64 else ""
        interface: dict[str, Any] = {
            "name": printable(entry.get("name"), 64),
            "mac": mac if _MAC.fullmatch(mac) else "",
            "addresses": list(_addresses(entry.get("ip-addresses"))),
        }
        counts = entry.get("statistics")
        if isinstance(counts, dict):
            for ours, theirs in (("received", "rx-bytes"), ("sent", "tx-bytes")):
                if (count := _number(counts.get(theirs))) is not None:
                    interface[ours] = count
        found.append(interface)
    return found


def _addresses(told: object) -> Iterator[str]:
    for entry in _objects(told if told is not None else []):
        text, prefix = entry.get("ip-address"), _number(entry.get("prefix"))
        try:
            address = ipaddress.ip_address(text.partition("%")[0] if isinstance(text, str) else "")
        except ValueError:
            continue
        if prefix is not None and prefix <= address.max_prefixlen:
            yield f"{address}/{prefix}"


def _filesystems(agent: Agent) -> list[dict[str, Any]]:
    found = []
    for entry in _objects(_ask(agent, "guest-get-fsinfo")):
        filesystem: dict[str, Any] = {
            "mountpoint": printable(entry.get("mountpoint"), 1024),
            "type": printable(entry.get("type"), 64),
            "device": printable(entry.get("name")),
        }
        for ours, theirs in (("total", "total-bytes"), ("used", "used-bytes")):
            if (count := _number(entry.get(theirs))) is not None:
                filesystem[ours] = count
        found.append(filesystem)
    return found


def _users(agent: Agent) -> list[dict[str, Any]]:
    found = []
    for entry in _objects(_ask(agent, "guest-get-users")):
        since = entry.get("login-time")
        good = isinstance(since, float) and 0 <= since < 1 << 40
        found.append({"name": printable(entry.get("user"), 64), "since": since if good else float(_number(since) or 0)})
    return found


def _clock(agent: Agent) -> float:
    before = time.time()
    told = _number(_ask(agent, "guest-get-time"))
    if told is None:
        raise AgentError("guest-get-time: the agent's answer is no time", AgentError.PROTOCOL)
    # the guest looked at its clock somewhere between the question and the answer
    return round(told / 1e9 - (before + time.time()) / 2, 3)


def _object(answer: object) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise AgentError("the agent's answer is no object", AgentError.PROTOCOL)
    return answer


def _objects(answer: object) -> list[dict[str, Any]]:
    if not isinstance(answer, list):
        raise AgentError("the agent's answer is no list", AgentError.PROTOCOL)
    return [entry for entry in answer[:_MOST] if isinstance(entry, dict)]


def _number(value: object) -> int | None:
    """A count or time in nanoseconds, as the protocol has them: not negative, 64 bits."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64 else None
