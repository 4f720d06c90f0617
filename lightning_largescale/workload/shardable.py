"""Which matrices of a block tensor parallelism divides, and how: found by running the block on parts.

The block runs on fake tensors, all of them whole at first. A matrix that meets a whole input is divided by its outputs
("column"); one that meets an input that is divided where it is contracted, by its inputs ("row"), and the sums over the
ranks are whole. What lies between (views to heads, attention, gates, functions of elements) is carried by the rules of
`workload.parts`. Where they cannot carry a division it would have to be gathered: then the matrices that it came from
are divided in stretches, if it is that stretches of it go different ways (q, k and v of one matrix), or stay whole; and
the block runs again. What is left communicates where a division ends and, in backward, where it begins, and nowhere
else; and it is right by construction.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (column and row).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.parts import OnParts, Part, Shapes, any_part, as_part, called, cut, part_of
from lightning_largescale.workload.parts.products import LINEAR


@dataclass(frozen=True, kw_only=True, slots=True)
class Divided:
    """How the parameters of a block are divided among the ranks of tensor parallelism.

    Attributes:
        parts: by a parameter's name in the block, how it is divided; others stay whole.
        whole: by its name, why a matrix stays whole.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


def divide(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], ranks: int, *, shared: Collection[str] = ()
) -> Divided:
    """Find what of `block` can be divided among `ranks`.

    Args:
        block: nothing of it is changed.
        args: what its forward is called with, tensors of the same shapes; fake ones do.
        kwargs: likewise.
        ranks: number of them.
        shared: names of parameters that others use as well, which stay whole.

    Source: the module's docstring.
    """
    matrices = [name for name, parameter in block.named_parameters() if parameter.dim() > 1]
    whole = dict.fromkeys(shared, "it is used outside of the block as well")
    stretches: dict[str, tuple[int, ...]] = {}
    while True:
        run = _Run(block, ranks, whole, stretches)
        run(args, kwargs)
        if not run.refused and not run.separated:
            undivided = [name for name in matrices if name not in run.parts]
            return Divided(
                parts=run.parts, whole={name: whole.get(name, "it meets no product") for name in undivided}
            )
        stretches |= run.separated
        whole |= run.refused


class _AgainError(BaseException):
    """Ends a run that has found what the next one is to do otherwise; no error, so that no block catches it."""


