"""snapshot create, list, show, restore and delete; clone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ovt.cli import output
from ovt.cli.context import App, Parsed, instance_argument, pass_app
from ovt.cli.output import Column
from ovt.cli.progress import bar
from ovt.cli.values import parse_duration, show_age, show_size, show_time

_DURATION = Parsed("duration", parse_duration)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def snapshot() -> None:
    """Keep states of a virtual machine, and go back to them."""


@snapshot.command()
@click.option("--memory", is_flag=True, help="Also the running guest itself, which stands still meanwhile.")
@click.option("--quiesce", is_flag=True, help="Have the guest's agent bring its file systems to rest.")
@click.option("--freeze-timeout", type=_DURATION, default="30s", show_default=True, help="With --quiesce.")
@click.option("-d", "--description", default="", metavar="TEXT")
@instance_argument("snapshot", many=False)
@click.argument("name", required=False, default="")
@pass_app
def create(
    app: App, memory: bool, quiesce: bool, freeze_timeout: float, description: str, instance: str, name: str
) -> int:
    """Keep the present state of INSTANCE as NAME."""
    from ovt.machines import snapshots

    app.subject = instance
    with _told(app) as report:
        made = snapshots.create(
            app.host,
            instance,
            name,
            description=description,
            memory=memory,
            quiesce=quiesce,
            freeze_timeout=freeze_timeout,
            report=report,
        )
    if not app.quiet:
        output.result(made.name)
    return 0


@snapshot.command("list")
@click.option("--format", "form", default="tree", metavar="FORMAT", help="tree, table, json or a TEMPLATE.")
@instance_argument("snapshot", many=False)
@pass_app
def list_(app: App, form: str, instance: str) -> int:
    """Show the snapshots of INSTANCE, and on which its present state stands."""
    from ovt.machines import snapshots

    app.subject = instance
    records = [_record(entry) for entry in snapshots.listing(app.host, instance)]
    if form != "tree":
        output.show(records, _COLUMNS, form)
        return 0
    now = time.time()
    label = {entry["number"]: _label(entry, now) for entry in records}
    label[0] = output.paint("the present state", "bold")
    for line in snapshots.drawing(app.host, instance, label):
        output.result(line)
    return 0


@snapshot.command()
@instance_argument("snapshot", many=False)
@click.argument("name")
@pass_app
def show(app: App, instance: str, name: str) -> int:
    """Show everything known of a snapshot, as JSON."""
    from ovt.machines import snapshots

    app.subject = instance
    output.show_json(_record(snapshots.show(app.host, instance, name)))
    return 0


@snapshot.command()
@click.option("-f", "--force", is_flag=True, help="Also when it is alive: it is killed, and started again after.")
@click.option("--keep", metavar="NAME", help="First keep the present state of its disks as snapshot NAME.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@instance_argument("snapshot", many=False)
@click.argument("name")
@pass_app
def restore(app: App, force: bool, keep: str | None, yes: bool, instance: str, name: str) -> int:
    """Take INSTANCE back to snapshot NAME. What it has become since is lost, unless it is kept."""
    import sys

    from ovt.machines import snapshots

    app.subject = instance
    if keep is None and not app.quiet:
        snapshots.show(app.host, instance, name)  # a name that is not there is no question
        output.note(f"this throws away {snapshots.lost(app.host, instance)}")
        if sys.stdin.isatty() and not (yes or force) and not click.confirm("go on?", err=True):
            return 1
    with _told(app) as report:
        snapshots.restore(app.host, instance, name, force=force, keep=keep, report=report)
    if not app.quiet:
        output.result(instance)
    return 0


@snapshot.command()
@instance_argument("snapshot", many=False)
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@pass_app
def delete(app: App, instance: str, names: tuple[str, ...]) -> int:
    """Delete snapshots, also of a machine that runs; what others need of them stays."""
    from ovt.machines import snapshots

    def remove(name: str) -> str:
        with _told(app) as report:
            snapshots.delete(app.host, instance, name, report)
        return name

    return app.each(f"delete {instance}'s snapshot", names, remove)


@click.command()
@click.option("--linked", is_flag=True, help="Stand on a snapshot of the source instead of copying its disks.")
@click.option("--snapshot", "name", default="", metavar="NAME", help="Of this state instead of the present one.")
@click.option("--quiesce", is_flag=True, help="Have the guest's agent bring its file systems to rest.")
@instance_argument("clone", many=False)
@click.argument("new", required=False, default="")
@pass_app
def clone(app: App, linked: bool, name: str, quiesce: bool, instance: str, new: str) -> int:
    """Make a new virtual machine NEW from INSTANCE, with an identity of its own."""
    from ovt.machines import clones

    app.subject = instance
    with _told(app) as report:
        made = clones.clone(app.host, instance, new, linked=linked, snapshot=name, quiesce=quiesce, report=report)
    if not app.quiet:
        output.result(made.name)
    return 0


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "created": show_time(entry["created"]), "time": entry["created"]}


def _label(entry: dict[str, Any], now: float) -> str:
    marks = [word for word in ("memory", "quiesced") if entry[word]]
    marks += [f"for {name}" for name in entry["linked_clones"]]
    words = [entry["name"], f"{show_age(now - entry['time'])} ago", show_size(entry["size"]), *marks]
    return "  ".join([*words, *([entry["description"]] if entry["description"] else [])])


_COLUMNS = [
    Column("NAME", "name", lambda entry: "  " * entry["depth"] + entry["name"] + (" *" if entry["current"] else "")),
    Column("CREATED", "time", lambda entry: f"{show_age(time.time() - entry['time'])} ago"),
    Column("SIZE", "size", lambda entry: show_size(entry["size"])),
    Column("MEMORY", "memory", lambda entry: show_size(entry["memory_size"]) if entry["memory"] else ""),
    Column("QUIESCED", "quiesced", lambda entry: "yes" if entry["quiesced"] else ""),
    Column("DESCRIPTION", "description"),
]


@contextmanager
def _told(app: App) -> Iterator[Any]:
    """A Report of ovt.engine.vm.snapshots as a bar."""
    with bar(app.quiet, app.subject or "snapshot") as draw:
        yield lambda what, done, total: draw(done, total)
