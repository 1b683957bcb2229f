"""The options that say what an instance is to be: shared by `create` and `run`, and turned into a Spec."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from ovt import image
from ovt.cli import machine_options, values
from ovt.cli.context import ImageName, Parsed
from ovt.errors import NotFound, UsageError
from ovt.model import Kind, Limits, Restart, Security, Spec

_SIZE = Parsed("size", values.parse_size)
STOP_TIMEOUTS = {Kind.CONTAINER: 10.0, Kind.VM: 90.0}  # seconds; a machine takes a system down


def _many(*names: str, metavar: str, help: str, parse: Callable[[str], Any] | None = None) -> Any:
    kind: Any = Parsed(metavar.lower(), parse) if parse else str
    return click.option(*names, multiple=True, metavar=metavar, help=help, type=kind)


_OPTIONS = [
    click.option("--name", default="", help="Its name; made up when not given."),
    click.option("-i", "--interactive", is_flag=True, help="Keep its standard input open."),
    click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
    click.option("--rm", "auto_remove", is_flag=True, help="Remove it at its end."),
    _many("-e", "--env", metavar="KEY[=VALUE]", help="Set a variable, or pass one on."),
    _many("--env-file", metavar="FILE", help="Read variables from a file."),
    click.option("-w", "--workdir", default="", metavar="DIR", help="Directory to start in."),
    click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Who to run as, by name or number."),
    click.option("--entrypoint", help="Program in front of COMMAND; empty for none."),
    _many("-v", "--volume", metavar="SRC:DST[:OPTS]", help="Show a host path inside.", parse=values.parse_volume),
    _many("--tmpfs", metavar="DST[:OPTS]", help="Show an empty file system in memory.", parse=values.parse_tmpfs),
    _many("--device", metavar="PATH[:DST][:rwm]", help="Show a device of the host.", parse=values.parse_device),
    click.option("--cpus", type=float, default=0.0, help="Processors' worth of time, such as 1.5."),
    click.option("--cpuset-cpus", default="", metavar="LIST", help="Processors to run on, such as 0-3,6."),
    click.option("--memory", type=_SIZE, default=0, help="Memory at most, such as 512M."),
    click.option("--memory-swap", default="", help="Memory and swap together; -1 for no limit of swap."),
    click.option("--pids", type=int, default=0, help="Processes at most."),
    click.option("--shm-size", type=_SIZE, default="64M", show_default=True, help="Size of /dev/shm."),
    _many("--ulimit", metavar="NAME=SOFT[:HARD]", help="A limit of setrlimit(2).", parse=values.parse_ulimit),
    click.option("--read-only", is_flag=True, help="Mount its root read-only, with tmpfs on /run, /tmp and /var/tmp."),
    click.option("--in-place", is_flag=True, help="Run on the image directory itself; changes stay in it."),
    _many("--cap-add", metavar="NAME", help="Give a capability, or ALL."),
    _many("--cap-drop", metavar="NAME", help="Take a capability, or ALL."),
    click.option("--privileged", is_flag=True, help="Give all capabilities and devices, mask and filter nothing."),
    _many("--security-opt", metavar="OPTION", help="seccomp=FILE|unconfined, apparmor=, label=, no-new-privileges."),
    click.option("--userns", type=click.Choice(["auto", "host"]), default="host", help="auto: ids of its own."),
    click.option("--network", default="", metavar="NETWORK",
                 help="none or host; VM: also user, tap:NAME, bridge:NAME. none, for a VM user when not given."),
    click.option("--hostname", default="", help="Its host name; its name when not given."),
    _many("--add-host", metavar="NAME:IP", help="A line of /etc/hosts.", parse=values.parse_host),
    _many("--sysctl", metavar="KEY=VALUE", help="A kernel parameter of its namespaces.", parse=values.parse_pair),
    click.option("--init", is_flag=True, help="Run a small init in front that reaps orphans and passes signals on."),
    click.option("--restart", type=Parsed("policy", Restart.parse), default="no", show_default=True,
                 help="no, on-failure[:N], always or unless-stopped."),
    click.option("--boot-order", type=int, default=0, help="With --restart: higher ones start first with the host."),
    click.option("--boot-delay", type=Parsed("duration", values.parse_duration), default=0.0,
                 help="What comes after it then waits so long."),
    click.option("--stop-signal", type=Parsed("signal", values.parse_signal), default=0, help="TERM when not given."),
    click.option("--stop-timeout", type=Parsed("duration", values.parse_duration), default=None,
                 help="How long stop waits before it kills: 10s, for a VM 90s when not given."),
    _many("-l", "--label", metavar="KEY=VALUE", help="A note for people and filters.", parse=values.parse_pair),
    *machine_options.OPTIONS,
    click.option("--dry-run", is_flag=True, help="Only say what would be done."),
    click.argument("image", type=ImageName()),
    click.argument("command", nargs=-1, type=click.UNPROCESSED),
]  # fmt: skip


def instance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, IMAGE and COMMAND… to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def spec_of(given: dict[str, Any]) -> tuple[Spec, str, dict[str, str], Kind]:
    """The Spec, the name, the labels and the kind that the options ask for; UsageError for a contradiction."""
    kind = machine_options.kind_of(given) or image.kind(given["image"])
    if given["auto_remove"] and given["restart"].policy != "no":
        raise UsageError("--rm and --restart together", "an instance is removed at its end, or started again")
    entrypoint = given["entrypoint"]
    spec = Spec(
        image=given["image"],
        command=given["command"][1:] if given["command"][:1] == ("--",) else given["command"],
        entrypoint=None if entrypoint is None else _words(entrypoint),
        env=_environment(given["env_file"], given["env"]),
        workdir=_directory(given["workdir"]),
        user=given["user"],
        tty=given["tty"],
        stdin=given["interactive"],
        hostname=given["hostname"],
        network=given["network"] or ("user" if kind is Kind.VM else "none"),
        add_hosts=given["add_host"],
        init=given["init"],
        read_only=given["read_only"],
        volumes=(*given["volume"], *given["tmpfs"]),
        devices=given["device"],
        ulimits=given["ulimit"],
        sysctls=given["sysctl"],
        shm_size=given["shm_size"],
        limits=_limits(given),
        security=_security(given),
        restart=given["restart"],
        auto_remove=given["auto_remove"],
        stop_signal=given["stop_signal"],
        stop_timeout=given["stop_timeout"] if given["stop_timeout"] is not None else STOP_TIMEOUTS[kind],
        rootfs_in_place=given["in_place"],
        machine=machine_options.machine_of(given),
        boot_order=given["boot_order"],
        boot_delay=given["boot_delay"],
    )
    if kind is Kind.CONTAINER and spec.network not in {"none", "host"}:
        raise UsageError(f"a container has no network {spec.network!r}", "--network none or --network host")
    labels = dict(pair.split("=", 1) for pair in given["label"])
    return spec, given["name"], labels, kind


def _words(text: str) -> tuple[str, ...]:
    """A JSON list of strings, or one program."""
    if text.startswith("["):
        import json

        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UsageError(f"entrypoint {text!r} is not a JSON list of strings")
        return tuple(words)
    return (text,) if text else ()


def _environment(files: tuple[str, ...], pairs: tuple[str, ...]) -> tuple[str, ...]:
    environ = dict(os.environ)
    result = [pair for path in files for pair in values.read_env_file(path, environ)]
    return (*result, *(pair for text in pairs for pair in values.parse_env(text, environ)))


def _directory(path: str) -> str:
    if path and not path.startswith("/"):
        raise UsageError(f"--workdir {path!r} is not an absolute path", f"--workdir /{path}")
    return path


def _limits(given: dict[str, Any]) -> Limits:
    swap = given["memory_swap"]
    total = -1 if swap == "-1" else values.parse_size(swap) if swap else 0
    if total > 0 and total < given["memory"]:
        raise UsageError("--memory-swap is memory and swap together, and less than --memory")
    if total and not given["memory"]:
        raise UsageError("--memory-swap needs --memory")
    if given["cpus"] < 0 or given["pids"] < 0:
        raise UsageError("--cpus and --pids cannot be negative", "leave it out for no limit")
    return Limits(given["cpus"], given["cpuset_cpus"], given["memory"], total, given["pids"])


def _security(given: dict[str, Any]) -> Security:
    result = Security(
        cap_add=given["cap_add"],
        cap_drop=given["cap_drop"],
        privileged=given["privileged"],
        userns="auto" if given["userns"] == "auto" else "",
    )
    for option in given["security_opt"]:
        key, _, value = option.replace(":", "=", 1).partition("=") if "=" not in option else option.partition("=")
        if key == "no-new-privileges" and value in {"", "true", "false"}:
            result = result._replace(no_new_privileges=value != "false")
        elif key == "seccomp" and value:
            if value != "unconfined" and not os.path.isfile(value):
                raise NotFound(f"there is no seccomp profile {value}", "give a file, or seccomp=unconfined")
            result = result._replace(seccomp=value if value == "unconfined" else os.path.abspath(value))
        elif key == "apparmor" and value:
            result = result._replace(apparmor=value)
        elif key == "label" and value:
            result = result._replace(label=(*result.label, value))
        else:
            raise UsageError(
                f"security option {option!r} is not known",
                "seccomp=FILE|unconfined, apparmor=PROFILE, label=…, no-new-privileges",
            )
    return result
