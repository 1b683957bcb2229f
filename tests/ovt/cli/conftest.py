"""The command line over an engine of `sleep` processes, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ovt import cli
from ovt.host import Host
from tests.fakes import FakeEngine
from tests.ovt.cli.place import Place


class Done(NamedTuple):
    """A command's exit status and what it wrote."""

    status: int
    out: str
    err: str


Ovt = Callable[..., Done]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    engine = FakeEngine()
    monkeypatch.setattr("ovt.engine.container.engine.ContainerEngine", lambda run, cache, report: engine)
    yield engine
    engine.close()


@pytest.fixture
def host(engine: FakeEngine, tmp_path: Path) -> Host:
    """The host that the commands work on."""
    return Host(str(tmp_path / "data"), str(tmp_path / "run"), engine=engine)


@pytest.fixture
def ovt(engine: FakeEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Ovt:
    """`ovt("ps", "-a")` as a shell would call it."""

    def call(*words: str) -> Done:
        capfd.readouterr()
        roots = ["--data-root", str(tmp_path / "data"), "--run-root", str(tmp_path / "run")]
        status = cli.run([*roots, *words])
        return Done(status, *capfd.readouterr())

    return call


@pytest.fixture
def real_ovt(tmp_path: Path) -> Iterator[Place]:
    """The installed `ovt` on directories of the test's own; after the test nothing of it may be left."""
    place = Place(tmp_path)
    (place.data / "instances").mkdir(parents=True)
    (place.data / "names").mkdir()
    (place.run / "containers").mkdir(parents=True)
    yield place
    ids = place.out("ps", "-aq", check=False).split()
    if ids:
        place("delete", "-f", *ids)
    place.nothing_left()
