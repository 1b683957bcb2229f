"""AppArmor and SELinux labels on the tape of a container process: `ovt.kernel.lsm` says what, here is when and how.

The process itself opens the attribute files, because the kernel lets only the opener write, and does so while it is
still root, below a descriptor of the host's /proc: the container's own may be masked, missing or something else.
"""

from __future__ import annotations

import posix

from ovt.kernel import lsm
from ovt.kernel import syscalls as sc

from .init import above
from .tape import Result, Tape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Labels:
    """What one process is to be labelled with; `proc` is a descriptor that the caller hands to the init and closes."""

    __slots__ = ("_exec", "_keys", "proc")

    def __init__(self, process: dict[str, Any], lowest: int) -> None:
        """HostError when a label is asked for that the host cannot apply."""
        self._exec = lsm.exec_attributes(process)
        self._keys = lsm.key_attributes(process)
        self.proc = above(posix.open("/proc", sc.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC), lowest)

    def for_keys(self, tape: Tape) -> None:
        """Label the keyring that is made next; exec(2) takes the setting back."""
        for path, text in self._keys:
            write(tape, self._open(tape, path), text)

    def open(self, tape: Tape) -> list[tuple[Result, str]]:
        """Open the attributes of the next exec, while the rights are there; `write` them last."""
        return [(self._open(tape, path), text) for path, text in self._exec]

    def _open(self, tape: Tape, path: str) -> Result:
        flags = posix.O_WRONLY | posix.O_CLOEXEC
        return tape.call(f"open /proc/{path}", "openat", self.proc, tape.text(path), flags)


def write(tape: Tape, fd: Result, text: str) -> None:
    """Append the one write(2) that an attribute takes."""
    raw = text.encode("utf-8", "surrogateescape")
    tape.call(f"apply security label {text!r}", "write", fd, tape.data(raw), len(raw))
