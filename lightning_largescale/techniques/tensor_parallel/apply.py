"""TensorParallel: matrices of blocks sharded over ranks that compute the same samples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.data import DataLoader
from torchmetrics import Metric
from typing_extensions import override

from lightning_largescale.callbacks import shows_summary
from lightning_largescale.parallel.mesh import data_group, tensor_mesh
from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.parallel.tensor import compute_divided, compute_plainly
from lightning_largescale.precision import asked_precision
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique
from lightning_largescale.techniques.tensor_parallel.alike import check_equal_batch, equal_random_state
from lightning_largescale.techniques.tensor_parallel.price import division_words
from lightning_largescale.techniques.tensor_parallel.user_styles import apply_styles, check_styles
from lightning_largescale.workload.divisions import check_division, share_divided
from lightning_largescale.workload.workload import Divided

# Share of the matrices of blocks; if a plan shards this much, other tp sizes are not traced for comparison.
_ENOUGH = 0.9


class TensorParallel(Technique):
    """Matrices of blocks sharded over the ranks of one node, as tracing finds it or as the user's styles say."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._divisions: Mapping[str, Divided] = {}
        self._styles: Mapping[str, ParallelStyle] = {}
        # The ranks that compute the same samples; None before the module is sharded.
        self._mesh: DeviceMesh | None = None
        # Names of the steps whose first batch was compared over `_mesh`.
        self._compared: set[str] = set()

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.tp > 1

    @override
    def prepare(self) -> None:
        run = self.run
        if sharded_state(run.module) is None:
            self._styles = _styles_of(run.module, run.styles)
            if not self._styles:
                self._divisions = self._find_divisions()
                run.shards = {name: found.parts for name, found in self._divisions.items()}

    def _find_divisions(self) -> Mapping[str, Divided]:
        """Return the tensor-parallel shards of each block and of the rest of the module: a collective."""
        run, trainer, plan = self.run, self.run.trainer, self.run.plan
        found = run.tracer.known_divisions(trainer).get(plan.tp)
        if found is not None:
            return found
        precision = asked_precision(run.strategy.precision_plugin) or plan.precision
        workload = run.tracer.trace(trainer, (precision,), (plan.tp,))
        if run.fits and share_divided(workload, plan.tp) < _ENOUGH:
            others = tuple(size for size in range(2, 2 * plan.tp + 1) if size != plan.tp)
            check_division(workload, run.tracer.trace(trainer, (precision,), others), plan.tp)
        if shows_summary(trainer):
            rank_zero_info(f"lightning_largescale: tp={plan.tp}, {division_words(workload, plan.tp)}")
        return workload.divisions.get(plan.tp, {})

    @override
    def wrap(self) -> None:
        run, module = self.run, self.run.module
        if sharded_state(module) is not None:
            return
        assert run.mesh is not None
        mesh = tensor_mesh(run.mesh)
        assert mesh is not None
        run.on_shards = compute_divided(
            module,
            self._divisions,
            mesh,
            share_sequence=run.plan.sequence_parallel,
            wraps=run.plan.extra_fsdp_modules,
        )
        run.exits.callback(_compute_plainly, module)

    @override
    def shard(self) -> None:
        run = self.run
        if self._styles:
            assert run.mesh is not None
            mesh = tensor_mesh(run.mesh)
            assert mesh is not None
            apply_styles(run.module, self._styles, mesh, run.device)

    @override
    def ready(self) -> None:
        run = self.run
        assert run.mesh is not None
        self._mesh, self._compared = tensor_mesh(run.mesh), set()
        assert self._mesh is not None
        equal_random_state(self._mesh, run.device, run.strategy.global_rank // run.plan.tp)
        # Metrics count the samples that these ranks share once.
        group = data_group(run.mesh)
        for metric in run.module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                run.exits.callback(setattr, metric, "process_group", None)
                metric.process_group = group

    @override
    def close(self) -> None:
        self._mesh = None

    @override
    def dataloader(self, loader: Any) -> Any:
        # Ranks that compute the same samples draw the same numbers in their loaders' workers.
        seeded = self._mesh is not None and int(os.environ.get("PL_SEED_WORKERS", 0))
        if seeded and isinstance(loader, DataLoader) and loader.worker_init_fn is None:
            rank = self.run.strategy.global_rank // self.run.plan.tp
            loader.worker_init_fn = partial(pl_worker_init_function, rank=rank)
        return loader

    @override
    def check_step(self, stage: str, args: tuple[Any, ...]) -> None:
        if self._mesh is not None and stage not in self._compared:
            self._compared.add(stage)
            check_equal_batch(args, self._mesh)


def _styles_of(module: LightningModule, styles: Mapping[str, ParallelStyle] | None) -> Mapping[str, ParallelStyle]:
    """Return the user's parallel styles by module names; empty if the shards are to be found by tracing."""
    own = getattr(module, "tensor_parallel_plan", None)
    styles = styles or (own() if callable(own) else None) or {}
    check_styles(module, styles)
    return styles


def _compute_plainly(module: LightningModule) -> None:
    """Revert tensor-parallel compute after a failed setup; a sharded module keeps it."""
    if sharded_state(module) is None:
        compute_plainly(module)
