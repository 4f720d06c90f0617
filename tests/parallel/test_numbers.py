"""Norms, clipping and logging of divided gradients by torch's and Lightning's own functions, as in a plain run."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from clicks import Holder, connected
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import grad_norm
from models import Language, trainer
from ranks import quiet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.embedding import shard_embeddings
from lightning_largescale.parallel.numbers import WholeNumbers
from lightning_largescale.parallel.rows import rows_of
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

# What a user clips by; each gives the norm it has found, if any.
CLIPS = {
    "norm": lambda module, optimizer: module.clip_gradients(optimizer, 0.1, "norm"),
    "value": lambda module, optimizer: module.clip_gradients(optimizer, 1e-3, "value"),
    "torch norm": lambda module, _: clip_grad_norm_(module.parameters(), 0.1, error_if_nonfinite=True),
    "torch maximum": lambda module, _: clip_grad_norm_(module.parameters(), 0.1, norm_type=float("inf")),
    "torch one by one": lambda module, _: clip_grad_norm_(module.parameters(), 0.1, foreach=False),
    "torch value": lambda module, _: clip_grad_value_(module.parameters(), 1e-3),
}


class Clipped(Language):
    """Clips by itself, in either kind of optimisation, some parameters being divided and some not.

    Args:
        clip: name of the way.
        manual: kind of optimisation.
        infinite_on: the rank whose second loss is infinite.
    """

    def __init__(self, clip="norm", *, manual=False, infinite_on=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.automatic_optimization = not manual
        self.clip, self.infinite_on = clip, infinite_on
        self.norms = []

    def forward(self, tokens):
        return super().forward(tokens) * self.scale

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if index == 1 and self.global_rank == self.infinite_on:
            loss = loss * float("inf")
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.configure_gradient_clipping(optimizer)
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        norms = grad_norm(self, norm_type=2)
        self.log_dict(norms)
        self.norms.append({name: float(norm) for name, norm in norms.items()})

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = CLIPS[self.clip](self, optimizer)
        if norm is not None:
            assert type(norm) is torch.Tensor
            self.norms.append({"clipped by": float(norm)})


def fit(plan, devices, *args, scaled=False, **kwargs):
    model = Clipped(*args, **kwargs)
    options = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if scaled else {}
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=3, **options)
    run.fit(model)
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("grad")}
    return model.losses, model.norms, logged, getattr(run.scaler, "get_scale", lambda: None)()


def cases():
    """A choice for every day: every way, each kind of optimisation."""
    for number, clip in enumerate(CLIPS):
        yield pytest.param(clip, number % 2 == 0)
        yield pytest.param(clip, number % 2 == 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("clip", "manual"), list(cases()))
def test_clips_and_logs_as_a_plain_run(two, clip, manual):
    losses, norms, logged, _ = fit(None, 1, clip, manual=manual)
    assert len(logged) > 10
    for reshard in [True, False] if clip == "torch norm" else [True]:
        for found in two.run(fit, Plan(dp_shard=2, reshard_after_forward=reshard), 2, clip, manual=manual):
            assert found[0] == pytest.approx(losses, rel=1e-6)
            assert found[2] == pytest.approx(logged, rel=1e-4)
            for ours, expected in zip(found[1], norms, strict=True):
                assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_that_are_not_finite_on_one_rank_are_so_for_all(two, rank):
    with pytest.raises(
        RuntimeError, match=r"The total norm of order 2.0 for gradients from `parameters` is non-finite"
    ):
        two.run(fit, Plan(dp_shard=2), 2, "torch norm", infinite_on=rank)


def test_a_scaler_skips_a_step_that_is_not_finite_on_one_rank(two):
    losses, _, _, scale = fit(Plan(precision="16-mixed"), 1, infinite_on=0, scaled=True)
    for rank in (0, 1):
        for plan in (Plan(precision="16-mixed", dp_shard=2), Plan(precision="16-mixed", dp_replicate=2)):
            for found in two.run(fit, plan, 2, infinite_on=rank, scaled=True):
                # What both ranks' second batch was is not what one process had: the step is skipped all the same.
                assert found[0][:1] + found[0][2:] == pytest.approx(losses[:1] + losses[2:], rel=1e-3)
                assert found[3] == scale == 2.0**15


SHAPES = [(5, 3), (4,), (1, 2), (3, 3), ()]


def with_gradients():
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(parameter.shape)
    return made


def shards():
    """The same gradients, on two meshes of the same ranks and on none."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    meshes = [init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("a", "b")]
    made = with_gradients()
    for index, mesh in ((0, meshes[0]), (1, meshes[0]), (2, meshes[1])):
        whole = made[index]
        made[index] = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        made[index].grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
    return made


def full(gradient):
    return gradient if gradient is None or type(gradient) is torch.Tensor else gradient.full_tensor()


def clip_shards(limit, foreach):
    by_norm, by_value = shards(), shards()
    with WholeNumbers():
        norm = clip_grad_norm_(by_norm, limit, foreach=foreach)
        clip_grad_value_(by_value, limit, foreach=foreach)
    return type(norm) is torch.Tensor, float(norm), [[full(p.grad) for p in group] for group in (by_norm, by_value)]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_as_torch_clips_plain_gradients(two, limit, foreach):
    by_norm, by_value = with_gradients(), with_gradients()
    norm = clip_grad_norm_(by_norm, limit)
    clip_grad_value_(by_value, limit)
    for plain, found, gradients in two.run(clip_shards, limit, foreach):
        assert plain
        assert found == pytest.approx(float(norm), rel=1e-6)
        for group, expected in zip(gradients, (by_norm, by_value), strict=True):
            torch.testing.assert_close(group, [p.grad for p in expected])


