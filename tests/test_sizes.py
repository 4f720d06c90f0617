"""Sizes of the package's code: a module of more than 400 lines, or a function of more than 60, has two subjects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_largescale

PACKAGE = Path(lightning_largescale.__file__).parent
MODULE_LINES, FUNCTION_LINES = 400, 60

# Modules, and functions as module:function, that are still to be split; the list only shrinks.
STILL = {
    "planner/search:find_plans",
    "strategy",
}


def too_long(name: str, text: str) -> set[str]:
    """The module of this name and text if it is too long, and its functions that are."""
    found = {name} if text.count("\n") > MODULE_LINES else set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(node.lineno, *(one.lineno for one in node.decorator_list), node.lineno)
            if (node.end_lineno or first) - first + 1 > FUNCTION_LINES:
                found.add(f"{name}:{node.name}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_are_short(path):
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    assert too_long(name, path.read_text()) == {one for one in STILL if one.partition(":")[0] == name}


def test_a_breach_is_seen():
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES
    assert too_long("m", function) == {"m:f"}
    assert too_long("m", "def f():\n    pass\n" * 200) == set()
    assert too_long("m", "pass\n" * (MODULE_LINES + 1)) == {"m"}
