"""device list, attach, detach, resize, limit, insert, eject and link."""

from __future__ import annotations

import os
from typing import Any

import click

from ovt.cli import output
from ovt.cli.context import App, Parsed, instance_argument, pass_app
from ovt.cli.machine_options import parse_cdrom, parse_disk, parse_nic
from ovt.cli.output import Column
from ovt.cli.values import parse_duration, parse_publish, parse_size, show_size
from ovt.errors import NotFound, UsageError

_SIZE = Parsed("size", parse_size)
_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=_HELP)
def device() -> None:
    """Attach, detach and change devices of a machine."""


def _bytes(key: str) -> Any:
    return lambda entry: "" if entry[key] is None else show_size(entry[key])


_COLUMNS = [
    Column("ID", "id"),
    Column("SORT", "sort"),
    Column("BUS", "bus"),
    Column("PLACE", "port"),
    Column("SIZE", "size", _bytes("size")),
    Column("IN", "received", _bytes("received")),
    Column("OUT", "sent", _bytes("sent")),
    Column("STATE", "state"),
    Column("WHAT", "what"),
]


@device.command("list")
@click.option("--format", "form", default="table", metavar="FORMAT", help="table, json or a TEMPLATE.")
@instance_argument("device", many=False)
@pass_app
def list_(app: App, form: str, instance: str) -> int:
    """Show the devices of INSTANCE; IN and OUT are bytes into the guest and out of it."""
    from ovt.machines import device_list

    app.subject = f"list {instance}"
    output.show(device_list.listing(app.host, instance), _COLUMNS, form)
    return 0


@device.group(context_settings=_HELP)
def attach() -> None:
    """Give INSTANCE a device; prints its id."""


@attach.command("disk")
@instance_argument("device", many=False)
@click.argument("disk", metavar="SOURCE[,KEY=VALUE...]", type=Parsed("disk", parse_disk))
@pass_app
def attach_disk(app: App, instance: str, disk: Any) -> int:
    """A disk: the path of an image, or new,size=SIZE; settings as of `ovt create --disk`."""
    from ovt.machines import devices

    app.subject = f"attach {instance}"
    output.result(devices.attach_disk(app.host, instance, disk))
    return 0


@attach.command("cdrom")
@instance_argument("device", many=False)
@click.argument("disk", metavar="ISO", type=Parsed("cdrom", parse_cdrom))
@pass_app
def attach_cdrom(app: App, instance: str, disk: Any) -> int:
    """A CD-ROM drive with this image in it, or empty."""
    from ovt.machines import devices

    app.subject = f"attach {instance}"
    output.result(devices.attach_disk(app.host, instance, disk))
    return 0


@attach.command("nic")
@click.option("-p", "--publish", multiple=True, metavar="[ADDR:]PORT:GUEST[/udp]", type=Parsed("port", parse_publish))
@instance_argument("device", many=False)
@click.argument("nic", metavar="NETWORK[,KEY=VALUE...]", type=Parsed("nic", parse_nic))
@pass_app
def attach_nic(app: App, publish: tuple[str, ...], instance: str, nic: Any) -> int:
    """A network card; settings as of `ovt create --nic`."""
    from ovt.machines import devices

    app.subject = f"attach {instance}"
    output.result(devices.attach_nic(app.host, instance, nic._replace(forwards=publish)))
    return 0


@attach.command("hostdev")
@instance_argument("device", many=False)
@click.argument("address")
@pass_app
def attach_hostdev(app: App, instance: str, address: str) -> int:
    """A PCI device of the host, such as 0000:01:10.0; it is taken from its driver while INSTANCE runs."""
    from ovt.machines import devices

    app.subject = f"attach {instance}"
    output.result(devices.attach_hostdev(app.host, instance, address))
    return 0


@device.command()
@click.option(
    "-t", "--timeout", type=Parsed("duration", parse_duration), default="30s", show_default=True,
    help="For the guest to give it back.",
)  # fmt: skip
@click.option("--delete", is_flag=True, help="Remove its own images as well, unless snapshots need them.")
@instance_argument("device", many=False)
@click.argument("id")
@pass_app
def detach(app: App, timeout: float, delete: bool, instance: str, id: str) -> int:
    """Take device ID from INSTANCE."""
    from ovt.machines import devices

    app.subject = f"detach {instance}"
    left = devices.detach(app.host, instance, id, timeout, delete)
    for path in left:
        output.note(f"{path} stays, because snapshots need it" if delete else f"its content stays in {path}")
    if not app.quiet:
        output.result(id)
    return 0


@device.command()
@instance_argument("device", many=False)
@click.argument("id")
@click.argument("size", type=_SIZE)
@pass_app
def resize(app: App, instance: str, id: str, size: int) -> int:
    """Make disk ID larger: SIZE is what it has then."""
    from ovt.machines import devices

    app.subject = f"resize {instance}"
    devices.resize(app.host, instance, id, size)
    return _done(app, id)


@device.command()
@click.option("--iops", type=int, help="Operations per second at most; 0 for no limit.")
@click.option("--bps", type=_SIZE, help="Bytes per second at most; 0 for no limit.")
@instance_argument("device", many=False)
@click.argument("id")
@pass_app
def limit(app: App, iops: int | None, bps: int | None, instance: str, id: str) -> int:
    """Limit what goes through disk ID."""
    from ovt.machines import devices

    if iops is None and bps is None:
        raise UsageError("no limit was given", "--iops or --bps")
    app.subject = f"limit {instance}"
    devices.limit(app.host, instance, id, iops, bps)
    return _done(app, id)


@device.command()
@click.option("-f", "--force", is_flag=True, help="Take out what is in there, although the guest has locked it.")
@instance_argument("device", many=False)
@click.argument("id")
@click.argument("image", metavar="ISO")
@pass_app
def insert(app: App, force: bool, instance: str, id: str, image: str) -> int:
    """Put the image ISO into CD-ROM drive ID."""
    from ovt.machines import devices

    app.subject = f"insert {instance}"
    path = os.path.abspath(os.path.expanduser(image))
    if not os.path.exists(path):
        raise NotFound(f"there is no image {image}", f"ovt device eject {instance} {id} empties the drive")
    devices.insert(app.host, instance, id, path, force=force)
    return _done(app, id)


@device.command()
@click.option("-f", "--force", is_flag=True, help="Although the guest has locked it.")
@instance_argument("device", many=False)
@click.argument("id")
@pass_app
def eject(app: App, force: bool, instance: str, id: str) -> int:
    """Empty CD-ROM drive ID."""
    from ovt.machines import devices

    app.subject = f"eject {instance}"
    devices.insert(app.host, instance, id, "", force=force)
    return _done(app, id)


@device.command()
@instance_argument("device", many=False)
@click.argument("id")
@click.argument("state", type=click.Choice(["up", "down"]))
@pass_app
def link(app: App, instance: str, id: str, state: str) -> int:
    """Put the cable of network card ID in, or pull it out."""
    from ovt.machines import devices

    app.subject = f"link {instance}"
    devices.link(app.host, instance, id, state == "up")
    return _done(app, id)


def _done(app: App, id: str) -> int:
    if not app.quiet:
        output.result(id)
    return 0
