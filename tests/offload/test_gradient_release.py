from __future__ import annotations

import copy

import pytest
import torch
from models import Block
from offload.optimizers import difference
from ranks import quiet
from torch import nn
from torch.nn.utils import clip_grad_value_

from lightning_largescale.errors import PlanError
from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.gradient_release import Release
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.places import HostPlaces, Places
from lightning_largescale.offload.store import Store
from lightning_largescale.parallel.recompute import apply_recompute
from lightning_largescale.plan import Plan

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*without O_DIRECT")]


class Plain(nn.Module):
    """Blocks, of which a parameter is used in no step, with something before and after them."""

    def __init__(self, layers=4, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.blocks[1].register_parameter("unused", nn.Parameter(torch.ones(2)))
        self.after = nn.Linear(16, 1)

    def forward(self, x):
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)

    def labels(self):
        return {one: str(number) for number, block in enumerate(self.blocks) for one in block.parameters()}


def inputs(step):
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(step))


def losses_of(module, optimizer, backward, steps=5):
    """Of steps whose gradients, once they are there, are given to `backward`."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = module(inputs(step)).square().mean()
        loss.backward()
        losses.append(loss.item())
        backward()
    return losses


def released(build, folder, recompute, clip, **options):
    module = Plain(dropout=0.1)
    apply_recompute(module, Plan(activation_checkpointing=recompute))
    optimizer = build(module.parameters())
    labels, alive = module.labels(), []
    store = None if folder is None else Store(folder)
    made = PagedOptimizer(
        optimizer, store=store, buffers=PageBuffers(), label_of=lambda one: labels.get(one, ""), **options
    )
    release = Release(made, labels, clip)
    for parameter in labels:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append({label for one, label in labels.items() if one.grad is not None})
        )

    def backward():
        release.end_backward()
        assert not any(one.grad is not None for one in labels)
        assert module.after.weight.grad is not None
        clip([*module.before.parameters(), *module.after.parameters()])
        optimizer.step()
        release.end_step()

    losses = losses_of(module, optimizer, backward)
    release.stop()
    made.undo()
    found = losses, list(module.parameters()), copy.deepcopy(optimizer.state_dict())
    if store is not None:
        store.close()
    # One block's gradients are dropped when the first of another's is there.
    assert max(map(len, alive)) <= 2
    assert len(alive) >= 5 * len(module.blocks)
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("tier", ["nvme", "cpu", "device", "host"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_updates_in_backward_are_those_after_it(kind, tier, clips, recompute, tmp_path):
    def clip(parameters):
        if clips:
            clip_grad_value_(parameters, 1e-2)

    def build(parameters):
        return kind(parameters, lr=1e-2, weight_decay=0.1, fused=False)

    module = Plain(dropout=0.1)
    optimizer = build(module.parameters())

    def backward():
        clip(module.parameters())
        optimizer.step()

    losses = losses_of(module, optimizer, backward)
    lanes = Lanes(torch.device("cpu"))
    options = {"device": {"lanes": lanes}, "host": {"lanes": lanes, "places": HostPlaces(lanes, Places())}}
    found = released(build, tmp_path if tier in ("nvme", "host") else None, recompute, clip, **options.get(tier, {}))
    assert found[0] == losses
    assert not difference(found[1], list(module.parameters()))
    # It has its keys in the order in which parameters were first stepped on.
    assert not difference(dict(sorted(found[2]["state"].items())), optimizer.state_dict()["state"])


def test_a_second_gradient_in_a_step_is_refused_and_the_next_step_goes_on():
    module = Plain()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    labels = module.labels()
    made = PagedOptimizer(optimizer, store=None, buffers=PageBuffers(), label_of=lambda one: labels.get(one, ""))
    release = Release(made, labels)
    module(inputs(0)).sum().backward()
    release.end_backward()
    with pytest.raises(PlanError, match="a plan for steps with several backwards is release_gradients=False"):
        module(inputs(1)).sum().backward()
    release.forget()
    made.forget_step()
    optimizer.zero_grad()
    for step in (2, 3):
        module(inputs(step)).sum().backward()
        release.end_backward()
        optimizer.step()
        release.end_step()
    release.stop()
    module(inputs(4)).sum().backward()
    assert all(one.grad is not None for one in module.before.parameters())
    assert module.blocks[0].up.weight.grad is not None
