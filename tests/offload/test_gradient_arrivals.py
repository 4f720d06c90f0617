from __future__ import annotations

import pytest
from ranks import quiet
from techniques.gradient_release.test_release import Plain, inputs

from lightning_largescale.offload.gradient_arrivals import Arrivals

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*without O_DIRECT")]


def test_arrivals_tell_of_each_gradient_and_of_blocks_when_they_are_complete():
    module, told = Plain(layers=3), []
    labels = module.labels()
    names = {one: name for name, one in module.named_parameters()}
    module.blocks[0].up.weight.requires_grad_(False)
    arrivals = Arrivals(labels, lambda one: told.append(names[one]), lambda label: told.append(f"complete {label}"))
    module(inputs(0)).sum().backward()
    assert [one for one in told if one.startswith("complete")] == ["complete 2", "complete 1"]
    assert set(told) >= {names[one] for one in labels if one.grad is not None}
    assert "blocks.0.up.weight" not in told
    arrivals.end()
    arrivals.end()
    assert told[-1] == "complete 0"
    told.clear()
    module(inputs(0)).sum().backward()
    arrivals.forget()
    arrivals.end()
    assert "complete 0" not in told
    arrivals.stop()
    told.clear()
    module(inputs(0)).sum().backward()
    assert told == []
