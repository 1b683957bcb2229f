"""Handles on containers that really run, for the behaviour tests of the runtime."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import leaks
from tests.conftest import Oci

WAITING = ("sleep", "1000")
Edit = Callable[[dict[str, Any]], object]


class Container:
    """A container that was created; deleted by force when the test is over."""

    def __init__(self, oci: Oci, container_id: str, bundle: Path, out: Path) -> None:
        self.oci = oci
        self.id = container_id
        self.bundle = bundle
        self.rootfs = bundle / "rootfs"
        self.out = out

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.oci("state", self.id, check=True).stdout)
        return state

    @property
    def pid(self) -> int:
        pid: int = self.state()["pid"]
        return pid

    @property
    def status(self) -> str:
        status: str = self.state()["status"]
        return status

    def start(self) -> "Container":
        self.oci("start", self.id, check=True)
        return self

    def exec(self, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
        return self.oci("exec", self.id, *arguments, **options)

    def ask(self, *arguments: str) -> str:
        """What a command prints in it; the exit status must be 0."""
        return self.exec(*arguments, check=True).stdout.strip()

    def output(self) -> str:
        return self.out.read_text()

    def stop(self) -> None:
        """Kill it and wait for its end, which the zombies of its other processes, orphans of ours, would hold up."""
        self.oci("kill", self.id, "KILL", check=True)

        def ended() -> bool:
            leaks.reap()
            return self.status == "stopped"

        wait_for(ended)

    def cgroup(self, controller: str) -> Path:
        """Its directory in a v1 hierarchy, or in the unified one."""
        unified = Path("/sys/fs/cgroup")
        for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                return Path(f"/sys/fs/cgroup/{names.removeprefix('name=')}{path}")
            if not names:
                unified = Path(f"/sys/fs/cgroup{path}")
        return unified

    def limit(self, controller: str, v1: str, v2: str) -> str:
        """The value of the file `v1` of a controller, or of `v2` where the hierarchy is unified."""
        directory = self.cgroup(controller)
        return (directory / (v1 if (directory / v1).exists() else v2)).read_text().strip()


Create = Callable[..., Container]
Run = Callable[..., str]


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line with which the runtime refused, without its name."""
    assert done.returncode != 0, done.stdout
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ovt-runtime: "), done.stderr
    assert "internal error" not in lines[0] and "Traceback" not in lines[0]
    return lines[0].removeprefix("ovt-runtime: ")


def namespaces(config: dict[str, Any], **changes: str | None) -> None:
    """Change linux.namespaces: `pid="/proc/…"` joins, `user=""` makes, `network=None` leaves it out."""
    entries = config["linux"]["namespaces"]
    for kind, path in changes.items():
        entries[:] = [entry for entry in entries if entry["type"] != kind]
        if path is not None:
            entries.append({"type": kind, **({"path": path} if path else {})})


def with_mounts(*mounts: dict[str, Any]) -> Edit:
    """An edit that appends mounts."""
    return lambda config: config["mounts"].extend(mounts)


def bind(source: Path | str, destination: str, *options: str, **more: Any) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": destination, "options": ["bind", *options], **more}


def namespace_of(pid: int | str, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")
