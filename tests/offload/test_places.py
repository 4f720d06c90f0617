from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.offload import pages
from lightning_largescale.offload.memory import Memory
from lightning_largescale.offload.pages import Member, bundles_of
from lightning_largescale.offload.places import Places, elements
from lightning_largescale.pageable import Kind


@pytest.mark.parametrize("page_bytes", [4096, 2**20])
def test_what_is_in_memory_is_viewed_there(page_bytes, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", page_bytes)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((100, 100), (3,), ())]
    parameters[0].grad = torch.randn(100, 100)
    members = [Member(one, 0, Kind(True, {"mean": torch.float32})) for one in parameters]
    places, memory = Places(), Memory(1)
    seen = 0
    for bundle in bundles_of(members):
        assert [places.bytes_per_element(one) for one in bundle.members] == [0] * len(bundle.members)
        for page in bundle.pages(0):
            assert places.moved_bytes(page) == 0
            assert not places.read(page, memory, 0)
            assert not places.write(page, memory, 0)
            for piece, (values, gradient) in zip(page.pieces, places.values(page, memory, 0), strict=True):
                parameter = piece.member.parameter
                assert values.data_ptr() == parameter.data_ptr() + 4 * piece.start
                assert values.numel() == piece.stop - piece.start
                assert values.shape == parameter.shape or not piece.whole
                assert (gradient is None) == (parameter.grad is None)
                if gradient is not None:
                    assert gradient.data_ptr() == parameter.grad.data_ptr() + 4 * piece.start
                    assert torch.equal(gradient, elements(parameter.grad, piece))
                seen += values.numel()
    assert seen == 10_004
