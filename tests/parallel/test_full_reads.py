"""What hooks and steps read of sharded parameters and gradients, against what they read in a plain run."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import grad_norm
from models import Language, trainer
from ranks import mesh_of, quiet
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.full_reads import FullReads
from lightning_largescale.parallel.order import as_ordered, divided
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.workload.parts import Part

pytestmark = quiet

READS = {
    "all finite": lambda t: torch.isfinite(t).all(),
    "any nan": lambda t: bool(torch.isnan(t).any()),
    "norm": lambda t: t.norm().item(),
    "as float": lambda t: float(t.sum()),
    "largest": lambda t: t.abs().max().item(),
    "bounds": lambda t: [float(one) for one in torch.aminmax(t)],
    "share": lambda t: (t == 0).float().mean().item(),
    "spread": lambda t: t.std(correction=0).item(),
    "quantile": lambda t: t.quantile(0.3).item(),
    "infinite order": lambda t: torch.linalg.vector_norm(t, math.inf).item(),
    "norms of columns": lambda t: t.norm(dim=0, keepdim=True).clamp_(min=0.5),
    "norms of rows": lambda t: t.norm(dim=-1, keepdim=True).clamp_(min=0.5),
    "last": lambda t: t.flatten()[-1].item(),
    "first row": lambda t: t[0].tolist(),
    "chosen": lambda t: t[t > 0],
    "where": lambda t: torch.nonzero(t > 0),
    "rows": lambda t: [one.sum().item() for one in t],
    "array": lambda t: t.cpu().numpy().sum().item(),
    "scaled": lambda t: (t * torch.arange(float(t.numel())).view(t.shape)).sum().item(),
    "sorted": lambda t: t.flatten().sort().values,
    "all of several": lambda t: torch.cat([t.flatten(), t.flatten()]).norm(),
    "total": lambda t: torch.tensor([t.norm(), t.norm()]).norm(),
    "text": lambda t: f"{t.abs().max():.3f}",
}
WRITES = {
    "scaled": lambda t: t.mul_(0.5),
    "by plain": lambda t: t.mul_(torch.arange(float(t.numel())).view(t.shape)),
    "copied": lambda t: t.copy_(torch.arange(float(t.numel())).view(t.shape)),
    "clipped": lambda t: t.copy_(torch.where(t.norm(dim=-1, keepdim=True) > 1, t / t.norm(dim=-1, keepdim=True), t)),
    "without nan": lambda t: t.copy_(torch.nan_to_num(t)),
}
SHAPES = {"even": (4, 6), "uneven": (5, 6), "one row": (1, 6)}


def sharded(shape, dim, ordered):
    torch.manual_seed(0)
    whole = torch.randn(shape)
    mesh = mesh_of((2,))
    shard = distribute_tensor(whole, mesh, [Shard(dim)])
    if ordered:
        # As q, k and v side by side: each rank has some of both halves.
        part = Part(dim, (shape[dim] // 2, shape[dim] // 2))
        shard = as_ordered(divided(whole, shard, part), part)
    return whole, shard


NAN_READS = ("all finite", "any nan", "norm", "largest", "infinite order", "bounds", "norms of rows")


def nan_is_read():
    """Whether a NaN that one rank has is found by all."""
    whole, shard = sharded((4, 6), 0, ordered=False)
    whole[-1, -1] = math.nan
    shard = distribute_tensor(whole, mesh_of((2,)), [Shard(0)])
    wrong = []
    for name in NAN_READS:
        with FullReads():
            found, expected = (torch.as_tensor(READS[name](tensor)) for tensor in (shard, whole))
            found = found.full_tensor() if isinstance(found, DTensor) else found
        wrong += [] if torch.allclose(found.float(), expected.float(), equal_nan=True) else [name]
    return wrong


def test_a_nan_that_one_rank_has(two):
    assert two.run(nan_is_read) == [[], []]


def differences(shape, dim, ordered):
    wrong = []
    for name, read in READS.items():
        whole, shard = sharded(shape, dim, ordered)
        with FullReads():
            found = read(shard)
            same = close(found, read(whole))
        wrong += [] if same else [(name, found)]
    for name, write in WRITES.items():
        whole, shard = sharded(shape, dim, ordered)
        with FullReads():
            write(shard)
            same = close(shard, write(whole))
        wrong += [] if same else [(name, shard)]
    return wrong


def close(found, expected):
    """Within the mode: what is sharded is compared with what is plain."""
    if isinstance(expected, torch.Tensor):
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6) and tuple(found.shape) == tuple(expected.shape)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_functions_of_shards_are_those_of_the_full_tensor(two, shape, dim):
    assert two.run(differences, SHAPES[shape], dim, ordered=False) == [[], []]


@pytest.mark.parametrize("dim", [0, 1])
def test_functions_of_shards_in_another_order(two, dim):
    assert two.run(differences, (4, 8), dim, ordered=True) == [[], []]


HOOK_READS = {name: READS[name] for name in ("all finite", "norm", "largest", "share")}
HOOKS = (
    "on_train_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_end",
)


class Notes:
    """Keeps what the hooks of `HOOKS` read of every parameter and gradient."""

    def note(self, hook, module):
        for name, parameter in module.named_parameters():
            for tensor in (parameter.detach(), parameter.grad):
                if tensor is not None:
                    self.notes.append((hook, name, [float(read(tensor)) for read in HOOK_READS.values()]))


class Reading(Notes, Language):
    """Has hooks, an optimizer_step and a clipping that look; a parameter of one row, and a step that looks at all."""

    def __init__(self, *, manual=False):
        super().__init__(layers=2)
        self.odd = nn.Linear(16, 1)
        self.automatic_optimization = not manual
        self.notes = []

    def forward(self, tokens):
        x = super().forward(tokens)
        return x + self.odd(x)

    def training_step(self, batch, index):
        self.notes += [("step", name, [float(one.detach().norm())]) for name, one in self.named_parameters()]
        loss = super().training_step(batch, index)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.note("in the step", self)
        optimizer.step()
        return None

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if batch_idx % 2:
            closure()
            self.note("after the closure", self)
            optimizer.step()
        else:
            optimizer.step(closure=closure)
        self.note("after the step", self)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.zero_grad()

    def configure_gradient_clipping(self, *args, **kwargs):
        self.note("clipping", self)


class Watching(Notes, Callback):
    def __init__(self):
        self.notes = []


def looking(hook, *, at_first):
    """A hook of a module, or of a callback, whose first argument but one is the module."""

    def look(self, *args, **kwargs):
        self.note(hook, self if at_first else args[1])

    return look


for hook in HOOKS:
    setattr(Reading, hook, looking(hook, at_first=True))
    setattr(Watching, hook, looking(hook, at_first=False))


def fit_reading(plan, devices, manual, batches):
    model, callback = Reading(manual=manual), Watching()
    strategy = "auto" if plan is None else LargeScaleStrategy(plan)
    options = {"max_steps": 2, "callbacks": [callback], "accumulate_grad_batches": batches}
    trainer(strategy, devices=devices, **options).fit(model)
    return model.losses, model.notes, callback.notes


PLANS = {
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
    "tp": Plan(tp=2),
    "offload": Plan(dp_shard=2, offload_parameters="cpu", offload_optimizer="cpu"),
}


def hook_cases():
    """A choice for every day."""
    for name in PLANS:
        for manual in (False, True):
            daily = (name, manual) == ("ZeRO-2", False)
            yield pytest.param(name, manual, marks=() if daily else pytest.mark.slow)


@pytest.mark.parametrize(("name", "manual"), list(hook_cases()))
def test_hooks_read_as_in_a_plain_run(two, name, manual):
    losses, *notes = fit_reading(None, 1, manual, 1)
    assert len(notes[0]) > 100
    for found in two.run(fit_reading, PLANS[name], 2, manual, 1):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        for ours, expected in zip(found[1:], notes, strict=True):
            assert [one[:2] for one in ours] == [one[:2] for one in expected]
            for (hook, parameter, values), (*_, plain) in zip(ours, expected, strict=True):
                assert values == pytest.approx(plain, rel=1e-3, abs=1e-6), (hook, parameter)


class Guarded(Language):
    """Drops gradients that are not finite where they are not on one rank's shard, between two backwards of a step."""

    def __init__(self, guard):
        super().__init__(layers=2)
        self.guard, self.seen = guard, []

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss + (self.head.weight[-1, -1] * 0).sqrt() if index == 2 else loss

    def on_after_backward(self):
        if not GUARDS[self.guard](self):
            self.zero_grad()
            self.seen.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


