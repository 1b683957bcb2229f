"""create and run."""

from __future__ import annotations

import os
from typing import Any

import click

from ovt.cli import output, values
from ovt.cli.context import App, pass_app
from ovt.cli.options import instance_options, spec_of
from ovt.errors import OvtError, UsageError
from ovt.model import Instance

_SETTINGS = {"allow_interspersed_args": False}
DETACH_KEYS = "ctrl-p,ctrl-q"


@click.command(context_settings=_SETTINGS)
@instance_options
@pass_app
def create(app: App, /, dry_run: bool, **given: Any) -> int:
    """Make an instance of IMAGE without starting it.

    IMAGE is a directory with a root file system, a tar archive of one, or busybox.
    """
    spec, name, labels, kind = spec_of(given)
    if dry_run or app.verbose:
        for line in app.host.plan(spec, name, kind):
            (output.result if dry_run else output.note)(line)
    if not dry_run:
        app.subject = name or spec.image
        instance = app.host.create(spec, name, labels, kind)
        output.result(instance.id if app.quiet else instance.name)
    return 0


@click.command(context_settings=_SETTINGS)
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background and print its name.")
@click.option("--detach-keys", default=DETACH_KEYS, show_default=True, help="Keys that leave it in the background.")
@instance_options
@pass_app
def run(app: App, /, detach: bool, detach_keys: str, dry_run: bool, **given: Any) -> int:
    """Make an instance of IMAGE and start it.

    IMAGE is a directory with a root file system, a tar archive of one, or busybox. The exit status is that of
    COMMAND; 125 when ovt fails, 126 when COMMAND cannot be run, 127 when there is none.
    """
    spec, name, labels, kind = spec_of(given)
    if not detach and spec.tty and spec.stdin and not os.isatty(0):
        raise UsageError("-it, but standard input is not a terminal", "leave out -t, or use -d")
    if dry_run or app.verbose:
        for line in app.host.plan(spec, name, kind):
            (output.result if dry_run else output.note)(line)
    if dry_run:
        return 0
    app.subject = name or spec.image
    instance = app.host.create(spec, name, labels, kind)
    app.subject = instance.name
    try:
        if detach:
            app.host.start(instance.id)
            output.result(instance.id if app.quiet else instance.name)
            return 0
        return foreground(app, instance, detach_keys)
    except OvtError:
        if spec.auto_remove:
            app.host.delete(instance.id, force=True)
        raise


def foreground(app: App, instance: Instance, detach_keys: str = DETACH_KEYS) -> int:
    """Start an instance joined to this process's streams; the exit status for the shell."""
    code = app.host.start_attached(instance.id, 0 if instance.spec.stdin else None, keys=detach_keys)
    if not isinstance(code, int):
        output.note(f"\r\ndetached from {instance.name}; ovt attach {instance.name} goes back")
        return 0
    settled = app.host.settle(instance.id)
    if settled is not None and settled.oom_killed:
        limit = values.show_size(settled.spec.limits.memory)
        output.note(f"ovt: {instance.name} reached its memory limit of {limit} and processes of it were killed")
    return code
