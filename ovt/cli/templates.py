"""template and fork."""

from __future__ import annotations

from typing import Any

import click

from ovt.cli import output, values
from ovt.cli.context import App, Parsed, instance_argument, pass_app
from ovt.cli.output import Column
from ovt.cli.progress import bar

_SIZE = Parsed("size", values.parse_size)


class _Group(click.Group):
    """`ovt template VM` is short for `ovt template create VM`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["create", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Group)
def template() -> None:
    """Keep booted guests, to fork them.

    `ovt template VM` keeps a running guest; `ovt template image busybox` boots one for it, and from then on
    `ovt run --vm busybox` goes on from there instead of booting.
    """


@template.command()
@click.option("--name", default="", help="The template's name; the instance's when not given.")
@instance_argument("template", many=False)
@pass_app
def create(app: App, name: str, instance: str) -> int:
    """Keep a running, ready guest as a template; it goes on."""
    from ovt.machines import templates

    app.subject = instance
    with bar(app.quiet, f"keeping {instance}") as progress:
        output.result(templates.take(app.host, instance, name, progress).name)
    return 0


@template.command("image")
@click.option("--name", default="", help="The template's name; the image's when not given.")
@click.option("--memory", type=_SIZE, default=0, help="Memory of its guest; as `run` has it when not given.")
@click.option("--cpus", type=float, default=0.0, help="Its processors.")
@click.argument("image")
@pass_app
def of_image(app: App, name: str, memory: int, cpus: float, image: str) -> int:
    """Boot a guest of IMAGE and keep it, ready to run a program."""
    from ovt.machines import templates

    app.subject = image
    with bar(app.quiet, f"keeping {image}") as progress:
        made = templates.of_image(
            app.host, image, name, memory=memory, cpus=cpus, progress=progress, report=app.host.report
        )
    output.result(made.name)
    return 0


@template.command("list")
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json, TEMPLATE or 'table TEMPLATE'.")
@pass_app
def list_(app: App, form: str) -> int:
    """List the templates."""
    from ovt.engine.vm.template import Templates
    from ovt.machines import templates

    damaged: list[str] = []
    records: list[dict[str, Any]] = [
        {
            "name": found.name,
            "image": found.image,
            "source": found.source,
            "memory": found.hardware["memory"],
            "cpus": found.hardware["vcpus"],
            "forks": templates.users(app.host, found.name),
            "created": values.show_time(found.created),
        }
        for found in Templates(app.host.data).all(damaged)
    ]
    output.show(records, _COLUMNS, form)
    for name in damaged:
        output.note(f"template {name} is damaged: ovt template delete {name}")
    return 0


_COLUMNS = [
    Column("NAME", "name"),
    Column("IMAGE", "image"),
    Column("SOURCE", "source"),
    Column("MEMORY", "memory", lambda item: values.show_size(item["memory"])),
    Column("CPUS", "cpus"),
    Column("FORKS", "forks", lambda item: str(len(item["forks"]))),
    Column("CREATED", "created"),
]


@template.command()
@click.argument("names", metavar="TEMPLATE...", nargs=-1, required=True)
@pass_app
def delete(app: App, names: tuple[str, ...]) -> int:
    """Remove templates that no instance stands on."""
    from ovt.machines import templates

    def remove(name: str) -> str:
        templates.delete(app.host, name)
        return name

    return app.each("delete", names, remove)


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("template")
@click.argument("name", required=False, default="")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@pass_app
def fork(app: App, template: str, name: str, command: tuple[str, ...]) -> int:
    """Make a machine that goes on where TEMPLATE was taken, and print its name.

    COMMAND (after --) is for the guest of `ovt template image`, which waits for one.
    """
    from ovt.machines import templates

    app.subject = template
    if name == "--":
        name = ""
    words = command[1:] if command[:1] == ("--",) else command
    instance = templates.fork(app.host, template, name, words)
    output.result(instance.id if app.quiet else instance.name)
    return 0
