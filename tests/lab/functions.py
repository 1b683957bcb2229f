"""Virtual functions for the length of a test, by the files that the kernel gives every PCI device with SR-IOV."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def functions(pf: Path, number: int, *, autoprobe: bool) -> Iterator[list[Path]]:
    """That many virtual functions of `pf`, a directory in sysfs; afterwards none, and the driver is asked for them as
    before."""
    switch = pf / "sriov_drivers_autoprobe"
    before = switch.read_text()
    try:
        switch.write_text(str(int(autoprobe)))
        (pf / "sriov_numvfs").write_text(str(number))
        names = [os.path.basename(os.readlink(pf / f"virtfn{index}")) for index in range(number)]
        yield [Path("/sys/bus/pci/devices") / name for name in names]
    finally:
        try:
            (pf / "sriov_numvfs").write_text("0")
        finally:
            switch.write_text(before)
