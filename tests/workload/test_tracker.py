import pytest
import torch
import torch.distributed as dist
from torch import nn
from workload.families import Wrapped

from lightning_largescale.workload import Workload
from lightning_largescale.workload.tracker import CannotTraceError, Tracker

KIB = 1024


def test_a_storage_counts_once_while_it_lives():
    tracker = Tracker()
    outside = torch.zeros(256)
    with tracker:
        one = torch.zeros(256)
        views = [one[:10], one.view(16, 16), one.t(), outside[:4]]
        assert tracker.live == KIB
        two = one + outside
        assert tracker.live == 2 * KIB
        del one
        assert tracker.live == 2 * KIB
        views.clear()
        assert tracker.live == KIB
        two.add_(1)
        del two
        assert tracker.live == 0
    tracker.finish()
    assert (tracker.peak, tracker.largest_temporary) == (2 * KIB, KIB)


def test_gradients_count_until_they_are_accumulated():
    layer, x = nn.Linear(16, 16, bias=False), torch.ones(4, 16)
    tracker = Tracker()
    with tracker.watching({}, layer.parameters()):
        layer(x).sum().backward()
        assert tracker.live == 0
    assert tracker.used == {id(layer.weight)}
    assert tracker.peak >= layer.weight.numel() * 4


def test_saved_tensors_count_once_and_parameters_do_not():
    layer, x = nn.Linear(16, 16, bias=False), torch.ones(4, 16)
    tracker = Tracker()
    with tracker.watching({"layer": layer}, layer.parameters()):
        y = torch.tanh(layer(x))
        loss = (y * y).sum()
        loss.backward()
    tracker.finish()
    block, rest = tracker.log.finished()
    assert (block.block, block.saved_bytes, rest.saved_bytes) == ("layer", 0, 4 * 16 * 4)


def test_hooks_are_taken_off():
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), Tracker().watching({"layer": layer}, layer.parameters()):
        raise KeyError
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_what_was_overwritten_comes_back():
    outside, tracker = torch.zeros(4), Tracker()
    with tracker:
        outside[1:3].fill_(1.0)
        outside.add_(1)
    assert outside.tolist() == [1, 2, 2, 1]
    tracker.put_back()
    assert outside.tolist() == [0, 0, 0, 0]


class Reducing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        dist.all_reduce(y.detach())
        return y


def test_nothing_is_sent_to_other_processes(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(CannotTraceError, match="talks to other processes"), Tracker():
            dist.all_reduce(torch.ones(1))
        work = Workload.trace(Wrapped(Reducing()), torch.randn(2, 4), precisions=("32-true",))
    finally:
        dist.destroy_process_group()
    assert "talks to other processes" in work.approximate[0]
    assert "estimated from the shapes" in work.approximate[0]


class Transformed(nn.Module):
    """Takes a derivative by functorch, which bears no hooks on saved tensors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.func.grad(lambda y: self.layer(y).pow(2).sum())(x)


def test_a_step_that_forbids_hooks_is_traced_without():
    work = Workload.trace(Wrapped(Transformed()), torch.randn(2, 4), precisions=("32-true",))
    assert work.approximate == (
        "the step forbids hooks on saved tensors; what each forward left alive counts as saved",
    )
    assert work.steps["32-true"].saved_bytes > 0


def test_large_tensors_are_told_apart_where_they_are_made():
    x = torch.ones(KIB, 256, requires_grad=True)
    tracker = Tracker()
    with tracker.watching({}, [x]):
        small = x[:, :255] * 2
        loss = (x * 2).sum() + small.sum()
        loss.backward()
    tracker.finish()
    (segment,) = tracker.log.finished()
    # One product has 1 MiB; in backward its gradient, and those that the slice and the sum of both make.
    assert segment.forward_large_bytes == KIB * KIB
    assert segment.backward_large_bytes >= 2 * KIB * KIB
    assert segment.backward_large_bytes % (KIB * KIB) == 0
