"""Read the seccomp profile a person gives with `--security-opt seccomp=FILE`.

Two formats are told apart by their members: the OCI `linux.seccomp` object, and the one of docker and podman, whose
rules name the capabilities, architectures and kernels they are for and whose architectures come as `archMap`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from typing import Any

from ovt.errors import ConfigError, NotFound

# docker's names (GOARCH) of the architectures that uname(2) knows under others
_GO_ARCH = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}
_ARCH = {
    "x86_64": "SCMP_ARCH_X86_64",
    "aarch64": "SCMP_ARCH_AARCH64",
    "ppc64le": "SCMP_ARCH_PPC64LE",
    "s390x": "SCMP_ARCH_S390X",
    "riscv64": "SCMP_ARCH_RISCV64",
}


def read(path: str, machine: str, capabilities: Collection[str], release: str = "") -> dict[str, Any]:
    """The OCI `linux.seccomp` object in the file `path`, for `machine` (uname -m) and a bounding set of CAP_* names.

    `release` is the kernel's, this host's when not given. NotFound, or ConfigError for what is no profile.
    """
    try:
        with open(path, encoding="utf-8") as file:
            profile = json.load(file)
    except FileNotFoundError:
        raise NotFound(f"there is no seccomp profile {path}", "give a file, or seccomp=unconfined") from None
    except ValueError as error:
        raise ConfigError("$.linux.seccomp", f"{path}: {error}") from None
    if not isinstance(profile, dict) or "defaultAction" not in profile:
        raise ConfigError("$.linux.seccomp", f"{path} has no defaultAction")
    rules = profile.get("syscalls") or []
    foreign = "archMap" in profile or any("includes" in rule or "excludes" in rule or "name" in rule for rule in rules)
    return _convert(profile, machine, capabilities, release or os.uname().release) if foreign else profile


def _convert(profile: dict[str, Any], machine: str, capabilities: Collection[str], release: str) -> dict[str, Any]:
    members = ("defaultAction", "defaultErrnoRet", "flags", "listenerPath", "listenerMetadata")
    result = {name: profile[name] for name in members if profile.get(name) is not None}
    own = _ARCH.get(machine, "")
    for entry in profile.get("archMap") or []:
        if entry.get("architecture") == own:
            result["architectures"] = [own, *(entry.get("subArchitectures") or [])]
    if "architectures" not in result and profile.get("architectures"):
        result["architectures"] = profile["architectures"]
    kernel = _version(release)
    rules = []
    for rule in profile.get("syscalls") or []:
        if not _applies(rule, _GO_ARCH.get(machine, machine), capabilities, kernel):
            continue
        converted = {"names": rule.get("names") or [rule["name"]], "action": rule["action"]}
        if rule.get("errnoRet") is not None:
            converted["errnoRet"] = rule["errnoRet"]
        if rule.get("args"):
            converted["args"] = rule["args"]
        rules.append(converted)
    result["syscalls"] = rules
    return result


def _applies(rule: dict[str, Any], arch: str, capabilities: Collection[str], kernel: tuple[int, int]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if arch in (excludes.get("arches") or []):
        return False
    if any(name in capabilities for name in excludes.get("caps") or []):
        return False
    if excludes.get("minKernel") and kernel >= _version(excludes["minKernel"]):
        return False
    if includes.get("arches") and arch not in includes["arches"]:
        return False
    if any(name not in capabilities for name in includes.get("caps") or []):
        return False
    return not (includes.get("minKernel") and kernel < _version(includes["minKernel"]))


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    minor = ""
    for character in rest:
        if not character.isdigit():
            break
        minor += character
    return int(major), int(minor or 0)
