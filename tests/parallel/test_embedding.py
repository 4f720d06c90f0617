"""Row-sharded tables train as a plain, whole, sparse nn.Embedding on the global batch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import grad_norm
from models import divided_loader, trainer
from ranks import mesh_of, quiet, ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.parallel.embedding import check_embeddings, make_tables_whole, row_sharded, shard_embeddings
from lightning_largescale.parallel.rows import Rows, rows_of
from lightning_largescale.plan import Plan, PlanError
from lightning_largescale.strategy import LargeScaleStrategy

# What torch says of every sparse gradient that an embedding of its own makes.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")]

USERS, WORDS, DIM = 101, 30, 4
NAMES = ("users", "words")
STEPS = 20


class Clicks(Dataset):
    """A user, seven words of which the last two are padding or a repetition, and whether there was a click."""

    def __init__(self, samples=160):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        user = torch.randint(USERS, (), generator=generator)
        words = torch.randint(WORDS, (7,), generator=generator)
        words[5:] = words[4] if index % 2 else 0
        return user, words, torch.rand((), generator=generator).round()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2 * DIM, 8), nn.Linear(8, 2 * DIM)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Recommender(LightningModule):
    """Two tables and a dense tower with blocks."""

    def __init__(self, optimizer="SGD", mode="mean", seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.users = nn.Embedding(USERS, DIM, sparse=True)
        self.words = nn.EmbeddingBag(WORDS, DIM, mode=mode, sparse=True, padding_idx=0)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(2 * DIM, 1)
        self.optimizer, self.options = optimizer, options
        self.automatic_optimization = optimizer != "SparseAdam"
        self.losses, self.evaluated, self.norms = [], [], []

    def forward(self, user, words):
        return self.head(self.blocks(torch.cat([self.users(user), self.words(words)], -1))).squeeze(-1)

    def loss(self, batch):
        user, words, click = batch
        return F.binary_cross_entropy_with_logits(self(user, words), click)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        assert self.users.weight.grad.is_sparse

    def validation_step(self, batch, index):
        self.evaluated.append(float(self.loss(batch)))

    def configure_optimizers(self):
        if self.optimizer != "SparseAdam":
            kind = getattr(torch.optim, self.optimizer)
            return kind(self.parameters(), lr=0.5, **self.options)
        tables = [self.users.weight, self.words.weight]
        dense = [p for p in self.parameters() if all(p is not table for table in tables)]
        return [torch.optim.SparseAdam(tables, lr=0.05), torch.optim.AdamW(dense, lr=0.01)]

    def train_dataloader(self):
        return divided_loader(self.trainer, Clicks())

    val_dataloader = train_dataloader


def strategy_of(plan):
    return LargeScaleStrategy(plan) if plan else "auto"


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


REPLICATED, SHARDED = Plan(dp_replicate=2, row_sharded_embeddings=NAMES), Plan(dp_shard=2, row_sharded_embeddings=NAMES)


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


def gradients(module, call):
    """Of each rank's table: the gradient put together, the plain one of the global batch, and the results of both."""
    plain, ours = module, copy.deepcopy(module)
    lookups = shard_embeddings(ours, ["table"], torch.device("cpu"))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    result, extra = call(ours.table, rank)
    expected, plain_extra = call(plain.table, rank)
    lookups.join()
    if result.requires_grad:
        (result.sin().sum() / ranks).backward()
        (expected.sin().sum() / ranks).backward()
    lookups.end_backward()
    if extra is not None:
        torch.testing.assert_close(extra.grad, plain_extra.grad)
    torch.testing.assert_close(result, expected)
    gradient = plain.table.weight.grad
    gradient = torch.zeros_like(plain.table.weight) if gradient is None else gradient
    dist.all_reduce(gradient)
    # One for every rank wherever one of them looked up: an optimizer counts its steps.
    own = ours.table.weight.grad
    assert own.is_sparse
    assert own.is_coalesced()
    assert rows_of(own) == rows_of(ours.table.weight)
    start = rows_of(own).start
    torch.testing.assert_close(own.to_dense(), gradient[start : start + len(own)] / ranks)
    return own.indices().flatten().tolist()


