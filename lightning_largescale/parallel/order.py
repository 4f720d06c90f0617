"""Convert sharded tensors to full tensors and back, also if a rank's shard consists of several stretches.

Each tensor-parallel rank has some of q, k and v of a matrix that holds them side by side. Its DTensor, and those of its
gradient and optimizer state, therefore have another element order than the user's tensor. The parameter is marked with
this order. All code that converts between shards and full tensors uses this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate

from lightning_largescale.groups import carrying_device
from lightning_largescale.parallel.tensor_ranks import MeshRanks
from lightning_largescale.workload.parts import Part, cut, share

_ATTRIBUTE, _WHOLE = "_largescale_order", "_largescale_whole"
_Tensor = TypeVar("_Tensor", bound=Tensor)


def as_ordered(parameter: _Tensor, part: Part | None) -> _Tensor:
    """Mark the DTensor `parameter` with its tensor-parallel `part` if that changes the element order; return it."""
    if part is not None and len(part.pieces) > 1:
        setattr(parameter, _ATTRIBUTE, part)
    return parameter


def order_of(parameter: object) -> Part | None:
    """Return the tensor-parallel part of a parameter if it changes the element order, else None."""
    return getattr(parameter, _ATTRIBUTE, None)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of `tensor` in memory order, outermost first; None if they lie in their own order."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    # The sort is stable: among equal strides the first dimension comes first.
    dims = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return None if dims == [*range(tensor.dim())] else tuple(dims)


@dataclass(frozen=True)
class Whole:
    """Memory order and class of the full parameter that a shard stands for.

    Attributes:
        dims: the result of `memory_order` for the full parameter.
        kind: the class of the full parameter.
    """

    dims: tuple[int, ...] | None = None
    kind: type[nn.Parameter] = nn.Parameter

    def laid_out(self, values: Tensor) -> Tensor:
        """Return the full `values` laid out in memory order `dims`, or `values` itself if `dims` is None."""
        if self.dims is None:
            return values
        back = map(self.dims.index, range(len(self.dims)))
        return values.permute(*self.dims).contiguous().permute(*back)

    def parameter(self, values: Tensor, shard: nn.Parameter) -> nn.Parameter:
        """Return a full parameter of `values`, with the attributes of `shard`."""
        made = nn.Parameter(self.laid_out(values), requires_grad=shard.requires_grad)
        made.__class__ = self.kind
        vars(made).update({name: value for name, value in vars(shard).items() if name not in (_ATTRIBUTE, _WHOLE)})
        return made


def as_whole(parameter: _Tensor, whole: Whole) -> _Tensor:
    """Mark the DTensor `parameter` with the layout and class of its full parameter; return it."""
    if whole != Whole():
        setattr(parameter, _WHOLE, whole)
    return parameter


def whole_of(parameter: object) -> Whole:
    """Return the layout and class of the full parameter."""
    return getattr(parameter, _WHOLE, Whole())


def full(tensor: Tensor, part: Part | None = None) -> Tensor:
    """Return the full tensor of a DTensor, in the user's element order, by a collective; any other tensor as it is.

    Args:
        tensor: a parameter, its gradient or its state, sharded over the last mesh axis first, then over the others.
        part: `order_of` the parameter, if `tensor` is not marked itself.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    part = part or order_of(tensor)
    if not divided_dims(tensor):
        return _replicated(tensor)
    local = tensor.to_local().detach()
    whole: Tensor = local.to(carrying_device(local))
    for axis, level in enumerate(_levels(tensor)):
        if level is not None:
            dim, size = level
            pieces = Part(dim, (size,))
            if axis == tensor.device_mesh.ndim - 1 and has_order(part, tensor):
                assert part is not None
                pieces = part
            whole = MeshRanks(tensor.device_mesh, axis).whole(whole, pieces)
    return whole.to(local.device)


def divided(whole: Tensor, like: DTensor, part: Part | None = None) -> DTensor:
    """Shard `whole` as `like` is, onto its device, without communication.

    Args:
        whole: the full tensor, equal on all ranks and in the user's element order.
        like: a parameter, its gradient or its state.
        part: `order_of` the parameter.
    """
    mesh, local = like.device_mesh, whole
    for axis, placement in reversed([*enumerate(like.placements)]):
        dim = divided_dim(placement)
        if dim is None:
            continue
        pieces = Part(dim, (local.shape[dim],))
        if axis == mesh.ndim - 1 and has_order(part, like):
            assert part is not None
            pieces = part
        local = cut(local, pieces, mesh.get_local_rank(axis), mesh.size(axis))
    # A view would keep the full tensor in memory.
    local = local if local is whole else local.clone()
    shape, stride = whole.shape, whole.contiguous().stride()
    # `from_local` moves it to the mesh's device, where offloaded parameters are not.
    made = DTensor.from_local(local, mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return made.to(like.device)  # type: ignore[return-value]


def has_order(part: Part | None, tensor: DTensor) -> bool:
    """Return whether `tensor`, a parameter, gradient or state, has the element order of the parameter's `part`."""
    return part is not None and tensor.dim() > part.dim and tensor.shape[part.dim] == part.size


def _levels(tensor: DTensor) -> list[tuple[int, int] | None]:
    """Return, by mesh axis, the dimension that it shards and its size on this rank after the later axes sharded it.

    The entry of an axis that replicates is None.
    """
    mesh, shape = tensor.device_mesh, [*tensor.shape]
    levels: list[tuple[int, int] | None] = [None] * mesh.ndim
    for axis, placement in reversed([*enumerate(tensor.placements)]):
        if (dim := divided_dim(placement)) is not None:
            levels[axis] = dim, shape[dim]
            shape[dim] = share(shape[dim], mesh.get_local_rank(axis), mesh.size(axis))[1]
    return levels


def _replicated(tensor: DTensor) -> Tensor:
    """Return the full tensor, redistributed one mesh axis at a time, since torch warns if it is all of them at once."""
    for axis in range(tensor.device_mesh.ndim):
        placements = [*tensor.placements]
        placements[axis] = Replicate()
        tensor = tensor.redistribute(tensor.device_mesh, placements)
    return tensor.to_local()


def divided_dim(placement: Placement) -> int | None:
    """Return the dimension that `placement` shards; None if it replicates.

    The placement of FSDP2 for a dimension that tensor parallelism also shards is no `Shard`, but has a `dim`.
    """
    return getattr(placement, "dim", None)


def divided_dims(tensor: Tensor) -> list[int]:
    """Return the dimensions that `tensor` is sharded along, one per sharding mesh axis."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return [dim for placement in placements if (dim := divided_dim(placement)) is not None]
