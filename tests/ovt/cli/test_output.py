"""Tables, JSON, templates and colour."""

import io
import json

import pytest

from ovt.cli import output
from ovt.cli.output import Column
from ovt.errors import UsageError

RECORDS = [
    {"name": "web", "size": 5, "limits": {"memory": 1}, "list": ["a"]},
    {"name": "database", "size": None, "limits": {"memory": 2}, "list": []},
]
COLUMNS = [Column("NAME", "name"), Column("SIZE", "size"), Column("TWICE", "", lambda r: r["name"] * 2)]


def shown(capsys: pytest.CaptureFixture[str], form: str, header: bool = True) -> str:
    output.show(RECORDS, COLUMNS, form, header)
    return capsys.readouterr().out


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "table") == (
        "NAME      SIZE  TWICE\n"
        "web       5     webweb\n"
        "database        databasedatabase\n"
    )  # fmt: skip
    assert shown(capsys, "table", header=False).splitlines()[0] == "web       5  webweb"


def test_no_records(capsys: pytest.CaptureFixture[str]) -> None:
    output.show([], COLUMNS)
    output.show([], COLUMNS, header=False)
    output.show([], COLUMNS, "json")
    output.show([], COLUMNS, "{{.name}}")
    assert capsys.readouterr().out == "NAME  SIZE  TWICE\n[]\n"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, "json")) == RECORDS


def test_templates(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "{{.name}}={{ .limits.memory }}!") == "web=1!\ndatabase=2!\n"
    assert shown(capsys, "{{.list}}\\t{{.size}}") == '["a"]\t5\n[]\tnull\n'
    assert shown(capsys, "plain") == "plain\nplain\n"


def test_a_table_of_templates(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "table {{.name}}\\t{{.limits.memory}}") == "NAME      MEMORY\nweb       1\ndatabase  2\n"


@pytest.mark.parametrize("form", ["{{.none}}", "{{.name.deeper}}", "{{.limits.none}}", "{{name}}", "{{.name", "{{.}}"])
def test_templates_that_cannot_be_filled(form: str) -> None:
    with pytest.raises(UsageError) as caught:
        output.show(RECORDS, COLUMNS, form)
    assert caught.value.hint


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.show([{"name": "a\x1b[2Jb\nc"}], COLUMNS[:1])
    assert capsys.readouterr().out == "NAME\na?[2Jb?c\n"


def test_a_table_is_cut_to_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_width", lambda: 10)
    assert shown(capsys, "table").splitlines()[2] == "database …"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "stream", "expected"),
    [
        ({}, io.StringIO(), False),
        ({}, Terminal(), True),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"TERM": "dumb"}, Terminal(), False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Terminal(), False),
    ],
)
def test_colour(
    environment: dict[str, str], stream: io.StringIO, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert output.colourful(stream) is expected


def test_errors_go_to_stderr_with_their_hint(capsys: pytest.CaptureFixture[str]) -> None:
    output.error("cannot start web: it is running", "ovt restart web")
    output.error("no")
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "ovt: cannot start web: it is running\n  try: ovt restart web\novt: no\n"
