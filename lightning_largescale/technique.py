"""Technique: the hooks through which one technique of a plan takes part in setup, steps, evaluation and teardown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_largescale.checkpoint import StateMemory
from lightning_largescale.run import Run


class Technique:
    """One technique of a plan, at work on one module.

    The strategy calls each hook of all techniques in the order of its table, and closes techniques in reverse order.
    All hooks have defaults that do nothing. Contexts are entered in order, the last one innermost.

    Args:
        run: the run that the technique takes part in.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def wanted(cls, run: Run) -> bool:
        """Return whether the run needs this technique."""
        raise NotImplementedError

    # Setup

    def check(self) -> None:
        """Check that the technique can be applied, before anything is changed.

        Raises:
            PlanError: it cannot.
        """

    def prepare(self) -> None:
        """Read the module, whose forwards are still its own, and open what the other phases need."""

    def wrap(self) -> None:
        """Replace forwards of the module, whose parameters are still full."""

    def shard(self) -> None:
        """Shard parameters, which are on the meta device if they have no values yet."""

    def storage(self, parameter: Tensor) -> Tensor | None:
        """Return the memory in which to materialize this rank's shard of a parameter; None for new memory."""
        return None

    def ready(self) -> None:
        """Start to work on the shards, which have their values."""

    def optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Adapt the optimizers that the module has configured."""

    def limit_memory(self, limit_bytes: int) -> None:
        """Keep this rank's memory below `limit_bytes`, where the plan leaves it alone."""

    def close(self) -> None:
        """Leave the module as a plain run has it, except for its sharding."""

    # Steps

    def dataloader(self, loader: Any) -> Any:
        """Return the loader to use in place of `loader`."""
        return loader

    def check_step(self, stage: str, args: tuple[Any, ...]) -> None:
        """Check what a step is about to use; `stage` is its name, such as "training_step"."""

    def user_code(self, *, in_step: bool) -> AbstractContextManager[Any]:
        """Return a context for the module's steps (`in_step`) and for hooks of the module and of callbacks."""
        return nullcontext()

    def own_code(self) -> AbstractContextManager[Any]:
        """Return a context for the strategy's computation inside of `user_code`."""
        return nullcontext()

    def step(self, stage: str) -> AbstractContextManager[Any]:
        """Return the innermost context of a step."""
        return nullcontext()

    def around_step(self, stage: str, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return the function to call in place of the module's step."""
        return step

    def after_step(self, stage: str) -> None:
        """Follow a step."""

    def hook(self, name: str) -> AbstractContextManager[Any]:
        """Return a context for a hook of the module or of a callback, around that of `user_code`."""
        return nullcontext()

    def before_backward(self, loss: Tensor) -> None:
        """Prepare for the backward of `loss`."""

    def backward(self) -> AbstractContextManager[Any]:
        """Return a context for a backward."""
        return nullcontext()

    def reduce_gradients(self) -> None:
        """Reduce gradients that the backward has not reduced, before hooks read them."""

    def after_backward(self) -> None:
        """End what `before_backward` began."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context in which backward accumulates gradients without reducing them."""
        return nullcontext()

    def batch_start(self, batch_idx: int) -> None:
        """Prepare for a batch of training."""

    # Optimizer steps

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer that is about to step, before forward and backward.

        Raises:
            PlanError: it has parameters that the plan was not applied to.
        """

    def check_gradients(self, optimizer: Optimizer) -> None:
        """Check the gradients that an optimizer is about to use.

        Raises:
            PlanError: they are not reduced.
        """

    def update(self) -> AbstractContextManager[Callable[[Callable[[], Any]], Any] | None]:
        """Return a context for an optimizer's step, which may yield a function that runs the step's closure."""
        return nullcontext()

    def clip(self) -> AbstractContextManager[Any]:
        """Return a context for code that reads gradients between backward and the optimizer's own step."""
        return nullcontext()

    def after_update(self) -> None:
        """Follow an optimizer's step."""

    def abort_step(self) -> None:
        """Forget a step that ended halfway on all ranks."""

    # Evaluation

    def start_evaluation(self, *, logged: bool) -> None:
        """Prepare for an evaluation, whose results are `logged` if it is not a prediction."""

    def end_steps(self) -> None:
        """Follow the last step of an evaluation, before callbacks read the module."""

    def end_evaluation(self) -> None:
        """End an evaluation."""

    def train_end(self) -> None:
        """Follow the last step of training."""

    # State

    def state_memory(self, optimizer: Optimizer) -> StateMemory | None:
        """Return a function from a parameter and a state key to the memory to load state into; None for new memory."""
        return None


class Techniques:
    """The techniques of a run, in order; each method calls one hook of those that implement it.

    Args:
        techniques: the techniques.
    """

    def __init__(self, techniques: Iterable[Technique] = ()) -> None:
        self._techniques = [*techniques]
        self._implemented: dict[str, list[Callable[..., Any]]] = {}

    def __iter__(self) -> Iterator[Technique]:
        """Iterate over the techniques in order."""
        return iter(self._techniques)

    def _hooks(self, hook: Callable[..., Any]) -> list[Callable[..., Any]]:
        name = hook.__name__
        if name not in self._implemented:
            implementing = (one for one in self._techniques if getattr(type(one), name) is not hook)
            self._implemented[name] = [getattr(one, name) for one in implementing]
        return self._implemented[name]

    def each(self, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call a hook of each technique in order."""
        for call in self._hooks(hook):
            call(*args, **kwargs)

    def each_reversed(self, hook: Callable[..., None]) -> None:
        """Call a hook of each technique in reverse order, also after one that raises."""
        with ExitStack() as calls:
            for call in self._hooks(hook):
                calls.callback(call)

    @contextmanager
    def all(self, hook: Callable[..., AbstractContextManager[Any]], *args: Any, **kwargs: Any) -> Iterator[list[Any]]:
        """Context of the contexts of each technique, entered in order; yields the list of their values."""
        with ExitStack() as contexts:
            yield [contexts.enter_context(call(*args, **kwargs)) for call in self._hooks(hook)]

    def first(self, hook: Callable[..., Any], *args: Any) -> Any:
        """Return the first result of a hook that is not None, else None."""
        results = (call(*args) for call in self._hooks(hook))
        return next((result for result in results if result is not None), None)

    def chain(self, hook: Callable[..., Any], *args: Any, value: Any) -> Any:
        """Return `value` after each technique has replaced it, the value being a hook's last argument."""
        for call in self._hooks(hook):
            value = call(*args, value)
        return value
