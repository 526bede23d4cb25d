"""Imports inside the package: no circle and none upward, those inside functions included.

import-linter checks direction between subpackages. Within one, and between neighbours on a layer,
a circle can hide: behind an import in a function, or behind TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megadistill"
# `import megadistill` gives users what stands higher, and loads it when it is asked for.
LAZY = "megadistill"


@cache
def modules() -> dict[str, Path]:
    """Dotted name to file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in it the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules() else node.module)
    return found & modules().keys()


def graph() -> dict[str, set[str]]:
    return {name: imported(path) - {name} for name, path in modules().items() if name != LAZY}


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """The names of a circle, its first one again at its end; None where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges.get(name, ())):
            found = visit(other, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    for name in sorted(edges):
        found = visit(name, [])
        if found:
            return found
    return None


def test_no_circle_in_a_graph_without_one_and_the_circle_of_a_graph_with_one():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_two_modules_import_each_other_not_even_inside_functions():
    found = circle(graph())
    assert found is None, " -> ".join(found or [])


def test_no_module_imports_from_a_higher_layer():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in settings["contracts"] if c["type"] == "layers")
    height = {name.strip(): -number for number, row in enumerate(layers) for name in row.split(":")}
    wrong = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if other != LAZY and height[name.split(".")[1]] < height[other.split(".")[1]]
    ]
    assert not wrong
