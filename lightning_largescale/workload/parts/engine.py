"""OnParts: torch's functions on parts of tensors, each rank computing its part of the result.

Tensors are local and plain; one that is a part is marked so. A function that takes a marked one is computed by its
rule, which knows of what the result is a part; their sizes are those of the whole, so that code which views a tensor
with a number of heads written into it means what it meant. What no rule knows is gathered and computed whole, on every
rank: slower, and never wrong. The code that runs needs to know nothing of it, nor need its control flow be known.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (its operators f and g are `enter` and `reduce`); Xu et al. 2021,
    "GSPMD", section 3.3 (propagation of divisions).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors
from lightning_largescale.workload.parts.part import Part, as_part, cut, part_of

# What computes a function on parts: the engine, the function and its arguments; NotImplemented where it cannot.
Rule = Callable[["OnParts", Callable[..., Any], Sequence[Any], dict[str, Any]], Any]


class Ranks(Protocol):
    """The ranks among which tensors are divided, and how they communicate; results are differentiable.

    Attributes:
        size: how many.
        rank: which of them this process is.
    """

    size: int
    rank: int

    def enter(self, tensor: Tensor) -> Tensor:
        """`tensor`, whole, for each rank to compute a part with: gradients, each rank's of its part, are added up."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, which is used by nothing else; the gradient is that of the sum."""

    def gather(self, local: Tensor, part: Part) -> Tensor:
        """The whole of `local`, for every rank to compute the same with: each takes its part of the gradient."""

    def gather_entering(self, local: Tensor, part: Part) -> Tensor:
        """The whole of `local`, for each rank to compute a part with: gradients are added up, each taking its part."""

    def reduce_to_part(self, tensor: Tensor, part: Part) -> Tensor:
        """This rank's part of the sum of every rank's `tensor`; the gradient is gathered."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, of which no gradient is taken."""

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest of every rank's `tensor`, element by element, of which no gradient is taken."""

    def own_random(self, device: torch.device) -> AbstractContextManager[None]:
        """Within, random numbers are other ones on each rank; afterwards they go on equal."""


class Shapes:
    """Ranks that are not there: what communication returns has the right shape.

    Args:
        size: how many they would be.

    Attributes:
        size: as given.
        rank: the first.
        forward: bytes of each tensor that was summed over the ranks.
        backward: the same of what a backward would sum.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0
        self.forward: list[int] = []
        self.backward: list[int] = []

    def enter(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.backward.append(tensor.nbytes)
        return tensor

    def reduce(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.forward.append(tensor.nbytes)
        return tensor

    def gather(self, local: Tensor, part: Part) -> Tensor:
        """A tensor of the whole's shape."""
        shape = [part.size if dim == part.dim else size for dim, size in enumerate(local.shape)]
        return local.mean(part.dim, keepdim=True).expand(shape) if local.is_floating_point() else local.new_empty(shape)

    def gather_entering(self, local: Tensor, part: Part) -> Tensor:
        """A tensor of the whole's shape."""
        return self.gather(local, part)

    def reduce_to_part(self, tensor: Tensor, part: Part) -> Tensor:
        """A tensor of the part's shape."""
        return cut(tensor, part, self.rank, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.forward.append(tensor.nbytes)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.forward.append(tensor.nbytes)
        return tensor

    def own_random(self, device: torch.device) -> AbstractContextManager[None]:
        """No context."""
        return nullcontext()


class CannotDivideError(RuntimeError):
    """A function would write into a part what is not its part."""


class OnParts(TorchFunctionMode):
    """Within, functions take parts of tensors; the module's docstring says how.

    Args:
        ranks: among which tensors are divided.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        # Whole tensors that parts were computed with, as they were (version, whether gradients were recorded), and what
        # stands for them there: their gradients are added up over the ranks once, for all that is computed with them.
        self._entered: MutableMapping[Tensor, tuple[tuple[int, bool], Tensor]] = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`."""
        kwargs = kwargs or {}
        if not any_part(args) and not any_part(kwargs.values()):
            return func(*args, **kwargs)
        result = self.taken_apart(func, args, kwargs)
        return self.computed_whole(func, args, kwargs) if result is NotImplemented else result

    def taken_apart(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the rule of `func` makes of it; NotImplemented where there is none, or it cannot."""
        rule = _rules().get(func)
        return NotImplemented if rule is None else rule(self, func, args, kwargs)

    def computed_whole(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `func` makes of whole tensors.

        Raises:
            CannotDivideError: it writes into one that is a part.
        """
        if _writes(func, args, kwargs):
            raise CannotDivideError(f"{called(func)} writes into what is divided")
        args, kwargs = map_tensors((tuple(args), kwargs), self.whole)
        return func(*args, **kwargs)

    def whole(self, tensor: Tensor) -> Tensor:
        """`tensor`, gathered where it is a part."""
        part = part_of(tensor)
        return tensor if part is None else self.ranks.gather(tensor, part)

    def entered(self, whole: Tensor) -> Tensor:
        """What stands for `whole` where parts are computed with it."""
        if not (whole.requires_grad and torch.is_grad_enabled()):
            return whole
        as_it_is = compat.version(whole), True
        known = self._entered.get(whole)
        if known is None or known[0] != as_it_is:
            known = self._entered[whole] = as_it_is, self.ranks.enter(whole)
        return known[1]

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """This rank's part of `whole`, to be computed with."""
        return as_part(cut(self.entered(whole), part, self.ranks.rank, self.ranks.size), part)

    def offered(self, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        """A matrix and its bias that may be divided as `part`: as they are, or divided."""
        return weight, bias

    def separates(self, part: Part, sizes: Sequence[int]) -> None:
        """Called where stretches of what is divided, of these sizes in their order, go different ways."""

    def reduced(self, partial: Tensor, operands: Sequence[Part]) -> Tensor:
        """The sum of every rank's `partial`, a product contracted in what is divided of its `operands`."""
        return self.ranks.reduce(partial)


def any_part(values: Any) -> bool:
    """Whether one of `values`, or of lists and tuples in them, is a part."""
    for value in values:
        if isinstance(value, Tensor):
            if part_of(value) is not None:
                return True
        elif isinstance(value, list | tuple) and any_part(value):
            return True
    return False


def names(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


def called(func: Callable[..., Any]) -> str:
    """The name of a function, as a person knows it."""
    return getattr(func, "__name__", str(func))


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    name = called(func)
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    in_place = in_place or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__"))
    return (in_place and any_part(args[:1])) or any_part([kwargs.get("out")])


_RULES: dict[Callable[..., Any], Rule] = {}


def _rules() -> dict[Callable[..., Any], Rule]:
    if not _RULES:
        # They import this module.
        from lightning_largescale.workload.parts import rules

        _RULES.update(rules.all_rules())
    return _RULES
