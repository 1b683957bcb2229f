"""What people feel: `ovt ps` over a thousand instances, and the memory held beside a detached container."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from ovt.kernel import procfs
from ovt.model import Instance, Kind, Spec, Status
from ovt.store import Store
from tests import leaks
from tests.bench import stage
from tests.bench.machines import fresh
from tests.bench.measure import ENVIRONMENT, Failed, command, median

OVT = stage.ROOT / ".venv/bin/ovt"
INSTANCES, GOAL = 1000, 150


def roots(place: Path, name: str) -> list[str]:
    return ["--data-root", f"{place}/{name}", "--run-root", f"{place}/{name}-run"]


def ps(rounds: int, place: Path) -> str:
    """Every second of the thousand has a living process, so the listing must look each of them up."""
    store = Store(f"{place}/thousand")
    me, since = os.getpid(), procfs.start_time(os.getpid())
    for number in range(INSTANCES):
        spec = Spec(image="busybox", command=("sleep", "100"), env=("A=1", "B=2"))
        instance = Instance(f"{number:012x}", f"bench{number}", Kind.CONTAINER, time.time(), spec)
        store.add(instance)
        if number % 2:
            with store.locked(instance.id) as fresh_record:
                store.save(fresh_record._replace(status=Status.RUNNING, pid=me, start_time=since, started=time.time()))
    output = place / "ps.out"
    words = [OVT, *roots(place, "thousand"), "ps", "--all"]
    times = [command(*words, output=str(output)).wall for _ in range(rounds + 1)][1:]
    listed = sum(f"bench{number}" in output.read_text() for number in (0, 1, INSTANCES - 1))
    if listed != 3 or len(output.read_text().splitlines()) < INSTANCES:
        raise Failed(f"ovt ps did not list the instances: {output.read_text()[:500]}")
    verdict = "met" if median(times) <= GOAL else "MISSED"
    return (
        f"ovt ps --all over {INSTANCES} instances  (n={rounds}, ms)\n"
        f"  median {median(times):.0f}, min {min(times):.0f}, goal ≤ {GOAL}: {verdict}"
    )


def pss(pid: int) -> int:
    """Proportional set size in KiB: private pages, and a fair share of those that others use too."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise Failed(f"no Pss of process {pid}")


def named(name: str) -> list[int]:
    """Our descendants that were started as `name`."""
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in leaks.descendants()}
    return [pid for pid, argv in words.items() if Path(os.fsdecode(argv[0])).name == name]


def conmon_memory(count: int, place: Path) -> float:
    """KiB per container that podman would keep: conmon, called as podman calls it."""
    runc, conmon = shutil.which("runc"), shutil.which("conmon")
    if not runc or not conmon:
        raise Failed("conmon and runc are needed: scripts/setup --test")
    bundle = stage.make_bundle(place / "conmon", "/bin/sleep", "10000")
    root = place / "conmon-runc"
    ids = [fresh() for _ in range(count)]
    for id in ids:
        state = place / id
        state.mkdir()
        flags = ["--api-version", "1", "-c", id, "-n", id, "-u", id, "-r", runc, "-b", str(bundle), "--full-attach"]
        files = ["-p", f"{state}/pid", "-l", f"k8s-file:{state}/log", "--exit-dir", str(state), "--conmon-pidfile"]
        more = [f"{state}/conmon.pid", "--persist-dir", str(state)]
        more += ["--runtime-arg", "--root", "--runtime-arg", str(root)]
        subprocess.run([conmon, *flags, *files, *more], check=True, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
        for _ in range(200):
            if (state / "pid").exists():
                break
            time.sleep(0.02)
        command(runc, "--root", root, "start", id)
    time.sleep(0.5)
    sizes = [pss(pid) for pid in named("conmon")]
    for id in ids:
        command(runc, "--root", root, "delete", "--force", id)
    if len(sizes) != count:
        raise Failed(f"{len(sizes)} conmon processes for {count} containers")
    return median(sizes)


def ovt_memory(count: int, place: Path) -> float:
    where = roots(place, "detached")
    names = [f"bench-{number}" for number in range(count)]
    for name in names:
        command(OVT, *where, "run", "--detach", "--name", name, "busybox", "sleep", "10000")
    time.sleep(0.5)
    sizes = [pss(pid) for pid in named("ovt-supervisor")]
    for name in names:
        command(OVT, *where, "delete", "--force", name)
    if len(sizes) != count:
        raise Failed(f"{len(sizes)} supervisors for {count} containers")
    return median(sizes)


def memory(rounds: int, place: Path) -> str:
    count = min(max(rounds // 5, 2), 8)
    ours, theirs = ovt_memory(count, place), conmon_memory(count, place)
    stage.reap()
    return (
        f"memory beside a detached container  (median PSS of {count}, KiB)\n"
        f"  {'ovt-supervisor':24}{ours:9.0f}\n  {'conmon':24}{theirs:9.0f}   "
        f"ovt-supervisor = {ours / theirs:.2f} × conmon, goal < 1: {'met' if ours < theirs else 'MISSED'}"
    )
