"""A private podman: own storage, own run directory, own configuration; nothing of the machine's podman is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.system import busybox_image, leaks

IMAGE = "localhost/busybox:test"

# A hard limit above the caller's own needs CAP_SYS_RESOURCE, which a root in a sandbox often lacks: podman's
# default of 1048576 open files would fail with any runtime there.
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime_supports_json = ["crun", "runc", "ovt-runtime"]
runtime_supports_nocgroup = ["crun", "ovt-runtime"]
"""


class PodmanHost:
    """One podman installation below a temporary directory. `close` removes it with everything in it.

    With `uid` it is that user's rootless podman: without a line in /etc/subuid its containers have one user, root.
    """

    def __init__(self, runtime: Path, uid: int = 0) -> None:
        self.runtime = runtime
        self.uid = uid
        self.directory = Path(tempfile.mkdtemp(prefix="ovt-podman-"))
        self.directory.chmod(0o711)  # the root of a user namespace has to reach its bundle
        # A user cannot limit anything without a delegated cgroup, and podman's default is a limit of 2048 processes.
        extra = "[containers]\npids_limit = 0\n" if uid else "[containers]\n"
        (self.directory / "containers.conf").write_text(CONFIGURATION.replace("[containers]\n", extra))
        for name in ("home", "runtime-dir"):
            (self.directory / name).mkdir(mode=0o700)
            os.chown(self.directory / name, uid, uid)
        os.chown(self.directory, uid, uid)
        self.calls: list[str] = []
        self._cgroups_before = set(_podman_cgroups())
        archive = self.directory / "busybox.tar"
        archive.write_bytes(busybox_image.rootfs_tar())
        self.ok("import", "--quiet", "--change", "ENV PATH=/bin", str(archive), IMAGE)

    @property
    def argv(self) -> list[str]:
        """The command line up to podman's verb."""
        d = self.directory
        user = ("setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups") if self.uid else ()
        return [
            *user,
            *("podman", "--root", f"{d}/root", "--runroot", f"{d}/run", "--tmpdir", f"{d}/tmp"),
            *("--storage-driver", "vfs", "--runtime", str(self.runtime)),
        ]

    @property
    def env(self) -> dict[str, str]:
        """The whole environment podman gets."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": f"{self.directory}/home",
            "CONTAINERS_CONF": f"{self.directory}/containers.conf",
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",  # podman 5 puts one line on stderr of every call
        }

    def __call__(
        self,
        *arguments: str,
        input: str | None = None,
        timeout: float = 30,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run `podman ARGUMENTS…`; stdout and stderr come back apart, whatever the exit status."""
        done = subprocess.run(
            [*self.argv, *arguments],
            cwd=self.directory,  # conmon leaves a file named `oom` where podman was called
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**self.env, **(env or {})},
            pass_fds=pass_fds,
            check=False,
        )
        self.calls.append(f"$ podman {' '.join(arguments)}\n[{done.returncode}] {done.stdout[-2000:]}{done.stderr}")
        return done

    def ok(self, *arguments: str, input: str | None = None, timeout: float = 30) -> str:
        """As calling, but a failure raises AssertionError; returns stdout without the last newline."""
        done = self(*arguments, input=input, timeout=timeout)
        assert done.returncode == 0, self.calls[-1]
        return done.stdout.rstrip("\n")

    def run(self, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """`podman run --rm --network none ARGUMENTS…`: options, then the image is inserted where `--` stands."""
        where = arguments.index("--")
        return self(
            *("run", "--rm", "--network", "none", *arguments[:where], IMAGE, *arguments[where + 1 :]), input=input
        )

    def output(self, *arguments: str) -> str:
        """As `run`, but it must exit with 0; returns stdout without the last newline."""
        done = self.run(*arguments)
        assert done.returncode == 0, self.calls[-1]
        return done.stdout.rstrip("\n")

    def start(self, *arguments: str, command: Sequence[str] = ("sleep", "1000")) -> str:
        """Start a detached container running `command`; returns its id."""
        return self.ok("run", "-d", "--network", "none", *arguments, IMAGE, *command)

    def inspect(self, container: str, template: str) -> str:
        """`podman inspect --format TEMPLATE`."""
        return self.ok("inspect", "--format", template, container)

    def cgroup_file(self, container: str, controller: str, v1: str, v2: str) -> str:
        """Content of a limit file of the running container: `v1` in `controller`'s hierarchy, or `v2`."""
        pid = self.inspect(container, "{{.State.Pid}}")
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return Path(f"/sys/fs/cgroup/{controller}{path}/{v1}").read_text().strip()
        unified = Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::")[2].strip()
        return Path(f"/sys/fs/cgroup{unified}/{v2}").read_text().strip()

    def created(self) -> list[str]:
        """Ids of all containers ever created here, those removed included."""
        events = self.directory / "tmp/events/events.log"
        if not events.exists():
            return []
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        return [e["ID"] for e in lines if e["Type"] == "container" and e["Status"] == "create"]

    def remove_all(self) -> None:
        """Remove every container and pod by force."""
        self("rm", "--force", "--all", "--time", "0")
        self("pod", "rm", "--force", "--all", "--time", "0")

    def leaks_of(self, ids: Sequence[str]) -> list[str]:
        """What is left of the containers `ids`, all of which have been removed."""
        if not ids:
            return []
        if self.uid:
            state = [
                str(path) for one in ids for path in (self.directory / "runtime-dir").glob(f"{self.runtime.name}/{one}")
            ]
            state += [str(path) for one in ids for path in (self.directory / "runtime-dir").glob(f"ovt/{one}")]
        else:
            state = leaks.runtime_state([str(self.runtime)], ids)
        return [*leaks.mounts(ids), *leaks.cgroups(ids), *leaks.processes(ids), *state]

    def runtime_log(self) -> str:
        """Everything the runtime and conmon logged for the containers still here."""
        texts = []
        for pattern in ("oci-log", "ctr.log"):
            for path in sorted(self.directory.rglob(pattern)):
                if text := path.read_text(errors="replace"):
                    texts.append(f"--- {path.relative_to(self.directory)}\n{text[-2000:]}")
        return "\n".join(texts)

    def close(self) -> None:
        """Remove all containers, unmount what podman mounted for its storage and delete the directory."""
        self.remove_all()
        if self.uid:
            self("system", "migrate")  # ends the process that holds the user's namespaces
        for line in leaks.mounts([str(self.directory)]):
            subprocess.run(["umount", line.removeprefix("mount ")], check=False)
        shutil.rmtree(self.directory)
        for directory in sorted(set(_podman_cgroups()) - self._cgroups_before, reverse=True):  # children first
            try:
                directory.rmdir()
            except OSError:  # another podman moved in meanwhile
                pass


def _podman_cgroups() -> list[Path]:
    """The cgroups podman makes for itself and for pods; it removes neither in every hierarchy."""
    tops = list(Path("/sys/fs/cgroup").glob("*/libpod_parent")) + list(Path("/sys/fs/cgroup").glob("libpod_parent"))
    return tops + [directory for top in tops for directory in top.glob("*/")]
