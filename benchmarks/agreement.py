"""What does it cost that ranks make sure to enter the same collectives, in a model whose ranks always do?

Two ranks, ZeRO-3 over a GPT. In one fit, turns of steps with and without the agreement follow one another; the first
steps of a turn are left out, since the agreement has to see one step before it can follow it. The figure is the ratio
of the median step times, turn by turn.

    python benchmarks/agreement.py --out benchmarks/results/agreement_2xcpu_DATE.md
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import families
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from pairs import arguments, fit, row, say

import lightning_largescale as ls
from lightning_largescale.parallel.gather import watch
from lightning_largescale.parallel.sharded import sharded_state

WIDTH, LAYERS, BATCH, LENGTH, LEFT_OUT = 256, 8, 4, 128, 2


class Turns(Callback):
    """Switches the agreement off and on, every so many steps, and keeps the seconds of each step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, {True: list[list[float]](), False: list[list[float]]()}
        self.agreed = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        state = sharded_state(module)
        assert state is not None
        if index % self.steps == 0:
            self.agreed = not self.agreed
            if state.agreement is not None:
                state.agreement.stop()
                state.agreement = None
            if self.agreed:
                watch(module, state)
            self.seconds[self.agreed].append([])
        self.began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds[self.agreed][-1].append(time.perf_counter() - self.began)


def main() -> None:
    options = arguments(__doc__, pairs=12, steps=8).parse_args()
    torch.manual_seed(0)
    turns = Turns(options.steps)
    batches = families.batches("gpt", BATCH, 2 * options.pairs * options.steps, length=LENGTH)
    fit(families.gpt(WIDTH, LAYERS), ls.LargeScaleStrategy(ls.Plan(dp_shard=2)), batches, devices=2, callback=turns)
    if dist.get_rank():
        return
    medians = {agreed: [median(turn[LEFT_OUT:]) for turn in found] for agreed, found in turns.seconds.items()}
    ratios = [one / other for one, other in zip(medians[True], medians[False], strict=True)]
    say(
        options,
        "Overhead of agreeing on collectives",
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH} a rank, two ranks, ZeRO-3, gloo,"
        f" torch {torch.__version__}; {options.pairs} pairs of turns of {options.steps} steps, the first {LEFT_OUT} of"
        " each left out.",
        [row("step time, with the agreement / without", ratios)],
        f"Median step without: {median(medians[False]) * 1000:.0f} ms.",
    )


if __name__ == "__main__":
    main()
