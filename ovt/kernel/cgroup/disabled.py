"""The cgroup manager `disabled`: the container stays in the cgroup of its caller, and nothing of cgroups is touched."""

from __future__ import annotations

from ovt.errors import HostError
from ovt.kernel.cgroup.base import Cgroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HINT = "use --cgroup-manager cgroupfs or systemd"


class Disabled(Cgroup):
    """No cgroup. Limits of an `update` and the freezer are refused; those of a new container are left out, as asked."""

    __slots__ = ()

    manager = "disabled"

    def record(self) -> dict[str, Any]:
        return {"manager": "disabled"}

    def create(self) -> None:
        pass

    def attach(self, pid: int, sub: str = "", init: int = 0) -> None:
        if sub:
            raise HostError(f"cannot enter cgroup {sub}: cgroups are disabled for this container", 0, _HINT)

    def apply(self, resources: dict[str, Any], *, update: bool = False) -> None:
        if update and any(resources.values()):
            raise HostError("cannot update resources: cgroups are disabled for this container", 0, _HINT)

    def pids(self, recursive: bool = True) -> list[int]:
        return []

    def freeze(self) -> None:
        raise HostError("cannot pause: cgroups are disabled for this container", 0, _HINT)

    def thaw(self) -> None:
        raise HostError("cannot resume: cgroups are disabled for this container", 0, _HINT)

    def frozen(self) -> bool:
        return False

    def kill(self, signal: int = 9) -> None:
        pass

    def remove(self) -> None:
        pass

    def path_for(self, controller: str) -> str | None:
        return None

    def stats(self) -> dict[str, Any]:
        raise HostError("no statistics: cgroups are disabled for this container", 0, _HINT)
