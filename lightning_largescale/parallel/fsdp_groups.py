"""The FSDP groups of a module: its repeated blocks, the plan's `extra_fsdp_modules`, and the root with all the rest.

Source: torch.distributed.fsdp.fully_shard, for groups; Zhao et al. 2023, "PyTorch FSDP", section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.rows import rows_of
from lightning_largescale.plan import Plan
from lightning_largescale.tiers import group_tiers, shard_bytes
from lightning_largescale.workload.blocks import Group, find_blocks, find_groups, has_forward, no_such_module
from lightning_largescale.workload.kinds import is_plain
from lightning_largescale.workload.parts import Part


def checked_groups(module: nn.Module, plan: Plan) -> dict[str, Group]:
    """Return the FSDP groups by name; warn of gradient hooks, which shards do not keep.

    Raises:
        PlanError: `module` has no parameters, or embeddings with sparse gradients that are not row-sharded; or
            `extra_fsdp_modules` names modules that do not exist, are never called, or overlap blocks or each other.
    """
    if not any(True for _ in module.parameters()):
        raise PlanError(
            f"{type(module).__name__} has no parameters to divide; give it at least one, or use dp_replicate."
        )
    _check_wraps(module, plan.extra_fsdp_modules)
    _check_sparse(module)
    _warn_of_hooks(module)
    return in_order(module, find_groups(module, plan.extra_fsdp_modules))


def in_order(module: nn.Module, groups: Mapping[str, Group]) -> dict[str, Group]:
    """Sort `groups` by their place in `module`, the root last: plans count resident groups in this order."""
    places = {path: place for place, (path, _) in enumerate(module.named_parameters())}
    first = {name: min((places[path] for path in group.parameters), default=0) for name, group in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=lambda name: (not name, first[name]))}


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
        parts: as for `shard_groups`.
        gather_type: as for `shard_groups`.
    """
    sizes: dict[str, int] = {}
    for name in filter(None, groups):
        wraps, sizes[name] = name in plan.extra_fsdp_modules, 0
        least_dimensions = 1 if wraps or gather_type is None else 2
        for path in groups[name].parameters:
            parameter = module.get_parameter(path)
            if is_shardable(parameter) and parameter.dim() >= least_dimensions:
                part = parts.get("", {}).get(path) if wraps else parts.get(name, {}).get(path.removeprefix(f"{name}."))
                dim = None if part is None else part.dim
                sizes[name] += shard_bytes(parameter.shape, parameter.nbytes, plan.dp_shard, plan.tp, dim)
    return group_tiers(plan, sizes)


def is_shardable(parameter: Tensor) -> bool:
    """Return whether FSDP shards this kind of parameter; the user's ParallelStyles may have made it a DTensor."""
    return is_plain(parameter) or isinstance(parameter, DTensor)


def _check_wraps(module: nn.Module, names: Sequence[str]) -> None:
    paths = {name: found for name, found in module.named_modules() if name}
    blocks = set(find_blocks(module).values())
    for name in names:
        if name not in paths:
            raise no_such_module("extra_fsdp_modules", name, module, paths)
        inside = [outer for outer, found in paths.items() if found in blocks or outer in names]
        within = next((outer for outer in inside if name == outer and paths[name] in blocks), None)
        within = within or next((outer for outer in inside if name.startswith(f"{outer}.")), None)
        if within is not None or not blocks.isdisjoint(paths[name].modules()):
            raise PlanError(
                f"extra_fsdp_modules has {name!r}, which {f'lies in {within!r}' if within else 'has repeated blocks'};"
                " give modules outside of repeated blocks and of each other."
            )
        if not has_forward(paths[name]):
            raise PlanError(
                f"extra_fsdp_modules has {name!r}, a {type(paths[name]).__name__}, which is not called itself; give the"
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
