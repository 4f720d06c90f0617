"""Activations in another tier: the same numbers, each storage once, nothing left behind, and errors that say where."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading

import pytest
import torch
from models import CONTEXT, DIM, VOCAB, Language
from ranks import mesh_of, quiet
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_largescale.errors import PlanError
from lightning_largescale.offload.activations import SMALL_BYTES, offload_activations
from lightning_largescale.offload.direct import DirectFile
from lightning_largescale.offload.saved import HostTier, Saved
from lightning_largescale.offload.store import Store, StoreError
from lightning_largescale.parallel.compile import compile_blocks
from lightning_largescale.parallel.recompute import apply_recompute, remove_recompute
from lightning_largescale.plan import Plan

pytestmark = quiet

CPU = torch.device("cpu")
NVME = Plan(offload_activations="nvme")
# Of these many samples one tensor between blocks is twice what stays for being small.
SAMPLES = 2 * SMALL_BYTES // (4 * DIM * CONTEXT)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, verify=True)
    yield store
    store.close()


def offloaded(model, store, **fields):
    """A copy of `model` whose activations leave."""
    ours = copy.deepcopy(model)
    plan = Plan(offload_activations="nvme", **fields)
    apply_recompute(ours, plan)
    offload_activations(ours, plan, store, CPU)
    return ours


def offload_of(model):
    return next(vars(part)["forward"]._offload for part in model.modules() if hasattr(part.forward, "_offload"))


def nothing_is_left(model):
    offload = offload_of(model)
    # A piece that is under way holds what it is of.
    offload.tier.settle(offload._leaving)
    gc.collect()
    return not offload.known and not offload.tier._buffers.nbytes


def train(model, steps=3, micro_batches=1, dtype=None, samples=SAMPLES):
    """Losses, and gradients of the last step."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            step = [model.loss(torch.randint(VOCAB, (samples, CONTEXT + 1))) for _ in range(micro_batches)]
        for loss in step:
            loss.backward()
        optimizer.step()
        losses += [loss.item() for loss in step]
    return losses, [p.grad for p in model.parameters()]


def same(one, other):
    return one[0] == other[0] and all(torch.equal(*pair) for pair in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "recompute",
    [
        {},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "full", "checkpointed_operations": "cheap"},
    ],
    ids=["none", "full", "cheap"],
)
def test_trains_like_plain(store, recompute, micro_batches, dtype):
    plain = Language(layers=4, dropout=0.1)
    ours = offloaded(plain, store, **recompute)
    options = {"micro_batches": micro_batches, "dtype": dtype, "samples": SAMPLES * (1 if dtype is None else 2)}
    assert same(train(ours, **options), train(plain, **options))
    assert store.written_bytes > 0
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert nothing_is_left(ours)


def test_what_recomputation_keeps_leaves_and_nothing_that_it_computes_again(store):
    ours = offloaded(Language(layers=4), store, activation_checkpointing="full")
    train(ours, steps=2)
    # Inputs, of each step that of the last block stays, and of the one before what backward overtakes.
    assert 2 * 2 * 2 * SMALL_BYTES <= store.written_bytes <= 2 * 3 * 2 * SMALL_BYTES


