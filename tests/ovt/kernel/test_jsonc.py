"""The import-light JSON reader and writer against the standard library's, and against hostile input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ovt.kernel import jsonc
from tests.conformance.sample import full_config

GOOD = (
    "{}",
    "[]",
    ' \r\n\t{"a": [1, -2, 3.5, 1e3, -0.0, true, false, null, ""]} \n',
    '"\\u00e9 \\ud83d\\ude00 \\n \\" \\\\ \\/"',
    '{"a": 1, "a": 2}',
    '{"": {"": [[[]]]}}',
    "18446744073709551615",
    "0",
    json.dumps(full_config()),
    json.dumps(full_config(), indent="\t"),
)


@pytest.mark.parametrize("text", GOOD)
def test_reads_what_json_reads(text: str) -> None:
    assert jsonc.loads(text) == json.loads(text)
    assert jsonc.load_bytes(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)


BAD = (
    ("", "line 1, column 1: the document is empty"),
    ("  \n ", "line 2, column 2: the document is empty"),
    ("nul", "line 1, column 1: a value was expected"),
    ('{\n "a": }', "line 2, column 7: a value was expected"),
    ('{"a" 1}', "line 1, column 6: expecting ':' delimiter"),
    ('{"a": 1 "b": 2}', "line 1, column 9: expecting ',' delimiter"),
    ("{a: 1}", "line 1, column 2: expecting property name enclosed in double quotes"),
    ("[1\n2]", "line 2, column 1: expecting ',' delimiter"),
    ('"abc', "line 1, column 1: unterminated string"),
    ('"a\tb"', "line 1, column 3: invalid control character"),
    ('"\\x"', "line 1, column 2: invalid \\escape"),
    ("{}\n{}", "line 2, column 1: there is more text after the document's end"),
    ("01", "line 1, column 2: there is more text after the document's end"),
    ("[NaN]", "NaN is not a JSON number"),
    ("[-Infinity]", "-Infinity is not a JSON number"),
    ("[1e400]", "the number 1e400 is too large"),
    ("9" * 101, "is too large"),
    ("9" * 100_000, "is too large"),
    ('["\\ud800"]', 'the string "\\ud800" has half a surrogate pair'),
    ('{"\\udc80": 1}', 'the string "\\udc80" has half a surrogate pair'),
    ("[" * 100_000, "the values are nested too deeply"),
    ('{"a":' * 100_000, "the values are nested too deeply"),
)


@pytest.mark.parametrize(("text", "reason"), BAD, ids=[repr(text[:12]) for text, _ in BAD])
def test_says_what_is_wrong_and_where(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        jsonc.loads(text)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b'"\xff"', b'"\xc3"', '"é"'.encode("latin-1"), "{}".encode("utf-16")])
def test_refuses_bytes_that_are_not_utf_8(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"byte \d is not UTF-8"):
        jsonc.load_bytes(data)


def test_an_escaped_pair_is_one_character() -> None:
    assert jsonc.loads('"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize("indent", [0, 1, 2, 4])
def test_writes_what_json_writes(indent: int) -> None:
    value = {
        "empty": [{}, [], ""],
        "é\n\0": (1, 2.5, -3, True, False, None),
        "nested": {"a": {"b": [{"c": "\U0001f600"}]}},
        "big": 2**70,
    }
    assert jsonc.dumps(value, indent) == json.dumps(value, indent=indent or None)
    assert jsonc.dumps(full_config(), indent) == json.dumps(full_config(), indent=indent or None)


@pytest.mark.parametrize("indent", [0, 2])
def test_refuses_to_write_what_json_does_not_have(indent: int) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonc.dumps([float("nan")], indent)
    with pytest.raises(TypeError, match="JSON has no set"):
        jsonc.dumps({"a": {1}}, indent)
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        jsonc.dumps(endless, indent)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert jsonc.load_file(str(path)) == {"a": 1}
    assert jsonc.load_file(str(path), limit=8) == {"a": 1}
    with pytest.raises(ValueError, match=r"x\.json: it is longer than 7 bytes"):
        jsonc.load_file(str(path), limit=7)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: line 1, column 2: expecting property name"):
        jsonc.load_file(str(path))
    with pytest.raises(FileNotFoundError) as caught:
        jsonc.load_file(str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError) as directory:
        jsonc.load_file(str(tmp_path))
    assert directory.value.filename == str(tmp_path)


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    text = json.dumps(["x" * 1000] * 40)
    try:
        os.write(writer, text[:100].encode())
        os.write(writer, text[100:].encode())
        os.close(writer)
        assert jsonc.load_file(f"/proc/self/fd/{reader}") == json.loads(text)
    finally:
        os.close(reader)


def test_json_is_imported_for_a_syntax_error_only() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ovt.kernel import jsonc\n"
        "jsonc.loads(jsonc.dumps({'a': [1.5, None]}, 2))\n"
        "for bad in ('', 'nul', '[NaN]', '[' * 99999, '1 1', '[1e999]'):\n"
        "    try: jsonc.loads(bad)\n"
        "    except ValueError: pass\n"
        "assert not {'json', 're', 'os', 'enum', 'typing'} & set(sys.modules), sorted(sys.modules)\n"
        "try: jsonc.loads('{')\n"
        "except ValueError as e: print(e)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "line 1, column 2: expecting property name enclosed in double quotes\n")
