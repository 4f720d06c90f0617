"""Names of the package: a class or a module is called what no other is, so that a reader knows which is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_largescale"

# The modules that each technique's folder may have.
OF_A_TECHNIQUE = ("fields", "price", "apply")


def repeated(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Of pairs of a name and a place, the places of each name that has several, leading underscores aside."""
    places = defaultdict(list)
    for name, place in named:
        places[name.lstrip("_")].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def classes(path: Path) -> list[tuple[str, str]]:
    tree = ast.parse(path.read_text())
    return [(one.name, f"{path}:{one.lineno}") for one in ast.walk(tree) if isinstance(one, ast.ClassDef)]


def test_no_class_has_the_name_of_another():
    assert not repeated(pair for path in sorted(PACKAGE.rglob("*.py")) for pair in classes(path))


def test_no_module_has_the_name_of_another():
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem not in {"__init__", *OF_A_TECHNIQUE}]
    assert not repeated((path.stem, str(path)) for path in modules)


def test_a_breach_is_seen(tmp_path):
    (tmp_path / "one.py").write_text("class Box: ...\n")
    (tmp_path / "other.py").write_text("class _Box: ...\n")
    assert [*repeated(pair for path in tmp_path.glob("*.py") for pair in classes(path))] == ["Box"]
