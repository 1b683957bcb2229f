"""What a program feels that imports ovt: containers from one warm process, against starting crun for each."""

import os
import time
from pathlib import Path

from ovt.engine.container.runtime import Runtime
from tests.bench import stage
from tests.bench.machines import fresh
from tests.bench.measure import Failed, Sample, command, interleaved, table, total

BATCH = 10


def batches(rounds: int, place: Path) -> str:
    """`rounds` batches of ten containers each way; per container: state written, cgroup made, waited for, deleted."""
    bundle = stage.make_bundle(place / "library", "/bin/true")
    engine = Runtime(root=str(place / "library-root"))
    null = os.open(os.devnull, os.O_RDWR)

    def ours() -> Sample:
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        for _ in range(BATCH):
            id = fresh()
            state = engine.create(id, str(bundle), stdio=(null, null, null))
            engine.start(id)
            _, status = os.waitpid(state.pid, 0)
            if os.waitstatus_to_exitcode(status):
                raise Failed(f"the container ended with {os.waitstatus_to_exitcode(status)}")
            engine.delete(id)
        return Sample((time.perf_counter() - began) * 1000, (sum(os.times()[:4]) - cpu) * 1000)

    def crun() -> Sample:
        return total(command(crun_path, "--root", place / "crun", "run", "-b", bundle, fresh()) for _ in range(BATCH))

    crun_path = stage.runtimes()["crun"]
    try:
        samples = interleaved({"ovt library": ours, "crun run": crun}, rounds)
    finally:
        os.close(null)
    return table(f"per container, batches of {BATCH}", samples, "ovt library", {"crun run": 0.4}, scale=BATCH)
