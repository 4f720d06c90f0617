"""Private names of torch and Lightning stand in compat only, one function or class each, each used and each tested.

Private is what starts with one underscore. A module of the package may import no such name of another package. An
attribute of `self` may be none of a torch or Lightning class that its class, or a subclass in the package, derives
from. Any other attribute has to be defined in the file that uses it, and be none of a torch or Lightning class at all.
An attribute's name in a string counts as the attribute.
"""

from __future__ import annotations

import ast
import dis
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_largescale

PACKAGE = Path(lightning_largescale.__file__).parent
COMPAT = PACKAGE / "compat"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != COMPAT}
FOREIGN = {"torch", "lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
# Names that the standard library documents.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_exit"}
# Names that cannot move to compat, and why; each is named in a test.
EXCEPTIONS = {
    "_configure_launcher": "a Strategy has no public way to choose its launcher: the Trainer calls this",
    "_launcher": "what `_configure_launcher` is to set",
    "_initializing": "Python's mark of a module that is being imported; _autoload imports no torch, so no compat",
}
# Modules whose classes and functions the package meets.
MODULES = (
    *("threading", "torch", "torch.amp", "torch.autograd", "torch.autograd.function", "torch.autograd.graph"),
    *("torch.distributed", "torch.distributed.checkpoint", "torch.distributed.device_mesh", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.distributed.tensor.parallel", "torch.multiprocessing.spawn", "torch.nn"),
    *("torch.nn.parallel", "torch.optim", "torch.optim.lr_scheduler", "torch.optim.swa_utils", "torch.overrides"),
    *("torch.utils.checkpoint", "torch.utils.data", "torch.utils.flop_counter", "torch.utils.hooks", "torch._ops"),
    *("lightning.fabric.plugins.environments", "lightning.pytorch", "lightning.pytorch.accelerators"),
    *("lightning.pytorch.callbacks", "lightning.pytorch.cli", "lightning.pytorch.loggers", "lightning.pytorch.loops"),
    *("lightning.pytorch.loops.fetchers", "lightning.pytorch.plugins", "lightning.pytorch.profilers"),
    *("lightning.pytorch.strategies", "lightning.pytorch.strategies.launchers", "lightning.pytorch.tuner.tuning"),
    *(
        f"lightning.pytorch.trainer.connectors.{one}_connector"
        for one in ("accelerator", "callback", "checkpoint", "data", "signal")
    ),
    *("lightning.pytorch.trainer.connectors.logger_connector", "lightning.pytorch.utilities.combined_loader"),
)


def private(name: str) -> bool:
    return bool(re.fullmatch(r"_(?!_)\w+", name))


@functools.cache
def private_attributes(kind: type) -> frozenset[str]:
    """Private names of the class itself: methods, annotated fields, and attributes that its methods set."""
    names = {*vars(kind), *inspect.get_annotations(kind)}
    for function in filter(inspect.isfunction, vars(kind).values()):
        names |= {one.argval for one in dis.get_instructions(function) if one.opname == "STORE_ATTR"}
    return frozenset(filter(private, names))


def foreign_attributes(kind: type) -> set[str]:
    """Private names that a class has from other packages."""
    foreign = [base for base in kind.__mro__ if base.__module__.split(".")[0] != PACKAGE.name]
    return set().union(*map(private_attributes, foreign))


@functools.cache
def all_foreign() -> frozenset[str]:
    """Private names of MODULES and of all of their classes."""
    found: set[str] = set()
    for module in map(importlib.import_module, MODULES):
        found |= {*filter(private, vars(module))}
        for kind in {kind for kind in vars(module).values() if issubclass(type(kind), type)}:
            found |= foreign_attributes(kind)
    return frozenset(found)


def descendants(kind: type) -> Iterator[type]:
    """A class and the classes that derive from it."""
    yield kind
    for one in type.__subclasses__(kind):
        yield from descendants(one)


def defined(tree: ast.AST) -> set[str]:
    """Private names that a file makes: functions, classes, variables, and attributes that it sets."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return set(filter(private, found))


class Uses(ast.NodeVisitor):
    """Private names of others that a file imports, reaches into, or overrides.

    Args:
        tree: The file.
        module: The imported file, in which the bases of its classes are looked up.
    """

    def __init__(self, tree: ast.AST, module: ModuleType) -> None:
        self.module, self.ours, self.found = module, defined(tree), []
        # Private names that `self` has from others, in the class that is visited.
        self.inherited: frozenset[str] | set[str] = frozenset()
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [name.name for name in node.names if foreign(name.name)]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found += [path for name in node.names if node.module and foreign(path := f"{node.module}.{name.name}")]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.inherited = self.inherited, self.inherited_by(node)
        methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
        self.found += [f"{node.name}.{name}" for name in sorted(methods & self.inherited - EXCEPTIONS.keys())]
        self.generic_visit(node)
        self.inherited = outer

    def inherited_by(self, node: ast.ClassDef) -> frozenset[str] | set[str]:
        kind = vars(self.module).get(node.name)
        if isinstance(kind, type):
            return set().union(*map(foreign_attributes, descendants(kind)))
        try:
            bases = [eval(ast.unparse(base), vars(self.module)) for base in node.bases]
        except NameError:
            # Of a class in a function, whose base is a variable.
            return all_foreign()
        return set().union(*(foreign_attributes(base) for base in bases if isinstance(base, type)))

    def visit_Assign(self, node: ast.Assign) -> None:
        if ast.unparse(node.targets[0]) != "__slots__":
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.read(node, node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                self.read(node, node.args[0], name.value)
                node.args.remove(name)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and (
            foreign(node.value) or node.value in all_foreign() - DOCUMENTED - self.ours
        ):
            self.found.append(repr(node.value))

    def read(self, node: ast.expr, owner: ast.expr, name: str) -> None:
        """Take in an attribute of `owner`."""
        # Operators are torch's public registry, and many bear such names.
        known = DOCUMENTED | EXCEPTIONS.keys()
        if not private(name) or name in known or re.search(r"\b_?(ops|aten)\b", ast.unparse(owner)):
            return
        if ast.unparse(owner) in ("self", "cls", "super()"):
            breach = name in self.inherited
        else:
            breach = name not in self.ours or name in all_foreign()
        self.found += [ast.unparse(node)] if breach else []


def foreign(dotted: str) -> bool:
    """Whether it is another package's module or name, and private to it."""
    package, *rest = dotted.split(".")
    return package in FOREIGN and any(map(private, rest))


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))