class Probe(nn.Module):
    """A block of which the test says what it computes."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.full((128, 256), 1.5))
        self.register_buffer("mask", torch.full((128, 256), 0.5))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


X = 128 * 256 * 4


def probes(*functions):
    return nn.ModuleList(Probe(function) for function in functions)


def x_():
    return torch.linspace(0.1, 2, 128 * 256).view(128, 256).requires_grad_()


def square(block, x):
    return x.mul(2).square()


def pass_on(block, x):
    return x * 1.0


def written(store, *functions, x=None):
    """Bytes that a chain of blocks wrote, its gradient compared with the plain one."""
    plain = probes(*functions, pass_on, pass_on)
    ours = offloaded(plain, store)
    before = store.written_bytes
    found = []
    for blocks in (plain, ours):
        given = x_() if x is None else x.detach().requires_grad_()
        y = given
        for block in blocks:
            y = block(y)
        y.sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)
    return store.written_bytes - before


def test_views_of_one_storage_leave_once_and_come_back_as_they_were(store):
    def views(block, x):
        doubled = x.mul(2)
        return doubled.t().square().t() + doubled[64:].square().sum() + doubled[1:, ::2].square().sum()

    assert written(store, views) == X


def test_what_several_blocks_save_leaves_once(store):
    context = []

    def with_context(block, x):
        return x + 0.1 * context[0].square()

    def first(block, x):
        context[:] = [x.mul(3)]
        return with_context(block, x)

    assert written(store, first, *[with_context] * 3) == X


def test_parameters_and_buffers_and_their_views_stay(store):
    def of_parameters(block, x):
        frozen = block.weight.detach()
        return x * block.weight + x.sum() * block.weight.t().square().t() + x * frozen * block.mask + x * frozen[:1]

    # Nothing but its input, and the first product of the last but one term.
    assert written(store, of_parameters) == 2 * X


def test_what_is_small_or_of_another_kind_stays(store):
    sparse = torch.eye(128).to_sparse()

    def odd(block, x):
        few = x[:2].mul(2).square().sum()
        return few * torch.sparse.mm(sparse, torch.complex(x, x).conj().real) + x[:, :64].mul(2).square().sum()

    assert written(store, odd) % X < SMALL_BYTES


@pytest.mark.parametrize("of", ["input", "output", "view", "parameter", "small"])
def test_what_is_written_into_after_it_was_saved_raises_as_otherwise(store, of):
    def errors(blocks):
        x = x_()[:4] if of == "small" else x_()
        kept = []
        given = x * 1
        y = blocks[0](given, kept)
        for block in blocks[1:]:
            y = block(y)
        with torch.no_grad():
            {"input": given, "output": kept[0], "view": kept[0][:1], "parameter": blocks[0].weight, "small": given}[
                of
            ].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            y.sum().backward()
        return str(caught.value).partition("[")[2].partition("]")[0]

    def saves(block, x, kept):
        kept.append(x.exp())
        return kept[0] + x.square() + block.weight[: len(x)] * x

    plain = probes(saves, pass_on, pass_on, pass_on)
    assert errors(offloaded(plain, store)) == errors(plain)


def test_a_content_that_changes_between_blocks_is_saved_again(store):
    def changed(block, x):
        # The first square's input is written into once its backward is out of the question.
        with torch.no_grad():
            x.add_(1)
        return x.square() + 0

    plain = probes(square, changed, changed, pass_on, pass_on)
    found = []
    for blocks in (plain, offloaded(plain, store)):
        first = x_()
        y = blocks[0](first)
        inputs = []
        for block in blocks[1:]:
            inputs.append(y)
            y = block(y)
        found.append(torch.autograd.grad(y.sum(), inputs[-1]) + torch.autograd.grad(inputs[1].sum(), inputs[0]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_second_backward_and_one_of_higher_order(store):
    def cubes(block, x):
        return (x * block.weight).square() * x

    plain = probes(*[cubes] * 4)
    found = []
    for blocks in (plain, offloaded(plain, store)):
        x, y = x_(), 0
        y = x
        for block in blocks:
            y = block(y) / 10
        # What a graph of its own gives back is not kept in memory with the graph.
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)
        second = torch.autograd.grad(y.sum(), x, create_graph=True)
        third = torch.autograd.grad(second[0].square().sum(), [x, *blocks.parameters()])
        found.append([*first, *second, *third])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert store.read_bytes > 0
    del found, first, second, third, y
    gc.collect()
    assert not offload_of(blocks).known


def test_backwards_in_another_order_and_in_another_thread(store):
    plain = probes(*[square] * 3)
    found = []
    for blocks in (plain, offloaded(plain, store)):
        x = x_()
        sums = [blocks[place](blocks[2](x)).sum() for place in (0, 1, 0)]
        runs = [threading.Thread(target=sums[place].backward) for place in (1, 0, 2)]
        for run in runs:
            run.start()
            run.join()
        found.append(x.grad)
    assert torch.equal(*found)
    assert nothing_is_left(blocks)


def test_backwards_in_two_threads_at_once(store):
    plain = probes(*[square] * 4)
    found = []
    for blocks in (plain, offloaded(plain, store)):
        given = [x_(), x_()]
        outputs = []
        for x in given:
            y = x
            for block in blocks:
                y = block(y).sqrt()
            outputs.append(y.sum())
        runs = [threading.Thread(target=y.backward) for y in outputs]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        found.append([x.grad for x in given])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert nothing_is_left(blocks)


def test_a_graph_that_is_dropped_gives_everything_back(store):
    def step(backward):
        x = y = x_()
        for block in blocks:
            y = block(y).sqrt()
        if backward:
            y.sum().backward()
        return x.grad

    blocks = offloaded(probes(*[square] * 4), store)
    expected, size = step(backward=True), os.path.getsize(store.path / "tensors")
    for _ in range(3):
        step(backward=False)
        assert nothing_is_left(blocks)
        assert torch.equal(step(backward=True), expected)
    assert os.path.getsize(store.path / "tensors") == size


def test_steps_of_all_sizes_do_not_let_the_file_grow_for_ever(store):
    ours = offloaded(Language(layers=4), store)
    sizes = []
    for samples in (4, 1, 3, 2, 4, 3, 1, 2, 4, 4, 3, 1):
        train(ours, steps=1, samples=samples * SAMPLES)
        sizes.append(os.path.getsize(store.path / "tensors"))
    assert len({*sizes}) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_error_in_the_middle_the_next_step_is_as_any(store, where):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise ValueError("middle")

    def third(block, x):
        if fails and where == "forward":
            raise ValueError("middle")
        return (Fails.apply(x) if fails else x).square()

    def step():
        x = y = x_()
        for block in blocks:
            y = block(y).sqrt()
        y.sum().backward()
        return x.grad

    fails = False
    blocks = offloaded(probes(square, square, third, square, square), store)
    expected, size = step(), os.path.getsize(store.path / "tensors")
    fails = True
    with pytest.raises(ValueError, match="middle"):
        step()
    fails = False
    assert torch.equal(step(), expected)
    assert nothing_is_left(blocks)
    assert os.path.getsize(store.path / "tensors") == size


class FaultyFile(DirectFile):
    """Fails from some bytes on."""

    reading = writing = False

    def read_at(self, memory, offset):
        if self.reading:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read_at(memory, offset)

    def write_at(self, memory, offset):
        if self.writing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write_at(memory, offset)


@pytest.mark.parametrize("doing", ["reading", "writing"])
def test_a_disk_that_fails_says_for_which_block(tmp_path, doing):
    store = Store(tmp_path, file=FaultyFile)
    ours = offloaded(Language(layers=5), store)
    expected = train(copy.deepcopy(ours), steps=1)
    setattr(store._file, doing, True)
    with pytest.raises(StoreError, match=rf"{doing} \d+ bytes of what blocks\.\d saves .*Input/output error"):
        train(ours, steps=1)
    setattr(store._file, doing, False)
    assert same(train(ours, steps=1), expected)
    assert nothing_is_left(ours)
    store.close()


def test_nothing_is_done_where_nothing_is_saved_for_backward(store):
    ours = offloaded(Language(), store)
    ours.blocks[0].requires_grad_(False)
    with torch.no_grad():
        train_free = ours(torch.randint(VOCAB, (SAMPLES, CONTEXT)))
    with torch.inference_mode():
        assert torch.equal(ours.eval()(torch.randint(VOCAB, (SAMPLES, CONTEXT))).shape and train_free, train_free)
    assert not store.written_bytes


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint_of_the_users_own(store, use_reentrant):
    plain = probes(*[square] * 4)
    found = []
    for blocks in (plain, offloaded(plain, store)):
        x = x_()
        y = checkpoint(lambda x, blocks=blocks: blocks[1](blocks[0](x)).sqrt(), x, use_reentrant=use_reentrant)
        blocks[3](blocks[2](y)).sqrt().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert nothing_is_left(blocks)


def test_outputs_of_any_shape(store):
    def several(block, x, also=None):
        return {"x": (x.square(), [x.exp()]), "also": also}

    plain = probes(several, pass_on, pass_on)
    found = []
    for blocks in (plain, offloaded(plain, store)):
        x = x_()
        out = blocks[0](x, also=3)
        y = blocks[2](blocks[1](out["x"][0])) + out["x"][1][0]
        y.sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_a_copy_of_the_module_and_what_undoes_it(store):
    model = Language()
    apply_recompute(model, Plan(activation_checkpointing="full"))
    recomputed = model.blocks[0].forward
    undo = offload_activations(model, NVME, store, CPU)
    other = copy.deepcopy(model)
    assert other.blocks[0].forward._module is other.blocks[0]
    assert same(train(other, steps=1), train(copy.deepcopy(model), steps=1))
    before = store.written_bytes
    undo()
    assert model.blocks[0].forward is recomputed
    remove_recompute(model)
    train(model, steps=1)
    assert store.written_bytes == before
    assert "forward" not in vars(model.blocks[0])


def test_some_blocks(store):
    ours = offloaded(Language(layers=4), store, offloaded_blocks=("blocks.1", "blocks.2"))
    train(ours, steps=1)
    assert [hasattr(block.forward, "_offload") for block in ours.blocks] == [False, True, True, False]
    assert store.written_bytes > 0


def test_refusals(store):
    with pytest.raises(PlanError, match="offload_activations='nvme' needs repeated blocks and Linear has none"):
        offload_activations(nn.Linear(2, 2), NVME, store, CPU)
    with pytest.raises(PlanError, match=r"offloaded_blocks has 'block.1', which is no repeated block"):
        offload_activations(Language(), Plan(offload_activations="nvme", offloaded_blocks=("block.1",)), store, CPU)


@pytest.mark.parametrize("tier", [None, "cpu"])
def test_a_tier_that_is_the_devices_own_changes_nothing(tier):
    model = Language()
    offload_activations(model, Plan(offload_activations=tier), None, CPU)()
    assert not any("forward" in vars(part) for part in model.modules())


def test_the_environment_asks_for_checksums(tmp_path, monkeypatch):
    monkeypatch.setenv("LARGESCALE_STORE_VERIFY", "1")
    store = Store(tmp_path)
    ours = offloaded(Language(layers=4), store)
    train(ours)
    assert store._checksums is not None
    assert store.read_bytes > 0
    store.close()


def test_compiled_blocks(store):
    plain = Language(layers=4)
    options = {"backend": "aot_eager"}
    compile_blocks(plain, options)
    ours = copy.deepcopy(plain)
    offload_activations(ours, NVME, store, CPU)
    assert same(train(ours), train(plain))
    assert store.written_bytes > 0


def sharded(folder, recompute, dtype):
    """Whether two ranks train alike with and without, what was written, and bytes gathered while activations leave."""
    results = []
    store = Store(folder)
    for offloads in (False, True):
        model = Language(layers=4, dropout=0.1)
        plan = Plan(offload_activations="nvme" if offloads else None, activation_checkpointing=recompute)
        apply_recompute(model, plan)
        offload_activations(model, plan, store, CPU)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh_of(), mp_policy=policy)
        fully_shard(model, mesh=mesh_of(), mp_policy=policy)
        losses, gradients = train(Root(model), steps=2, micro_batches=2, samples=2 * SAMPLES)
        results.append((losses, [gradient.to_local() for gradient in gradients if gradient is not None]))
    left = nothing_is_left(model)
    written_bytes = store.written_bytes
    store.close()
    return same(*results), left, written_bytes


class Root(nn.Module):
    """Calls a sharded model as FSDP2 wants it called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def loss(self, tokens):
        logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits[..., :DIM].flatten(0, 1).float(), tokens[:, 1:].flatten() % DIM)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_ranks_that_shard_train_alike(two, tmp_path, recompute, dtype):
    results = two.run(sharded, tmp_path, recompute, dtype)
    assert all(alike and left for alike, left, _ in results)
    assert {bytes_ for *_, bytes_ in results} != {0}


