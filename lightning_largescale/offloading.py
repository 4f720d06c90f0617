"""OffloadingStrategy: offload of optimizer state, parameters and gradients to DRAM or NVMe."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.building import BuildingStrategy
from lightning_largescale.callbacks import needs_all_gradients
from lightning_largescale.checkpoint import StateMemory
from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.usage import release_free_memory
from lightning_largescale.offload.buffers import Allowance, PageBuffers
from lightning_largescale.offload.folder import nvme_folder
from lightning_largescale.offload.gradient_release import Release
from lightning_largescale.offload.gradients import SpilledGradients
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.offloaded_parameters import SpilledParameters, bring_back
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.places import HostPlaces, Places
from lightning_largescale.offload.shards import ShardCopies, ShardsInDram
from lightning_largescale.offload.store import Store
from lightning_largescale.parallel.sharded import Sharded, sharded_state
from lightning_largescale.plan import Plan
from lightning_largescale.tiers import group_tiers
from lightning_largescale.workload.blocks import find_groups


class OffloadingStrategy(BuildingStrategy, ABC):
    """Strategy that keeps optimizer state, parameters and gradients in the plan's tiers and fetches them for use."""

    _store: Store | None = None
    _buffers: PageBuffers | None = None
    _spilled: SpilledParameters | None = None
    _leaving: SpilledGradients | None = None
    _release: Release | None = None
    _paged: Sequence[PagedOptimizer] = ()
    # Parameters whose shards FSDP2 copies from DRAM to another device.
    _in_dram: Collection[Tensor] = frozenset()
    # With a CUDA device: blocks whose shards are in DRAM or on disk, and the copier of those in DRAM.
    _copied: Collection[nn.Module] = ()
    _shards_in_dram: ShardsInDram | None = None

    @abstractmethod
    def _hardware(self) -> Hardware:
        """Return the hardware that this rank detects."""

    def _open_tiers(self, trainer: Trainer, module: LightningModule, plan: Plan) -> None:
        """Open the store and the page buffers that the plan's offload needs.

        Raises:
            PlanError: there is no place on disk, the module has sparse gradients, or something needs gradients that
                the plan releases.
        """
        if plan.release_gradients:
            _check_release(trainer, module)
        if plan.offload_optimizer or plan.offload_parameters or plan.release_gradients:
            _check_dense(module)
        if plan.offload_parameters is not None:
            self.connect_alone()
        if "nvme" in (plan.offload_parameters, plan.offload_optimizer, plan.offload_activations):
            self.connect_alone()
            self._store = Store(nvme_folder(plan, self._hardware().disks if plan.nvme_path is None else ()))
            self._undo.callback(self._store.close)
        self._buffers = PageBuffers(pinned=self.root_device.type == "cuda")
        if plan.offload_parameters != "nvme":
            state = sharded_state(module)
            groups: dict[str, Any] = {} if state is None else state.groups
            bring_back(module, groups)

    def _spill(self, state: Sharded | None) -> None:
        """Choose the tier of each block's shards and reserve their space, if the plan offloads parameters.

        Raises:
            PlanError: the module has no blocks.
        """
        plan = self.plan
        if plan.offload_parameters is None or state is None:
            return
        blocks: dict[str, Any] = {name: group for name, group in state.groups.items() if name}
        if not blocks:
            name = type(self._module()).__name__.removeprefix("FSDP")
            raise PlanError(
                f"offload_parameters={plan.offload_parameters!r} needs repeated blocks, or wrapped_modules, and {name}"
                " has none; use None."
            )
        sizes = {name: sum(data.nbytes for _, data in compat.shards_of(group)) for name, group in blocks.items()}
        tiers = group_tiers(plan, sizes)
        copies = None
        if self.root_device.type != "cpu":
            in_dram = {name: blocks[name] for name, tier in tiers.items() if tier == "cpu"}
            self._in_dram = {shard for group in in_dram.values() for shard, _ in compat.shards_of(group)}
            self._copied = [blocks[name] for name in tiers]
            copies = ShardCopies(self.root_device)
            if plan.dp_shard == 1:
                # With several ranks, FSDP2 itself overlaps these copies with compute.
                self._shards_in_dram = ShardsInDram(in_dram.values(), copies)
        on_disk = {name: blocks[name] for name, tier in tiers.items() if tier == "nvme"}
        if self._store is not None and on_disk:
            self._spilled = SpilledParameters(on_disk, self._store, ahead=plan.prefetched_blocks, copies=copies)

    @override
    def _memory_of(self, parameter: Tensor) -> Tensor | None:
        found = None if self._spilled is None else self._spilled.memory_of(parameter)
        if found is not None or parameter not in self._in_dram:
            return found
        local = local_of(parameter.detach())
        return torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=True)

    def _take_over(self, *, fitting: bool) -> None:
        """Move the shards of blocks to disk, and fetch them from now on when they are unsharded."""
        state = sharded_state(self._module())
        if state is not None and self.plan.offload_parameters == "nvme":
            on_disk = () if self._spilled is None else self._spilled.blocks
            blocks: dict[str, Any] = {name: one for name, one in state.groups.items() if name not in on_disk}
            bring_back(nn.Module(), blocks)
        if self._spilled is None or self._store is None:
            return
        self._spilled.take_over()
        if state is not None:
            state.writes.elsewhere = self._spilled
        release_free_memory()
        if fitting and not self.plan.release_gradients:
            trainer = self._module().trainer
            members: dict[str, list[Tensor]] = {name: [] for name in self._spilled.blocks}
            for parameter, (block, _) in self._spilled.places.items():
                members[block.name].append(parameter)
            clips = bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", self._module())
            self._leaving = self._spilled.gradients = SpilledGradients(
                members, self._store, norms=clips, copied=self._copied
            )

    def _page(self, optimizers: Sequence[Optimizer]) -> None:
        """Make optimizers step page by page if their state, parameters or gradients are offloaded or released."""
        plan = self.plan
        if not self._pages or self._buffers is None:
            return
        labels = self._labels() if plan.release_gradients else {}
        # Without offload_optimizer, only the state of offloaded parameters is offloaded.
        stays = sys.maxsize if plan.offload_optimizer is None else plan.resident_optimizer_bytes or 0
        resident, dram = Allowance(stays), Allowance(plan.cpu_optimizer_bytes or 0)
        lanes = None if self.root_device.type == "cpu" else Lanes(self.root_device)
        places = self._spilled or Places()
        if plan.host_optimizer_step and lanes is not None:
            places = HostPlaces(lanes, places)
        self._paged = []
        for optimizer in optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)
            self._paged.append(
                PagedOptimizer(
                    inner,
                    store=self._store if plan.offload_optimizer == "nvme" else None,
                    buffers=self._buffers,
                    resident=resident,
                    dram=dram,
                    places=places,
                    lanes=lanes,
                    label_of=lambda parameter: labels.get(parameter, ""),
                )
            )
        if plan.release_gradients:
            (paged,) = self._paged
            self._release = Release(paged, labels, _clips_values(self._module().trainer), self._copied)

    @property
    @override
    def _keeps_elsewhere(self) -> bool:
        return self._store is not None

    @override
    def _state_memory(self, optimizer: Optimizer) -> StateMemory:
        paged = next((one for one in self._paged if one.optimizer is getattr(optimizer, "optimizer", optimizer)), None)
        if paged is None:
            return super()._state_memory(optimizer)
        # Hooks that ran since setup may have made it possible to probe the optimizer.
        paged.paged.lay_out(early=True)
        return paged.state_of

    @property
    def _pages(self) -> bool:
        """Return whether optimizers step page by page."""
        return bool(self.plan.offload_optimizer or self.plan.offload_parameters or self.plan.release_gradients)

    def _labels(self) -> Mapping[Tensor, str]:
        """Return the block name of each parameter that is in a block."""
        module = self._module()
        state = sharded_state(module)
        if state is None:
            groups = find_groups(module, self.plan.wrapped_modules)
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
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._leaving is not None:
            self._leaving.settle()
            # Before hooks that read or change gradients.
            compat.call_after_backward(closure_loss, self._leaving.end_backward)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._release is not None:
            self._release.end_backward()
        if self._leaving is not None:
            self._leaving.end_backward()
        if self._spilled is not None:
            self._spilled.settle()

    @contextlib.contextmanager
    @override
    def _numbers(self) -> Generator[None, None, None]:
        with super()._numbers(), self._gone_gradients():
            yield

    @contextlib.contextmanager
    @override
    def _reading(self, *, in_step: bool = False) -> Generator[None, None, None]:
        # A step with a manual backward reads gradients inside it.
        gradients = not in_step or not self._module().automatic_optimization
        with super()._reading(in_step=in_step), self._gone_gradients() if gradients else contextlib.nullcontext():
            yield

    def _gone_gradients(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which offloaded gradients are read and changed like those on the device."""
        return contextlib.nullcontext() if self._leaving is None else self._leaving.clipping()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        if self._release is not None:
            self._release.end_step()
        return result

    @override
    def _end_steps(self) -> None:
        super()._end_steps()
        if self._spilled is not None:
            # Callbacks' writes into prefetched shards would be dropped with those.
            self._spilled.settle()

    @override
    def _end_evaluation(self) -> None:
        super()._end_evaluation()
        if self._spilled is not None:
            self._spilled.settle()

    @override
    def forget_step(self) -> None:
        for one in (*self._paged, self._release, self._leaving):
            if isinstance(one, PagedOptimizer):
                one.forget_step()
            elif one is not None:
                one.forget()
        super().forget_step()

    def _close_tiers(self) -> None:
        """Detach the module and its optimizers from offloading; their memory stays where it is."""
        for paged in self._paged:
            paged.undo()
        if self._release is not None:
            self._release.stop()
        if self._leaving is not None:
            self._leaving.settle()
            self._leaving.stop()
        for one in (self._spilled, self._shards_in_dram):
            if one is not None:
                one.stop()
        module = self.lightning_module
        state = None if module is None else sharded_state(module)
        if state is not None:
            state.writes.elsewhere = None
        self._paged, self._release, self._leaving, self._spilled = (), None, None, None
        self._in_dram, self._copied, self._shards_in_dram = frozenset(), (), None
        self._store = self._buffers = None
        if state is not None and not self.plan.shards:
            self._make_plain()

    def _make_plain(self) -> None:
        """Replace a single process's DTensors by plain tensors in the module and its optimizers; their memory stays."""
        plain = self.make_whole()
        for optimizer in self.optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)
            for group in inner.param_groups:
                group["params"] = [plain.get(parameter, parameter) for parameter in group["params"]]
            for shard, parameter in plain.items():
                if isinstance(shard.grad, DTensor):
                    parameter.grad = shard.grad.to_local()
                if shard in inner.state:
                    inner.state[parameter] = apply_to_collection(inner.state.pop(shard), DTensor, DTensor.to_local)


def _check_release(trainer: Trainer, module: LightningModule) -> None:
    """Raise PlanError if something needs all gradients of a step at once."""
    found = needs_all_gradients(trainer, module)
    if found is not None:
        raise PlanError(
            f"release_gradients=True drops gradients in backward, and {found} needs them after it; leave one out."
        )


def _check_dense(module: nn.Module) -> None:
    """Raise PlanError if an embedding of the module has sparse gradients."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise PlanError(
                f"the {type(part).__name__} {name!r} has sparse=True, and what is offloaded or released takes no sparse"
                " gradients; make it without sparse=True, or leave out offload_optimizer, offload_parameters and"
                " release_gradients."
            )


def _clips_values(trainer: Trainer) -> Callable[[Sequence[Tensor]], None]:
    """Return a function that clips gradients by value to the Trainer's limit; without a limit, it does nothing."""
    limit = trainer.gradient_clip_val
    if not limit:
        return lambda parameters: None
    return lambda parameters: clip_grad_value_(parameters, limit)
