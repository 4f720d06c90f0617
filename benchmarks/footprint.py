"""What does the package add to `import lightning`, and to a step of a model so small that it takes no time?

The import is timed in processes of their own that have imported lightning before. Steps: one process, one linear layer,
the plain plan; long fits under `strategy="auto"` and `strategy="largescale_auto"` take turns, and the figure is the
difference of their medians, in microseconds a step, by the wall clock and by the processor's time.

    python benchmarks/footprint.py --out benchmarks/results/footprint_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

IMPORT = """
import json, os, time
os.environ["LARGESCALE_AUTOLOAD"] = "0"
import lightning
wall, processor = time.perf_counter(), time.process_time()
import lightning_largescale
print(json.dumps([1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)]))
"""


class Span(Callback):
    """Seconds from the start of training to its end, by both clocks."""

    def on_train_start(self, *args: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_train_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def microseconds_a_step(strategy: str, steps: int) -> tuple[float, float]:
    span = Span()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[span],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel(), DataLoader(torch.ones(steps, 32)))
    wall, processor = span.seconds
    return 1e6 * wall / steps, 1e6 * processor / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = [json.loads(subprocess.check_output([sys.executable, "-c", IMPORT], text=True)) for _ in range(options.pairs)]
    names = ("auto", "largescale_auto")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for pair in range(options.pairs + 1):
        for name in names if pair % 2 else reversed(names):
            found = microseconds_a_step(name, options.steps)
            # The first pair warms up.
            taken[name] += [found] if pair else []
    lines = [
        f"torch {torch.__version__}, {options.pairs} pairs of {options.steps} steps; median (min to max)",
        "",
        "| | wall clock | processor |",
        "|---|--:|--:|",
        row("`import lightning_largescale` after `import lightning`, ms", run),
        *(row(f'a step under `strategy="{name}"`, microseconds', taken[name]) for name in names),
        row(
            "added to a step, microseconds",
            [(b[0] - a[0], b[1] - a[1]) for a, b in zip(taken[names[0]], taken[names[1]], strict=True)],
        ),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text(f"# {(__doc__ or '').split(chr(10))[0]}\n\n" + "\n".join(lines) + "\n")


def row(what: str, values: list[Any]) -> str:
    cells = [f"{median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in zip(*values, strict=True)]
    return f"| {what} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
