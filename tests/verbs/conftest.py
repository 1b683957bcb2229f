"""`ovt` on directories of a test's own, once for containers and once for machines.

The machines are forks of one template that is booted once in a session, so that each costs about a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ovt.cli.place import Place
from tests.ovt.cli.terminal import Terminal
from tests.verbs.shared import Verbs

Open = Callable[..., Terminal]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root whose templates hold the built-in image, booted."""
    place = Place(tmp_path_factory.mktemp("template"))
    place("template", "image", "busybox", timeout=100)
    return place.data


@pytest.fixture(params=["container", pytest.param("vm", marks=pytest.mark.qemu)])
def ovt(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Verbs]:
    """The installed `ovt` for one kind of instance; after the test nothing of it may be left."""
    shared = request.getfixturevalue("template") if request.param == "vm" else None
    verbs = Verbs(tmp_path, request.param, shared)
    yield verbs
    verbs.delete_all()


@pytest.fixture
def terminal(ovt: Verbs) -> Iterator[Open]:
    """`terminal("run", "-it", …)`: `ovt` at a pseudo-terminal; killed after the test if it is still there."""
    made: list[Terminal] = []

    def start(*words: str) -> Terminal:
        made.append(Terminal([*ovt.words, *words]))
        return made[-1]

    yield start
    for one in made:
        one.kill()
