"""The arrows of the architecture, held over the import graph as written: no code is run.

cli → host → engine, image, network → kernel
runtime → engine/container → kernel
ovt → ovf, sriov, power, which know neither ovt nor one another
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("ovf", "sriov", "power")

# area of ovt → the areas it may import, besides itself, `ovt` (the version) and the errors
MAY_IMPORT = {
    "errors": set(),
    "kernel": set(),
    "hardware_spec": set(),  # the part of model that is about virtual machines
    "model": {"hardware_spec"},
    "store": {"model", "kernel"},
    "roots": set(),
    "journal": {"model", "kernel"},
    "exits": {"host", "model", "store", "journal", "engine", "kernel"},  # the other half of host, after a guest's end
    "events": {"host", "model", "store", "journal"},  # the journal and the machines' own events
    "leftovers": {"host", "model", "store", "engine", "machines"},  # another half of host: what killed commands left
    "machines": {"host", "model", "store", "journal", "exits", "engine", "image", "kernel"},  # host, for machines alone
    "image": {"model", "kernel"},
    "network": {"model", "kernel"},
    "engine": {"model", "kernel", "image", "network"},
    "runtime": {"engine", "kernel"},
    "host": {
        "model",
        "store",
        "roots",
        "journal",
        "exits",
        "events",
        "leftovers",
        "engine",
        "image",
        "network",
        "kernel",
    },
    "cli": {"host", "model", "store", "engine", "image", "network", "machines"},
}

# ovt-runtime is started three to five times per container. What its own modules name, in a function or not, and all
# that those load in turn is hot: what a hot module imports when it is loaded is budgeted. Anything else is imported
# inside the function that needs it.
HOT_BUDGET = {
    *("posix", "sys", "builtins", "time", "errno", "fcntl", "select", "gc", "marshal", "__future__"),
    *("_ctypes", "_json", "_socket", "_struct", "_signal", "_posixsubprocess", "_imp", "_blake2"),
}


class Import(NamedTuple):
    importer: str
    target: str
    line: int
    at_load: bool  # runs when the module is loaded, not inside a function and not only for the type checker

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(source: str, name: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """Every import of one module; `from package import x` is an import of package.x where that is a module."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and is_type_checking(child):
                for part in child.body:
                    yield from visit(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), at_load)
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, alias.name, child.lineno, at_load)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = name.split(".")[: len(name.split(".")) - child.level + is_package]
                    base = ".".join([*parents, *([base] if base else [])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield Import(name, full if full in known else base, child.lineno, at_load)
            yield from visit(child, at_load and not inside)

    return visit(ast.parse(source), True)


def modules() -> dict[str, Path]:
    return {module_name(p): p for top in ("ovt", *LIBRARIES) for p in sorted((ROOT / top).rglob("*.py"))}


@pytest.fixture(scope="module")
def graph() -> list[Import]:
    paths = modules()
    known = set(paths)
    found: list[Import] = []
    for name, path in paths.items():
        found += imports_of(path.read_text(), name, path.name == "__init__.py", known)
    return found


def area(module: str) -> str:
    second = module.split(".")[1] if "." in module else ""
    return "runtime" if second.startswith("runtime") else second


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def hot_modules(graph: list[Import]) -> set[str]:
    hot = {i.importer for i in graph if area(i.importer) == "runtime"}
    reached = {i.target for i in graph if i.importer in hot} | hot
    while reached - hot:
        hot |= reached
        reached = {i.target for i in graph if i.importer in hot and i.at_load}
    parents = {name.rpartition(".")[0] for name in hot if within(name, "ovt.engine") or within(name, "ovt.kernel")}
    return {name for name in hot | parents if within(name, "ovt")}


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import a.b, c\nfrom . import sibling\nfrom .other import name\nfrom top import mod\n"
        "if TYPE_CHECKING:\n    import typing\nelse:\n    import real\n"
        "def f():\n    import late\nclass C:\n    import early\ntry:\n    import tried\nexcept ImportError:\n    pass\n"
    )
    seen = {(i.target, i.at_load) for i in imports_of(source, "pkg.me", False, {"pkg.sibling", "top.mod"})}
    assert seen == {
        *[("a.b", True), ("c", True), ("pkg.sibling", True), ("pkg.other", True), ("top.mod", True)],
        *[("typing", False), ("real", True), ("late", False), ("early", True), ("tried", True)],
    }


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_stand_alone(graph: list[Import], library: str) -> None:
    others = {"ovt", *LIBRARIES} - {library}
    assert [str(i) for i in graph if within(i.importer, library) and i.target.split(".")[0] in others] == []


def test_ovt_uses_only_the_public_parts_of_the_libraries(graph: list[Import]) -> None:
    uses = [i for i in graph if within(i.importer, "ovt") and i.target.split(".")[0] in LIBRARIES]
    assert [str(i) for i in uses if any(part.startswith("_") for part in i.target.split("."))] == []


def test_arrows_inside_ovt_run_one_way(graph: list[Import]) -> None:
    wrong = []
    for i in graph:
        if not (within(i.importer, "ovt") and within(i.target, "ovt")):
            continue
        here, there = area(i.importer), area(i.target)
        if here in ("", "__main__"):
            continue
        assert here in MAY_IMPORT, f"{i.importer}: a new part of ovt; give it a line in MAY_IMPORT"
        if there not in {here, "", "errors", *MAY_IMPORT[here]}:
            wrong.append(str(i))
    assert wrong == []


def test_the_kernel_needs_only_the_standard_library(graph: list[Import]) -> None:
    outside = [i for i in graph if within(i.importer, "ovt.kernel") and not within(i.target, "ovt")]
    assert [str(i) for i in outside if i.target.split(".")[0] not in sys.stdlib_module_names] == []


def test_the_runtime_knows_nothing_of_people(graph: list[Import]) -> None:
    allowed = ("ovt.engine.container", "ovt.kernel", "ovt.errors")
    hot = hot_modules(graph)
    assert "ovt.errors" in hot
    inside = [i for i in graph if i.importer in hot and within(i.target, "ovt") and i.at_load]
    others = [i for i in inside if i.target not in ("ovt", "ovt.engine") and area(i.target) != "runtime"]
    assert [str(i) for i in others if not any(within(i.target, a) for a in allowed)] == []


def test_hot_modules_load_only_what_is_budgeted(graph: list[Import]) -> None:
    hot = hot_modules(graph)
    loads = [i for i in graph if i.importer in hot and i.at_load and i.target not in HOT_BUDGET]
    assert [str(i) for i in loads if not within(i.target, "ovt")] == []
