"""stats and top."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ovt.cli import output
from ovt.cli.context import App, instance_argument, pass_app
from ovt.cli.output import Column
from ovt.cli.values import show_size
from ovt.engine.base import Stats
from ovt.errors import OvtError
from ovt.model import LIVE

_CLEAR = "\x1b[H\x1b[J"


@click.command()
@click.option("--no-stream", is_flag=True, help="Show it once.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between.")
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json, TEMPLATE or 'table TEMPLATE'.")
@instance_argument("stats", required=False)
@pass_app
def stats(app: App, instances: tuple[str, ...], no_stream: bool, interval: float, form: str) -> int:
    """Show what instances use; all that are alive unless some are named."""
    before: dict[str, tuple[float, Stats]] = {}
    worst = _sample(app, instances, before, [])
    while True:
        time.sleep(min(interval, 0.5) if no_stream else interval)
        records: list[dict[str, Any]] = []
        worst = max(worst, _sample(app, instances, before, records, quiet=bool(worst)))
        if not no_stream and form in {"", "table"} and sys.stdout.isatty():
            sys.stdout.write(_CLEAR)
        if form == "json" and not no_stream:
            output.show_line(records)
        else:
            under_kvm = any(record["exits"] for record in records)
            output.show(records, [*_COLUMNS, _EXITS] if under_kvm else _COLUMNS, form)
        output.flush()
        if no_stream or (instances and not records):
            return worst


def _sample(
    app: App,
    instances: tuple[str, ...],
    before: dict[str, tuple[float, Stats]],
    records: list[dict[str, Any]],
    quiet: bool = False,
) -> int:
    """Read everything once; with an earlier reading in `before` the share of a processor can be told."""
    worst = 0
    for reference in instances or [instance.id for instance, status in app.host.list() if status in LIVE]:
        try:
            instance, _ = app.host.get(reference)
            used = app.host.stats(instance.id)
        except OvtError as error:
            if instances and not quiet and reference not in before:
                output.error(f"cannot show the use of {reference}: {error}", error.hint)
                worst = max(worst, error.exit_status)
            continue
        now = time.monotonic()
        earlier = before.get(instance.id)
        share = exits = 0.0
        if earlier:
            exits = (used.exits - earlier[1].exits) / (now - earlier[0])
            share = 100 * (used.cpu_seconds - earlier[1].cpu_seconds) / (now - earlier[0])
        before[instance.id] = before[reference] = (now, used)
        record = {"id": instance.id, "name": instance.name, "kind": instance.kind.value}
        rates = {"cpu_percent": round(share, 2), "exits_per_second": round(exits, 1)}
        records.append({**record, **rates, **used._asdict()})
    return worst


def _of(used: int, limit: int) -> str:
    return f"{show_size(used)} / {show_size(limit) if limit else 'no limit'}"


_COLUMNS = [
    Column("ID", "id"),
    Column("NAME", "name"),
    Column("CPU", "cpu_percent", lambda item: f"{item['cpu_percent']:.1f}%"),
    Column("MEMORY", "memory", lambda item: _of(item["memory"], item["memory_limit"])),
    Column("NETWORK IN / OUT", "", lambda i: f"{show_size(i['network_received'])} / {show_size(i['network_sent'])}"),
    Column("BLOCK READ / WRITE", "", lambda i: f"{show_size(i['block_read'])} / {show_size(i['block_write'])}"),
    Column("PIDS", "pids"),
]
_EXITS = Column("EXITS", "exits_per_second", lambda item: f"{item['exits_per_second']:.0f}/s")


@click.command()
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json, TEMPLATE or 'table TEMPLATE'.")
@instance_argument("top", many=False)
@pass_app
def top(app: App, instance: str, form: str) -> int:
    """List the processes of an instance, with their pids inside and on the host."""
    app.subject = instance
    records = app.host.processes(instance)
    of_guest = any(record["host_pid"] is None for record in records)  # a machine's own: the host does not know them
    output.show(
        records,
        [_USER if c.key == "host_uid" else c for c in _PROCESS_COLUMNS if c.key != "host_pid"]
        if of_guest
        else _PROCESS_COLUMNS,
        form,
    )
    return 0


_USER = Column("USER", "user")
_PROCESS_COLUMNS = [
    Column("PID", "pid"),
    Column("HOST PID", "host_pid"),
    Column("HOST UID", "host_uid"),
    Column("STATE", "state"),
    Column("TIME", "cpu_seconds", lambda item: f"{int(item['cpu_seconds'] // 60)}:{item['cpu_seconds'] % 60:05.2f}"),
    Column("MEMORY", "memory", lambda item: show_size(item["memory"])),
    Column("COMMAND", "command"),
]
