"""Trains a model within a budget, each rank in a memory cgroup of that size; what `test_budget.py` starts.

python budget_run.py DEVICES BUDGET_BYTES CGROUP_FOLDER      (a budget of 0: no limit, print every candidate's peak)
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path


def enter(folder: Path, limit_bytes: int) -> None:
    """Move this process, before it has grown, into a memory cgroup (v1) of its own with that limit."""
    group = folder / f"rank{os.environ.get('LOCAL_RANK', 0)}"
    group.mkdir(exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    devices, budget, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if budget:
        enter(folder, budget)
    from lightning.pytorch import Callback, Trainer, seed_everything

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import families
    from rates import give_rates

    import lightning_largescale as ls

    ls.Hardware.calibrate = give_rates

    # Ranks of tensor parallelism are to have the same data.
    seed_everything(0, verbose=False)

    class InMemory(ls.LargeScaleAutoStrategy):
        """Plans with what recomputes and divides alone: there is no disk."""

        def _hardware(self):
            return dataclasses.replace(super()._hardware(), disks=())

    class LooksAtGradients(Callback):
        """None may be released."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer): ...

    strategy = InMemory(memory_budget=budget or "1TiB")
    trainer = Trainer(
        strategy=strategy,
        callbacks=[LooksAtGradients()],
        accelerator="cpu",
        devices=devices,
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(families.gpt(512), families.batches("gpt", 4, 4 * devices))
    if trainer.is_global_zero:
        priced = [row for row in strategy.report.candidates if row.estimate is not None]
        rows = [(row.plan.describe(), row.estimate.peak_bytes["device"], row.estimate.step_seconds) for row in priced]
        print("DONE " + json.dumps({"plan": strategy.plan.describe(), "steps": trainer.global_step, "rows": rows}))


if __name__ == "__main__":
    main()
