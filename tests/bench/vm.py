"""Virtual machines: forks against boots, what a start costs beside plain QEMU, migration, memory beside a machine.

The guests are of the built-in image. Goals are printed with what was measured, and nothing is asserted by a clock.
"""

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ovt.engine.vm.agent import port_open
from ovt.engine.vm.features import choose_accel
from ovt.host import Host
from ovt.image import BUSYBOX
from ovt.machines import migrate, power, templates, transport
from ovt.model import Disk, Instance, Kind, Limits, Machine, Spec
from tests.bench import people, stage
from tests.bench.measure import Failed, Sample, interleaved, median
from tests.bench.vm_raw import Raw, copy_home, move

MOST = 20  # rounds; a boot of an emulated guest takes seconds
FORK_GOAL, START_GOAL = 20, 80
MIB = 1 << 20
_WORD = b"!"  # the serial line brings one byte at a time, and the log has a record for each
_PATIENCE = 120.0


def at(values: list[float], percent: int) -> float:
    """The value that so many percent of the `values` do not exceed."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def line(name: str, values: list[float], note: str = "") -> str:
    return f"  {name:34}{at(values, 50):9.1f}{at(values, 95):9.1f}{min(values):9.1f}   {note}".rstrip()


def head(title: str, rounds: int) -> str:
    return f"{title}  (n={rounds}, ms, {accelerator()})\n  {'':34}{'p50':>9}{'p95':>9}{'min':>9}"


def accelerator() -> str:
    return choose_accel("")[0].upper()


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


@contextmanager
def machine(host: Host, spec: Spec) -> Iterator[Instance]:
    """A machine that is not started, removed at the end."""
    instance = host.create(spec, kind=Kind.VM)
    try:
        yield instance
    finally:
        host.delete(instance.id, force=True)


def host_in(place: Path, name: str) -> Host:
    return Host(f"{place}/{name}", f"{place}/{name}-run")


# forks and boots


class First:
    """Starts guests and times their first output: in all, and split at the guest's first instruction."""

    def __init__(self, host: Host, network: str) -> None:
        self.host = host
        self.spec = Spec(BUSYBOX, ("sh", "-c", f"echo {_WORD.decode()}; exec sleep 1000"), network=network)
        self.until_cont: list[float] = []
        self.after_cont: list[float] = []

    def __call__(self) -> Sample:
        began, clock = time.time(), time.perf_counter()
        with machine(self.host, self.spec) as instance:
            home = Path(self.host.store.home(instance.id))
            child = os.fork()  # the watcher, which does not take turns with the starting thread
            if not child:
                os._exit(watch(home / "log"))
            try:
                self.host.start(instance.id)
            finally:
                _, status = os.waitpid(child, 0)
            if status:
                raise Failed(f"no output of the guest in {_PATIENCE:g} seconds")
            ended = written_at(home / "log")
            taken = (ended - began) * 1000
            resumed = resumed_at(home / "qmp.log")
        self.until_cont.append((resumed - began) * 1000)
        self.after_cont.append((ended - resumed) * 1000)
        if taken > (time.perf_counter() - clock) * 1000 + 1000:
            raise Failed("the clock was set")
        return Sample(taken, 0.0)


class Continued(First):
    """The same of forks of a guest whose program runs already, and goes on with that."""

    def __init__(self, host: Host, network: str) -> None:
        super().__init__(host, network)
        loop = f"while :; do echo {_WORD.decode()}; usleep 20000; done"
        with machine(host, self.spec._replace(command=("sh", "-c", loop))) as source:
            host.start(source.id)
            if watch(Path(host.store.home(source.id)) / "log"):
                raise Failed("no output of the guest that is to be kept")
            self.template = templates.take(host, source.id, "running").name

    def __call__(self) -> Sample:
        began = time.time()
        instance = templates.fork(self.host, self.template)
        try:
            home = Path(self.host.store.home(instance.id))
            if watch(home / "log"):
                raise Failed(f"no output of the fork in {_PATIENCE:g} seconds")
            ended, resumed = written_at(home / "log"), resumed_at(home / "qmp.log")
        finally:
            self.host.delete(instance.id, force=True)
        self.until_cont.append((resumed - began) * 1000)
        self.after_cont.append((ended - resumed) * 1000)
        return Sample((ended - began) * 1000, 0.0)


