"""How well is the peak memory of a plan predicted? Runs each (family, width, batch, plan) and compares.

Every case is a process of its own (two for two devices), which plans, is told which plan to take, trains a few steps
and reports the peak of its resident memory from setup to the last step.

    python benchmarks/memory.py --out benchmarks/results/memory_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import families
import torch
from lightning.pytorch import Trainer, seed_everything

import lightning_largescale as ls
from lightning_largescale.hardware.usage import peak_bytes
from lightning_largescale.planner.peak_memory import peak_memory

STEPS = 6
FULL = {"activation_checkpointing": "full"}
CHEAP = FULL | {"checkpointed_operations": "cheap"}
SOME = {
    "activation_checkpointing": "selective",
    "checkpointed_blocks": ["model.blocks.0", "model.blocks.1", "model.blocks.2", "model.blocks.3"],
}
PLAIN, REPLICATE = {}, {"dp_replicate": 2}
ZERO2, ZERO3 = {"dp_shard": 2, "reshard_after_forward": False}, {"dp_shard": 2}
TENSOR = {"tp": 2}
WRAPS = {"extra_fsdp_modules": ["model.token", "model.head"]}
CASES = [
    ("gpt", 256, 4, PLAIN),
    ("gpt", 512, 4, PLAIN),
    ("gpt", 512, 4, FULL),
    ("gpt", 384, 8, FULL),
    ("gpt", 512, 4, SOME),
    ("gpt", 512, 4, CHEAP),
    ("gpt", 768, 2, PLAIN),
    ("gpt", 768, 8, FULL),
    ("gpt", 512, 4, REPLICATE),
    ("gpt", 512, 4, REPLICATE | FULL),
    ("gpt", 512, 4, ZERO2),
    ("gpt", 512, 4, ZERO3),
    ("gpt", 768, 4, ZERO3),
    ("gpt", 768, 4, ZERO3 | WRAPS),
    ("gpt", 768, 4, ZERO3 | FULL | WRAPS),
    ("gpt", 768, 4, ZERO3 | FULL),
    ("gpt", 512, 4, TENSOR),
    ("gpt", 768, 8, TENSOR | FULL),
    ("gpt", 768, 8, TENSOR | CHEAP),
    ("gpt-tied", 512, 4, TENSOR),
    ("gpt-tied", 512, 4, PLAIN),
    ("gpt-tied", 512, 4, ZERO3),
    ("mlp", 2048, 64, PLAIN),
    ("mlp", 3072, 512, PLAIN),
    ("mlp", 2048, 512, FULL),
    ("mlp", 3072, 64, ZERO3),
    ("mlp", 3072, 64, ZERO2),
    ("mlp", 2048, 512, REPLICATE),
    ("conv", 128, 16, PLAIN),
    ("conv", 128, 32, FULL),
    ("conv", 128, 32, CHEAP),
    ("conv", 64, 16, FULL),
    ("conv", 256, 8, ZERO3),
    ("llama", 512, 4, PLAIN),
    ("llama", 512, 4, ZERO3),
    ("llama", 512, 4, TENSOR),
    ("llama", 512, 4, FULL),
    ("llama", 512, 4, CHEAP),
    ("bert", 512, 4, PLAIN),
    ("bert", 512, 4, FULL),
    ("bert", 512, 4, CHEAP),
    ("bert", 512, 8, ZERO2),
    ("vit", 512, 16, PLAIN),
    ("vit", 512, 16, FULL),
    ("vit", 512, 16, CHEAP),
    ("vit", 384, 64, FULL),
    ("vit", 512, 16, ZERO3 | FULL),
]


class Pinned(ls.LargeScaleAutoStrategy):
    """Plans as the auto strategy does, then takes the plan it is given."""

    def __init__(self, plan: ls.Plan) -> None:
        super().__init__(memory_budget="1TiB")
        self.pinned = plan

    def _decide(self, trainer: Trainer) -> ls.Plan:
        super()._decide(trainer)
        return self.pinned

    def on_train_end(self) -> None:
        self.measured = max(self._gathered(peak_bytes(self.root_device.type)))


def run_case(family: str, width: int, batch: int, fields: dict[str, object]) -> None:
    plan = ls.Plan(**fields)
    seed_everything(0, verbose=False)
    # The process as a training script has it: warm data, model built, nothing run yet.
    module = families.FAMILIES[family](width)
    strategy = Pinned(plan)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=plan.world_size,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, families.batches(family, batch, STEPS))
    if trainer.is_global_zero:
        report = strategy.report
        # As the report prices: a plan that recomputes some blocks is a candidate at certain budgets only.
        before = report.candidates[0].estimate.memory.terms["process before"]
        memory = peak_memory(report.workload, plan, report.hardware, baseline_bytes=before)
        found = {"predicted": memory.peak_bytes, "measured": strategy.measured}
        found |= {"moment": memory.moment, "terms": dict(memory.terms)}
        print("CASE " + json.dumps(found), flush=True)


def measure(case: tuple[str, int, int, dict[str, object]]) -> dict[str, object]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    threads = "1" if ls.Plan(**case[3]).world_size > 1 else "2"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("CASE ")]
    if not lines:
        sys.exit(f"{case} did not finish:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("CASE "))


def table(rows: list[tuple[tuple[str, int, int, dict[str, object]], dict[str, object]]]) -> str:
    lines = [
        "| family | width | batch | plan | predicted MiB | measured MiB | error | at |",
        "|---|--:|--:|---|--:|--:|--:|---|",
    ]
    errors = []
    for (family, width, batch, fields), found in rows:
        error = found["predicted"] / found["measured"] - 1
        errors.append(error)
        plan = ls.Plan(**fields).describe()
        sizes = f"{found['predicted'] / 2**20:.0f} | {found['measured'] / 2**20:.0f}"
        lines.append(f"| {family} | {width} | {batch} | {plan} | {sizes} | {100 * error:+.1f}% | {found['moment']} |")
    lines += [
        "",
        f"{len(errors)} cases; mean absolute error {100 * mean(map(abs, errors)):.1f}%,"
        f" from {100 * min(errors):+.1f}% to {100 * max(errors):+.1f}%.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="one case as JSON, for the processes that this script starts")
    parser.add_argument("--only", help="run the cases whose JSON contains this text")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--terms", action="store_true", help="print the terms of each prediction")
    options = parser.parse_args()
    if options.case:
        run_case(*json.loads(options.case))
        return
    rows = []
    for case in CASES:
        if options.only and options.only not in json.dumps(case):
            continue
        rows.append((case, measure(case)))
        print(table(rows[-1:]).splitlines()[2], flush=True)
        if options.terms:
            print("   ", {name: round(size / 2**20) for name, size in rows[-1][1]["terms"].items()}, flush=True)
    text = table(rows)
    print(text.splitlines()[-1])
    if options.out:
        head = f"torch {torch.__version__}, {STEPS} steps a case, AdamW, fp32, {torch.get_num_threads()} threads.\n\n"
        options.out.write_text(f"# Predicted against measured peak memory of a rank\n\n{head}{text}\n")


if __name__ == "__main__":
    main()