def table_gradient():
    """That of three rows of a table on two ranks, of which one has two."""
    module = Holder(nn.Embedding(11, 3))
    lookups = shard_embeddings(module, ["table"], torch.device("cpu"))
    scale = torch.tensor([[1.0], [2.0], [-3.0]])
    (module.table(torch.tensor([1, 4, 9])) * scale).sum().backward()
    lookups.join()
    lookups.end_backward()
    return module.table.weight


WHOLE_GRADIENT = torch.zeros(11, 3).index_put((torch.tensor([1, 4, 9]),), torch.tensor([[1.0], [2.0], [-3.0]]))

NORMS = {
    "0": lambda g: torch.norm(g, 0),
    "1": lambda g: g.norm(1),
    "default": torch.norm,
    "3": lambda g: torch.linalg.vector_norm(g, 3),
    "inf": lambda g: g.norm(math.inf),
    "double": lambda g: torch.linalg.vector_norm(g, dtype=torch.float64),
    "copy": lambda g: g.clone().norm(),
    "scaled": lambda g: (2 * (g / 3) * torch.tensor(2.0)).norm(),
    "of several": lambda g: nn.utils.get_total_norm([g, g]),
}
CHANGES = {
    "none": lambda g: g,
    "scaled": lambda g: g.mul_(2.0),
    "each scaled": lambda g: torch._foreach_mul_([g], 2.0),
    "added": lambda g: g.mul_(2.0).add_(g.clone()),
    "added each": lambda g: torch._foreach_add_([g.clone()], [g]),
}


def norms_of_a_table(change, within):
    weight = table_gradient()
    CHANGES[change](weight.grad) if not within else None
    with WholeNumbers():
        CHANGES[change](weight.grad) if within else None
        norms = {name: norm(weight.grad) for name, norm in NORMS.items()}
        clip_grad_norm_([weight], 0.1)
        clipped = weight.grad.norm()
        clip_grad_value_([weight], 0.01)
    return norms, float(clipped), float(weight.grad.to_dense().abs().max())


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_gradient_of_a_table_however_it_was_changed(two, change, within):
    gradient = WHOLE_GRADIENT.clone()
    CHANGES[change](gradient)
    for norms, clipped, largest in two.run(connected, norms_of_a_table, change, within):
        for name, norm in NORMS.items():
            torch.testing.assert_close(norms[name], norm(gradient), msg=name)
        assert clipped == pytest.approx(0.1, rel=1e-4)
        assert largest == pytest.approx(0.01)


def marks():
    gradient = table_gradient().grad
    with WholeNumbers():
        made = [gradient.clone(), gradient * 2, torch.div(gradient, torch.tensor(2.0)), gradient * torch.ones(3)]
        return [rows_of(one) == rows_of(gradient) for one in made]


def test_what_is_a_gradient_still(two):
    assert two.run(connected, marks) == [[True, True, True, False]] * 2


REFUSED = {
    "-inf": (lambda g: g.norm(-math.inf), "norm of the gradient of a row-sharded table was given the order -inf;"),
    "nuc": (lambda g: torch.norm(g, "nuc"), "norm of the gradient of a row-sharded table was given the order 'nuc';"),
    "dim": (lambda g: torch.norm(g, dim=0), "norm of the gradient .* was given the order 2.0 and \\[0\\];"),
    "keepdim": (lambda g: torch.linalg.vector_norm(g, 2, None, True), "linalg_vector_norm .* order 2 and \\[True\\];"),
}


def norm_that_is_refused(name):
    gradient = table_gradient().grad
    with WholeNumbers():
        REFUSED[name][0](gradient)


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_are_refused(two, name):
    for error, _, _ in two.answers(connected, norm_that_is_refused, name):
        with pytest.raises(PlanError, match=f"^{REFUSED[name][1]} give an order of 0 or more, without dim"):
            raise error


class Scaled(Language):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def configure_optimizers(self):
        # Adam's divisor may be 0 where gradients are scaled.
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused, eps=1e-6)


def fit_scaled(plan, fused):
    model = Scaled(fused)
    run = trainer(LargeScaleStrategy(plan), accelerator="cuda", max_steps=4)
    run.fit(model)
    return [*model.losses, *(float(one.detach().double().sum()) for one in model.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fields", "fused"),
    [
        ({"offload_parameters": "cpu"}, False),
        ({"offload_parameters": "nvme"}, False),
        ({"offload_parameters": "cpu", "resident_parameter_bytes": 8000}, False),
        ({"offload_parameters": "cpu"}, True),
    ],
)
def test_the_scale_has_come_where_the_host_computes_with_it(tmp_path, fields, fused):
    expected = fit_scaled(Plan(precision="16-mixed"), fused)
    found = fit_scaled(Plan(precision="16-mixed", nvme_path=str(tmp_path), **fields), fused)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
