from collections import OrderedDict

import pytest
import torch
from torch import nn
from workload.families import FAMILIES, GPT, Block, EncoderDecoder

from lightning_largescale.workload import find_blocks, find_groups, find_wraps


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


def stages():
    """Two stages of blocks, as attributes: each chain counts by itself."""
    module = nn.Module()
    module.stage1 = nn.Sequential(Residual(), Residual())
    module.stage2 = nn.Sequential(Residual(), Residual(), Residual())
    module.stage3 = nn.Sequential(Residual())
    return module


def nested():
    """Stages in a list, each of them with a list of blocks."""
    return nn.ModuleDict({"stages": nn.ModuleList([_Stage(), _Stage()])})


class _Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2)])

    def forward(self, x):
        return x


def lists_of_lists():
    return nn.ModuleList([nn.ModuleList([Block(8, 2), Block(8, 2)]), nn.ModuleList([Block(8, 2), Block(8, 2)])])


Residual.forward = Other.forward = lambda self, x: x

CASES = {
    "gpt": (GPT, ["blocks.0", "blocks.1", "blocks.2"]),
    "stages": (stages, ["stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage2.2"]),
    "nested: the outermost": (nested, ["stages.0", "stages.1"]),
    "containers are searched": (lists_of_lists, ["0.0", "0.1", "1.0", "1.1"]),
    "encoder and decoder": (EncoderDecoder, ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]),
    "alternating": (
        lambda: nn.ModuleList([Residual(), Other(), Residual(), Other(), nn.Linear(2, 2)]),
        ["0", "1", "2", "3"],
    ),
    "dict": (lambda: nn.ModuleDict(OrderedDict(b=Other(), a=Other())), ["b", "a"]),
    "one object": (lambda: nn.ModuleList([Other()] * 3), ["0"]),
    "layers and activations": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)
        ),
        ["0", "3"],
    ),
    "no matrices": (lambda: nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]), []),
    "no chain": (lambda: nn.Bilinear(2, 2, 2), []),
    "single": (lambda: nn.ModuleList([Other()]), []),
}


@pytest.mark.parametrize(("make", "names"), CASES.values(), ids=CASES)
def test_blocks(make, names):
    module = make()
    found = find_blocks(module)
    assert list(found) == names
    assert all(module.get_submodule(name) is block for name, block in found.items())


@pytest.mark.parametrize(("make", "names"), CASES.values(), ids=CASES)
def test_groups_hold_each_parameter_once(make, names):
    module = make()
    groups = find_groups(module)
    assert list(groups) == [*names, ""]
    owned = [name for group in groups.values() for name in group.parameters]
    assert sorted(owned) == sorted(name for name, _ in module.named_parameters())
    assert groups[""].modules == (module,)
    for name in names:
        assert all(parameter.startswith(f"{name}.") for parameter in groups[name].parameters)


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_transformers():
    expected = {
        "gpt2": ["model.transformer.h.0", "model.transformer.h.1"],
        "llama": ["model.model.layers.0", "model.model.layers.1"],
        "bert": ["model.bert.encoder.layer.0", "model.bert.encoder.layer.1"],
        "t5": [f"model.{stack}.block.{index}" for stack in ("encoder", "decoder") for index in (0, 1)],
        "lora": ["model.base_model.model.transformer.h.0", "model.base_model.model.transformer.h.1"],
    }
    assert {name: list(find_blocks(FAMILIES[name]()[0])) for name in expected} == expected


def test_tied_parameters_belong_to_the_root():
    module = GPT(tied=True)
    module.blocks[1].out.weight = module.blocks[2].out.weight
    groups = find_groups(module)
    assert {"tokens.weight", "blocks.1.out.weight"} <= set(groups[""].parameters)
    assert "blocks.1.out.weight" not in groups["blocks.1"].parameters
    assert groups["blocks.1"].shared == ("blocks.1.out.weight",)
    assert groups["blocks.2"].shared == ("blocks.2.out.weight",)
    assert groups[""].shared == ()


def test_parameter_tied_inside_a_block_stays_there():
    module = nn.ModuleList([Block(8, 2), Block(8, 2)])
    module[0].norm1.weight = module[0].norm2.weight
    groups = find_groups(module)
    assert "0.norm1.weight" in groups["0"].parameters
    assert groups["0"].shared == ()


# torch.compile's own import warns of torch.jit.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_count_as_what_they_wrap():
    module = nn.ModuleList([torch.compile(Other()), Other()])
    assert list(find_blocks(module)) == ["0", "1"]
    assert find_groups(module)["0"].parameters == ("0._orig_mod.layer.weight", "0._orig_mod.layer.bias")


class Path(nn.Module):
    """Layers by name: no chain, so nothing repeats."""

    def __init__(self):
        super().__init__()
        self.down = nn.Module()
        self.down.one, self.down.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.middle = Residual()
        self.up1, self.up2, self.up3 = (nn.Linear(64, 64) for _ in range(3))
        self.large = nn.Linear(64, 512)
        self.norm = nn.LayerNorm(64)


def test_large_modules_outside_of_blocks_are_wrapped():
    module = GPT(vocabulary=512)
    assert list(find_wraps(module)) == ["tokens", "head"]
    assert list(find_wraps(GPT(vocabulary=512, tied=True))) == []
    assert list(find_wraps(nn.ModuleDict({"model": module}))) == ["model.tokens", "model.head"]
    # Half a block is large.
    block = sum(parameter.nbytes for parameter in module.blocks[0].parameters())
    for share, found in ((0.45, []), (0.55, ["extra"])):
        module = GPT(vocabulary=2)
        module.extra = nn.Embedding(int(share * block / 4), 1)
        assert list(find_wraps(module)) == found


def test_a_model_without_repeats_is_taken_apart_into_modules_of_about_one_size():
    # The two in `down` make one: together they are no larger than what is aimed at.
    assert list(find_wraps(Path())) == ["down.one", "down.two", "up1", "up2", "up3", "large"]
    groups = find_groups(Path(), ("up1", "large"))
    assert groups["up1"].parameters == ("up1.weight", "up1.bias")
    assert "up2.weight" in groups[""].parameters
    assert list(groups) == ["up1", "large", ""]


def test_a_weight_of_several_modules_is_in_no_wrap():
    module = Path()
    module.up1.weight = module.up2.weight
    assert list(find_wraps(module)) == ["down.one", "down.two", "up3", "large"]


def test_trainable_parameters_in_other_dtypes_than_their_block_are_the_roots():
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)))
    for block in module:
        block[0].bfloat16()
        block[1].bfloat16().requires_grad_(False)
    groups = find_groups(module)
    assert groups["0"].parameters == ("0.1.weight", "0.1.bias", "0.2.weight", "0.2.bias")
    assert groups["0"].shared == ("0.0.weight", "0.0.bias")
    assert groups[""].parameters == ("0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias")
