"""What does a step with a row-sharded table cost, and what does it grow with?

Two processes, a bag of 8 ids a sample, Adagrad. The step's time is to grow with the ids of a batch and not with the rows
of the table. Every case runs in processes of its own, and the cases take turns; figures are ratios of the median step
times to that of the first case, turn by turn. The last case is the same table replicated, with dense gradients.

    python benchmarks/embeddings.py --out benchmarks/results/embeddings_2xcpu_DATE.md
"""

from __future__ import annotations

import os
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule
from pairs import compare_apart, fit, row, say
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_largescale as ls

DIM, BAG = 32, 8
BASE_ROWS, BASE_IDS = 100_000, 8192
ROWS = (100_000, 1_000_000, 10_000_000, 20_000_000)
IDS = (2048, 8192, 32_768)


class Batches(Dataset[Tensor]):
    """Batches of ids, all as likely."""

    def __init__(self, rows: int, ids: int, steps: int) -> None:
        self.rows, self.shape, self.steps = rows, (ids // BAG, BAG), steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Tensor:
        seed = 1000 * index + int(os.environ["RANK"])
        return torch.randint(self.rows, self.shape, generator=torch.Generator().manual_seed(seed))


class Net(LightningModule):
    def __init__(self, rows: int, *, sparse: bool) -> None:
        super().__init__()
        # One row stands for all until they are divided, so that building the table takes no memory.
        start = torch.zeros(1, DIM).expand(rows, DIM)
        start = start if sparse else start.clone()
        self.table = nn.EmbeddingBag.from_pretrained(start, freeze=False, sparse=sparse, mode="sum")
        self.tower = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, 1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.tower(self.table(batch)) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.parameters(), lr=0.01)


def trained(rows: int, ids: int, steps: int, *, divided: bool = True) -> list[Any]:
    plan = ls.Plan(dp_replicate=2, row_sharded_embeddings=("table",) if divided else ())
    batches = DataLoader(Batches(rows, ids, steps), batch_size=None)
    seconds = fit(Net(rows, sparse=divided), ls.LargeScaleStrategy(plan), batches, devices=2)
    return [median(seconds[2:]), psutil.Process().memory_info().rss]


CASES = {
    **{f"{rows:,} rows, {BASE_IDS:,} ids": partial(trained, rows, BASE_IDS) for rows in ROWS},
    **{f"{BASE_ROWS:,} rows, {ids:,} ids": partial(trained, BASE_ROWS, ids) for ids in IDS},
    "1,000,000 rows, replicated": partial(trained, 1_000_000, BASE_IDS, divided=False),
}


def main() -> None:
    options, _, found = compare_apart(__doc__, CASES, processes=2)
    base = next(iter(CASES))
    say(
        options,
        "Row-sharded tables: step time by rows and by ids",
        f"Rows of {DIM} numbers in float32, bags of {BAG} ids, Adagrad, Plan(dp_replicate=2), two processes of one"
        f" thread, torch {torch.__version__}; {options.pairs} interleaved turns of {options.steps} steps, each in"
        f" processes of its own, the first two steps left out. Ids are of one rank and step.",
        [
            *(row(f"step, ms: {name}", [1000 * turn[name][0] for turn in found], 2) for name in CASES),
            *(
                row(f"step / step of {base}: {name}", [turn[name][0] / turn[base][0] for turn in found])
                for name in CASES
                if name != base
            ),
            *(row(f"resident at the end, MiB: {name}", [turn[name][1] / 2**20 for turn in found], 0) for name in CASES),
        ],
    )


if __name__ == "__main__":
    main()
