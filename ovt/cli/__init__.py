"""The command line for people: `ovt VERB …`. Which command lives in which module; errors to words and exit status.

Commands are imported when they are called: `ps` must not pay for `run`. Exit status: 0 done, 1 failed, 2 wrong usage;
`run`, `exec` and `attach` use 125 for failures of ovt itself, 126 and 127 for a program that cannot be run or found,
and otherwise the program's own.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import click

from ovt import __version__
from ovt.cli import output
from ovt.cli.context import App
from ovt.errors import OvtError, PayloadError


class Entry(NamedTuple):
    """Where a command is defined, what it does in one line, and the group it is listed in."""

    module: str
    help: str
    group: str


_LIFE, _INSIDE, _LOOK, _SYSTEM = "Life of an instance", "Inside an instance", "Look", "The host"
_MACHINE = "Virtual machines alone"

COMMANDS: dict[str, Entry] = {
    "create": Entry("running", "Make an instance of IMAGE without starting it", _LIFE),
    "run": Entry("running", "Make an instance of IMAGE and start it", _LIFE),
    "start": Entry("lifecycle", "Start instances", _LIFE),
    "stop": Entry("lifecycle", "Ask instances to end, kill them when they do not", _LIFE),
    "restart": Entry("lifecycle", "Stop instances and start them again", _LIFE),
    "kill": Entry("lifecycle", "Send a signal to instances", _LIFE),
    "pause": Entry("lifecycle", "Freeze all processes of instances", _LIFE),
    "resume": Entry("lifecycle", "Let paused instances go on", _LIFE),
    "wait": Entry("lifecycle", "Wait for the end of instances and print their exit statuses", _LIFE),
    "delete": Entry("lifecycle", "Remove instances", _LIFE),
    "rename": Entry("lifecycle", "Give an instance another name", _LIFE),
    "update": Entry("lifecycle", "Change limits and restart policy of instances", _LIFE),
    "exec": Entry("inside", "Run COMMAND in a living instance", _INSIDE),
    "attach": Entry("inside", "Join the standard streams of an instance", _INSIDE),
    "cp": Entry("inside", "Copy files between the host and an instance", _INSIDE),
    "ps": Entry("listing", "List instances that are alive, or all", _LOOK),
    "inspect": Entry("query", "Show everything known of instances, as JSON", _LOOK),
    "logs": Entry("query", "Show what an instance has written", _LOOK),
    "stats": Entry("watch", "Show what instances use", _LOOK),
    "top": Entry("watch", "List the processes of an instance", _LOOK),
    "events": Entry("query", "Show what happened to instances", _LOOK),
    "console": Entry("machine", "Join the serial console of a virtual machine", _MACHINE),
    "guest": Entry("machine", "Show what the guest says of itself", _MACHINE),
    "screenshot": Entry("machine", "Write the screen of a virtual machine to a PNG file", _MACHINE),
    "reset": Entry("machine", "Press the reset button of virtual machines", _MACHINE),
    "suspend": Entry("machine", "Have the guests of virtual machines go to sleep", _MACHINE),
    "wake": Entry("machine", "Wake virtual machines whose guests sleep", _MACHINE),
    "save": Entry("machine", "Write the memory of virtual machines to the disk and end them", _MACHINE),
    "device": Entry("devices", "Attach, detach and change devices of a machine", _MACHINE),
    "snapshot": Entry("snapshots", "Keep states of a virtual machine", _MACHINE),
    "clone": Entry("snapshots", "Make a new virtual machine NEW from INSTANCE", _MACHINE),
    "template": Entry("templates", "Keep booted guests, to fork them", _MACHINE),
    "fork": Entry("templates", "Make a machine that goes on where TEMPLATE was taken", _MACHINE),
    "migrate": Entry("migration", "Move a running virtual machine to another host", _MACHINE),
    "receive": Entry("migration", "Take virtual machines that other hosts send", _MACHINE),
    "info": Entry("system", "Describe this host and this installation", _SYSTEM),
    "check": Entry("system", "Find what this host lacks, and what killed commands have left", _SYSTEM),
    "completion": Entry("completion", "Print the completion script for SHELL", _SYSTEM),
    "version": Entry("system", "Print the version", _SYSTEM),
}
_OWN_STATUS = {"run": 125, "exec": 125, "attach": 125}


class Commands(click.Group):
    """Finds commands by the table above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        import importlib

        module = importlib.import_module(f"ovt.cli.{COMMANDS[cmd_name].module}")
        command: click.Command = getattr(module, cmd_name.replace("exec", "exec_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            raise OvtUsage(f"there is no command {args[0]!r}", f"ovt {close[0]}" if close else "ovt --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in dict.fromkeys(entry.group for entry in COMMANDS.values()):
            with formatter.section(group):
                formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items() if entry.group == group])


class OvtUsage(click.UsageError):
    """A usage error with a hint of its own."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", message="ovt %(version)s")
@click.option("--data-root", envvar="OVT_DATA_ROOT", show_envvar=True, metavar="DIR", help="Where instances are kept.")
@click.option(
    "--run-root", envvar="OVT_RUN_ROOT", show_envvar=True, metavar="DIR", help="Where run-time state is kept."
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but results.")
@click.option("-v", "--verbose", is_flag=True, help="Say what is done on the way.")
@click.pass_context
def cli(ctx: click.Context, data_root: str | None, run_root: str | None, quiet: bool, verbose: bool) -> None:
    """Run containers and virtual machines on this host."""
    app: App = ctx.ensure_object(App)
    app.data, app.run, app.quiet, app.verbose = data_root or "", run_root or "", quiet, verbose


def main(arguments: list[str] | None = None) -> None:
    """The entry point: run a command and leave with its exit status."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run a command; its exit status. Errors have been printed."""
    words = [word for word in arguments if not word.startswith("-")]
    verb = next((word for word in words if word in COMMANDS), "")
    app = App()
    try:
        try:
            status: Any = cli.main(arguments, prog_name="ovt", standalone_mode=False, obj=app)
        finally:
            output.flush()
        return status if isinstance(status, int) else 0
    except OvtError as error:
        output.error(f"{_what(verb, app)}{error}", error.hint)
        if isinstance(error, PayloadError):
            return error.exit_status
        return _OWN_STATUS.get(verb, error.exit_status)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "ovt"
        output.error(error.format_message(), getattr(error, "hint", "") or f"{path} --help")
        return _OWN_STATUS.get(verb, 2)
    except click.ClickException as error:
        output.error(error.format_message())
        return _OWN_STATUS.get(verb, 1)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; the interpreter must not fail again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        output.error(f"{_what(verb, app)}{where}{error.strerror}", _os_hint(error))
        return _OWN_STATUS.get(verb, 1)


def _what(verb: str, app: App) -> str:
    if not verb:
        return ""
    return f"cannot {verb} {app.subject}: " if app.subject else f"cannot {verb}: "


def _os_hint(error: OSError) -> str:
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return "ovt check, or run it as root"
    return "ovt check"
