"""Ranks that run different modules in one step: numbers are those of one process, or all ranks end with a sentence."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from lightning.pytorch import LightningModule
from models import trainer
from ranks import quiet, ranks
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet
WIDTH, STEPS = 6, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def draw(step, rank):
    """Samples of a rank in a step and what its data have it do: the same for whoever computes them."""
    numbers = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, WIDTH, generator=numbers), torch.randint(1 << 20, (1,), generator=numbers), torch.tensor(step)


class Paths(LightningModule):
    """Blocks, of which `path` says which run; the loss of a rank's samples is `loss`."""

    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 1)
        self.losses = []
        self.build()

    def build(self):
        """What a model has beside."""

    def loss(self, x, path, step):
        return self.head(self.run(self.embed(x), int(path), int(step))).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(*(part[0] for part in batch))
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def predict_step(self, batch, index):
        return self.loss(*(part[0] for part in batch)).item()

    def configure_optimizers(self):
        # Parameters without a gradient neither decay nor move on.
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)

    def train_dataloader(self):
        rank = self.trainer.strategy.distributed_sampler_kwargs["rank"]
        return DataLoader([draw(step, rank) for step in range(STEPS * self.trainer.accumulate_grad_batches)])


class Expert(Paths):
    def run(self, x, path, step):
        return self.blocks[path % len(self.blocks)](x)


class RootExperts(Paths):
    def build(self):
        self.adapters = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "abc"})

    def run(self, x, path, step):
        for block in self.blocks:
            x = block(x)
        return self.adapters["abc"[path % 3]](x)


class Mixture(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, path):
        return super().forward(x) + self.experts[path % 3](x)


class NestedExperts(Paths):
    def build(self):
        self.blocks = nn.ModuleList(Mixture() for _ in range(3))

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            x = block(x, path // 3**place)
        return x


class LayerDrop(Paths):
    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            if path >> place & 1:
                x = block(x)
        return x


class RarelyDropped(Paths):
    """Some steps in which all ranks are alike, then one in which they are not, and again."""

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            if step % 3 < 2 or path >> place & 1:
                x = block(x)
        return x


class EarlyExit(Paths):
    def run(self, x, path, step):
        for block in self.blocks[: path % (len(self.blocks) + 1)]:
            x = block(x)
        return x


class LateExit(Paths):
    """As a classifier at each block, that goes on for hard samples, from the second step on."""

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            x = block(x)
            if step and place == path % len(self.blocks):
                break
        return x


class Heads(Paths):
    def build(self):
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def run(self, x, path, step):
        for block in self.blocks:
            x = block(x)
        return self.heads[path % 2](x) if path % 3 else x


class Shuffled(Paths):
    def run(self, x, path, step):
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(path))
        for place in order.tolist():
            x = self.blocks[place](x)
        return x


class Shared(Paths):
    """Blocks run unequally often, the first on all paths."""

    def run(self, x, path, step):
        for _ in range(1 + path % 3):
            x = self.blocks[0](x)
        return self.blocks[1 + path % 2](self.blocks[0](x))


class Tower(Paths):
    """A tower that batches without images skip."""

    def build(self):
        self.tower = nn.Sequential(Block(), Block(), Block())

    def run(self, x, path, step):
        x = x + self.tower(x) if path % 2 else x
        for block in self.blocks:
            x = block(x)
        return x


class Gated(Paths):
    """A gate without dimensions, which FSDP leaves whole, on some paths."""

    def build(self):
        self.gate, self.other = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(2.0))

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            x = x + self.gate * block(x) if path >> place & 1 else block(x)
        return x if step < 3 else x * self.other


class Detached(Paths):
    """The forward is the same on all ranks, the backward is not."""

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            x = block(x) if step < 2 or path >> place & 1 else x + (block(x) - x).detach()
        return x


class Penalty(Paths):
    """A backward inside the forward."""

    def loss(self, x, path, step):
        x.requires_grad_()
        out = self.head(self.run(self.embed(x), int(path), int(step)))
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square().mean() + slope.square().mean()

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            if path >> place & 1:
                x = block(x)
        return x


class Recomputed(Paths):
    """With the user's own activation checkpointing."""

    reentrant = False

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            if path >> place & 1:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Reentrant(Recomputed):
    reentrant = True


class Alternating(Paths):
    """All ranks run the same, another thing in each step."""

    def run(self, x, path, step):
        for block in self.blocks[step % 2 :: 2]:
            x = block(x)
        return x


