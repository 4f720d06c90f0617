"""ParameterOffload: parameters and gradients of blocks, in DRAM or on disk while the blocks do not compute."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import release_free_memory
from lightning_largescale.offload.gradients import SpilledGradients
from lightning_largescale.offload.offloaded_parameters import SpilledParameters, bring_back
from lightning_largescale.offload.shards import ShardCopies, ShardsInDram
from lightning_largescale.parallel.sharded import Sharded, sharded_state
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique
from lightning_largescale.tiers import group_tiers


class ParameterOffload(Technique):
    """Shards of blocks, fetched from their tier when the blocks are gathered."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._spilled: SpilledParameters | None = None
        self._leaving: SpilledGradients | None = None
        # Parameters whose shards FSDP2 copies from DRAM to another device, and the copier of these.
        self._in_dram: set[Tensor] = set()
        self._shards_in_dram: ShardsInDram | None = None

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.offload_parameters is not None

    @override
    def check(self) -> None:
        self.run.check_dense()
        self.run.processes.connect_alone()
        if self.run.plan.offload_parameters == "nvme":
            self.run.open_store()

    @override
    def shard(self) -> None:
        """Choose the tier of each block's shards and reserve their space.

        Raises:
            PlanError: the module has no blocks.
        """
        run, plan, groups = self.run, self.run.plan, self._blocks()
        if not groups:
            name = type(run.module).__name__.removeprefix("FSDP")
            raise PlanError(
                f"offload_parameters={plan.offload_parameters!r} needs repeated blocks, or extra_fsdp_modules, and"
                f" {name} has none; use None."
            )
        sizes = {name: sum(data.nbytes for _, data in compat.shards_of(group)) for name, group in groups.items()}
        tiers = group_tiers(plan, sizes)
        copies = None
        if run.device.type != "cpu":
            in_dram = {name: groups[name] for name, tier in tiers.items() if tier == "cpu"}
            self._in_dram = {shard for group in in_dram.values() for shard, _ in compat.shards_of(group)}
            run.copied = [groups[name] for name in tiers]
            copies = ShardCopies(run.device)
            if plan.dp_shard == 1:
                # With several ranks, FSDP2 itself overlaps these copies with compute.
                self._shards_in_dram = ShardsInDram(in_dram.values(), copies)
        on_disk = {name: groups[name] for name, tier in tiers.items() if tier == "nvme"}
        if run.store is not None and on_disk:
            self._spilled = SpilledParameters(on_disk, run.store, ahead=plan.prefetched_blocks, copies=copies)
            run.places = self._spilled

    def _blocks(self) -> dict[str, Any]:
        """Return the FSDP groups of blocks and wrapped modules by name."""
        state = self.run.sharding
        return {} if state is None else {name: group for name, group in state.groups.items() if name}

    @override
    def storage(self, parameter: Tensor) -> Tensor | None:
        memory = None if self._spilled is None else self._spilled.memory_of(parameter)
        if memory is not None or parameter not in self._in_dram:
            return memory
        local = local_of(parameter.detach())
        return torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=True)

    @override
    def ready(self) -> None:
        """Move the shards of blocks to disk, and fetch them from now on when they are unsharded."""
        run, state = self.run, sharded_state(self.run.module)
        assert state is not None
        if run.plan.offload_parameters == "nvme":
            on_disk = () if self._spilled is None else self._spilled.blocks
            bring_back(nn.Module(), {name: one for name, one in _groups(state).items() if name not in on_disk})
        if self._spilled is None or run.store is None:
            return
        self._spilled.take_over()
        state.writes.elsewhere = self._spilled
        release_free_memory()
        if run.fits and not run.plan.release_gradients:
            members: dict[str, list[Tensor]] = {name: [] for name in self._spilled.blocks}
            for parameter, (block, _) in self._spilled.places.items():
                members[block.name].append(parameter)
            clips = bool(run.trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", run.module)
            self._leaving = self._spilled.gradients = SpilledGradients(
                members, run.store, norms=clips, copied=run.copied
            )

    @override
    def user_code(self, *, in_step: bool) -> contextlib.AbstractContextManager[Any]:
        # A step with a manual backward reads gradients inside it.
        reads = not in_step or not self.run.module.automatic_optimization
        return self.clip() if reads else contextlib.nullcontext()

    @override
    def clip(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which offloaded gradients are read and changed like those on the device."""
        return contextlib.nullcontext() if self._leaving is None else self._leaving.clipping()

    @override
    def before_backward(self, loss: Tensor) -> None:
        if self._leaving is not None:
            self._leaving.settle()
            # Before hooks that read or change gradients.
            compat.call_after_backward(loss, self._leaving.end_backward)

    @override
    def after_backward(self) -> None:
        if self._leaving is not None:
            self._leaving.end_backward()
        self._settle()

    @override
    def end_steps(self) -> None:
        # Callbacks' writes into prefetched shards would be dropped with those.
        self._settle()

    @override
    def end_evaluation(self) -> None:
        self._settle()

    def _settle(self) -> None:
        if self._spilled is not None:
            self._spilled.settle()

    @override
    def abort_step(self) -> None:
        if self._leaving is not None:
            self._leaving.forget()

    @override
    def close(self) -> None:
        """Detach the module from offloading; its memory stays where it is."""
        if self._leaving is not None:
            self._leaving.settle()
            self._leaving.stop()
        for one in (self._spilled, self._shards_in_dram):
            if one is not None:
                one.stop()
        state = sharded_state(self.run.module)
        if state is not None:
            state.writes.elsewhere = None
            if not self.run.plan.shards:
                self._make_plain()

    def _make_plain(self) -> None:
        """Replace a single process's DTensors by plain tensors in the module and its optimizers; their memory stays."""
        plain = self.run.unshard()
        for optimizer in self.run.strategy.optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)
            for group in inner.param_groups:
                group["params"] = [plain.get(parameter, parameter) for parameter in group["params"]]
            for shard, parameter in plain.items():
                if isinstance(shard.grad, DTensor):
                    parameter.grad = shard.grad.to_local()
                if shard in inner.state:
                    inner.state[parameter] = apply_to_collection(inner.state.pop(shard), DTensor, DTensor.to_local)


def _groups(state: Sharded) -> dict[str, Any]:
    return {**state.groups}
