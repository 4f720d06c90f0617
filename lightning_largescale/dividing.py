"""DividingStrategy: choice of a module's tensor-parallel shards, and the samples that tensor-parallel ranks share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torchmetrics import Metric
from typing_extensions import override

from lightning_largescale.callbacks import shows_summary
from lightning_largescale.looking import LookingStrategy
from lightning_largescale.parallel.gather import sharded_state
from lightning_largescale.parallel.mesh import data_group
from lightning_largescale.parallel.tensor import compute_plainly
from lightning_largescale.parallel.user_styles import check_styles
from lightning_largescale.plan import Plan
from lightning_largescale.precision import asked_precision
from lightning_largescale.techniques.tensor_parallel.price import division_words
from lightning_largescale.workload.divisions import check_division, share_divided
from lightning_largescale.workload.workload import Divided

# Share of the matrices of blocks; if a plan shards this much, other tp sizes are not traced for comparison.
_ENOUGH = 0.9


class DividingStrategy(LookingStrategy, ABC):
    """Strategy that knows which ranks share samples under tensor parallelism, and which matrices they shard."""

    # The user's parallel styles.
    _styles: Mapping[str, ParallelStyle] | None = None
    # The tp size for which sampler arguments were last returned; 0 if they were not.
    _told_samples_among = 0

    def _user_styles(self) -> Mapping[str, ParallelStyle]:
        """Return the user's parallel styles by module names; empty if the shards are to be found by tracing."""
        module = self._module()
        own = getattr(module, "tensor_parallel_plan", None)
        styles = self._styles or (own() if callable(own) else None) or {}
        check_styles(module, styles)
        return styles

    def _divided(self, trainer: Trainer, plan: Plan) -> Mapping[str, Divided]:
        """Return the tensor-parallel shards of each block and of the rest of the module: a collective."""
        if plan.tp == 1 or self._user_styles():
            return {}
        found = self._known_divisions(trainer).get(plan.tp)
        if found is not None:
            return found
        precision = asked_precision(self.precision_plugin) or plan.precision
        workload = self._traced(trainer, (precision,), (plan.tp,))
        if trainer.state.fn == TrainerFn.FITTING and share_divided(workload, plan.tp) < _ENOUGH:
            others = tuple(size for size in range(2, 2 * plan.tp + 1) if size != plan.tp)
            check_division(workload, self._traced(trainer, (precision,), others), plan.tp)
        if shows_summary(trainer):
            rank_zero_info(f"lightning_largescale: tp={plan.tp}, {division_words(workload, plan.tp)}")
        return workload.divisions.get(plan.tp, {})

    @staticmethod
    def _compute_plainly(module: LightningModule) -> None:
        """Revert tensor-parallel compute after a failed setup; a sharded module keeps it."""
        if sharded_state(module) is None:
            compute_plainly(module)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Arguments of a DistributedSampler: the ranks of tensor parallelism compute the same samples."""
        every = super().distributed_sampler_kwargs
        self._told_samples_among = self.plan.tp
        return {name: number // self.plan.tp for name, number in every.items()}

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce `tensor` over all ranks; a sum counts samples that tensor-parallel ranks share once."""
        result = super().reduce(tensor, group, reduce_op)
        sums = reduce_op in (ReduceOp.SUM, "sum", "SUM")
        if self.plan.tp == 1 or group is not None or not sums or not isinstance(result, Tensor):
            return result
        return result / self.plan.tp if result.is_floating_point() else result // self.plan.tp

    def _count_samples_once(self, module: LightningModule, mesh: DeviceMesh) -> None:
        """Make the metrics of `module` reduce over the data-parallel ranks only."""
        group = data_group(mesh)
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                self._undo.callback(setattr, metric, "process_group", None)
                metric.process_group = group
