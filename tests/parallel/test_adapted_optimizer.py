"""Any optimizer on shards: it trains as on one process, on DTensors or in parts, or says at setup why not."""

from __future__ import annotations

import os

import pytest
import torch
from models import Language, Lion, SaveLast, read_checkpoint, trainer
from ranks import quiet
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Elementwise(Lion):
    """As Lion, with a number beside its mean of a shape of its own, as some keep."""

    def update(self, parameter, state, group):
        state["steps"] = state.get("steps", torch.zeros(1)) + 1
        super().update(parameter, state, group)


class Replacing(Elementwise):
    """Puts a new tensor in the place of the old one, in numpy, which knows of no DTensors."""

    def update(self, parameter, state, group):
        array = parameter.numpy() - group["lr"] * parameter.grad.numpy()
        parameter.data = torch.as_tensor(array)


class Failing(Elementwise):
    """With a momentum; a step raises halfway when told to."""

    failing = False

    def update(self, parameter, state, group):
        if self.failing and parameter is self.param_groups[0]["params"][1]:
            raise MemoryError
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        parameter.sub_(mean.mul_(0.9).add_(parameter.grad), alpha=group["lr"])


class FailingInParts(Failing):
    """The same, where DTensors have no storage to look at."""

    def update(self, parameter, state, group):
        parameter.numpy()
        super().update(parameter, state, group)


class Based(torch.optim.SGD):
    """A step that is its base class's and a bit more."""

    def step(self, closure=None):
        return super().step(closure)


class TrustRatio(Elementwise):
    """As LAMB: norms of whole parameters."""

    def update(self, parameter, state, group):
        parameter.sub_(parameter.grad * (group["lr"] * parameter.norm() / parameter.grad.norm().clamp(min=1e-6)))


class TrustNumber(Elementwise):
    """As `TrustRatio`, where the norm of a DTensor is only this rank's."""

    def update(self, parameter, state, group):
        parameter.sub_(
            parameter.grad, alpha=group["lr"] * float(parameter.norm()) / max(float(parameter.grad.norm()), 1e-6)
        )


class RanksDiffer(Elementwise):
    """Steps on plain tensors as it does on DTensors, but on one rank."""

    def update(self, parameter, state, group):
        differs = os.environ.get("RANK") == "1" and not isinstance(parameter, DTensor)
        parameter.sub_(parameter.grad, alpha=2 * group["lr"] if differs else group["lr"])


class Sharpness(Elementwise):
    """As SAM: the loss is wanted at other parameters than those that the step began with."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.add_(0.05)
        with torch.enable_grad():
            loss = closure()
        for parameter in parameters:
            parameter.sub_(0.05).sub_(parameter.grad, alpha=1e-2)
        return loss


def of(kind, **options):
    """A function of a module that builds an optimizer of all its parameters."""
    return lambda module: kind(module.parameters(), **{"lr": 1e-2, **options})


def decayed(**options):
    """Matrices decay and the rest does not."""

    def build(module):
        parameters = list(module.parameters())
        groups = [
            {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": 0.1},
            {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, **options)

    return build


def eight_bit(module):
    """Of parameters whose shards are of whole blocks of 256 elements."""
    import bitsandbytes

    parameters = [module.embedding.weight, module.head.weight]
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=256)


def eight_bit_cut(module):
    """Of parameters of which some have blocks on two ranks."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(module.parameters(), lr=1e-3, min_8bit_size=256)


def thirty_two_bit(module):
    import bitsandbytes

    return bitsandbytes.optim.AdamW(module.parameters(), lr=1e-2)


