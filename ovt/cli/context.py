"""What every command is given: the host, made when it is first needed, and the loop over instances that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ovt.cli import output
from ovt.errors import OvtError

if TYPE_CHECKING:
    from ovt.host import Host

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only since click 8.2


class App:
    """The options that stand before the verb, and the host they lead to."""

    def __init__(self, data: str = "", run: str = "", quiet: bool = False, verbose: bool = False) -> None:
        self.data = data
        self.run = run
        self.quiet = quiet
        self.verbose = verbose
        self.subject = ""  # the one instance that the verb is about, for the words of an error
        self._host: Host | None = None

    @property
    def host(self) -> Host:
        """The host of this call."""
        if self._host is None:
            from ovt.cli.progress import reporter
            from ovt.host import Host

            self._host = Host(self.data, self.run, report=reporter(self.quiet))
        return self._host

    def note(self, line: str) -> None:
        """Say a step, with -v."""
        if self.verbose:
            output.note(line)

    def each(self, verb: str, references: Sequence[str], action: Callable[[str], Any]) -> int:
        """Do `action` to every instance; one failure does not keep the others back. The worst exit status.

        What the action returns is printed, an instance by the name it was called with.
        """
        worst = 0
        for reference in references:
            try:
                answer = action(reference)
                if answer is not None and not self.quiet:
                    output.result(answer if isinstance(answer, str) else reference)
            except OvtError as error:
                output.error(f"cannot {verb} {reference}: {error}", error.hint)
                worst = max(worst, error.exit_status)
        return worst


pass_app = click.make_pass_decorator(App)


class InstanceName(ParamType):
    """A name, an id or a unique beginning of one; completes to those the verb is allowed for."""

    name = "instance"

    def __init__(self, verb: str) -> None:
        self.verb = verb

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from ovt.host import Host
        from ovt.model import TRANSITIONS

        root = ctx.find_root().params
        verb = "delete --force" if self.verb == "delete" and ctx.params.get("force") else self.verb
        allowed = TRANSITIONS[verb][0]
        taken = ctx.params.get(param.name or "") or ()
        host = Host(root.get("data_root") or "", root.get("run_root") or "")
        return [
            CompletionItem(instance.name, help=f"{status.value} {instance.spec.image}")
            for instance, status in host.list()
            if status in allowed and instance.name.startswith(incomplete) and instance.name not in taken
        ]


class CopyPath(InstanceName):
    """INSTANCE:PATH or a path of the host."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        instances = super().shell_complete(ctx, param, incomplete)
        return [CompletionItem(f"{item.value}:", help=item.help) for item in instances] + [
            CompletionItem(incomplete, type="file")
        ]


class ImageName(ParamType):
    """busybox, or the path of a directory or an archive."""

    name = "image"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        named = [CompletionItem("busybox")] if "busybox".startswith(incomplete) else []
        return [*named, CompletionItem(incomplete, type="file")]


def instance_argument(verb: str, many: bool = True, required: bool = True) -> Callable[[Any], Any]:
    """The INSTANCE… argument of a verb, as the parameter `instances`, or INSTANCE as `instance`."""
    kind = InstanceName(verb)
    if many:
        words = "INSTANCE..." if required else "[INSTANCE]..."
        return click.argument("instances", metavar=words, nargs=-1, required=required, type=kind)
    return click.argument("instance", metavar="INSTANCE", type=kind)


class Parsed(ParamType):
    """An option's value that one of the functions in values.py reads."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self.parse(value) if isinstance(value, str) else value
