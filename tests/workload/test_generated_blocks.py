"""Blocks made up at random: what is found to be dividable gives what the block gives, on ranks that are simulated."""

import copy
import threading

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_largescale.workload.parts import OnParts, Part, as_part, cut, join
from lightning_largescale.workload.shardable import divide

RANKS, WIDTH = 2, 8
KINDS = ("gelu", "relu", "softmax", "double", "residual", "heads")
KINDS += ("mix heads", "flip", "norm", "scale", "halve", "roll")
STEPS = st.lists(st.sampled_from(KINDS), max_size=4)


class Made(nn.Module):
    """Products with steps between them; what stands last is added to the input."""

    def __init__(self, before, between, after, tied):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        if tied:
            self.gate.weight = self.up.weight
        self.weight = nn.Parameter(torch.rand(16))
        self.before, self.between, self.after = before, between, after

    def forward(self, x):
        y = self.steps(x, self.before)
        y = self.steps(self.up(y), self.between) * self.gate(y).sigmoid()
        return x + self.steps(self.down(y), self.after)

    def steps(self, y, names):
        for name in names:
            y = getattr(self, name.replace(" ", "_"))(y)
        return y

    gelu, relu = staticmethod(F.gelu), staticmethod(F.relu)
    softmax, double = staticmethod(lambda y: y.softmax(-1)), staticmethod(lambda y: y + y)
    residual = staticmethod(lambda y: y + 0.5 * y.abs())
    heads = staticmethod(lambda y: y.view(*y.shape[:2], 4, -1).transpose(1, 2).transpose(1, 2).flatten(-2))
    mix_heads = staticmethod(lambda y: y.view(*y.shape[:2], 4, -1).transpose(-1, -2).flatten(-2))
    flip, roll = staticmethod(lambda y: y.flip(-1)), staticmethod(lambda y: y.roll(1, -1))
    norm = staticmethod(lambda y: y / (y.square().mean(-1, keepdim=True) + 1).sqrt())
    halve = staticmethod(lambda y: torch.cat([y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1))

    def scale(self, y):
        return y * self.weight[: y.shape[-1]]


class Meeting:
    """Ranks that are threads of this process: each brings its tensor, and all see all."""

    def __init__(self):
        self.barrier, self.brought = threading.Barrier(RANKS, timeout=20), [None] * RANKS

    def __call__(self, rank, tensor):
        self.brought[rank] = tensor.detach()
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class Threads:
    """The ranks' communication, forward alone."""

    size = RANKS

    def __init__(self, rank, meeting):
        self.rank, self._meeting = rank, meeting

    def enter(self, tensor):
        return tensor

    def reduce(self, tensor):
        return sum(self._meeting(self.rank, tensor))

    def gather(self, local, part):
        return join(self._meeting(self.rank, local), part)


def on_rank(rank, meeting, block, parts, x, results):
    # The call binds the module's parameters, so each thread has its own.
    block = copy.deepcopy(block)
    state = {
        name: as_part(cut(one.detach(), parts[name], rank, RANKS), parts[name]) if name in parts else one.detach()
        for name, one in block.named_parameters()
    }
    try:
        with OnParts(Threads(rank, meeting)):
            results[rank] = torch.func.functional_call(block, state, (x,))
    except BaseException as error:
        meeting.barrier.abort()
        results[rank] = error


def check(block, parts, x):
    """Compare what each rank computes with what the block does."""
    results = [None] * RANKS
    meeting = Meeting()
    threads = [
        threading.Thread(target=on_rank, args=(rank, meeting, block, parts, x, results)) for rank in range(RANKS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, block(x).detach())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, STEPS, STEPS, st.booleans())
def test_what_is_divided_computes_the_same(before, between, after, tied):
    torch.manual_seed(0)
    block, x = Made(before, between, after, tied).to(torch.float64), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    found = divide(block, (x,), {}, RANKS)
    matrices = {name for name, one in block.named_parameters() if one.dim() > 1}
    assert found.parts.keys() & matrices | found.whole.keys() == matrices
    check(block, found.parts, x)


def test_what_is_divided_although_it_should_not_be_is_gathered_and_right():
    torch.manual_seed(0)
    block, x = Made([], ["softmax", "flip"], [], False).to(torch.float64), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    parts = {"up.weight": Part(0, (16,)), "up.bias": Part(0, (16,)), "down.weight": Part(1, (16,))}
    check(block, parts, x)