class Adapted(Paths):
    """Frozen blocks, and an adapter for each domain."""

    def build(self):
        self.blocks.requires_grad_(False)
        self.adapters = nn.ModuleList(Block() for _ in range(3))

    def run(self, x, path, step):
        for block in self.blocks:
            x = self.adapters[path % 3](block(x))
        return x


class ByHand(LayerDrop):
    """Steps of its own, two in each."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = self.loss(*(part[0] for part in batch))
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))


class Told(LayerDrop):
    """Collectives inside the step, that all ranks enter at different places of it."""

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            if path >> place & 1:
                x = block(x)
            if place == 1:
                self.log("size", x.detach().norm(), sync_dist=True)
        return x


class Regularised(LayerDrop):
    """A loss of full parameters beside, wherever a rank is in its step."""

    def regularised(self, path):
        return self.blocks

    def loss(self, x, path, step):
        loss = super().loss(x, path, step)
        alone = self._fabric is None and self._trainer is None
        with contextlib.nullcontext() if alone else self.trainer.strategy.full_parameters():
            return loss + sum(block.up.weight.square().mean() for block in self.regularised(int(path)))


class RegularisedByPath(Regularised):
    """All ranks run the same, and regularise different blocks."""

    def run(self, x, path, step):
        return x

    def regularised(self, path):
        return [self.blocks[path % len(self.blocks)]]


class Balanced(LayerDrop):
    """A gradient taken between forward and backward, as losses are balanced by."""

    def on_before_backward(self, loss):
        (slope,) = torch.autograd.grad(loss, [self.head.weight], retain_graph=True)
        assert slope.shape == (1, WIDTH)


class Elsewhere(RarelyDropped):
    """A device for new tensors that is not where ranks agree."""

    def run(self, x, path, step):
        with torch.device("meta"):
            return super().run(x, path, step)


class Smooth(Paths):
    """A penalty on slopes in which all blocks run, so that tensor parallelism is found."""

    def loss(self, x, path, step):
        x = x.detach().clone().requires_grad_()
        out = self.embed(x)
        for block in self.blocks:
            out = block(out)
        out = self.head(out)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square().mean() + slope.square().mean()

    def training_step(self, batch, index):
        loss = self.loss(*(part[0] for part in batch))
        self.losses.append(loss.detach())
        return loss


MODELS = [
    Expert,
    RootExperts,
    NestedExperts,
    LayerDrop,
    RarelyDropped,
    EarlyExit,
    LateExit,
    Heads,
    Shuffled,
    Shared,
    Tower,
    Gated,
    Detached,
    Penalty,
    Recomputed,
    Reentrant,
    Alternating,
    Adapted,
    ByHand,
    Told,
    Elsewhere,
    Balanced,
]


def plain(kind, ranks, accumulated=1):
    """Losses of one process that computes what all ranks do, and the parameters."""
    model, losses = kind(), []
    model.log = lambda *args, **kwargs: None
    optimizer = model.configure_optimizers()
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(step * accumulated, (step + 1) * accumulated):
            for again in (True, False) if kind is ByHand else (False,):
                one = sum(model.loss(*draw(micro, rank)) for rank in range(ranks)) / ranks
                (one / accumulated).backward()
                if again:
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(one.item())
        optimizer.step()
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def fit(kind, plan, accumulated=1, **options):
    """Losses under a plan, and the parameters after it."""
    model = kind()
    styles = STYLES if plan.tp > 1 and kind is not Smooth else None
    strategy = LargeScaleStrategy(plan, tensor_parallel_plan=styles)
    steps = 2 * STEPS if kind is ByHand else STEPS
    run = trainer(strategy, devices=plan.world_size, max_steps=steps, accumulate_grad_batches=accumulated, **options)
    run.fit(model)
    with strategy.full_parameters():
        return model.losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def compare(made, kind, plan, data_ranks, accumulated=1):
    wanted, trained = plain(kind, data_ranks, accumulated)
    for losses, parameters in made.run(fit, kind, plan, accumulated):
        assert losses == pytest.approx(wanted, rel=1e-5)
        for name, parameter in trained.items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-6, msg=name)


ZERO2, ZERO3 = Plan(dp_shard=2, reshard_after_forward=False), Plan(dp_shard=2)
IN_DRAM, ON_DISK = (Plan(dp_shard=2, offload_parameters=tier) for tier in ("cpu", "nvme"))
HSDP, TP, TP_AND_FSDP = Plan(dp_replicate=2, dp_shard=2), Plan(tp=2), Plan(tp=2, dp_shard=2)
# Tensor parallelism is told how, since what reads numbers off tensors cannot be run on parts to find it.
STYLES = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
# Each kind of model once a day, under some plan; all of both when the long tests are run.
OFTEN = {ZERO3: MODELS[::2], ZERO2: MODELS[1::4], IN_DRAM: MODELS[3::4], HSDP: MODELS[2:3], TP: MODELS[::11]}
PLANS = {
    "zero3": ZERO3,
    "zero2": ZERO2,
    "cpu": IN_DRAM,
    "nvme": ON_DISK,
    "hsdp": HSDP,
    "tp": TP,
    "tp_fsdp": TP_AND_FSDP,
}


def cases():
    for name, plan in PLANS.items():
        for kind in MODELS:
            marks = [] if kind in OFTEN.get(plan, ()) else [pytest.mark.slow]
            yield pytest.param(kind, plan, marks=marks, id=f"{kind.__name__}-{name}")


@pytest.mark.parametrize(("kind", "plan"), [*cases()])
def test_trains_as_one_process(two, four, kind, plan):
    compare(two if plan.world_size == 2 else four, kind, plan, plan.world_size // plan.tp)


@pytest.mark.parametrize("plan", [TP, Plan(tp=2, sequence_parallel=True)], ids=["whole", "sequence"])
def test_second_derivatives_train_as_one_process(two, plan):
    compare(two, Smooth, plan, 1)


@pytest.mark.parametrize("kind", [Expert, Gated, RarelyDropped])
def test_accumulated_micro_batches_train_as_one_process(two, kind):
    compare(two, kind, ZERO3, 2, 2)


def test_full_parameters_in_steps_of_different_blocks(two):
    compare(two, Regularised, ZERO3, 2)


class LooksUp(LayerDrop):
    """Rows of a table, of samples of some ranks or all, before the blocks."""

    some = False

    def build(self):
        self.table = nn.Embedding(32, WIDTH)

    def configure_optimizers(self):
        # Sparse gradients know no momentum.
        return torch.optim.SGD(self.parameters(), 0.05)

    def rows(self, path):
        return 0 if self.some and path % 2 else self.table((torch.arange(4) + path) % 32)

    def run(self, x, path, step):
        return super().run(x + self.rows(path), path, step)


class LooksUpSometimes(LooksUp):
    some = True


class LooksUpLate(LooksUpSometimes):
    """After a block."""

    def run(self, x, path, step):
        return self.blocks[1](self.blocks[0](x) + self.rows(path))


IN_ROWS = Plan(dp_shard=2, row_sharded_embeddings=("table",))


@pytest.mark.parametrize("kind", [LooksUp, LooksUpSometimes])
def test_tables_are_looked_up_beside_different_blocks(two, kind):
    compare(two, kind, IN_ROWS, 2)


class Frozen(Paths):
    """Blocks that have no gradient from a step on, on all ranks, one of them, or none."""

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place == 1 and (step == 3 or (step > 3 and path % 2)):
                x = x.detach()
        return x


@pytest.mark.parametrize("kind", [Frozen, Detached, LateExit])
def test_updates_in_backward_are_of_gradients_that_a_rank_has(two, kind):
    compare(two, kind, Plan(dp_shard=2, release_gradients=True), 2)


class ByRank(Paths):
    """What a rank runs depends on its number, after some steps in which it does not."""

    begins = 0

    def run(self, x, path, step):
        chosen = self.global_rank if step >= self.begins else 0
        for block in self.blocks[chosen:]:
            x = block(x)
        return x


class ByRankLater(ByRank):
    begins = 2


class MoreSteps(ByRankLater):
    """One rank runs a backward more than the others."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if index == 3 and self.global_rank:
            self.run(self.embed(batch[0][0]), 0, 0).sum().backward()
        return loss


