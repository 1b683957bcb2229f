"""A root file system and a docker archive made of nothing but the host's busybox.

Not an image builder: it exists so that the tests with podman and containerd need no registry and no network.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
"""busybox-static; a dynamically linked one would find no loader in the image."""

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""uname's names to those of the image specification (GOARCH)."""

PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000:web:/home:/bin/sh\n"
GROUP = "root:x:0:\nweb:x:1000:\nextra:x:2000:web\n"


def rootfs_tar() -> bytes:
    """Return an uncompressed tar of a root file system: busybox, its applets as links, /etc/passwd and /etc/group."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, mode in [(d, 0o755) for d in ("bin", "etc", "proc", "sys", "dev", "root", "home", "var", "run")] + [
            ("tmp", 0o1777)
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, mode
            tar.addfile(member)
        tar.add(BUSYBOX.resolve(), "bin/busybox", filter=_as_root)
        applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
        for applet in applets:
            if applet != "busybox":
                member = tarfile.TarInfo(f"bin/{applet}")
                member.type, member.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(member)
        for name, text in (("etc/passwd", PASSWD), ("etc/group", GROUP), ("etc/plain-file", "not a program\n")):
            _add(tar, name, text.encode())
    return out.getvalue()


def docker_archive(reference: str) -> bytes:
    """Return a tar as written by `docker save`: one layer, tagged `reference` (fully qualified: host/path:tag)."""
    layer = rootfs_tar()
    config = {
        "architecture": MACHINES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        _add(tar, "layer.tar", layer)
        _add(tar, "config.json", json.dumps(config).encode())
        _add(tar, "manifest.json", json.dumps(manifest).encode())
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.mode = 0o755
    return member
