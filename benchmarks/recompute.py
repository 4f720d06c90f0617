"""What does activation checkpointing of all blocks cost in time?

One process. A plain run, one under `Plan(activation_checkpointing="full")` and one that keeps the results of products
take turns, each in a process of its own, with the same model and batches; the figures are ratios of the median step
times, turn by turn.

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
PLANS = {
    "none": ls.Plan(),
    "full": ls.Plan(activation_checkpointing="full"),
    "cheap": ls.Plan(activation_checkpointing="full", checkpointed_operations="cheap"),
}


def trained(plan: str, steps: int) -> list[float]:
    strategy = ls.LargeScaleStrategy(PLANS[plan])
    seconds = fit(families.gpt(WIDTH, LAYERS), strategy, families.batches("gpt", BATCH, steps, length=LENGTH))
    return [median(seconds[2:])]


def main() -> None:
    options, ratios, found = compare_apart(__doc__, {name: partial(trained, name) for name in PLANS}, processes=1)
    say(
        options,
        "Activation checkpointing of all blocks against none",
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH}, one process, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}; {options.pairs} interleaved turns of {options.steps} steps, each in a process of"
        " its own, the first two steps left out.",
        [
            row("step time, full / none", ratios),
            row("step time, full but for products / none", [turn["cheap"][0] / turn["none"][0] for turn in found]),
        ],
    )


if __name__ == "__main__":
    main()
