"""Whether this host can run virtual machines, one check for each thing they need; beside those for containers.

Nothing of it is needed by somebody who runs containers alone, so nothing is worse than a warning.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from ovt.engine.container.readiness import Check
from ovt.engine.vm import features, firmware
from ovt.errors import OvtError
from ovt.image import kernel

_OPTIONAL = (
    ("passt", "passt", "user networks are made by QEMU itself, which then shares the host's network"),
    ("virtiofsd", "virtiofsd", "directories are shared by 9p alone"),
)
_DEVICES = (
    ("/dev/vhost-net", "network cards on taps are served by QEMU itself", "modprobe vhost_net"),
    ("/dev/vhost-vsock", "machines have no vsock", "modprobe vhost_vsock"),
)


def checks(run: str) -> Iterator[Check]:
    """All findings; `run` is where run-time state is kept."""
    try:
        found = features.probe(run)
    except OvtError as error:
        yield Check("QEMU", "warn", f"no virtual machines: {error.message}", error.hint)
        return
    yield Check("QEMU", "ok", f"{'.'.join(map(str, found.version))}, {found.program}")
    yield from _accelerator()
    yield from _programs(found)
    yield from _firmware(found)
    yield from _kernel()
    for path, effect, fix in _DEVICES:
        if os.path.exists(path):
            yield Check(os.path.basename(path), "ok", path)
        else:
            yield Check(os.path.basename(path), "warn", f"no {path}: {effect}", fix)


def _accelerator() -> Iterator[Check]:
    why = features.why_no_kvm()
    if why:
        fix = "turn on virtualisation in the firmware, or nested virtualisation in the hypervisor of this host"
        yield Check("accelerator", "warn", f"tcg, which is slow: {why}", why.partition(": ")[2] or fix)
    else:
        yield Check("accelerator", "ok", "kvm")


def _programs(found: features.Features) -> Iterator[Check]:
    if shutil.which("qemu-img"):
        yield Check("qemu-img", "ok", str(shutil.which("qemu-img")))
    else:
        yield Check("qemu-img", "warn", "no disk can be made or converted", "apt-get install qemu-utils")
    for program, package, effect in _OPTIONAL:
        path = shutil.which(program) or shutil.which(program, path="/usr/libexec:/usr/lib/qemu")
        if path:
            yield Check(program, "ok", path)
        elif program != "passt" or not found.user_netdev:
            yield Check(program, "warn", effect, f"apt-get install {package}")


def _firmware(found: features.Features) -> Iterator[Check]:
    try:
        yield Check("UEFI", "ok", firmware.find(found.q35).code)
    except OvtError as error:
        yield Check("UEFI", "warn", f"machines start from BIOS alone: {error.message}", error.hint)


def _kernel() -> Iterator[Check]:
    there = kernel.cached()
    if there:
        yield Check("built-in guest", "ok", f"Linux {there.version}")
    else:
        yield Check(
            "built-in guest", "warn", "its kernel is fetched when it is first used", "ovt run --vm busybox true"
        )
