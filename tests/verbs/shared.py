"""`ovt` for instances of one kind: the same words make a container or a virtual machine."""

from __future__ import annotations

import os
from pathlib import Path

from tests.ovt.cli.place import Place

LOOP = 'trap "echo bye; exit 7" TERM; echo started; while :; do sleep 0.05; done'
DEAF = "trap '' TERM; echo started; while :; do sleep 0.1; done"


class Verbs(Place):
    """`ovt` on directories of the test's own. With `shared`, a data root, its templates and images are used."""

    def __init__(self, base: Path, kind: str, shared: Path | None = None) -> None:
        super().__init__(base)
        self.kind = kind
        self.vm = kind == "vm"
        self.flags = ("--vm",) if self.vm else ()
        for directory in ("instances", "names"):
            (self.data / directory).mkdir(parents=True)
        (self.run / "containers").mkdir(parents=True)
        if shared:
            for directory in ("templates", "images"):
                (self.data / directory).symlink_to(shared / directory)

    def start(self, script: str = LOOP, *options: str, name: str = "web") -> None:
        """Run a shell script in the background; it is at work when it has said `started`."""
        self("run", *self.flags, "-d", "--name", name, *options, "busybox", "sh", "-c", script)
        self.wait_for(lambda: "started" in self.out("logs", name))

    def delete_all(self) -> None:
        if ids := self.out("ps", "-aq").split():
            self("delete", "-f", *ids)
        self.nothing_left()
        assert not [name for name in os.listdir(self.data) if name.startswith(".")]