def watch(log: Path) -> int:
    """Wait for the guest's word; 0 when it came."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if _WORD in log.read_bytes():
                return 0
        time.sleep(0.02)
    return 1


def written_at(log: Path) -> float:
    """When the supervisor got the word, by its own record."""
    for record in log.read_bytes().splitlines():
        if record.endswith(_WORD):
            return datetime.fromisoformat(record.split()[0].decode()).timestamp()
    raise Failed("the guest's output is not in the log")


def resumed_at(events: Path) -> float:
    for text in events.read_text().splitlines():
        event = json.loads(text)
        if event.get("event") == "RESUME":
            stamp = event["timestamp"]
            return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
    raise Failed("QEMU did not tell that the guest went on")


def fork(rounds: int, place: Path, network: str = "none") -> str:
    """`launch` to the guest's first output, with a template of the image and without."""
    rounds = min(rounds, MOST)
    with_template = host_in(place, "forks")
    made = templates.of_image(with_template, BUSYBOX)
    forks, boots = First(with_template, network), First(host_in(place, "boots"), network)
    continued = Continued(with_template, network)
    samples = interleaved({"fork": forks, "continued": continued, "boot": boots}, rounds)
    walls = {name: [sample.wall for sample in samples[name]] for name in samples}
    for name in (continued.template, made.name):
        templates.delete(with_template, name)
    lines = [head(f"first guest output, network {network}", rounds)]
    for name, title, first in (
        ("boot", "boot", boots),
        ("continued", "fork of a running program", continued),
        ("fork", "fork, and a program started in it", forks),
    ):
        lines.append(line(title, walls[name]))
        lines.append(line("  until its first instruction", first.until_cont[1:]))
        lines.append(line("  from there on", first.after_cont[1:]))
    for name, title in (("continued", "running program"), ("fork", "new program")):
        for percent in (50, 95):
            ratio = at(walls["boot"], percent) / at(walls[name], percent)
            goal = f"goal ≥ {FORK_GOAL}: {verdict(ratio >= FORK_GOAL)}"
            lines.append(f"  {title}, p{percent}: {ratio:.1f} times as fast, {goal}")
    return "\n".join(lines)


def fork_online(rounds: int, place: Path) -> str:
    return fork(rounds, place, "user")


# the start itself


def start(rounds: int, place: Path) -> str:
    """`start` of a machine with a disk and a card, up to the guest's first instruction, against plain QEMU."""
    rounds = min(rounds, MOST)
    host = host_in(place, "start")
    spec = Spec(BUSYBOX, ("sleep", "1000"), network="user", machine=Machine(disks=(Disk(size=64 * MIB),)))
    with machine(host, spec) as instance:
        home = host.store.home(instance.id)

        def stop() -> None:
            host.stop(instance.id, 0.0)
            host.settle(instance.id)

        def ours() -> Sample:
            began = time.perf_counter()
            host.start(instance.id)
            taken = (time.perf_counter() - began) * 1000
            stop()
            return Sample(taken, 0.0)

        def raw() -> Sample:
            began = time.perf_counter()
            with Raw(host.vms, instance, home) as qemu:
                qemu.go()
                return Sample((time.perf_counter() - began) * 1000, 0.0)

        host.start(instance.id)  # freezes the hardware
        stop()
        samples = interleaved({"host.start": ours, "QEMU and QMP": raw}, rounds)
    walls = {name: [sample.wall for sample in runs] for name, runs in samples.items()}
    more = median(walls["host.start"]) - median(walls["QEMU and QMP"])
    return "\n".join(
        [
            head("start of a machine", rounds),
            *(line(name, values) for name, values in walls.items()),
            f"  ovt adds {more:.1f} ms, goal ≤ {START_GOAL}: {verdict(more <= START_GOAL)}",
        ]
    )


# moving