def connected(function, *args):
    """On a rank, connected from then on."""
    mesh_of()
    return function(*args)


class Holder(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table


def ids_of(rank, *shape, dtype=torch.int64):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def a_bag_call(table, rank):
    return table(ids_of(rank, 5), torch.tensor([0, 2, 2])), None


def weighted(table, rank):
    weights = torch.linspace(0.5, 2, 12).view(4, 3).requires_grad_()
    return table(ids_of(rank, 4, 3), per_sample_weights=weights), weights


CALLS = {
    "matrix of ids": (nn.Embedding(11, 3), lambda table, rank: (table(ids_of(rank, 2, 4)), None)),
    "one id": (nn.Embedding(11, 3), lambda table, rank: (table(torch.tensor(4 + 6 * rank)), None)),
    "short integers": (nn.Embedding(11, 3), lambda table, rank: (table(ids_of(rank, 5, dtype=torch.int32)), None)),
    "double": (nn.Embedding(11, 3, dtype=torch.float64), lambda table, rank: (table(ids_of(rank, 5)), None)),
    "padding": (nn.Embedding(11, 3, padding_idx=4), lambda table, rank: (table(ids_of(rank, 9)), None)),
    "empty on one rank": (nn.Embedding(11, 3), lambda table, rank: (table(ids_of(0, 4 * rank)), None)),
    "empty on all ranks": (nn.Embedding(11, 3), lambda table, rank: (table(ids_of(0, 0)), None)),
    "called by one rank more often": (
        nn.Embedding(11, 3),
        lambda table, rank: (table(ids_of(rank, 4)) + sum(table(ids_of(7, 4)) for _ in range(rank)), None),
    ),
    "not called by one rank": (
        nn.Embedding(11, 3),
        lambda table, rank: (table(ids_of(1, 4)) if rank else torch.zeros(1, requires_grad=True) * 1, None),
    ),
    "mean": (nn.EmbeddingBag(11, 3), lambda table, rank: (table(ids_of(rank, 4, 3)), None)),
    "sum": (nn.EmbeddingBag(11, 3, mode="sum"), lambda table, rank: (table(ids_of(rank, 4, 3)), None)),
    "offsets and an empty bag": (nn.EmbeddingBag(11, 3), a_bag_call),
    "last offset": (nn.EmbeddingBag(11, 3, include_last_offset=True), a_bag_call),
    "short offsets": (
        nn.EmbeddingBag(11, 3),
        lambda table, rank: (table(ids_of(rank, 5, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)), None),
    ),
    "bags with padding": (
        nn.EmbeddingBag(11, 3, padding_idx=4),
        lambda table, rank: (table(torch.tensor([[4, 1], [2, 4]]) + rank), None),
    ),
    "bags without any id": (
        nn.EmbeddingBag(11, 3, mode="sum"),
        lambda table, rank: (table(ids_of(rank, 0), torch.tensor([0, 0])), None),
    ),
    "weights": (nn.EmbeddingBag(11, 3, mode="sum"), weighted),
}


def case(name):
    torch.manual_seed(0)
    table, call = CALLS[name]
    return gradients(Holder(copy.deepcopy(table)), call)


@pytest.mark.parametrize("name", CALLS)
def test_rows_and_gradients(two, name):
    touched = two.run(connected, case, name)
    assert "empty on all" not in name or touched == [[], []]


def in_another_order():
    torch.manual_seed(0)
    module = nn.ModuleDict({name: nn.Embedding(11, 3) for name in "abc"})
    plain, ours = copy.deepcopy(module), module
    lookups = shard_embeddings(ours, [*"abc"], torch.device("cpu"))
    for name in ("abca", "ca", "b", "")[dist.get_rank()]:
        with torch.no_grad():
            torch.testing.assert_close(ours[name](ids_of(1, 4)), plain[name](ids_of(1, 4)))
    lookups.join()
    # Uneven: the last rank has fewer rows.
    return [table.weight.shape[0] for table in lookups.tables]


def test_ranks_look_up_different_tables(four):
    assert four.run(connected, in_another_order) == [[3, 3, 3]] * 3 + [[2, 2, 2]]


def with_no_row():
    """Of five rows the last of four ranks has none, and trains all the same."""
    torch.manual_seed(0)
    plain, ours = Holder(nn.Embedding(5, 3, sparse=True)), Holder(nn.Embedding(5, 3))
    ours.load_state_dict(plain.state_dict())
    lookups = shard_embeddings(ours, ["table"], torch.device("cpu"))
    for module in (plain, ours):
        optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            module.table(torch.tensor([step, 4])).square().sum().backward()
            if module is ours:
                lookups.join()
                lookups.end_backward()
            optimizer.step()
    local = ours.table.weight.shape[0]
    make_tables_whole(ours)
    torch.testing.assert_close(ours.table.weight, plain.table.weight)
    return local


def test_a_rank_without_a_row(four):
    assert four.run(connected, with_no_row) == [2, 2, 1, 0]


def out_of_range(given):
    module = Holder(nn.Embedding(11, 3))
    shard_embeddings(module, ["table"], torch.device("cpu"))
    module.table(torch.tensor(given if dist.get_rank() else [1, 2]))


@pytest.mark.parametrize("given", [[3, 11], [-1, 2]])
def test_id_out_of_range(two, given):
    wrong = next(one for one in given if not 0 <= one < 11)
    for error, _, _ in two.answers(connected, out_of_range, given):
        assert str(error) == f"table 'table' has 11 rows and was given id {wrong}; ids must be 0 to 10."


def on_meta():
    with torch.device("meta"):
        module = Holder(nn.Embedding(11, 3))
    shard_embeddings(module, ["table"], torch.device("cpu"))
    weight = module.table.weight
    return weight.is_meta, tuple(weight.shape), rows_of(weight)


def test_a_table_without_values(two):
    assert two.run(connected, on_meta) == [(True, (6, 3), Rows(11, 0)), (True, (5, 3), Rows(11, 6))]


class Dense(Recommender):
    """With gradients that stock Lightning can clip."""

    def __init__(self, **options):
        super().__init__(**options)
        self.users.sparse = self.words.sparse = False

    def on_before_optimizer_step(self, optimizer):
        pass


def fit_steps(plan, devices, **given):
    """With what Trainers do to gradients."""
    torch.manual_seed(0)
    model = (Recommender if plan else Dense)(momentum=0.9)
    run = trainer(strategy_of(plan), devices=devices, max_steps=6, **given)
    run.fit(model)
    if plan:
        run.strategy.make_whole()
    return model.losses, model.users.weight.detach()


OPTIONS = {
    "norm": {"gradient_clip_val": 0.05},
    "largest": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 3},
    "accumulated norm": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
}


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (REPLICATED, "norm"),
        (SHARDED, "norm"),
        (SHARDED, "largest"),
        (REPLICATED, "accumulated norm"),
        *(pytest.param(SHARDED, name, marks=pytest.mark.slow) for name in ("accumulated", "accumulated norm")),
        *(pytest.param(REPLICATED, name, marks=pytest.mark.slow) for name in ("largest", "accumulated")),
    ],
)
def test_clipping_and_accumulation(two, plan, name):
    expected, weight = fit_steps(None, 1, **OPTIONS[name])
    for losses, found in two.run(fit_steps, plan, 2, **OPTIONS[name]):
        assert losses == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-5)


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
        "row_sharded_embeddings has 'users', which lies in 'users', one of wrapped_modules; give tables outside of"
        " these."
    )


