"""The capability table against the kernel's own decoding, and the rule for names nobody knows."""

from pathlib import Path

import pytest

from ovt.errors import ConfigError
from ovt.kernel import capabilities


def test_mask_agrees_with_the_uapi_numbers() -> None:
    assert capabilities.mask(["CAP_CHOWN"]) == 1
    assert capabilities.mask(["CAP_SYS_ADMIN", "CAP_KILL"]) == 1 << 21 | 1 << 5
    assert capabilities.NUMBERS["CAP_CHECKPOINT_RESTORE"] == 40
    assert capabilities.mask(None) == 0
    assert capabilities.names_of(1 << 21 | 1) == ["CAP_CHOWN", "CAP_SYS_ADMIN"]


def test_the_table_matches_the_header() -> None:
    header = Path("/usr/include/linux/capability.h")
    if not header.exists():
        pytest.skip("linux-libc-dev is not installed")
    found = {}
    for line in header.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and words[0] == "#define" and words[1].startswith("CAP_") and words[2].isdigit():
            found[words[1]] = int(words[2])
    assert found
    assert {name: number for name, number in capabilities.NUMBERS.items() if name in found} == found


def test_names_of_a_newer_kernel_are_left_out() -> None:
    assert capabilities.mask(["CAP_FROM_THE_FUTURE", "CAP_CHOWN"]) == 1
    assert capabilities.mask(["CAP_BPF", "CAP_CHOWN"], last=37) == 1
    assert capabilities.unknown(["CAP_BPF", "CAP_NOPE", "CAP_CHOWN"], last=37) == ["CAP_BPF", "CAP_NOPE"]


@pytest.mark.parametrize("names", [["NET_ADMIN"], [1], [None], "CAP_CHOWN", {"CAP_CHOWN": 1}])
def test_what_is_no_capability_name_is_refused(names: object) -> None:
    with pytest.raises(ConfigError) as caught:
        capabilities.mask(names, path="$.process.capabilities.bounding")
    assert caught.value.path.startswith("$.process.capabilities.bounding")


def test_last_cap_is_read_from_the_given_root(tmp_path: Path) -> None:
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/cap_last_cap").write_text("37\n")
    assert capabilities.last_cap(str(tmp_path)) == 37
    assert capabilities.supported(str(tmp_path))[-1] == "CAP_AUDIT_READ"
    assert capabilities.last_cap(str(tmp_path / "nowhere")) == 40
    assert capabilities.last_cap() >= 37