AS_THEY_ARE = {
    "AdamW": of(torch.optim.AdamW),
    "AdamW foreach": of(torch.optim.AdamW, foreach=True, amsgrad=True),
    "AdamW fused": of(torch.optim.AdamW, fused=True),
    "Adam": of(torch.optim.Adam, weight_decay=0.1),
    "SGD": of(torch.optim.SGD, momentum=0.9, nesterov=True),
    "SGD foreach": of(torch.optim.SGD, foreach=True),
    "decayed foreach": decayed(foreach=True),
    "decayed fused": decayed(fused=True),
    "Adagrad": of(torch.optim.Adagrad),
    "Adadelta": of(torch.optim.Adadelta, lr=1.0),
    "Adamax": of(torch.optim.Adamax),
    "ASGD": of(torch.optim.ASGD),
    "NAdam": of(torch.optim.NAdam),
    "RAdam": of(torch.optim.RAdam),
    "RMSprop": of(torch.optim.RMSprop),
    "by hand": of(Elementwise),
    "trust ratio": of(TrustRatio),
    "Muon": lambda module: torch.optim.Muon([p for p in module.parameters() if p.dim() == 2], lr=1e-2),
}
IN_PARTS = {
    "SGD fused": of(torch.optim.SGD, fused=True, momentum=0.9),
    "Adagrad fused": of(torch.optim.Adagrad, fused=True),
    "Rprop": of(torch.optim.Rprop),
    "replacing": of(Replacing),
}
REFUSED = {
    "Adafactor": (of(torch.optim.Adafactor), "its step on a parameter is not that on its parts"),
    "trust number": (of(TrustNumber), "its steps on DTensors are not those on whole parameters"),
    "ranks differ": (of(RanksDiffer), "ranks found different ways for it to step"),
    "LBFGS": (of(torch.optim.LBFGS), "it evaluates the loss again within its step"),
    "sharpness": (of(Sharpness), "it evaluates the loss again within its step"),
    "SparseAdam": (of(torch.optim.SparseAdam), "SparseAdam does not support dense gradients"),
}
BITSANDBYTES = {"8 bits": eight_bit, "8 bits cut": eight_bit_cut, "32 bits": thirty_two_bit}
PLANS = [Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False), Plan(dp_replicate=2)]


class Trained(Language):
    """With a parameter without dimensions, which stays whole where others are divided."""

    def __init__(self, build, **options):
        super().__init__(layers=2, **options)
        self.scale = nn.Parameter(torch.ones(()))
        self.build = build

    def forward(self, tokens):
        return super().forward(tokens) * self.scale

    def configure_optimizers(self):
        return self.build(self)


def builders():
    refused = {name: build for name, (build, _) in REFUSED.items()}
    return {**AS_THEY_ARE, **IN_PARTS, **refused, **BITSANDBYTES}


def fit(name, plan, devices, **options):
    """Losses, and what the optimizer holds after the run."""
    model = Trained(builders()[name], seed=int(os.environ.get("RANK", 0)))
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, **{"max_steps": 4, **options})
    run.fit(model)
    optimizer = run.optimizers[0]
    parameters = {id(parameter) for parameter in model.parameters()}
    assert all(id(p) in parameters for group in optimizer.param_groups for p in group["params"])
    assert all(id(p) in parameters for p in optimizer.state)
    divided = all(
        isinstance(value, DTensor) == isinstance(parameter, DTensor)
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim()
    )
    return model.losses, divided


QUICK = {("decayed fused", "ZeRO-3"), ("SGD fused", "ZeRO-3"), ("replacing", "ZeRO-2"), ("by hand", "replicate")}


def cases(names):
    quick = QUICK | {(name, "ZeRO-3") for name in BITSANDBYTES}
    layouts = dict(zip(("ZeRO-3", "ZeRO-2", "replicate"), PLANS, strict=True))
    return [
        pytest.param(name, plan, marks=[] if (name, layout) in quick else pytest.mark.slow, id=f"{name}-{layout}")
        for name in names
        for layout, plan in layouts.items()
    ]


@pytest.mark.parametrize(("name", "plan"), cases([*AS_THEY_ARE, *IN_PARTS]))
def test_trains_as_on_one_process(two, name, plan):
    expected, _ = fit(name, None, 1)
    tolerance = 1e-2 if name == "Muon" else 1e-5
    for losses, divided in two.run(fit, name, plan, 2):
        assert losses == pytest.approx(expected, rel=tolerance)
        assert divided


SLOW = ["Adafactor", "sharpness", "SparseAdam"]


def refusal(name, plan):
    model = Trained(builders()[name])
    try:
        trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(model)
    except PlanError as error:
        assert model.losses == []
        return str(error)
    return None


QUICKLY = ["trust number", "ranks differ", "LBFGS"]


