"""Private APIs of FSDP2: the collectives of its groups."""

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
                if parameter.sharded_param.grad is None:
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
        self._group.fsdp_params[index].sharded_param.grad = None

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
    return hasattr(parameter, "_unsharded_param") and parameter._unsharded_param.grad is not None


def _taken(group: Any, parameter: Any) -> Any:
    """The gradient of a parameter that was not reduced, in the type that it is reduced in, taken from it."""
    if not hasattr(parameter, "_unsharded_param"):
        # As a first all-gather makes it, without values.
        data = parameter._sharded_param_data
        ranks, dtype = group._all_gather_process_group.size(), parameter.param_dtype or data.dtype
        parameter.init_all_gather_outputs([data.numel()], [dtype], ranks, group.device)
        parameter.init_unsharded_param()
        parameter.free_unsharded_param()
    parameter.accumulate_unsharded_grad_if_needed()
    gradient = parameter.unsharded_accumulated_grad
    if gradient is None:
        gradient = parameter._unsharded_param.grad
        if gradient is not None and parameter.reduce_dtype is not None:
            gradient = gradient.to(parameter.reduce_dtype)
    parameter.unsharded_accumulated_grad = parameter._unsharded_param.grad = None
    return gradient


def _zeros(parameter: Any) -> Any:
    import torch

    return torch.zeros_like(parameter._unsharded_param, dtype=parameter.reduce_dtype, requires_grad=False)
