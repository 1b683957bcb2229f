"""The container engine as a library: one object, the verbs of an OCI runtime as methods.

    rt = Runtime()
    rt.create("web", "/bundles/web"); rt.start("web"); rt.kill("web", 15); rt.delete("web")

The command line (ovt/runtime.py) and the people's engine call nothing but this. A container's first process is a
child of the calling process, which is to wait for it. Not safe for use by several threads of one process at a time.
"""

from __future__ import annotations

import builtins
import posix
import time

from ovt.errors import NotFound, OvtError, StateError

from . import state as states
from .state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ovt.kernel.cgroup import Cgroup

    from .exec import Request as ExecRequest
    from .request import Request as CreateRequest

_CREATE_SECONDS = 10


class Runtime:
    """Containers below one state directory. `cgroup_manager` is cgroupfs, systemd or disabled."""

    def __init__(self, root: str | None = None, cgroup_manager: str = "cgroupfs") -> None:
        self.root = (root or states.default_root()).rstrip("/")
        self.cgroup_manager = cgroup_manager

    # create and exec

    def create(self, container_id: str, bundle: str, config: dict[str, Any] | None = None, **options: Any) -> State:
        """Make a container that waits for `start`; see create.Request for `options` (`config_path` besides).

        Raises ConfigError with the JSON path of the first fault, Conflict when the name is taken, HostError when the
        kernel refuses and PayloadError when the program cannot be found; nothing is left behind then.
        """
        return self.create_terminal(container_id, bundle, config, **options)[0]

    def create_terminal(
        self, container_id: str, bundle: str, config: dict[str, Any] | None = None, **options: Any
    ) -> tuple[State, int]:
        """As `create`; also returns the master of the container's terminal, -1 without one."""
        from . import config as configs
        from .create import create
        from .request import Request

        states.check_id(container_id)
        bundle = posix.getcwd() + "/" + bundle if not bundle.startswith("/") else bundle
        config_path = options.pop("config_path", None)
        if config is None:
            config = configs.load(bundle.rstrip("/"), config_path)
        configs.validate(config, rootless=posix.geteuid() != 0)
        request: CreateRequest = Request(bundle.rstrip("/") or "/")
        request.cgroup_manager = self.cgroup_manager
        for name, value in options.items():
            setattr(request, name, value)
        terminal = bool((config.get("process") or {}).get("terminal"))
        if terminal and not request.console_socket and not request.want_terminal:
            raise OvtError(
                "cannot allocate tty if runtime will detach without setting console socket: use --console-socket",
                "or set process.terminal to false",
            )
        if request.console_socket and not terminal:
            raise OvtError("cannot use console socket if runtime will not detach or allocate tty")
        return create(self.root, container_id, config, request)

    def exec(self, container_id: str, process: dict[str, Any], **options: Any) -> int:
        """Run an OCI process in the container and return its pid, a child of the caller; see exec.Request."""
        return self.exec_terminal(container_id, process, **options)[0]

    def exec_terminal(self, container_id: str, process: dict[str, Any], **options: Any) -> tuple[int, int]:
        """As `exec`; also returns the master of the process's terminal, -1 without one."""
        from . import config as configs
        from .exec import Request, execute

        state = State.load(self.root, container_id)
        configs.validate_process(process)
        request: ExecRequest = Request()
        for name, value in options.items():
            setattr(request, name, value)
        if process.get("terminal") and not request.console_socket and not request.want_terminal:
            raise OvtError("cannot allocate tty if runtime will detach without setting console socket")
        return execute(state, process, request)

    # the life of a container

    def start(self, container_id: str) -> None:
        """Execute the program of a created container."""
        from . import lifecycle

        state = State.load(self.root, container_id)
        deadline = time.monotonic() + _CREATE_SECONDS
        while state.status() == states.CREATING and time.monotonic() < deadline:
            time.sleep(0.005)  # another process is at it: whoever saw the state may well start it now
            state = State.load(self.root, container_id)
        lifecycle.start(state)

    def kill(self, container_id: str, signal: int, everything: bool = False) -> None:
        """Signal the first process, or every one."""
        from . import lifecycle

        lifecycle.kill(State.load(self.root, container_id), signal, everything)

    def pause(self, container_id: str) -> None:
        """Freeze every process."""
        from . import lifecycle

        lifecycle.pause(State.load(self.root, container_id))

    def resume(self, container_id: str) -> None:
        """Thaw every process."""
        from . import lifecycle

        lifecycle.resume(State.load(self.root, container_id))

    def delete(self, container_id: str, force: bool = False) -> builtins.list[str]:
        """Remove a stopped container; with `force` any, and without complaint one that is not there.

        Returns what its poststop hooks failed with; the container is gone all the same.
        """
        from . import lifecycle

        try:
            state = State.load(self.root, container_id)
        except NotFound:
            states.sweep(self.root, container_id)
            if force:
                return []
            raise
        except OvtError:
            if not force:
                raise
            lifecycle.delete_damaged(self.root, container_id)
            return []
        warnings = lifecycle.delete(state, force)
        states.sweep(self.root, container_id)
        return warnings

    # questions

    def state(self, container_id: str) -> dict[str, Any]:
        """The OCI state."""
        return State.load(self.root, container_id).oci()

    def list(self) -> builtins.list[dict[str, Any]]:
        """The OCI state of every container, by name; one with a damaged record has the status `damaged`."""
        entries = []
        for name in states.list_ids(self.root):
            try:
                entries.append(State.load(self.root, name).oci())
            except NotFound:
                continue  # deleted meanwhile
            except OvtError as error:
                entries.append({"id": name, "status": "damaged", "pid": 0, "error": error.message})
        return entries

    def pids(self, container_id: str) -> builtins.list[int]:
        """All processes of the container, as the host numbers them."""
        state = State.load(self.root, container_id)
        init = [state.pid] if state.alive() else []
        if not state.record.get("cgroup"):
            return init
        from ovt.kernel import cgroup

        # empty where a normal user may not make cgroups
        return cgroup.restore(state.record["cgroup"]).pids() or init

    def stats(self, container_id: str) -> dict[str, Any]:
        """The `data` object of `events --stats`."""
        return self._running_cgroup(container_id, "read the statistics of").stats()

    def events(self, container_id: str, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Out-of-memory kills and pressure, as they come."""
        return self._running_cgroup(container_id, "watch").events(timeout)

    def update(self, container_id: str, resources: dict[str, Any]) -> None:
        """Change the limits of a living container: an OCI linux.resources object, what it leaves out stays."""
        from . import config as configs

        configs.validate_resources(resources)
        self._running_cgroup(container_id, "update").apply(resources, update=True)

    def _running_cgroup(self, container_id: str, verb: str) -> Cgroup:
        from ovt.kernel import cgroup

        state = State.load(self.root, container_id)
        if state.status() == states.STOPPED:
            raise StateError(f"cannot {verb} {container_id}: container not running")
        if not state.record.get("cgroup"):
            raise StateError(f"cannot {verb} {container_id}: it has no cgroup")
        return cgroup.restore(state.record["cgroup"])
