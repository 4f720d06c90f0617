"""Any optimizer on a module whose parameters are divided: as it is, on this rank's shards, or refused.

Between steps an optimizer holds the module's parameters, and state divided as they are: schedulers, callbacks
and checkpoints need not know how it steps.
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
from lightning_largescale.optimizing import UntriedError, after_closure, closure_first, has_modes
from lightning_largescale.parallel.embedding import row_sharded
from lightning_largescale.parallel.exchange import Exchange
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.order import divided_dims, order_of
from lightning_largescale.parallel.sharded import reshard
from lightning_largescale.parallel.sharded_step import settle
from lightning_largescale.parallel.sparse import check_takes_rows
from lightning_largescale.parallel.trial import OptimizerTraits, ask, count_shards


class AdaptedOptimizer:
    """Makes an optimizer step right on parameters that are divided or replicated, until `undo`.

    A collective where they are divided. Gathered copies are dropped whenever a step has changed their shards. How an
    optimizer with modes steps is asked again at its first step, as hooks have left it by then; one that cannot be tried
    before is only asked then.

    Args:
        optimizer: with the same groups on all ranks.
        known: the parameters that it may hold.
        in_pages: another has it step on this rank's parts, and has seen to it that it can.
        before_step: called when forward, backward and the hooks after them are over, before the optimizer steps on
            plain tensors.
        after_step: called after every step.

    Attributes:
        optimizer: as given, without Lightning's wrapper.

    Raises:
        PlanError: on all ranks, when it cannot step on shards or on rows of tables, or holds parameters that are not
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
        # Some make their state at once, and would miss it in a trial.
        self._initial = {parameter: dict(state) for parameter, state in self.optimizer.state.items()}
        self._answer = OptimizerTraits()
        self._sizes: list[int] = []
        # A step may call its base class's, which calls the hooks too.
        self._depth = 0
        self._exchange = Exchange(self.optimizer, part=_part, to_whole=self._whole)
        self._asked_early = has_modes(self.optimizer)
        try:
            self._decide()
        except UntriedError:
            if not self._asked_early:
                raise
        self._remove_hooks = compat.hook_nearest(self.optimizer, self._before, self._after)

    def undo(self) -> None:
        """Leave the optimizer as it was."""
        self._exchange.end()
        self._remove_hooks()

    def forget_step(self) -> None:
        """Let the optimizer hold the parameters again after a step that raised, after which torch calls no hook."""
        self._depth = 0
        self._exchange.end()

    def check_state(self) -> None:
        """Make sure that the state can be put together of the ranks' parts, for a checkpoint.

        Raises:
            PlanError: some of it is of blocks of elements that the shards cut.
        """
        self._whole_blocks(cut=lambda tensor: not isinstance(tensor, DTensor))

    def divide_state(self) -> None:
        """Divide what a checkpoint has brought, where it is of blocks of elements; the rest is divided already.

        Raises:
            PlanError: the shards cut the blocks.
        """
        for parameter, key in self._whole_blocks(cut=lambda _: True):
            state = self.optimizer.state[parameter]
            if not isinstance(state[key], DTensor):
                assert isinstance(parameter, DTensor)
                mesh, placements = parameter.device_mesh, parameter.placements
                state[key] = distribute_tensor(state[key], mesh, placements, src_data_rank=None)

    def _whole_blocks(self, *, cut: Callable[[Tensor], bool]) -> list[tuple[Tensor, str]]:
        """Parameters and keys of their state that is of blocks of elements; refused where these are `cut`."""
        found: list[tuple[Tensor, str]] = [
            (parameter, key)
            for parameter, state in self.optimizer.state.items()
            for key in sorted(self._answer.block_sizes.keys() & state.keys())
            if isinstance(parameter, DTensor)
        ]
        for parameter, key in found:
            if not self._blocks_whole(parameter, key) and cut(self.optimizer.state[parameter][key]):
                raise PlanError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of blocks of elements, which the shards of a"
                    f" parameter of shape {tuple(parameter.shape)} cut, so checkpoints cannot hold its state; save"
                    f" weights alone (save_weights_only=True), or {self._instead}"
                )
        return found

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The closure where it must come first, then the shards."""
        given = None
        if self._depth == 0:
            given = args, kwargs = after_closure(args, kwargs, self._after_backward)
            if (lookups := row_sharded(self._known.module)) is not None:
                lookups.check_sent()
            if self._asked_early and (asked := self._ask_again(args, kwargs)) is not None:
                given = args, kwargs = asked
            self._decide()
            if self._answer.local:
                given = closure_first(args, kwargs)
                self._exchange.begin()
        self._depth += 1
        return given

    def _after_backward(self) -> None:
        settle(self._known.module)
        # Where GradScaler leaves its scale to a fused step, that copies it to the host without waiting for it.
        scaled = getattr(self.optimizer, "grad_scale", None) is not None
        if (self._in_pages or self._answer.local) and not scaled:
            self._before_step()

    def _ask_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the optimizer be asked as hooks have left it, those around backward too; arguments of its first step."""
        self._asked_early, self._sizes = False, []
        divided = any(isinstance(one, DTensor) for group in self.optimizer.param_groups for one in group["params"])
        # What is neither divided nor in pages may evaluate its closure whenever it likes.
        return closure_first(args, kwargs) if divided and not self._in_pages else None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The parameters again, whose gathered copies are stale."""
        self._depth -= 1
        if self._depth == 0:
            self._exchange.end()
            reshard(self._known.module)
            self._after_step()

    def _decide(self) -> None:
        """Check the parameters, and ask how to step on them when there are others than before."""
        self._known.check_optimizer(self.optimizer)
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes == self._sizes:
            return
        self._sizes = sizes
        check_takes_rows(self.optimizer, row_sharded(self._known.module), self._initial)
        if self._in_pages:
            return
        self._answer = ask(self.optimizer, self._initial)
        if self._answer.refusal is not None:
            raise (UntriedError if self._answer.untried else PlanError)(
                f"{type(self.optimizer).__name__} cannot train a sharded module: {self._answer.refusal};"
                f" {self._instead}"
            )

    @property
    def _instead(self) -> str:
        return f"replicate with Plan(dp_replicate={self._known.plan.world_size}), or choose another optimizer."

    def _blocks_whole(self, parameter: Tensor, key: str) -> bool:
        """Whether each block of elements is on one rank, as many on each."""
        size, shards = self._answer.block_sizes[key], count_shards(parameter)
        # What is divided twice, or by columns, has elements of a block on several ranks.
        if divided_dims(parameter) != [0] or order_of(parameter) is not None:
            return False
        return size > 0 and parameter.shape[0] % shards == 0 and parameter.numel() // shards % size == 0

    def _whole(self, parameter: Tensor, key: str, tensor: Tensor) -> Tensor:
        """State of this rank's part of a parameter as a part of the whole parameter's state."""
        assert isinstance(parameter, DTensor)
        if key in self._answer.whole_keys:
            return tensor
        if key in self._answer.block_sizes:
            if not self._blocks_whole(parameter, key):
                return tensor
            shape, stride = torch.Size([tensor.numel() * count_shards(parameter)]), tensor.stride()
        elif tensor.shape == _part(parameter.detach()).shape:
            tensor, shape, stride = tensor[: len(parameter.to_local())], parameter.shape, parameter.stride()
        else:
            return tensor
        return DTensor.from_local(
            tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )


def _part(tensor: Tensor) -> Tensor:
    """This rank's part; where it has none, as much as one row: not all optimizers step on nothing."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    return local if local.numel() else local.new_zeros((1, *local.shape[1:]))
