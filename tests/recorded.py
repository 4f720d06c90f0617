"""Constructions run plainly, and recorded and carried out later; what both give, compared bit for bit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lightning_largescale.parallel.deferred import Recording


class Built(nn.Module):
    """What `fill(module)` puts into it."""

    def __init__(self, fill):
        super().__init__()
        fill(self)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and other attributes by name, one as often as it stands there."""
    found = dict(module.named_parameters(remove_duplicate=False))
    found |= module.named_buffers(remove_duplicate=False)
    for prefix, part in module.named_modules():
        found |= {f"{prefix}.{name}": one for name, one in vars(part).items() if isinstance(one, Tensor)}
    return found


def steps(tensor: Tensor) -> list[int]:
    """Strides where they matter."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def assert_same_bits(ours: Tensor, plain: Tensor, name: object = "") -> None:
    plain = plain.detach()
    for ask in (torch.Tensor.size, steps, torch.Tensor.is_conj, torch.Tensor.is_neg):
        assert ask(ours) == ask(plain), (name, ask)
    assert ours.dtype == plain.dtype, name
    # New tensors, since a view of bytes asks for a stride of one also where there is one element.
    parts = [torch.empty(one.numel(), dtype=one.dtype).copy_(one.flatten()) for one in (ours, plain)]
    assert torch.equal(*(part.view(torch.uint8) for part in parts)), name


def values_of(recording: Recording, tensors: dict[str, Tensor], *, random: bool = True) -> dict[str, Tensor]:
    """The values of all of `tensors`, held or not."""
    values = {name: one.detach() for name, one in tensors.items() if not recording.holds(one)}

    def take(name, one, value):
        if not isinstance(value, Tensor):
            source, value = value, torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cpu")
            source.read(value)
        values[name] = value

    takers = [(one, partial(take, name, one)) for name, one in tensors.items() if name not in values]
    recording.replay(takers, random=random)
    return values


def assert_same_construction(build, *, seed: int = 3, random: bool = True) -> Recording:
    """Build plainly and by recording, and compare all tensors and where the CPU's generator ends."""
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    plain = build()
    after = torch.get_rng_state() if random else before
    torch.manual_seed(seed)
    recording = Recording()
    with recording.record():
        module = build()
    assert torch.equal(torch.get_rng_state(), before)
    expected, tensors = tensors_of(plain), tensors_of(module)
    assert expected.keys() == tensors.keys()
    values = values_of(recording, tensors, random=random)
    for name, one in expected.items():
        assert_same_bits(values[name], one, name)
        assert tensors[name].requires_grad == one.requires_grad, name
    assert torch.equal(torch.get_rng_state(), after)
    return recording
