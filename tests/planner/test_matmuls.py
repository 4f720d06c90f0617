import dataclasses

import pytest
import torch
from planner.builders import workload
from torch import nn

from lightning_largescale.planner.matmuls import matmul_sizes
from lightning_largescale.workload import Workload


def test_by_hand():
    # Blocks: 10**9 FLOPs over two matrices of 2048 x 1024 are 119 rows; the root: over one such matrix, 238.
    assert matmul_sizes(workload()) == ((128, 1024, 2048), (256, 1024, 2048))


@pytest.mark.parametrize(
    ("module", "batch", "sizes"),
    [
        (
            nn.Sequential(nn.Linear(60, 250), nn.GELU(), nn.Linear(250, 10)),
            torch.ones(3, 10, 60),
            ((32, 64, 256), (32, 256, 8)),
        ),
        (nn.Conv2d(3, 16, 3, padding=1), torch.ones(2, 3, 16, 16), ((512, 32, 16),)),
        (nn.Embedding(50, 8), torch.ones(4, dtype=torch.long), None),
        (nn.LayerNorm(8), torch.ones(4, 8), None),
    ],
    ids=["mlp", "convolution", "table", "no matrix"],
)
def test_sizes_are_those_of_the_products(module, batch, sizes):
    assert matmul_sizes(Workload.trace(module, batch, step="forward")) == sizes


def test_similar_models_share_what_is_measured():
    assert matmul_sizes(workload(blocks=12)) == matmul_sizes(workload(blocks=4))
    huge = dataclasses.replace(workload(), steps=workload().with_batch(10**6).steps)
    assert {size[0] for size in matmul_sizes(huge)} == {8192}


def test_a_table_that_is_the_head_too_counts():
    table, *others = workload().parameters
    looked_up = dataclasses.replace(table, embedding=True)
    tied = dataclasses.replace(looked_up, aliases=("head.weight",))
    assert matmul_sizes(workload(parameters=(looked_up, *others))) == ((128, 1024, 2048),)
    assert matmul_sizes(workload(parameters=(tied, *others))) == ((128, 1024, 2048), (256, 1024, 2048))
