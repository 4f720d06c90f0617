"""What does a ZeRO-3 plan under the Trainer cost against a hand-written FSDP2 loop?

Two processes. A loop in plain torch (fully_shard on each block and the root, AdamW) and a Trainer with
`LargeScaleStrategy(Plan(dp_shard=2))` take turns in one run, each launched anew with the same weights and batches, so
that neither trains in a process that the other has set up; the figure is the ratio of the median step times, pair by
pair.

    python benchmarks/fsdp_loop.py --out benchmarks/results/fsdp-loop_2xcpu_DATE.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import families
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from overhead import StepTimes
from torch.distributed.fsdp import fully_shard

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 12, 4, 128


def by_hand(module: LightningModule, steps: int) -> float:
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
    return median(seconds[2:])


def by_plan(module: LightningModule, steps: int) -> float:
    times = StepTimes()
    trainer = Trainer(
        strategy=ls.LargeScaleStrategy(ls.Plan(dp_shard=2)),
        accelerator="cpu",
        devices=2,
        max_steps=steps,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, families.batches("gpt", BATCH, steps, length=LENGTH))
    return median(times.seconds[2:])


def run(name: str, steps: int) -> float:
    """Seconds of a step, the median of those of rank 0 in a launch of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, "--loop", name, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if not lines:
        sys.exit(f"{name} did not finish:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("SECONDS "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--loop", choices=("hand", "plan"), help="one loop, for the processes that this script starts")
    options = parser.parse_args()
    if options.loop:
        torch.manual_seed(0)
        module = families.gpt(WIDTH, LAYERS)
        seconds = {"hand": by_hand, "plan": by_plan}[options.loop](module, options.steps)
        if dist.get_rank() == 0:
            print(f"SECONDS {seconds}", flush=True)
        return
    ratios = []
    for pair in range(options.pairs):
        seconds = {name: run(name, options.steps) for name in ("hand", "plan")[:: 1 - 2 * (pair % 2)]}
        ratios.append(seconds["plan"] / seconds["hand"])
        print(f"pair {pair}: {ratios[-1]:.3f}", {name: round(value, 3) for name, value in seconds.items()}, flush=True)
    text = (
        "# ZeRO-3 under the Trainer against a hand-written FSDP2 loop\n\n"
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH} a rank, 2 processes of 1 thread, gloo,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps, each loop in"
        " processes of its own, the first two steps left out.\n\n"
        "| figure | median | least | most |\n|---|--:|--:|--:|\n"
        f"| step time, plan / hand-written | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
