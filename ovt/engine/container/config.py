"""Reads an OCI configuration (config.json, exec's process.json, update's resources) and says whether it is valid.

Valid means: the runtime-spec 1.3 allows it and Linux could do it; whether this host can is found out by doing it.
The members are in `tables.py`, what joins several of them in `rules.py`. One ConfigError names the JSON path of the
first fault. Two things are made explicit on the way: members that were null are gone, so that `in` and `get` mean what
they say, and a new user namespace has mappings.
"""

import posix

from ovt.engine.container import rules, tables
from ovt.engine.container.schema import Fault, Node, describe
from ovt.errors import ConfigError, NotFound
from ovt.kernel import jsonc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CONFIG_LIMIT = 16 << 20
"""The longest configuration that is read, in bytes; the largest that callers write stay below 1 MiB."""


def load(bundle_dir: str, config_path: str | None = None) -> "dict[str, Any]":
    """The configuration of a bundle, parsed but not yet validated: `config_path`, or `bundle_dir`/config.json.

    Raises NotFound when there is no such file, ConfigError at `$` when it is not a JSON object, OSError as it comes.
    """
    path = config_path if config_path is not None else f"{bundle_dir}/config.json"
    try:
        data = jsonc.read_file(path, CONFIG_LIMIT)
    except FileNotFoundError:
        hint = "a bundle is a directory that holds config.json; `ovt-runtime spec` writes one to start from"
        raise NotFound(f"JSON specification file {path} not found: no such file or directory", hint) from None
    except ValueError as error:
        raise ConfigError("$", str(error)) from None
    return parse(data)


def parse(data: bytes, document: str = "config.json") -> "dict[str, Any]":
    """The object that a JSON document holds; ConfigError at `$`, naming `document`, when it holds none."""
    try:
        value = jsonc.load_bytes(data)
    except ValueError as error:
        raise ConfigError("$", str(error), document=document) from None
    if not isinstance(value, dict):
        raise ConfigError("$", f"must be an object, not {describe(value)}", document=document)
    return value


def validate(config: "dict[str, Any]", *, rootless: bool = False) -> None:
    """Raises ConfigError unless `config` is a valid configuration.

    `rootless`: the caller is not root, so the container needs a user namespace with mappings and gets no NICs.
    A new user namespace for which root named no mapping at all gets the caller's own ids as its 0.
    """
    _validate(config, tables.CONFIG, lambda value: rules.check_config(value, rootless), "$", "config.json")
    linux = config.get("linux", {})
    for space in linux.get("namespaces", []):
        if space["type"] == "user" and not space.get("path") and not linux.get("uidMappings"):
            linux["uidMappings"] = [{"containerID": 0, "hostID": posix.geteuid(), "size": 1}]
            linux["gidMappings"] = [{"containerID": 0, "hostID": posix.getegid(), "size": 1}]


def validate_process(process: "dict[str, Any]", path: str = "$") -> None:
    """Raises ConfigError unless `process` is what `exec --process` takes; `path` is where the document has it."""
    _validate(process, tables.PROCESS, rules.check_process, path, "process.json")


def validate_resources(resources: "dict[str, Any]", path: str = "$") -> None:
    """Raises ConfigError unless `resources` is what `update --resources` takes; `path` is where the document has it."""
    _validate(resources, tables.RESOURCES, rules.check_resources, path, "resources")


def _validate(value: "dict[str, Any]", table: "Node", rule: "Callable[[Any], None]", root: str, document: str) -> None:
    try:
        table.check(value)
        rule(value)
    except Fault as fault:
        raise ConfigError(fault.location(root), fault.message, document=document) from None
