from __future__ import annotations

import inspect

import pytest

import lightning_largescale

NAMES = [name for name in lightning_largescale.__all__ if name != "__version__"]


def test_names():
    assert lightning_largescale.__all__ == [
        "Hardware",
        "LargeScaleAutoStrategy",
        "LargeScaleStrategy",
        "Plan",
        "PlanError",
        "Report",
        "Workload",
        "__version__",
        "consolidate",
        "find_plans",
    ]
    assert lightning_largescale.__all__ == sorted(lightning_largescale.__all__)
    assert set(lightning_largescale.__all__) <= set(dir(lightning_largescale))


def test_nothing_else():
    with pytest.raises(AttributeError, match="module 'lightning_largescale' has no attribute 'Plans'"):
        _ = lightning_largescale.Plans


def members(thing: object) -> dict[str, object]:
    """A public class with the public methods and properties that it defines itself; a function alone."""
    found = {"": thing}
    if inspect.isclass(thing):
        for name, value in vars(thing).items():
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            value = value.fget if isinstance(value, property) else value
            if inspect.isfunction(value) and not name.startswith("_"):
                found[name] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name):
    thing = getattr(lightning_largescale, name)
    assert thing.__module__.split(".")[0] == "lightning_largescale"
    whole = inspect.getdoc(thing)
    for member, value in members(thing).items():
        overrides = member and any(hasattr(base, member) for base in thing.__mro__[1:])
        doc = inspect.getdoc(value)
        assert doc or overrides, f"{name}.{member} has no docstring"
        if inspect.isfunction(value) and "raise PlanError" in inspect.getsource(value) and not overrides:
            assert "Raises:" in (doc or "") or "Raises:" in whole, f"{name}.{member} raises and does not say so"


@pytest.mark.parametrize("name", ["Hardware", "LargeScaleAutoStrategy", "LargeScaleStrategy", "Plan", "find_plans"])
def test_arguments_are_told(name):
    thing = getattr(lightning_largescale, name)
    doc = inspect.getdoc(thing)
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert f"{parameter.name}:" in doc, f"{name} does not say what {parameter.name} is"
