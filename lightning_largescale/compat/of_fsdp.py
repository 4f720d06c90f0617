"""Private APIs of FSDP2: what it gathers, parameter by parameter, and when."""

from __future__ import annotations

from typing import Any


class GroupedParameter:
    """One parameter of a module that `fully_shard` was applied to: its shard, and the leaf that is gathered.

    Replaced by a public view of what FSDP2 gathers; `named_parameters` gives one of the two, whichever is in place.
    """

    def __init__(self, one: Any, group: Any) -> None:
        self._one, self._group = one, group

    @property
    def name(self) -> str:
        """In the root."""
        return str(self._one._param_fqn or self._one._module_info.param_name)

    @property
    def shard(self) -> Any:
        """The DTensor."""
        return self._one.sharded_param

    @property
    def leaf(self) -> Any:
        """The leaf of autograd that takes its place while it is gathered; None before it was for the first time."""
        return getattr(self._one, "_unsharded_param", None)

    @property
    def is_gathered(self) -> bool:
        """Whether the leaf is in place, with its values."""
        return bool(self._group.is_unsharded)

    @property
    def is_cast(self) -> bool:
        """Whether it is gathered in another dtype than that of the shard."""
        return self._one.param_dtype is not None

    @property
    def memory(self) -> Any:
        """Of the shard: flat, padded."""
        return self._one._sharded_param_data

    @property
    def gathered_memory(self) -> Any:
        """Of the leaf: flat, padded."""
        return self._one.all_gather_outputs[0]

    @property
    def own_memory(self) -> Any:
        """What this rank's shard is of the memory of the leaf."""
        mesh = self._one.mesh_info
        return self.gathered_memory.view(mesh.shard_mesh_size, -1)[mesh.shard_mesh_rank]

    @property
    def values(self) -> Any:
        """The memory of the leaf in the shape that this rank computes with."""
        return self.gathered_memory[: self._one._orig_size.numel()].view(self._one._orig_size)

    def set_values(self, values: Any) -> None:
        """Write into the memory of the leaf what autograd does not count as a write."""
        import torch

        autograd: Any = torch.autograd
        with torch.no_grad(), autograd._unsafe_preserve_version_counter(self.gathered_memory):
            self.values.copy_(values)

    @property
    def is_pinned(self) -> bool:
        """Whether the shard is in memory that FSDP2 has pinned."""
        return bool(self._one.pin_memory)

    @property
    def places(self) -> list[tuple[Any, str]]:
        """Modules that hold it, and its name there."""
        info = self._one._module_info
        return [
            (info.module, info.param_name),
            *zip(info.shared_modules, info.shared_param_names, strict=True),
        ]


def grouped_parameters(module: Any) -> list[GroupedParameter]:
    """Those of the group of `module`, which `fully_shard` was applied to.

    Replaced as `GroupedParameter`.
    """
    return [GroupedParameter(one, group) for group in _groups_of(module) for one in group.fsdp_params]


def _groups_of(module: Any) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def around_sharding(module: Any, *, gathered: Any, resharding: Any, reducing: Any) -> Any:
    """Call `gathered` before and after the parameters of `module`, which `fully_shard` was applied to, take the place
    of their shards, as a context, `resharding` before these take theirs again, and `reducing` as a context around what
    FSDP2 does after their backward; what undoes it.

    Replaced by public hooks of FSDPModule.unshard and reshard, which its own hooks do not call.
    """
    groups = _groups_of(module)
    for group in groups:
        _wrap(group, gathered, resharding, reducing)

    def undo() -> None:
        for group in groups:
            del group._to_unsharded, group._to_sharded, group.post_backward

    return undo


def _wrap(group: Any, gathered: Any, resharding: Any, reducing: Any) -> None:
    to_unsharded, to_sharded, post_backward = group._to_unsharded, group._to_sharded, group.post_backward

    def gathers() -> None:
        with gathered():
            to_unsharded()

    def reshards() -> None:
        if group.is_unsharded:
            resharding()
        to_sharded()

    def reduces(*args: Any) -> None:
        with reducing():
            post_backward(*args)

    group._to_unsharded, group._to_sharded, group.post_backward = gathers, reshards, reduces


def reduce_gradients(module: Any) -> None:
    """Reduce what the leaves of `module`, which `fully_shard` was applied to, have for gradients: a collective.

    Replaced by a public way to do so outside of a backward.
    """
    for group in _groups_of(module):
        state = group._training_state
        group.post_backward()
        group._training_state = state
        group.finalize_backward()


def local_tensor(parameter: Any) -> Any:
    """The tensor of this rank behind the DTensor `parameter`, sharing its count of versions.

    Replaced by `DTensor.to_local`, whose result counts as another one.
    """
    return parameter._local_tensor