def gathered(folder):
    """Bytes that two blocks' steps wrote, and what of their gathered weights is there in between."""
    store = Store(folder)
    products = probes(*[lambda block, x: (x.mul(2) @ block.weight.t()) @ block.weight] * 4)
    blocks = offloaded(nn.Sequential(*products), store)
    for block in (*blocks, blocks):
        fully_shard(block, mesh=mesh_of())
    weights = []
    blocks[0].register_forward_pre_hook(lambda block, given: weights.append(block.weight.untyped_storage()))
    x = x_()
    y = blocks(x)
    between = weights[0].nbytes()
    y.sum().backward()
    store.close()
    return store.written_bytes, between, x.grad is not None


def test_gathered_weights_neither_leave_nor_are_kept(two, tmp_path):
    product = 128 * 128 * 4
    for written_bytes, between, trained in two.run(gathered, tmp_path):
        assert between == 0
        assert trained
        # Of the first two, or three, what each product is of.
        assert written_bytes in (2 * (X + product), 3 * X + 2 * product, 2 * X + 3 * product, 3 * (X + product))


PEAK = """
import sys
import torch
from torch import nn
from lightning_largescale.hardware.usage import peak_bytes, release_free_memory, start_peak
from lightning_largescale.offload.activations import offload_activations
from lightning_largescale.offload.store import Store
from lightning_largescale.plan import Plan

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(512, 512), nn.Linear(512, 512)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))

model = nn.Sequential(*(Block() for _ in range(16)))
if sys.argv[1:]:
    offload_activations(model, Plan(offload_activations="nvme"), Store(sys.argv[1]), torch.device("cpu"))

def step():
    model(torch.ones(8192, 512)).mean().backward()

step()
release_free_memory()
start_peak("cpu")
step()
print("PEAK", peak_bytes("cpu"))
"""


