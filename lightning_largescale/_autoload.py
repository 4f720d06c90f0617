"""The `torch.backends` entry point: our strategy strings are known as soon as Lightning's strategies are imported, and
`load_from_checkpoint` reads the directories that they write.

torch calls `register` at the end of `import torch`, before Lightning's strategies exist. It leaves finders at the head
of `sys.meta_path` that let the real loader run, add our names, and go. Only the standard library is imported here,
nothing of ours until Lightning is there, and nothing raises: at worst the strings are unknown and the log says why.

Source: torch's autoload mechanism, docs.pytorch.org/tutorials/unstable/python_extension_autoload.html; PEP 451.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module that holds a registry, its name there, and the function of registry.py that fills it. The packages are two,
# and each has a Trainer and a Fabric; ours is for the first's Trainer, and the others' registries say so. Two modules
# have a function that reads checkpoints, in the place of which stands what registry.py makes of it.
_REGISTRIES = {
    "lightning.pytorch.strategies": ("StrategyRegistry", "register_strategies"),
    "pytorch_lightning.strategies": ("StrategyRegistry", "refuse_other_package"),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", "refuse_fabric"),
    "lightning_fabric.strategies": ("STRATEGY_REGISTRY", "refuse_fabric"),
    "lightning.fabric.plugins.io.torch_io": ("pl_load", "read_directories"),
    "lightning.pytorch.core.saving": ("pl_load", "read_directories"),
}

_installed = False


def register() -> None:
    """Make the strategy strings known to Lightning, now or when it is imported; what torch's entry point calls.

    `LARGESCALE_AUTOLOAD=0` in the environment switches it off; `import lightning_largescale` then still registers.
    """
    if not _switched_off():
        _install()
    elif not _installed:
        # torch imported the package only to come here. Forgotten, it runs, and so registers, when the user imports it.
        for name in (__name__, __name__.rpartition(".")[0]):
            sys.modules.pop(name, None)


def on_import() -> None:
    """Register for `import lightning_largescale`, unless torch imports it under `LARGESCALE_AUTOLOAD=0`."""
    if not (_switched_off() and _torch_is_importing()):
        _install()


def _switched_off() -> bool:
    return os.environ.get("LARGESCALE_AUTOLOAD") == "0"


def _torch_is_importing() -> bool:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _install() -> None:
    global _installed
    if _installed:
        return
    _installed = True
    for name, (registry, _) in _REGISTRIES.items():
        if hasattr(sys.modules.get(name), registry):
            _fill(name)
        else:
            sys.meta_path.insert(0, _Finder(name))


def _fill(name: str) -> None:
    """Hand the registry in the imported module `name`, or its function, to registry.py."""
    registry, fill = _REGISTRIES[name]
    try:
        ours = importlib.import_module("lightning_largescale.registry")
        made = getattr(ours, fill)(getattr(sys.modules[name], registry))
        if made is not None:
            setattr(sys.modules[name], registry, made)
    except Exception as error:  # whatever it is, importing Lightning must not fail because of us
        logging.getLogger(__name__).warning("the largescale strategies are not registered: %r", error)


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and has its loader call us once the module has been executed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in [other for other in sys.meta_path if other is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Runs the real loader, then fills the registry; the module keeps no trace of it."""

    def __init__(self, real: Loader, finder: _Finder) -> None:
        self.real = real
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.real
        if module.__spec__ is not None:
            module.__spec__.loader = self.real
        self.real.exec_module(module)
        # Not before: an import that failed or was interrupted may be tried again.
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _fill(module.__name__)