GUARDS = {
    "stops early": lambda module: all(torch.isfinite(one.grad).all() for one in module.parameters()),
    "norm": lambda module: math.isfinite(grad_norm(module, 2)["grad_2.0_norm_total"]),
    "largest": lambda module: not any(one.grad.abs().max().isnan() for one in module.parameters()),
}


def fit_guarded(plan, devices, guard, batches=1):
    model = Guarded(guard)
    strategy = "auto" if plan is None else LargeScaleStrategy(plan)
    trainer(strategy, devices=devices, max_steps=4, accumulate_grad_batches=batches).fit(model)
    return model.seen, model.losses


def guard_cases():
    """A choice for every day."""
    for number, guard in enumerate(GUARDS):
        for batches in (1, 2):
            yield pytest.param(guard, batches, marks=pytest.mark.slow if number % 2 == batches % 2 else ())


@pytest.mark.parametrize(("guard", "batches"), list(guard_cases()))
def test_all_ranks_drop_gradients_that_are_not_finite(two, guard, batches):
    seen, losses = fit_guarded(None, 1, guard, batches)
    assert len(seen) == 1
    for found in two.run(fit_guarded, Plan(dp_shard=2), 2, guard, batches):
        assert found[0] == seen
        assert found[1] == pytest.approx(losses, rel=1e-5)


