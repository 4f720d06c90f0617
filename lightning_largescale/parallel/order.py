"""Full tensors of what is divided, and back: also where a rank's part is of several stretches of the whole.

Of a matrix that holds q, k and v side by side each rank of tensor parallelism has some of each. Its DTensor, and those
of its gradient and optimizer state, thus stand for a tensor whose elements are in another order than the user's, which
the parameter is told of. Whatever leaves or enters the ranks as a whole goes through here.
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
    """`parameter`, a DTensor, told that its ranks have parts as `part` says."""
    if part is not None and len(part.pieces) > 1:
        setattr(parameter, _ATTRIBUTE, part)
    return parameter


def order_of(parameter: object) -> Part | None:
    """The parts that the ranks have of a parameter, where these change the order of its elements."""
    return getattr(parameter, _ATTRIBUTE, None)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of `tensor` as they lie in memory, the outermost first; None where that is their own order."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    # Of equal strides the first dimension first.
    dims = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return None if dims == [*range(tensor.dim())] else tuple(dims)


@dataclass(frozen=True)
class Whole:
    """What the whole is like that a sharded parameter stands for, beside its values.

    Attributes:
        dims: how it lies in memory, as `memory_order` says.
        kind: its class.
    """

    dims: tuple[int, ...] | None = None
    kind: type[nn.Parameter] = nn.Parameter

    def laid_out(self, values: Tensor) -> Tensor:
        """`values`, of the whole, in memory as it was; itself where they are."""
        if self.dims is None:
            return values
        back = map(self.dims.index, range(len(self.dims)))
        return values.permute(*self.dims).contiguous().permute(*back)

    def parameter(self, values: Tensor, shard: nn.Parameter) -> nn.Parameter:
        """The whole of `shard`, with its attributes."""
        made = nn.Parameter(self.laid_out(values), requires_grad=shard.requires_grad)
        made.__class__ = self.kind
        vars(made).update({name: value for name, value in vars(shard).items() if name not in (_ATTRIBUTE, _WHOLE)})
        return made


def as_whole(parameter: _Tensor, whole: Whole) -> _Tensor:
    """`parameter`, a DTensor, told what the whole of it is like."""
    if whole != Whole():
        setattr(parameter, _WHOLE, whole)
    return parameter


def whole_of(parameter: object) -> Whole:
    """What the whole of a parameter is like."""
    return getattr(parameter, _WHOLE, Whole())


def full(tensor: Tensor, part: Part | None = None) -> Tensor:
    """All of `tensor`, a DTensor, in the user's order: a collective.

    Args:
        tensor: a parameter, its gradient or its state; divided by the last axis of its mesh first, then by the others.
        part: `order_of` the parameter, where `tensor` is not told itself.
    """
    assert isinstance(tensor, DTensor)
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
    """`whole`, equal on all ranks and in the user's order, divided as `like` is and on its device, without
    communication.

    Args:
        whole: all of it.
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
    # Or the whole would stay in memory behind the part.
    local = local if local is whole else local.clone()
    shape, stride = whole.shape, whole.contiguous().stride()
    # It goes to the device of the mesh, which parameters that are offloaded are not on.
    made = DTensor.from_local(local, mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return made.to(like.device)  # type: ignore[return-value]


def has_order(part: Part | None, tensor: DTensor) -> bool:
    """Whether `tensor`, of a parameter that is in the order of `part`, is itself."""
    return part is not None and tensor.dim() > part.dim and tensor.shape[part.dim] == part.size


def _levels(tensor: DTensor) -> list[tuple[int, int] | None]:
    """By axis of the mesh, the dimension that it divides and its size as the axes after it leave it to this rank."""
    mesh, shape = tensor.device_mesh, [*tensor.shape]
    levels: list[tuple[int, int] | None] = [None] * mesh.ndim
    for axis, placement in reversed([*enumerate(tensor.placements)]):
        if (dim := divided_dim(placement)) is not None:
            levels[axis] = dim, shape[dim]
            shape[dim] = share(shape[dim], mesh.get_local_rank(axis), mesh.size(axis))[1]
    return levels


def _replicated(tensor: DTensor) -> Tensor:
    """The full tensor, by one axis of the mesh after the other; all at once torch warns that it does so."""
    for axis in range(tensor.device_mesh.ndim):
        placements = [*tensor.placements]
        placements[axis] = Replicate()
        tensor = tensor.redistribute(tensor.device_mesh, placements)
    return tensor.to_local()


def divided_dim(placement: Placement) -> int | None:
    """The dimension that `placement` divides; None where it does not.

    That of FSDP2 where tensor parallelism has divided the same dimension is no `Shard`.
    """
    return getattr(placement, "dim", None)


def divided_dims(tensor: Tensor) -> list[int]:
    """The dimensions in which `tensor` is divided, one as often as it is."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return [dim for placement in placements if (dim := divided_dim(placement)) is not None]
