"""A saved state is there whole or not at all."""

from pathlib import Path

import pytest

from ovt.engine.vm import saved
from ovt.errors import OvtError


def test_half_of_one_is_none(tmp_path: Path) -> None:
    (tmp_path / ".saved").mkdir()
    assert not saved.exists(str(tmp_path))


def test_discard(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "memory").touch()
    (tmp_path / ".saved.gone").mkdir()
    assert saved.exists(str(tmp_path))
    saved.discard(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    saved.discard(str(tmp_path))


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"hardware": 1, "state": 2}', '{"hardware": [], "state": {}}'])
def test_damaged_record(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "saved").mkdir()
    if text is not None:
        (tmp_path / "saved" / "saved.json").write_text(text)
    with pytest.raises(OvtError, match="cannot be read"):
        saved.read(str(tmp_path))
