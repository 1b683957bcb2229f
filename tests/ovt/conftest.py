"""Containers that really run, for the behaviour tests of the runtime."""

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import Bundle, Oci
from tests.ovt.live import Container, Create, Run


@pytest.fixture
def run(oci: Oci, bundle: Bundle, container_id: str) -> Run:
    """`run("sh", "-c", "id", config=…, edit=…, flags=("--no-pivot",))`: what it printed; its status must be 0."""
    numbers = itertools.count()

    def call(*arguments: str, flags: tuple[object, ...] = (), **options: Any) -> str:
        place = bundle(*arguments, config=options.pop("config", None), edit=options.pop("edit", None))
        return oci("run", *flags, "-b", place, f"{container_id}-{next(numbers)}", check=True, **options).stdout.strip()

    return call


@pytest.fixture
def create(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> Iterator[Create]:
    """`create("sleep", "9", config=…, flags=("--no-pivot",))`; its output goes to a file."""
    made: list[Container] = []

    def make(*arguments: str, flags: tuple[object, ...] = (), place: Path | None = None, **options: Any) -> Container:
        config, edit = options.pop("config", None), options.pop("edit", None)
        place = place or bundle(*arguments, config=config, edit=edit)
        name = f"{container_id}-c{len(made)}"
        container = Container(oci, name, place, tmp_path / f"{name}.out")
        made.append(container)
        with open(container.out, "wb") as out:
            # not captured by pipes: the container inherits them, and their end would be waited for
            options = {"capture_output": False, "stdout": out, "stderr": subprocess.STDOUT, **options}
            done = oci("create", *flags, "-b", place, name, **options)
        assert done.returncode == 0, container.output()
        return container

    yield make
    for container in reversed(made):
        leaks.reap()  # a namespace's first process cannot end while another of its processes is a zombie of ours
        oci("delete", "--force", container.id, check=True)
