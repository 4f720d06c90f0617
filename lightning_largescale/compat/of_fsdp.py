"""Private APIs of FSDP2: what its groups gather and reduce, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class GroupCollectives:
    """The collectives of the FSDP group of a module, which a rank can also enter for the sake of the others.

    Replaced by public hooks around the all-gather and the reduction of a group, and a public way to take part in them
    without running the module.

    Args:
        module: that `fully_shard` was applied to, and that has parameters of its own group.
    """

    def __init__(self, module: Any) -> None:
        self._group = _group_of(module)
        self._end_backward = self._group.post_backward
        self._joins = False

    def intercept(
        self, unshard: Callable[[Callable[[], None]], None], reduce: Callable[[Callable[[], None]], None]
    ) -> Callable[[], None]:
        """Have `unshard` and `reduce` called in the place of the group's all-gather and of its reduction of gradients.

        Args:
            unshard: is given a function that issues the all-gather.
            reduce: is given a function that reduces what this rank's backward left.

        Returns:
            A function that undoes it.
        """
        group = self._group
        issue = group.unshard

        def unshard_through(*args: Any, **kwargs: Any) -> None:
            if self._is_about_to_gather() and not self._joins:
                unshard(lambda: issue(*args, **kwargs))
            else:
                issue(*args, **kwargs)

        undo = [
            _replaced(group, "unshard", unshard_through),
            _replaced(group, "post_backward", lambda *args: reduce(self._end_backward)),
        ]

        def undo_all() -> None:
            for one in undo:
                one()

        return undo_all

    def _is_about_to_gather(self) -> bool:
        group = self._group
        if group._all_gather_result is not None or group.is_unsharded:
            return False
        before_backward = type(group._training_state).PRE_BACKWARD
        kept = group._training_state is before_backward and not getattr(group, "unshard_in_backward", True)
        return bool(not kept and group._all_gather_process_group.size() > 1)

    @property
    def reduces(self) -> bool:
        """Whether a backward reduces gradients now."""
        return bool(self._group.reduce_grads)

    @property
    def parameters(self) -> int:
        """Number of parameters of the group."""
        return len(self._group.fsdp_params)

    @property
    def is_through_backward(self) -> bool:
        """Whether the backward under way has come past the group."""
        state = self._group._training_state
        return state is type(state).POST_BACKWARD

    def end_backward(self) -> None:
        """Let the group end its part in a backward that has not come past it."""
        self._group.post_backward()

    def unreduced(self) -> tuple[int, ...]:
        """Indices of the parameters with a gradient that was not reduced."""
        return tuple(index for index, parameter in enumerate(self._group.fsdp_params) if _has_gradient(parameter))

    def keep_unreduced(self) -> None:
        """End the group's part in a backward, with its gradients left as they are."""
        group = self._group
        before, group.reduce_grads = group.reduce_grads, False
        try:
            self._end_backward()
        finally:
            group.reduce_grads = before

    def join_unshard(self) -> None:
        """Take part in an all-gather of the group; parameters are left as they are, gathered or not."""
        group, self._joins = self._group, True
        try:
            with group.use_training_state(type(group._training_state).IDLE):
                group.wait_for_unshard()
                kept = group.is_unsharded
                if kept:
                    group._to_sharded()
                group.unshard()
                group.wait_for_unshard()
                if not kept:
                    group._to_sharded()
        finally:
            self._joins = False

    def reduce(self, indices: Sequence[int], *, own: bool) -> tuple[list[int], list[int]]:
        """Take part in a reduction of the gradients of some parameters, with zeros where this rank has none.

        Args:
            indices: of the parameters.
            own: with this rank's gradients where it has some; else they are left for a later reduction, and no hook of
                the parameters is called.

        Returns:
            Indices of those that had no reduced gradient before, and of those to which this rank gave one.
        """
        group, left = self._group, {}
        fresh, given = [], []
        for index, parameter in enumerate(group.fsdp_params):
            gradient = _taken(group, parameter)
            if index in indices:
                if _gradient_of(parameter.sharded_param) is None:
                    fresh.append(index)
                if own and gradient is not None:
                    given.append(index)
                    parameter.unsharded_accumulated_grad, gradient = gradient, None
                else:
                    parameter.unsharded_accumulated_grad = _zeros(parameter)
            left[index] = gradient
        before = group._training_state, group.reduce_grads, group.reshard_after_backward
        # Whoever computes with the gathered parameters does so still.
        group.reduce_grads, group.reshard_after_backward = True, False
        noticing = contextlib.nullcontext() if own else _without_hooks([group.fsdp_params[index] for index in indices])
        try:
            with noticing:
                self._end_backward()
        finally:
            group._training_state, group.reduce_grads, group.reshard_after_backward = before
        for index, gradient in left.items():
            if gradient is not None:
                group.fsdp_params[index].unsharded_accumulated_grad = gradient
        return fresh, given

    def drop_gradient(self, index: int) -> None:
        """Let a parameter have no gradient."""
        _set_gradient(self._group.fsdp_params[index].sharded_param, None)

    def notice_gradient(self, index: int) -> None:
        """Call the hooks of a parameter whose gradient was reduced without."""
        shard = self._group.fsdp_params[index].sharded_param
        for hook in [*_hooks(shard).values()]:
            hook(shard)