@pytest.mark.slow
def test_peak_memory_falls_by_what_leaves(run_python, tmp_path):
    def peak(*arguments):
        out = run_python(f"import sys; sys.argv[1:] = {[*arguments]!r}\n{PEAK}", MALLOC_MMAP_THRESHOLD_="1048576")
        return int(out.partition("PEAK ")[2].split()[0])

    block = 3 * 8192 * 512 * 4
    assert peak() - peak(str(tmp_path)) >= 0.8 * (16 - 2) * block


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_cuda_trains_like_plain(store, tier, recompute):
    plain = Language(layers=4, dropout=0.1).cuda()
    ours = copy.deepcopy(plain)
    plan = Plan(offload_activations=tier, activation_checkpointing=recompute)
    apply_recompute(ours, plan)
    offload_activations(ours, plan, store, torch.device("cuda"))
    with torch.device("cuda"):
        assert same(train(ours, micro_batches=2), train(plain, micro_batches=2))
    assert not offload_of(ours).known


@pytest.mark.gpu
def test_cuda_holds_two_blocks(store):
    def peak(blocks):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            y = torch.ones(4096, 256, device="cuda")
            for block in blocks:
                y = block(y)
            y.sum().backward()
        return torch.cuda.max_memory_allocated()

    def wide(block, x):
        return (x @ block.weight[:, :].t() @ block.weight).exp().sqrt() / 1e3

    plain = probes(*[wide] * 12).cuda()
    ours = copy.deepcopy(plain)
    offload_activations(ours, Plan(offload_activations="cpu"), None, torch.device("cuda"))
    saved = 4096 * 256 * 4 * 3
    assert peak(plain) - peak(ours) >= 0.8 * (12 - 2) * saved


