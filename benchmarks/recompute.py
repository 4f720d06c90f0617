"""What does activation checkpointing of all blocks cost in time?

One process. A plain run and one under `Plan(activation_checkpointing="full")` of the same model and batches take turns,
each in a process of its own; the figure is the ratio of the median step times, pair by pair.

    python benchmarks/recompute.py --out benchmarks/results/recompute_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import families
import torch
from lightning.pytorch import Trainer
from overhead import StepTimes

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 8, 4, 256


def step_seconds(checkpointing: str, steps: int) -> float:
    torch.manual_seed(0)
    times = StepTimes()
    trainer = Trainer(
        strategy=ls.LargeScaleStrategy(ls.Plan(activation_checkpointing=checkpointing)),
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(families.gpt(WIDTH, LAYERS), families.batches("gpt", BATCH, steps, length=LENGTH))
    return median(times.seconds[2:])


def run(checkpointing: str, steps: int) -> float:
    command = [sys.executable, __file__, "--one", checkpointing, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if not lines:
        sys.exit(f"{checkpointing} did not finish:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("SECONDS "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=("none", "full"), help="one run, for the processes that this script starts")
    options = parser.parse_args()
    if options.one:
        print(f"SECONDS {step_seconds(options.one, options.steps)}", flush=True)
        return
    ratios = []
    for pair in range(options.pairs):
        seconds = {name: run(name, options.steps) for name in ("none", "full")[:: 1 - 2 * (pair % 2)]}
        ratios.append(seconds["full"] / seconds["none"])
        print(f"pair {pair}: {ratios[-1]:.3f}", seconds, flush=True)
    text = (
        "# Activation checkpointing of all blocks against none\n\n"
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH}, one process of 2 threads,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps, each in a process of"
        " its own, the first two steps left out.\n\n"
        "| figure | median | least | most |\n|---|--:|--:|--:|\n"
        f"| step time, full / none | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
