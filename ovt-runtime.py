#!/usr/bin/python3 -ISXutf8
# What ovt-runtime (ovt/launcher.c) becomes where it needs Python: finds the package, loads it, leaves without farewell.
# (The package comes from ovt/_bin/TAG.code where scripts/setup has made that, see ovt/precompiled.py.)
# -I -S: nothing is ever imported from the caller's directory, PYTHONPATH or site-packages; only the package `ovt`,
# found from this file's own real path, is added. Compiled on every call, so every line costs; 0.4 ms over bare Python.
import gc
import marshal
import posix
import sys
from _frozen_importlib import _load
from _frozen_importlib_external import spec_from_file_location

gc.disable()  # a call lives for milliseconds; collections would take a tenth of them


def find(prefix):
    for python in ("python{}.{}".format(*sys.version_info), *posix.listdir(prefix + "/lib")):
        for kind in "site", "dist":
            packages = f"{prefix}/lib/{python}/{kind}-packages"
            try:
                names = posix.listdir(packages)
            except OSError:
                continue
            if "ovt" in names:
                return packages + "/ovt"
            for name in names:
                if name.startswith("__editable__.ovt-") and name.endswith(".pth"):
                    pth = posix.open(packages + "/" + name, posix.O_RDONLY | posix.O_CLOEXEC)
                    source = str(posix.read(pth, 4096), "utf-8").split("\n")[0]
                    posix.close(pth)
                    return source + "/ovt"
    sys.exit(f"ovt-runtime: no package ovt below {prefix}/lib; run scripts/setup or pip install")


fd = posix.open(__file__, posix.O_PATH | posix.O_CLOEXEC)
here = posix.readlink(f"/proc/self/fd/{fd}")  # the script, with every symbolic link on the way resolved
posix.close(fd)
if sys.version_info < (3, 11) or not sys.flags.isolated:
    python = here.rsplit("/", 1)[0] + "/python3" if sys.version_info < (3, 11) else sys.executable
    posix.execv(python, [python, "-ISXutf8", here, *sys.argv[1:]])
package = find(here.rsplit("/", 2)[0])
try:
    precompiled = posix.open(f"{package}/_bin/{sys.implementation.cache_tag}.code", posix.O_RDONLY | posix.O_CLOEXEC)
except FileNotFoundError:
    precompiled = 0
if precompiled > 2:  # below that, a caller's closed stdin is meant
    boot, index = marshal.loads(posix.pread(precompiled, 16384, 0))
    namespace = {"__name__": "ovt.precompiled"}
    exec(boot, namespace)  # noqa: S102
    namespace["install"](precompiled, index, package)
if "ovt" not in sys.modules:
    _load(spec_from_file_location("ovt", package + "/__init__.py", submodule_search_locations=[package]))
from ovt.runtime import main  # noqa: E402

status = main()
sys.stdout.flush()
posix._exit(status)
