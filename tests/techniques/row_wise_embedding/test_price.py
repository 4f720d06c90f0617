"""Tables, by hand: bytes and seconds."""

import dataclasses

import pytest
from planner.builders import MODEL, hardware, parameter, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.sizes import Sizes

TABLES = {"row_sharded_embeddings": ("users",)}


def with_table(**changes):
    """A table of 1000 rows of 64 bytes beside the blocks; a batch of 10 ids."""
    parameters = (*workload().parameters, parameter("users.weight", None, rows=1000, columns=16, **changes))
    return workload(parameters=parameters, batch_bytes=80)


@pytest.mark.parametrize("plan", [{"dp_replicate": 4}, {"dp_shard": 4}, {"dp_shard": 2, "dp_replicate": 2}])
def test_rows_of_tables_are_divided_over_all_ranks(plan):
    dense, sizes = (Sizes(work, Plan(**plan, **TABLES), "cpu") for work in (workload(), with_table()))
    assert sizes.parameters - dense.parameters == 250 * 64
    assert sizes.gradients - dense.gradients == sizes.ungrouped_gradients == 10 * 64
    assert sizes.gathered(None) == dense.gathered(None)
    assert sizes.gradient(None, whole=True) == dense.gradient(None, whole=True)


def test_a_table_on_one_device_is_whole():
    sizes = Sizes(with_table(), Plan(**TABLES), "cpu")
    assert sizes.ungrouped == {}
    assert sizes.parameters == MODEL + 64_000


def test_a_frozen_table_has_no_gradient():
    assert Sizes(with_table(trainable=False), Plan(dp_shard=2, **TABLES), "cpu").ungrouped_gradients == 0


def test_optimizer_state_of_a_table():
    work = with_table()
    needs = dataclasses.replace(work.optimizers[0], state_bytes={"users.weight": 64_000})
    sizes = Sizes(dataclasses.replace(work, optimizers=(needs,)), Plan(dp_replicate=4, **TABLES), "cpu")
    assert sizes.optimizer_state == 16_000


@pytest.mark.parametrize("plan", [{"dp_replicate": 4}, {"dp_shard": 4}])
def test_rows_of_tables_travel_once_each_way(plan):
    table = parameter("users.weight", None, rows=1000, columns=16)
    # A batch of 400 ids, of rows of 64 bytes.
    work = workload(parameters=(*workload().parameters, table), batch_bytes=3200)
    plan = Plan(**plan, row_sharded_embeddings=("users",))
    terms = step_time(work, plan, hardware(4), accumulate_grad_batches=2).terms
    hop, ids, rows = 3 * 1e-4, 3 * 800 / 1e9, 3 * 6400 / 1e9
    assert terms["table exchange"] == pytest.approx(2 * (3 * hop + ids + rows) + (2 * hop + ids + rows) + 3 * hop)
    dense = step_time(workload(), dataclasses.replace(plan, row_sharded_embeddings=()), hardware(4)).terms
    for name in ("all-gather", "reduce-scatter", "all-reduce"):
        assert terms.get(name, 0) == pytest.approx(dense.get(name, 0) * (2 if name == "all-gather" else 1))
    stays = step_time(work, Plan(row_sharded_embeddings=("users",)), hardware(1)).terms
    assert "table exchange" not in stays
