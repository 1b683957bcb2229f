"""info, check and version."""

from __future__ import annotations

import os
from typing import Any

import click

from ovt import __version__
from ovt.cli import output
from ovt.cli.context import App, pass_app

_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
def version() -> int:
    """Print the version."""
    output.result(f"ovt {__version__}")
    return 0


@click.command()
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json or TEMPLATE.")
@pass_app
def info(app: App, form: str) -> int:
    """Describe this host and this installation."""
    from ovt.engine.container import facts

    host = app.host
    counts: dict[str, int] = {}
    for _, status in host.list():
        counts[status.value] = counts.get(status.value, 0) + 1
    cgroups = facts.find_cgroups(host.run_root)
    data: dict[str, Any] = {
        "version": __version__,
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
        "processors": os.cpu_count(),
        "rootless": facts.rootless(),
        "cgroup": facts.cgroup_version(),
        "cgroup_manager": cgroups.manager,
        "data_root": host.data,
        "run_root": host.run_root,
        "instances": sum(counts.values()),
        "statuses": counts,
    }
    if form in {"", "table"}:
        shown = {**data, "statuses": " ".join(f"{count} {name}" for name, count in counts.items()) or "none"}
        output.table(None, [[key.replace("_", " "), str(value)] for key, value in shown.items()])
    elif form == "json":
        output.show_json(data)
    else:
        output.show([data], [], form)
    return 0


@click.command()
@click.option("--fix", is_flag=True, help="Finish or remove what killed commands have left.")
@click.option("--format", "form", default="table", metavar="FORMAT", help="table or json.")
@pass_app
def check(app: App, fix: bool, form: str) -> int:
    """Find what this host lacks, and what killed commands have left.

    Each failure comes with what mends it. The exit status is 1 when something fails or is left.
    """
    from ovt.engine.container import readiness
    from ovt.engine.vm import readiness as machines

    found = [*readiness.checks(app.host.data, app.host.run_root), *machines.checks(app.host.run_root)]
    left = app.host.leftovers(fix)
    failed = any(item.state == "fail" for item in found) or bool(left and not fix)
    if form == "json":
        output.show_json(
            {"checks": [item._asdict() for item in found], "leftovers": [item._asdict() for item in left], "fixed": fix}
        )
        return int(failed)
    width = max(len(item.name) for item in found)
    for item in found:
        mark, colour = _MARKS[item.state]
        output.result(f"{output.paint(f'{mark:<4}', colour)}  {item.name:<{width}}  {item.detail}")
        if item.fix and item.state != "ok":
            output.result(f"      {'':<{width}}  try: {item.fix}")
    for leftover in left:
        word = "fixed" if fix else "left"
        output.result(f"{output.paint(f'{word:<4}', 'yellow')}  {leftover.kind} {leftover.name}: {leftover.reason}")
    if left and not fix:
        output.note("  try: ovt check --fix")
    return int(failed)