@pytest.fixture(scope="module")
def modules() -> dict[Path, Any]:
    """All modules of the package, since a class of one may have subclasses in any other."""
    return {path: module_of(path) for path in FILES.values()}


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_only_in_compat(path, modules):
    assert Uses(ast.parse(path.read_text()), modules[path]).found == []


def offered() -> dict[str, str | None]:
    """Public names of compat, each with its docstring; None where it has no place for one."""
    found: dict[str, str | None] = {}
    for node in [node for path in COMPAT.glob("[a-z]*.py") for node in ast.parse(path.read_text()).body]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name not in found, f"two modules of compat have a {node.name}"
            found[node.name] = ast.get_docstring(node)
        elif isinstance(node, ast.Assign):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
    return {name: text for name, text in found.items() if not name.startswith("_")}


OFFERED = offered()


@functools.cache
def used_names() -> frozenset[str]:
    """Names of compat that the package reads from it, or imports from it."""
    words = [word for path in FILES.values() for word in ast.walk(ast.parse(path.read_text()))]
    read = {word.attr for word in words if isinstance(word, ast.Attribute) and ast.unparse(word.value) == "compat"}
    sources = [
        word for word in words if isinstance(word, ast.ImportFrom) and word.module == "lightning_largescale.compat"
    ]
    return frozenset(read | {name.name for source in sources for name in source.names})


@functools.cache
def text_of_tests() -> str:
    """The tests of compat, and of the one module that may not import it."""
    folder = Path(__file__).parent
    return "".join(path.read_text() for path in (*folder.glob("compat/*.py"), folder / "test_autoload.py"))


@pytest.mark.parametrize("name", OFFERED)
def test_each_is_used_and_tested_and_says_what_would_replace_it(name):
    assert name in used_names(), f"nothing in the package uses compat.{name}"
    assert re.search(rf"\bcompat\.{name}\b", text_of_tests()), f"tests/compat does not name compat.{name}"
    assert OFFERED[name] is None or "Replaced" in OFFERED[name], f"{name} does not say what would replace it"


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_each_exception_is_tested(name):
    assert re.search(rf"\b{name}\b", text_of_tests()), f"no test names {name}"


BREACHES = """
import torch._C
from lightning.x import _y, z
from torch import Tensor, nn
from lightning_largescale.strategy import LargeScaleStrategy

def _base(): ...

class Box:
    def __init__(self):
        self._base = self._version = self._own = 1
        self._parameters = {}

    def other(self, one, tensor):
        return one._own, tensor._base, getattr(tensor, "_version"), tensor._unknown, ops.aten._a, vars(one)["_modules"]

class Layer(nn.Module, Box):
    def run(self):
        return self._own, self._buffers, super()._parameters

    def _apply(self): ...

class Below(LargeScaleStrategy):
    def _configure_launcher(self):
        self._launcher, self._model = None, None
        self._mine = hasattr(self, "_mine") and sys.modules["torch._dynamo"]

def within(kind):
    class Held(kind):
        def run(self):
            return self._data_fetcher
"""


def test_a_breach_is_seen():
    module = ModuleType("lightning_largescale.breaches")
    exec(BREACHES[BREACHES.index("from torch") :], vars(module))
    assert Uses(ast.parse(BREACHES), module).found == [
        "torch._C",
        "lightning.x._y",
        # Box is a base of Layer.
        "self._version",
        "self._parameters",
        "tensor._base",
        "getattr(tensor, '_version')",
        "tensor._unknown",
        "'_modules'",
        "Layer._apply",
        "self._buffers",
        "super()._parameters",
        "self._model",
        "'torch._dynamo'",
        "self._data_fetcher",
    ]
