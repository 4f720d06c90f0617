import pytest
import torch
from torch import nn
from workload import families
from workload.check import assert_same, real_step, state_of
from workload.families import Wrapped

from lightning_largescale.workload import Workload


def test_values_that_decide_fall_back_to_one_sample():
    module, batch = Wrapped(families.Branching()), torch.randn(16, 8)
    before = state_of(module)
    work = Workload.trace(module, batch, precisions=("32-true", "bf16-mixed"))
    assert_same(before, state_of(module))
    # Ranks may run different modules.
    assert work.branches
    assert Workload.from_dict(work.to_dict()).branches
    (why,) = work.approximate
    assert why.startswith("training_step cannot run on fake tensors (it needs the values of tensors")
    assert why.endswith("a real step was measured on 1 and 2 of the 16 samples and drawn out to all")
    for precision, step in work.steps.items():
        real = real_step(module, batch, precision=precision).step
        assert step.saved_bytes == pytest.approx(real.saved_bytes, rel=0.01)
        assert step.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
        assert step.forward_flops == real.forward_flops


def test_for_another_device_it_runs_where_the_module_is():
    module, batch = Wrapped(families.Branching()), torch.randn(16, 8)
    here, there = (
        Workload.trace(module, batch, precisions=("bf16-mixed",), device_type=device) for device in ("cpu", "cuda")
    )
    assert there.steps == here.steps
    assert "16 samples with kernels for cpu and drawn out" in there.approximate[0]


def test_one_sample_that_is_refused_is_followed_by_two():
    class Normalised(families.Branching):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return super().forward(self.norm(x))

    work = Workload.trace(Wrapped(Normalised()), torch.randn(8, 8), precisions=("32-true",))
    assert "measured on 2 of the 8 samples" in work.approximate[0]
    assert work.steps["32-true"].forward_flops == 2 * 8 * (2 * 8 * 8)


def test_what_no_value_decides_is_the_same_on_all_ranks():
    assert not Workload.trace(Wrapped(nn.Linear(8, 8)), torch.randn(4, 8), precisions=("32-true",)).branches


class Flattened(nn.Module):
    """A language model over time first, whose targets come flattened."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(32, 8), nn.LSTM(8, 16), nn.Linear(16, 32)

    def forward(self, x):
        return self.head(self.rnn(self.table(x))[0]).flatten(0, 1)


def test_a_small_batch_that_cannot_be_cut_is_run_whole():
    module = Wrapped(Flattened(), loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    batch = torch.randint(0, 32, (6, 4)), torch.randint(0, 32, (24,))
    work = Workload.trace(module, batch, precisions=("32-true",))
    (why,) = work.approximate
    assert why.endswith("a real step was measured on the batch of 6")
    assert work.steps["32-true"] == real_step(module, batch).step
    large = torch.randint(0, 32, (6, 2**15)), torch.randint(0, 32, (6 * 2**15,))
    (why,) = Workload.trace(module, large, precisions=("32-true",)).approximate
    assert "estimated from the shapes" in why
