from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from offload.optimizers import failing
from ranks import mesh_of, quiet
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.hardware.usage import at_rest
from lightning_largescale.offload import pages
from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.offloaded_parameters import SpilledParameters, bring_back
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.store import Store, StoreError

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*without O_DIRECT")]
BLOCKS = 4


class Block(nn.Module):
    """With parameters of five rows, of one, and one that is not trained."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 5), nn.Linear(5, 12)
        self.row = nn.Parameter(torch.ones(1, 12))
        self.down.bias.requires_grad_(False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) * self.row


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(12, 3)

    def forward(self, x, order=range(BLOCKS)):
        for number in order:
            x = self.blocks[number](x)
        return self.head(x)


def sharded(world):
    """A module whose blocks are sharded on as many ranks as `world`, and these by name."""
    mesh = mesh_of((2,)) if world == 2 else mesh_of((2, 1))["tp"]
    module = Model()
    for part in (*module.blocks, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return module, {f"blocks.{number}": block for number, block in enumerate(module.blocks)}


@contextlib.contextmanager
def spilled(blocks, folder, **options):
    store = Store(folder)
    made = SpilledParameters(blocks, store, **{"ahead": 1, **options})
    made.take_over()
    yield made, store
    made.stop()
    store.close()


def batch(step):
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(step))


def train(module, optimizer, steps, settle=lambda: None, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = module(batch(step)).square().mean()
        loss.backward()
        settle()
        losses.append(loss.item())
        optimizer.step()
    return losses


def whole(module):
    return [local_of(one.detach()).clone() for one in module.parameters()]


def shards_of(blocks):
    """That this rank has something of, flat and with what is padded."""
    return [
        data for block in blocks.values() for parameter, data in compat.shards_of(block) if local_of(parameter).numel()
    ]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def trained_alike(world, folder, page_bytes, tier):
    torch.set_num_threads(1)
    expected, _ = sharded(world)
    module, blocks = sharded(world)
    resident = torch.optim.AdamW(expected.parameters(), lr=1e-2)
    losses = train(expected, resident, 5)
    with pytest.MonkeyPatch.context() as patch, spilled(blocks, folder) as (made, store):
        patch.setattr(pages, "PAGE_BYTES", page_bytes)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        state = None if tier == "cpu" else store
        paged = PagedOptimizer(optimizer, store=state, buffers=PageBuffers(), places=made)
        found = train(module, optimizer, 5, made.settle)
        assert found == losses
        assert same(whole(module), whole(expected))
        for one, other in zip(module.parameters(), expected.parameters(), strict=True):
            assert same(
                [*map(local_of, optimizer.state[one].values())], [*map(local_of, resident.state[other].values())]
            )
        assert all(at_rest(data) for data in shards_of(blocks))
        assert not any(at_rest(local_of(one)) for one in module.head.parameters())
        paged.undo()
    return True


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("tier", ["nvme", "cpu"])
@pytest.mark.parametrize("page_bytes", [4096, 2**20])
def test_trains_as_the_resident_module(two, world, tier, page_bytes, tmp_path):
    assert all(two.run(trained_alike, world, tmp_path, page_bytes, tier))


def seen_within(world, folder, ahead):
    """In each block's forward and backward, which blocks are in DRAM."""
    module, blocks = sharded(world)
    seen = []
    with spilled(blocks, folder, ahead=ahead) as (made, _):

        def look(*_):
            seen.append([number for number, one in enumerate(made.blocks.values()) if one.region.in_dram])

        for block in module.blocks:
            block.up.register_forward_pre_hook(look)
            block.up.register_forward_hook(lambda part, inputs, output: output.register_hook(look) and None)
        module(batch(0)).sum().backward()
        made.settle()
        assert not any(one.region.in_dram for one in made.blocks.values())
        return seen


@pytest.mark.parametrize("world", [1, 2])
def test_what_was_gathered_is_at_rest_and_what_follows_is_on_its_way(two, world, tmp_path):
    for seen in two.run(seen_within, world, tmp_path, 1):
        # In backward FSDP2 itself gathers the one before.
        assert seen == [[1], [2], [3], [], [1, 2], [0, 1], [0], []]
    for forward in two.run(seen_within, world, tmp_path, 0):
        assert forward[:BLOCKS] == [[]] * BLOCKS
    for forward in two.run(seen_within, world, tmp_path, 2):
        assert forward[:BLOCKS] == [[1, 2], [2, 3], [3], []]


def bytes_read(folder, order, steps):
    module, blocks = sharded(2)
    with spilled(blocks, folder) as (made, store):
        found = [0]
        for step in range(steps):
            module(batch(step), order).sum().backward()
            made.settle()
            found.append(store.read_bytes)
    nbytes = sum(one.region.nbytes for one in made.blocks.values())
    return [after - before for before, after in itertools.pairwise(found)], nbytes


