"""start, stop, restart, kill, pause, resume, wait, delete, rename, update."""

from __future__ import annotations

import time

import click

from ovt.cli import values
from ovt.cli.context import App, Parsed, instance_argument, pass_app
from ovt.errors import UsageError
from ovt.model import IDLE, LIVE, Restart

_SIZE = Parsed("size", values.parse_size)
_DURATION = Parsed("duration", values.parse_duration)


def _chosen(app: App, instances: tuple[str, ...], all_: bool, alive: bool) -> tuple[str, ...]:
    if all_ and instances:
        raise UsageError("--all and names together", "leave one of them out")
    if all_:
        wanted = LIVE if alive else IDLE
        return tuple(instance.name for instance, status in app.host.list() if status in wanted)
    if not instances:
        raise UsageError("no instance was named", "give names, or --all")
    return instances


@click.command()
@click.option("-a", "--all", "all_", is_flag=True, help="All that are not alive.")
@click.option("--boot", is_flag=True, help="All whose restart policy asks for it; for the start of the machine.")
@click.option("--attach", is_flag=True, help="Join its streams; one instance only.")
@instance_argument("start", required=False)
@pass_app
def start(app: App, instances: tuple[str, ...], all_: bool, boot: bool, attach: bool) -> int:
    """Start instances."""
    host = app.host
    if boot:
        return _boot(app)
    instances = _chosen(app, instances, all_, alive=False)
    if attach:
        if len(instances) != 1:
            raise UsageError("--attach takes one instance")
        from ovt.cli.running import foreground

        return foreground(app, host.get(instances[0])[0])
    return app.each("start", instances, host.start)


def _boot(app: App) -> int:
    """Start what is to run with the host, in its order; one that fails does not keep the others back."""
    host = app.host
    wanted = [
        instance
        for instance, status in host.list()
        if status in IDLE
        and (
            instance.spec.restart.policy == "always"
            or (instance.spec.restart.policy == "unless-stopped" and not instance.stop_wanted)
        )
    ]
    worst = 0
    ordered = sorted(wanted, key=lambda instance: (-instance.spec.boot_order, instance.created))
    for number, instance in enumerate(ordered, 1):
        worst = max(worst, app.each("start", [instance.name], host.start))
        if number < len(ordered):
            time.sleep(instance.spec.boot_delay)
    return worst


@click.command()
@click.option(
    "-t", "--timeout", type=_DURATION, help="Seconds to wait before killing; 10 unless it was made with another."
)
@click.option("-f", "--force", is_flag=True, help="Kill at once.")
@click.option("-a", "--all", "all_", is_flag=True, help="All that are alive.")
@instance_argument("stop", required=False)
@pass_app
def stop(app: App, instances: tuple[str, ...], timeout: float | None, force: bool, all_: bool) -> int:
    """Ask instances to end, kill them when they do not."""
    host = app.host
    wait = 0.0 if force else timeout
    return app.each("stop", _chosen(app, instances, all_, alive=True), lambda name: host.stop(name, wait))


@click.command()
@click.option("-t", "--timeout", type=_DURATION, help="Seconds to wait before killing.")
@instance_argument("restart")
@pass_app
def restart(app: App, instances: tuple[str, ...], timeout: float | None) -> int:
    """Stop instances and start them again."""
    host = app.host
    return app.each("restart", instances, lambda name: host.restart(name, timeout))


@click.command()
@click.option("-s", "--signal", type=Parsed("signal", values.parse_signal), default="KILL", show_default=True)
@instance_argument("kill")
@pass_app
def kill(app: App, instances: tuple[str, ...], signal: int) -> int:
    """Send a signal to instances."""
    host = app.host
    return app.each("kill", instances, lambda name: host.kill(name, signal))


@click.command()
@instance_argument("pause")
@pass_app
def pause(app: App, instances: tuple[str, ...]) -> int:
    """Freeze all processes of instances."""
    return app.each("pause", instances, app.host.pause)


@click.command()
@instance_argument("resume")
@pass_app
def resume(app: App, instances: tuple[str, ...]) -> int:
    """Let paused instances go on."""
    return app.each("resume", instances, app.host.resume)


@click.command()
@click.option(
    "--for",
    "what",
    type=click.Choice(["exit", "boot", "agent"]),
    default="exit",
    show_default=True,
    help="What to wait for; boot and agent are of virtual machines.",
)
@click.option("-t", "--timeout", type=_DURATION, default=0.0, help="With boot and agent: 5m when not given.")
@instance_argument("wait")
@pass_app
def wait(app: App, instances: tuple[str, ...], what: str, timeout: float) -> int:
    """Wait for the end of instances and print their exit statuses, or for guests that are up."""
    host = app.host
    if what != "exit":
        from ovt.machines import power

        return app.each("wait for", instances, lambda name: power.wait_for(host, name, what, timeout, host.report))
    return app.each("wait for", instances, lambda name: str(host.wait(name)))


@click.command()
@click.option("-f", "--force", is_flag=True, help="Also those that are alive, half-made or damaged.")
@instance_argument("delete")
@pass_app
def delete(app: App, instances: tuple[str, ...], force: bool) -> int:
    """Remove instances."""
    host = app.host

    def remove(name: str) -> str:
        host.delete(name, force)
        return name

    return app.each("delete", instances, remove)


@click.command()
@instance_argument("rename", many=False)
@click.argument("new")
@pass_app
def rename(app: App, instance: str, new: str) -> int:
    """Give an instance another name."""
    host = app.host
    return app.each("rename", [instance], lambda name: host.rename(name, new).name)


@click.command()
@click.option("--cpus", type=float, help="Processors' worth of time; 0 for no limit.")
@click.option("--cpuset-cpus", metavar="LIST", help="Processors to run on, such as 0-3,6.")
@click.option("--memory", type=_SIZE, help="Such as 512M; 0 for no limit.")
@click.option("--memory-swap", type=_SIZE, help="Memory and swap together.")
@click.option("--pids", type=int, help="Processes at most; 0 for no limit.")
@click.option("--restart", type=Parsed("policy", Restart.parse), help="no, on-failure[:N], always or unless-stopped.")
@instance_argument("update")
@pass_app
def update(app: App, /, instances: tuple[str, ...], restart: Restart | None, **limits: object) -> int:
    """Change limits and restart policy of instances."""
    wanted = {key: value for key, value in limits.items() if value is not None}
    if not wanted and restart is None:
        raise UsageError("nothing to change was given", "ovt update --help")
    host = app.host
    return app.each("update", instances, lambda name: host.update(name, wanted, restart))
