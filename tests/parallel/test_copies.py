"""Copies of a sharded module: shards of their own, no gathering, and full tensors taken as they come."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from lightning.pytorch import Callback
from models import Language, trainer
from ranks import quiet
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.parallel.copies import average_shards, equal_copies, find_copies
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

ZERO3 = Plan(dp_shard=2)
ZERO2 = Plan(dp_shard=2, reshard_after_forward=False)


def whole(module):
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in module.state_dict().items()}


def fitted(plan, **options):
    model = Language(seed=int(os.environ["RANK"]), **options)
    run = trainer(LargeScaleStrategy(plan), devices=2, max_steps=2, limit_val_batches=2)
    run.fit(model)
    return model, run


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Greeter(nn.Identity):
    def greet(self, *_):
        self.greeted = True


def greet(*_):
    """A hook of the user."""


def copied(plan):
    model, _ = fitted(plan, tied=True)
    model.greeter = Greeter()
    model.norm.register_forward_pre_hook(greet)
    model.blocks[0].register_forward_hook(model.greeter.greet)
    made = copy.deepcopy(model)
    assert type(made) is Language
    assert type(made.blocks[0]) is type(copy.deepcopy(model.blocks[0])) is type(Language().blocks[0])
    assert made.head.weight is made.embedding.weight
    assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    assert_equal(whole(made), whole(model))
    hooks = [
        hook
        for part in made.modules()
        if part is not made
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    ]
    assert hooks == [made.greeter.greet, greet]
    made.head.weight.data.zero_()
    assert bool(whole(model)["head.weight"].any())
    again = copy.deepcopy(made)
    assert_equal(whole(again), whole(made))
    losses = len(model.losses)
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=2).fit(model)
    return len(model.losses) - losses


@pytest.mark.parametrize("plan", [ZERO3, ZERO2], ids=["ZeRO-3", "ZeRO-2"])
def test_a_sharded_module_can_be_copied(two, plan):
    assert two.run(copied, plan) == [2, 2]


def loaded(plan):
    full = Language(seed=5, tied=True).state_dict()
    model, run = fitted(plan, tied=True)
    made = AveragedModel(model)
    for target in (model, made.module):
        target.load_state_dict(full)
        assert_equal(whole(target), full)
    made.load_state_dict({"n_averaged": torch.tensor(3), **{f"module.{name}": 2 * full[name] for name in full}})
    assert_equal(whole(made.module), {name: 2 * full[name] for name in full})
    with pytest.raises(RuntimeError, match="size mismatch for position"):
        model.load_state_dict({**full, "position": torch.ones(1)})
    # What is loaded is what is computed with.
    run.validate(model, verbose=False)
    return model.evaluated[-2:]


@pytest.mark.parametrize("plan", [ZERO3, ZERO2], ids=["ZeRO-3", "ZeRO-2"])
def test_full_tensors_are_loaded_into_module_and_copies(two, plan):
    model = Language(seed=5, tied=True)
    trainer(limit_val_batches=2).validate(model, verbose=False)
    for evaluated in two.run(loaded, plan):
        assert evaluated == pytest.approx(model.evaluated, rel=1e-5)


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_copies_are_found_by_their_parameters():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    same, average = copy.deepcopy(module), AveragedModel(module)
    holders = [
        Holder(same=same, other=nn.Linear(2, 3), module=module, part=module[0]),
        Holder(number=3, average=average, nothing=None),
    ]
    assert list(find_copies(holders, module)) == [same, average.module]


def averaged(multi_avg_fn):
    """An average of what is sharded beside what is not, in one operation on lists."""
    model, _ = fitted(ZERO3)
    model.register_buffer("seen", torch.ones(3))
    average = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True)
    average_shards([Holder(average=average)])
    first = whole(model)
    for factor in (1.0, 3.0):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(factor)
        average.update_parameters(model)
    found = whole(average.module)
    return {name: (found[name] / first[name]).nanmean().item() for name in found}


@pytest.mark.parametrize(("multi_avg_fn", "expected"), [(None, 2.0), (get_ema_multi_avg_fn(0.25), 2.5)])
def test_averages_in_one_operation(two, multi_avg_fn, expected):
    (ratios, _) = two.run(averaged, None if multi_avg_fn is None else Ema())
    assert ratios == pytest.approx(dict.fromkeys(ratios, expected))


class Ema:
    """What torch makes, and can be sent to the ranks."""

    def __call__(self, *args):
        return get_ema_multi_avg_fn(0.25)(*args)


class Teacher(Callback):
    """Keeps the module as it was and learns from what it says, as a callback that distils does."""

    def setup(self, trainer, module, stage):
        self.teacher = copy.deepcopy(module).requires_grad_(False)
        self.said: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        with torch.no_grad():
            self.said.append(self.teacher(torch.arange(8)[None] % 32))


def teach(plan, devices):
    model, teacher = Language(tied=True), Teacher()
    for _ in range(2):
        strategy = LargeScaleStrategy(plan) if plan else "auto"
        trainer(strategy, devices=devices, max_steps=2, callbacks=[teacher]).fit(model)
    if plan:
        assert all(isinstance(parameter, DTensor) for parameter in teacher.teacher.parameters())
    return teacher.said


@pytest.mark.parametrize("plan", [ZERO2, ZERO3])
def test_a_copy_computes(two, plan):
    for said in two.run(teach, plan, 2):
        torch.testing.assert_close(said, teach(None, 1), rtol=1e-4, atol=1e-5)


def parts_copied():
    """What copies of parts compute, with the weights of the module and with full tensors loaded into them."""
    model, run = fitted(ZERO3, tied=True)
    tokens, x = torch.arange(8)[None], torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    calls = {
        "embedding": lambda part: part(tokens),
        "head": lambda part: part(x),
        "norm": lambda part: part(x),
        "blocks": lambda part: part[1](part[0](x)),
        "blocks.0": lambda part: part(x),
        "blocks.0.up": lambda part: part(x),
    }
    copies = {name: copy.deepcopy(model.get_submodule(name)) for name in calls}
    pair = copy.deepcopy([model.embedding, model.head])
    assert pair[0].weight is pair[1].weight
    full = Language(seed=5, tied=True)
    for name, call in calls.items():
        part, made = model.get_submodule(name), copies[name]
        assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
        assert_equal(whole(made), whole(part))
        with torch.no_grad(), run.strategy.full_parameters():
            expected = call(part)
        with torch.no_grad():
            torch.testing.assert_close(call(made), expected)
            made.load_state_dict(full.get_submodule(name).state_dict())
            torch.testing.assert_close(call(copy.deepcopy(made)), call(full.get_submodule(name)))
        assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    # Only the copies have been written into, and they outlive the sharding, of which nothing is left.
    run.strategy.make_whole()
    assert not any("__deepcopy__" in vars(part) for part in model.modules())
    torch.testing.assert_close(copies["head"](x), full.head(x))
    return float(model.head(x).detach().sum())


def test_parts_can_be_copied_and_compute(two):
    first, second = two.run(parts_copied)
    assert first == second


class Averages(Teacher):
    def setup(self, trainer, module, stage):
        if not hasattr(self, "average"):
            super().setup(trainer, module, stage)
            self.average = AveragedModel(module)


def hooks_of(module):
    return [
        len(vars(module)[f"_{kind}"]) for kind in ("forward_pre_hooks", "forward_hooks", "load_state_dict_pre_hooks")
    ]


def setups(plans):
    """What a copy and an average carry once the module has been trained by each of `plans` in turn."""
    model, averages = Language(tied=True), Averages()
    found = []
    for plan in plans:
        trainer(LargeScaleStrategy(plan), devices=2, max_steps=1, callbacks=[averages]).fit(model)
        average = averages.average.multi_avg_fn
        found.append((hooks_of(averages.teacher), hooks_of(averages.average.module), type(average._average).__name__))
    return found


def test_what_copies_are_given_is_given_once_and_taken_back(two):
    sharded, replicated = ([1, 1, 1], [1, 1, 1], "function"), ([0, 0, 0], [0, 0, 0], "function")
    for found in two.run(setups, [ZERO3, ZERO3, Plan(dp_replicate=2), ZERO2]):
        assert found == [sharded, sharded, replicated, sharded]


def equalled():
    rank = int(os.environ["RANK"])
    copies = [nn.BatchNorm1d(4), nn.BatchNorm1d(3)]
    for one in copies:
        for tensor in (*one.parameters(), *one.buffers()):
            tensor.detach().fill_(rank + 1)
    found = []
    for buffers_only in (True, False):
        with CommDebugMode() as communication:
            equal_copies(copies, torch.device("cpu"), buffers_only=buffers_only)
        values = [[float(tensor.mean()) for tensor in one.state_dict().values() if tensor.dim()] for one in copies]
        found.append((communication.get_total_counts(), values))
    return found


def test_copies_are_made_equal_in_few_broadcasts(two):
    first, second = two.run(equalled)
    # Numbers and counters together, as bytes.
    assert first == [(1, [[1.0] * 4] * 2)] * 2
    assert second == [(1, [[2.0, 2.0, 1.0, 1.0]] * 2), (1, [[1.0] * 4] * 2)]


def whole_with_its_copies(strategy):
    model, teacher = Language(tied=True), Teacher()
    for plan in (LargeScaleStrategy(ZERO3), strategy()):
        trainer(plan, devices=2, max_steps=2, callbacks=[teacher]).fit(model)
    model.trainer.strategy.make_whole()
    return [isinstance(parameter, DTensor) for parameter in (*model.parameters(), *teacher.teacher.parameters())]


def zero_2():
    return LargeScaleStrategy(ZERO2)


@pytest.mark.parametrize("strategy", [LargeScaleAutoStrategy, zero_2])
def test_copies_become_whole_with_the_module(two, strategy):
    for divided in two.run(whole_with_its_copies, strategy):
        assert not any(divided)
