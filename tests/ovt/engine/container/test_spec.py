"""The configuration that `ovt-runtime spec` writes, against golden files (`OVT_REGENERATE=1` writes them anew)."""

from __future__ import annotations

import os
import posix
from pathlib import Path

import pytest

from ovt.engine.container import config, spec
from ovt.kernel import jsonc

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.mark.parametrize(
    ("name", "rootless", "unified"),
    [("spec", False, True), ("spec-v1", False, False), ("spec-rootless", True, True)],
)
def test_golden(name: str, rootless: bool, unified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_unified", lambda: unified)
    monkeypatch.setattr(posix, "geteuid", lambda: 1000)
    monkeypatch.setattr(posix, "getegid", lambda: 100)
    text = jsonc.dumps(spec.spec(rootless=rootless), indent=2) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("OVT_REGENERATE"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("rootless", [False, True])
def test_what_is_written_is_valid(rootless: bool) -> None:
    config.validate(spec.spec(rootless=rootless), rootless=rootless)


def test_each_call_gives_a_document_of_its_own() -> None:
    first = spec.spec()
    first["process"]["capabilities"]["bounding"].clear()
    first["mounts"][0]["options"] = ["ro"]
    assert spec.spec() != first
    assert spec.spec() == spec.spec()
