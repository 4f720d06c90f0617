"""FSDP2 over the repeated blocks: shard parameters, gradients and optimizer state, and all-gather block by block.

Each block is an FSDP group, and so is each module in the plan's `wrapped_modules`. The module itself is the root group,
whose parameters stay unsharded from the start of a step to the end of its backward.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import release_free_memory
from lightning_largescale.parallel.average import average_in_place
from lightning_largescale.parallel.by_hand import average_assigned
from lightning_largescale.parallel.copies import enable_copies
from lightning_largescale.parallel.equal import equal_weights
from lightning_largescale.parallel.gather import start_gathering
from lightning_largescale.parallel.heap import map_from
from lightning_largescale.parallel.materialize import to_device
from lightning_largescale.parallel.mesh import data_mesh, tensor_mesh
from lightning_largescale.parallel.order import as_ordered
from lightning_largescale.parallel.parameter_access import Adopted
from lightning_largescale.parallel.restore import made_contiguous, restore_when_gathered
from lightning_largescale.parallel.rows import rows_of
from lightning_largescale.parallel.sharded import Sharded, forget_order, set_plan, sharded_state
from lightning_largescale.parallel.tensor import divide_over
from lightning_largescale.plan import Plan
from lightning_largescale.tiers import group_tiers, shard_bytes
from lightning_largescale.workload.batch import tensor_bytes
from lightning_largescale.workload.blocks import (
    Group,
    find_blocks,
    find_groups,
    has_forward,
    no_such_module,
    trained_dtypes,
)
from lightning_largescale.workload.kinds import is_plain
from lightning_largescale.workload.parts import Part

# Bytes of full copies to free before memory is returned to the system: each return walks the heap.
_RELEASE_BYTES = 256 * 2**20


def shard_module(
    module: nn.Module,
    plan: Plan,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    gather_type: torch.dtype | None = None,
    parts: Mapping[str, Mapping[str, Part]] = {},
    on_parts: Callable[[Callable[[], Any]], Any] | None = None,
    divided: Callable[[Sharded], None] | None = None,
    make: Callable[[], None] | None = None,
) -> None:
    """Shard `module` over the ranks of `mesh`; a collective.

    The module is the same on every rank except for its values; the shards are slices of rank 0's values. Block by
    block, the parameters move to `device`, are sharded, and their full copy is freed. Parameters become DTensors and
    keep their names and attributes. A parameter whose dimensions lie in memory in another order is gathered to that
    order. A parameter without dimensions or without elements cannot be sharded: it stays replicated, and its gradient
    is averaged over all ranks. Under manual optimization the same holds for the module's own direct parameters. An
    FSDP group has one dtype: the root's trainable parameters of each further dtype form a group that is gathered with
    the root. Tensors without values are sharded on the meta device and materialized afterwards. If `device` is the
    meta device, the module is only sharded: no step can run there.

    Under mixed precision blocks gather their matrices in `gather_type`, to which autocast casts them anyway. Vectors
    (norms, biases) and the root's parameters are gathered in float32, so the results equal those of autocast alone.

    Args:
        module: the module to shard, on any device.
        plan: a plan that gathers.
        mesh: the mesh from `build_mesh`.
        device: this rank's device.
        gather_type: the dtype to gather the blocks' matrices in; None for their storage dtype.
        parts: the tensor-parallel division of parameters, by block and by name in the block; those outside of blocks
            are under the block "".
        on_parts: runs a step where tensor parallelism shards parameters outside of blocks.
        divided: called with the sharding state, before meta tensors are materialized.
        make: materializes meta tensors after they are sharded.

    Raises:
        PlanError: `module` has no parameters, or embeddings with sparse gradients that are not row-sharded; or
            `wrapped_modules` names modules that do not exist, are never called, or overlap blocks or each other.
    """
    groups = _groups(module, plan)
    _warn_of_hooks(module)
    if device.type == "cpu" and plan.heap == "mapped":
        matrices = [tensor_bytes(parameter) for parameter in module.parameters() if parameter.dim() > 1]
        map_from(min(matrices, default=0))
    state = Sharded(plan=plan, mesh=mesh, on_parts=on_parts)
    # Row-sharded tables are already local to each rank.
    rows = {parameter for parameter in module.parameters() if rows_of(parameter) is not None}
    whole = {one for one in module.parameters() if not _is_sharded(one) or one.dim() == 0 or one.numel() == 0}
    if not getattr(module, "automatic_optimization", True):
        # They would be shards after the first backward of a step: no forward gathers the root's direct parameters.
        whole |= {*module.parameters(recurse=False)} - rows
    before = made_contiguous(module, whole | rows)
    root_too: set[nn.Parameter] = set()
    freed = 0
    rest = dict(parts.get("", {}))
    tiers = {} if device.type in ("cpu", "meta") else block_tiers(module, plan, groups, parts, gather_type)
    for name, group in groups.items():
        if name:
            wraps = name in plan.wrapped_modules
            # Tensor parallelism keeps the parts of wrapped modules under the block "".
            own = {path: rest.pop(path) for path in group.parameters if wraps and path in rest}
            freed += _shard_block(
                module,
                name,
                group,
                state,
                whole=whole,
                root_too=root_too,
                mesh=mesh,
                device=device,
                gather_type=None if wraps else gather_type,
                parts={path.removeprefix(f"{name}."): part for path, part in own.items()} or parts.get(name, {}),
                tier=tiers.get(name),
            )
        if freed >= _RELEASE_BYTES and device.type == "cpu":
            freed = 0
            release_free_memory()
    to_device(module, device)
    equal_weights(itertools.chain(module.parameters(), module.buffers()))
    if (among := tensor_mesh(mesh)) is not None:
        rest = {name: part for name, part in rest.items() if module.get_parameter(name) not in whole}
        divide_over(module, rest, among)
    beside = _other_dtypes(module, root_too | {module.get_parameter(name) for name in groups[""].parameters} - whole)
    for others in beside:
        root_too -= others
    ignored = (whole | rows).union(*beside)
    with _held_by(module, root_too):
        fully_shard(module, mesh=data_mesh(mesh), reshard_after_forward=False, ignored_params=ignored)
    state.groups[""] = cast(FSDPModule, module)
    for others in beside:
        state.beside.append(_shard_beside(module, others, data_mesh(mesh)))
    for name, block in state.groups.items():
        # Last, since moving sharded parameters replaces them by new ones.
        for path, parameter in cast(nn.Module, block).named_parameters():
            as_ordered(parameter, parts.get(name, {}).get(path))
    for name, one in before.items():
        one.tell(module.get_parameter(name))
    names = [name for name, parameter in module.named_parameters() if parameter in whole]
    if divided is not None:
        divided(state)
    if make is not None:
        make()
        for part in module.modules():
            # The states of metrics are not buffers.
            if isinstance(part, Metric):
                part.to(device)
    scalars = [module.get_parameter(name) for name in names]
    for index, scalar in enumerate(scalars):
        trained = scalar.requires_grad
        # It may be frozen for now, and torch registers hooks only on tensors that require gradients.
        average = partial(_average, state, index)
        handle = scalar.requires_grad_().register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
        state.hooks.append(handle)
        scalar.requires_grad_(trained)
    if device.type == "meta":
        return
    restore_when_gathered(state, before)
    start_gathering(module, state, scalars)
    for scalar in scalars:
        average_assigned(scalar, state.average)
        state.undo.callback(average_assigned, scalar, None)
    enable_copies(module)
    if device.type == "cpu":
        release_free_memory()


def adapt(module: nn.Module, plan: Plan, device: torch.device) -> bool:
    """Switch the sharded `module` to `plan` if both plans shard it the same way on `device`; return whether they do."""
    state = sharded_state(module)
    assert state is not None
    before = state.plan
    alike = ["dp_replicate", "dp_shard", "tp", "precision", "wrapped_modules", "row_sharded_embeddings"]
    if device.type != "cpu":
        # FSDP2's offload policies, which say which shards are in DRAM, are fixed.
        alike += ["offload_parameters", "resident_parameter_bytes", "cpu_parameter_bytes", "release_gradients"]
    if any(getattr(before, name) != getattr(plan, name) for name in alike):
        return False
    set_plan(state, plan)
    forget_order(state)
    return True


def _groups(module: nn.Module, plan: Plan) -> dict[str, Group]:
    """Return the FSDP groups by name.

    Raises:
        PlanError: as for `shard_module`.
    """
    if not any(True for _ in module.parameters()):
        raise PlanError(
            f"{type(module).__name__} has no parameters to divide; give it at least one, or use dp_replicate."
        )
    _check_wraps(module, plan.wrapped_modules)
    _check_sparse(module)
    return in_order(module, find_groups(module, plan.wrapped_modules))


def in_order(module: nn.Module, groups: Mapping[str, Group]) -> dict[str, Group]:
    """Sort `groups` by their place in `module`, the root last: plans count resident groups in this order."""
    places = {path: place for place, (path, _) in enumerate(module.named_parameters())}
    first = {name: min((places[path] for path in group.parameters), default=0) for name, group in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=lambda name: (not name, first[name]))}


def _check_wraps(module: nn.Module, names: Sequence[str]) -> None:
    paths = {name: found for name, found in module.named_modules() if name}
    blocks = set(find_blocks(module).values())
    for name in names:
        if name not in paths:
            raise no_such_module("wrapped_modules", name, module, paths)
        inside = [outer for outer, found in paths.items() if found in blocks or outer in names]
        within = next((outer for outer in inside if name == outer and paths[name] in blocks), None)
        within = within or next((outer for outer in inside if name.startswith(f"{outer}.")), None)
        if within is not None or not blocks.isdisjoint(paths[name].modules()):
            raise PlanError(
                f"wrapped_modules has {name!r}, which {f'lies in {within!r}' if within else 'has repeated blocks'};"
                " give modules outside of repeated blocks and of each other."
            )
        if not has_forward(paths[name]):
            raise PlanError(
                f"wrapped_modules has {name!r}, a {type(paths[name]).__name__}, which is not called itself; give the"
                " modules in it."
            )


def _warn_of_hooks(module: nn.Module) -> None:
    hooked = [name for name, parameter in module.named_parameters() if any(compat.gradient_hooks(parameter))]
    if hooked:
        rank_zero_warn(
            f"Parameter {hooked[0]!r} has a hook on its gradient, which the shards that take its place do not have;"
            " change gradients in on_before_optimizer_step, or replicate with dp_replicate."
        )


def _check_sparse(module: nn.Module) -> None:
    for name, part in module.named_modules():
        tables = isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
        if tables and part.weight.requires_grad and rows_of(part.weight) is None:
            raise PlanError(
                f"{name!r} is a {type(part).__name__} with sparse=True, and FSDP does not reduce sparse gradients;"
                " name it in row_sharded_embeddings, or make it without sparse=True."
            )


def _shard_block(
    module: nn.Module,
    name: str,
    group: Group,
    state: Sharded,
    *,
    whole: set[nn.Parameter],
    root_too: set[nn.Parameter],
    mesh: DeviceMesh,
    device: torch.device,
    gather_type: torch.dtype | None,
    parts: Mapping[str, Part],
    tier: str | None,
) -> int:
    """Shard one block, and return the bytes of its full copy.

    Parameters in `whole` are skipped, and so are those that this adds to `root_too`. If `tier` is not None, FSDP2
    offloads the shards to DRAM, from where they go to `tier`.
    """
    block = group.modules[0]
    to_device(block, device)
    equal_weights(itertools.chain(block.parameters(), block.buffers()))
    among = tensor_mesh(mesh)
    if among is not None:
        divide_over(block, parts, among)
    own = {parameter: module.get_parameter(parameter) for parameter in group.parameters}
    left = {module.get_parameter(parameter) for parameter in group.shared}
    if not {*trained_dtypes(own.values())} <= {torch.float32, torch.float16, torch.bfloat16}:
        # Autocast does not cast other dtypes.
        gather_type = None
    if gather_type is not None:
        left |= {parameter for parameter in own.values() if parameter.dim() < 2}
    left -= whole
    root_too |= left
    divided = {key: parameter for key, parameter in own.items() if parameter not in left | whole}
    if not divided:
        return 0
    fully_shard(
        block,
        mesh=data_mesh(mesh),
        reshard_after_forward=state.plan.reshard_after_forward,
        mp_policy=_policy(gather_type),
        offload_policy=_offload_policy(tier),
        ignored_params=left | whole,
    )
    state.groups[name] = cast(FSDPModule, block)
    state.owners |= dict.fromkeys(divided, state.groups[name])
    return sum(parameter.nbytes for parameter in divided.values())


def block_tiers(
    module: nn.Module,
    plan: Plan,
    groups: Mapping[str, Group],
    parts: Mapping[str, Mapping[str, Part]],
    gather_type: torch.dtype | None,
) -> Mapping[str, str]:
    """Return the tier of each group whose shards are offloaded, by name.

    Args:
        module: the module before it is sharded.
        plan: the plan that it will be sharded by.
        groups: the FSDP groups by name.
        parts: as for `shard_module`.
        gather_type: as for `shard_module`.
    """
    sizes: dict[str, int] = {}
    for name in filter(None, groups):
        wraps, sizes[name] = name in plan.wrapped_modules, 0
        least_dimensions = 1 if wraps or gather_type is None else 2
        for path in groups[name].parameters:
            parameter = module.get_parameter(path)
            if _is_sharded(parameter) and parameter.dim() >= least_dimensions:
                part = parts.get("", {}).get(path) if wraps else parts.get(name, {}).get(path.removeprefix(f"{name}."))
                dim = None if part is None else part.dim
                sizes[name] += shard_bytes(parameter.shape, parameter.nbytes, plan.dp_shard, plan.tp, dim)
    return group_tiers(plan, sizes)


def _is_sharded(parameter: Tensor) -> bool:
    """Return whether FSDP shards this kind of parameter; the user's ParallelStyles may have made it a DTensor."""
    return is_plain(parameter) or isinstance(parameter, DTensor)


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