def before_backward_ends(module: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Call `call` when autograd has come to the end of a backward of `module`, the root of its FSDP groups, before
    these end theirs; what undoes it.

    Replaced by a public `FSDPModule` hook at the end of a backward.
    """
    from torch.distributed.fsdp import fully_shard

    undo = []
    for state in fully_shard.state(module)._state_ctx.all_states:  # type: ignore[attr-defined]
        end = state._root_post_backward_final_callback

        def end_after(end: Callable[[], None] = end) -> None:
            call()
            end()

        undo.append(_replaced(state, "_root_post_backward_final_callback", end_after))

    def undo_all() -> None:
        for one in undo:
            one()

    return undo_all


def has_group(module: Any) -> bool:
    """Whether `module`, which `fully_shard` was applied to, has parameters of its own group.

    Replaced by a public way to list them.
    """
    return _group_of(module) is not None


def _group_of(module: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]


def _replaced(target: Any, name: str, method: Any) -> Callable[[], None]:
    """Put `method` in the place of a method of one object; what undoes it, also where others did so since."""
    before = vars(target).get(name)
    setattr(target, name, method)

    def undo() -> None:
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)

    return undo


def _hooks(shard: Any) -> dict[int, Callable[[Any], None]]:
    """Those that are called when it has been given a gradient."""
    return getattr(shard, "_post_accumulate_grad_hooks", None) or {}


@contextlib.contextmanager
def _without_hooks(parameters: Sequence[Any]) -> Iterator[None]:
    """Within, no hook is called when a shard of `parameters` is given a gradient."""
    hooks = [_hooks(parameter.sharded_param) for parameter in parameters]
    kept = [dict(one) for one in hooks]
    for one in hooks:
        one.clear()
    try:
        yield
    finally:
        for one, before in zip(hooks, kept, strict=True):
            one.update(before)


def _has_gradient(parameter: Any) -> bool:
    if parameter.unsharded_accumulated_grad is not None:
        return True
    return hasattr(parameter, "_unsharded_param") and _gradient_of(parameter._unsharded_param) is not None


def _unreduced(parameter: Any) -> Any:
    """The gradient of a parameter that was not reduced, in one piece: of the last backward FSDP2 keeps what it reduces
    in the leaf's dtype in the leaf, and the sum of what came before, or is reduced in another dtype, beside it.
    """
    gathered, gradient = parameter._unsharded_param, parameter.unsharded_accumulated_grad
    recent = _gradient_of(gathered)
    if gradient is None:
        return recent
    if recent is not None:
        gradient += recent
        _set_gradient(gathered, None)
    return gradient


def _taken(group: Any, parameter: Any) -> Any:
    """The gradient of a parameter that was not reduced, in the type that it is reduced in, taken from it."""
    if not hasattr(parameter, "_unsharded_param"):
        # As a first all-gather makes it, without values.
        data = parameter._sharded_param_data
        ranks, dtype = group._all_gather_process_group.size(), parameter.param_dtype or data.dtype
        parameter.init_all_gather_outputs([data.numel()], [dtype], ranks, group.device)
        parameter.init_unsharded_param()
        parameter.free_unsharded_param()
    gradient = _unreduced(parameter)
    if gradient is not None and parameter.reduce_dtype is not None:
        gradient = gradient.to(parameter.reduce_dtype)
    parameter.unsharded_accumulated_grad = None
    _set_gradient(parameter._unsharded_param, None)
    return gradient


def _gradient_of(parameter: Any) -> Any:
    """Its own, where `grad` gives that of the shard for a gathered parameter."""
    import torch

    own: Any = torch.Tensor.grad
    return own.__get__(parameter)


def _set_gradient(parameter: Any, gradient: Any) -> None:
    import torch

    own: Any = torch.Tensor.grad
    own.__set__(parameter, gradient)


def _zeros(parameter: Any) -> Any:
    import torch

    return torch.zeros_like(parameter._unsharded_param, dtype=parameter.reduce_dtype, requires_grad=False)


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

    def gather_again(self) -> None:
        """Gather its group, which is gathered, anew: the leaves have what the shards have now. A collective."""
        group = self._group
        with group.use_training_state(type(group._training_state).IDLE):
            group.wait_for_unshard()
            group._to_sharded()
            group.unshard()
            group.wait_for_unshard()

    @property
    def is_cast(self) -> bool:
        """Whether it is gathered in another dtype than that of the shard."""
        return self._one.param_dtype is not None

    @property
    def has_unreduced_gradient(self) -> bool:
        """Whether it has a gradient that was not reduced."""
        return _has_gradient(self._one)

    @property
    def unreduced_gradient(self) -> Any:
        """The gradient that was not reduced; None where there is none."""
        return _unreduced(self._one) if self.has_unreduced_gradient else None

    @unreduced_gradient.setter
    def unreduced_gradient(self, gradient: Any) -> None:
        self._one.unsharded_accumulated_grad = None
        if self.leaf is not None:
            _set_gradient(self.leaf, gradient)

    @property
    def memory(self) -> Any:
        """Of the shard: flat, padded."""
        return self._one._sharded_param_data

    @property
    def gathered_memory(self) -> Any:
        """Of the leaf: flat and padded, or the leaf's values where they lie in another order (`when_gathered`)."""
        reordered = self._one._unsharded_inner_tensors
        return reordered[0] if reordered else self._one.all_gather_outputs[0]

    @property
    def own_memory(self) -> Any:
        """What this rank's shard is of the values of the leaf; where they lie in another order, a copy."""
        mesh, memory = self._one.mesh_info, self.gathered_memory
        if self._one._unsharded_inner_tensors:
            flat = memory.new_zeros(mesh.shard_mesh_size * self.memory.numel())
            flat[: memory.numel()] = memory.reshape(-1)
            memory = flat
        return memory.view(mesh.shard_mesh_size, -1)[mesh.shard_mesh_rank]

    @property
    def values(self) -> Any:
        """The memory of the leaf in the shape that this rank computes with."""
        if self._one._unsharded_inner_tensors:
            return self.gathered_memory
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
    undo = [one for group in groups for one in _wrap(group, gathered, resharding, reducing)]

    def undo_all() -> None:
        for one in undo:
            one()

    return undo_all


def _wrap(group: Any, gathered: Any, resharding: Any, reducing: Any) -> list[Callable[[], None]]:
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

    instead = {"_to_unsharded": gathers, "_to_sharded": reshards, "post_backward": reduces}
    return [_replaced(group, name, method) for name, method in instead.items()]


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
