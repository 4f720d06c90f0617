"""One run of a block, or of a step, that finds which of its matrices tensor parallelism can shard."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.workload.batch import tensors_in
from lightning_largescale.workload.parts import (
    SEQUENCE,
    OnParts,
    Part,
    Shapes,
    any_part,
    as_part,
    called,
    cut,
    part_of,
    share,
)
from lightning_largescale.workload.parts.products import LINEAR
from lightning_largescale.workload.tracker import MadeUpNumbers


class _AgainError(BaseException):
    """Ends a run that has found what the next run must change; a BaseException, so that blocks do not catch it."""


class DivisionRun(OnParts):
    """One run of code on fake tensors, with its matrices sharded where they can be.

    Args:
        ranks: the number of tensor-parallel ranks.
        whole: names of parameters that stay replicated, with the reason.
        stretches: by matrix name, the sizes of the sections of its outputs that are each sharded separately.
        uneven: also shard outputs whose number is not divisible by the number of ranks.
        sequence: the length of the sequence, if the ranks share it; the code then receives sequence shards.
        block: the block whose forward the code is; None if the code is not a block's forward.

    Attributes:
        parts: the sharding of each sharded parameter, by name.
        refused: names of parameters that must not be sharded, with the reason.
        separated: by matrix name, the new sections that have to be sharded separately.
        shapes: the record of the run's communication.
    """

    def __init__(
        self,
        ranks: int,
        whole: Mapping[str, str],
        stretches: Mapping[str, tuple[int, ...]],
        *,
        uneven: bool = False,
        sequence: int | None = None,
        block: nn.Module | None = None,
    ) -> None:
        self.shapes = Shapes(ranks)
        super().__init__(self.shapes)
        self.sequence = sequence
        self._block = block
        self._whole, self._stretches, self._uneven = whole, stretches, uneven
        self.parts: dict[str, Part] = {}
        self.refused: dict[str, str] = {}
        # Sections of matrices that the code turned out to use separately.
        self.separated: dict[str, tuple[int, ...]] = {}
        # Parameters and transposed matrices, each with the parameter's name and whether it is transposed.
        self._names: MutableMapping[Tensor, tuple[str, bool]] = WeakTensorKeyDictionary()
        self._used_otherwise: set[str] = set()

    @property
    def settled(self) -> bool:
        """Return whether the next run would give the same result."""
        return not self.refused and not self.separated

    def __call__(self, parameters: Mapping[str, Tensor], call: Callable[[], Any], mode: Any) -> None:
        """Run `call`, which computes with `parameters`, fake tensors of `mode`."""
        self._names.update({parameter: (name, False) for name, parameter in parameters.items()})
        try:
            with mode, MadeUpNumbers(), compat.silent_fakes(), torch.enable_grad(), self:
                output = call()
            with mode:
                self._look_at(output)
        except Exception as error:  # raised by a rule, or by code that cannot run on fakes
            if self.settled:
                self._give_up(error)
        except _AgainError:
            pass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`; shard the matrix of a product and the table of an embedding where possible."""
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs)
        unseen = None
        if any_part((*args, *kwargs.values())) or (product is not None and product.weight in self._names):
            unseen = _runs_unseen(self._block)
        if unseen is not None and any_part((*args, *kwargs.values())):
            self._refuse(tensors_in((tuple(args), kwargs)), unseen)
            raise _AgainError
        if product is not None and product.weight in self._names and unseen is None:
            args, kwargs = self._divided(product)
        elif func is F.multi_head_attention_forward:
            result = self.taken_apart(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif _turns(func, args) and args[0] in self._names:
            turned = func(*args, **kwargs)
            name, before = self._names[args[0]]
            self._names[turned] = name, not before
            return turned
        elif func is F.embedding:
            args = self._looked_up(args)
        elif not _reads_attribute(func):
            self._note_use(args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def computed_whole(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Refuse the matrices that the operands come from, since shards would have to be all-gathered; end the run."""
        self._refuse(tensors_in((tuple(args), kwargs)), f"{called(func)} would have to gather it")
        # The code after this would receive other inputs than in the next run.
        raise _AgainError

    def reduced(self, partial: Tensor, operands: Sequence[Part]) -> Tensor:
        """Sum a row-wise product over the ranks; refuse one whose operands both come from sharded matrices."""
        origins = [origins for part in operands if (origins := part.origins - SEQUENCE)]
        if len(origins) > 1:
            self._refuse_names(frozenset().union(*origins), "a product of two that are divided would have to be summed")
            raise _AgainError
        return super().reduced(partial, operands)

    def offered(self, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        """Return a matrix and its bias, sharded column-wise as `part` where possible."""
        if weight not in self._names or self._names[weight][0] in self._whole:
            return weight, bias
        return self._column(weight, bias, part)

    def separates(self, part: Part, sizes: Sequence[int]) -> None:
        """Record the sections of the matrices that `part` comes from; end the run if there are new ones."""
        for name in part.origins - SEQUENCE:
            before = self._stretches.get(name) or self.parts[name].pieces
            total = sum(before)
            if total % part.size:
                continue
            edges = {*itertools.accumulate(before)}
            edges |= {edge * (total // part.size) for edge in itertools.accumulate(sizes)}
            ordered = [0, *sorted(edges)]
            pieces = tuple(after - start for start, after in itertools.pairwise(ordered))
            if pieces != before and all(piece % self.ranks.size == 0 for piece in pieces):
                self.separated[name] = pieces
        if self.separated:
            raise _AgainError

    def _divided(self, product: Product) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a product, with its matrix and bias sharded to match its input."""
        (name, _), part = self._names[product.weight], part_of(product.input)
        weight, bias = product.weight, product.bias
        if name not in self._whole:
            last = product.input.dim() - 1
            if part is None or (part.origins == SEQUENCE and part.dim != last):
                pieces = self._stretches.get(name, (weight.shape[product.outputs],))
                weight, bias = self._column(weight, bias, Part(product.outputs, pieces))
            elif part.dim == last and weight.shape[1 - product.outputs] == part.size:
                weight = self._noted(weight, Part(1 - product.outputs, part.pieces), frozenset())
        return product.again(weight, bias)

    def _column(self, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        name, _ = self._names[weight]
        of_bias = None if bias is None or bias not in self._names else self._names[bias][0]
        if not self._divisible(part):
            sizes = " and ".join(str(piece) for piece in dict.fromkeys(part.pieces))
            self._refuse_names([name], f"{sizes} is not divisible by {self.ranks.size}")
        elif of_bias is not None and of_bias in self._whole:
            self._refuse_names([name], f"its bias stays whole: {self._whole[of_bias]}")
        else:
            weight = self._noted(weight, part, frozenset([name]))
            if bias is not None and of_bias is not None:
                bias = self._noted(bias, part.at(0), frozenset([name]))
        return weight, bias

    def _divisible(self, part: Part) -> bool:
        ranks = self.ranks.size
        if self._uneven and len(part.pieces) == 1:
            return share(part.size, ranks - 1, ranks)[1] > 0
        return all(piece % ranks == 0 for piece in part.pieces)

    def _looked_up(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments of an embedding, with its table sharded by entries where possible."""
        table = args[1] if len(args) > 1 else None
        if not self._uneven or not isinstance(table, Tensor) or table not in self._names:
            return args
        name, part = self._names[table][0], Part(0, (table.shape[0],))
        if name in self._whole or not self._divisible(part):
            return args
        return (args[0], self._noted(table, part, frozenset()), *args[2:])

    def _noted(self, whole: Tensor, part: Part, origins: frozenset[str]) -> Tensor:
        """Return the shard of a parameter, or of a transposed one, and record how the parameter is sharded."""
        name, turned = self._names[whole]
        of_parameter = part.at(1 - part.dim) if turned else part
        if self.parts.setdefault(name, of_parameter) != of_parameter:
            self._refuse_names([name], "it is used in several products, which would divide it in several ways")
        own = cut(whole, part, self.ranks.rank, self.ranks.size)
        return as_part(own, Part(part.dim, part.pieces, origins))

    def _note_use(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for tensor in tensors_in((tuple(args), dict(kwargs))):
            if tensor in self._names:
                self._used_otherwise.add(self._names[tensor][0])

    def _look_at(self, output: Any) -> None:
        leaving = [(tensor, part) for tensor in tensors_in(output) if (part := part_of(tensor)) is not None]
        self._refuse(
            [tensor for tensor, part in leaving if part.origins != SEQUENCE], "its result would have to be gathered"
        )
        for tensor, part in leaving:
            if part.origins == SEQUENCE:
                self.ranks.gather(tensor, part)
        self._refuse_names(self._used_otherwise & self.parts.keys(), "it is used in other ways than in products")

    def _give_up(self, error: Exception) -> None:
        why = f"it cannot run {'with it divided' if self.parts else 'on fake tensors'}: {error}"
        self._refuse_names(self.parts or [name for name, _ in self._names.values()], why)

    def _refuse(self, tensors: Sequence[Tensor], why: str) -> None:
        parts = [part for tensor in tensors if (part := part_of(tensor)) is not None]
        self._refuse_names(frozenset().union(*(part.origins for part in parts)), why)

    def _refuse_names(self, names: Collection[str], why: str) -> None:
        # Matrices whose sections are sharded on trial are refused first.
        on_trial = [name for name in names if name in self._stretches]
        self.refused |= {
            name: why for name in on_trial or names if name not in self._whole and name not in self.refused
        }


@dataclass(frozen=True, kw_only=True)
class Product:
    """The product of an input, contracted in its last dimension, and a matrix.

    Attributes:
        input: the operand that is not the matrix.
        weight: the matrix.
        bias: the tensor added to the result; None without a bias.
        outputs: the dimension of `weight` that becomes the result's last; the other dimension is contracted.
        again: returns the arguments of the call for another matrix and bias.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: int
    again: Callable[[Tensor, Tensor | None], tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def of(cls, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """Return the product that a call of torch computes; None if it computes no such product."""
        if function is F.linear:
            given = LINEAR.bind(*args, **kwargs).arguments
            input, bias = given["input"], given.get("bias")
            return cls(
                input=input,
                weight=given["weight"],
                bias=bias,
                outputs=0,
                again=lambda weight, bias: ((input, weight, bias), {}),
            )
        if function in _MATMULS and len(args) == 2 and not kwargs and args[1].dim() == 2:
            return cls(
                input=args[0],
                weight=args[1],
                bias=None,
                outputs=1,
                again=lambda weight, _: ((args[0], weight), {}),
            )
        if function is torch.addmm and len(args) == 3 and not kwargs:
            return cls(
                input=args[1],
                weight=args[2],
                bias=args[0],
                outputs=1,
                again=lambda weight, bias: ((bias, args[1], weight), {}),
            )
        return None


_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm, torch.Tensor.__matmul__)


def _runs_unseen(block: nn.Module | None) -> str | None:
    """Return why the rules do not cover a later rerun or backward of the running code; None if they do.

    The backward of a user's autograd function follows no rule. Code that is checkpointed inside the forward of `block`
    runs again in backward, outside of this mode.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if block is not None and frame.f_code is type(block).forward.__code__ and frame.f_locals.get("self") is block:
            return None
        if frame.f_code is torch.autograd.Function.apply.__code__:
            return "an autograd function of the user's takes it"
        if frame.f_code.co_filename == checkpoint.__file__:
            return "it is recomputed by the block's own checkpointing"
        frame = frame.f_back
    return None


def _turns(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Return whether a call transposes a matrix."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 2:
        return False
    if function in (torch.transpose, torch.Tensor.transpose):
        return {dim % 2 for dim in args[1:] if isinstance(dim, int)} == {0, 1}
    return function in _TURNS


_TURNS = (torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]


def _reads_attribute(function: Callable[..., Any]) -> bool:
    return getattr(function, "__name__", "") == "__get__"
