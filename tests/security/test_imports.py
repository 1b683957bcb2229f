"""CVE-2019-14271: nothing is imported, loaded or looked up from the container's root once it is the root."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Bundle, Oci
from tests.security.conftest import Create, compile_c, naive_python, refused

pytestmark = pytest.mark.root

STDLIB = Path(f"/usr/lib/python{sys.version_info[0]}.{sys.version_info[1]}")
LIBRARIES = ["libnss_files.so.2", "libnss_compat.so.2", "libnss_dns.so.2", "libc.so.6", "libm.so.6", "libseccomp.so.2"]
LIBRARIES += ["libgcc_s.so.1", "libdl.so.2", "libz.so.1", "libexpat.so.1", "libffi.so.8", "ld-linux-x86-64.so.2"]
CONFIGURATION = ["nsswitch.conf", "ld.so.preload", "ld.so.cache", "locale.alias", "gai.conf", "resolv.conf"]
TRAP = """
import posix
posix.close(posix.open("/imported", posix.O_CREAT | posix.O_WRONLY, 0o666))
posix.close(posix.open({mark!r}, posix.O_CREAT | posix.O_WRONLY, 0o666))
"""
LIBRARY = """
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void)
{
	close(open("/loaded", O_CREAT | O_WRONLY, 0666));
	close(open(MARK, O_CREAT | O_WRONLY, 0666));
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a shared library that leaves marks when it is loaded, its mark on the host)."""
    place = tmp_path_factory.mktemp("library")
    source = place / "trap.c"
    source.write_text(LIBRARY)
    mark = place / "mark"
    return compile_c(source, place / "trap.so", "-shared", "-fPIC", f'-DMARK="{mark}"'), mark


class Trap:
    """A root filesystem in which every module and library that a runtime could want leaves a mark when it is used."""

    def __init__(self, rootfs: Path, library: tuple[Path, Path]) -> None:
        self.rootfs = rootfs
        self.host_mark = rootfs.parent / "imported-on-the-host"
        self.library_mark = library[1]
        code = TRAP.format(mark=str(self.host_mark))
        for top in (STDLIB, ROOT / "ovt"):
            target = rootfs / str(top)[1:]
            for place, directories, files in os.walk(top):
                here = target / os.path.relpath(place, top)
                directories[:] = [d for d in directories if d not in ("__pycache__", "test", "tests", "_bin")]
                here.mkdir(parents=True, exist_ok=True)
                for name in files:
                    if name.endswith(".py"):
                        (here / name).write_text(code)
        for directory in ("lib", "lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib"):
            (rootfs / directory).mkdir(parents=True, exist_ok=True)
            for name in LIBRARIES:
                shutil.copy(library[0], rootfs / directory / name)
        for name in CONFIGURATION:
            (rootfs / "etc" / name).write_text(f"/lib/{LIBRARIES[0]}\n")

    def marks(self) -> list[Path]:
        places = [self.rootfs / "imported", self.rootfs / "loaded", self.host_mark, self.library_mark]
        return [place for place in places if place.exists()]


@pytest.fixture
def writable() -> dict[str, Any]:
    return {"root": {"readonly": False}}


def test_cve_2019_14271_the_trap_is_set(bundle: Bundle, library: tuple[Path, Path]) -> None:
    """A Python that changed its root and only then imports a module, or loads a library, does leave the marks."""
    trap = Trap(bundle("true") / "rootfs", library)
    late_import = "import os,sys\nos.chroot(sys.argv[1])\nos.chdir('/')\nimport calendar\n"
    naive_python(late_import, trap.rootfs)
    assert trap.marks() == [trap.rootfs / "imported"]
    (trap.rootfs / "imported").unlink()
    late_load = "import os,sys,_ctypes\nos.chroot(sys.argv[1])\nos.chdir('/')\n_ctypes.dlopen('libnss_files.so.2', 2)\n"
    naive_python(late_load, trap.rootfs)
    assert trap.marks() == [trap.rootfs / "loaded"]


@pytest.mark.parametrize(
    "what", ["success", "no such program", "a directory", "no working directory", "bad passwd", "sysctl", "no right"]
)
def test_cve_2019_14271_create_and_start(
    oci: Oci, bundle: Bundle, container_id: str, library: tuple[Path, Path], writable: dict[str, Any], what: str
) -> None:
    """All ways through the runtime on which something happens after the mounts, above all the errors."""
    program, config = "true", writable
    if what == "no such program":
        program = "/missing"
    elif what == "a directory":
        program = "/etc"
    elif what == "no working directory":
        config = {**config, "process": {"cwd": "/etc/passwd/x"}}
    elif what == "sysctl":
        config = {**config, "linux": {"sysctl": {"net.ipv4.no_such_parameter": "1"}}}
    elif what == "no right":
        config = {**config, "process": {"user": {"uid": 1000, "gid": 1000}, "cwd": "/closed"}}
    place = bundle(program, config=config)
    trap = Trap(place / "rootfs", library)
    (place / "rootfs/closed").mkdir(mode=0o700)
    if what == "bad passwd":
        (place / "rootfs/etc/passwd").write_bytes(b"\xff\xfe:\xe9:0:\n\xff")
    done = oci("run", "-b", place, container_id)
    if what in ("success", "bad passwd"):
        assert done.returncode == 0, done.stderr
    elif what != "no right":  # root without CAP_DAC_OVERRIDE still owns that directory
        refused(done)
    assert trap.marks() == []


def test_cve_2019_14271_everything_else(
    oci: Oci, bundle: Bundle, create: Create, library: tuple[Path, Path], writable: dict[str, Any]
) -> None:
    """exec with every flag that makes it look something up, ps, update, events, pause, kill, delete; hooks inside."""
    place = bundle("sleep", "60", config=writable)
    trap = Trap(place / "rootfs", library)
    container = create(place).start()
    for arguments in (
        ["exec", "--user", "1000:1000", "--cwd", "/tmp", "--env", "A=\u00e9", container.id, "true"],
        ["exec", "--tty", container.id, "true"],
        ["exec", container.id, "missing"],
        ["exec", "--cwd", "/missing", container.id, "true"],
        ["ps", container.id],
        ["update", "--pids-limit", "50", container.id],
        ["events", "--stats", container.id],
        ["pause", container.id],
        ["resume", container.id],
        ["kill", container.id, "KILL"],
    ):
        oci(*arguments)
    assert trap.marks() == []
