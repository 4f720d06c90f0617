"""FSDP2 over the repeated blocks: shard parameters, gradients and optimizer state, and all-gather block by block.

Each block is an FSDP group, and so is each module in the plan's `extra_fsdp_modules`. The module itself is the root
group, whose parameters stay unsharded from the start of a step to the end of its backward.

The caller runs the phases in order: `shard_groups`, which takes parameters on the meta device too; then it materializes
these; then `finish_sharding`.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchmetrics import Metric

from lightning_largescale.hardware.usage import release_free_memory
from lightning_largescale.parallel.average import average_in_place
from lightning_largescale.parallel.by_hand import average_assigned
from lightning_largescale.parallel.copies import enable_copies
from lightning_largescale.parallel.equal import equal_weights
from lightning_largescale.parallel.fsdp_groups import block_tiers, checked_groups, is_shardable
from lightning_largescale.parallel.gather import renew_groups, start_gathering
from lightning_largescale.parallel.materialize import to_device
from lightning_largescale.parallel.mesh import data_mesh, tensor_mesh
from lightning_largescale.parallel.order import as_ordered
from lightning_largescale.parallel.parameter_access import Adopted
from lightning_largescale.parallel.restore import made_contiguous, restore_when_gathered
from lightning_largescale.parallel.rows import rows_of
from lightning_largescale.parallel.sharded import Sharded, forget_order, set_plan, sharded_state
from lightning_largescale.parallel.tensor import divide_over
from lightning_largescale.plan import Plan
from lightning_largescale.workload.blocks import Group, trained_dtypes
from lightning_largescale.workload.parts import Part

# Bytes of full copies to free before memory is returned to the system: each return walks the heap.
_RELEASE_BYTES = 256 * 2**20


def shard_groups(
    module: nn.Module,
    plan: Plan,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    gather_type: torch.dtype | None = None,
    parts: Mapping[str, Mapping[str, Part]] = {},
    on_parts: Callable[[Callable[[], Any]], Any] | None = None,
) -> Sharded:
    """Shard the parameters of `module` over the ranks of `mesh`, group by group; a collective.

    The module is the same on every rank except for its values; the shards are slices of rank 0's values. Block by
    block, the parameters move to `device`, are sharded, and their full copy is freed. Parameters become DTensors and
    keep their names and attributes. A parameter whose dimensions lie in memory in another order is gathered to that
    order. A parameter without dimensions or without elements cannot be sharded: it stays replicated, and its gradient
    is averaged over all ranks. Under manual optimization the same holds for the module's own direct parameters. An
    FSDP group has one dtype: the root's trainable parameters of each further dtype form a group that is gathered with
    the root. Parameters on the meta device become shards on the meta device, for the caller to materialize.

    Under mixed precision blocks gather their matrices in `gather_type`, to which autocast casts them anyway. Vectors
    (norms, biases) and the root's parameters are gathered in float32, so the results equal those of autocast alone.

    Args:
        module: the module to shard, on any device.
        plan: a plan that gathers.
        mesh: the mesh from `build_mesh`.
        device: this rank's device; the meta device for a module that runs no steps.
        gather_type: the dtype to gather the blocks' matrices in; None for their storage dtype.
        parts: the tensor-parallel division of parameters, by block and by name in the block; those outside of blocks
            are under the block "".
        on_parts: runs a step where tensor parallelism shards parameters outside of blocks.

    Raises:
        PlanError: as for `checked_groups`.
    """
    groups = checked_groups(module, plan)
    state = Sharded(plan=plan, mesh=mesh, on_parts=on_parts)
    # Row-sharded tables are already local to each rank.
    rows = {parameter for parameter in module.parameters() if rows_of(parameter) is not None}
    replicated = _replicated(module, rows)
    state.layouts = made_contiguous(module, replicated | rows)
    tiers = {} if device.type in ("cpu", "meta") else block_tiers(module, plan, groups, parts, gather_type)
    sharding = _Sharding(module, state, device, gather_type, replicated, parts)
    sharding.shard_blocks(groups, tiers)
    sharding.shard_root(groups[""], rows)
    for name, block in state.groups.items():
        # Last, since moving sharded parameters replaces them by new ones.
        for path, parameter in cast(nn.Module, block).named_parameters():
            as_ordered(parameter, parts.get(name, {}).get(path))
    for name, layout in state.layouts.items():
        layout.tell(module.get_parameter(name))
    state.replicated = [name for name, parameter in module.named_parameters() if parameter in replicated]
    return state


def finish_sharding(module: nn.Module, state: Sharded, device: torch.device) -> None:
    """Make steps of `module`, whose shards have values by now, use the shards; a collective.

    Args:
        module: the module.
        state: the result of `shard_groups`.
        device: this rank's device.
    """
    for part in module.modules():
        # The states of metrics are not buffers.
        if isinstance(part, Metric):
            part.to(device)
    replicated = [module.get_parameter(name) for name in state.replicated]
    for index, parameter in enumerate(replicated):
        trained = parameter.requires_grad
        # It may be frozen for now, and torch registers hooks only on tensors that require gradients.
        average = partial(_average, state, index)
        handle = parameter.requires_grad_().register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
        state.hooks.append(handle)
        parameter.requires_grad_(trained)
    restore_when_gathered(state)
    start_gathering(module, state, replicated)
    for parameter in replicated:
        average_assigned(parameter, state.average)
        state.undo.callback(average_assigned, parameter, None)
    enable_copies(module)
    if device.type == "cpu":
        release_free_memory()


def adapt(module: nn.Module, plan: Plan, device: torch.device) -> bool:
    """Switch a sharded module to another plan if both plans shard it the same way; return whether they do.

    Args:
        module: the sharded module.
        plan: the other plan.
        device: this rank's device.
    """
    state = sharded_state(module)
    assert state is not None
    before = state.plan
    alike = ["dp_replicate", "dp_shard", "tp", "precision", "extra_fsdp_modules", "row_sharded_embeddings"]
    if device.type != "cpu":
        # FSDP2's offload policies, which say which shards are in DRAM, are fixed.
        alike += ["offload_parameters", "resident_parameter_bytes", "cpu_parameter_bytes", "release_gradients"]
    if any(getattr(before, name) != getattr(plan, name) for name in alike):
        return False
    set_plan(state, plan)
    forget_order(state)
    renew_groups(state)
    return True


def _replicated(module: nn.Module, rows: set[nn.Parameter]) -> set[nn.Parameter]:
    """Return the parameters that FSDP ignores, without the tables in `rows`."""
    found = {one for one in module.parameters() if not is_shardable(one) or one.dim() == 0 or one.numel() == 0}
    if not getattr(module, "automatic_optimization", True):
        # They would be shards after the first backward of a step: no forward gathers the root's direct parameters.
        found |= {*module.parameters(recurse=False)} - rows
    return found


class _Sharding:
    """`fully_shard` of the groups of a module, one after the other.

    Args:
        module: the module.
        state: its sharding, to which the groups are added.
        device: this rank's device.
        gather_type: as for `shard_groups`.
        replicated: the parameters that FSDP ignores.
        parts: as for `shard_groups`.
    """

    def __init__(
        self,
        module: nn.Module,
        state: Sharded,
        device: torch.device,
        gather_type: torch.dtype | None,
        replicated: set[nn.Parameter],
        parts: Mapping[str, Mapping[str, Part]],
    ) -> None:
        self._module, self._state, self._device = module, state, device
        self._gather_type, self._replicated, self._parts = gather_type, replicated, parts
        self._tensor_mesh, self._data_mesh = tensor_mesh(state.mesh), data_mesh(state.mesh)
        # Parameters of blocks that the root's group takes.
        self._of_root: set[nn.Parameter] = set()
        # Tensor-parallel parts of parameters of the root's group.
        self._root_parts = dict(parts.get("", {}))

    def shard_blocks(self, groups: Mapping[str, Group], tiers: Mapping[str, str]) -> None:
        """Shard all groups but the root's, each to its tier, and free their full copies."""
        freed = 0
        for name, group in groups.items():
            if name:
                freed += self._shard_block(name, group, tiers.get(name))
            if freed >= _RELEASE_BYTES and self._device.type == "cpu":
                freed = 0
                release_free_memory()

    def _shard_block(self, name: str, group: Group, tier: str | None) -> int:
        """Shard one block, and return the bytes of its full copy.

        If `tier` is not None, FSDP2 offloads the shards to DRAM, from where they go to `tier`.
        """
        module, block, replicated = self._module, group.modules[0], self._replicated
        wraps = name in self._state.plan.extra_fsdp_modules
        self._place(block)
        if self._tensor_mesh is not None:
            divide_over(block, self._take_parts(name, group, wraps=wraps), self._tensor_mesh)
        own = {path: module.get_parameter(path) for path in group.parameters}
        left = {module.get_parameter(path) for path in group.shared}
        gather_type = None if wraps else self._gather_type
        if not {*trained_dtypes(own.values())} <= {torch.float32, torch.float16, torch.bfloat16}:
            # Autocast does not cast other dtypes.
            gather_type = None
        if gather_type is not None:
            left |= {parameter for parameter in own.values() if parameter.dim() < 2}
        left -= replicated
        self._of_root |= left
        sharded = {path: parameter for path, parameter in own.items() if parameter not in left | replicated}
        if not sharded:
            return 0
        fully_shard(
            block,
            mesh=self._data_mesh,
            reshard_after_forward=self._state.plan.reshard_after_forward,
            mp_policy=_policy(gather_type),
            offload_policy=_offload_policy(tier),
            ignored_params=left | replicated,
        )
        self._state.groups[name] = cast(FSDPModule, block)
        self._state.owners |= dict.fromkeys(sharded, self._state.groups[name])
        return sum(parameter.nbytes for parameter in sharded.values())

    def _take_parts(self, name: str, group: Group, *, wraps: bool) -> Mapping[str, Part]:
        """Return the tensor-parallel parts of a block; those of wrapped modules are kept under the block ""."""
        if wraps:
            own = {path: self._root_parts.pop(path) for path in group.parameters if path in self._root_parts}
            if own:
                return {path.removeprefix(f"{name}."): part for path, part in own.items()}
        return self._parts.get(name, {})

    def _place(self, module: nn.Module) -> None:
        to_device(module, self._device)
        equal_weights(itertools.chain(module.parameters(), module.buffers()))

    def shard_root(self, group: Group, rows: set[nn.Parameter]) -> None:
        """Shard the root's group and those beside it; tables in `rows` stay as they are."""
        module, state, replicated = self._module, self._state, self._replicated
        self._place(module)
        if self._tensor_mesh is not None:
            parts = self._root_parts.items()
            shardable = {name: part for name, part in parts if module.get_parameter(name) not in replicated}
            divide_over(module, shardable, self._tensor_mesh)
        # No set of full parameters may outlive `_held_by`: it would keep their memory.
        beside = _other_dtypes(module, self._of_root | {*map(module.get_parameter, group.parameters)} - replicated)
        for others in beside:
            self._of_root -= others
        ignored = (replicated | rows).union(*beside)
        with _held_by(module, self._of_root):
            fully_shard(module, mesh=self._data_mesh, reshard_after_forward=False, ignored_params=ignored)
        state.groups[""] = cast(FSDPModule, module)
        state.beside += [_shard_beside(module, others, self._data_mesh) for others in beside]


