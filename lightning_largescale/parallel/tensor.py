"""Tensor parallelism: a block's matrices divided among ranks, as `workload.shardable` found that they can be.

The block's own code runs, on DTensors: what it computes with has its global shape, so that a number of heads that it
holds means what it meant, and an operation that cannot go on divided communicates and is never wrong.

No Plan asks for it yet.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3; torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors
from lightning_largescale.workload.shardable import Divided, Entered, Product, know_attention


def divide_over(block: nn.Module, divided: Divided, mesh: DeviceMesh) -> None:
    """Divide the parameters of `block` over `mesh`, of one dimension, and let its forward compute with the parts.

    Outside of its forward tensors are plain: what it is given must be equal on all ranks, and so is what it returns.
    Parameters are DTensors from now on, rank 0's for all; buffers stay plain. Names and `state_dict` keys stay. A block
    of which nothing is divided is left as it is.

    Source: the module's docstring.
    """
    if not divided.dims:
        return
    know_attention()
    parts: dict[int, nn.Parameter] = {}
    for path, module in block.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # By its first name; one that stands in several places stays one.
            if id(parameter) not in parts:
                dim = divided.dims.get(f"{path}.{name}" if path else name)
                whole_or_part = distribute_tensor(
                    parameter.detach(), mesh, [Replicate() if dim is None else Shard(dim)]
                )
                parts[id(parameter)] = nn.Parameter(whole_or_part, parameter.requires_grad)
            compat.own_tensors(module)[0][name] = parts[id(parameter)]
    # The bound method is replaced, not the module: state_dict keys and isinstance checks stay the user's.
    block.forward = _OnRanks(block.forward, mesh)


class _OnRanks:
    """A block's forward with its tensors as DTensors, and what comes out of it plain again."""

    def __init__(self, original: Callable[..., Any], mesh: DeviceMesh) -> None:
        self.original, self._mesh = original, mesh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), self._enter)
        with implicit_replication(), _Products():
            return map_tensors(self.original(*args, **kwargs), _leave)

    def _enter(self, tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, self._mesh, [Replicate()], run_check=False)


def _leave(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(tensor.device_mesh, [Replicate()]).to_local()


class _Products(TorchFunctionMode):
    """Within, products with divided matrices communicate as `Product.on_ranks` has it, once for each row matrix."""

    def __init__(self) -> None:
        super().__init__()
        self._entered: Entered = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`."""
        product = Product.of(func, args, kwargs or {})
        if product is not None and isinstance(product.weight, DTensor) and isinstance(product.input, DTensor):
            return product.on_ranks(self._entered)
        return func(*args, **(kwargs or {}))
