"""What does activation checkpointing of all blocks cost in time?

One process. A plain run and one under `Plan(activation_checkpointing="full")` of the same model and batches take turns,
each in a process of its own; the figure is the ratio of the median step times, pair by pair.

    python benchmarks/recompute.py --out benchmarks/results/recompute_cpu_DATE.md
"""

from __future__ import annotations

from functools import partial
from statistics import median

import families
import torch
from pairs import compare_apart, fit, row, say

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 8, 4, 256


def trained(checkpointing: str, steps: int) -> list[float]:
    strategy = ls.LargeScaleStrategy(ls.Plan(activation_checkpointing=checkpointing))
    seconds = fit(families.gpt(WIDTH, LAYERS), strategy, families.batches("gpt", BATCH, steps, length=LENGTH))
    return [median(seconds[2:])]


def main() -> None:
    ways = {name: partial(trained, name) for name in ("none", "full")}
    options, ratios, _ = compare_apart(__doc__, ways, processes=1)
    say(
        options,
        "Activation checkpointing of all blocks against none",
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH}, one process, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps, each in a process of"
        " its own, the first two steps left out.",
        [row("step time, full / none", ratios)],
    )


if __name__ == "__main__":
    main()
