"""OnParts: torch's functions on tensor-parallel shards; each rank computes its shard of the result.

Tensors are local and plain; a shard is marked as such. A function that receives a marked tensor is computed by its
rule, which determines how the result is sharded. Marked tensors report their global sizes, so that code with a
hard-coded number of heads keeps its meaning. Where no rule applies, shards are all-gathered and every rank computes the
full function: slower, but right. The code that runs need not be changed, nor its control flow be known. But what is not
a function of torch, such as the code's own autograd function or recomputation, bypasses the rules; the search for what
can be sharded detects it.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (its operators f and g are `enter` and `reduce`); Xu et al. 2021,
    "GSPMD", section 3.3 (propagation of shardings).
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

# Computes a function on shards, from the engine, the function and its arguments; returns NotImplemented if it cannot.
Rule = Callable[["OnParts", Callable[..., Any], Sequence[Any], dict[str, Any]], Any]


# The origin of a sequence sharding.
SEQUENCE = frozenset(["the sequence"])


class Ranks(Protocol):
    """The ranks among which tensors are sharded, and their collectives; results are differentiable.

    Attributes:
        size: the number of ranks.
        rank: the rank of this process.
    """

    size: int
    rank: int

    def enter(self, tensor: Tensor) -> Tensor:
        """Return the replicated `tensor` for each rank to compute its shard with; the gradient is all-reduced."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor`, which nothing else uses; the gradient is that of the sum."""

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """Return this rank's shard of `whole`, which is equal on all ranks; the gradient is all-gathered."""

    def gather(self, local: Tensor, part: Part) -> Tensor:
        """All-gather `local` for all ranks to compute the same; each takes its shard of the gradient."""

    def gather_entering(self, local: Tensor, part: Part) -> Tensor:
        """All-gather `local` for each rank to compute its shard with; the gradient is reduce-scattered."""

    def reduce_to_part(self, tensor: Tensor, part: Part) -> Tensor:
        """Reduce-scatter `tensor`; the gradient is all-gathered."""

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` by sum, without a gradient."""

    def maximum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` by elementwise maximum, without a gradient."""

    def check(self, condition: Tensor, message: str) -> None:
        """Check that `condition`, a tensor of one element, is true."""

    def own_random(self, device: torch.device) -> AbstractContextManager[None]:
        """Context in which random numbers differ between ranks; after it they are equal again."""


class Shapes:
    """Simulated ranks: collectives return tensors of the right shape, and their bytes are recorded.

    Args:
        size: the number of ranks.

    Attributes:
        size: the number of ranks.
        rank: 0.
        forward: bytes of each all-reduced tensor.
        backward: bytes of each tensor that backward would all-reduce.
        forward_halves: bytes of each unsharded tensor of an all-gather or reduce-scatter, half of an all-reduce each.
        backward_halves: the same for backward.
        kept: bytes of the shards that are saved to be all-gathered again.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.forward_halves: list[int] = []
        self.backward_halves: list[int] = []
        self.kept = 0

    def enter(self, tensor: Tensor) -> Tensor:
        """Return `tensor` and record its bytes."""
        self.backward.append(tensor.nbytes)
        return tensor

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor` and record its bytes."""
        self.forward.append(tensor.nbytes)
        return tensor

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """Return a tensor of the shard's shape."""
        self.backward_halves.append(whole.nbytes)
        return cut(whole, part, self.rank, self.size).clone()

    def gather(self, local: Tensor, part: Part) -> Tensor:
        """Return a tensor of the unsharded shape."""
        shape = [part.size if dim == part.dim else size for dim, size in enumerate(local.shape)]
        whole = local.new_empty(shape)
        if local.is_floating_point():
            whole = whole + local.mean(part.dim, keepdim=True)
        self.forward_halves.append(whole.nbytes)
        return whole

    def gather_entering(self, local: Tensor, part: Part) -> Tensor:
        """Return a tensor of the unsharded shape."""
        # Backward all-gathers once more, and reduce-scatters the gradient.
        self.backward_halves += [local.nbytes * self.size] * 2
        self.kept += local.nbytes
        return self.gather(local, part)

    def reduce_to_part(self, tensor: Tensor, part: Part) -> Tensor:
        """Return a tensor of the shard's shape."""
        self.forward_halves.append(tensor.nbytes)
        self.backward_halves.append(tensor.nbytes)
        return cut(tensor, part, self.rank, self.size).clone()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor` and record its bytes."""
        self.forward.append(tensor.nbytes)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return `tensor` and record its bytes."""
        self.forward.append(tensor.nbytes)
        return tensor

    def check(self, condition: Tensor, message: str) -> None:
        """Do nothing, since there are no values."""

    def own_random(self, device: torch.device) -> AbstractContextManager[None]:
        """Return a null context."""
        return nullcontext()


