"""Private APIs of FSDP2: the sharded and the unsharded parameters of a group, their memory and their gradients."""

from __future__ import annotations

from typing import Any

from lightning_largescale.compat._fsdp_state import (
    group_of,
    groups_of,
    has_unreduced_gradient,
    parameter_of,
    set_own_gradient,
    unreduced_gradient,
)


def shards_of(module: Any) -> list[tuple[Any, Any]]:
    """Return the sharded parameters of the group of `module`, which `fully_shard` was applied to, each with the flat
    memory of this rank's shard, padded to the size of the largest shard.

    Replaced by a public way to choose the memory of a shard.
    """
    group = group_of(module)
    return [] if group is None else [(one.sharded_param, one._sharded_param_data) for one in group.fsdp_params]


def place_shard(module: Any, parameter: Any, memory: Any) -> None:
    """Move this rank's shard of a parameter to other memory.

    Replaced as `shards_of`.

    Args:
        module: The module, which `fully_shard` was applied to.
        parameter: The sharded parameter, of the group of `module`.
        memory: The memory: flat, as large as the one that `shards_of` returns, and with its values.
    """
    found = parameter_of(module, parameter)
    local = parameter._local_tensor
    found._sharded_param_data = memory
    parameter._local_tensor = memory[: local.numel()].view(local.shape)


def when_gathered(module: Any, parameter: Any, made: Any, dims: Any = None) -> None:
    """Call a function when FSDP2 creates the unsharded parameter of a shard, and choose the order of its dimensions.

    In another order, the result of the all-gather, which is contiguous, is copied into that order and freed.

    Replaced by parameters of any strides in FSDP2, and a public hook on the unsharded parameter.

    Args:
        module: The module, which `fully_shard` was applied to.
        parameter: The sharded parameter, of the group of `module`.
        made: Called once with the unsharded parameter.
        dims: The order of the unsharded parameter's dimensions in memory, the outermost first; None is contiguous.
    """
    import torch
    from torch.distributed.tensor import DTensor

    found = parameter_of(module, parameter)
    own: Any = found.init_unsharded_param
    kept: list[tuple[Any, Any]] = []

    def reorder(full: Any) -> Any:
        contiguous = full.to_local() if isinstance(full, DTensor) else full
        ordered = torch.empty_permuted(contiguous.shape, dims, dtype=contiguous.dtype, device=contiguous.device)
        kept.append((contiguous.detach(), ordered))
        found._unsharded_inner_tensors = [ordered]
        placed = ordered if contiguous is full else DTensor.from_local(ordered, full.device_mesh, full.placements)
        return torch.nn.Parameter(placed, requires_grad=full.requires_grad)

    def init_unsharded_param() -> None:
        first = not hasattr(found, "_unsharded_param")
        own()
        if dims is not None:
            if first:
                found._unsharded_param = reorder(found._unsharded_param)
            ((contiguous, ordered),) = kept
            ordered.untyped_storage().resize_(ordered.numel() * ordered.element_size())
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((ordered,)):  # type: ignore[attr-defined]
                ordered.copy_(contiguous)
            for gathered in found.all_gather_outputs:
                gathered.untyped_storage().resize_(0)
        if first:
            made(found._unsharded_param)

    found.init_unsharded_param = init_unsharded_param


class GroupedParameter:
    """A parameter of a module that `fully_shard` was applied to: its shard and its unsharded leaf.

    Replaced by a public view of an FSDP group; `named_parameters` gives one of the two, whichever is in place.
    """

    def __init__(self, one: Any, group: Any) -> None:
        self._one, self._group = one, group

    @property
    def name(self) -> str:
        """Name in the root module."""
        return str(self._one._param_fqn or self._one._module_info.param_name)

    @property
    def shard(self) -> Any:
        """The sharded parameter, a DTensor."""
        return self._one.sharded_param

    @property
    def leaf(self) -> Any:
        """The unsharded parameter, a leaf of autograd; None before the first all-gather."""
        return getattr(self._one, "_unsharded_param", None)

    @property
    def is_gathered(self) -> bool:
        """Return whether the group is unsharded: the leaf is in place, with its values."""
        return bool(self._group.is_unsharded)

    def gather_again(self) -> None:
        """Reshard and unshard the group, so that the leaves have the values that the shards have now. A collective."""
        group = self._group
        with group.use_training_state(type(group._training_state).IDLE):
            group.wait_for_unshard()
            group._to_sharded()
            group.unshard()
            group.wait_for_unshard()

    @property
    def is_cast(self) -> bool:
        """Return whether the leaf has another dtype than the shard."""
        return self._one.param_dtype is not None

    @property
    def has_unreduced_gradient(self) -> bool:
        """Return whether the leaf has a gradient that was not reduced."""
        return has_unreduced_gradient(self._one)

    @property
    def unreduced_gradient(self) -> Any:
        """Gradient of the leaf that was not reduced; None if there is none."""
        return unreduced_gradient(self._one)

    @unreduced_gradient.setter
    def unreduced_gradient(self, gradient: Any) -> None:
        self._one.unsharded_accumulated_grad = None
        if self.leaf is not None:
            set_own_gradient(self.leaf, gradient)

    @property
    def memory(self) -> Any:
        """Memory of the shard: flat, padded."""
        return self._one._sharded_param_data

    @property
    def gathered_memory(self) -> Any:
        """Memory of the leaf: flat and padded, or the leaf's values if they lie in another order (`when_gathered`)."""
        reordered = self._one._unsharded_inner_tensors
        return reordered[0] if reordered else self._one.all_gather_outputs[0]

    @property
    def own_memory(self) -> Any:
        """This rank's shard of the leaf's values: a view, or a copy if the leaf's values lie in another order."""
        mesh, memory = self._one.mesh_info, self.gathered_memory
        if self._one._unsharded_inner_tensors:
            flat = memory.new_zeros(mesh.shard_mesh_size * self.memory.numel())
            flat[: memory.numel()] = memory.reshape(-1)
            memory = flat
        return memory.view(mesh.shard_mesh_size, -1)[mesh.shard_mesh_rank]

    @property
    def values(self) -> Any:
        """Memory of the leaf in the shape that this rank computes with."""
        if self._one._unsharded_inner_tensors:
            return self.gathered_memory
        return self.gathered_memory[: self._one._orig_size.numel()].view(self._one._orig_size)

    def set_values(self, values: Any) -> None:
        """Write `values` into the memory of the leaf without a new version of it for autograd."""
        import torch

        autograd: Any = torch.autograd
        with torch.no_grad(), autograd._unsafe_preserve_version_counter(self.gathered_memory):
            self.values.copy_(values)

    @property
    def is_pinned(self) -> bool:
        """Return whether the shard is in memory that FSDP2 has pinned."""
        return bool(self._one.pin_memory)

    @property
    def places(self) -> list[tuple[Any, str]]:
        """Modules that hold the parameter, each with its name there."""
        info = self._one._module_info
        return [
            (info.module, info.param_name),
            *zip(info.shared_modules, info.shared_param_names, strict=True),
        ]


def grouped_parameters(module: Any) -> list[GroupedParameter]:
    """Return the parameters of the group of `module`, which `fully_shard` was applied to.

    Replaced as `GroupedParameter`.
    """
    return [GroupedParameter(one, group) for group in groups_of(module) for one in group.fsdp_params]
