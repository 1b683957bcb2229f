"""The README tells the truth: its `console` and `python` blocks are executed, and what they print is compared."""

import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


class Block(NamedTuple):
    """One fenced block: its language, its lines, and the line of the README where it begins."""

    language: str
    lines: list[str]
    line: int


class Step(NamedTuple):
    """One command of a console block and what it prints, where `…` stands for any text."""

    command: str
    output: list[str]


def blocks(text: str) -> Iterator[Block]:
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(match[1], match[2].splitlines(), text.count("\n", 0, match.start()) + 1)


def steps(lines: list[str]) -> list[Step]:
    found: list[Step] = []
    for line in lines:
        if line.startswith("$ "):
            found.append(Step(line[2:], []))
        elif line.startswith("> "):
            found[-1] = Step(f"{found[-1].command}\n{line[2:]}", [])
        else:
            found[-1].output.append(line)
    return found


def pattern(line: str) -> str:
    """As an fnmatch pattern: `…` is any text, everything else is itself."""
    return "*".join(re.sub(r"([*?[])", r"[\1]", part) for part in line.rstrip().split("…"))


def same(expected: list[str], printed: list[str]) -> bool:
    """Line by line; a line that is only `…` stands for any number of lines."""
    if not expected:
        return not printed
    if expected[0] == "…":
        return any(same(expected[1:], printed[n:]) for n in range(len(printed) + 1))
    return bool(printed) and fnmatch.fnmatchcase(printed[0].rstrip(), pattern(expected[0])) and same(
        expected[1:], printed[1:]
    )  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A host of the test's own, and the programs on the path as the README has them."""
    return {
        "PATH": f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(tmp_path),
        # the guest's kernel is fetched once for all tests
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
        "OVT_DATA_ROOT": str(tmp_path / "data"),
        "OVT_RUN_ROOT": str(tmp_path / "run"),
        "LANG": "C.UTF-8",
    }


BLOCKS = [b for b in blocks(README.read_text()) if b.language in ("console", "python")]


def test_there_are_enough_examples() -> None:
    assert len(BLOCKS) >= 10


def test_the_comparison_can_fail() -> None:
    assert same(["a …", "…", "z"], ["a b", "c", "d", "z"])
    assert same(["…"], []) and same(["[x] *"], ["[x] *"])
    assert not same(["a"], ["b"]) and not same(["a"], []) and not same([], ["a"]) and not same(["a", "…", "z"], ["a"])


@pytest.mark.root
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.language}-line-{b.line}")
def test_example(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "here"
    place.mkdir()
    if block.language == "python":
        script = "\n".join(block.lines)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=place, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return
    for step in steps(block.lines):
        log = tmp_path / "output"
        # To a file: a detached container may keep a pipe open for ever. One shell per step, as one prompt per step.
        with log.open("w") as output:
            subprocess.run(
                ["/bin/bash", "-c", step.command],
                cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=100,
            )  # fmt: skip
        printed = log.read_text().splitlines()
        told = [f"$ {step.command}", "expected:", *step.output, "got:", *printed]
        assert same(step.output, printed), "\n".join(told)


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"\b((?:scripts|tests|ovt)/[\w./]+\w)", README.read_text())
    assert [name for name in named if not (ROOT / name).exists() and not os.path.islink(ROOT / name)] == []