@pytest.mark.gpu
def test_cuda_reads_back_through_the_buffers_of_two_blocks(store):
    """However far the host is ahead of the device."""

    def wide(block, x):
        return (x @ block.weight[:, :].t() @ block.weight).exp().sqrt() / 1e3

    model = probes(*[wide] * 8).cuda()
    offload_activations(model, NVME, store, torch.device("cuda"))
    y = torch.ones(4096, 256, device="cuda")
    for block in model:
        y = block(y)
    y.sum().backward()
    torch.cuda.synchronize()
    # Its input, and the results of a product, `exp` and `sqrt`.
    saved = 4 * 4096 * 256 * 4
    assert saved <= offload_of(model).tier._buffers.nbytes <= 2 * saved


@pytest.mark.gpu
@pytest.mark.parametrize("used", [True, False])
def test_what_is_gone_before_it_has_left_is_not_overwritten_while_it_is_copied(used):
    tier = HostTier(torch.device("cuda"))
    source = torch.ones(65536, device="cuda")
    saved = Saved("a block", source.untyped_storage(), 0)
    sent = tier.send([saved])
    place = saved.place
    if used:
        assert tier.bytes_of(saved).data_ptr() == source.data_ptr()
    del source, saved
    made = torch.zeros(65536, device="cuda").add_(4)
    torch.cuda.synchronize()
    tier.settle(sent)
    assert made.eq(4).all()
    assert place.view(torch.float32).eq(1).all()
