"""What does a ZeRO-3 plan under the Trainer cost against a hand-written FSDP2 loop?

Two processes. A loop in plain torch (fully_shard on each block and the root, AdamW) and a Trainer with
`LargeScaleStrategy(Plan(dp_shard=2))` take turns in one run, each with the same weights and batches; the figure is the
ratio of the median step times, pair by pair.

    torchrun --nproc-per-node 2 benchmarks/fsdp_loop.py --out benchmarks/results/fsdp-loop_2xcpu_DATE.md
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import families
import torch
from lightning.pytorch import LightningModule, Trainer
from overhead import StepTimes
from torch.distributed.fsdp import fully_shard

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 12, 4, 128


def by_hand(module: LightningModule, steps: int) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    module = families.gpt(WIDTH, LAYERS)
    by_plan(copy.deepcopy(module), 3)
    ratios = []
    for pair in range(options.pairs):
        runs = [("hand", by_hand), ("plan", by_plan)]
        seconds = {name: run(copy.deepcopy(module), options.steps) for name, run in runs[:: 1 - 2 * (pair % 2)]}
        ratios.append(seconds["plan"] / seconds["hand"])
        if torch.distributed.get_rank() == 0:
            print(
                f"pair {pair}: {ratios[-1]:.3f}", {name: round(value, 4) for name, value in seconds.items()}, flush=True
            )
    text = (
        "# ZeRO-3 under the Trainer against a hand-written FSDP2 loop\n\n"
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH} a rank, 2 processes of {torch.get_num_threads()}"
        f" thread, gloo, torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps,"
        " the first two left out.\n\n"
        "| figure | median | least | most |\n|---|--:|--:|--:|\n"
        f"| step time, plan / hand-written | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |\n"
    )
    if torch.distributed.get_rank() == 0:
        print(text)
        if options.out:
            options.out.write_text(text)


if __name__ == "__main__":
    main()
