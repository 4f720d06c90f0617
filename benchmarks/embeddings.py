"""What does a step with a row-sharded table grow with: the ids of a batch, or the rows of the table?

Two processes that hold all cases at once and step on each in turn, so that whatever else the machine does befalls all
alike; figures are ratios to the step of the first case, turn by turn. A step is what the strategy does: look-ups and a
dense tower forward, backward with the tower's gradients averaged, gradients of rows to their ranks, Adagrad.

Beside them a plain sparse table of each process by itself, of as many rows as it has of the first and of the third
case: what larger tables cost for the memory's sake. The last case is a table that is replicated, with dense gradients.

    torchrun --nproc-per-node 2 benchmarks/embeddings.py --pairs 40 --out benchmarks/results/embeddings_2xcpu_DATE.md
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from pairs import arguments, row, say
from torch import Tensor, nn

from lightning_largescale import compat
from lightning_largescale.parallel.embedding import shard_embeddings
from lightning_largescale.parallel.lookups import Lookups
from lightning_largescale.techniques.replicate.replica import Replica

DIM, BAG = 32, 8
BASE = (100_000, 8192)
CASES = [BASE, (1_000_000, 8192), (10_000_000, 8192), (20_000_000, 8192), (100_000, 2048), (100_000, 32_768)]
PLAIN = [(50_000, 8192), (5_000_000, 8192)]
REPLICATED = (1_000_000, 8192)
_CPU = torch.device("cpu")


class Net(nn.Module):
    """A bag of embeddings under a small tower."""

    def __init__(self, rows: int, *, sparse: bool) -> None:
        super().__init__()
        # One row stands for all until they are divided, so that building the table takes no memory.
        start = torch.zeros(1, DIM).expand(rows, DIM)
        start = start if sparse else start.clone()
        self.table = nn.EmbeddingBag.from_pretrained(start, freeze=False, sparse=sparse, mode="sum")
        self.tower = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, 1))

    def loss(self, batch: Tensor) -> Tensor:
        return (self.tower(self.table(batch)) - 1).square().mean()


class Case:
    """A model and its optimizer, with a batch of new ids for each step."""

    def __init__(self, rows: int, ids: int, *, way: str = "divided") -> None:
        self.net = Net(rows, sparse=way != "replicated")
        if way == "plain":
            # Its own memory, as the rows have that are divided.
            self.net.table.weight = nn.Parameter(self.net.table.weight.detach().clone())
        self.lookups: Lookups | None = shard_embeddings(self.net, ["table"], _CPU) if way == "divided" else None
        self.replica = Replica(self.net.tower if way == "plain" else self.net, _CPU)
        self.optimizer = torch.optim.Adagrad(self.net.parameters(), lr=0.01)
        self.rows, self.shape = rows, (ids // BAG, BAG)

    def forward(self, batch: Tensor) -> Tensor:
        loss = self.net.loss(batch)
        if self.lookups is not None:
            self.lookups.join()
            compat.call_after_backward(loss, self.lookups.end_backward)
        return loss

    def seconds(self) -> float:
        """Of one step."""
        batch = torch.randint(self.rows, self.shape)
        dist.barrier()
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.replica.run(lambda: self.forward(batch), reduce_output=True).backward()
        self.optimizer.step()
        return time.perf_counter() - began


def name(rows: int, ids: int) -> str:
    return f"{rows:,} rows, {ids:,} ids"


def turns(steps: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Seconds of each case in each turn; every other turn begins with the last."""
    found: dict[str, list[float]] = {case: [] for case in steps}
    for turn in range(count):
        for case in [*steps][:: 1 - 2 * (turn % 2)]:
            found[case].append(steps[case]())
    return found


def main() -> None:
    options = arguments(__doc__, pairs=40, steps=1).parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    steps = {name(*case): Case(*case).seconds for case in CASES}
    steps |= {f"{name(*case)}, plain": Case(*case, way="plain").seconds for case in PLAIN}
    steps[f"{name(*REPLICATED)}, replicated"] = Case(*REPLICATED, way="replicated").seconds
    turns(steps, 3)
    found = turns(steps, options.pairs)
    if dist.get_rank() == 0:
        base = found[name(*BASE)]
        say(
            options,
            "Row-sharded tables: a step by rows and by ids",
            f"Rows of {DIM} float32, bags of {BAG} ids, all rows as likely, Adagrad, a tower of two layers, replicated;"
            f" two processes of one thread, torch {torch.__version__}; {options.pairs} interleaved turns. Ids are those"
            f" of one rank and step. The step of {name(*BASE)} takes {1000 * median(base):.1f} ms (median); the others"
            " are ratios to it, turn by turn.",
            [
                row(case, [one / other for one, other in zip(seconds, base, strict=True)])
                for case, seconds in found.items()
                if case != name(*BASE)
            ],
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
