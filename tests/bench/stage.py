"""Where the contenders meet: one bundle, one configuration, one view of the cgroups, for all of them the same."""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import make_rootfs
from tests.leaks import adopt_orphans

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = "ovt-runtime"
RUNTIMES = {OURS: ROOT / ".venv/bin/ovt-runtime", "crun": "crun", "runc": "runc"}
CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x4000, 0x40000, 2


def runtimes() -> dict[str, str]:
    found = {name: shutil.which(str(path)) for name, path in RUNTIMES.items()}
    return {name: path for name, path in found.items() if path}


def private_mounts() -> None:
    """A mount namespace of our own, where a hybrid host's cgroup2 tree is not mounted.

    crun refuses a host whose v1 and v2 trees both hold controllers; without the v2 tree all three have the same view.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace: run as root")
    if Path("/sys/fs/cgroup/unified").is_dir():
        libc.umount2(b"/sys/fs/cgroup/unified", MNT_DETACH)


def prepare() -> None:
    private_mounts()
    adopt_orphans()


def make_bundle(place: Path, *arguments: str) -> Path:
    """The configuration that `runc spec` writes, so nothing of our own making; no terminal, `arguments` to run."""
    make_rootfs(place / "rootfs")
    specifier = "runc" if shutil.which("runc") else RUNTIMES[OURS]
    subprocess.run([specifier, "spec", "--bundle", place], check=True)
    config: dict[str, Any] = json.loads((place / "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = list(arguments)
    (place / "config.json").write_text(json.dumps(config))
    return place


def reap() -> None:
    """Bury the containers that this process adopted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
