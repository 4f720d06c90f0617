"""GradientRelease: updates of a block's parameters in backward, after which its gradients are freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import needs_all_gradients
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique
from lightning_largescale.techniques.gradient_release.release import Release
from lightning_largescale.workload.blocks import find_groups


class GradientRelease(Technique):
    """A block's parameters are updated as soon as its gradients are complete, which are then freed."""

    _release: Release | None = None

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.release_gradients

    @override
    def check(self) -> None:
        run = self.run
        reason = needs_all_gradients(run.trainer, run.module)
        if reason is not None:
            raise PlanError(
                f"release_gradients=True drops gradients in backward, and {reason} needs them after it; leave one out."
            )
        run.check_dense()

    @override
    def ready(self) -> None:
        self.run.released = self._blocks_of_parameters()

    def _blocks_of_parameters(self) -> Mapping[Tensor, str]:
        module = self.run.module
        state = sharded_state(module)
        if state is None:
            groups = find_groups(module, self.run.plan.extra_fsdp_modules)
            return {
                module.get_parameter(parameter): name
                for name, group in groups.items()
                for parameter in group.parameters
                if name
            }
        return {
            parameter: name for name, group in state.groups.items() if name for parameter, _ in compat.shards_of(group)
        }

    @override
    def optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        (paged,) = self.run.paged
        self._release = Release(paged, self.run.released, _clips_values(self.run.trainer), self.run.copied)

    @override
    def after_backward(self) -> None:
        if self._release is not None:
            self._release.end_backward()

    @override
    def after_update(self) -> None:
        if self._release is not None:
            self._release.end_step()

    @override
    def abort_step(self) -> None:
        if self._release is not None:
            self._release.forget()

    @override
    def close(self) -> None:
        if self._release is not None:
            self._release.stop()
        self._release = None


def _clips_values(trainer: Trainer) -> Callable[[Sequence[Tensor]], None]:
    """Return a function that clips gradients by value to the Trainer's limit; without a limit, it does nothing."""
    limit = trainer.gradient_clip_val
    if not limit:
        return lambda parameters: None
    return lambda parameters: clip_grad_value_(parameters, limit)
