"""Leaves and shards are parameters as torch has them: they can be copied, pickled and frozen."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import Language, trainer
from ranks import quiet
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale import LargeScaleStrategy, Plan, PlanError
from lightning_largescale.parallel.parameter_access import GatheredParameter, ShardParameter

pytestmark = quiet


def again(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Curious(Language):
    """Handles its parameters inside of a step, where those outside of blocks are gathered and the others are not."""

    def training_step(self, batch, index):
        leaf, shard = self.head.weight, self.blocks[0].up.weight
        assert type(leaf) is GatheredParameter
        assert type(shard) is ShardParameter
        assert isinstance(leaf, nn.Parameter)
        assert isinstance(shard, nn.Parameter)
        for one, kind in ((leaf, nn.Parameter), (shard, DTensor)):
            for other in (copy.deepcopy(one), again(one)):
                assert type(other) is kind
                assert other.requires_grad
                assert isinstance(other, nn.Parameter)
            assert type(one * 2) in (torch.Tensor, DTensor)
            with pytest.raises(PlanError, match="keeps its shape"):
                one.data = torch.zeros(1)
            with pytest.raises(PlanError, match=r"float16.*keeps its shape .* and torch.float32"):
                one.data = one.data.half()
            with pytest.raises(PlanError, match=r"gradient of .* is assigned a tensor of shape \(1,\)"):
                one.grad = torch.zeros(1)
        saved = self.state_dict()["blocks.0.up.weight"]
        assert isinstance(saved, DTensor)
        assert type(again(saved)) is type(copy.deepcopy(saved)) is DTensor
        leaf.requires_grad_(False)
        self.blocks[0].requires_grad_(False)
        loss = super().training_step(batch, index)
        assert not leaf.requires_grad
        return loss

    def on_train_batch_end(self, *_):
        assert [self.head.weight.requires_grad, self.blocks[0].up.weight.requires_grad] == [False, False]
        assert (self.head.weight.grad, self.blocks[0].up.weight.grad) == (None, None)
        self.head.weight.requires_grad = True
        self.blocks[0].requires_grad_(True)


def fit():
    model = Curious()
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=2).fit(model)
    assert isinstance(model.head.weight, DTensor)
    return len(model.losses)


def test_parameters_are_as_torch_has_them(two):
    assert two.run(fit) == [2, 2]
