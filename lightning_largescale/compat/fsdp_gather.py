"""Private APIs of FSDP2: the all-gather and the gradient reduction of a group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from lightning_largescale.compat._fsdp_state import (
    all_of,
    group_of,
    groups_of,
    has_unreduced_gradient,
    own_gradient,
    post_accumulate_hooks,
    replace_methods,
    set_own_gradient,
    unreduced_gradient,
)


class GroupCollectives:
    """The collectives of a module's FSDP group, which a rank can also enter without running the module.

    Replaced by public hooks around the all-gather and the reduction of a group, and a public way to enter them without
    running the module.

    Args:
        module: The module, which `fully_shard` was applied to and which has parameters of its own group.
    """

    def __init__(self, module: Any) -> None:
        self._group = group_of(module)
        self._end_backward = self._group.post_backward
        self._joins = False

    def intercept(
        self, unshard: Callable[[Callable[[], None]], None], reduce: Callable[[Callable[[], None]], None]
    ) -> Callable[[], None]:
        """Call `unshard` and `reduce` instead of the group's all-gather and of its gradient reduction.

        Args:
            unshard: Receives a function that issues the all-gather.
            reduce: Receives a function that reduces the gradients of this rank's backward.

        Returns:
            A function that restores the group's own collectives.
        """
        issue = self._group.unshard

        def unshard_through(*args: Any, **kwargs: Any) -> None:
            if self._is_about_to_gather() and not self._joins:
                unshard(lambda: issue(*args, **kwargs))
            else:
                issue(*args, **kwargs)

        return replace_methods(
            self._group, unshard=unshard_through, post_backward=lambda *args: reduce(self._end_backward)
        )

    def _is_about_to_gather(self) -> bool:
        group = self._group
        if group._all_gather_result is not None or group.is_unsharded:
            return False
        before_backward = type(group._training_state).PRE_BACKWARD
        kept = group._training_state is before_backward and not getattr(group, "unshard_in_backward", True)
        return bool(not kept and group._all_gather_process_group.size() > 1)

    @property
    def reduces(self) -> bool:
        """Return whether a backward reduces gradients now."""
        return bool(self._group.reduce_grads)

    @property
    def parameters(self) -> int:
        """Number of parameters of the group."""
        return len(self._group.fsdp_params)

    @property
    def is_through_backward(self) -> bool:
        """Return whether the backward under way has passed the group."""
        state = self._group._training_state
        return state is type(state).POST_BACKWARD

    def end_backward(self) -> None:
        """End the group's part in a backward that has not passed it."""
        self._group.post_backward()

    def unreduced(self) -> tuple[int, ...]:
        """Return the indices of the parameters with a gradient that was not reduced."""
        parameters = self._group.fsdp_params
        return tuple(index for index, parameter in enumerate(parameters) if has_unreduced_gradient(parameter))

    def keep_unreduced(self) -> None:
        """End the group's part in a backward without a reduction."""
        group = self._group
        before, group.reduce_grads = group.reduce_grads, False
        try:
            self._end_backward()
        finally:
            group.reduce_grads = before

    def join_unshard(self) -> None:
        """Enter an all-gather of the group, and leave it as it was, sharded or unsharded."""
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
        """Enter a reduction of the gradients of some parameters, with zeros where this rank has no gradient.

        Args:
            indices: The indices of the parameters.
            own: Whether to reduce this rank's gradients; else they are kept for a later reduction, and no hook of the
                parameters is called.

        Returns:
            The indices of the parameters that had no reduced gradient before, and of those whose gradient of this rank
            was reduced.
        """
        group, left = self._group, {}
        fresh, given = [], []
        for index, parameter in enumerate(group.fsdp_params):
            gradient = _take_gradient(group, parameter)
            if index in indices:
                if own_gradient(parameter.sharded_param) is None:
                    fresh.append(index)
                if own and gradient is not None:
                    given.append(index)
                    parameter.unsharded_accumulated_grad, gradient = gradient, None
                else:
                    parameter.unsharded_accumulated_grad = _zeros(parameter)
            left[index] = gradient
        before = group._training_state, group.reduce_grads, group.reshard_after_backward
        # Code that computes with the unsharded parameters goes on to do so.
        group.reduce_grads, group.reshard_after_backward = True, False
        noticing = nullcontext() if own else _without_hooks([group.fsdp_params[index] for index in indices])
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
        """Drop the reduced gradient of a parameter."""
        set_own_gradient(self._group.fsdp_params[index].sharded_param, None)

    def notice_gradient(self, index: int) -> None:
        """Call the hooks of a parameter whose gradient was reduced without them."""
        shard = self._group.fsdp_params[index].sharded_param
        for hook in [*post_accumulate_hooks(shard).values()]:
            hook(shard)


@contextmanager
def _without_hooks(parameters: Sequence[Any]) -> Iterator[None]:
    """Context in which the shards of `parameters` accumulate gradients without their hooks."""
    hooks = [post_accumulate_hooks(parameter.sharded_param) for parameter in parameters]
    kept = [dict(one) for one in hooks]
    for one in hooks:
        one.clear()
    try:
        yield
    finally:
        for one, before in zip(hooks, kept, strict=True):
            one.update(before)


def _take_gradient(group: Any, parameter: Any) -> Any:
    """Remove the unreduced gradient of a parameter, and return it in the dtype that it is reduced in."""
    if not hasattr(parameter, "_unsharded_param"):
        # Create the leaf as the first all-gather does, without values.
        data = parameter._sharded_param_data
        ranks, dtype = group._all_gather_process_group.size(), parameter.param_dtype or data.dtype
        parameter.init_all_gather_outputs([data.numel()], [dtype], ranks, group.device)
        parameter.init_unsharded_param()
        parameter.free_unsharded_param()
    gradient = unreduced_gradient(parameter)
    if gradient is not None and parameter.reduce_dtype is not None:
        gradient = gradient.to(parameter.reduce_dtype)
    parameter.unsharded_accumulated_grad = None
    set_own_gradient(parameter._unsharded_param, None)
    return gradient