class Weighed(Language):
    """Divides the loss by the norm of its gradient of a block's weight."""

    def training_step(self, batch, index):
        loss = self.loss(batch)
        loss = loss / torch.autograd.grad(loss, self.blocks[0].up.weight, retain_graph=True)[0].norm().detach()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss


def fit_weighed(plan, devices):
    model = Weighed()
    trainer("auto" if plan is None else LargeScaleStrategy(plan), devices=devices, max_steps=3).fit(model)
    return model.losses


def test_gradients_of_shards_inside_a_step_are_those_of_one_process(two):
    expected = fit_weighed(None, 1)
    for losses in two.run(fit_weighed, Plan(dp_shard=2), 2):
        assert losses == pytest.approx(expected, rel=1e-5)


def export(how):
    model = Language(layers=1)
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=1).fit(model)
    tokens = torch.randint(32, (2, 8))
    {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, tokens),
        "export": lambda: torch.export.export(model, (tokens,)),
    }[how]()


@pytest.mark.parametrize("how", ["script", "trace", pytest.param("export", marks=pytest.mark.slow)])
def test_a_sharded_module_is_not_exported(two, how):
    for error, _, _ in two.answers(export, how):
        with pytest.raises(PlanError, match=rf"Language is sharded, and torch.*{how}.*make_whole\(\)"):
            raise error


class Mixing(Callback):
    """Computes with a parameter and tensors of the module's device, and writes of these into it."""

    def __init__(self):
        self.seen = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        weight = module.blocks[0].up.weight
        like = torch.linspace(0, 1, weight.numel(), device=module.device).view(weight.shape)
        self.seen += [(like.t() @ weight).cpu(), float((weight * like).sum()), float(torch.dist(weight, like))]
        rows, listed = [weight, like], torch.einsum("ij,ij->j", [like, weight])
        self.seen += [torch.cat(rows).cpu(), torch.stack(tensors=(like, weight)).cpu(), listed.cpu()]
        weight.mul_(torch.tensor(0.9, device=module.device))
        weight.add_(like, alpha=1e-2)
        weight.copy_(torch.where(like > 0.5, like, 0.1))


def fit_mixing(plan):
    model, mixing = Language(), Mixing()
    trainer(LargeScaleStrategy(plan), accelerator="cuda", max_steps=2, callbacks=[mixing]).fit(model)
    return model.losses, mixing.seen


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_what_is_offloaded_is_read_and_written_with_tensors_of_the_device(tmp_path, tier):
    found = fit_mixing(Plan(offload_parameters=tier, nvme_path=str(tmp_path)))
    torch.testing.assert_close(found, fit_mixing(Plan()))
