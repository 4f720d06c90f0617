import pytest
import torch
from torch import nn
from workload.families import Wrapped

from lightning_largescale.workload import Workload

WIDTH, WIDE = 128, 640


class Shaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(self.down(self.up(x)))


def needs_of(optimizer, **settings):
    module = Wrapped(Shaped(), optimizer=optimizer)
    work = Workload.trace(module, torch.randn(2, WIDTH), precisions=("32-true",), **settings)
    (needs,) = work.optimizers
    return needs, work


def real_state_bytes(optimizer):
    module = Wrapped(Shaped(), optimizer=optimizer)
    built = module.configure_optimizers()
    for _ in range(2):
        module.training_step(torch.randn(2, WIDTH), 0).backward()
        built.step()
    return {
        name: sum(v.numel() * v.element_size() for v in built.state[p].values() if isinstance(v, torch.Tensor))
        for name, p in module.named_parameters()
    }


def sgd_momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, sgd_momentum, torch.optim.Adam, torch.optim.AdamW, fused, torch.optim.Adagrad,
     torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
     torch.optim.ASGD, torch.optim.Rprop],
    ids=lambda o: o.__name__,
)  # fmt: skip
def test_state_is_that_of_the_real_optimizer(optimizer):
    needs, work = needs_of(optimizer)
    assert work.approximate == ()
    assert needs.state_bytes == real_state_bytes(optimizer)
    assert (needs.step_temporary_largest == 0) or (needs.step_temporary_total == 0)


class NeedsData(torch.optim.Optimizer):
    """A third-party optimizer whose kernel takes addresses; it keeps a matrix of half precision and a row."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                assert p.grad.numpy().sum() is not None
                state = self.state[p]
                if not state:
                    state["half"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["row"] = torch.zeros(p.shape[-1]) if p.dim() > 1 else torch.zeros(())
                p.data.add_(p.grad * group["lr"])


def test_one_that_needs_data_is_fitted_to_the_shapes():
    needs, work = needs_of(NeedsData)
    assert "NeedsData cannot step on fake tensors" in work.approximate[0]
    assert needs.state_bytes == real_state_bytes(NeedsData)
    assert needs.step_temporary_largest == pytest.approx(1.0, rel=0.01)


def test_one_that_cannot_be_asked_is_assumed():
    class Refusing(NeedsData):
        def step(self, closure=None):
            raise OSError("no device")

    needs, work = needs_of(Refusing)
    assert work.approximate == (
        "Refusing could not be asked (OSError: no device), so two states a parameter are assumed",
    )
    assert needs.state_bytes["model.up.weight"] == 2 * 4 * WIDTH * WIDE


@pytest.mark.parametrize(
    ("optimizer", "divisible"),
    [(torch.optim.AdamW, True), (torch.optim.Adafactor, False), (NeedsData, False), (sgd_momentum, True)],
)
def test_what_pages_can_have(optimizer, divisible):
    needs, _ = needs_of(optimizer)
    assert needs.divisible == divisible
    module = Wrapped(Shaped(), optimizer=optimizer)
    built = module.configure_optimizers()
    module.training_step(torch.randn(2, WIDTH), 0).backward()
    built.step()
    for name, parameter in module.named_parameters():
        tensors = [one for one in built.state[parameter].values() if isinstance(one, torch.Tensor)]
        assert needs.unpaged_bytes.get(name, 0) == sum(one.nbytes for one in tensors if one.shape != parameter.shape)


def test_configure_optimizers_that_raises():
    def broken(parameters, lr):
        raise RuntimeError("later")

    needs, work = needs_of(broken)
    assert "configure_optimizers could not be asked (RuntimeError: later)" in work.approximate[0]
    assert sum(needs.state_bytes.values()) == 2 * work.trainable_bytes


def test_temporaries_by_implementation():
    loop, work = needs_of(torch.optim.AdamW)
    assert loop.step_temporary_largest == pytest.approx(2.0, rel=0.01)
    assert loop.step_temporary_total == 0
    one_kernel, _ = needs_of(fused)
    assert one_kernel.step_temporary_largest + one_kernel.step_temporary_total < 0.01
    together, _ = needs_of(torch.optim.AdamW, device_type="cpu")
    assert together == loop
    assert 5 * work.trainable_bytes < loop.moved_bytes < 30 * work.trainable_bytes


def test_together_on_cuda_temporaries_follow_the_total():
    def foreach(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, foreach=True)

    needs, work = needs_of(foreach)
    assert needs.step_temporary_largest == 0
    # The second moments' roots are made for all parameters together.
    assert 0.9 < needs.step_temporary_total < 2.1
    assert work.approximate == ()


class Table(Wrapped):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Embedding(100, 8, sparse=True), nn.Linear(8, 4)))

    def configure_optimizers(self):
        table, rest = self.model
        return [torch.optim.SparseAdam(list(table.parameters())), torch.optim.SGD(rest.parameters(), lr=0.1)]


def test_sparse_gradients():
    work = Workload.trace(Table(), torch.randint(0, 100, (4, 6)), precisions=("32-true",))
    assert work.approximate == ()
    assert work.optimizers[0].state_bytes == {"model.0.weight": 2 * 4 * 100 * 8}
    assert all(parameter.used for parameter in work.parameters)


def test_bytes_of_eight_bit_states_whose_tables_are_made_with_the_optimizer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    needs, work = needs_of(bitsandbytes.optim.AdamW8bit)
    # Matrices have two codes and two scales a block of 256 for an element, and tables; what is small has two floats.
    assert needs.state_bytes["model.up.weight"] == pytest.approx(2 * WIDTH * WIDE * (1 + 4 / 256) + 2048, rel=0.01)
    assert needs.state_bytes["model.norm.weight"] == 2 * 4 * WIDTH
    assert all("small parameters were asked instead" in note for note in work.approximate)


class Measured(torch.optim.SGD):
    """Reads a number as it is made."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr * float(torch.linspace(0, 1, 3)[1]), momentum=0.9)


def test_numbers_that_an_optimizer_reads_as_it_is_made():
    needs, work = needs_of(Measured)
    assert work.approximate == ()
    assert needs.state_bytes == real_state_bytes(sgd_momentum)