class SkippedByOne(Paths):
    """A rank has no loss in a step."""

    def run(self, x, path, step):
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return None if index == 2 and self.global_rank else loss


class ReadsByRank(Paths):
    """Each rank looks at another block, in the step."""

    def run(self, x, path, step):
        for block in self.blocks:
            x = block(x)
        with torch.no_grad():
            return x * self.blocks[self.global_rank].up.weight.norm().item()


class ReadsGradientsByRank(ByRank):
    """In a hook."""

    def run(self, x, path, step):
        for block in self.blocks:
            x = block(x)
        return x

    def on_after_backward(self):
        self.blocks[self.global_rank].up.weight.grad.norm().item()


class AssignsByRank(ByRank):
    """One rank sets a gradient by hand, once steps are followed."""

    def run(self, x, path, step):
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place == 0 and step == 4 and self.global_rank == 0:
                self.blocks[2].up.bias.grad = torch.zeros(2 * WIDTH)
        return x


def refused(kind, plan):
    with pytest.raises(PlanError) as error:
        fit(kind, plan)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "plan", "words"),
    [
        (ByRank, TP, ["is about to run 'blocks.0.up' where", "runs 'blocks.1.up'"]),
        (MoreSteps, ZERO3, ["ends a backward", "ends a forward that a backward follows"]),
        (SkippedByOne, ZERO3, ["ends a step", "ends a forward that a backward follows"]),
        (RegularisedByPath, ZERO3, ["enters a collective", "of other tensors"]),
        (ReadsByRank, ZERO3, ["norm of blocks.0.up.weight' and 'norm of blocks.1.up.weight' last"]),
        (ReadsGradientsByRank, ZERO2, ["norm of the gradient of blocks.0", "norm of the gradient of blocks.1"]),
        (AssignsByRank, ZERO3, ["enters a collective", "of other tensors"]),
        (LooksUpLate, IN_ROWS, ["looks up rows of a table after a block"]),
        # What is gathered already is no shard to make whole.
        (Regularised, ZERO2, ["enters a collective", "of other tensors"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_ranks_cannot_do_for_one_another_is_told(two, kind, plan, words):
    for message in two.run(refused, kind, plan):
        assert all(word in message for word in words), message


@pytest.mark.slow
def test_a_rank_inside_of_a_module_that_another_leaves_out_is_ended(capfd):
    # Whose standard error is the test's.
    with ranks(2) as made, pytest.raises(EOFError):
        made.run(refused, ByRankLater, TP)
    said = capfd.readouterr().err
    assert "is about to run 'blocks.1.up' where" in said
    assert "runs 'blocks.0.up', as in the step before" in said


class Alone(Paths):
    """A rank runs a block by itself, between steps."""

    def on_train_batch_start(self, batch, index):
        if index == 3 and self.global_rank == 0:
            self.blocks[0](batch[0])

    def run(self, x, path, step):
        return self.blocks[1](self.blocks[0](x))


class AloneAtLast(Alone):
    """After which the other rank has no step."""

    def on_train_batch_start(self, batch, index):
        pass

    def on_train_end(self):
        if self.global_rank == 0:
            self.blocks[0](torch.ones(4, WIDTH))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Alone, "gathers 'blocks.0' where another begins a training step"),
        pytest.param(AloneAtLast, "(on_train_end), which all ranks are to gather", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_runs_a_block_alone_is_ended(capfd, kind, words):
    with ranks(2) as made, pytest.raises(EOFError):
        made.run(refused, kind, ZERO3)
    assert words in "".join(capfd.readouterr())


def evaluate(kind, plan, counts):
    """Losses of this rank's samples, of which each rank has as many as `counts` says."""
    model = kind()
    run = trainer(LargeScaleStrategy(plan), devices=plan.world_size)
    rank = run.strategy.global_rank
    loader = DataLoader([draw(step, rank) for step in range(counts[rank])])
    return run.predict(model, loader)


@torch.no_grad()
def expected_losses(kind, rank, count):
    """Of one process, of as many samples of a rank."""
    model = kind()
    return [model.loss(*draw(step, rank)).item() for step in range(count)]


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        pytest.param(kind, plan, marks=() if quick else pytest.mark.slow, id=f"{kind.__name__}-{name}")
        for kind, quicks in ((Expert, (True, False)), (LayerDrop, (False, True)), (Tower, (True, False)))
        for (name, plan), quick in zip({"zero3": ZERO3, "zero2": ZERO2}.items(), quicks, strict=True)
    ],
)
def test_ranks_with_unequal_numbers_of_batches_evaluate_different_blocks(two, kind, plan):
    counts = [2, 5]
    for rank, losses in enumerate(two.run(evaluate, kind, plan, counts)):
        assert losses == pytest.approx(expected_losses(kind, rank, counts[rank]), rel=1e-5)


@pytest.mark.parametrize("counts", [(3, 3), (1, 5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", [LooksUp, LooksUpSometimes])
def test_rows_are_looked_up_in_evaluations_of_different_blocks(two, kind, counts):
    for rank, losses in enumerate(two.run(evaluate, kind, IN_ROWS, counts)):
        assert losses == pytest.approx(expected_losses(kind, rank, counts[rank]), rel=1e-5)


class LooksUpFirst(LooksUp):
    """Before blocks that all run, so that later steps follow the first, which gathers the root."""

    def run(self, x, path, step):
        x = x + self.rows(path)
        for block in self.blocks:
            x = block(x)
        return x


class LooksUpFirstSometimes(LooksUpFirst):
    some = True


@pytest.mark.parametrize("wraps", [(), ("head",)], ids=["blocks", "wraps"])
@pytest.mark.parametrize(("kind", "counts"), [(LooksUpFirst, (5, 2)), (LooksUpFirstSometimes, (4, 4))])
def test_rows_are_looked_up_in_evaluations_that_follow_others(two, kind, counts, wraps):
    plan = dataclasses.replace(IN_ROWS, extra_fsdp_modules=wraps)
    for rank, losses in enumerate(two.run(evaluate, kind, plan, counts)):
        assert losses == pytest.approx(expected_losses(kind, rank, counts[rank]), rel=1e-5)


class Differentiates(LooksUpFirst):
    """Evaluates more batches on rank 0, then runs a forward and a backward where no step runs."""

    def build(self):
        self.rows = lambda path: 0

    def validation_step(self, batch, index):
        self.loss(*(part[0] for part in batch))

    def val_dataloader(self):
        rank = self.trainer.strategy.distributed_sampler_kwargs["rank"]
        return DataLoader([draw(step, rank) for step in range(1 if rank else 3)])

    def on_train_epoch_end(self):
        self.loss(*draw(0, 0)).backward()
        self.differentiated = float(self.head.weight.grad.full_tensor().norm())
        self.zero_grad()


def evaluate_and_differentiate():
    model = Differentiates()
    trainer(LargeScaleStrategy(ZERO3), devices=2, max_steps=STEPS, limit_val_batches=3).fit(model)
    return model.losses, model.differentiated


def test_a_rank_that_was_without_a_batch_goes_on_like_the_others(two):
    wanted, _ = plain(Differentiates, 2, 1)
    for losses, differentiated in two.run(evaluate_and_differentiate):
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert differentiated > 0


class LooksUpBetween(LooksUp):
    """Every rank, between blocks that all run."""

    def run(self, x, path, step):
        return self.blocks[1](self.blocks[0](x) + self.rows(path))


def test_rows_that_all_look_up_after_a_block_are_looked_up_for_a_rank_without_a_batch(two):
    counts = (2, 5)
    for rank, losses in enumerate(two.run(evaluate, LooksUpBetween, IN_ROWS, counts)):
        assert losses == pytest.approx(expected_losses(LooksUpBetween, rank, counts[rank]), rel=1e-5)


def refused_late_look_up(counts):
    with pytest.raises(PlanError) as error:
        evaluate(LooksUpLate, IN_ROWS, counts)
    return str(error.value)


@pytest.mark.parametrize("counts", [(3, 3), (1, 4)], ids=["equal", "unequal"])
def test_a_look_up_after_a_block_of_one_rank_alone_is_refused_in_an_evaluation(two, counts):
    for message in two.run(refused_late_look_up, counts):
        assert "looks up rows of a table after a block" in message


class GathersResults(Paths):
    def run(self, x, path, step):
        for block in self.blocks:
            x = block(x)
        return x

    def predict_step(self, batch, index):
        return self.all_gather(super().predict_step(batch, index))


def refused_evaluation(counts):
    with pytest.raises(PlanError) as error:
        evaluate(GathersResults, ZERO3, counts)
    return str(error.value)


@pytest.mark.parametrize("counts", [[1, 3], [4, 6]], ids=["agreed", "followed"])
def test_a_rank_without_a_batch_enters_no_collective_of_the_others_steps(two, counts):
    for message in two.run(refused_evaluation, counts):
        assert "ends a step where another enters a collective" in message
