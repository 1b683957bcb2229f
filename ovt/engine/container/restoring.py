"""checkpoint and restore as verbs of a container: its state record, its cgroup and its name around CRIU's work.

Not covered: hooks between the making of the namespaces and the return of the processes. Engines that restore
(podman, containerd) join network namespaces that they have already filled, and need none.
"""

from __future__ import annotations

import posix

from ovt.errors import ConfigError, OvtError, StateError
from ovt.kernel import cgroup as cgroups
from ovt.kernel import procfs

from . import checkpoint as images
from . import config as configs
from . import lifecycle
from .create import begin, cgroup_record
from .request import Request
from .state import PAUSED, RUNNING, State, write_pid_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def checkpoint(state: State, options: dict[str, Any]) -> None:
    """Save a running container; unless it is to go on running, nothing of it is left on the host afterwards.

    `options`: see the module checkpoint. The configuration is read from the bundle again.
    """
    status = state.status()
    if status not in (RUNNING, PAUSED):
        raise StateError(f"cannot checkpoint container {state.id}: it is {status}", hint="only a running one can be")
    config = configs.load(state.record["bundle"], None)
    images.checkpoint(state.record, config, options)
    if not (options.get("leave-running") or options.get("pre-dump")):
        lifecycle.delete(state, force=True)


def restore(root: str, container_id: str, config: dict[str, Any], request: Request, options: dict[str, Any]) -> State:
    """Bring a container back from an image directory under the name `container_id`; its init is a child of ours."""
    linux = config.get("linux") or {}
    if linux.get("netDevices"):
        raise ConfigError("$.linux.netDevices", "cannot be restored", hint="a restored namespace has its own devices")
    state, cgroup = begin(root, container_id, config, request)
    record = state.record
    try:
        cgroup.create()
        record["cgroup"] = cgroup_record(cgroup)
        state.save()
        pid = images.restore(
            record, config, options, directory=state.path, stdio=request.stdio, enter_cgroup=cgroup.attach
        )
        record["pid"] = pid
        record["pid_start"] = procfs.start_time(pid)
        record["ready"] = True
        cgroup.apply(linux.get("resources") or {})
        record["cgroup"] = cgroup_record(cgroup)
        state.save()
        if request.pid_file:
            write_pid_file(request.pid_file, pid)
    except BaseException:
        _undo(state, cgroup)
        raise
    return state


def _undo(state: State, cgroup: cgroups.Cgroup) -> None:
    """Leave nothing behind; what cannot be removed stays recorded for `delete --force`."""
    try:
        if state.pid > 0 and state.alive():
            posix.kill(state.pid, 9)
        cgroup.kill()
        cgroup.remove()
    except (OSError, OvtError):
        return  # the first error is the one to tell
    state.remove()
