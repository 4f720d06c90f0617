from __future__ import annotations

import copy

import pytest
import torch
from offload.optimizers import (
    BUILDERS,
    SMALL_PAGE,
    Based,
    difference,
    model,
    of,
    output,
    paged,
    train,
)
from torch import nn

from lightning_largescale.offload import pages

pytestmark = pytest.mark.filterwarnings("ignore:.*without O_DIRECT")
MIB = 2**20


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", SMALL_PAGE)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """In bfloat16 torch rounds otherwise where a thread's part of a tensor ends than in its midst."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scheduled(build, folder=None, resident=None, steps=7):
    """Losses, values, state and the learning rates of a run; resident for `resident` None and no folder."""
    module = model()
    optimizer = build(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    losses = []

    def run():
        for step in range(steps):
            losses.extend(train(module, optimizer, 1, step))
            scheduler.step()
        return losses, list(module.parameters()), copy.deepcopy(optimizer.state_dict())

    if resident is None:
        return run()
    with paged(optimizer, folder, resident=resident):
        return run()


@pytest.mark.parametrize("tier", ["nvme", "cpu", "part"])
@pytest.mark.parametrize("name", BUILDERS)
def test_steps_as_on_all_at_once(name, tier, tmp_path):
    folder, resident = (None if tier == "cpu" else tmp_path), 300_000 if tier == "part" else 0
    assert not difference(scheduled(BUILDERS[name], folder, resident), scheduled(BUILDERS[name]))


def without_closure(build, folder, dtype=torch.float32, change=lambda module: None, **options):
    """Values and state after steps that are called as loops call them, paged for a folder."""
    module = model(dtype)
    change(module)
    optimizer = build(module)

    def steps():
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            output(module, step).square().mean().backward()
            optimizer.step()
        return list(module.parameters()), optimizer.state_dict()

    if folder is None:
        return steps()
    with paged(optimizer, folder, **options):
        return copy.deepcopy(steps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD nesterov", "own", "Adafactor"])
def test_other_dtypes(name, dtype, tmp_path):
    expected = without_closure(BUILDERS[name], None, dtype)
    assert not difference(without_closure(BUILDERS[name], tmp_path, dtype), expected)


def unusual(module):
    """Parameters without elements, without dimensions, frozen, and of other memory formats."""
    module[0].weight = nn.Parameter(torch.randn(100, 300, generator=torch.Generator().manual_seed(1)).t())
    module[2].weight.requires_grad_(False)
    module.register_parameter("scale", nn.Parameter(torch.ones(())))
    image = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
    module.register_parameter("image", nn.Parameter(image))
    # Some of a larger tensor.
    module.register_parameter("part", nn.Parameter(torch.ones(60, 200)[::2, ::2]))
    for parameter in (module.scale, module.image, module.part):
        module[4].weight.register_hook(lambda _, one=parameter: note(one))
    module[4].bias.requires_grad_(False)


def note(parameter):
    parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
    if parameter.dim() == 4:
        parameter.grad = parameter.grad.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "AdamW foreach", "SGD nesterov", "own", "Adafactor"])
def test_parameters_of_any_form(name, tmp_path):
    expected = without_closure(BUILDERS[name], None, change=unusual)
    assert not difference(without_closure(BUILDERS[name], tmp_path, change=unusual), expected)
    assert not difference(without_closure(BUILDERS[name], tmp_path, change=unusual, resident=300_000), expected)


def hooked(kind, folder):
    """What hooks of a user see at each of two steps."""
    module = model()
    optimizer = of(kind, momentum=0.9)(module)
    seen = []

    def note(name):
        return lambda one, args, kwargs: seen.append((name, float(module[0].bias.detach().sum()), len(one.state)))

    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    if folder is None:
        optimizer.register_step_post_hook(note("last"))
        train(module, optimizer, 2)
        return seen
    with paged(optimizer, folder):
        optimizer.register_step_post_hook(note("last"))
        train(module, optimizer, 2)
    return seen


def test_hooks_of_the_user_are_called_once_a_step_and_see_what_they_would(tmp_path):
    seen = hooked(torch.optim.SGD, tmp_path)
    assert [name for name, _, _ in seen] == ["before", "after", "last"] * 2
    assert seen == hooked(torch.optim.SGD, None)


def test_hooks_of_the_user_are_called_as_often_where_a_step_calls_another(tmp_path):
    names = [name for name, _, _ in hooked(Based, tmp_path)]
    assert names == [name for name, _, _ in hooked(Based, None)]
