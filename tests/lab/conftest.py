"""What a test inside the lab host can ask for."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.lab.second import SecondHost

Modprobe = Callable[..., None]


@pytest.fixture(scope="session")
def modprobe() -> Modprobe:
    """Load kernel modules: `modprobe("igb", "vfio-pci")`. They stay loaded for the tests that follow."""

    def load(*names: str) -> None:
        subprocess.run(["modprobe", "-a", *names], check=True, capture_output=True, text=True)

    return load


@pytest.fixture(scope="session")
def second_host() -> Iterator[SecondHost]:
    """Another lab host on the same wire: `second_host("ip", "link")`. Asking for it boots it along with the first."""
    with SecondHost() as host:
        yield host