def test_in_the_order_that_a_step_has_shown_each_is_fetched_once_for_a_pass(two, tmp_path):
    for found, total in two.run(bytes_read, tmp_path, [2, 0, 3, 1], 4):
        assert found[0] > 2 * total
        assert found[1:] == [2 * total] * 3
    for found, total in two.run(bytes_read, tmp_path, range(BLOCKS), 2):
        assert found == [2 * total] * 2


def resting(folder):
    """Which blocks are on the disk, of those that were given and those that came back."""
    _, blocks = sharded(2)
    store, found = Store(folder), []
    for count in (BLOCKS, 1, 0):
        made = SpilledParameters({name: blocks[name] for name in [*blocks][:count]}, store, ahead=1)
        made.take_over()
        found.append([name for name, one in blocks.items() if all(at_rest(data) for _, data in compat.shards_of(one))])
        made.stop()
        bring_back(nn.Module(), blocks)
    store.close()
    return found


def test_only_blocks_that_are_given_leave(two, tmp_path):
    names = [f"blocks.{number}" for number in range(BLOCKS)]
    assert two.run(resting, tmp_path) == [[names, names[:1], []]] * 2


def after_the_store(world, folder, back):
    torch.set_num_threads(1)
    module, blocks = sharded(world)
    expected, _ = sharded(world)
    for one in (module, expected):
        one.optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    with spilled(blocks, folder) as (made, _):
        losses = train(module, module.optimizer, 2, made.settle)
        # An evaluation, after which nothing is dropped by a backward.
        with torch.no_grad():
            module(batch(0))
        made.settle()
    # What was fetched at the end is not missed.
    assert all(at_rest(data) for data in shards_of(blocks))
    if back:
        bring_back(module, blocks)
        assert not any(at_rest(data) for data in shards_of(blocks))
    losses += train(module, module.optimizer, 2, start=2)
    assert losses == train(expected, expected.optimizer, 4)
    assert same(whole(module), whole(expected))
    return True


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("back", [True, False])
def test_after_its_end_the_module_goes_on_where_its_memory_is(two, world, back, tmp_path):
    assert all(two.run(after_the_store, world, tmp_path, back))


def test_parameters_of_no_group_are_brought_back(tmp_path):
    store = Store(tmp_path)
    module = nn.Linear(100, 100)
    before = [one.detach().clone() for one in module.parameters()]
    region = Region(store, "weights", module.weight.nbytes)
    region.claim()
    module.weight.data = region.tensor(torch.float32, (100, 100)).copy_(module.weight.detach())
    region.save().wait()
    region.drop()
    assert at_rest(module.weight)
    store.close()
    weight = module.weight
    bring_back(module, {})
    assert module.weight is weight
    assert not at_rest(weight)
    assert same(whole(module), before)


def made_in_place(folder):
    """A module whose values are made in the memory of their shards, but for those of one block."""
    expected, _ = sharded(2)
    module, blocks = sharded(2)
    store = Store(folder)
    made = SpilledParameters(blocks, store, ahead=1)
    assert made.memory_of(module.head.weight) is None
    for name in ("blocks.0", "blocks.2"):
        for parameter, data in compat.shards_of(blocks[name]):
            memory = made.memory_of(parameter)
            assert memory.shape == local_of(parameter).shape
            # What is padded has memory of its own, which is moved.
            if memory.numel() < data.numel() or (name == "blocks.2" and parameter.dim() == 1):
                continue
            compat.place_shard(blocks[name], parameter, memory.view(-1).copy_(data))
            data.fill_(torch.nan)
    made.take_over()
    assert all(at_rest(data) for data in shards_of(blocks))
    assert same(whole(module), whole(expected))
    assert torch.equal(module(batch(0)), expected(batch(0)))
    made.stop()
    store.close()
    return True


def test_values_may_be_made_where_they_will_be(two, tmp_path):
    assert all(two.run(made_in_place, tmp_path))


def failed_fetch(folder):
    module, blocks = sharded(1)
    expected = module(batch(0))
    file = failing()
    file.broken = False
    store = Store(folder, file=file)
    made = SpilledParameters(blocks, store, ahead=1)
    made.take_over()
    file.broken, file.count = True, 0
    with pytest.raises(StoreError, match=r"reading .* bytes of the parameters of blocks\.0 at offset"):
        module(batch(0))
    file.broken = False
    compat.forget_sharded_step(module)
    with contextlib.suppress(StoreError):
        made.settle()
    assert torch.equal(module(batch(0)), expected)
    made.stop()
    store.close()
    return True


def test_a_fetch_that_fails_is_told_of(two, tmp_path):
    assert all(two.run(failed_fetch, tmp_path))
