from __future__ import annotations

import copy

import pytest
import torch
from offload.optimizers import BUILDERS, WHOLE, Counting, GlobalNorm, Lion, difference, model, of, output
from torch import nn

from lightning_largescale.errors import PlanError
from lightning_largescale.optimizers.state_spec import spec_key, state_specs


def asked(optimizer):
    parameters = [(one, number) for number, group in enumerate(optimizer.param_groups) for one in group["params"]]
    return state_specs(optimizer, parameters)


@pytest.mark.parametrize("name", BUILDERS)
def test_whether_pages_may_end_within_a_parameter_and_what_is_paged(name):
    module = model()
    optimizer = BUILDERS[name](module)
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    specs = asked(optimizer)
    assert {spec.elementwise for spec in specs.values()} == {name not in WHOLE}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # 8-bit optimizers keep what is small in full, as that which they are tried on.
            expected = {
                key: value.dtype
                for key, value in state.items()
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim()
            }
            assert specs[spec_key(parameter, number)].dtypes == expected


class Evaluating(Lion):
    def step(self, closure):
        return super().step(closure)


class Sparse(Lion):
    def update(self, parameter, state, group):
        raise RuntimeError("only for sparse gradients. Others come later")


class Noisy(Lion):
    def update(self, parameter, state, group):
        parameter.add_(torch.randn_like(parameter), alpha=group["lr"])


class Recent(Lion):
    """A number, kept for all parameters beside the state, that each changes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {"steps": 0}

    def update(self, parameter, state, group):
        self.seen["steps"] += 1
        parameter.sub_(parameter.grad, alpha=group["lr"] / (1 + self.seen["steps"]))


class Inner(Lion):
    """Steps by another optimizer, which has the state."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)

    def step(self, closure=None):
        return self.inner.step(closure)


class Aside(Lion):
    """Keeps its momentum by parameter, but not in the state."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.means = {}

    def update(self, parameter, state, group):
        mean = self.means.setdefault(parameter, torch.zeros_like(parameter))
        parameter.sub_(mean.mul_(0.9).add_(parameter.grad), alpha=group["lr"])


ELSE = "leave out offload_optimizer, offload_parameters and release_gradients, or choose another optimizer."
APART = "cannot be paged: its step on one parameter after the other is not that on all of them; " + ELSE


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            torch.optim.LBFGS,
            "LBFGS cannot be paged: it evaluates the loss within its step, and forward and backward run once a step; "
            + ELSE,
        ),
        (
            Evaluating,
            "Evaluating cannot be paged: it evaluates the loss within its step, and forward and backward run once a "
            "step; " + ELSE,
        ),
        (
            torch.optim.SparseAdam,
            "SparseAdam cannot be paged: small tensors to try it on are not accepted (RuntimeError: SparseAdam does not"
            " support dense gradients, please consider Adam instead); leave out offload_optimizer,"
            " offload_parameters and release_gradients.",
        ),
        (
            Sparse,
            "Sparse cannot be paged: small tensors to try it on are not accepted (RuntimeError: only for sparse "
            "gradients); leave out offload_optimizer, offload_parameters and release_gradients.",
        ),
        (GlobalNorm, "GlobalNorm " + APART),
        (Noisy, "Noisy " + APART),
        (Recent, "Recent " + APART),
        (Inner, "Inner " + APART),
        (Aside, "Aside " + APART),
    ],
)
def test_refused(kind, reason):
    with pytest.raises(PlanError) as told:
        asked(kind(model().parameters(), lr=1e-3))
    assert str(told.value) == reason


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Counting, GlobalNorm])
def test_the_optimizer_and_the_random_state_stay_as_they_are(kind):
    module = model()
    optimizer = of(kind)(module)
    output(module, 0).square().mean().backward()
    optimizer.step()
    parameters, gradients = list(module.parameters()), [one.grad for one in module.parameters()]
    groups, state = list(optimizer.param_groups), dict(optimizer.state)
    before = copy.deepcopy((parameters, gradients, optimizer.state_dict(), torch.get_rng_state()))
    try:
        asked(optimizer)
    except PlanError:
        assert kind is GlobalNorm
    assert not difference([parameters, gradients, optimizer.state_dict(), torch.get_rng_state()], list(before))
    assert all(one is other for one, other in zip(groups, optimizer.param_groups, strict=True))
    assert all(optimizer.state[parameter] is own for parameter, own in state.items())
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))


def test_dtypes_and_the_learning_rate_do_not_matter():
    parameters = [nn.Parameter(torch.ones(5, 5, dtype=dtype)) for dtype in (torch.bfloat16, torch.float64)]
    specs = asked(torch.optim.AdamW(parameters, lr=0.0))
    assert {(key[3], spec.elementwise, *spec.dtypes.values()) for key, spec in specs.items()} == {
        (dtype, True, dtype, dtype) for dtype in (torch.bfloat16, torch.float64)
    }
