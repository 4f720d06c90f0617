"""PagedOptimizerStep: the optimizers' step page by page, on state, parameters or gradients in other tiers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale.checkpoint import StateMemory
from lightning_largescale.offload.buffers import Allowance
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.places import HostPlaces
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class PagedOptimizerStep(Technique):
    """Optimizers step page by page if their state, parameters or gradients are offloaded or released."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.in_pages

    @override
    def check(self) -> None:
        if self.run.plan.offload_optimizer:
            self.run.check_dense()
        if self.run.plan.offload_optimizer == "nvme":
            self.run.open_store()

    @override
    def optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        run, plan = self.run, self.run.plan
        # Without offload_optimizer, only the state of offloaded parameters is offloaded.
        stays = sys.maxsize if plan.offload_optimizer is None else plan.resident_optimizer_bytes or 0
        resident, dram = Allowance(stays), Allowance(plan.cpu_optimizer_bytes or 0)
        lanes = None if run.device.type == "cpu" else Lanes(run.device)
        places = run.places
        if plan.cpu_optimizer_step and lanes is not None:
            places = HostPlaces(lanes, places)
        for optimizer in optimizers:
            paged = PagedOptimizer(
                getattr(optimizer, "optimizer", optimizer),
                store=run.store if plan.offload_optimizer == "nvme" else None,
                buffers=run.buffers,
                resident=resident,
                dram=dram,
                places=places,
                lanes=lanes,
                label_of=lambda parameter: run.released.get(parameter, ""),
            )
            run.paged = (*run.paged, paged)

    @override
    def state_memory(self, optimizer: Optimizer) -> StateMemory | None:
        inner = getattr(optimizer, "optimizer", optimizer)
        paged = next((one for one in self.run.paged if one.optimizer is inner), None)
        if paged is None:
            return None
        # Hooks that ran since setup may have made it possible to probe the optimizer.
        paged.paged.lay_out(early=True)
        return paged.state_of

    @override
    def abort_step(self) -> None:
        for paged in self.run.paged:
            paged.forget_step()

    @override
    def close(self) -> None:
        """Detach the optimizers from paging; their state stays where it is."""
        for paged in self.run.paged:
            paged.undo()
        self.run.paged = ()
