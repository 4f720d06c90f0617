"""Which matrices of a block tensor parallelism divides, and how: found by running the block on DTensors.

The block runs on fake tensors, its parameters and activations DTensors of `tp` ranks, all of them whole at first. A
matrix that meets a whole input is divided by its outputs ("column"); one that meets an input that is divided where it
is contracted, by its inputs ("row"), and the partial sums of its result are added up. What lies between (views to
heads, attention, gates, functions of elements) is carried by DTensor's own rules. Where they cannot carry a division
they communicate, or refuse: then the matrices that it came from stay whole, and the block runs again. What is left
communicates where a division ends and, in backward, where it begins, and nowhere else; it is right by construction.

No Plan asks for it yet.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (column and row); torch.distributed.tensor, sharding propagation.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication, register_sharding
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Divided:
    """How the parameters of a block are divided among the ranks of tensor parallelism.

    Attributes:
        dims: by a parameter's name in the block, the dimension of it that is divided; others stay whole.
        whole: by its name, why a matrix stays whole.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


def divide(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], mesh: DeviceMesh) -> Divided:
    """Find what of `block` can be divided over `mesh`, which has one dimension.

    Args:
        block: nothing of it is changed.
        args: what its forward is called with, tensors of the same shapes; fake ones do.
        kwargs: likewise.
        mesh: of a fake process group: its collectives do nothing.

    Source: the module's docstring.
    """
    know_attention()
    matrices = [name for name, parameter in block.named_parameters() if parameter.dim() > 1]
    whole: dict[str, str] = {}
    while True:
        run = _Run(block, mesh, whole)
        refused = run(args, kwargs)
        if not refused:
            undivided = [name for name in matrices if name not in run.dims]
            return Divided(dims=run.dims, whole={name: whole.get(name, "it meets no product") for name in undivided})
        whole |= refused


