"""migrate and receive."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ovt.cli import output, values
from ovt.cli.context import App, Parsed, pass_app
from ovt.errors import UsageError

if TYPE_CHECKING:
    from ovt.engine.vm.migration import Progress
    from ovt.machines.migrate import Outcome
    from ovt.machines.transport import Tls

_SIZE = Parsed("size", values.parse_size)
_DURATION = Parsed("duration", values.parse_duration)
_SHOWN = 1.0  # seconds between two lines of progress


def _certificates(command: click.decorators.FC) -> click.decorators.FC:
    for name, text in (
        ("--ca", "Of the authority that has signed the other side's certificate."),
        ("--key", "Of this side's certificate."),
        ("--cert", "This side's certificate, for tls:// (all three in PEM)."),
    ):
        command = click.option(name, metavar="FILE", default="", help=text)(command)
    return command


@click.command()
@click.option("--check", is_flag=True, help="Only list what stands against it, asked of both hosts.")
@click.option("--with-disks", is_flag=True, help="Copy the disks that the other host does not share.")
@click.option("--downtime", type=int, default=300, show_default=True, help="Milliseconds it may stand still.")
@click.option("--bandwidth", type=_SIZE, default="0", help="Bytes per second at most, such as 100M.")
@click.option(
    "--auto-converge/--no-auto-converge",
    default=True,
    show_default=True,
    help="Slow it down when it writes faster than the wire carries.",
)
@click.option("--multifd", type=int, default=0, metavar="N", help="So many connections for the memory.")
@click.option("--postcopy", is_flag=True, help="Change over after one pass; the rest of the memory follows.")
@click.option("--postcopy-after", type=_DURATION, default="0", help="Change over that late instead.")
@click.option("--timeout", type=_DURATION, default="0", help="Give up and let it go on here after that time.")
@click.option("--keep", is_flag=True, help="Keep it here too, stopped.")
@click.option("--new-id", is_flag=True, help="Give it another id there.")
@click.option("--trust-shared", is_flag=True, help="Files of the same path are the same file; do not prove it.")
@click.option("--ssh-command", metavar="COMMAND", default="", help="In the place of ssh and its options.")
@click.option("--remote-ovt", metavar="COMMAND", default="", help="ovt on the other host, with options.")
@_certificates
@click.option("--cancel", is_flag=True, help="Have the migration that is under way stop.")
@click.option("--resolve", is_flag=True, help="Finish one that was interrupted in the moment of the change-over.")
@click.argument("instance_and_host", metavar="INSTANCE [HOST]", nargs=-1, required=True)
@pass_app
def migrate(
    app: App,
    /,
    instance_and_host: tuple[str, ...],
    check: bool,
    with_disks: bool,
    downtime: int,
    bandwidth: int,
    auto_converge: bool,
    multifd: int,
    postcopy: bool,
    postcopy_after: float,
    timeout: float,
    keep: bool,
    new_id: bool,
    trust_shared: bool,
    ssh_command: str,
    remote_ovt: str,
    cert: str,
    key: str,
    ca: str,
    cancel: bool,
    resolve: bool,
) -> int:
    """Move a running virtual machine to another host that runs ovt.

    HOST is user@host or ssh://user@host:port, where `ovt receive` is started by SSH; or tls://host:port or unix:PATH,
    where `ovt receive --listen` waits. Until the last moment it goes on here when anything fails; ^C cancels.
    """
    from ovt.engine.vm.migration import Settings
    from ovt.machines import migrate as moves
    from ovt.machines import outgoing
    from ovt.machines.transport import Tls, parse

    instance, *hosts = instance_and_host
    app.subject = instance
    if cancel or resolve:
        if hosts or (cancel and resolve):
            raise UsageError("--cancel and --resolve take an instance alone")
        if cancel:
            outgoing.cancel(app.host, instance)
            output.note(f"{instance} goes on here")
        else:
            where = outgoing.resolve(app.host, instance)
            output.note(f"{instance} is here" if where == "here" else f"{instance} is on the other host")
        return 0
    if len(hosts) != 1:
        raise UsageError("one instance and one host are needed", "ovt migrate NAME user@host")
    if downtime < 1 or not 0 <= multifd <= 255:
        raise UsageError("--downtime is at least 1 millisecond, --multifd from 0 to 255")
    address = parse(hosts[0], Tls(cert, key, ca), ssh_command, remote_ovt)
    settings = Settings(downtime, bandwidth, auto_converge, multifd, postcopy or postcopy_after > 0)
    options = moves.Options(settings, with_disks, postcopy_after, timeout, keep, new_id, trust_shared)
    if check:
        found = moves.check(app.host, instance, address, options)
        for blocker in found:
            output.result(f"{blocker}" + (f" (try: {blocker.remedy})" if blocker.remedy else ""))
        return 1 if found else 0
    try:
        outcome = moves.migrate(app.host, instance, address, options, _Reporter(app.quiet).tell)
    except moves.Blocked as error:
        output.error(f"cannot migrate {instance} to {address}: nothing was begun")
        for blocker in error.blockers:
            output.note(f"  {blocker}" + (f" (try: {blocker.remedy})" if blocker.remedy else ""))
        return error.exit_status
    if not app.quiet:
        output.result(_summary(outcome, str(address)))
    return 0


def _summary(outcome: Outcome, where: str) -> str:
    sent = values.show_size(outcome.transferred)
    return (
        f"{outcome.name} runs on {where}: it stood still for {outcome.pause} ms, {sent} in {outcome.total / 1000:.1f} s"
    )


class _Reporter:
    """Progress as a line per second on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._next = time.monotonic() + _SHOWN

    def tell(self, progress: Progress) -> None:
        """Show it if it is time."""
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + _SHOWN
        parts = [
            f"{progress.phase}: {values.show_size(progress.remaining)} of {values.show_size(progress.total)} to go",
            f"{values.show_size(progress.rate)}/s",
        ]
        if progress.dirty_rate:
            parts.append(f"the guest writes {values.show_size(progress.dirty_rate)}/s")
        if progress.expected_downtime:
            parts.append(f"would stand still for {progress.expected_downtime} ms")
        output.note(", ".join(parts))


@click.command()
@click.option("--listen", metavar="ADDRESS", help="Wait for others at tls://ADDRESS:PORT or unix:PATH.")
@click.option("--join", nargs=2, metavar="SESSION CHANNEL", help="Carry data of a session; used by migrate over SSH.")
@_certificates
@pass_app
def receive(app: App, /, listen: str | None, join: tuple[str, str] | None, cert: str, key: str, ca: str) -> int:
    """Take virtual machines that other hosts send.

    Without options it serves one migration on standard input and output, which is what `ovt migrate` starts by SSH.
    Whoever may connect may run machines here with the rights of this ovt: with SSH who may log in, with TLS who has
    a certificate of the authority, at a unix socket only the same user.
    """
    from ovt.machines import listening
    from ovt.machines.receive import session
    from ovt.machines.transport import Tls

    if listen and join:
        raise UsageError("--listen and --join together", "leave out one of them")
    host = app.host
    if join:
        listening.join(host.run_root, *join, 0, 1)
    elif listen:
        certificates: Tls = Tls(cert, key, ca)
        listening.listen(
            host.data,
            host.run_root,
            listen,
            certificates,
            lambda where: output.note(f"waiting at {where}"),
            lambda line: output.note(f"ovt: {line}"),
        )
    else:
        session(host, 0, 1)
    return 0
