"""Tensors in a file, for which tensors pass."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_largescale.parallel.stored import Stored, stored_for

VALUES = torch.arange(12.0).view(3, 4)


def stored(values=VALUES, device="cpu"):
    """In no file, but read as if it were; what was asked for is noted."""
    asked = []

    def read(pieces):
        for piece in pieces:
            asked.append((piece.offsets, tuple(piece.values.shape)))
            box = [slice(start, start + size) for start, size in zip(piece.offsets, piece.values.shape, strict=True)]
            piece.values.copy_(values[tuple(box)])

    made = Stored(values.shape, values.dtype, read, device)
    made.asked = asked
    return made


def test_it_is_not_read_for_what_it_is():
    one = stored()
    assert (one.shape, one.dtype, one.device.type, one.dim(), one.numel()) == ((3, 4), torch.float32, "cpu", 2, 12)
    assert repr(one) == "Stored(shape=(3, 4), dtype=torch.float32)"
    assert one.asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_read_when_it_is_copied(dtype):
    one, target = stored(), nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    with torch.no_grad():
        assert target.copy_(one) is target
    assert torch.equal(target, VALUES.to(dtype))
    assert one.asked == [((0, 0), (3, 4))]


def test_modules_load_it():
    layer = nn.Linear(4, 3)
    layer.load_state_dict({"weight": stored(), "bias": stored(torch.ones(3))})
    assert torch.equal(layer.weight, VALUES)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": stored(torch.ones(4, 4)), "bias": stored(torch.ones(3))})
    with pytest.raises(ValueError, match=r"has shape \(3, 4\) and \(4,\) is to be read"):
        stored().read(torch.zeros(4))


def test_it_is_computed_with():
    one = stored()
    assert torch.equal(one + 1, VALUES + 1)
    assert torch.equal(one[1:, :2], VALUES[1:, :2])
    assert torch.equal(torch.cat([one, one]), torch.cat([VALUES, VALUES]))
    assert torch.equal(one.to(torch.float64), VALUES.double())
    for made in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one.clone()):
        assert type(made) is torch.Tensor
        assert torch.equal(made, VALUES)


def test_what_is_written_into_it_is_kept():
    one = stored()
    assert one.mul_(2) is one
    one[0] = 7
    target = torch.zeros(3, 4)
    target.copy_(one)
    assert torch.equal(target[1:], 2 * VALUES[1:])
    assert torch.equal(target[0], torch.full((4,), 7.0))
    assert torch.equal(one.whole(), target)
    assert torch.equal(VALUES[0], torch.arange(4.0))


def test_what_has_no_values_is_told_where_they_are():
    with torch.device("meta"):
        layer = nn.Linear(4, 3, bias=False)
    one = stored(device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict({"weight": one})
    assert stored_for(layer.weight) is one
    assert one.asked == []
    assert stored_for(nn.Parameter(torch.zeros(1))) is None


def test_what_is_written_into_a_part_of_it_is_kept():
    one = stored()
    one[0] = 7
    one[1:2].fill_(8)
    assert torch.equal(one.whole()[:2], torch.tensor([[7.0] * 4, [8.0] * 4]))
    assert torch.equal(one.whole()[2], VALUES[2])


def test_its_values_as_code_reads_them():
    one = stored()
    assert one.tolist() == VALUES.tolist()
    assert (one.numpy() == VALUES.numpy()).all()
    assert (np.asarray(one) == VALUES.numpy()).all()
    assert type(one.cpu()) is type(one.contiguous()) is torch.Tensor
