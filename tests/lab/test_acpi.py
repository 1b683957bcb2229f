"""The ACPI table of the lab host: its header, its encoding, and what ACPI's own compiler reads in it."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.lab import acpi


@pytest.mark.parametrize("cpus", [1, 2, 16, 255])
def test_header_tells_the_truth(cpus: int) -> None:
    table = acpi.table(cpus)
    assert struct.unpack_from("<4sIB", table) == (b"SSDT", len(table), 2)
    assert sum(table) % 256 == 0
    assert re.findall(rb"_SB_CPUS(C[0-9A-F]{3})", table) == [b"C%03X" % number for number in range(cpus)]


@pytest.mark.parametrize(
    "size, encoded",
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),
        (0xFFD, "4fff"),
        (0xFFE, "810001"),
        (0xFFFFC, "8fffff"),
        (0xFFFFD, "c1000001"),
    ],
)
def test_package_length_counts_itself(size: int, encoded: str) -> None:
    assert acpi.package_length(size).hex() == encoded


@pytest.mark.parametrize(
    "value, encoded",
    [(0, "00"), (1, "01"), (2, "0a02"), (255, "0aff"), (256, "0b0001"), (65535, "0bffff"), (65536, "0c00000100")],
)
def test_integers_are_as_short_as_can_be(value: int, encoded: str) -> None:
    assert acpi.integer(value).hex() == encoded


def test_numbers_too_large_are_refused() -> None:
    with pytest.raises(ValueError):
        acpi.integer(1 << 32)
    with pytest.raises(ValueError):
        acpi.package_length(1 << 28)


@pytest.mark.skipif(not shutil.which("iasl"), reason="needs iasl")
@pytest.mark.parametrize("cpus", [1, 2, 16])
def test_acpi_compiler_reads_it_and_compiles_it_to_the_same_bytes(cpus: int, tmp_path: Path) -> None:
    def iasl(*arguments: str) -> None:
        done = subprocess.run(["iasl", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    table = acpi.table(cpus)
    (tmp_path / "table.aml").write_bytes(table)
    iasl("-d", "table.aml")
    source = (tmp_path / "table.dsl").read_text()
    scopes = re.findall(r"Scope \(\\_SB\.CPUS\.(\w+)\)", source)
    assert scopes == [f"C{number:03X}" for number in range(cpus)]
    for needed in ("_PSS", "_PCT", "_PPC", "_PSD", "_CST"):
        assert len(re.findall(rf"Name \({needed},", source)) == cpus
    assert len(re.findall(r"Method \(_WAK, 1,", source)) == 1
    iasl("-p", "again", "table.dsl")
    again = (tmp_path / "again.aml").read_bytes()
    # The compiler adds a block that declares the scopes external, and its own name to the header.
    start = again.index(table[36:44])
    assert again[start:] == table[36:]
