"""What happens when a guest has ended: its end is written down, it is removed or started again, as its owner asked.

The supervisor runs `python -m ovt.exits DATA RUN ID` in its own place when the guest has ended, so that nothing has to
stay in memory while it runs. Whoever waits for the guest meanwhile (`stop`, a foreground `run`) does the first half,
`settle`, by itself and at once; the instance's lock decides who was first.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from ovt.errors import NotFound, OvtError, StateError
from ovt.kernel import procfs
from ovt.model import LIVE, Instance, Kind, Status, retry_delay

if TYPE_CHECKING:
    from ovt.engine.supervised import ExitRecord
    from ovt.host import Host

UNKNOWN_EXIT = 255  # the supervisor was killed before the guest ended
_HEALTHY = 10.0  # seconds a run must last for the restart delay to begin at its shortest again


def command(data: str, run: str, id: str) -> list[str]:
    """The argv that the supervisor executes at the guest's end."""
    return [os.path.abspath(sys.executable), "-P", "-S", "-m", "ovt.exits", data, run, id]  # -P: never from the cwd


def env() -> dict[str, str]:
    """The environment of that command: this very ovt, and what a normal user's directories are found by."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME"} or key.startswith("XDG_")}
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **kept, "PYTHONPATH": package}


def wait_for_record(home: str, timeout: float) -> ExitRecord | None:
    """Wait for the end of the guest in `home` at most `timeout` seconds; None when it goes on, or was never there, or
    its supervisor is gone and nobody will know its exit status. The guest's end is waited for in that case as well."""
    from ovt.engine import supervised

    deadline = time.monotonic() + timeout
    try:
        return supervised.wait(home, timeout)
    except (TimeoutError, NotFound):
        return None
    except StateError:
        # nobody tells its end, and what it does until then (a shutdown, the last writes to a disk) takes its time
        guest = supervised.info(home)
        while procfs.alive(guest.child_pid, guest.child_start_time) and time.monotonic() < deadline:
            time.sleep(supervised.POLL)
        return None


def settle(host: Host, id: str, restart: bool = False) -> Instance | None:
    """Write down the end of guest `id` if it has ended and nobody did, and remove it if it was run with --rm.

    The record after its end; None when it lives, or someone else was first. With `restart`, a guest that is to be
    started again is left RESTARTING in the name of this process, which then has to do so.
    """
    from ovt.engine import supervised

    try:
        with host.store.locked(id) as instance:
            if instance.status not in LIVE or host.store.observe(instance) in LIVE:
                return None
            home = host.store.home(id)
            policy = instance.spec.restart.policy != "no" and not instance.stop_wanted
            if policy and not restart and supervised.alive(home):
                return None  # the exit command is on its way and decides on the next start
            record = supervised.exit_record(home)
            engine = host.engine(instance.kind)
            code = engine.exit_code(instance, home, record.code) if record else UNKNOWN_EXIT
            starved = engine.cleanup(instance, home)
            ended = instance._replace(status=Status.STOPPED, pid=0, start_time=0, restart_at=0.0)
            instance = host.store.save(ended._replace(exit_code=code, finished=time.time(), oom_killed=starved))
            host.journal.write("exit", id, instance.name, exit_code=code, **({"oom_killed": True} if starved else {}))
            if instance.kind is Kind.VM and os.path.isdir(f"{home}/saved"):
                # `save` was killed when only this was left to do: the guest is on the disk
                return host.store.save(instance._replace(status=Status.SAVED))
            if instance.spec.auto_remove:
                host._remove(instance)
            elif restart and not instance.stop_wanted:
                healthy = instance.finished - instance.started >= _HEALTHY
                return _restart_later(host, instance, 0 if healthy else instance.restarts)
            return instance
    except NotFound:
        return None  # deleted meanwhile


def _restart_later(host: Host, instance: Instance, restarts: int) -> Instance:
    if not instance.spec.restart.wants(instance.exit_code, restarts):
        return instance
    own = os.getpid()
    return host.store.save(
        instance._replace(
            status=Status.RESTARTING,
            pid=own,
            start_time=procfs.start_time(own) or 0,
            restarts=restarts,
            restart_at=time.time() + retry_delay(restarts),
        )
    )


def start_again(host: Host, waiting: Instance) -> None:
    """Start `waiting`, if it is RESTARTING, when its time has come; again while that fails and its policy says so."""
    pending = waiting
    while pending.status is Status.RESTARTING:
        time.sleep(max(0.0, pending.restart_at - time.time()))
        try:
            with host.store.locked(pending.id) as instance:
                if instance.status is not Status.RESTARTING or instance.pid != os.getpid():
                    return  # stopped, started or deleted by hand meanwhile
                restarts = instance.restarts + 1
                try:
                    host._go(host._make(instance, restarts))
                    return
                except OvtError:  # written down as the instance's error
                    failed = host.store.load(instance.id)._replace(exit_code=UNKNOWN_EXIT, restarts=restarts)
                    pending = _restart_later(host, failed, restarts)
        except NotFound:
            return


def main(arguments: list[str]) -> None:
    """The exit command: `DATA RUN ID`."""
    from ovt.host import Host

    data, run, id = arguments
    host = Host(data, run)
    ended = settle(host, id, restart=True)
    if ended is not None:
        start_again(host, ended)


if __name__ == "__main__":
    main(sys.argv[1:])
