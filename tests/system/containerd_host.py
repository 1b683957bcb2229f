"""A private containerd: own daemon with own root, state directory and socket, below one temporary directory.

Only the shims' sockets (/run/containerd/s) are where containerd hard-codes them; the shims remove them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.system import busybox_image, leaks

IMAGE = "docker.io/library/busybox:test"
NAMESPACE = "ovt-test"

CONFIGURATION = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{directory}/containerd.sock"
[debug]
  level = "debug"
"""


class ContainerdHost:
    """One running containerd. `close` stops it and removes everything it had."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.directory = Path(tempfile.mkdtemp(prefix="ovt-containerd-"))
        self.directory.chmod(0o711)  # the root of a user namespace has to reach its bundle
        self.calls: list[str] = []
        self.ids: list[str] = []
        self._numbers = itertools.count(1)
        configuration = self.directory / "config.toml"
        configuration.write_text(CONFIGURATION.format(directory=self.directory))
        with (self.directory / "containerd.log").open("w") as log:
            self._daemon = subprocess.Popen(
                ["containerd", "--config", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        while self("version").returncode != 0:
            assert self._daemon.poll() is None and time.monotonic() < deadline, self.runtime_log()
            time.sleep(0.1)
        archive = self.directory / "busybox.tar"
        archive.write_bytes(busybox_image.docker_archive(IMAGE))
        self.ok("image", "import", str(archive))

    @property
    def socket(self) -> str:
        """Path of the daemon's gRPC socket."""
        return f"{self.directory}/containerd.sock"

    @property
    def argv(self) -> list[str]:
        """The command line up to ctr's verb."""
        return ["ctr", "--address", self.socket, "--namespace", NAMESPACE]

    @property
    def runtime_root(self) -> str:
        """Where the runtime keeps the state of this daemon's containers: the shim appends the namespace."""
        return f"{self.directory}/runtime"

    def new_id(self) -> str:
        """A container id no other test uses, remembered for the leak check."""
        self.ids.append(f"ovt-test-{os.getpid()}-{next(self._numbers)}-end")
        return self.ids[-1]

    def __call__(
        self, *arguments: str, input: str | None = None, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run `ctr ARGUMENTS…`; stdout and stderr come back apart, whatever the exit status."""
        done = subprocess.run(
            [*self.argv, *arguments],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        self.calls.append(f"$ ctr {' '.join(arguments)}\n[{done.returncode}] {done.stdout[-2000:]}{done.stderr}")
        return done

    def ok(self, *arguments: str, input: str | None = None, timeout: float = 30) -> str:
        """As calling, but a failure raises AssertionError; returns stdout without the last newline."""
        done = self(*arguments, input=input, timeout=timeout)
        assert done.returncode == 0, self.calls[-1]
        return done.stdout.rstrip("\n")

    def run_arguments(self, options: Sequence[str], command: Sequence[str]) -> list[str]:
        """`run OPTIONS… IMAGE ID COMMAND…` on the runtime under test; the id is the last of `ids`."""
        with_runtime = ("--runc-binary", str(self.runtime), "--runc-root", self.runtime_root)
        return ["run", *with_runtime, *options, IMAGE, self.new_id(), *command]

    def run(self, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ctr run --rm OPTIONS… -- COMMAND…`: image and id are inserted where `--` stands."""
        where = arguments.index("--")
        return self(*self.run_arguments(("--rm", *arguments[:where]), arguments[where + 1 :]), input=input)

    def output(self, *arguments: str) -> str:
        """As `run`, but it must exit with 0; returns stdout without the last newline."""
        done = self.run(*arguments)
        assert done.returncode == 0, self.calls[-1]
        return done.stdout.rstrip("\n")

    def start(self, *options: str, command: Sequence[str] = ("sleep", "1000")) -> str:
        """Start a detached container running `command` (its output is dropped); returns its id."""
        self.ok(*self.run_arguments(("--detach", "--null-io", *options), command))
        return self.ids[-1]

    def exec(self, container: str, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ctr task exec` with an id of its own; options come before a `--`, if any."""
        where = arguments.index("--") if "--" in arguments else -1
        options, command = arguments[: max(where, 0)], arguments[where + 1 :]
        exec_id = f"exec-{next(self._numbers)}"
        return self("task", "exec", "--exec-id", exec_id, *options, container, *command, input=input)

    def status(self, container: str) -> str:
        """RUNNING, PAUSED, STOPPED or CREATED; empty when there is no such task."""
        for line in self.ok("task", "list").splitlines():
            fields = line.split()
            if fields[0] == container:
                return fields[2]
        return ""

    def pid(self, container: str) -> int:
        """Process id of the container's init on the host."""
        for line in self.ok("task", "list").splitlines():
            fields = line.split()
            if fields[0] == container:
                return int(fields[1])
        raise AssertionError(f"no task {container}")

    def wait_for(self, container: str, status: str, timeout: float = 10) -> None:
        """Wait until the task has `status`."""
        deadline = time.monotonic() + timeout
        while (now := self.status(container)) != status:
            assert time.monotonic() < deadline, f"{container} is {now or 'gone'}, not {status}, after {timeout} s"
            time.sleep(0.05)

    def remove_all(self) -> None:
        """Kill and delete every task and container."""
        for container in self.ok("container", "list", "--quiet").split():
            if self.status(container) == "PAUSED":
                self("task", "resume", container)
            self("task", "delete", "--force", container)
            self("container", "delete", container)

    def leaks_of(self, ids: Sequence[str]) -> list[str]:
        """What is left of the containers `ids`, all of which have been removed."""
        if not ids:
            return []
        command = [str(self.runtime), "--root", f"{self.runtime_root}/{NAMESPACE}"]
        return [
            *leaks.mounts(ids),
            *leaks.cgroups(ids),
            *leaks.processes(ids),
            *leaks.runtime_state(command, ids),
        ]

    def runtime_log(self) -> str:
        """The runtime's own log of the containers still here, and the end of the daemon's and shims' log."""
        texts = []
        for path in [*sorted(self.directory.glob("state/**/log.json")), self.directory / "containerd.log"]:
            wanted = [line for line in path.read_text(errors="replace").splitlines() if "level=debug" not in line]
            if wanted:
                texts.append(f"--- {path.relative_to(self.directory)}\n" + "\n".join(wanted[-15:]))
        return "\n".join(texts)

    def close(self) -> None:
        """Remove all containers, stop the daemon, unmount what it left and delete the directory."""
        try:
            self.remove_all()
        finally:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(20)
        for line in reversed(leaks.mounts([str(self.directory)])):
            subprocess.run(["umount", line.removeprefix("mount ")], check=False)
        shutil.rmtree(self.directory)
        for group in Path("/sys/fs/cgroup").glob(f"**/{NAMESPACE}"):
            group.rmdir()
