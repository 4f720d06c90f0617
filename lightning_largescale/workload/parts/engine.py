"""OnParts: torch's functions on parts of tensors, each rank computing its part of the result.

Tensors are local and plain; one that is a part is marked so. A function that takes a marked one is computed by its
rule, which knows of what the result is a part; their sizes are those of the whole, so that code which views a tensor
with a number of heads written into it means what it meant. What no rule knows is gathered and computed whole, on every
rank: slower, and right. The code that runs needs to know nothing of it, nor need its control flow be known; but what is
no function of torch, as an autograd function or a recomputation of the code's own, goes by it, and is looked for when
it is decided what is divided.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (its operators f and g are `enter` and `reduce`); Xu et al. 2021,
    "GSPMD", section 3.3 (propagation of divisions).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.parts.part import Part, as_part, cut, part_of

# What computes a function on parts: the engine, the function and its arguments; NotImplemented where it cannot.
Rule = Callable[["OnParts", Callable[..., Any], Sequence[Any], dict[str, Any]], Any]


# The origin of the division of a sequence.
SEQUENCE = frozenset(["the sequence"])


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

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """This rank's part of `whole`, which all ranks have made alike; the gradient is gathered."""

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

    def check(self, condition: Tensor, message: str) -> None:
        """Make sure that `condition`, of one element, is true."""

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
        forward_halves: bytes of each tensor that was gathered, or summed in parts, which is half of a sum.
        backward_halves: the same of what a backward would.
        kept: bytes of the parts that are kept to be gathered again.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.forward_halves: list[int] = []
        self.backward_halves: list[int] = []
        self.kept = 0

    def enter(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.backward.append(tensor.nbytes)
        return tensor

    def reduce(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.forward.append(tensor.nbytes)
        return tensor

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """A tensor of the part's shape."""
        self.backward_halves.append(whole.nbytes)
        return cut(whole, part, self.rank, self.size).clone()

    def gather(self, local: Tensor, part: Part) -> Tensor:
        """A tensor of the whole's shape."""
        shape = [part.size if dim == part.dim else size for dim, size in enumerate(local.shape)]
        whole = local.new_empty(shape)
        if local.is_floating_point():
            whole = whole + local.mean(part.dim, keepdim=True)
        self.forward_halves.append(whole.nbytes)
        return whole

    def gather_entering(self, local: Tensor, part: Part) -> Tensor:
        """A tensor of the whole's shape."""
        # Gathered once more in backward, where the gradient is summed to parts.
        self.backward_halves += [local.nbytes * self.size] * 2
        self.kept += local.nbytes
        return self.gather(local, part)

    def reduce_to_part(self, tensor: Tensor, part: Part) -> Tensor:
        """A tensor of the part's shape."""
        self.forward_halves.append(tensor.nbytes)
        self.backward_halves.append(tensor.nbytes)
        return cut(tensor, part, self.rank, self.size).clone()

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.forward.append(tensor.nbytes)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        self.forward.append(tensor.nbytes)
        return tensor

    def check(self, condition: Tensor, message: str) -> None:
        """Nothing, since there are no values."""

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
        # The length of a sequence along which whole results of products are divided, where the ranks share it.
        self.sequence: int | None = None
        self._gathered: _Gathered | None = None
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
        if rule is None or kwargs.get("out") is not None:
            return NotImplemented
        args, kwargs = _by_usual_names(args, kwargs)
        try:
            return rule(self, func, args, kwargs)
        except (IndexError, KeyError, TypeError):
            # Arguments that the rule does not know, or the function neither, which then says so.
            return NotImplemented

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

    def gathered(self, local: Tensor, part: Part) -> Tensor:
        """The whole of `local`, for each rank to compute a part with; use it in `saving_gathered`."""
        last = self._gathered
        if last is None or last.given is not local or last.version != _version(local):
            self._gathered = last = _Gathered(self.ranks, local, part)
        return last.whole

    def saving_gathered(self, operand: Tensor) -> AbstractContextManager[Any]:
        """Within, where `operand` is what `gathered` made last, its part is saved for backward, which gathers it again.

        Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
        """
        if self._gathered is None or operand is not self._gathered.whole:
            return nullcontext()
        return saved_tensors_hooks(self._gathered.pack, _unpacked)

    @contextmanager
    def scope(self, sequence: int | None) -> Iterator[None]:
        """Within, ranks share a sequence of this length, if it is one; what was entered and gathered ends with it."""
        before = self._entered, self._gathered, self.sequence
        self._entered, self._gathered, self.sequence = WeakTensorKeyDictionary(), None, sequence
        try:
            yield
        finally:
            self._entered, self._gathered, self.sequence = before

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """This rank's part of `whole`, to be computed with."""
        return as_part(cut(self.entered(whole), part, self.ranks.rank, self.ranks.size), part)

    def offered(self, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        """A matrix and its bias that may be divided as `part`: as they are, or divided."""
        return weight, bias

    def separates(self, part: Part, sizes: Sequence[int]) -> None:
        """Called where stretches of what is divided, of these sizes in their order, go different ways."""

    def reduced(self, partial: Tensor, operands: Sequence[Part]) -> Tensor:
        """The sum of every rank's `partial`, a product contracted in what is divided of its `operands`; of a sequence
        that the ranks share, this rank's part.
        """
        if self.sequence is not None and partial.dim() == 3 and partial.shape[1] == self.sequence:
            part = Part(1, (self.sequence,), SEQUENCE)
            return as_part(self.ranks.reduce_to_part(partial, part), part)
        return self.ranks.reduce(partial)


class _Gathered:
    """What was gathered of a part, and how it is gathered again for backward."""

    def __init__(self, ranks: Ranks, local: Tensor, part: Part) -> None:
        self.given, self.version = local, _version(local)
        kind = local.device.type
        if torch.is_autocast_enabled(kind) and local.is_floating_point():
            # As products have it, or its cast would be saved beside it.
            local = local.to(torch.get_autocast_dtype(kind))
        self.whole = ranks.gather_entering(local, part)
        self._again = _Again(ranks, local.detach(), part)
        self._storage: Any = StorageWeakRef(self.whole.untyped_storage())  # type: ignore[no-untyped-call]

    def pack(self, tensor: Tensor) -> Any:
        if StorageWeakRef(tensor.untyped_storage()) != self._storage:  # type: ignore[no-untyped-call]
            return tensor
        return self._again, tensor.shape, tensor.stride(), tensor.storage_offset()


def _version(tensor: Tensor) -> int:
    # Of what is computed in inference mode none is kept.
    return 0 if tensor.is_inference() else compat.version(tensor)


class _Again:
    """Gathers a part once more, once for all that want it at a time."""

    def __init__(self, ranks: Ranks, local: Tensor, part: Part) -> None:
        self._ranks, self._local, self._part = ranks, local, part
        self._whole: Callable[[], Tensor | None] = lambda: None

    def __call__(self) -> Tensor:
        whole = self._whole()
        if whole is None:
            with torch.no_grad():
                whole = self._ranks.gather_entering(self._local, self._part)
            self._whole = weakref.ref(whole)
        return whole


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, shape, stride, offset = packed
    whole: Tensor = again()
    return whole.as_strided(shape, stride, offset)


def sequence_in(args: Any, ranks: int) -> Tensor | None:
    """The hidden states among the arguments of a block, whose second dimension `ranks` can share; None without such."""
    for tensor in tensors_in(args):
        if tensor.is_floating_point() and tensor.dim() == 3:
            return tensor if tensor.shape[1] % ranks == 0 and part_of(tensor) is None else None
    return None


def any_part(values: Any) -> bool:
    """Whether one of `values`, or of lists and tuples in them, is a part."""
    for value in values:
        if isinstance(value, Tensor):
            if part_of(value) is not None:
                return True
        elif isinstance(value, list | tuple) and any_part(value):
            return True
    return False


def _by_usual_names(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments whose first is in its place, and NumPy's names, which torch takes too, are torch's."""
    usual = {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}
    if not args:
        first = next((name for name in ("input", "tensors", "condition") if name in usual), None)
        if first is not None:
            return (usual.pop(first),), usual
    return args, usual


def names(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


def called(func: Callable[..., Any]) -> str:
    """The name of a function, as a person knows it."""
    return getattr(func, "__name__", str(func))


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    in_place = is_in_place(func) or bool(kwargs.get("inplace"))
    return (in_place and any_part(args[:1])) or any_part([kwargs.get("out")])


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether `func`, by its name, writes into its first argument."""
    name = called(func)
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = ("__index__", "__int__", "__invert__", "__iter__")


_RULES: dict[Callable[..., Any], Rule] = {}


def _rules() -> dict[Callable[..., Any], Rule]:
    if not _RULES:
        # They import this module.
        from lightning_largescale.workload.parts import rules

        _RULES.update(rules.all_rules())
    return _RULES