@pytest.mark.parametrize("name", [*QUICKLY, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_refused_before_the_first_step(two, name):
    for told in two.run(refusal, name, Plan(dp_shard=2)):
        assert "cannot train a sharded module" in told
        assert REFUSED[name][1] in told
        assert told.endswith("replicate with Plan(dp_replicate=2), or choose another optimizer.")


class Forgets(Trained):
    """Goes on after a step that failed, the second."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.optimizer.failing = batch_idx == 1
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except MemoryError:
            forget = getattr(self.trainer.strategy, "forget_step", self.zero_grad)
            forget()
            self.check(optimizer)
            self.failed = True

    def check(self, optimizer):
        """Between steps the optimizer holds the module's parameters."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in self.parameters()}
        assert held >= {id(parameter) for parameter in optimizer.state}


def forgotten(kind, plan, devices):
    model = Forgets(of(kind))
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=4)
    run.fit(model)
    assert model.failed
    adapted = run.strategy._checkpoints.adapted if plan else ()
    return model.losses, [one._depth for one in adapted]


@pytest.mark.parametrize("kind", [Failing, FailingInParts])
def test_a_step_that_failed_is_forgotten(two, kind):
    expected, _ = forgotten(kind, None, 1)
    for losses, depths in two.run(forgotten, kind, Plan(dp_shard=2), 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert depths == [0]


def go_on(name, plan, devices, epochs, path=None, save=None, **options):
    """Losses of epochs of three steps until `epochs`, from `path`; the last writes `save`."""
    model = Trained(builders()[name], samples=24, seed=int(os.environ.get("RANK", 0)) + (7 if path else 0), **options)
    callbacks = [SaveLast(save)] if save else []
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    run = trainer(strategy, devices=devices, max_steps=-1, max_epochs=epochs, callbacks=callbacks)
    try:
        run.fit(model, ckpt_path=path, weights_only=False)
    except PlanError as error:
        return str(error)
    return model.losses


@pytest.mark.parametrize("name", ["SGD fused", pytest.param("Rprop", marks=pytest.mark.slow)])
def test_a_checkpoint_of_steps_in_parts_goes_on_anywhere(two, tmp_path, name):
    files = [str(tmp_path / f"{number}.ckpt") for number in range(3)]
    losses = two.run(go_on, name, Plan(dp_shard=2), 2, 1, None, files[0])[0]
    losses += go_on(name, None, 1, 2, files[0], files[1])
    losses += two.run(go_on, name, Plan(dp_shard=2, reshard_after_forward=False), 2, 3, files[1], files[2])[0]
    losses += two.run(go_on, name, Plan(dp_replicate=2), 2, 4, files[2])[0]
    assert losses == pytest.approx(go_on(name, None, 1, 4), rel=1e-5)
    written, stock = read_checkpoint(files[0]), str(tmp_path / "stock.ckpt")
    go_on(name, None, 1, 1, None, stock)
    assert_alike(written["optimizer_states"], read_checkpoint(stock)["optimizer_states"])


def assert_alike(found, expected):
    """The same containers of the same kinds of tensors."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_alike(found[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)


@pytest.fixture
def bitsandbytes():
    """There, and silent on kernels that it has for some machines."""
    return pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("name", "plan"), cases(BITSANDBYTES))
def test_bitsandbytes(two, name, plan):
    expected, _ = fit(name, None, 1)
    for losses, divided in two.run(fit, name, plan, 2):
        # What is quantised together differs with where a block is cut.
        assert losses == pytest.approx(expected, rel=1e-3 if name == "8 bits cut" else 1e-5)
        assert divided


@pytest.mark.usefixtures("bitsandbytes")
def test_bitsandbytes_checkpoints(two, tmp_path):
    files = [str(tmp_path / f"{number}.ckpt") for number in range(3)]
    losses = two.run(go_on, "8 bits", Plan(dp_shard=2), 2, 1, None, files[0])[0]
    losses += go_on("8 bits", None, 1, 2, files[0], files[1])
    losses += two.run(go_on, "8 bits", Plan(dp_shard=2), 2, 3, files[1])[0]
    assert losses == pytest.approx(go_on("8 bits", None, 1, 3), rel=1e-5)


@pytest.mark.usefixtures("bitsandbytes")
def test_bitsandbytes_state_in_blocks_that_are_cut_is_not_written_wrongly(two, tmp_path):
    path = str(tmp_path / "cut.ckpt")
    for told in two.run(go_on, "8 bits cut", Plan(dp_shard=2), 2, 1, None, path):
        assert "AdamW8bit keeps 'absmax1' of blocks of elements" in told
        assert "save_weights_only=True" in told
    go_on("8 bits cut", None, 1, 1, None, path)
    for told in two.run(go_on, "8 bits cut", Plan(dp_shard=2), 2, 2, path):
        assert "AdamW8bit keeps 'absmax1' of blocks of elements" in told
