"""docs/design.md is about the package as it is."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
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
    around_the_example = re.sub(r"## How to add a technique.*?(?=## )", "", TEXT, flags=re.DOTALL)
    names = re.findall(r"`((?:\w+/)+[\w.]*)`", around_the_example)
    roots = (ROOT, ROOT / "lightning_largescale")
    assert names
    assert all(any((root / name).exists() for root in roots) for name in names)


def test_hooks_that_it_names_are_a_technique_s():
    phases = re.findall(r"^\| `(\w+)` \| [^|`]*(?:`PlanError`[^|]*)?\|$", TEXT, flags=re.MULTILINE)
    assert phases
    assert all(hasattr(Technique, name) for name in phases)


def written() -> set[tuple[str, str, str]]:
    """Attributes of a run that techniques set other than in `close`, the class that does, and its method."""
    found = set()
    for path in (ROOT / "lightning_largescale" / "techniques").rglob("*.py"):
        for kind in [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]:
            for method in [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name != "close"]:
                for node in ast.walk(method):
                    stores = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                    if stores and ast.unparse(node.value) in ("run", "self.run"):
                        found.add((node.attr, kind.name, method.name))
    return found


def test_each_attribute_of_a_run_has_one_writer():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    assert written() == {*rows}
    assert len({attribute for attribute, _, _ in rows}) == len(rows)


def add_example(package: Path) -> None:
    """Add the example's files and lines to a copy of the package."""
    for block in re.findall(r"```python\n# (techniques/.*?)```", TEXT, flags=re.DOTALL):
        name, _, text = block.partition("\n")
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text)
        (package / name).with_name("__init__.py").write_text('"""The example."""\n')
    (block,) = re.findall(r"```diff\n(.*?)```", TEXT, flags=re.DOTALL)
    for part in block.split("--- ")[1:]:
        name, *lines = part.splitlines()
        text = (package / name).read_text()
        for before, added in zip(lines[::2], lines[1::2], strict=True):
            assert (before[0], added[0]) == (" ", "+")
            assert text.count(f"\n{before[1:]}\n") == 1, before
            text = text.replace(f"\n{before[1:]}\n", f"\n{before[1:]}\n{added[1:]}\n")
        (package / name).write_text(text)


USES = """
from models import Language, trainer
from planner.builders import hardware, workload
import lightning_largescale
from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.strategy import LargeScaleStrategy

assert lightning_largescale.__file__.startswith({folder!r}), lightning_largescale.__file__
plan = Plan(keep_gradient_buffers=True)
assert Plan.from_json(plan.to_json()) == plan
assert "gradient buffers kept" in plan.describe()
plain, kept = (peak_memory(workload(), one, hardware(1)) for one in (Plan(), plan))
assert kept.terms["gradient buffers"] > 0 and kept.peak_bytes > plain.peak_bytes
losses = []
for strategy in (LargeScaleStrategy(plan), "auto"):
    model = Language()
    run = trainer(strategy, max_steps=5)
    run.fit(model)
    losses.append(model.losses)
    (optimizer,) = run.optimizers
    assert "zero_grad" not in vars(optimizer)
assert losses[0] == losses[1] and len(losses[0]) == 5
"""


def test_the_example_of_a_technique_trains(tmp_path):
    shutil.copytree(ROOT / "lightning_largescale", tmp_path / "lightning_largescale")
    add_example(tmp_path / "lightning_largescale")
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    code = USES.format(folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
