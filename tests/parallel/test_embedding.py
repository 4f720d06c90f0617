"""Row-sharded tables train as a plain, whole, sparse nn.Embedding on the global batch."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from clicks import (
    DIM,
    NAMES,
    REPLICATED,
    SHARDED,
    STEPS,
    USERS,
    Dense,
    Holder,
    Recommender,
    connected,
    strategy_of,
)
from lightning.pytorch.callbacks import WeightAveraging
from models import read_checkpoint, trainer
from ranks import mesh_of, quiet, ranks
from torch import nn

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.embedding import check_embeddings, make_tables_whole, row_sharded, shard_embeddings
from lightning_largescale.parallel.rows import Rows, rows_of
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

# What torch says of every sparse gradient that an embedding of its own makes.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")]


def fit(plan, devices, options=None, **given):
    model = Recommender(**{"seed": int(os.environ.get("RANK", 0)), **(options or {})})
    # Of two optimizers both steps count.
    steps = STEPS * (1 if model.automatic_optimization else 2)
    run = trainer(strategy_of(plan), devices=devices, max_steps=steps, **given)
    run.fit(model)
    local = model.users.weight.shape
    run.strategy.make_whole() if plan else None
    return model.losses, {name: p.detach() for name, p in model.named_parameters()}, local


def assert_alike(two, plan, options=None, **given):
    expected, weights, _ = fit(None, 1, options, **given)
    for losses, found, local in two.run(fit, plan, 2, options, **given):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert local[0] in (50, 51)
        assert list(found) == list(weights)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [
        (REPLICATED, "SGD"),
        (REPLICATED, "SparseAdam"),
        (SHARDED, "Adagrad"),
        pytest.param(REPLICATED, "Adagrad", marks=pytest.mark.slow),
        pytest.param(SHARDED, "SGD", marks=pytest.mark.slow),
        pytest.param(SHARDED, "SparseAdam", marks=pytest.mark.slow),
    ],
)
def test_trains_like_plain(two, plan, optimizer):
    assert_alike(two, plan, {"optimizer": optimizer})


def on_meta():
    with torch.device("meta"):
        module = Holder(nn.Embedding(11, 3))
    shard_embeddings(module, ["table"], torch.device("cpu"))
    weight = module.table.weight
    return weight.is_meta, tuple(weight.shape), rows_of(weight)


def test_a_table_without_values(two):
    assert two.run(connected, on_meta) == [(True, (6, 3), Rows(11, 0)), (True, (5, 3), Rows(11, 6))]


def refused(names, module, ranks=2, wrapped=()):
    with pytest.raises(PlanError) as error:
        check_embeddings(module, names, ranks, wrapped)
    return str(error.value)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 2), nn.Linear(2, 8)
        self.head.weight = self.table.weight


class Own(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


def blocks_with_tables():
    return nn.Sequential(*(nn.Sequential(nn.Embedding(8, 2), nn.Linear(2, 2)) for _ in range(2)))


BAD = [
    ("userz", Recommender(), "row_sharded_embeddings has 'userz' and Recommender has no such module; give names that"
     " named_modules has, such as 'users'."),
    ("head", Recommender(), "row_sharded_embeddings has 'head', a Linear; give modules that compute as nn.Embedding or"
     " nn.EmbeddingBag do."),
    ("table", Holder(Own(8, 2)), "row_sharded_embeddings has 'table', a Own; give modules that compute as nn.Embedding"
     " or nn.EmbeddingBag do."),
    ("0.0", blocks_with_tables(), "row_sharded_embeddings has '0.0', which lies in '0', a repeated block; give tables"
     " outside of these."),
    ("table", Tied(), "row_sharded_embeddings has 'table', whose weight is tied to that of 'head', which needs all of"
     " it; give tables that are used alone, or untie them."),
    ("table", Holder(nn.Embedding(8, 2, max_norm=1.0)), "row_sharded_embeddings has 'table', with max_norm=1.0, which"
     " needs all ids in one place; give tables without it."),
    ("table", Holder(nn.EmbeddingBag(8, 2, scale_grad_by_freq=True)), "row_sharded_embeddings has 'table', with"
     " scale_grad_by_freq=True, which needs all ids in one place; give tables without it."),
    ("table", Holder(nn.EmbeddingBag(8, 2, mode="max")), "row_sharded_embeddings has 'table', with mode='max', which"
     " has no sparse gradient; give bags of mode 'sum' or 'mean'."),
    ("table", Holder(nn.Embedding(1, 2)), "row_sharded_embeddings has 'table', of 1 rows, and there are 2 ranks; give"
     " tables with a row for each rank, and leave small ones out."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "module", "message"), BAD)
def test_tables_that_are_refused(name, module, message):
    assert refused([name], module) == message


def test_wrapped_and_row_sharded():
    message = refused(["users"], Recommender(), wrapped=["users"])
    assert message == (
        "row_sharded_embeddings has 'users', which lies in 'users', one of extra_fsdp_modules; give tables outside of"
        " these."
    )


def fit_sparse():
    trainer(LargeScaleStrategy(Plan(dp_shard=2, row_sharded_embeddings=("users",))), devices=2).fit(Recommender())


def test_sparse_tables_that_are_not_named(two):
    for error, _, _ in two.answers(fit_sparse):
        assert str(error) == (
            "'words' is a EmbeddingBag with sparse=True, and FSDP does not reduce sparse gradients; name it in"
            " row_sharded_embeddings, or make it without sparse=True."
        )


def fit_averaging():
    model = Recommender()
    trainer(LargeScaleStrategy(REPLICATED), devices=2, max_steps=2, callbacks=[WeightAveraging()]).fit(model)


def test_callbacks_that_copy(two):
    for error, _, _ in two.answers(fit_averaging):
        assert str(error) == (
            "row_sharded_embeddings=('users', 'words') and a callback keeps a copy of the module, such as an average"
            " of its weights, whose tables would stay whole; leave out the callback, or the tables."
        )


def copied():
    mesh_of()
    module = Holder(nn.Embedding(11, 3))
    shard_embeddings(module, ["table"], torch.device("cpu"))
    try:
        copy.deepcopy(module)
    finally:
        make_tables_whole(module)
        assert row_sharded(module) is None
        assert copy.deepcopy(module).table.weight.shape == (11, 3)


def test_copies(two):
    for error, _, _ in two.answers(copied):
        assert str(error).startswith("table 'table' is row-sharded and cannot be copied;")


def divided_again():
    mesh_of()
    module = Holder(nn.Embedding(11, 3))
    for _ in range(2):
        lookups = shard_embeddings(module, ["table"], torch.device("cpu"))
        make_tables_whole(module)
        with pytest.raises(ValueError, match="is not registered"):
            dist.get_rank(lookups._group)
        # As where it ended with all others.
        lookups.end()


def test_the_group_of_look_ups_ends_with_the_division(two):
    two.run(divided_again)


def life(plan, other):
    """What happens to a module in one process: fit, evaluation, full parameters, another plan, and a plain run."""
    model = Recommender(seed=int(os.environ["RANK"]))
    run = trainer(LargeScaleStrategy(plan), devices=2, max_steps=3)
    run.fit(model)
    local = model.users.weight
    kept = torch.arange(float(DIM))
    with run.strategy.full_parameters():
        assert model.users.weight.shape == (USERS, DIM)
        assert model.users(torch.tensor([3])).shape == (1, DIM)
        with torch.no_grad():
            model.users.weight[[0, 100]] = kept
    assert model.users.weight is local
    again = trainer(LargeScaleStrategy(plan), devices=2, max_steps=3)
    again.fit(model)
    assert model.users.weight is local
    assert rows_of(local).rows == USERS
    with torch.no_grad():
        found = model.users(torch.tensor([0, 5]))
        row_sharded(model).join()
    model.load_state_dict({"users.weight": torch.ones(USERS, DIM)}, strict=False)
    ones = float(model.users.weight.detach().mean())
    third = trainer(LargeScaleStrategy(other), devices=2, max_steps=3)
    third.fit(model)
    shape = tuple(model.users.weight.shape)
    third.strategy.make_whole()
    return found.shape, ones, shape, rows_of(model.users.weight), "forward" in vars(model.users), model.losses


@pytest.mark.parametrize(
    ("plan", "other"),
    [
        (REPLICATED, Plan(dp_shard=2, row_sharded_embeddings=("words", "users"))),
        (SHARDED, Plan(dp_replicate=2)),
    ],
)
def test_one_module_under_several_plans(two, plan, other):
    answers = two.run(life, plan, other)
    for found, ones, shape, rows, replaced, losses in answers:
        assert found == (2, DIM)
        assert ones == 1.0
        assert shape[0] == USERS if not other.row_sharded_embeddings else shape[0] in (50, 51)
        assert rows is None
        assert not replaced
        assert losses == answers[0][-1]


def go_on(plan, devices, optimizer, path=None, save=None):
    model = Recommender(optimizer, seed=int(os.environ.get("RANK", 0)) + (7 if path else 0))
    run = trainer(strategy_of(plan), devices=devices, max_steps=-1, max_epochs=2 if path else 1)
    run.fit(model, ckpt_path=path, weights_only=False)
    if save:
        run.save_checkpoint(save)
    return model.losses


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [
        (REPLICATED, "Adagrad"),
        pytest.param(REPLICATED, "SparseAdam", marks=pytest.mark.slow),
        pytest.param(SHARDED, "Adagrad", marks=pytest.mark.slow),
        pytest.param(SHARDED, "SparseAdam", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_both_ways(two, plan, optimizer, tmp_path):
    stock, ours = tmp_path / "stock.ckpt", tmp_path / "ours.ckpt"
    go_on(None, 1, optimizer, save=stock)
    two.run(go_on, plan, 2, optimizer, None, ours)
    expected, found = (read_checkpoint(path) for path in (stock, ours))
    assert list(found["state_dict"]) == list(expected["state_dict"])
    assert found["state_dict"]["users.weight"].shape == (USERS, DIM)
    for one, other in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        assert list(one["state"]) == list(other["state"])
        for index, values in other["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(one["state"][index][key], value, rtol=1e-3, atol=1e-3)
    uninterrupted = go_on(None, 1, optimizer, stock)
    assert go_on(None, 1, optimizer, ours) == pytest.approx(uninterrupted, rel=1e-3)
    for path in (stock, ours):
        for losses in two.run(go_on, plan, 2, optimizer, path):
            assert losses == pytest.approx(uninterrupted, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Plan(dp_replicate=2, dp_shard=2, row_sharded_embeddings=NAMES)])
@pytest.mark.parametrize("optimizer", ["Adagrad", "SparseAdam"])
def test_four_ranks(four, plan, optimizer):
    expected, weights, _ = fit(None, 1, {"optimizer": optimizer})
    for losses, found, _ in four.run(fit, plan, 4, {"optimizer": optimizer}):
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)


# Bytes of 20 million rows of 32 numbers.
LARGE_ROWS, LARGE_DIM = 20_000_000, 32


class Large(Recommender):
    """With a table too large for a rank: built late, or one row that stands for all of them until it is divided."""

    def __init__(self, late):
        super().__init__("SparseAdam")
        self.late = late
        if not late:
            self.users = nn.Embedding.from_pretrained(
                torch.zeros(1, LARGE_DIM).expand(LARGE_ROWS, LARGE_DIM), freeze=False, sparse=True
            )
        self.blocks = nn.Sequential(nn.Linear(LARGE_DIM + DIM, 2 * DIM), nn.ReLU())

    def configure_model(self):
        if self.late:
            self.users = nn.Embedding(LARGE_ROWS, LARGE_DIM, sparse=True)

    def configure_optimizers(self):
        dense = [p for p in self.parameters() if p is not self.users.weight and p is not self.words.weight]
        return [torch.optim.SGD([self.users.weight, self.words.weight], lr=0.5), torch.optim.AdamW(dense, lr=0.01)]


def resident(line):
    with open("/proc/self/status") as status:
        return next(int(one.split()[1]) * 1024 for one in status if one.startswith(line))


def train_large(late):
    before = resident("VmRSS")
    model = Large(late)
    run = trainer(LargeScaleStrategy(REPLICATED), devices=2, max_steps=5)
    run.fit(model)
    return resident("VmHWM") - before, model.users.weight.nbytes, model.losses


@pytest.mark.slow
@pytest.mark.parametrize("late", [True, False])
def test_no_rank_needs_more_than_its_rows(late):
    table_bytes = 4 * LARGE_ROWS * LARGE_DIM
    with ranks(2) as own:
        for peak, rows, losses in own.run(train_large, late):
            assert rows == table_bytes // 2
            assert peak < table_bytes // 2 + 160 * 2**20
            assert len(losses) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(two, precision):
    for plan in (REPLICATED, SHARDED):
        plan = dataclasses.replace(plan, precision=precision)
        expected, _, _ = fit(Plan(precision=precision), 1, {"optimizer": "SGD"})
        for losses, _, _ in two.run(fit, plan, 2, {"optimizer": "SGD"}):
            assert losses == pytest.approx(expected, rel=2e-2)


def test_one_device_keeps_the_module_as_it_is():
    model = Recommender()
    trainer(LargeScaleStrategy(Plan(row_sharded_embeddings=NAMES)), max_steps=2).fit(model)
    assert row_sharded(model) is None
    assert model.users.weight.shape == (USERS, DIM)
    with pytest.raises(PlanError, match=r"has 'user' and Recommender has no such module; .* such as 'users'\."):
        trainer(LargeScaleStrategy(Plan(row_sharded_embeddings=("user",))), max_steps=2).fit(Recommender())


def fit_alone():
    model = Recommender()
    trainer(LargeScaleStrategy(REPLICATED), devices=2, max_steps=1).fit(model)
    trainer(LargeScaleStrategy(Plan()), devices=1, max_steps=1).fit(model)


def test_another_number_of_processes(two):
    for error, _, _ in two.answers(fit_alone):
        assert str(error) == (
            "table 'users' is divided among 2 processes and this Trainer has 1; first call"
            " `trainer.strategy.make_whole()` of the other Trainer on all ranks."
        )


def fit_then_plan():
    model = Dense(optimizer="Adagrad")
    trainer(LargeScaleStrategy(REPLICATED), devices=2, max_steps=2).fit(model)
    assert row_sharded(model) is not None
    run = trainer(LargeScaleAutoStrategy(), devices=2, max_steps=2)
    run.fit(model)
    return row_sharded(model), run.strategy.plan.row_sharded_embeddings, len(model.losses)


@pytest.mark.slow
def test_the_auto_strategy_takes_the_module_over(two):
    assert two.run(fit_then_plan) == [(None, (), 4)] * 2
