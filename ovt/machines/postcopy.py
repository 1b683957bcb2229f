"""The end of post-copy on the sending host: the guest runs there already and still needs memory that only is here.

There is no way back from it, so there is no giving up either: a lost connection is made again for as long as it
takes, also by `ovt migrate --resolve` after this ovt was killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ovt.engine.vm import migration
from ovt.engine.vm.migration import Progress, Result
from ovt.engine.vm.qmp import Qmp
from ovt.errors import OvtError
from ovt.machines import wire
from ovt.machines.relay import Relay

_TICK = 0.2
_AGAIN = 1.0  # seconds between two tries to reach the other host

Connect = Callable[[ExitStack], wire.Control]


def send_rest(
    qmp: Qmp,
    lent: str,
    relay: Relay,
    record: dict[str, Any],
    control: wire.Control | None,
    connect: Connect,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Return when the last page has gone. `control` is the session that there is, `connect` makes another one."""
    pinged = time.monotonic()
    with ExitStack() as stack:
        while True:
            state, progress, result = migration.status(qmp)
            if state == "completed":
                return result
            tell(progress)
            if state == "postcopy-paused":
                try:
                    if control is None:
                        control = connect(stack)
                    answer = control.call("recover", "recovering", id=record["id"], token=record["token"])
                    relay.token = str(answer["token"])
                    migration.send_again(qmp, lent)
                except wire.PeerRefused:
                    time.sleep(_AGAIN)  # the session that was cut off has not ended yet
                except OvtError:
                    control = None
                    time.sleep(_AGAIN)  # it is away; the guest waits for its memory, and there is nothing else to do
            elif control is not None and time.monotonic() - pinged > wire.PING:
                pinged = time.monotonic()
                with contextlib.suppress(OvtError):  # the session's end is no matter as long as memory is sent
                    control.call("ping", "pong", timeout=wire.PING)
            migration.wait_change(qmp, _TICK)
