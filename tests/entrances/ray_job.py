"""A job of Ray Train with two workers on the CPU, as test_ray.py runs it: what each of them found, one line each."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer

PLANS = ({"dp_replicate": 2}, {"dp_shard": 2})


def work(folder: str) -> None:
    """Train under one plan after the other; a file of this worker's says what came of it."""
    from ray.train.lightning import RayLightningEnvironment

    sys.path.append(str(Path(__file__).parents[1]))
    from models import Language, trainer

    from lightning_largescale import LargeScaleStrategy, Plan

    found = []
    for fields in PLANS:
        options = {"plugins": [RayLightningEnvironment()], "devices": "auto", "max_steps": 3}
        run = trainer(LargeScaleStrategy(Plan(**fields)), **options)
        run.fit(model := Language(seed=get_context().get_world_rank()))
        found.append({"rank": run.global_rank, "world": run.world_size, "losses": model.losses})
    Path(folder, f"{get_context().get_world_rank()}.json").write_text(json.dumps(found))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        variables = {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
        # More than there are workers: what supervises them takes a place of its own.
        ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables})
        TorchTrainer(
            lambda config: work(config["folder"]),
            train_loop_config={"folder": folder},
            scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        for path in sorted(Path(folder).glob("*.json")):
            print("DONE", path.read_text(), flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