def _offload_policy(tier: str | None) -> OffloadPolicy:
    if tier is None:
        return OffloadPolicy()
    # Memory that a file backs cannot be pinned.
    return CPUOffloadPolicy(pin_memory=tier == "cpu")


def _policy(gather_type: torch.dtype | None) -> MixedPrecisionPolicy:
    if gather_type is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=gather_type, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _other_dtypes(module: nn.Module, parameters: set[nn.Parameter]) -> list[set[nn.Parameter]]:
    """Return the trainable `parameters` that are not of the main dtype (by bytes), one set per dtype.

    All ranks return the sets in the same order.
    """
    ordered = [parameter for parameter in module.parameters() if parameter in parameters]
    others = trained_dtypes(ordered)[1:]
    return [{one for one in ordered if one.dtype == dtype and one.requires_grad} for dtype in others]


def _shard_beside(module: nn.Module, parameters: set[nn.Parameter], mesh: DeviceMesh) -> FSDPModule:
    """Shard `parameters` of the root `module` as a group beside it, since FSDP allows one group per module."""
    owner = nn.Module()
    # FSDP looks up the places of the parameters through this attribute.
    owner.module = module
    with _held_by(owner, set(parameters)):
        fully_shard(owner, mesh=mesh, reshard_after_forward=False)
    del owner.module
    return cast(FSDPModule, owner)


@contextmanager
def _held_by(module: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Context in which `module` owns `parameters`: `fully_shard` does not look for them inside other groups."""
    holder = Adopted()
    # In the module's order, which is the same on all ranks.
    for index, parameter in enumerate(module.parameters()):
        if parameter in parameters:
            holder.register_parameter(str(index), parameter)
    parameters.clear()
    name = "_largescale_adopted"
    module.add_module(name, holder)
    try:
        yield
    finally:
        delattr(module, name)


def _average(state: Sharded, index: int, parameter: Tensor) -> None:
    """Average the gradient of the `index`-th parameter that FSDP ignores, when the other gradients are reduced."""
    if parameter.grad is None or not parameter.numel():
        return
    if state.agreement is not None:
        state.agreement.trained.add(index)
    elif state.synchronize:
        average_in_place(parameter.grad)
