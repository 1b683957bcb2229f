"""The runtime's modules out of one file of byte code: a search and a file for each of them cost twice as much.

`ovt-runtime.py` calls `install` when scripts/setup (scripts/precompile.py) has made such a file. A module whose source
has changed since is imported in the ordinary way, so the file may be out of date or absent without harm. It is for that
short-lived, single-threaded program only: the locks by which threads wait for one another's imports are left out.
"""

import _frozen_importlib as importlib
import posix
import sys
from marshal import loads

HEADER = 16384  # bytes; in it the marshalled (this module's code, index), from there on the modules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    # module: (is a package, mtime of the source in ns, its size in bytes, offset in the file, length in bytes)
    Index = dict[str, tuple[bool, int, int, int, int]]


def install(fd: int, index: "Index", package: str) -> None:
    """Load `ovt`, and from now on what `index` names, from `fd`, which stays open; `package` is the directory of `ovt`.

    Nothing is done when this module or `ovt/__init__.py` has changed since the file was made.
    """
    ordinary: Callable[[str, Callable[[str], object]], ModuleType] = importlib._find_and_load  # type: ignore[attr-defined]
    top = package.rpartition("/")[0]
    modules = sys.modules
    new_module = type(sys)
    new_spec = importlib.ModuleSpec

    def source(name: str) -> str:
        """Its path; nothing when it is not in the file, or has changed."""
        if name not in index:
            return ""
        is_package, mtime, size, _, _ = index[name]
        path = f"{top}/{name.replace('.', '/')}{'/__init__.py' if is_package else '.py'}"
        status = posix.stat(path)
        return path if status.st_mtime_ns == mtime and status.st_size == size else ""

    def find_and_load(name: str, import_: "Callable[[str], object]") -> "ModuleType":
        file = source(name)
        if not file or name in modules:
            return ordinary(name, import_)
        is_package, _, _, offset, length = index[name]
        parent, _, child = name.rpartition(".")
        if parent and parent not in modules:
            import_(parent)
            if name in modules:
                return modules[name]
        module = new_module(name)
        spec = module.__spec__ = new_spec(name, None, origin=file, is_package=is_package)
        module.__file__ = file
        module.__package__ = parent
        if is_package:
            module.__package__ = name
            module.__path__ = spec.submodule_search_locations = [file[: -len("/__init__.py")]]
        modules[name] = module
        try:
            exec(loads(posix.pread(fd, length, offset)), module.__dict__)  # noqa: S102
        except BaseException:
            del modules[name]
            raise
        if parent:
            setattr(modules[parent], child, module)
        return module

    if source(__name__) and source("ovt"):
        # What C calls for every module not loaded yet. A finder on sys.meta_path would do, for 0.5 ms more a run.
        importlib._find_and_load = find_and_load  # type: ignore[attr-defined]
        find_and_load("ovt", __import__)
