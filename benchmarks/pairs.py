"""What benchmarks of speed share: two ways of one thing that take turns, and their ratio, pair by pair."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader


class StepTimes(Callback):
    """Seconds of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def fit(
    module: LightningModule, strategy: Any, batches: DataLoader[Any], *, devices: int = 1, callback: Any = None
) -> list[float]:
    """Seconds of each step of a Trainer that does nothing else."""
    times = StepTimes()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=len(batches),
        callbacks=[times, *([callback] if callback else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, batches)
    return times.seconds


def arguments(description: str | None, *, pairs: int = 6, steps: int = 8) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path)
    return parser


def take_turns(
    pairs: int, ways: dict[str, Callable[[], Any]], seconds: Callable[[Any], float] = float
) -> tuple[list[float], list[dict[str, Any]]]:
    """What each of the ways found in each turn, and by how much longer the second took than the first; every other turn
    begins with the last.
    """
    ratios, found = [], []
    first, second, *_ = ways
    for pair in range(pairs):
        found.append({name: ways[name]() for name in [*ways][:: 1 - 2 * (pair % 2)]})
        ratios.append(seconds(found[-1][second]) / seconds(found[-1][first]))
        print(f"pair {pair}: {ratios[-1]:.3f}", found[-1], flush=True)
    return ratios, found


def compare_apart(
    description: str | None, ways: dict[str, Callable[[int], list[Any]]], *, processes: int
) -> tuple[argparse.Namespace, list[float], list[dict[str, list[Any]]]]:
    """`take_turns`, each way in `processes` of its own, so that none trains where another has left its traces.

    A way is given the number of steps and returns the median seconds of one, and what else it found. The script that
    calls this is what the processes run, of which this returns in none.
    """
    parser = arguments(description)
    parser.add_argument("--way", choices=tuple(ways), help="one way, for the processes that this script starts")
    options = parser.parse_args()
    if options.way:
        torch.manual_seed(0)
        found = ways[options.way](options.steps)
        if processes == 1 or dist.get_rank() == 0:
            print(f"FOUND {json.dumps(found)}", flush=True)
        sys.exit()

    def apart(way: str) -> list[Any]:
        command, environment = [sys.executable], dict(os.environ)
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            environment["OMP_NUM_THREADS"] = "1"
        command += [sys.argv[0], "--way", way, "--steps", str(options.steps)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        if not lines:
            sys.exit(f"{way} did not finish:\n{done.stderr[-3000:]}")
        return json.loads(lines[0].removeprefix("FOUND "))

    turns = take_turns(options.pairs, {way: lambda way=way: apart(way) for way in ways}, lambda found: found[0])
    return (options, *turns)


def say(options: argparse.Namespace, title: str, setting: str, rows: Iterable[str], after: str = "") -> None:
    """Print a table of results, and write it where it was asked for."""
    table = "".join(rows)
    text = f"# {title}\n\n{setting}\n\n| figure | median | least | most |\n|---|--:|--:|--:|\n{table}"
    text += f"\n{after}\n" if after else ""
    print(text)
    if options.out:
        options.out.write_text(text)


def row(figure: str, values: list[float], digits: int = 3) -> str:
    """A line of the table."""
    shown = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"| {figure} | {' | '.join(shown)} |\n"
