"""Private names of torch and Lightning stand in compat only, one function each, each used and each tested.

Private is what starts with one underscore: a module or name that is imported, and an attribute that no file of the
package defines, other than on self: what a base class leaves to its subclasses.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import lightning_largescale

PACKAGE = Path(lightning_largescale.__file__).parent
COMPAT = PACKAGE / "compat"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != COMPAT}
FOREIGN = {"torch", "lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
# Fields that the standard library documents under such a name.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_exit"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """Private names that a file makes: functions, classes, variables, and attributes that it sets on self."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return {name for name in found if private(name)}


def uses(tree: ast.AST, ours: set[str]) -> list[str]:
    """Private names of others that a file imports or reaches into, `ours` being those of the package."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if foreign(name.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [path for name in node.names if foreign(path := f"{node.module}.{name.name}")]
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours | DOCUMENTED:
            found += [] if ast.unparse(node.value) in ("self", "cls", "super()") else [ast.unparse(node)]
    # Operators are torch's public registry, and many bear such names.
    return [path for path in found if not re.search(r"\b_?(ops|aten)\.", path)]


def foreign(dotted: str) -> bool:
    """Whether it is another package's module or name, and private to it."""
    package, *rest = dotted.split(".")
    return package in FOREIGN and any(map(private, rest))


OURS = set().union(*(defined(ast.parse(path.read_text())) for path in FILES.values()))


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_only_in_compat(path):
    assert uses(ast.parse(path.read_text()), OURS) == []


def compat_names() -> list[str]:
    """Public functions, classes and names that compat offers."""
    names: list[str] = []
    for node in [node for path in COMPAT.glob("of_*.py") for node in ast.parse(path.read_text()).body]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


@functools.cache
def used_names() -> frozenset[str]:
    """Attributes, and what is imported by name, in all of the package."""
    words = [word for path in FILES.values() for word in ast.walk(ast.parse(path.read_text()))]
    attributes = {word.attr for word in words if isinstance(word, ast.Attribute)}
    imported = {alias.name for word in words if isinstance(word, ast.ImportFrom) for alias in word.names}
    return frozenset(attributes | imported)


@pytest.mark.parametrize("name", compat_names())
def test_each_is_used_and_tested(name):
    tests = (Path(__file__).parent / "test_compat.py").read_text()
    is_used, is_tested = name in used_names(), bool(re.search(rf"\b{name}\b", tests))
    assert is_used, f"nothing in the package uses compat.{name}"
    assert is_tested, f"tests/test_compat.py does not name {name}"


def test_a_breach_is_seen():
    imports = "import torch._C\nfrom lightning.x import _y, z\n"
    tree = ast.parse(imports + "module._modules\nself._base()\nself._mine = 1\nx._mine\nops.aten._a")
    assert uses(tree, defined(tree)) == ["torch._C", "lightning.x._y", "module._modules"]
