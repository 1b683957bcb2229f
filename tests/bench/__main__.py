"""python -m tests.bench [-n ROUNDS] [CASE ...]: print the table; needs root, and a quiet machine to mean anything."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from ovt.errors import OvtError
from tests.bench import library, machines, people, stage, vm
from tests.bench.measure import Failed

CASES = {
    "run": machines.run,
    "life": machines.life,
    "exec": machines.execute,
    "library": library.batches,
    "ps": people.ps,
    "memory": people.memory,
    "vm": vm.everything,
    **{f"vm-{name}": case for name, case in vm.CASES.items()},
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=40, help="measured rounds per case (default 40)")
    parser.add_argument("case", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; default all")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("tests.bench: the runtimes are compared as root\n  try: sudo .venv/bin/python -m tests.bench")
    stage.prepare()
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} processors, kernel {os.uname().release}, {', '.join(stage.runtimes())}")
    failed = 0
    for name in arguments.case or [name for name in CASES if not name.startswith("vm-")]:  # those are parts of vm
        with tempfile.TemporaryDirectory(prefix="ovt-bench-") as place:
            try:
                print("\n" + CASES[name](arguments.rounds, Path(place)), flush=True)
            except (Failed, OvtError, OSError) as error:
                print(f"\n{name}: not measured: {error}", flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
