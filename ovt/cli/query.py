"""inspect, logs and events."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ovt.cli import output, values
from ovt.cli.context import App, Parsed, instance_argument, pass_app
from ovt.errors import OvtError, UsageError
from ovt.model import LIVE, pack

_TIME = Parsed("time", values.parse_time)


@click.command()
@click.option("--format", "form", default="json", metavar="FORMAT", help="json, or a template such as '{{.status}}'.")
@instance_argument("inspect")
@pass_app
def inspect(app: App, instances: tuple[str, ...], form: str) -> int:
    """Show everything known of instances, as JSON."""
    records = []
    worst = 0
    for reference in instances:
        try:
            records.append(describe(app, reference))
        except OvtError as error:
            output.error(f"cannot inspect {reference}: {error}", error.hint)
            worst = max(worst, error.exit_status)
    if records or not worst:
        output.show(records, [], form)
    return worst


def describe(app: App, reference: str) -> dict[str, Any]:
    """All that is recorded of an instance, and its present status."""
    host = app.host
    instance, status = host.get(reference)
    home = host.store.home(instance.id)
    spec = instance.spec
    config = f"{home}/bundle/config.json"
    return {
        "id": instance.id,
        "name": instance.name,
        "kind": instance.kind.value,
        "status": status.value,
        "pid": instance.pid if status in LIVE else 0,
        "supervisor_pid": instance.supervisor_pid if status in LIVE else 0,
        "exit_code": None if instance.exit_code < 0 else instance.exit_code,
        "error": instance.error,
        "oom_killed": instance.oom_killed,
        "restarts": instance.restarts,
        "created": values.show_time(instance.created),
        "started": values.show_time(instance.started),
        "finished": values.show_time(instance.finished),
        "labels": instance.labels,
        "image": spec.image,
        "command": [*(spec.entrypoint or ()), *spec.command],
        "limits": spec.limits._asdict(),
        "restart": str(spec.restart),
        "spec": pack(spec),
        "rootfs": instance.rootfs,
        "directory": home,
        "log": f"{home}/log",
        "config": config if os.path.exists(config) else None,
    }


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option("-n", "--tail", type=click.IntRange(min=0), help="Only so many lines from the end.")
@click.option("--since", type=_TIME, help="From a time on, or a duration ago.")
@click.option("--until", type=_TIME, help="Up to a time, or a duration ago.")
@click.option("-t", "--timestamps", is_flag=True, help="The time in front of each line.")
@instance_argument("logs", many=False)
@pass_app
def logs(
    app: App,
    follow: bool,
    tail: int | None,
    since: float | None,
    until: float | None,
    timestamps: bool,
    instance: str,
) -> int:
    """Show what an instance has written, each stream where it belongs."""
    app.subject = instance
    options: dict[str, Any] = {"follow": follow, "tail": tail}
    options |= {"since_ns": _nanoseconds(since), "until_ns": _nanoseconds(until)}
    begins = {"stdout": True, "stderr": True}
    for record in app.host.logs(instance, **options):
        stream = sys.stderr.buffer if record.stream == "stderr" else sys.stdout.buffer
        if timestamps and begins[record.stream]:
            stream.write(record.time.encode() + b" ")
        begins[record.stream] = record.data.endswith(b"\n")
        stream.write(record.data)
        if follow or record.stream == "stderr":
            stream.flush()
    return 0


def _nanoseconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment * 1e9)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@click.option("--since", type=_TIME, help="From a time on, or a duration ago.")
@click.option("--until", type=_TIME, help="Up to a time, or a duration ago.")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="event, name or id.")
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json (one a line) or TEMPLATE.")
@pass_app
def events(
    app: App, follow: bool, since: float | None, until: float | None, filters: tuple[str, ...], form: str
) -> int:
    """Show what happened to instances."""
    wanted: dict[str, set[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in {"event", "name", "id"}:
            raise UsageError(f"filter {text!r} is not known", "KEY=VALUE with event, name or id")
        wanted.setdefault(key, set()).add(value)
    template = None if form in {"table", "json"} else output.parse_template(form)
    for event in app.host.events(since or 0.0, until or 0.0, follow):
        if any(event[key] not in allowed for key, allowed in wanted.items()):
            continue
        moment = values.show_time(event["time"]) or ""
        if form == "json":
            output.show_line({**event, "time": moment})
        elif template is not None:
            output.result(output.fill(template, {**event, "time": moment}))
        else:
            details = {key: value for key, value in event.items() if key not in {"time", "event", "id", "name"}}
            shown = " ".join(f"{key}={value}" for key, value in details.items())
            output.result(f"{moment}  {event['event']:<8}  {event['id']}  {event['name']}  {shown}".rstrip())
        output.flush()
    return 0
