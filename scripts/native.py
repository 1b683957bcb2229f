"""Builds the small C programs of ovt into ovt/_bin, each only when something it is made of is newer.

Run by scripts/setup, and by setup.py for wheels and editable installs. It needs a C compiler and nothing else; the
compiler is $CC, or `cc`.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
HARDENING = ["-Wl,-z,noexecstack", "-Wl,--build-id=none"]

# They have no libc under them: no start files, no stack protector, no unwind tables.
FREESTANDING = [
    *["-static", "-nostdlib", "-nostartfiles", "-ffreestanding", "-fno-pie", "-no-pie", "-Os", "-fomit-frame-pointer"],
    *["-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-builtin", "-fcf-protection=none"],
    *["-Wl,-z,norelro", "-Wl,--gc-sections", "-s"],
]
# The guest's first process has one below it, for it knows users, interfaces and time; it is still to be small.
STATIC = [
    *["-static", "-fno-pie", "-no-pie", "-Os", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"],
    *["-fcf-protection=none", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-s"],
]
GUEST_PARTS = ("json", "launch", "process", "files", "system", "boot", "end", "agent")
GUEST = ["ovt/engine/vm/guest.c", *(f"ovt/engine/vm/guest_{part}.c" for part in GUEST_PARTS)]
# name: the source and what it includes, flags
PROGRAMS = {
    "ovt-init": (["ovt/engine/container/init.c"], FREESTANDING),
    "ovt-supervisor": (["ovt/engine/supervisor.c", "ovt/engine/freestanding.c"], FREESTANDING),
    "ovt-guest": (GUEST, STATIC),
    "ovt-runtime": (["ovt/launcher.c", "ovt/engine/freestanding.c"], FREESTANDING),
}


def compiler() -> list[str]:
    words = shlex.split(os.environ.get("CC", "cc"))
    if not shutil.which(words[0]):
        sys.exit(f"ovt: no C compiler `{words[0]}`\n  try: apt-get install --no-install-recommends gcc libc6-dev")
    return words


def flags_here(cc: list[str], flags: list[str]) -> list[str]:
    """The flags without those of another architecture: -fcf-protection exists on x86 alone."""
    machine = subprocess.run([*cc, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    return [f for f in flags if machine.startswith(("x86_64", "i686")) or not f.startswith("-fcf-protection")]


def build(root: Path = ROOT) -> list[Path]:
    """Compile what is stale below `root` and return the programs made; a failure ends the process with one line."""
    made = []
    missing = []
    for name, (source_names, flags) in PROGRAMS.items():
        sources, target = [root / source_name for source_name in source_names], root / "ovt/_bin" / name
        lacking = [str(source.relative_to(root)) for source in sources if not source.exists()]
        if lacking:
            missing += lacking
            continue
        newest = max(path.stat().st_mtime for path in (*sources, Path(__file__)))
        if target.exists() and target.stat().st_mtime >= newest:
            continue
        target.parent.mkdir(exist_ok=True)
        # A name of its own and a rename: the old program may be running, and two builds may meet.
        fresh = target.with_name(f".{name}.{os.getpid()}")
        cc = compiler()
        command = [*cc, *flags_here(cc, flags), *WARNINGS, *HARDENING, "-o", str(fresh), str(sources[0])]
        try:
            if subprocess.run(command).returncode:
                sys.exit(f"ovt: cannot compile {source_names[0]}\n  the command was: {shlex.join(command)}")
            fresh.chmod(0o755)
            fresh.rename(target)
        finally:
            fresh.unlink(missing_ok=True)
        made.append(target)
    if missing:
        sys.exit(f"ovt: the source tree is not complete, missing: {' '.join(missing)}")
    return made


if __name__ == "__main__":
    for program in build():
        print(f"built {program.relative_to(ROOT)}")
