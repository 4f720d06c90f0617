"""What does a ZeRO-3 plan under the Trainer cost against a hand-written FSDP2 loop?

Two processes. A loop in plain torch (fully_shard on each block and the root, AdamW) and a Trainer with
`LargeScaleStrategy(Plan(dp_shard=2))` take turns in one run, each launched anew with the same weights and batches, so
that neither trains in a process that the other has set up; the figure is the ratio of the median step times, pair by
pair.

    python benchmarks/fsdp_loop.py --out benchmarks/results/fsdp-loop_2xcpu_DATE.md
"""

from __future__ import annotations

import time
from statistics import median

import families
import torch
import torch.distributed as dist
from pairs import compare_apart, fit, row, say
from torch.distributed.fsdp import fully_shard

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 12, 4, 128


def by_hand(steps: int) -> list[float]:
    module = families.gpt(WIDTH, LAYERS)
    dist.init_process_group("gloo")
    for block in module.model.blocks:
        fully_shard(block)
    fully_shard(module.model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    seconds = []
    for index, batch in enumerate(families.batches("gpt", BATCH, steps, length=LENGTH)):
        began = time.perf_counter()
        # In the order of Lightning's closure: gradients are cleared between forward and backward.
        loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return [median(seconds[2:])]


def by_plan(steps: int) -> list[float]:
    strategy = ls.LargeScaleStrategy(ls.Plan(dp_shard=2))
    batches = families.batches("gpt", BATCH, steps, length=LENGTH)
    return [median(fit(families.gpt(WIDTH, LAYERS), strategy, batches, devices=2)[2:])]


def main() -> None:
    options, ratios, _ = compare_apart(__doc__, {"hand": by_hand, "plan": by_plan}, processes=2)
    say(
        options,
        "ZeRO-3 under the Trainer against a hand-written FSDP2 loop",
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH} a rank, 2 processes of 1 thread, gloo,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps, each loop in"
        " processes of its own, the first two steps left out.",
        [row("step time, plan / hand-written", ratios)],
    )


if __name__ == "__main__":
    main()
