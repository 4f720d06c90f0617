from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest

import lightning_largescale

PACKAGE = Path(lightning_largescale.__file__).parent

KNOWN = """
import sys, lightning.pytorch.strategies as strategies
assert {"largescale_auto", "largescale_fsdp"} <= set(strategies.StrategyRegistry.available_strategies())
"""
UNKNOWN = """
import lightning.pytorch.strategies as strategies
assert not any("largescale" in name for name in strategies.StrategyRegistry.available_strategies())
"""
# The module looks as if we had not been there, and the finder is gone.
NO_TRACE = """
assert type(strategies.__loader__) is type(strategies.__spec__.loader) is type(__import__("json").__loader__)
assert not any(getattr(finder, "name", "") == "lightning.pytorch.strategies" for finder in sys.meta_path)
"""

# A Lightning that imports in no time, for what does not depend on the real one.
REGISTRY = """
class Registry(dict):
    def register(self, name, factory, description, override):
        self[name] = factory
    def available_strategies(self):
        return list(self)
StrategyRegistry = Registry()
"""


@pytest.fixture
def stand_in(tmp_path):
    """Write a package `lightning`, found before the real one, with this source of `lightning.pytorch.strategies`."""

    def write(source: str) -> None:
        folder = tmp_path / "lightning" / "pytorch"
        folder.mkdir(parents=True)
        for name in ("__init__.py", "pytorch/__init__.py"):
            (tmp_path / "lightning" / name).touch()
        (folder / "strategies.py").write_text(source)

    return write


def test_lightning_first(start_python):
    # At once: what one process does must not disturb another that starts from the same installation.
    codes = [
        "from lightning.pytorch import Trainer" + KNOWN + NO_TRACE,
        "import lightning.pytorch.strategies" + KNOWN + NO_TRACE,
        "import pytorch_lightning" + KNOWN,
    ]
    for code, process in [(code, start_python(code)) for code in codes]:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{code}\n{err}"


TORCH_FIRST = """
import sys, torch
assert not any(name.partition(".")[0] == "lightning" for name in sys.modules)
ours = {name for name in sys.modules if name.startswith("lightning_largescale")}
assert ours == {"lightning_largescale", "lightning_largescale._autoload"}, ours
"""


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        (TORCH_FIRST + KNOWN + NO_TRACE, {}),
        ("import torch" + UNKNOWN + "import lightning_largescale" + KNOWN, {"LARGESCALE_AUTOLOAD": "0"}),
        pytest.param(
            "import lightning_largescale, torch" + KNOWN, {"LARGESCALE_AUTOLOAD": "0"}, marks=pytest.mark.slow
        ),
        ("import torch" + UNKNOWN + "import lightning_largescale" + KNOWN, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
    ],
    ids=["torch first", "off, then imported", "off, imported first", "off for all of torch"],
)
def test_torch_first(run_python, stand_in, code, environment):
    stand_in(REGISTRY)
    run_python(code, **environment)


def test_zipped(run_python, stand_in, tmp_path):
    stand_in(REGISTRY)
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in PACKAGE.rglob("*.py"):
            file.write(path, path.relative_to(PACKAGE.parent))
        metadata = "lightning_largescale-0.0.0.dist-info"
        file.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: lightning-largescale\nVersion: 0.0.0\n")
        entry = "[torch.backends]\nlargescale = lightning_largescale._autoload:register\n"
        file.writestr(f"{metadata}/entry_points.txt", entry)
    run_python(
        "import sys, torch; assert '.zip' in sys.modules['lightning_largescale'].__file__" + KNOWN,
        PYTHONPATH=str(archive),
    )


def test_lightning_that_does_not_import(run_python, stand_in):
    stand_in("import os\nif 'BROKEN' in os.environ: 1 / 0\n" + REGISTRY)
    code = """
        import importlib.util, os, lightning_largescale
        try:
            import lightning.pytorch.strategies
        except ZeroDivisionError:  # its own error, not one of ours
            del os.environ["BROKEN"]
        assert importlib.util.find_spec("lightning.pytorch.strategies") is not None  # a look is not an import
    """
    run_python(dedent(code) + KNOWN, BROKEN="1")


@pytest.mark.parametrize("source", ["", "StrategyRegistry = None", "class StrategyRegistry: register = None"])
def test_lightning_without_a_registry(run_python, stand_in, source):
    stand_in(source)
    told = run_python("import lightning_largescale, lightning.pytorch.strategies")
    assert "the largescale strategies are not registered: " in told
    assert "Traceback" not in told


def test_no_lightning(run_python, tmp_path):
    (tmp_path / "lightning.py").touch()  # a module of that name, and no package
    assert run_python("import lightning_largescale, lightning") == ""


def test_package_after_lightning(run_python, stand_in):
    stand_in(REGISTRY)
    again = """
        from lightning_largescale import _autoload
        before = list(sys.meta_path)
        _autoload.register()
        assert sys.meta_path == before
    """
    run_python("import lightning.pytorch.strategies, lightning_largescale" + KNOWN + NO_TRACE + dedent(again))


def test_python_marks_a_module_that_is_being_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "marked_module.py").write_text("DURING = __spec__._initializing")
    module = importlib.import_module("marked_module")
    assert module.DURING
    assert not getattr(module.__spec__, "_initializing", False)