def _zeros(parameter: Any) -> Any:
    import torch

    return torch.zeros_like(parameter._unsharded_param, dtype=parameter.reduce_dtype, requires_grad=False)


def around_gathers(
    module: Any, before: Any = lambda: None, after: Any = lambda: None, bring: Any = None
) -> Callable[[], None]:
    """Call `before` before each all-gather of the group of `module`, which `fully_shard` was applied to, and `after`
    after it.

    Replaced by public hooks of FSDPModule.unshard, which FSDP2's own hooks do not call.

    Args:
        module: The module.
        before: Called without arguments.
        after: Called without arguments.
        bring: Called once per all-gather with the flat memories of the group's shards in DRAM, when FSDP2 would copy
            them to its device. Returns a context of the device copies, which FSDP2 reads instead; it ends when FSDP2
            has read them.

    Returns:
        A function that removes the calls.
    """
    group = group_of(module)
    unshard, wait = group.unshard, group.wait_for_unshard

    def unshard_after(*args: Any, **kwargs: Any) -> None:
        if group._all_gather_result is None and not group.is_unsharded:
            before()
        with _bringing(group, bring):
            unshard(*args, **kwargs)

    def wait_before() -> None:
        begun = group._all_gather_result is not None
        # On a mesh of one rank FSDP2 reads the shards here.
        with _bringing(group, bring if begun else None):
            wait()
        if begun:
            after()

    return replace_methods(group, unshard=unshard_after, wait_for_unshard=wait_before)


class _Shard:
    """Stand-in for a shard's memory, whose copy to FSDP2's device exists already."""

    def __init__(self, memory: Any, copies: Any, index: int) -> None:
        self.memory, self._copies, self._index = memory, copies, index

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """Return the copy."""
        return self._copies()[self._index]


@contextmanager
def _bringing(group: Any, bring: Any) -> Iterator[None]:
    shards = [] if bring is None else [(one, one._sharded_param_data) for one in group.fsdp_params]
    # A caller around an all-gather may unshard the group itself, on another stream.
    memories = [memory.memory if isinstance(memory, _Shard) else memory for _, memory in shards]
    with ExitStack() as until_read:
        copies = functools.cache(lambda: until_read.enter_context(bring(memories)))
        for index, (one, memory) in enumerate(shards):
            until_read.callback(setattr, one, "_sharded_param_data", memory)
            one._sharded_param_data = _Shard(memories[index], copies, index)
        yield


def around_reductions(module: Any, reduced: Any) -> Callable[[], None]:
    """Call `reduced` after each gradient reduction of the group of `module`, which `fully_shard` was applied to and
    whose shards are in DRAM beside a CUDA device.

    Gradients that no hook of their parameter reads are copied to DRAM asynchronously.

    Replaced by a public hook of FSDPModule's reduction, and by pinned gradients for shards in any memory.

    Args:
        module: The module.
        reduced: Receives the parameters, and a function that waits for the copies of their gradients to DRAM.

    Returns:
        A function that removes the call.
    """
    group = group_of(module)
    post_backward = group.post_backward

    def reduce(*args: Any) -> None:
        before = [(one, one.pin_memory, _written(one.sharded_param)) for one in group.fsdp_params]
        for one, _, _ in before:
            # Hooks read the gradient at once.
            one.pin_memory = not post_accumulate_hooks(one.sharded_param)
        try:
            post_backward(*args)
        finally:
            for one, pinned, _ in before:
                one.pin_memory = pinned
        fresh = [one for one, _, known in before if _written(one.sharded_param) != known]
        events = [one.grad_offload_event for one in fresh if one.grad_offload_event is not None]
        if fresh:
            reduced([one.sharded_param for one in fresh], lambda: [event.synchronize() for event in events])

    return replace_methods(group, post_backward=reduce)


def _written(parameter: Any) -> tuple[int, int] | None:
    """Return a key of a shard's gradient that changes when the gradient is replaced or written into."""
    gradient = own_gradient(parameter)
    return None if gradient is None else (id(gradient), getattr(gradient, "_local_tensor", gradient)._version)


def around_sharding(module: Any, *, gathered: Any, resharding: Any, reducing: Any) -> Callable[[], None]:
    """Run code around the unshard, the reshard and the end of backward of `module`, which `fully_shard` was applied to.

    Replaced by public hooks of FSDPModule.unshard and reshard, which FSDP2's own hooks do not call.

    Args:
        module: The module.
        gathered: Returns a context in which the unsharded parameters replace the shards as the module's parameters.
        resharding: Called before the shards replace the unsharded parameters.
        reducing: Returns a context in which FSDP2 ends the backward of the parameters.

    Returns:
        A function that removes all three.
    """
    return all_of(_wrap(group, gathered, resharding, reducing) for group in groups_of(module))


def _wrap(group: Any, gathered: Any, resharding: Any, reducing: Any) -> Callable[[], None]:
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

    return replace_methods(group, _to_unsharded=gathers, _to_sharded=reshards, post_backward=reduces)


def reduce_gradients(module: Any) -> None:
    """Reduce the gradients of the unsharded parameters of `module`, which `fully_shard` was applied to: a collective.

    Replaced by a public way to do so outside a backward.
    """
    for group in groups_of(module):
        state = group._training_state
        group.post_backward()
        group._training_state = state
        group.finalize_backward()
