"""ps. In a module of its own: what it imports is what a list of a thousand instances costs at least."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from ovt.cli import output
from ovt.cli.context import App, pass_app
from ovt.cli.output import Column
from ovt.cli.values import show_age, show_time
from ovt.errors import UsageError
from ovt.model import LIVE, Instance, Status

_COMMAND_WIDTH = 30


@click.command()
@click.option("-a", "--all", "all_", is_flag=True, help="Also those that are not alive.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option(
    "-f",
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="status, kind, name, id, image, label or exited; several of a key are alternatives.",
)
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json, TEMPLATE or 'table TEMPLATE'.")
@click.option("--no-trunc", is_flag=True, help="Show long commands and images whole.")
@click.option("--no-header", is_flag=True, help="Only the rows.")
@pass_app
def ps(app: App, all_: bool, quiet: bool, filters: tuple[str, ...], form: str, no_trunc: bool, no_header: bool) -> int:
    """List instances that are alive, or all."""
    wanted = _filters(filters)
    all_ = all_ or "status" in wanted or "exited" in wanted
    now = time.time()
    damaged: list[str] = []
    records = []
    for instance in app.host.store.load_all(damaged):
        status = app.host.store.observe(instance)
        if (all_ or status in LIVE or status is Status.RESTARTING) and _matches(instance, status, wanted):
            records.append(record(instance, status))
    if quiet or app.quiet:
        for item in records:
            output.result(item["id"])
    else:
        output.show(records, _columns(now, no_trunc), form, not no_header)
    for id in damaged:
        output.note(f"instance {id} is damaged: ovt delete --force {id}")
    return 0


def record(instance: Instance, status: Status) -> dict[str, Any]:
    """What JSON and templates show of an instance in a list."""
    spec = instance.spec
    return {
        "id": instance.id,
        "name": instance.name,
        "kind": instance.kind.value,
        "image": spec.image,
        "command": [*(spec.entrypoint or ()), *spec.command],
        "status": status.value,
        "pid": instance.pid if status in LIVE else 0,
        "exit_code": None if instance.exit_code < 0 or status in LIVE else instance.exit_code,
        "oom_killed": instance.oom_killed,
        "restarts": instance.restarts,
        "created": show_time(instance.created),
        "started": show_time(instance.started),
        "finished": show_time(instance.finished),
        "labels": instance.labels,
        "error": instance.error,
        "times": {"created": instance.created, "started": instance.started, "finished": instance.finished},
    }


def _columns(now: float, whole: bool) -> list[Column]:
    def command(item: dict[str, Any]) -> str:
        return _short(" ".join(item["command"]), 0 if whole else _COMMAND_WIDTH)

    def image(item: dict[str, Any]) -> str:
        return item["image"] if whole else _short_path(item["image"])

    return [
        Column("ID", "id"),
        Column("NAME", "name"),
        Column("KIND", "kind"),
        Column("IMAGE", "image", image),
        Column("COMMAND", "command", command),
        Column("CREATED", "created", lambda item: f"{show_age(now - item['times']['created'])} ago"),
        Column("STATUS", "status", lambda item: _status(item, now)),
    ]


def _status(item: dict[str, Any], now: float) -> str:
    word, times = item["status"], item["times"]
    if word in {"running", "paused"}:
        return f"{word} {show_age(now - times['started'])}"
    if word == "stopped" and times["finished"]:
        why = f"{item['exit_code']}, out of memory" if item["oom_killed"] else item["exit_code"]
        return f"stopped ({why}) {show_age(now - times['finished'])} ago"
    if word == "stopped" and item["error"]:
        return "stopped (failed to start)"
    if word == "restarting":
        return f"restarting ({item['exit_code']})"
    return str(word)


def _short(text: str, width: int) -> str:
    return text if not width or len(text) <= width else text[: width - 1] + "…"


def _short_path(path: str) -> str:
    return path if len(path) <= _COMMAND_WIDTH else "…" + path[1 - _COMMAND_WIDTH :]


def _filters(texts: tuple[str, ...]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in {"status", "kind", "name", "id", "image", "label", "exited"}:
            raise UsageError(
                f"filter {text!r} is not known", "KEY=VALUE with status, kind, name, id, image, label or exited"
            )
        if key == "status" and value not in set(Status):
            raise UsageError(f"there is no status {value!r}", "one of " + ", ".join(Status))
        result.setdefault(key, []).append(value)
    return result


def _matches(instance: Instance, status: Status, wanted: dict[str, list[str]]) -> bool:
    tests: dict[str, Callable[[str], bool]] = {
        "status": lambda value: status == value,
        "kind": lambda value: instance.kind == value,
        "name": lambda value: value in instance.name,
        "id": lambda value: instance.id.startswith(value),
        "image": lambda value: value in instance.spec.image,
        "exited": lambda value: status is Status.STOPPED and str(instance.exit_code) == value,
        "label": lambda value: _has_label(instance.labels, value),
    }
    return all(any(tests[key](value) for value in alternatives) for key, alternatives in wanted.items())


def _has_label(labels: dict[str, str], text: str) -> bool:
    key, equals, value = text.partition("=")
    return key in labels and (not equals or labels[key] == value)
