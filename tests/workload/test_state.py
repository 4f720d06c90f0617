import torch
from workload import families
from workload.check import assert_same, real_step, state_of
from workload.families import GPT, Metered, Wrapped, tokens, two_tensors

from lightning_largescale.workload import Workload


def test_books_are_left_as_they_were():
    module, batch = Metered(), two_tensors()
    before = state_of(module)
    work = Workload.trace(module, batch, precisions=("32-true",))
    assert_same(before, state_of(module))
    assert any("reads numbers off tensors" in why for why in work.approximate)
    assert not any("cannot run" in why for why in work.approximate)
    real_step(module, batch)
    assert_same(before, state_of(module))
    assert module.history == []
    assert module.accuracy.update_count == 0


def test_user_hooks_and_gradients_stay():
    module, calls = GPT(), []
    weight = module.head.weight
    weight.grad = torch.ones_like(weight)
    weight.register_post_accumulate_grad_hook(calls.append)
    before = state_of(module)
    Workload.trace(module, tokens(), precisions=("32-true",))
    real_step(module, tokens())
    assert_same(before, state_of(module))
    assert calls == []
    assert torch.equal(weight.grad, torch.ones_like(weight))


class Overwriting(Wrapped):
    """Writes into its parameters, its buffers and its batch, as weight clipping and moving averages do."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-0.01, 0.01)
            torch._foreach_mul_(list(self.parameters()), 2.0)
        batch.mul_(2)
        return super().training_step(batch, batch_idx)


def test_overwritten_tensors_are_put_back():
    module, batch = Overwriting(families.convolutions()), torch.randn(4, 3, 16, 16)
    before, original = state_of(module), batch.clone()
    fake = Workload.trace(module, batch, precisions=("32-true",))
    real = real_step(module, batch)
    assert_same(before, state_of(module))
    assert torch.equal(batch, original)
    assert fake.steps == real.steps


def test_state_is_put_back_when_the_step_raises():
    class Failing(Metered):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise KeyError("no such column")

    module, batch = Failing(), two_tensors()
    before = state_of(module)
    work = Workload.trace(module, batch, precisions=("32-true",))
    assert_same(before, state_of(module))
    (why,) = work.approximate
    assert "KeyError: 'no such column'" in why
    assert "estimated from the shapes" in why
    assert work.steps["32-true"].forward_flops > 0


class Meter:
    """A plain object that a step keeps its sums in."""

    def __init__(self):
        self.total, self.seen = torch.zeros(()), {"losses": []}


class Nested(Wrapped):
    """Keeps what it has seen below the first level of its attributes."""

    def __init__(self, inner):
        super().__init__(inner)
        self.outputs, self.meter = {"train": []}, Meter()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs["train"].append(loss.detach())
        self.meter.total = self.meter.total + loss.detach()
        self.meter.seen["losses"].append(loss.detach())
        return loss


def test_nested_state_is_put_back():
    module = Nested(families.convolutions())
    Workload.trace(module, torch.randn(4, 3, 16, 16), precisions=("32-true",))
    assert module.outputs == {"train": []}
    assert module.meter.seen == {"losses": []}
    assert float(module.meter.total) == 0
