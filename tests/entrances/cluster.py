"""A rank that a cluster started, as test_clusters.py simulates one: trains, and says what it found."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LSFEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_largescale import LargeScaleStrategy, Plan

sys.path.append(str(Path(__file__).parents[1]))
from models import Language, trainer

warnings.simplefilter("ignore")
PLUGINS = {
    "slurm": lambda: SLURMEnvironment(auto_requeue=False),
    "requeueing slurm": SLURMEnvironment,
    "lsf": LSFEnvironment,
    "torchelastic": TorchElasticEnvironment,
}


class StopsWhenRequeued(Callback):
    """Ends training, at the same step on all ranks, once `scontrol` has left its file."""

    def on_train_batch_end(self, trainer, module, *args):
        print("STEP", flush=True)
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(Path("requeued").exists(), all=False)


parser = argparse.ArgumentParser()
parser.add_argument("--plugin", choices=PLUGINS, help="the environment given to the Trainer; else it finds its own")
parser.add_argument("--strategy", default="fixed", help="a string for the Trainer, or 'fixed' for a sharded plan")
parser.add_argument("--devices", type=int, default=2)
parser.add_argument("--nodes", type=int, default=1)


def main() -> None:
    args = parser.parse_args()
    strategy = LargeScaleStrategy(Plan(dp_shard=2)) if args.strategy == "fixed" else args.strategy
    options = {"plugins": [PLUGINS[args.plugin]()]} if args.plugin else {}
    limits = {"max_steps": 3}
    if args.plugin == "requeueing slurm":
        limits = {"max_steps": -1, "max_epochs": -1, "callbacks": [StopsWhenRequeued()], "default_root_dir": "."}
    run = trainer(strategy, devices=args.devices, num_nodes=args.nodes, **limits, **options)
    run.fit(model := Language())
    talk = run.strategy
    found = {
        "environment": type(talk.cluster_environment).__name__,
        "rank": run.global_rank,
        "local": run.local_rank,
        "node": run.node_rank,
        "world": run.world_size,
        "plan": talk.plan.world_size,
        "losses": model.losses,
    }
    print(f"DONE {json.dumps(found)}\n", end="", flush=True)


if __name__ == "__main__":
    main()
