"""What does planning cost, and does the plain plan cost anything in a step?

One process, a 12-layer GPT. Short fits under `strategy="auto"` and `strategy="largescale_auto"` take turns in one run,
each with a fresh copy of the same model; the figure is the ratio of the median step times, pair by pair. Planning is
the time that the strategy takes to decide, with the machine's rates in the cache, as they are from the second run on.

    python benchmarks/overhead.py --out benchmarks/results/overhead_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median
from typing import Any

import families
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 12, 4, 128


class StepTimes(Callback):
    """Seconds of each training step but the first two."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


class Timed(ls.LargeScaleAutoStrategy):
    """Keeps the seconds that deciding took, the machine's rates being cached."""

    def _decide(self, trainer: Trainer) -> ls.Plan:
        began = time.perf_counter()
        plan = super()._decide(trainer)
        self.decided_in = time.perf_counter() - began
        return plan


def fit(module: LightningModule, strategy: Any, steps: int) -> float:
    times = StepTimes()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, families.batches("gpt", BATCH, steps, length=LENGTH))
    return median(times.seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    module = families.gpt(WIDTH, LAYERS)
    fit(copy.deepcopy(module), Timed(), 3)
    ratios, planning, plans = [], [], set()
    for pair in range(options.pairs):
        ours = Timed()
        runs = [("auto", "auto"), ("largescale", ours)]
        seconds = {name: fit(copy.deepcopy(module), use, options.steps) for name, use in runs[:: 1 - 2 * (pair % 2)]}
        ratios.append(seconds["largescale"] / seconds["auto"])
        planning.append(ours.decided_in)
        plans.add(ours.plan.describe())
        print(f"pair {pair}: {ratios[-1]:.3f}, decided in {planning[-1]:.2f} s", flush=True)
    text = (
        f"# Overhead of planning and of the plain plan\n\n"
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH}, one process, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps,"
        " the first two left out.\n\n"
        "| figure | median | least | most |\n|---|--:|--:|--:|\n"
        f"| step time, `largescale_auto` / `auto` | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |\n"
        f"| seconds to decide | {median(planning):.2f} | {min(planning):.2f} | {max(planning):.2f} |\n\n"
        f"Plan chosen: {', '.join(plans)}.\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