# Inputs of column matrices, each as it was (version, whether gradients were recorded), and what the matrices got.
Entered = MutableMapping[Tensor, tuple[tuple[int, bool], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of an input, contracted in its last dimension, with a matrix.

    Attributes:
        input: the other operand.
        weight: the matrix.
        bias: what is added to the result, None without.
        outputs: the dimension of `weight` that the result's last one comes from; the other is contracted.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: int

    @classmethod
    def of(cls, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """The product that a call of torch is, None where it is no such."""
        if function is F.linear:
            given = _LINEAR.bind(*args, **kwargs).arguments
            return cls(input=given["input"], weight=given["weight"], bias=given.get("bias"), outputs=0)
        if function in _MATMULS and len(args) == 2 and not kwargs and args[1].dim() == 2:
            return cls(input=args[0], weight=args[1], bias=None, outputs=1)
        if function is torch.addmm and len(args) == 3 and not kwargs:
            return cls(input=args[1], weight=args[2], bias=args[0], outputs=1)
        return None

    def on_ranks(self, entered: Entered) -> Tensor:
        """The result, all operands being DTensors: divided after a column matrix, whole after a row matrix.

        Args:
            entered: of inputs that column matrices met before, what they were given for them: gradients for one input
                are added up there, once for all of its matrices.
        """
        given, weight = self.input, self.weight if self.outputs == 1 else self.weight.t()
        assert isinstance(given, DTensor)
        assert isinstance(self.weight, DTensor)
        if self.weight.placements[0].is_shard(self.outputs):
            given = _entering(given, entered)
        result = torch.matmul(given, weight)
        if self.weight.placements[0].is_shard(1 - self.outputs):
            assert isinstance(result, DTensor)
            result = result.redistribute(result.device_mesh, [Replicate()])
        return result if self.bias is None else result + self.bias


def _entering(given: DTensor, entered: Entered) -> Tensor:
    as_it_is = compat.version(given), torch.is_grad_enabled()
    if given not in entered or entered[given][0] != as_it_is:
        entered[given] = as_it_is, given.redistribute(given.device_mesh, [Replicate()])
    return entered[given][1]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """The arguments of `torch.nn.functional.linear`, which has no signature."""


_LINEAR = inspect.signature(_linear)
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm, torch.Tensor.__matmul__)


@functools.cache
def know_attention() -> None:
    """Tell DTensor that the CPU's attention computes batches and heads apart, as it knows of the CUDA kernels."""
    aten = torch.ops.aten
    apart = (Replicate(), Shard(0), Shard(1))

    def placements(results: int, operands: int, rest: Sequence[Any], mask: Any) -> list[Any]:
        found = []
        for one in apart:
            divided = mask is not None and isinstance(one, Shard) and mask.ndim == 4 and mask.shape[one.dim] > 1
            masks = [] if mask is None else [one if divided else Replicate()]
            found.append(([one] * results, [*[one] * operands, *[None] * len(rest), *masks]))
        return found

    @register_sharding(aten._scaled_dot_product_flash_attention_for_cpu.default)  # type: ignore[untyped-decorator]
    def _(query: Any, key: Any, value: Any, *rest: Any, attn_mask: Any = None, scale: Any = None) -> list[Any]:
        return placements(2, 3, rest, attn_mask)

    @register_sharding(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)  # type: ignore[untyped-decorator]
    def _(*args: Any, attn_mask: Any = None, scale: Any = None) -> list[Any]:
        return placements(3, 6, args[6:], attn_mask)


_NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd")


class _Communication(compat.DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives within, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with local tensors comes by as well
        name = func.overloadpacket.__name__
        if func.namespace in ("_c10d_functional", "c10d", "_dtensor") and name not in _NO_TRAFFIC:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Run(TorchFunctionMode):
    """One run of a block: `dims` is what it divides, and the call returns what may not be, and why."""

    def __init__(self, block: nn.Module, mesh: DeviceMesh, whole: Mapping[str, str]) -> None:
        super().__init__()
        self.block, self.mesh, self.whole = block, mesh, whole
        self.dims: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.communication = _Communication()
        # The matrices that the division of a tensor comes from.
        self.origins: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()
        self.entered: Entered = WeakTensorKeyDictionary()
        self.parameters = {name: self._replicated(parameter) for name, parameter in block.named_parameters()}
        self.names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self.names.update({parameter: name for name, parameter in self.parameters.items()})
        self.used_otherwise: set[str] = set()

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
        state = {**self.parameters, **{name: self._replicated(one) for name, one in self.block.named_buffers()}}
        args, kwargs = map_tensors((tuple(args), dict(kwargs)), self._replicated)
        with implicit_replication():
            try:
                with self.communication, self:
                    output = torch.func.functional_call(self.block, state, args, dict(kwargs))
                if not self.refused:
                    self._look_at(output)
                if not self.refused:
                    self._backward(output)
            except Exception as error:  # whatever DTensor has to say, or the block about DTensors
                if not self.refused:
                    self._give_up(error)
        return self.refused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs)
        if product is not None and (name := self.names.get(product.weight)) is not None:
            return self._product(name, product)
        tensors = [leaf for leaf in compat.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not _reads_attribute(func):
            self.used_otherwise |= {self.names[tensor] for tensor in tensors if tensor in self.names}
        before = self.communication.counts.total()
        try:
            result = func(*args, **kwargs)
        except Exception:
            self._refuse(tensors, f"{_called(func)} does not take its result divided")
            raise
        if self.communication.counts.total() > before:
            self._refuse(tensors, f"{_called(func)} would have to gather its result")
        self._note(result, frozenset().union(*(self.origins.get(one, frozenset()) for one in tensors)))
        return result

    def _product(self, name: str, product: Product) -> Tensor:
        dim = self._dim(name, product)
        if self.dims.get(name, dim) != dim:
            self._refuse_names([name], "it is used in several products, which would divide it in several ways")
        if dim is None:
            origins = self.origins.get(product.input, frozenset())
        else:
            self.dims[name] = dim
            column = dim == product.outputs
            origins = frozenset([name] if column else [])
            product = replace(product, weight=self._part(product.weight, dim))
            if column and product.bias is not None and (bias := self.names.get(product.bias)) is not None:
                self.dims[bias] = 0
                product = replace(product, bias=self._part(product.bias, 0))
        before = self.communication.counts.total()
        result = product.on_ranks(self.entered)
        if dim is None and self.communication.counts.total() > before:
            self._refuse([product.input], f"the product with {name} would have to gather its result")
        self._note(result, origins)
        return result

    def _dim(self, name: str, product: Product) -> int | None:
        """The dimension that the input has the matrix divided in."""
        if name in self.whole or not isinstance(product.input, DTensor):
            return None
        [placement] = product.input.placements
        if placement.is_replicate():
            dim = product.outputs
        elif placement.is_shard(product.input.dim() - 1):
            dim = 1 - product.outputs
        else:
            return None
        bias = None if product.bias is None else self.names.get(product.bias)
        if product.weight.shape[dim] % self.mesh.size():
            self._refuse_names([name], f"{product.weight.shape[dim]} is not divisible by {self.mesh.size()}")
        elif dim == product.outputs and bias is not None and bias in self.whole:
            self._refuse_names([name], f"its bias stays whole: {self.whole[bias]}")
        else:
            return dim
        return None

    def _look_at(self, output: Any) -> None:
        for leaf in compat.leaves(output):
            if isinstance(leaf, DTensor) and not leaf.placements[0].is_replicate():
                self._refuse([leaf], "its result leaves the block divided")
        self._refuse_names(self.used_otherwise & self.dims.keys(), "it is used in other ways than in products")

    def _backward(self, output: Any) -> None:
        losses = [leaf.sum() for leaf in compat.leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not losses:
            return
        with _Communication() as communication:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        if communication.counts.total() > communication.counts["all_reduce"]:
            self._refuse_names(self._matrices(), "gradients would have to be gathered")

    def _give_up(self, error: Exception) -> None:
        if self.dims:
            self._refuse_names(self._matrices(), f"the block cannot run with it divided: {error}")
        else:
            self._refuse_names(
                [name for name, one in self.parameters.items() if one.dim() > 1 and name not in self.whole],
                f"the block cannot run on DTensors: {error}",
            )

    def _matrices(self) -> list[str]:
        return [name for name in self.dims if self.parameters[name].dim() > 1]

    def _refuse(self, tensors: Sequence[Tensor], why: str) -> None:
        self._refuse_names(frozenset().union(*(self.origins.get(one, frozenset()) for one in tensors)), why)

    def _refuse_names(self, names: Any, why: str) -> None:
        self.refused |= {name: why for name in names if name not in self.refused}

    def _note(self, result: Any, origins: frozenset[str]) -> None:
        for leaf in compat.leaves(result):
            if isinstance(leaf, DTensor) and not leaf.placements[0].is_replicate():
                self.origins[leaf] = origins

    def _part(self, whole: Tensor, dim: int) -> Tensor:
        """A leaf in the place of `whole`, so that its gradient is divided as it is."""
        assert isinstance(whole, DTensor)
        part = distribute_tensor(whole.full_tensor().detach(), self.mesh, [Shard(dim)])
        return part.requires_grad_(whole.requires_grad)

    def _replicated(self, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.detach(), self.mesh, [Replicate()]).requires_grad_(tensor.requires_grad)


def _reads_attribute(function: Callable[..., Any]) -> bool:
    return getattr(function, "__name__", "") == "__get__"


def _called(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))
