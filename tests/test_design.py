"""docs/design.md is about the package as it is."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_largescale.technique import Technique

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "design.md").read_text()


def test_the_layout_is_that_of_the_tree():
    rows = re.findall(r"^\| (`[^|]*`) \|", TEXT, flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([\w.]+(?:\.py|/))`", row)}
    package = ROOT / "lightning_largescale"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert told == folders | modules


def test_files_that_it_names_are_there():
    names = re.findall(r"`((?:\w+/)+[\w.]*)`", TEXT)
    roots = (ROOT, ROOT / "lightning_largescale")
    assert names
    assert all(any((root / name).exists() for root in roots) for name in names)


def test_hooks_that_it_names_are_a_technique_s():
    phases = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    assert phases
    assert all(hasattr(Technique, name) for name in phases)