class CannotDivideError(RuntimeError):
    """A function would write into a shard what is not its shard."""


class OnParts(TorchFunctionMode):
    """Mode in which functions of torch accept shards; see the module's docstring.

    Args:
        ranks: the ranks among which tensors are sharded.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        # The length of the sequence, if the ranks share it: summed results of products are then sharded along it.
        self.sequence: int | None = None
        self._gathered: _Gathered | None = None
        # Replicated tensors that shards were computed with, their state then (version, whether gradients were
        # recorded), and the result of `enter`: the gradient is all-reduced once, for all that is computed with it.
        self._entered: MutableMapping[Tensor, tuple[tuple[int, bool], Tensor]] = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` by its rule if an argument is a shard."""
        kwargs = kwargs or {}
        if not any_part(args) and not any_part(kwargs.values()):
            return func(*args, **kwargs)
        result = self.taken_apart(func, args, kwargs)
        return self.computed_whole(func, args, kwargs) if result is NotImplemented else result

    def taken_apart(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of the rule of `func`; NotImplemented if there is no rule, or it does not apply."""
        rule = _rules().get(func)
        if rule is None or kwargs.get("out") is not None:
            return NotImplemented
        args, kwargs = _by_usual_names(args, kwargs)
        try:
            return rule(self, func, args, kwargs)
        except (IndexError, KeyError, TypeError):
            # The rule does not know these arguments. If the function does not either, it raises.
            return NotImplemented

    def computed_whole(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call `func` on all-gathered tensors.

        Raises:
            CannotDivideError: `func` writes into a shard.
        """
        if _writes(func, args, kwargs):
            raise CannotDivideError(f"{called(func)} writes into what is divided")
        args, kwargs = map_tensors((tuple(args), kwargs), self.whole)
        return func(*args, **kwargs)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return `tensor`, all-gathered if it is a shard."""
        part = part_of(tensor)
        return tensor if part is None else self.ranks.gather(tensor, part)

    def entered(self, whole: Tensor) -> Tensor:
        """Return `whole` for computing with shards, passed through `enter` once if it requires a gradient."""
        if not (whole.requires_grad and torch.is_grad_enabled()):
            return whole
        as_it_is = compat.version(whole), True
        known = self._entered.get(whole)
        if known is None or known[0] != as_it_is:
            known = self._entered[whole] = as_it_is, self.ranks.enter(whole)
        return known[1]

    def gathered(self, local: Tensor, part: Part) -> Tensor:
        """All-gather `local` for each rank to compute its shard with; use the result in `saving_gathered`."""
        last = self._gathered
        if last is None or last.given is not local or last.version != _version(local):
            self._gathered = last = _Gathered(self.ranks, local, part)
        return last.whole

    def saving_gathered(self, operand: Tensor) -> AbstractContextManager[Any]:
        """Context that saves the shard of `operand`, if `gathered` made it last; backward all-gathers the shard again.

        Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
        """
        if self._gathered is None or operand is not self._gathered.whole:
            return nullcontext()
        return saved_tensors_hooks(self._gathered.pack, _unpacked)

    @contextmanager
    def scope(self, sequence: int | None) -> Iterator[None]:
        """Context in which ranks share a sequence of this length, if any, with its own entered and gathered tensors."""
        before = self._entered, self._gathered, self.sequence
        self._entered, self._gathered, self.sequence = WeakTensorKeyDictionary(), None, sequence
        try:
            yield
        finally:
            self._entered, self._gathered, self.sequence = before

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """Return this rank's shard of `whole`, to compute with."""
        return as_part(cut(self.entered(whole), part, self.ranks.rank, self.ranks.size), part)

    def offered(self, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        """Return a matrix and its bias, sharded as `part` or as they are; subclasses decide."""
        return weight, bias

    def separates(self, part: Part, sizes: Sequence[int]) -> None:
        """Hook called when sections of a sharded dimension, of these sizes in order, are used separately."""

    def reduced(self, partial: Tensor, operands: Sequence[Part]) -> Tensor:
        """All-reduce `partial`, a product contracted in the sharded dimension of its `operands`.

        If the ranks share the sequence, reduce-scatter it along the sequence instead.
        """
        if self.sequence is not None and partial.dim() == 3 and partial.shape[1] == self.sequence:
            part = Part(1, (self.sequence,), SEQUENCE)
            return as_part(self.ranks.reduce_to_part(partial, part), part)
        return self.ranks.reduce(partial)


class _Gathered:
    """The all-gathered tensor of a shard, and the means to all-gather it again for backward."""

    def __init__(self, ranks: Ranks, local: Tensor, part: Part) -> None:
        self.given, self.version = local, _version(local)
        kind = local.device.type
        if torch.is_autocast_enabled(kind) and local.is_floating_point():
            # Cast as products would cast it; otherwise the cast would be saved as well.
            local = local.to(torch.get_autocast_dtype(kind))
        self.whole = ranks.gather_entering(local, part)
        self._again = _Again(ranks, local.detach(), part)
        self._storage: Any = StorageWeakRef(self.whole.untyped_storage())  # type: ignore[no-untyped-call]

    def pack(self, tensor: Tensor) -> Any:
        if StorageWeakRef(tensor.untyped_storage()) != self._storage:  # type: ignore[no-untyped-call]
            return tensor
        return self._again, tensor.shape, tensor.stride(), tensor.storage_offset()


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode have no version counter.
    return 0 if tensor.is_inference() else compat.version(tensor)


class _Again:
    """All-gathers a shard again; users at the same time share the result."""

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
    """Return the hidden states among a block's arguments, if `ranks` can share their second dimension; else None."""
    for tensor in tensors_in(args):
        if tensor.is_floating_point() and tensor.dim() == 3:
            return tensor if tensor.shape[1] % ranks == 0 and part_of(tensor) is None else None
    return None


def any_part(values: Any) -> bool:
    """Return whether one of `values`, or of lists and tuples in them, is a shard."""
    for value in values:
        if isinstance(value, Tensor):
            if part_of(value) is not None:
                return True
        elif isinstance(value, list | tuple) and any_part(value):
            return True
    return False


def _by_usual_names(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Make the first argument positional, and replace NumPy's argument names, which torch accepts, by torch's."""
    usual = {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}
    if not args:
        first = next((name for name in ("input", "tensors", "condition") if name in usual), None)
        if first is not None:
            return (usual.pop(first),), usual
    return args, usual


def names(text: str) -> list[str]:
    """Return the words of `text`."""
    return text.split()


def called(func: Callable[..., Any]) -> str:
    """Return the readable name of a function."""
    return getattr(func, "__name__", str(func))


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    in_place = is_in_place(func) or bool(kwargs.get("inplace"))
    return (in_place and any_part(args[:1])) or any_part([kwargs.get("out")])


def is_in_place(func: Callable[..., Any]) -> bool:
    """Return whether `func`, by its name, writes into its first argument."""
    name = called(func)
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = ("__index__", "__int__", "__invert__", "__iter__")


_RULES: dict[Callable[..., Any], Rule] = {}


def _rules() -> dict[Callable[..., Any], Rule]:
    if not _RULES:
        # The rules import this module.
        from lightning_largescale.workload.parts import rules

        _RULES.update(rules.all_rules())
    return _RULES
