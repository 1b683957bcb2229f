"""Commands for virtual machines alone: console, guest, reset, suspend, wake, save, screenshot."""

from __future__ import annotations

import os

import click

from ovt.cli import output
from ovt.cli.context import App, instance_argument, pass_app
from ovt.cli.progress import bar
from ovt.cli.running import DETACH_KEYS
from ovt.errors import UsageError


@click.command()
@click.option("--vnc", is_flag=True, help="Serve its screen to a VNC viewer, until it is closed.")
@click.option("--listen", default="127.0.0.1:0", show_default=True, metavar="ADDRESS:PORT", help="With --vnc.")
@click.option("--detach-keys", default=DETACH_KEYS, show_default=True, help="Keys that leave the console.")
@instance_argument("console", many=False)
@pass_app
def console(app: App, vnc: bool, listen: str, detach_keys: str, instance: str) -> int:
    """Join the serial console of a virtual machine, or show its screen."""
    app.subject = instance
    if vnc:
        return _vnc(app, instance, listen)
    from ovt.machines import power

    power.machine(app.host, "console", instance)
    if os.isatty(0):
        output.note(f"the serial console of {instance}; {detach_keys} leaves it")
    code = app.host.attach(instance, 0, detach_keys, forward=False)
    if not isinstance(code, int):
        output.note(f"\r\nleft the console of {instance}")
        return 0
    output.note(f"\r\n{instance} has ended with status {code}")
    return 0


def _vnc(app: App, instance: str, listen: str) -> int:
    import socket

    from ovt.machines import power

    address, _, port = listen.rpartition(":")
    if not address or not port.isdigit():
        raise UsageError(f"{listen!r} is no address to listen at", "127.0.0.1:5900")
    power.with_screen(app.host, instance)
    with socket.create_server((address, int(port))) as server:
        host, number = server.getsockname()[:2]
        output.result(f"vnc://{host}:{number}")
        output.flush()
        while True:
            connection, _ = server.accept()
            with connection:
                power.viewer(app.host, instance, connection.fileno())


@click.command()
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to show it."
)
@instance_argument("guest", many=False)
@pass_app
def guest(app: App, form: str, instance: str) -> int:
    """Show what the guest says of itself: system, addresses, file systems."""
    from ovt.machines import power

    app.subject = instance
    told = power.guest(app.host, instance)
    if form == "json":
        output.show_json(told)
        return 0
    for key, value in told.items():
        if isinstance(value, list):
            for item in value:
                words = [
                    ", ".join(map(str, part)) if isinstance(part, list) else f"{name} {part}"
                    for name, part in item.items()
                    if part not in (None, "", [])
                ]
                output.result(f"{key:<12} {'  '.join(words)}")
        elif isinstance(value, dict):
            output.result(f"{key:<12} {'  '.join(f'{part}' for part in value.values() if part)}")
        elif value not in (None, ""):
            output.result(f"{key:<12} {value}")
    return 0


@click.command()
@instance_argument("reset")
@pass_app
def reset(app: App, instances: tuple[str, ...]) -> int:
    """Press the reset button of virtual machines."""
    from ovt.machines import power

    return app.each("reset", instances, lambda name: power.reset(app.host, name))


@click.command()
@instance_argument("suspend")
@pass_app
def suspend(app: App, instances: tuple[str, ...]) -> int:
    """Have the guests of virtual machines go to sleep (S3)."""
    from ovt.machines import power

    return app.each("suspend", instances, lambda name: power.suspend(app.host, name))


@click.command()
@instance_argument("wake")
@pass_app
def wake(app: App, instances: tuple[str, ...]) -> int:
    """Wake virtual machines whose guests sleep."""
    from ovt.machines import power

    return app.each("wake", instances, lambda name: power.wake(app.host, name))


@click.command()
@instance_argument("save")
@pass_app
def save(app: App, instances: tuple[str, ...]) -> int:
    """Write the memory of virtual machines to the disk and end them; `start` goes on from there."""
    from ovt.machines import power

    def one(name: str) -> object:
        with bar(app.quiet, f"saving {name}") as progress:
            return power.save(app.host, name, progress)

    return app.each("save", instances, one)


@click.command()
@instance_argument("screenshot", many=False)
@click.argument("file", type=click.Path(dir_okay=False, writable=True))
@pass_app
def screenshot(app: App, instance: str, file: str) -> int:
    """Write the screen of a virtual machine to a PNG file."""
    from ovt.machines import power

    app.subject = instance
    power.screenshot(app.host, instance, os.path.abspath(file))
    output.result(file)
    return 0
