from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.offload import pages
from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.pages import ParamEntry, bundles_of
from lightning_largescale.offload.places import Places, elements
from lightning_largescale.optimizers.state_spec import StateSpec


@pytest.mark.parametrize("page_bytes", [4096, 2**20])
def test_what_is_in_memory_is_viewed_there(page_bytes, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", page_bytes)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((100, 100), (3,), ())]
    parameters[0].grad = torch.randn(100, 100)
    entries = [ParamEntry(one, 0, StateSpec(True, {"mean": torch.float32})) for one in parameters]
    places, memory = Places(), Memory(1)
    seen = 0
    for bundle in bundles_of(entries):
        assert [places.bytes_per_element(one) for one in bundle.entries] == [0] * len(bundle.entries)
        for page in bundle.pages(0):
            assert places.moved_bytes(page) == 0
            assert not places.read(page, memory, 0)
            assert not places.write(page, memory, 0)
            for span, (values, gradient) in zip(page.slices, places.values(page, memory, 0), strict=True):
                parameter = span.entry.parameter
                assert values.data_ptr() == parameter.data_ptr() + 4 * span.start
                assert values.numel() == span.stop - span.start
                assert values.shape == parameter.shape or not span.whole
                assert (gradient is None) == (parameter.grad is None)
                if gradient is not None:
                    assert gradient.data_ptr() == parameter.grad.data_ptr() + 4 * span.start
                    assert torch.equal(gradient, elements(parameter.grad, span))
                seen += values.numel()
    assert seen == 10_004
