"""Look-ups and their gradients are those of a whole table, whatever the ranks ask for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from clicks import (
    Holder,
    connected,
    ids_of,
)
from ranks import quiet
from torch import nn

from lightning_largescale.parallel.embedding import make_tables_whole, shard_embeddings
from lightning_largescale.parallel.rows import rows_of

# What torch says of every sparse gradient that an embedding of its own makes.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")]


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


def no_ids(kind, dtype):
    module = Holder(kind(11, 3))
    shard_embeddings(module, ["table"], torch.device("cpu"))
    module.table(torch.ones(2, 2, dtype=torch.int32 if dist.get_rank() else dtype))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(nn.Embedding, torch.float32), (nn.Embedding, torch.uint8), (nn.EmbeddingBag, torch.bool)]
)
def test_ids_that_are_none(two, kind, dtype):
    for error, _, _ in two.answers(connected, no_ids, kind, dtype):
        assert str(error) == f"table 'table' was given ids of {dtype}; give torch.int64 or torch.int32."