class _Run(OnParts):
    """One run of a block: `parts` is what it divides, `refused` what may not be, and why."""

    def __init__(
        self, block: nn.Module, ranks: int, whole: Mapping[str, str], stretches: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(Shapes(ranks))
        self._block, self._whole, self._stretches = block, whole, stretches
        self.parts: dict[str, Part] = {}
        self.refused: dict[str, str] = {}
        # Stretches of matrices, that were found to go different ways.
        self.separated: dict[str, tuple[int, ...]] = {}
        self._names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self._used_otherwise: set[str] = set()

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the block forward on fakes of its parameters and of what it is called with."""
        fakes = compat.fake_tensor_mode()
        state = {name: fakes.from_tensor(one) for name, one in self._block.named_buffers()}
        for name, parameter in self._block.named_parameters():
            state[name] = nn.Parameter(fakes.from_tensor(parameter.detach()), parameter.requires_grad)
            self._names[state[name]] = name
        args, kwargs = map_tensors((tuple(args), dict(kwargs)), fakes.from_tensor)
        try:
            with fakes, compat.silent_fakes(), torch.enable_grad(), self:
                output = torch.func.functional_call(self._block, state, args, dict(kwargs))
            self._look_at(output)
        except Exception as error:  # whatever the rules have to say, or the block about fakes
            if not self.refused and not self.separated:
                self._give_up(error)
        except _AgainError:
            pass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, a product with its matrix divided where it may be."""
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs)
        if any_part((*args, *kwargs.values())) and _in_autograd_function():
            self._refuse(tensors_in((tuple(args), kwargs)), "an autograd function of the user's takes it")
            raise _AgainError
        if product is not None and product.weight in self._names and not _in_autograd_function():
            args, kwargs = self._divided(product)
        elif func is F.multi_head_attention_forward:
            result = self.taken_apart(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif not _reads_attribute(func):
            self._note_use(args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def computed_whole(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Nothing: parts would have to be gathered, so their origins are refused."""
        self._refuse(tensors_in((tuple(args), kwargs)), f"{called(func)} would have to gather it")
        # What comes after would meet other inputs than in the next run.
        raise _AgainError

    def reduced(self, partial: Tensor, operands: Sequence[Part]) -> Tensor:
        """The sum of what only rows of a matrix may leave to be summed."""
        origins = [part.origins for part in operands if part.origins]
        if len(origins) > 1:
            self._refuse_names(frozenset().union(*origins), "a product of two that are divided would have to be summed")
            raise _AgainError
        return super().reduced(partial, operands)

    def offered(self, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        """A matrix and its bias, divided by their outputs as `part` where they may be."""
        name = self._names.get(weight)
        if name is None or name in self._whole:
            return weight, bias
        return self._column(name, weight, bias, part)

    def separates(self, part: Part, sizes: Sequence[int]) -> None:
        """Note the stretches of the matrices that `part` comes from."""
        for name in part.origins:
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
        """The arguments of a product, its matrix and bias divided as its input has it."""
        name, part = self._names[product.weight], part_of(product.input)
        weight, bias = product.weight, product.bias
        if name not in self._whole:
            if part is None:
                pieces = self._stretches.get(name, (weight.shape[product.outputs],))
                weight, bias = self._column(name, weight, bias, Part(product.outputs, pieces))
            elif part.dim == product.input.dim() - 1 and weight.shape[1 - product.outputs] == part.size:
                weight = self._noted(name, weight, Part(1 - product.outputs, part.pieces), frozenset())
        return product.again(weight, bias)

    def _column(self, name: str, weight: Tensor, bias: Tensor | None, part: Part) -> tuple[Tensor, Tensor | None]:
        of_bias = None if bias is None else self._names.get(bias)
        if any(piece % self.ranks.size for piece in part.pieces):
            sizes = " and ".join(str(piece) for piece in dict.fromkeys(part.pieces))
            self._refuse_names([name], f"{sizes} is not divisible by {self.ranks.size}")
        elif of_bias is not None and of_bias in self._whole:
            self._refuse_names([name], f"its bias stays whole: {self._whole[of_bias]}")
        else:
            weight = self._noted(name, weight, part, frozenset([name]))
            if bias is not None and of_bias is not None:
                bias = self._noted(of_bias, bias, part.at(0), frozenset([name]))
        return weight, bias

    def _noted(self, name: str, whole: Tensor, part: Part, origins: frozenset[str]) -> Tensor:
        """The part of a parameter, which is what it is divided into from now on."""
        if self.parts.setdefault(name, part) != part:
            self._refuse_names([name], "it is used in several products, which would divide it in several ways")
        own = cut(whole, part, self.ranks.rank, self.ranks.size)
        return as_part(own, Part(part.dim, part.pieces, origins))

    def _note_use(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for tensor in tensors_in((tuple(args), dict(kwargs))):
            if (name := self._names.get(tensor)) is not None:
                self._used_otherwise.add(name)

    def _look_at(self, output: Any) -> None:
        self._refuse(tensors_in(output), "its result leaves the block divided")
        self._refuse_names(self._used_otherwise & self.parts.keys(), "it is used in other ways than in products")

    def _give_up(self, error: Exception) -> None:
        why = f"the block cannot run {'with it divided' if self.parts else 'on fake tensors'}: {error}"
        self._refuse_names(self.parts or [*self._names.values()], why)

    def _refuse(self, tensors: Sequence[Tensor], why: str) -> None:
        parts = [part for tensor in tensors if (part := part_of(tensor)) is not None]
        self._refuse_names(frozenset().union(*(part.origins for part in parts)), why)

    def _refuse_names(self, names: Collection[str], why: str) -> None:
        # What was divided in stretches on trial is the first to blame.
        on_trial = [name for name in names if name in self._stretches]
        self.refused |= {name: why for name in on_trial or names if name not in self._whole | self.refused}


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of an input, contracted in its last dimension, with a matrix.

    Attributes:
        input: the other operand.
        weight: the matrix.
        bias: what is added to the result, None without.
        outputs: the dimension of `weight` that the result's last one comes from; the other is contracted.
        again: the arguments of the call with another matrix and bias.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: int
    again: Callable[[Tensor, Tensor | None], tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def of(cls, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """The product that a call of torch is, None where it is no such."""
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


def _in_autograd_function() -> bool:
    """Whether the forward of an autograd function of the user's runs, whose backward goes by no rule."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is torch.autograd.Function.apply.__code__:
            return True
        frame = frame.f_back
    return False


def _reads_attribute(function: Callable[..., Any]) -> bool:
    return getattr(function, "__name__", "") == "__get__"