@contextmanager
def receiver(host: Host, path: Path) -> Iterator[transport.Address]:
    words = [str(people.OVT), "--data-root", host.data, "--run-root", host.run_root, "receive"]
    listener = subprocess.Popen(
        [*words, "--listen", f"unix:{path}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(path.exists, "a listening socket")
        yield transport.parse(f"unix:{path}", transport.Tls())
    finally:
        listener.terminate()
        listener.wait()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{what} did not come in {_PATIENCE:g} seconds")
        time.sleep(0.01)


def moving(rounds: int, place: Path) -> str:
    """A booted idle guest goes to and fro between two data roots; and between plain QEMUs."""
    rounds = min(rounds, 5)
    hosts = host_in(place, "here"), host_in(place, "there")
    spec = Spec(
        BUSYBOX, ("sleep", "100000"), network="none", limits=Limits(memory=256 * MIB), machine=Machine(vsock=False)
    )
    outcomes: list[tuple[float, migrate.Outcome]] = []
    instance = hosts[0].launch(BUSYBOX, spec.command, name="bench", kind=Kind.VM, **moving_options(spec))
    try:
        power.wait_for(hosts[0], instance.id, "agent", _PATIENCE, lambda text: None)
        with receiver(hosts[0], place / "a.sock") as back, receiver(hosts[1], place / "b.sock") as forth:
            for number in range(rounds):
                began = time.perf_counter()
                done = migrate.migrate(hosts[number % 2], "bench", (forth, back)[number % 2])
                outcomes.append(((time.perf_counter() - began) * 1000, done))
    finally:
        for host in hosts:
            for id in host.store.ids():
                host.delete(id, force=True)
    plain = plain_moves(rounds, place, hosts[0], spec)
    return "\n".join(
        [
            head("migration of an idle guest of 256 MiB over a unix socket", rounds),
            line("ovt migrate, the whole command", [taken for taken, _ in outcomes]),
            line("  total, by QEMU", [float(done.total) for _, done in outcomes]),
            line("  downtime, by QEMU", [float(done.downtime) for _, done in outcomes]),
            line("  pause of the guest", [float(done.pause) for _, done in outcomes]),
            line("QMP, all its commands", [taken for taken, _, _ in plain]),
            line("  total, by QEMU", [total for _, total, _ in plain]),
            line("  downtime, by QEMU", [downtime for _, _, downtime in plain]),
        ]
    )


def moving_options(spec: Spec) -> dict[str, object]:
    return {"network": spec.network, "limits": spec.limits, "machine": spec.machine}


def plain_moves(rounds: int, place: Path, host: Host, spec: Spec) -> list[tuple[float, float, float]]:
    taken = []
    with machine(host, spec) as instance:
        own = host.store.home(instance.id)
        host.start(instance.id)  # freezes the hardware
        host.stop(instance.id, 0.0)
        host.settle(instance.id)
        homes = own, copy_home(own, place / "beside")
        source = Raw(host.vms, instance, homes[0])
        try:
            source.go()
            wait_for(lambda: bool(port_open(source.qmp)), "the guest's agent")
            for number in range(rounds):
                target = Raw(host.vms, instance, homes[(number + 1) % 2], incoming=True)
                try:
                    taken.append(move(source, target, place / "raw.sock"))
                except BaseException:
                    target.end()
                    raise
                source.end()
                source = target
        finally:
            source.end()
    return taken


# memory


def memory(rounds: int, place: Path) -> str:
    """What ovt keeps in memory beside a machine that nobody is attached to."""
    count = min(max(rounds // 10, 1), 4)
    host = host_in(place, "memory")
    spec = Spec(BUSYBOX, ("sleep", "1000"), network="none", limits=Limits(memory=64 * MIB))
    instances = [host.create(spec, kind=Kind.VM) for _ in range(count)]
    try:
        for instance in instances:
            host.start(instance.id)
        time.sleep(0.5)
        sizes = [people.pss(pid) for pid in people.named("ovt-supervisor")]
    finally:
        for instance in instances:
            host.delete(instance.id, force=True)
    if len(sizes) != count:
        raise Failed(f"{len(sizes)} supervisors for {count} machines")
    title = f"memory beside a machine  (median PSS of {count}, KiB)"
    return f"{title}\n  {'ovt-supervisor':34}{median(map(float, sizes)):9.0f}"


CASES = {"fork": fork, "fork-online": fork_online, "start": start, "migrate": moving, "memory": memory}


def everything(rounds: int, place: Path) -> str:
    """All of the above, one after another; the hosts of each are below a directory of its own."""
    parts = []
    for name, case in CASES.items():
        (place / name).mkdir()
        parts.append(case(rounds, place / name))
        stage.reap()
    return "\n\n".join(parts)
