"""Docstrings begin with a noun or an imperative, never a relative clause, and explain many arguments one by one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import lightning_largescale

PACKAGE = Path(lightning_largescale.__file__).parent
RELATIVE = re.compile(r"(What|Whether|Which|Those|That|Where|When|Of|As|Within|It|Likewise|The same)\b")
# The number of parameters from which on a docstring explains each under Args: of the public API, of other functions.
EXPORTED, OTHER = 2, 3
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Functions and classes whose arguments are still to be explained; the list only shrinks.
UNEXPLAINED = {
    "Point",
    "Sizes",
    "all_reduce_seconds",
    "apply_styles",
    "beside_transfers",
    "buffer_bytes",
    "make_again",
    "map_arguments",
    "memory_of",
    "moments_bytes",
    "reduce_scatter_seconds",
    "sparse_rows",
    "time_of",
    "transfers",
    "would_fit",
}


def relative_summaries(tree: ast.AST) -> list[str]:
    """Summaries of docstrings that begin with a relative clause or a pronoun."""
    found = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and RELATIVE.match(text):
            found.append(f"{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters, without private ones and those whose name Python's conventions explain."""
    taken = function.args
    every = (*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg)
    names = [one.arg for one in every if one is not None]
    return [name for name in names if name not in ("self", "cls", "args", "kwargs") and not name.startswith("_")]


def callables(tree: ast.Module, exported: set[str]) -> Iterator[tuple[str, ast.FunctionDef, str, int]]:
    """Public functions, constructors, and methods of exported classes, as (name, node, docstring, EXPORTED/OTHER)."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text, many = ast.get_docstring(node) or "", EXPORTED if node.name in exported else OTHER
        if isinstance(node, ast.FunctionDef):
            # "Implement `Hardware.detect`": that one explains them.
            if not text.startswith("Implement `"):
                yield node.name, node, text, many
            continue
        for method in node.body:
            if not isinstance(method, ast.FunctionDef):
                continue
            own = ast.get_docstring(method) or ""
            if method.name == "__init__":
                yield node.name, method, f"{text}\n{own}", many
            overrides = any(ast.unparse(decorator) == "override" for decorator in method.decorator_list)
            if node.name in exported and not method.name.startswith("_") and not overrides:
                yield f"{node.name}.{method.name}", method, own, many


def unexplained(tree: ast.Module, exported: set[str]) -> set[str]:
    """Names of the callables that have many parameters, one of which is not explained."""
    return {
        name
        for name, function, text, many in callables(tree, exported)
        if len(parameters(function)) >= many
        and not all(re.search(rf"^ *\**{one}: ", text, re.MULTILINE) for one in parameters(function))
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_summaries_name_the_thing_or_say_what_is_done(path):
    assert not relative_summaries(ast.parse(path.read_text()))


def test_a_breach_is_seen():
    code = '"""What it is."""\ndef f():\n    """Return the size."""\nclass A:\n    """Those of all."""\n'
    assert relative_summaries(ast.parse(code)) == ["1: What it is.", "4: Those of all."]


def test_many_arguments_are_explained():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= unexplained(ast.parse(path.read_text()), set(lightning_largescale.__all__))
    assert found == UNEXPLAINED


def test_an_argument_that_is_not_explained_is_seen():
    code = """
        def three(a, b, *c): "Add."
        def explained(a, b, *c):
            '''Add.

            Args:
                a: The first.
                b: The second.
                *c: The others.
            '''
        def two(a, b): "Add."
        def _private(a, b, c): "Add."
        class Users:
            def __init__(self, a, b): "Keep."
            def method(self, a, b): "Add."
            @override
            def inherited(self, a, b): "Add."
            def one(self, a): "Add."
        class Other:
            def __init__(self, a, b, c): "Keep."
            def method(self, a, b, c): "Add."
    """
    assert unexplained(ast.parse(dedent(code)), {"Users"}) == {"three", "Users", "Users.method", "Other"}
