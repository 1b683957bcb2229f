"""exec, attach and cp."""

from __future__ import annotations

import os

import click

from ovt.cli import output, values
from ovt.cli.context import App, CopyPath, instance_argument, pass_app
from ovt.cli.running import DETACH_KEYS
from ovt.engine.base import Process
from ovt.errors import UsageError


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background and print its pid.")
@click.option("-i", "--interactive", is_flag=True, help="Pass on standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Set a variable, or pass one on.")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Directory to start in.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Who to run as, by name or number.")
@click.option("--privileged", is_flag=True, help="Give it all capabilities.")
@instance_argument("exec", many=False)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_app
def exec_(
    app: App,
    detach: bool,
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str,
    user: str,
    privileged: bool,
    instance: str,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND in a living instance.

    The exit status is that of COMMAND; 125 when ovt fails, 126 when COMMAND cannot be run, 127 when there is none.
    """
    app.subject = instance
    if tty and interactive and not detach and not os.isatty(0):
        raise UsageError("-it, but standard input is not a terminal", "leave out -t")
    pairs = tuple(pair for text in env for pair in values.parse_env(text, dict(os.environ)))
    process = Process(command, pairs, workdir, user, tty, interactive, privileged)
    answer = app.host.exec(instance, process, detach)
    if detach:
        output.result(str(answer))
        return 0
    return answer


@click.command()
@click.option("--no-stdin", is_flag=True, help="Only show what it writes.")
@click.option("--detach-keys", default=DETACH_KEYS, show_default=True, help="Keys that leave it in the background.")
@click.option("--sig-proxy/--no-sig-proxy", default=True, help="Pass signals on to it.")
@instance_argument("attach", many=False)
@pass_app
def attach(app: App, no_stdin: bool, detach_keys: str, sig_proxy: bool, instance: str) -> int:
    """Join the standard streams of an instance; the exit status is its own."""
    app.subject = instance
    code = app.host.attach(instance, None if no_stdin else 0, detach_keys, sig_proxy)
    if isinstance(code, int):
        app.host.settle(app.host.store.resolve(instance)) if _exists(app, instance) else None
        return code
    output.note(f"\r\ndetached from {instance}; ovt attach {instance} goes back")
    return 0


def _exists(app: App, instance: str) -> bool:
    from ovt.errors import NotFound

    try:
        app.host.store.resolve(instance)
    except NotFound:  # run with --rm
        return False
    return True


@click.command()
@click.argument("source", metavar="SRC", type=CopyPath("cp"))
@click.argument("target", metavar="DST", type=CopyPath("cp"))
@pass_app
def cp(app: App, source: str, target: str) -> int:
    """Copy files between the host and an instance.

    One of SRC and DST is INSTANCE:PATH, the other a path of this host (with ./ in front if it holds a colon). A
    directory is copied with all that is in it; SRC/. means only what is in it. An instance need not be alive.
    """
    source_instance, source_path = _split(source)
    target_instance, target_path = _split(target)
    if bool(source_instance) == bool(target_instance):
        both = "both are" if source_instance else "neither is"
        raise UsageError(f"{both} INSTANCE:PATH", "ovt cp FILE INSTANCE:PATH, or ovt cp INSTANCE:PATH FILE")
    app.subject = f"{source} to {target}"
    if source_instance:
        app.host.copy_from(source_instance, source_path, _absolute(target_path))
    else:
        app.host.copy_into(_absolute(source_path), target_instance, target_path)
    return 0


def _split(text: str) -> tuple[str, str]:
    """(instance, path inside), or ("", host path)."""
    name, colon, path = text.partition(":")
    if not colon or not name or "/" in name:
        return "", text
    if not path:
        raise UsageError(f"{text!r} names no path", f"{name}:/")
    return name, path if path.startswith("/") else f"/{path}"


def _absolute(path: str) -> str:
    """Absolute, with the slash or the dot at its end that says something to cp."""
    full = os.path.abspath(os.path.expanduser(path))
    if path.endswith("/.") or path == ".":
        return f"{full.rstrip('/')}/."
    return f"{full}/" if path.endswith("/") and full != "/" else full
