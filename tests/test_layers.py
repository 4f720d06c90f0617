"""Who may import whom: design's one direction, read from the source."""

from __future__ import annotations

import ast
import dataclasses
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path

import pytest

import lightning_largescale
from lightning_largescale.plan import Plan

PACKAGE = Path(lightning_largescale.__file__).parent

# A module or folder may import what stands in a line above its own. compat and units may be imported by all.
LAYERS = [
    {"compat", "errors"},
    {"comm", "serialize"},
    {"units"},
    {"plan_fields"},
    {"fields"},
    {"plan"},
    {"arithmetic", "console", "dtensors", "forward", "groups", "optimizers", "tiers", "waiting"},
    {"hub"},
    {"apart"},
    {"hardware", "workload"},
    {"planner", "price", "prices", "parallel", "offload"},
    {
        "agree",
        "callbacks",
        "checkpoint",
        "failures",
        "fork",
        "launch",
        "precision",
        "processes",
        "record",
        "requeue",
        "sample",
        "step_tracer",
        "tuning",
        "values",
    },
    {"run"},
    {"technique"},
    {"apply"},
    {"strategy"},
    {"auto"},
    {"registry", "cli"},
    {"__init__"},
]
# The strategy's own helpers may build on one another; the other lines are of equals that never meet.
HELPERS = next(layer for layer in LAYERS if "step_tracer" in layer)
# The planner walks the prices of techniques, which are sums of what it knows of all.
PRICED = {"planner", "price", "prices"}


def part(path: Path) -> str:
    """The folder or module of the package that a file belongs to."""
    return part_of(path.relative_to(PACKAGE).with_suffix("").parts)


def part_of(names: tuple[str, ...]) -> str:
    """The same of a dotted name without the package's; a technique has parts of several layers."""
    if names[0] != "techniques":
        return names[0]
    known = {"fields": "fields", "price": "price"}
    return next((known[name] for name in names[1:] if name in known), "fields" if names[-1] == "__init__" else "apply")


def imports(tree: ast.AST, here: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Dotted names that a file of package `here` imports, those for type checking left out."""
    found: set[tuple[str, ...]] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found.update((*base, name.name) for name in node.names)
        todo.extend(ast.iter_child_nodes(node))
    return found


def files() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("path", files().values(), ids=files().keys())
def test_imports_go_one_way(path):
    mine = part(path)
    if mine == "_autoload":
        return
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert mine in rank, f"{mine} has no place in LAYERS"
    here = ("lightning_largescale", *path.relative_to(PACKAGE).parts[:-1])
    for name in imports(ast.parse(path.read_text()), here):
        if name[0] != "lightning_largescale" or len(name) == 1:
            continue
        other = part_of(name[1:])
        equals = {other, mine} <= HELPERS or {other, mine} <= PRICED
        allowed = other == mine or rank.get(other, -1) < rank[mine] or equals
        assert allowed, f"{path.name} imports {'.'.join(name)}"


TECHNIQUES = sorted(path.name for path in (PACKAGE / "techniques").iterdir() if (path / "__init__.py").exists())
# The search has an argument of this name, which users give.
ARGUMENTS = {"search.py": {"precision"}}


def named(tree: ast.AST) -> set[str]:
    """Identifiers and string constants of a file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        found |= {getattr(node, name, None) for name in ("id", "attr", "arg", "name")}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def techniques_imported(path: Path) -> set[tuple[str, ...]]:
    """What a file imports of techniques, as the names after `techniques`."""
    here = ("lightning_largescale", *path.relative_to(PACKAGE).parts[:-1])
    names = imports(ast.parse(path.read_text()), here)
    return {name[2:] for name in names if name[:2] == ("lightning_largescale", "techniques")}


@pytest.mark.parametrize("path", sorted((PACKAGE / "planner").glob("*.py")), ids=lambda path: path.name)
def test_the_planner_walks_techniques_and_names_none(path):
    fields = {field.name for field in dataclasses.fields(Plan)} | {*TECHNIQUES}
    assert named(ast.parse(path.read_text())) & fields <= ARGUMENTS.get(path.name, set())
    assert not techniques_imported(path)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_techniques_do_not_import_one_another(technique):
    common = {technique, *(path.stem for path in (PACKAGE / "techniques").glob("*.py"))}
    for path in (PACKAGE / "techniques" / technique).rglob("*.py"):
        assert {name[0] for name in techniques_imported(path)} <= common, path


def test_a_field_is_named_in_few_files():
    words = [named(ast.parse(path.read_text())) for path in files().values()]
    counts = [sum(field.name in found for found in words) for field in dataclasses.fields(Plan)]
    assert statistics.median(counts) <= 4


def test_autoload_is_standard_library_only():
    tree = ast.parse((PACKAGE / "_autoload.py").read_text())
    assert {name[0] for name in imports(tree, ())} <= sys.stdlib_module_names


def test_a_breach_is_seen():
    code = "if TYPE_CHECKING:\n import a.b\nelse:\n import c\ndef f():\n from ..planner import d\n from . import e"
    assert imports(ast.parse(code), ("p", "parallel")) == {("c",), ("p", "planner", "d"), ("p", "parallel", "e")}


def test_what_is_imported_is_required():
    """Without extras: what others happen to bring is not there on a machine that has but the package."""
    requirements = [
        re.split(r"[^A-Za-z0-9_.-]", line)[0]
        for line in metadata.requires("lightning-largescale") or ()
        if "extra ==" not in line
    ]
    required = {re.sub(r"[-_.]+", "-", name).lower() for name in requirements}
    names = {
        name[0]
        for path in files().values()
        for name in imports(ast.parse(path.read_text()), ("lightning_largescale",))
        if name[0] not in sys.stdlib_module_names and name[0] != "lightning_largescale"
    }
    homes = metadata.packages_distributions()
    missing = [name for name in sorted(names) if not required & {one.lower().replace("_", "-") for one in homes[name]}]
    assert not missing
    assert {"torch", "lightning", "safetensors"} <= names


# What every rank of a group enters, and who a rank is among all; with the place of the group among the arguments.
SPOKEN = {
    **dict.fromkeys(("get_rank", "get_world_size", "barrier", "monitored_barrier"), 0),
    **dict.fromkeys(("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list"), 2),
    **dict.fromkeys(("all_gather_into_tensor", "reduce_scatter_tensor", "send", "recv", "gather_object"), 2),
    **dict.fromkeys(("reduce", "reduce_scatter", "gather", "scatter"), 3),
    **dict.fromkeys(("all_to_all", "all_to_all_single"), 4),
}
SPEAKS = "comm.py"
# The fork that stands for a rank, whose group is none: it asks for its number to make one that does nothing.
EXEMPT = {"compat/distributed.py"}


def on_the_default_group(tree: ast.AST) -> list[str]:
    """Calls of torch.distributed that name no group."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        if name not in SPOKEN or owner not in ("dist", "torch.distributed"):
            continue
        if len(node.args) <= SPOKEN[name] and not any(one.arg == "group" for one in node.keywords):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", files().values(), ids=files().keys())
def test_one_module_speaks_on_the_default_group(path):
    name = str(path.relative_to(PACKAGE))
    if name not in {SPEAKS, *EXEMPT}:
        assert not on_the_default_group(ast.parse(path.read_text()))


def test_a_word_on_the_default_group_is_heard():
    said = "dist.all_reduce(x)\ndist.all_reduce(x, op, group)\ndist.barrier(group=one)\ndist.get_rank()\n"
    assert [one.split(":")[0] for one in on_the_default_group(ast.parse(said))] == ["1", "4"]
