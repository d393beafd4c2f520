"""How the project is laid out: the lists of modules agree, no imports in a circle, and the rooms stay small."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness import HERE, Broker
from vendor import MODULES

LIMITS = {ast.Module: 500, ast.ClassDef: 250, ast.FunctionDef: 40, ast.AsyncFunctionDef: 40}


def tree(name: str) -> ast.Module:
    return ast.parse((HERE / name).read_text())


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported, which is all but the functions' bodies."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the modules of ours among the imports, as neighbours or from inside a package."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.name for alias in node.names)
    return {f"{name}.py" for name in names} & set(MODULES)


def too_long(name: str) -> Iterator[str]:
    if len((HERE / name).read_text().splitlines()) > LIMITS[ast.Module]:
        yield name

    def rooms(node: ast.AST, place: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inside = place
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{place}.{child.name}".removeprefix(".")
                if child.end_lineno - child.lineno + 1 > LIMITS[type(child)]:
                    yield f"{name}: {inside}"
            yield from rooms(child, inside)

    yield from rooms(tree(name), "")


def test_lists_of_modules_agree() -> None:
    # Only since Python 3.11.
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    package = {"vendored/__init__.py": "aiida_namedpipe/__init__.py"}
    assert wheel == package | {name: f"aiida_namedpipe/{name}" for name in MODULES}
    assert sorted(project["tool"]["mypy"]["files"]) == sorted([*MODULES, "vendor.py"])


def test_every_module_is_listed_once() -> None:
    others = {"conftest.py", "demo.py", "vendor.py", "test_pipebroker.py"}
    assert sorted(MODULES) == sorted({path.name for path in HERE.glob("*.py")} - others)


def test_no_module_has_the_name_of_one_of_the_standard_library() -> None:
    # Beside a script, one of them would hide the other. `pipes` was one until Python 3.13.
    assert {name.removesuffix(".py") for name in MODULES} & {*sys.stdlib_module_names, "pipes"} == set()


def test_no_circle_of_imports() -> None:
    graph = {name: imported(at_import(tree(name))) for name in MODULES}
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_the_same_beside_a_script_and_in_a_package(name: str) -> None:
    """Each import of ours stands twice, and only one of the two runs."""
    flat, relative = set(), set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            flat |= imported(iter([node]))
        elif isinstance(node, ast.ImportFrom):
            relative |= imported(iter([node]))
    assert flat == relative


def test_rooms_stay_small() -> None:
    assert {place for name in (*MODULES, "vendor.py") for place in too_long(name)} == set()


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.check_output(command, cwd=HERE, stderr=subprocess.STDOUT, text=True)


def test_what_an_operator_asks_is_quick_to_import() -> None:
    slow = {"kiwipy", "aiida", "pipebroker", "coordinator", "sharing"}
    script = f"import sys, control_line; print(*sorted({slow} & {{*sys.modules}}))"
    assert run(script) == "\n"


def test_the_script_loads_what_serves_where_it_is_to_serve() -> None:
    script = """
import runpy, sys
try:
    runpy.run_path("coordinator.py", run_name="__main__")
except SystemExit as end:
    print(end.code, "sharing" in sys.modules)
import coordinator, sharing
print(coordinator.PipeCoordinator is sharing.PipeCoordinator, hasattr(coordinator, "other"))
"""
    assert run(script, "--version").splitlines()[1:] == ["0 False", "True False"]


def test_the_script_that_serves_is_loaded_once(served: Broker) -> None:
    script = """
import runpy, sys
try:
    runpy.run_path("coordinator.py", run_name="__main__")
except SystemExit as end:
    print(end.code, "control" in sys.modules, "coordinator" in sys.modules)
"""
    # Another one runs, so it ends at once.
    said = run(script, "--profile", served.profile, "--config-path", served.config_path)
    assert "is running already" in said and said.endswith("\n1 True False\n")
