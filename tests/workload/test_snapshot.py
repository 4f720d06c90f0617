import pytest
import torch
from torch import nn
from workload import families
from workload.check import assert_same, real_step, state_of
from workload.families import GPT, Metered, Wrapped, tokens, two_tensors

from lightning_largescale.workload import Workload
from lightning_largescale.workload.snapshot import Snapshot


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
    assert fake.steps == {"32-true": real.step}


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


def scripted(model):
    return torch.jit.script(model)


def traced(model):
    return torch.jit.trace(model, torch.zeros(2, 8))


# torch.jit says that it will go.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [scripted, traced])
def test_torchscript_keeps_its_weights(compiled):
    module = Wrapped(nn.Sequential(compiled(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2)))
    x = torch.randn(4, 8)
    before = state_of(module)
    expected = module.model(x)
    work = Workload.trace(module, x, precisions=("32-true",))
    assert_same(before, state_of(module))
    assert torch.equal(module.model(x), expected)
    (why,) = work.approximate
    assert "TorchScript runs parts of it, and may read their addresses" in why
    assert "a real step was measured" in why
    assert work.optimizers[0].class_name == "SGD"


class Graph:
    """A batch of a class of the user's own, as graph libraries have."""

    def __init__(self):
        self.x, self.seen = torch.ones(2, 8), []


class Consuming(Wrapped):
    def training_step(self, batch, batch_idx):
        batch.x = batch.x * 2
        batch.seen.append(batch_idx)
        batch.x.add_(1)
        return self.model(batch.x).mean()


def test_a_batch_of_a_users_class_is_left_as_it_was():
    batch = Graph()
    x = batch.x
    work = Workload.trace(Consuming(nn.Linear(8, 8)), batch, precisions=("32-true",))
    assert batch.x is x
    assert torch.equal(x, torch.ones(2, 8))
    assert batch.seen == []
    assert work.approximate == ("no tensor was found in the batch, a Graph, so its samples and bytes are not known",)


class Unruly:
    """A key that can be put into a dict once."""

    hashed = 0

    def __hash__(self):
        Unruly.hashed += 1
        if Unruly.hashed > 1:
            raise TypeError("no hash any more")
        return 1


def test_what_cannot_be_put_back_keeps_nothing_else_from_it():
    module = nn.Module()
    module.first, module.table, module.last = [], {Unruly(): 1}, []
    random_state = torch.get_rng_state()

    def step():
        with Snapshot(module).untouched():
            torch.rand(1)
            module.first.append(1)
            module.last.append(1)
            module.table.clear()

    with pytest.raises(TypeError, match="no hash any more"):
        step()
    assert module.first == module.last == []
    assert torch.equal(random_state, torch.get_rng_state())