class Steps(Recommender):
    """With any optimizer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.kind, self.options = kind, options

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.1, **self.options)


class ScalesRows(torch.optim.SGD):
    """Each table by its own largest gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense()
                parameter -= 0.1 * gradient / gradient.abs().max()
        return loss


class KeepsNumbers(torch.optim.SGD):
    """A number a row."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = parameter[..., 0].clone()
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.to_dense()
        return loss


def fit_with(plan, kind, options):
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(Steps(kind, **options))


END = (
    "; give tables to torch.optim.SGD, Adagrad or SparseAdam, under manual optimization an optimizer of their own, or"
    " leave them out of row_sharded_embeddings."
)


@pytest.mark.parametrize(
    ("plan", "kind", "options", "message"),
    [
        (REPLICATED, torch.optim.AdamW, {}, "it takes no sparse gradient (RuntimeError: Adam does not support"),
        (SHARDED, torch.optim.SGD, {"weight_decay": 0.1}, "it takes no sparse gradient (RuntimeError: add(sparse,"),
        (REPLICATED, torch.optim.SGD, {"fused": True}, "it takes no sparse gradient (RuntimeError: "),
        (SHARDED, ScalesRows, {}, "its step on a table is not that on its rows"),
        (REPLICATED, KeepsNumbers, {}, "it keeps 'rows' of shape (8,) for a table of shape (8, 4)"),
    ],
    ids=["AdamW", "decay", "fused", "mixing", "numbers"],
)  # fmt: skip
def test_optimizers_that_are_refused(two, plan, kind, options, message):
    for error, _, _ in two.answers(fit_with, plan, kind, options):
        assert isinstance(error, PlanError)
        assert str(error).startswith(f"{kind.__name__} cannot train the row-sharded table 'users': {message}")
        assert str(error).endswith(END)


class Unannounced(Recommender):
    def training_step(self, batch, index):
        self.loss(batch).backward()
        for optimizer in self.optimizers():
            optimizer.step()


def fit_module(kind, plan, **given):
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=2, **given).fit(kind(optimizer="SparseAdam"))


def test_a_backward_that_is_not_announced(two):
    for error, _, _ in two.answers(fit_module, Unannounced, SHARDED):
        assert str(error) == (
            "table 'users' has gradients of a backward that the Trainer does not know of, and its rows are on all"
            " ranks; call self.manual_backward(loss) in the place of loss.backward()."
        )


def fit_sparse():
    trainer(LargeScaleStrategy(Plan(dp_shard=2, row_sharded_embeddings=("users",))), devices=2).fit(Recommender())


def test_sparse_tables_that_are_not_named(two):
    for error, _, _ in two.answers(fit_sparse):
        assert str(error) == (
            "'words' is a EmbeddingBag with sparse=True, and FSDP does not reduce sparse gradients; name it in"
            " row_sharded_embeddings, or make it without sparse=True."
        )


def fit_out_of_range(plan):
    model = Recommender()
    model.words = nn.EmbeddingBag(WORDS - 1, DIM, sparse=True)
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=20).fit(model)


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_id_out_of_range_in_a_step(two, plan):
    for error, _, _ in two.answers(fit_out_of_range, plan):
        assert str(error) == "table 'words' has 29 rows and was given id 29; ids must be 0 to 28."


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


class Uneven(Recommender):
    """Rank 1 has a batch less to evaluate."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Clicks(12 if self.trainer.global_rank == 0 else 8), batch_size=4)


