"""Timing of commands beside one another: a round runs every contender once, so the noise hits all alike."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


class Sample(NamedTuple):
    """One run: wall clock and processor time, both in milliseconds."""

    wall: float
    cpu: float


class Failed(Exception):
    """A command did not do what it was measured for, so its time means nothing."""


def command(*words: object, output: str = os.devnull) -> Sample:
    """Run a command to its end and time it; processor time counts it and the children that it waited for."""
    argv = [str(w) for w in words]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
    ]
    began = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, ENVIRONMENT, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    wall = (time.perf_counter() - began) * 1000
    if os.waitstatus_to_exitcode(status):
        raise Failed(f"exit status {os.waitstatus_to_exitcode(status)}: {' '.join(argv)}")
    return Sample(wall, (usage.ru_utime + usage.ru_stime) * 1000)


def total(samples: Iterable[Sample]) -> Sample:
    walls, cpus = zip(*samples, strict=True)
    return Sample(sum(walls), sum(cpus))


def interleaved(contenders: dict[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Run every contender once per round, in an order that turns, after one round that does not count."""
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sample = contenders[name]()
            if number >= 0:
                samples[name].append(sample)
    return samples


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def table(title: str, samples: dict[str, list[Sample]], ours: str, goals: dict[str, float], scale: float = 1.0) -> str:
    """Medians, minima and our ratio to each of the others; `goals` are the ratios that we aim to stay below.

    `scale` divides every time: the number of containers in one sample.
    """
    lines = [f"{title}  (n={len(samples[ours])}, ms)", f"  {'':24}{'median':>9}{'min':>9}{'cpu':>9}   ratio of medians"]
    mine = median(s.wall for s in samples[ours])
    for name, runs in samples.items():
        wall = median(s.wall for s in runs)
        note = ""
        if name != ours:
            ratio = mine / wall
            note = f"{ours} = {ratio:.2f} × {name}"
            if name in goals:
                note += f", goal ≤ {goals[name]:.2f}: {'met' if ratio <= goals[name] else 'MISSED'}"
        best, cpu = min(s.wall for s in runs), median(s.cpu for s in runs)
        lines.append(f"  {name:24}{wall / scale:9.2f}{best / scale:9.2f}{cpu / scale:9.2f}   {note}".rstrip())
    return "\n".join(lines)
