"""The built-in image: the host's own static busybox under all its names, and the few files a system expects."""

from __future__ import annotations

import os
import struct

from ovt.errors import HostError, NotFound

_PLACES = ("/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox")
_HINT = "apt-get install busybox-static"
_PT_INTERP = 3
_LAYOUT = 2  # counts changes of what is below: images made before them are not used again

_DIRECTORIES = {
    "dev": 0o755, "etc": 0o755, "home": 0o755, "mnt": 0o755, "proc": 0o555, "root": 0o700, "run": 0o755, "sys": 0o555,
    "tmp": 0o1777, "usr": 0o755, "usr/bin": 0o755, "usr/sbin": 0o755, "bin": 0o755, "sbin": 0o755,
    "var": 0o755, "var/log": 0o755, "var/tmp": 0o1777,
}  # fmt: skip
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n",
    "etc/hostname": "",
    "etc/resolv.conf": "",
    "etc/nsswitch.conf": "hosts: files dns\n",
}


def find() -> tuple[str, str]:
    """The path of a static busybox of this host, and a word that changes when the program does; NotFound or HostError
    with the fix as hint."""
    dynamic = ""
    for path in _PLACES:
        if not os.path.isfile(path):
            continue
        with open(path, "rb") as file:
            if is_static(file.read(4096)):  # program headers follow the file header in what linkers write
                info = os.fstat(file.fileno())
                return path, f"{_LAYOUT}-{info.st_size:x}-{info.st_mtime_ns:x}"
        dynamic = path
    if dynamic:
        raise HostError(f"{dynamic} is linked against shared libraries, which the image would not have", hint=_HINT)
    raise NotFound("the built-in image needs a static busybox, and this host has none", _HINT)


def is_static(content: bytes) -> bool:
    """Whether an ELF program (64 bit, or 32) asks for no program interpreter (ELF specification, PT_INTERP)."""
    if content[:4] != b"\x7fELF":
        return False
    order = "<" if content[5] == 1 else ">"
    wide = content[4] == 2
    (offset,) = struct.unpack_from(f"{order}Q", content, 32) if wide else struct.unpack_from(f"{order}I", content, 28)
    size, count = struct.unpack_from(f"{order}2H", content, 54 if wide else 42)
    if offset + count * size > len(content):
        return False
    kinds = [struct.unpack_from(f"{order}I", content, offset + index * size)[0] for index in range(count)]
    return _PT_INTERP not in kinds


def build(program: str, root: str) -> None:
    """Fill the directory `root`: busybox, a symbolic link for each applet where it belongs, and system files."""
    import shutil
    import subprocess

    listing = subprocess.run([program, "--list-full"], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        raise HostError(f"{program} --list-full failed: {listing.stderr.strip()}", hint=_HINT)
    for path, mode in _DIRECTORIES.items():
        os.makedirs(f"{root}/{path}", exist_ok=True)
        os.chmod(f"{root}/{path}", mode)
    shutil.copyfile(program, f"{root}/bin/busybox")
    os.chmod(f"{root}/bin/busybox", 0o755)
    for applet in listing.stdout.split():
        link = f"{root}/{applet}"
        if applet in {"linuxrc", "bin/busybox"} or os.path.lexists(link):
            continue
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink("../" * applet.count("/") + "bin/busybox", link)
    for path, text in _FILES.items():
        with open(f"{root}/{path}", "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(f"{root}/{path}", 0o644)
