"""completion: the script that makes a shell complete commands, options and the names of instances.

The script asks `ovt` itself at each Tab; names are offered only where their state allows the verb.
"""

from __future__ import annotations

import click

from ovt.cli import output

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> int:
    """Print the completion script for SHELL.

    \b
    bash:  ovt completion bash > /etc/bash_completion.d/ovt
    zsh:   ovt completion zsh > "${fpath[1]}/_ovt"
    fish:  ovt completion fish > ~/.config/fish/completions/ovt.fish
    """
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    from ovt.cli import cli

    # their templates alone: BashComplete.source() would first run a bash to ask for its version
    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    complete = kind(cli, {}, "ovt", "_OVT_COMPLETE")
    output.result(kind.source_template % complete.source_vars())
    return 0
