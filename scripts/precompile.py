"""Writes the byte code of what ovt-runtime may load into one file, ovt/_bin/TAG.code (see ovt/precompiled.py).

Run by scripts/setup with /usr/bin/python3, whose byte code it is; made anew only when a source has changed. What the
runtime never looks at is left out: docstrings, assertions, annotations, imports for the type checker. It is for a
source tree: a wheel has none, as the times of its files are those of the installation.
"""

import ast
import marshal
import os
import sys
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parent.parent
# The machines' side of the project; which of its modules a verb loads is its own business.
MODULES = ("*.py", "runtime_verbs/*.py", "engine/__init__.py", "engine/container/*.py", "kernel/**/*.py")
PEOPLE = {"exits", "host", "journal", "leftovers", "model", "store"}
BOOT = "ovt.precompiled"


class Strip(ast.NodeTransformer):
    """Removes annotations, `from __future__ import` (only annotations need it here) and `if TYPE_CHECKING:`."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value else ast.Pass()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        return None if node.module == "__future__" else node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or [ast.Pass()]
        return node


def code_of(path: Path) -> CodeType:
    tree = ast.fix_missing_locations(Strip().visit(ast.parse(path.read_bytes(), path)))
    code = compile(tree, path, "exec", dont_inherit=True, optimize=2)
    assert isinstance(code, CodeType)
    return code


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def facts(path: Path) -> tuple[bool, int, int]:
    return path.name == "__init__.py", path.stat().st_mtime_ns, path.stat().st_size


def found(target: Path, header: int) -> dict[str, tuple[bool, int, int]]:
    """What the file there was made from; nothing when there is none or it is damaged."""
    try:
        _, index = marshal.loads(target.read_bytes()[:header])
    except (FileNotFoundError, EOFError, ValueError, TypeError):
        return {}
    return {name: entry[:3] for name, entry in index.items()}


def main() -> None:
    paths = sorted({path for pattern in MODULES for path in (ROOT / "ovt").glob(pattern)})
    sources = {module_name(path): path for path in paths if path.parent != ROOT / "ovt" or path.stem not in PEOPLE}
    wanted = {name: facts(path) for name, path in sources.items()}
    target = ROOT / f"ovt/_bin/{sys.implementation.cache_tag}.code"
    namespace: dict[str, int] = {}
    exec(code_of(sources[BOOT]), namespace)  # noqa: S102
    header = namespace["HEADER"]
    if found(target, header) == wanted:
        return
    index, body, offset = {}, [], header
    for name in wanted:
        body.append(marshal.dumps(code_of(sources[name])))
        index[name] = (*wanted[name], offset, len(body[-1]))
        offset += len(body[-1])
    head = marshal.dumps((code_of(sources[BOOT]), index))
    if len(head) > header:
        sys.exit(f"ovt: the index of {target.name} is {len(head)} bytes, more than HEADER in ovt/precompiled.py")
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(b"".join([head.ljust(header, b"\0"), *body]))
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(target)
    print(f"built {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
