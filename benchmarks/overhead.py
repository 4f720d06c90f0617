"""What does planning cost, and does the plain plan cost anything in a step?

One process, a 12-layer GPT. Short fits under `strategy="auto"` and `strategy="largescale_auto"` take turns in one run,
each with a fresh copy of the same model; the figure is the ratio of the median step times, pair by pair. Planning is
the time that the strategy takes to decide, with the machine's rates in the cache, as they are from the second run on.

    python benchmarks/overhead.py --out benchmarks/results/overhead_cpu_DATE.md
"""

from __future__ import annotations

import copy
import time
from statistics import median

import families
import torch
from lightning.pytorch import Trainer
from pairs import arguments, fit, row, say, take_turns

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 12, 4, 128


class Timed(ls.LargeScaleAutoStrategy):
    """Keeps the seconds that deciding took, the machine's rates being cached."""

    def _decide(self, trainer: Trainer) -> ls.Plan:
        began = time.perf_counter()
        plan = super()._decide(trainer)
        self.decided_in = time.perf_counter() - began
        return plan


def main() -> None:
    options = arguments(__doc__, pairs=8, steps=10).parse_args()
    torch.manual_seed(0)
    module = families.gpt(WIDTH, LAYERS)
    decided: list[Timed] = []

    def auto() -> float:
        return step_seconds("auto", options.steps)

    def largescale() -> float:
        decided.append(Timed())
        return step_seconds(decided[-1], options.steps)

    def step_seconds(strategy: str | Timed, steps: int) -> float:
        seconds = fit(copy.deepcopy(module), strategy, families.batches("gpt", BATCH, steps, length=LENGTH))
        return median(seconds[2:])

    step_seconds(Timed(), 3)
    ratios, _ = take_turns(options.pairs, {"auto": auto, "largescale": largescale})
    say(
        options,
        "Overhead of planning and of the plain plan",
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH}, one process, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps,"
        " the first two left out.",
        [
            row("step time, `largescale_auto` / `auto`", ratios),
            row("seconds to decide", [one.decided_in for one in decided], 2),
        ],
        f"Plan chosen: {', '.join({one.plan.describe() for one in decided})}.",
    )


if __name__ == "__main__":
    main()
