"""A QEMU without a guest's disk or kernel, for tests of what is said to QEMU: its firmware runs, and that is enough.

Memory from 16 MiB on holds what a test wants there, and can be read again.
"""

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ovt.engine.vm.arguments import SANDBOX
from ovt.engine.vm.features import find_program
from ovt.engine.vm.qmp import Qmp

MIB = 1 << 20
MEMORY = 64 * MIB
CONTENT = 16 * MIB  # address
GENERATION = "11111111-2222-3333-4444-555555555555"


class Bare(Qmp):
    """The connection to one, and its process."""

    pid = 0


@contextmanager
def qemu(
    *,
    memory: int = MEMORY,
    content: bytes = b"",
    incoming: bool = False,
    file: int = -1,
    shared: bool = False,
    generation: str = GENERATION,
    machine: str = "q35",
    more: Sequence[str] = (),
    uid: int = -1,
    inherit: Sequence[int] = (),
) -> Iterator[Bare]:
    """One that waits at its first instruction; with `file` that is its memory, as for a template or a fork."""
    backend: dict[str, object] = {"qom-type": "memory-backend-ram", "id": "m0", "size": memory}
    if file >= 0:
        backend |= {"qom-type": "memory-backend-file", "mem-path": f"/proc/self/fd/{file}", "share": shared}
        if not shared:
            backend |= {"readonly": True, "rom": "off"}
    ours, theirs = socket.socketpair()
    with tempfile.NamedTemporaryFile() as filling, ours:
        filling.write(content)
        filling.flush()
        os.chmod(filling.name, 0o444)
        command = [
            *[find_program(), "-S", "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX],
            *["-machine", f"{machine},memory-backend=m0", "-accel", "tcg", "-m", f"{memory >> 20}M"],
            *["-object", json.dumps(backend), "-device", f"vmgenid,guid={generation}", *more],
            *["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"],
            *(["-device", f"loader,file={filling.name},addr={CONTENT},force-raw=on"] if content else []),
            *(["-incoming", "defer"] if incoming else []),
        ]
        fds = [theirs.fileno(), *inherit, *([file] if file >= 0 else [])]
        user = {} if uid < 0 else {"user": uid, "group": uid, "extra_groups": []}
        with subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, **user
        ) as process:
            theirs.close()
            try:
                qmp = Bare(ours)
                qmp.pid = process.pid
                qmp.negotiate(30.0)
                yield qmp
            except Exception as error:
                process.kill()
                said = process.stderr.read().decode(errors="replace") if process.stderr else ""
                error.add_note(f"QEMU said: {said}")
                raise
            finally:
                process.kill()


def read(qmp: Qmp, address: int, size: int) -> bytes:
    """The guest's memory, by way of a file that a QEMU of any user can write to."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "memory"
        path.touch()
        os.chmod(directory, 0o755)
        os.chmod(path, 0o666)
        qmp.command("pmemsave", {"val": address, "size": size, "filename": str(path)})
        return path.read_bytes()
