"""What needs a hierarchy of version 2 with every controller, pids too: a hybrid host's has what v1 left over alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel.cgroup.hierarchy import current
from ovt.kernel.cgroup.v2 import V2

from .conftest import Child

pytestmark = [pytest.mark.lab, pytest.mark.root]


def test_pids_of_a_cgroup_with_processes_do_not_make_it_threaded(place: str, child: Callable[..., Child]) -> None:
    mount = current().unified
    assert mount
    stranger, ours = child(), child()
    above, below = V2(mount, place + "/above"), V2(mount, place + "/above/box")
    above.create()
    above.attach(stranger.pid)
    below.create()
    with pytest.raises(HostError, match=r"`pids` is not available: .* holds processes itself"):
        below.apply({"pids": {"limit": 5}}, update=True)
    below.attach(ours.pid)
    assert below.pids() == [ours.pid]
    assert Path(below.directory, "cgroup.type").read_text() == "domain\n"
