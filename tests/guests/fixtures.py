"""What a test of virtual machines can ask for: whole guests. tests/conftest.py imports the names that it offers."""

import pytest

from tests.guests.debian import DebianDisk, Unavailable, debian_disk


@pytest.fixture(scope="session")
def debian() -> DebianDisk:
    """A Debian's disk, from the cache; built first where it is not there, which takes a minute or two."""
    try:
        return debian_disk()
    except Unavailable as error:
        pytest.skip(str(error))