def evaluate(plan):
    model = Uneven()
    run = trainer(LargeScaleStrategy(plan), devices=2, limit_val_batches=1.0)
    run.validate(model, verbose=False)
    return model.evaluated


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_uneven_evaluation(two, plan):
    plain = Uneven()
    trainer(limit_val_batches=1.0).validate(plain, verbose=False)
    first, second = two.run(evaluate, plan)
    assert first == pytest.approx(plain.evaluated, rel=1e-5)
    assert second == pytest.approx(plain.evaluated[:2], rel=1e-5)


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
        (SHARDED, "SparseAdam"),
    ],
)
def test_checkpoints_both_ways(two, plan, optimizer, tmp_path):
    stock, ours = tmp_path / "stock.ckpt", tmp_path / "ours.ckpt"
    go_on(None, 1, optimizer, save=stock)
    two.run(go_on, plan, 2, optimizer, None, ours)
    expected, found = (torch.load(path, weights_only=False) for path in (stock, ours))
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
    """One row that stands for all of them until it is divided, as a table would that is too large for a rank."""

    def __init__(self):
        super().__init__("SparseAdam")
        self.users = nn.Embedding.from_pretrained(
            torch.zeros(1, LARGE_DIM).expand(LARGE_ROWS, LARGE_DIM), freeze=False, sparse=True
        )
        self.blocks = nn.Sequential(nn.Linear(LARGE_DIM + DIM, 2 * DIM), nn.ReLU())

    def configure_optimizers(self):
        dense = [p for p in self.parameters() if p is not self.users.weight and p is not self.words.weight]
        return [torch.optim.SGD([self.users.weight, self.words.weight], lr=0.5), torch.optim.AdamW(dense, lr=0.01)]


