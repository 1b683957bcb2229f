"""netdevsim for the lab host: the kernel's simulated network device, which Debian's kernels come without.

It has what no emulated NIC has: 256 VFs with every VF attribute, an eswitch with representors, channels and rings. It
is built once for the lab's kernel, out of the distribution's own source and header packages of the same version: apt
fetches and verifies them, nothing is installed, and only the module stays on disk, below `extra` in the lab's module
tree, where modprobe finds it. Not a general builder of modules.

It is optional. Where it cannot be built, the reason is left beside the place of the module; that place is visible in
the lab host, so the tests there can say why they are skipped (`why_missing`).
"""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.lab import packages
from tests.lab.packages import Kernel, Unavailable

SOURCES = "/drivers/net/netdevsim/"
TOOLS = {"make": "make", "gcc": "gcc", "ld": "binutils", "dpkg-deb": "dpkg"}
# Without debugging information it is 300 KB instead of 7 MB, and takes two thirds of the time; BTF would need pahole.
SETTINGS = ("CONFIG_NETDEVSIM=m", "CONFIG_DEBUG_INFO=", "CONFIG_DEBUG_INFO_BTF_MODULES=")


def module(modules: Path) -> Path:
    """Where the module is, or would be, in a module tree (/lib/modules/VERSION)."""
    return modules / "extra/netdevsim.ko"


def why_missing(modules: Path) -> str | None:
    """Why a module tree has no netdevsim; None if it has it."""
    if module(modules).exists():
        return None
    reason = module(modules).with_suffix(".missing")
    return reason.read_text() if reason.exists() else "it was never built: run scripts/lab fetch"


def build(kernel: Kernel, note: Callable[[str], None]) -> Path:
    """The module for this kernel, built if it is not there yet. Raises Unavailable. `note` hears about long work."""
    built = module(kernel.modules)
    built.parent.mkdir(exist_ok=True)
    reason = built.with_suffix(".missing")
    with packages.locked("netdevsim"):
        if not built.exists():
            for left in packages.cache().glob(".netdevsim-*"):  # by a build that was killed
                shutil.rmtree(left)
            try:
                with tempfile.TemporaryDirectory(dir=packages.cache(), prefix=".netdevsim-") as directory:
                    fresh = make(kernel, Path(directory), note)
                    fresh.chmod(0o644)
                    fresh.rename(built)
            except Unavailable as error:
                reason.write_text(str(error))
                raise
            reason.unlink(missing_ok=True)
        if built.stat().st_mtime_ns > (kernel.modules / "modules.dep").stat().st_mtime_ns:
            packages.depmod(kernel.directory, kernel.version)
    return built


def make(kernel: Kernel, place: Path, note: Callable[[str], None]) -> Path:
    """Fetch, unpack and compile in an empty directory."""
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        raise Unavailable(f"netdevsim cannot be built without the Debian packages {' '.join(missing)}")
    note("fetching the kernel's headers and source for netdevsim (about 170 MB, once)")
    try:
        fetched = fetch(kernel, place)
    except Unavailable:
        with packages.locked("kernel"):  # whose fetching updates the same lists
            packages.update()  # they may be older than the archive
        fetched = fetch(kernel, place)
    note("building netdevsim (about half a minute, once)")
    source = fetched.pop()
    unpack_source(source, place / "netdevsim")
    source.unlink()
    for package in fetched:
        call("dpkg-deb", "--extract", package, place)
    return compile_module(kernel, place)


def fetch(kernel: Kernel, place: Path) -> list[Path]:
    """The packages that it takes; the source is the last."""
    for old in place.glob("*.deb"):
        old.unlink()
    try:
        headers = packages.download(f"linux-headers-{kernel.version}", place)
        # They name the packages that complete them, and their version is the source's.
        version = call("dpkg-deb", "--field", headers, "Version").strip()
        others = re.findall(r"linux-(?:headers|kbuild)-[^\s,]+", call("dpkg-deb", "--field", headers, "Depends"))
        series = re.match(r"\d+\.\d+", version)
        if not series:
            raise Unavailable(f"{headers.name} has a version that is not a kernel's: {version}")
        return [
            headers,
            *(packages.download(name, place) for name in others),
            packages.download(f"linux-source-{series[0]}={version}", place),
        ]
    except Unavailable as error:
        raise Unavailable(
            f"netdevsim cannot be built for {kernel.version}: {error}\n"
            f"If Debian has a newer kernel by now, remove {kernel.directory}: the next start fetches it."
        ) from None


def unpack_source(package: Path, target: Path) -> None:
    """Take the module's sources out of linux-source-X.Y, which holds all of the kernel as a compressed archive."""
    target.mkdir()
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as contents:
            archive = next((contents.extractfile(entry) for entry in contents if entry.name.endswith(".tar.xz")), None)
            if archive is None:
                raise Unavailable(f"{package.name} holds no kernel source")
            with tarfile.open(fileobj=archive, mode="r|xz") as tree:
                found = False
                for entry in tree:
                    wanted = SOURCES in entry.name
                    if found and not wanted:
                        break  # the archive is sorted, and the half that follows takes seconds to decompress
                    if wanted and (file := tree.extractfile(entry)):
                        found = True
                        (target / entry.name.partition(SOURCES)[2]).write_bytes(file.read())
        process.kill()  # it is still writing what nobody reads
    if not found:
        raise Unavailable(f"{package.name} holds no{SOURCES}")


def compile_module(kernel: Kernel, place: Path) -> Path:
    headers = place / "usr/src" / f"linux-headers-{kernel.version}"
    # Debian's headers find their other half by an absolute path: they expect to be installed.
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace(" /usr/src/", f" {place}/usr/src/"))
    # The compiler that made the kernel is preferred. A newer one serves as well, an older one lacks options.
    named = re.search(r"\bgcc-\d+\b", (headers / ".kernelvariables").read_text())
    maker = named[0] if named else "gcc"
    compiler = maker if shutil.which(maker) else "gcc"
    jobs = f"-j{os.cpu_count() or 1}"
    try:
        call("make", "-C", headers, f"M={place / 'netdevsim'}", f"CC={compiler}", *SETTINGS, jobs, "modules")
    except Unavailable as error:
        hint = f" (the kernel was made by {maker}, which is not installed)" if compiler != maker else ""
        raise Unavailable(f"netdevsim does not compile{hint}: {error}") from None
    return place / "netdevsim/netdevsim.ko"


def call(program: str, *arguments: str | Path) -> str:
    """Run a tool in an environment that says nothing to make, and return its output."""
    command = [program, *map(str, arguments)]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{program} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout
