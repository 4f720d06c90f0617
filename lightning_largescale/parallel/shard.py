"""FSDP2 over the repeated blocks: parameters, gradients and optimizer state divided, gathered block by block.

One group a block, one each of the modules that a plan wraps, and the module itself as the root, which keeps its
parameters gathered from the start of a step to the end of its backward.

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
from lightning_largescale.parallel.gather import Sharded, forget_order, set_plan, sharded_state, start_gathering
from lightning_largescale.parallel.heap import map_from
from lightning_largescale.parallel.materialize import to_device
from lightning_largescale.parallel.mesh import data_mesh, tensor_mesh
from lightning_largescale.parallel.order import as_ordered
from lightning_largescale.parallel.parameter_access import Adopted
from lightning_largescale.parallel.restore import made_contiguous, restore_when_gathered
from lightning_largescale.parallel.rows import rows_of
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

# Bytes of full copies freed between two returns of memory to the system: a return walks the heap.
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
    """Divide `module`, the same on every rank but for its values, among the ranks of `mesh`: a collective.

    Ranks get slices of rank 0's values. Block by block the parameters move to `device`, are divided, and their full
    copy is freed. Names stay as they are, and so do attributes of parameters, which become DTensors; those that lie in
    memory in another order of dimensions than their own are gathered to that order. A parameter without dimensions, or
    without elements, cannot be divided: it stays whole, its gradient averaged over all ranks. So do, under manual
    optimisation, the parameters that the module itself holds. Groups are of one dtype each: of the root's trainable
    parameters those of each further dtype are a group that is gathered with it. What has no values yet is divided on
    the meta device, and made then. With that device the module is divided, and no more: no step can run there.

    Under mixed precision blocks gather their matrices in `gather_type`, what autocast makes of them anyway; vectors
    (norms, biases) and the root's parameters are gathered in float32, so that numbers are those of autocast alone.

    Args:
        module: on any device.
        plan: one that gathers.
        mesh: as `build_mesh` makes it.
        device: of this rank.
        gather_type: of the matrices of blocks; None for that they are stored in.
        parts: by block, and name in it, what tensor parallelism divides; the rest is of the block "".
        on_parts: runs a step where it divides some of the rest.
        divided: is told of what was divided, before it has values where it had none.
        make: gives values to what has none, once it is divided.

    Raises:
        PlanError: no parameters, embeddings with sparse gradients whose rows are not divided already, or
            `wrapped_modules` that are no modules of `module`, are never called, or overlap blocks or each other.
    """
    groups = _groups(module, plan)
    _warn_of_hooks(module)
    if device.type == "cpu" and plan.heap == "mapped":
        matrices = [tensor_bytes(parameter) for parameter in module.parameters() if parameter.dim() > 1]
        map_from(min(matrices, default=0))
    state = Sharded(plan=plan, mesh=mesh, on_parts=on_parts)
    # Rows of tables are each rank's own already.
    rows = {parameter for parameter in module.parameters() if rows_of(parameter) is not None}
    whole = {one for one in module.parameters() if not _is_sharded(one) or one.dim() == 0 or one.numel() == 0}
    if not getattr(module, "automatic_optimization", True):
        # After the first backward of a step they would be shards: no forward gathers what the module itself holds.
        whole |= {*module.parameters(recurse=False)} - rows
    before = made_contiguous(module, whole | rows)
    root_too: set[nn.Parameter] = set()
    freed = 0
    rest = dict(parts.get("", {}))
    tiers = {} if device.type in ("cpu", "meta") else block_tiers(module, plan, groups, parts, gather_type)
    for name, group in groups.items():
        if name:
            wraps = name in plan.wrapped_modules
            # Tensor parallelism knows blocks and the rest.
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
        # Last, since moving what is sharded makes other parameters of it.
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
            # Their states are no buffers.
            if isinstance(part, Metric):
                part.to(device)
    scalars = [module.get_parameter(name) for name in names]
    for index, scalar in enumerate(scalars):
        trained = scalar.requires_grad
        # It may be frozen for now, and torch takes hooks of what is trained.
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
    """Let `module`, sharded by an earlier plan, go on under `plan`, if that divides it in the same way on `device`."""
    state = sharded_state(module)
    assert state is not None
    before = state.plan
    alike = ["dp_replicate", "dp_shard", "tp", "precision", "wrapped_modules", "row_sharded_embeddings"]
    if device.type != "cpu":
        # FSDP2 has been told which shards are in DRAM.
        alike += ["offload_parameters", "resident_parameter_bytes", "cpu_parameter_bytes", "release_gradients"]
    if any(getattr(before, name) != getattr(plan, name) for name in alike):
        return False
    set_plan(state, plan)
    forget_order(state)
    return True


def _groups(module: nn.Module, plan: Plan) -> dict[str, Group]:
    """What is gathered together, by name.

    Raises:
        PlanError: as `shard_module`.
    """
    if not any(True for _ in module.parameters()):
        raise PlanError(
            f"{type(module).__name__} has no parameters to divide; give it at least one, or use dp_replicate."
        )
    _check_wraps(module, plan.wrapped_modules)
    _check_sparse(module)
    return in_order(module, find_groups(module, plan.wrapped_modules))


def in_order(module: nn.Module, groups: Mapping[str, Group]) -> dict[str, Group]:
    """`groups` as they stand in `module`, which is how plans count those that stay on a device; the root last."""
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
    """Divide one block, but for parameters in `whole` and what is added to `root_too`; the bytes of its full copy.

    Its shards go to DRAM on their way to `tier`, where it is another than the device's.
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
        # Of the others autocast makes nothing.
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
    """By name of a group whose shards leave the device, their tier.

    Args:
        module: not divided yet.
        plan: by which it will be.
        groups: what is gathered together, by name.
        parts: as for `shard_module`.
        gather_type: likewise.
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
    """Whether FSDP shards what is of its kind; styles of the user's have made DTensors of some."""
    return is_plain(parameter) or isinstance(parameter, DTensor)


def _offload_policy(tier: str | None) -> OffloadPolicy:
    if tier is None:
        return OffloadPolicy()
    # What a disk has behind it is no memory to pin.
    return CPUOffloadPolicy(pin_memory=tier == "cpu")


def _policy(gather_type: torch.dtype | None) -> MixedPrecisionPolicy:
    if gather_type is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=gather_type, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _other_dtypes(module: nn.Module, parameters: set[nn.Parameter]) -> list[set[nn.Parameter]]:
    """Trainable ones of `parameters` in other dtypes than most of their bytes: one set a dtype, alike on all ranks."""
    ordered = [parameter for parameter in module.parameters() if parameter in parameters]
    others = trained_dtypes(ordered)[1:]
    return [{one for one in ordered if one.dtype == dtype and one.requires_grad} for dtype in others]


def _shard_beside(module: nn.Module, parameters: set[nn.Parameter], mesh: DeviceMesh) -> FSDPModule:
    """A group of `parameters` of the root `module`, which FSDP lets have no two."""
    owner = nn.Module()
    # Where FSDP finds the places of what it gathers.
    owner.module = module
    with _held_by(owner, set(parameters)):
        fully_shard(owner, mesh=mesh, reshard_after_forward=False)
    del owner.module
    return cast(FSDPModule, owner)


@contextmanager
def _held_by(module: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Within, `module` has `parameters` as its own: `fully_shard` does not look for them inside other groups."""
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
    """Average the gradient of a parameter that FSDP ignores, the `index`-th of them, when the others are reduced."""
    if parameter.grad is None or not parameter.numel():
        return
    if state.agreement is not None:
        state.agreement.trained.add(index)
    elif state.synchronize:
        average_in_place(parameter.grad)
