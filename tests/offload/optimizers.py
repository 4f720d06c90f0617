"""Optimizers of all kinds over one small model, and the runs that are compared."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from models import Lion
from torch import nn

from lightning_largescale.offload.buffers import Allowance, PageBuffers
from lightning_largescale.offload.direct import DirectFile
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.store import Store

# Of the pages of these tests, so that the largest parameters of the model have several.
SMALL_PAGE = 64 * 1024


class Counting(Lion):
    """Keeps how many steps there were in its groups, and warms up by it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)

    def update(self, parameter, state, group):
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        mean.mul_(0.9).add_(parameter.grad)
        parameter.sub_(mean, alpha=group["lr"] * min(1.0, group["steps"] / 4))


class Based(torch.optim.SGD):
    """A step that is its base class's and a bit more; torch calls hooks for both."""

    def step(self, closure=None):
        return super().step(closure)


class GlobalNorm(Lion):
    """Divides by the norm of all gradients, as some do instead of clipping."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        return super().step(closure)

    def update(self, parameter, state, group):
        parameter.sub_(parameter.grad / self.norm, alpha=group["lr"])


class Failing(Lion):
    """Raises at the update of that number, if one is given."""

    calls = 0
    failing_at: int | None = None

    def update(self, parameter, state, group):
        self.calls += 1
        if self.calls == self.failing_at:
            raise MemoryError
        super().update(parameter, state, group)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With parameters of several pages, small ones, and a table that gets no gradient."""
    torch.manual_seed(0)
    parts = [nn.Linear(100, 300), nn.LayerNorm(300), nn.Linear(300, 150), nn.Tanh(), nn.Linear(150, 10)]
    return nn.Sequential(*parts, nn.Embedding(2, 2)).to(dtype)


def output(module, seed):
    x = torch.randn(16, 100, generator=torch.Generator().manual_seed(seed))
    return module[:5](x.to(module[0].weight.dtype))


def of(kind, **options):
    """A function of a module that makes an optimizer of it with two groups."""

    def build(module):
        parameters = list(module.parameters())
        groups = [{"params": parameters[:3], "lr": 2e-3}, {"params": parameters[3:], "weight_decay": 0.1}]
        return kind(groups, **{"lr": 1e-3, **options})

    return build


def of_bitsandbytes(name):
    def build(module):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        return of(getattr(bitsandbytes.optim, name))(module)

    return build


def muon(module):
    return torch.optim.Muon([p for p in module.parameters() if p.dim() == 2][:3], lr=1e-3)


BUILDERS = {
    "Adam amsgrad maximize": of(torch.optim.Adam, amsgrad=True, maximize=True),
    "AdamW": of(torch.optim.AdamW),
    "AdamW fused": of(torch.optim.AdamW, fused=True),
    "AdamW foreach": of(torch.optim.AdamW, foreach=True),
    "AdamW lr tensor": lambda module: of(torch.optim.AdamW, lr=torch.tensor(1e-3))(module),
    "SGD": of(torch.optim.SGD),
    "SGD nesterov": of(torch.optim.SGD, momentum=0.9, nesterov=True),
    "SGD fused": of(torch.optim.SGD, momentum=0.9, fused=True),
    "Adagrad": of(torch.optim.Adagrad),
    "RMSprop centered": of(torch.optim.RMSprop, centered=True, momentum=0.9),
    "NAdam": of(torch.optim.NAdam),
    "RAdam": of(torch.optim.RAdam),
    "Adamax": of(torch.optim.Adamax),
    "Adadelta": of(torch.optim.Adadelta),
    "ASGD": of(torch.optim.ASGD),
    "Rprop": of(torch.optim.Rprop),
    "own": of(Lion),
    "own counting": of(Counting),
    "own based": of(Based, momentum=0.9),
    "bitsandbytes AdamW": of_bitsandbytes("AdamW"),
    "bitsandbytes Lion": of_bitsandbytes("Lion"),
    "bitsandbytes AdamW8bit": of_bitsandbytes("AdamW8bit"),
    "Adafactor": of(torch.optim.Adafactor),
    "Muon": muon,
}
# Those that need a parameter as a whole.
WHOLE = {"bitsandbytes AdamW8bit", "Adafactor", "Muon"}


@contextlib.contextmanager
def paged(optimizer, folder=None, *, resident=0, file=DirectFile, **options):
    """`optimizer`, paged: with its state in `folder`, in DRAM for None."""
    store = None if folder is None else Store(folder, file=file)
    buffers = PageBuffers(pinned="lanes" in options and options["lanes"].pinned)
    try:
        made = PagedOptimizer(optimizer, store=store, buffers=buffers, resident=Allowance(resident), **options)
        yield made
        made.undo()
    finally:
        if store is not None:
            store.close()


def train(module, optimizer, steps, start=0):
    """Losses of steps with a closure, of which the second parameter is clipped and some have no gradients."""
    losses = []
    for step in range(start, start + steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = output(module, step).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            if step % 3 == 1:
                module[1].weight.grad = None
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses


def difference(one, other, path=""):
    """Where two things that hold tensors are not the same bit for bit, and how; None where they are."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"{path}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
        return None if torch.equal(one, other) else f"{path}: {int((one != other).sum())} of {one.numel()} elements"
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return next(filter(None, (difference(one[key], other[key], f"{path}.{key}") for key in one)), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        numbered = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(*both, f"{path}.{number}") for number, both in numbered)), None)
    return None if type(one) is type(other) and one == other else f"{path}: {one!r} and {other!r}"


def ordinary_bytes() -> int:
    """Of memory that this process has, mapped files left out."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def failing(*, after: int = 0, reading: bool = True) -> type[DirectFile]:
    """A file that, after so many requests of the kind, is broken until its `broken` says otherwise."""

    class Failing(DirectFile):
        count, broken = 0, True

        def _maybe_fail(self):
            cls = type(self)
            cls.count += 1
            if cls.broken and cls.count > after:
                raise OSError(5, os.strerror(5))

        def read_at(self, memory, offset):
            if reading:
                self._maybe_fail()
            return super().read_at(memory, offset)

        def write_at(self, memory, offset):
            if not reading:
                self._maybe_fail()
            return super().write_at(memory, offset)

    return Failing
