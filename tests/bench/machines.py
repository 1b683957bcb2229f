"""What podman and containerd feel: `run`, create + start + delete, and `exec`, of ovt-runtime, crun and runc."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from tests.bench import stage
from tests.bench.measure import Sample, command, interleaved, table, total

serial = itertools.count(1)


def fresh() -> str:
    return f"ovt-bench-{next(serial)}"


def run(rounds: int, place: Path) -> str:
    bundle = stage.make_bundle(place / "run", "/bin/true")

    def contender(name: str, path: str) -> Callable[[], Sample]:
        return lambda: command(path, "--root", place / name, "run", "--bundle", bundle, fresh())

    samples = interleaved({n: contender(n, p) for n, p in stage.runtimes().items()}, rounds)
    return table("run /bin/true", samples, stage.OURS, {"runc": 0.85})


def life(rounds: int, place: Path) -> str:
    """The container ends by itself between start and delete, and is buried before the clock goes on."""
    bundle = stage.make_bundle(place / "life", "/bin/true")
    pid_file = place / "life.pid"

    def contender(name: str, path: str) -> Callable[[], Sample]:
        def once() -> Sample:
            id, root = fresh(), place / name
            made = command(path, "--root", root, "create", "--bundle", bundle, "--pid-file", pid_file, id)
            started = command(path, "--root", root, "start", id)
            os.waitpid(int(pid_file.read_text()), 0)
            return total([made, started, command(path, "--root", root, "delete", id)])

        return once

    samples = interleaved({n: contender(n, p) for n, p in stage.runtimes().items()}, rounds)
    return table("create + start + delete", samples, stage.OURS, {"runc": 0.95})


def execute(rounds: int, place: Path) -> str:
    bundle = stage.make_bundle(place / "exec", "/bin/sleep", "10000")
    ids = {name: fresh() for name in stage.runtimes()}
    try:
        for name, path in stage.runtimes().items():
            command(path, "--root", place / name, "run", "--detach", "--bundle", bundle, ids[name])

        def contender(name: str, path: str) -> Callable[[], Sample]:
            return lambda: command(path, "--root", place / name, "exec", ids[name], "/bin/true")

        samples = interleaved({n: contender(n, p) for n, p in stage.runtimes().items()}, rounds)
    finally:
        for name, path in stage.runtimes().items():
            command(path, "--root", place / name, "delete", "--force", ids[name])
        stage.reap()
    return table("exec /bin/true", samples, stage.OURS, {})
