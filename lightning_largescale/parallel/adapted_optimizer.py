"""Steps of any optimizer on a sharded or replicated module: on DTensors, on this rank's shards, or refused.

Between steps an optimizer holds the module's parameters, and state sharded like them, so schedulers, callbacks and
checkpoints need not know how it steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.optimizers.closure import after_closure, closure_first
from lightning_largescale.optimizers.local_view import LocalView
from lightning_largescale.optimizers.traits import OptimizerTraits, check_takes_rows, shard_count, sharded_traits
from lightning_largescale.optimizers.trial import UntriedError, has_modes
from lightning_largescale.parallel.embedding import row_sharded
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.order import divided_dims, order_of
from lightning_largescale.parallel.sharded import reshard
from lightning_largescale.parallel.sharded_step import settle


class AdaptedOptimizer:
    """Adaptation of an optimizer's steps to sharded or replicated parameters, until `undo`.

    A collective if parameters are sharded. Gathered copies are dropped whenever a step has changed their shards. An
    optimizer with modes is probed again at its first step, after hooks have set them; one that cannot be probed before
    is probed only then.

    Args:
        optimizer: the optimizer, with the same groups on all ranks.
        known: the parameters that it may hold.
        in_pages: whether a `PagedOptimizer`, which has probed it, steps it on this rank's shards.
        before_step: called after forward, backward and the hooks that follow them, before the optimizer steps on plain
            tensors.
        after_step: called after every step.

    Attributes:
        optimizer: the optimizer, without Lightning's wrapper.

    Raises:
        PlanError: on all ranks, if it cannot step on shards or on rows of tables, or holds parameters that are not
            the module's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        known: KnownParameters,
        *,
        in_pages: bool = False,
        before_step: Callable[[], None] = lambda: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self._known, self._in_pages = known, in_pages
        self._before_step, self._after_step = before_step, after_step
        # Some optimizers create state in their constructor, and a copy would miss it in a trial.
        self._initial = {parameter: dict(state) for parameter, state in self.optimizer.state.items()}
        self._traits = OptimizerTraits()
        self._sizes: list[int] = []
        # A step may call its base class's step, which calls the hooks too.
        self._depth = 0
        self._view: LocalView | None = None
        self._probed_early = has_modes(self.optimizer)
        try:
            self._probe()
        except UntriedError:
            if not self._probed_early:
                raise
        self._remove_hooks = compat.hook_nearest(self.optimizer, self._before, self._after)

    def undo(self) -> None:
        """Restore the optimizer's plain step."""
        self._end_view()
        self._remove_hooks()

    def forget_step(self) -> None:
        """Put the parameters back into the optimizer after a step that raised, after which torch calls no hook."""
        self._depth = 0
        self._end_view()

    def check_state(self) -> None:
        """Make sure that a checkpoint can assemble the state from the ranks' shards.

        Raises:
            PlanError: shards cut through blocks of elements in which the optimizer keeps state.
        """
        self._blockwise_state(cut=lambda tensor: not isinstance(tensor, DTensor))

    def divide_state(self) -> None:
        """Shard blockwise state that a checkpoint has loaded; other state is sharded already.

        Raises:
            PlanError: shards cut through blocks.
        """
        for parameter, key in self._blockwise_state(cut=lambda _: True):
            state = self.optimizer.state[parameter]
            if not isinstance(state[key], DTensor):
                assert isinstance(parameter, DTensor)
                mesh, placements = parameter.device_mesh, parameter.placements
                state[key] = distribute_tensor(state[key], mesh, placements, src_data_rank=None)

    def _blockwise_state(self, *, cut: Callable[[Tensor], bool]) -> list[tuple[Tensor, str]]:
        """Return parameters and keys of blockwise state; refuse state whose blocks are cut by shards if `cut` is true.

        Args:
            cut: function of a state tensor that returns whether cut blocks in it are an error.
        """
        found: list[tuple[Tensor, str]] = [
            (parameter, key)
            for parameter, state in self.optimizer.state.items()
            for key in sorted(self._traits.block_sizes.keys() & state.keys())
            if isinstance(parameter, DTensor)
        ]
        for parameter, key in found:
            if not self._has_whole_blocks(parameter, key) and cut(self.optimizer.state[parameter][key]):
                raise PlanError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of blocks of elements, which the shards of a"
                    f" parameter of shape {tuple(parameter.shape)} cut, so checkpoints cannot hold its state; save"
                    f" weights alone (save_weights_only=True), or {self._instead}"
                )
        return found

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-step hook: evaluate the closure first if the optimizer steps on shards, and make it hold them."""
        given = None
        if self._depth == 0:
            given = args, kwargs = after_closure(args, kwargs, self._after_backward)
            if (lookups := row_sharded(self._known.module)) is not None:
                lookups.check_sent()
            if self._probed_early:
                given = args, kwargs = self._probe_again(args, kwargs)
            self._probe()
            if self._traits.local:
                given = closure_first(args, kwargs)
                self._view = LocalView(self.optimizer)
                self._view.hold_all(_local)
        self._depth += 1
        return given

    def _after_backward(self) -> None:
        settle(self._known.module)
        # If GradScaler leaves its scale to a fused step, the step copies the scale to the host without waiting for it.
        scaled = getattr(self.optimizer, "grad_scale", None) is not None
        if (self._in_pages or self._traits.local) and not scaled:
            self._before_step()

    def _probe_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make `_probe` probe the optimizer in the modes that hooks have set, those around backward too.

        Returns:
            The arguments of the first step.
        """
        self._probed_early, self._sizes = False, []
        sharded = any(isinstance(one, DTensor) for group in self.optimizer.param_groups for one in group["params"])
        # An optimizer of replicated parameters may evaluate its closure whenever it likes; a paged one has been probed.
        return closure_first(args, kwargs) if sharded and not self._in_pages else (args, kwargs)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Post-step hook: put the parameters back, and drop gathered copies, which are stale."""
        self._depth -= 1
        if self._depth == 0:
            self._end_view()
            reshard(self._known.module)
            self._after_step()

    def _end_view(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            view.end(self._as_sharded)

    def _probe(self) -> None:
        """Check the optimizer's parameters, and if there are new ones, probe how it steps on them."""
        self._known.check_optimizer(self.optimizer)
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes == self._sizes:
            return
        self._sizes = sizes
        lookups = row_sharded(self._known.module)
        tables: dict[Tensor, str] = {} if lookups is None else {table.weight: table.name for table in lookups.tables}
        check_takes_rows(self.optimizer, tables, self._initial)
        if self._in_pages:
            return
        self._traits = sharded_traits(self.optimizer, self._initial)
        if self._traits.refusal is not None:
            raise (UntriedError if self._traits.untried else PlanError)(
                f"{type(self.optimizer).__name__} cannot train a sharded module: {self._traits.refusal};"
                f" {self._instead}"
            )

    @property
    def _instead(self) -> str:
        return f"replicate with Plan(dp_replicate={self._known.plan.world_size}), or choose another optimizer."

    def _has_whole_blocks(self, parameter: Tensor, key: str) -> bool:
        """Return whether each block of elements is on one rank, with the same number of blocks on each rank."""
        size, shards = self._traits.block_sizes[key], shard_count(parameter)
        # If a parameter is sharded twice, or by columns, elements of a block are on several ranks.
        if divided_dims(parameter) != [0] or order_of(parameter) is not None:
            return False
        return size > 0 and parameter.shape[0] % shards == 0 and parameter.numel() // shards % size == 0

    def _as_sharded(self, parameter: Tensor, key: str, tensor: Tensor) -> Tensor:
        """Return state of this rank's shard of a parameter as a DTensor, if it is sharded like the parameter."""
        assert isinstance(parameter, DTensor)
        if key in self._traits.whole_keys:
            return tensor
        if key in self._traits.block_sizes:
            if not self._has_whole_blocks(parameter, key):
                return tensor
            shape, stride = torch.Size([tensor.numel() * shard_count(parameter)]), tensor.stride()
        elif tensor.shape == _local(parameter.detach()).shape:
            tensor, shape, stride = tensor[: len(parameter.to_local())], parameter.shape, parameter.stride()
        else:
            return tensor
        return DTensor.from_local(
            tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard; a row of zeros if it is empty, since not all optimizers step on an empty tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    return local if local.numel() else local.new_zeros((1, *local.shape[1:]))
