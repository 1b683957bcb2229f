"""Every malformed configuration gives one error that names the place, and nothing is left of the attempt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovt.engine.container import config
from ovt.errors import ConfigError
from tests.conformance.mutations import Mutation, mutations
from tests.conformance.sample import full_config
from tests.conftest import Oci, make_rootfs

MUTATIONS = mutations()


def test_the_sample_itself_is_valid() -> None:
    config.validate(full_config())
    config.validate(config.parse(json.dumps(full_config()).encode()))


def test_there_are_enough_and_they_have_names_of_their_own() -> None:
    assert len(MUTATIONS) >= 200
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_the_fault_is_found_where_it_is(mutation: Mutation, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(mutation.document)
    with pytest.raises(ConfigError) as caught:
        config.validate(config.load(str(tmp_path)))
    assert caught.value.path == mutation.path
    message = str(caught.value)
    assert message.startswith(f"config.json: {mutation.path}: ")
    assert "\n" not in message
    assert len(message) < 600


SAMPLE = MUTATIONS[:: max(1, len(MUTATIONS) // 240)]
CHUNK = 30


@pytest.mark.root
@pytest.mark.parametrize("start", range(0, len(SAMPLE), CHUNK))
def test_create_refuses_and_leaves_nothing(
    start: int, oci: Oci, run_root: Path, container_id: str, tmp_path: Path
) -> None:
    assert len(SAMPLE) >= 200
    make_rootfs(tmp_path / "rootfs")
    wrong = []
    for mutation in SAMPLE[start : start + CHUNK]:
        (tmp_path / "config.json").write_bytes(mutation.document)
        done = oci("create", "--bundle", tmp_path, container_id)
        lines = done.stderr.splitlines()
        if done.returncode != 1 or done.stdout or len(lines) != 1 or f" {mutation.path}: " not in lines[0]:
            wrong.append(f"{mutation.name}: exit {done.returncode}, wanted {mutation.path}: {done.stdout}{done.stderr}")
        if (run_root / container_id).exists():
            wrong.append(f"{mutation.name}: left its state directory")
    assert wrong == []