def resident(line):
    with open("/proc/self/status") as status:
        return next(int(one.split()[1]) * 1024 for one in status if one.startswith(line))


def train_large():
    before = resident("VmRSS")
    model = Large()
    run = trainer(LargeScaleStrategy(REPLICATED), devices=2, max_steps=5)
    run.fit(model)
    return resident("VmHWM") - before, model.users.weight.nbytes, model.losses


@pytest.mark.slow
def test_no_rank_needs_more_than_its_rows():
    table_bytes = 4 * LARGE_ROWS * LARGE_DIM
    with ranks(2) as own:
        for peak, rows, losses in own.run(train_large):
            assert rows == table_bytes // 2
            assert peak < table_bytes // 2 + 160 * 2**20
            assert len(losses) == 3


class Reads(Recommender):
    """Uses the whole table in a step, and clips by itself."""

    def __init__(self, full=False):
        super().__init__()
        self.automatic_optimization, self.full = False, full
        self.users.sparse = self.words.sparse = full
        self.norms = []

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with self.trainer.strategy.full_parameters() if self.full else contextlib.nullcontext():
            penalty = 0.1 * self.users.weight.square().mean()
        loss = self.loss(batch) + penalty
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        self.manual_backward(loss)
        self.norms.append({name: float(norm) for name, norm in grad_norm(self, 2).items()})
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_before_optimizer_step(self, optimizer):
        pass


def fit_reading(plan, devices):
    torch.manual_seed(0)
    model = Reads(full=plan is not None)
    trainer(strategy_of(plan), devices=devices, max_steps=4).fit(model)
    return model.losses, model.norms


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_whole_tables_and_norms_within_steps(two, plan):
    expected, norms = fit_reading(None, 1)
    for losses, found in two.run(fit_reading, plan, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        for one, other in zip(found, norms, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


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


class Accumulates(Recommender):
    """By its own means, the tables being used in the first micro-batch alone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        first = index % 2 == 0
        if first:
            optimizer.zero_grad()
        synchronize = contextlib.nullcontext()
        if first and isinstance(self.trainer.strategy, LargeScaleStrategy):
            synchronize = self.trainer.strategy.block_backward_sync()
        user, words, click = batch
        with synchronize:
            hidden = torch.cat([self.users(user), self.words(words)], -1)
            logits = self.head(hidden if first else hidden.detach()).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits, click)
            self.losses.append(float(self.all_gather(loss.detach()).mean()))
            self.manual_backward(loss)
        if not first:
            optimizer.step()


def fit_accumulating(plan, devices):
    model = Accumulates()
    trainer(strategy_of(plan), devices=devices, max_steps=4).fit(model)
    return model.losses


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_manual_accumulation(two, plan):
    expected = fit_accumulating(None, 1)
    for losses in two.run(fit_accumulating, plan, 2):
        assert losses == pytest.approx(expected, rel=1e-5)


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
