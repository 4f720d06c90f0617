import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from lightning_largescale import compat


def test_children_and_tensors_of_modules():
    layer = nn.BatchNorm1d(2)
    assert compat.all_children(nn.ModuleList([layer, layer])) == [("0", layer), ("1", layer)]
    parameters, buffers = compat.own_tensors(layer)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    parameters["weight"] = other = nn.Parameter(torch.ones(2))
    assert layer.weight is other


# torch.compile's own import warns of torch.jit.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_module():
    layer = nn.Linear(2, 2)
    assert compat.compiled_module(torch.compile(layer)) is layer
    assert compat.compiled_module(layer) is layer
    scripted = torch.jit.script(layer)
    assert compat.compiled_module(scripted) is scripted


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_torch_compiles_is_told():
    module = nn.Linear(1, 1)
    assert not compat.is_compiled(module)
    assert compat.is_compiled(torch.compile(module))
    module.compile()
    assert compat.is_compiled(module)
    given = from_compiled(torch.compile(BoringModel()))
    assert compat.is_compiled(given)


def test_full_backward_hooks_are_found():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert not compat.has_full_backward_hooks(module)
    module.register_full_backward_hook(lambda *_: None)
    assert not compat.has_full_backward_hooks(module)
    for register in (module[0].register_full_backward_hook, module[0].register_full_backward_pre_hook):
        handle = register(lambda *_: None)
        assert compat.has_full_backward_hooks(module)
        handle.remove()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    assert compat.has_full_backward_hooks(module)
    handle.remove()


def test_hooks_nearest_to_a_step():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("user's before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("user's after"))
    remove = compat.hook_nearest(optimizer, lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["user's before", "before", "after", "user's after"]
    remove()
    optimizer.step()
    assert seen[4:] == ["user's before", "user's after"]


class Based(torch.optim.SGD):
    """Its step calls a step that calls the hooks again."""

    def step(self, closure=None):
        return super().step(closure)


def test_without_step_hooks():
    torch.optim.SGD([nn.Parameter(torch.zeros(()))])
    optimizer = Based([nn.Parameter(torch.zeros(()))], lr=1.0)
    seen = []
    before = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with compat.without_step_hooks(optimizer):
        optimizer.step()
    assert seen == []
    optimizer.step()
    assert seen == ["before", "before", "after", "after"]
    before.remove()
    optimizer.step()
    assert seen[4:] == ["after", "after"]


def test_hook_tables():
    module = nn.Linear(1, 1)
    assert not any(compat.hook_tables(module))
    registers = (
        module.register_forward_pre_hook,
        module.register_forward_hook,
        module.register_full_backward_pre_hook,
        module.register_full_backward_hook,
        module.register_state_dict_post_hook,
        module.register_load_state_dict_post_hook,
    )
    for register in registers:
        handle = register(lambda *_: None)
        (table,) = [table for table in compat.hook_tables(module) if handle.id in table]
        del table[handle.id]
    assert not any(compat.hook_tables(module))
