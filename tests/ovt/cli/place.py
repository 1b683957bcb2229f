"""`ovt` as it is installed, on directories of a test's own; what it must not leave there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ovt import Host
from ovt.engine.container import facts, usage

ROOT = Path(__file__).resolve().parents[3]
OVT = ROOT / ".venv/bin/ovt"


class Place:
    """Directories of the test's own, and `ovt` on them."""

    def __init__(self, base: Path) -> None:
        self.data, self.run = base / "data", base / "run"
        self.words = [str(OVT), "--data-root", str(self.data), "--run-root", str(self.run)]

    def __call__(self, *words: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "stdin": subprocess.DEVNULL, "text": True, "timeout": 60, **options}
        if "input" in options:
            del options["stdin"]
        done = subprocess.run([*self.words, *words], **options)  # type: ignore[call-overload]
        if check:
            assert done.returncode == 0, f"{words} → {done.returncode}\n{done.stdout}{done.stderr}"
        return done  # type: ignore[no-any-return]

    def out(self, *words: str, **options: object) -> str:
        return self(*words, **options).stdout.strip()

    def home(self, name: str) -> Path:
        return Path(self.out("inspect", "--format", "{{.directory}}", name))

    def wait_for(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.02)

    def status(self, name: str) -> str:
        return self.out("inspect", "--format", "{{.status}}", name)

    def nothing_left(self) -> None:
        """No instance, run-time state, cgroup or mount; the leak guard of every root test looks for the rest."""
        host = Host(str(self.data), str(self.run))
        assert host.list() == []
        self.wait_for(lambda: os.listdir(self.data / "instances") == [])
        assert os.listdir(self.data / "names") == []
        assert host.leftovers() == []
        assert set(os.listdir(self.run / "containers")) <= {".seccomp"}
        parent = facts.find_cgroups(str(self.run)).parent
        assert list(usage.cgroup_directories(parent)) == []
        assert [root for root in usage._hierarchies() if os.path.exists(root + parent)] == []
