"""The classes of a sharded module's parameters, as user code sees them.

A parameter is two objects. The optimizer has the shard, a DTensor. While its FSDP group is unsharded, an autograd leaf
takes the shard's place; its memory is freed at reshard. These classes make both behave as one parameter. Values that
are written into the leaf are copied to the shard before reshard. Assignments to `data` or `requires_grad` of either
apply to both, and so do gradients (`parallel.by_hand`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.parallel.shard_writes import fill_randomly, write_in_place, write_item

if TYPE_CHECKING:
    from lightning_largescale.parallel.watched import Watched

# Attribute in which a parameter keeps a weak reference to its `Watched`.
WATCHED = "_largescale_watched"
# Attribute of a leaf that is not watched, since the user's torch.compile traces its module.
TRACED = "_largescale_traced"
# Attribute in which a tensor that is derived from a parameter keeps its name.
_NAME = "_largescale_name"
DATA: Any = Tensor.data
GRADIENT: Any = Tensor.grad
TRAINED: Any = Tensor.requires_grad
_DRAWS = ("normal_", "uniform_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_")


def watched(parameter: object) -> Watched | None:
    """Return the `Watched` of `parameter`; None if it is not watched."""
    found = vars(parameter).get(WATCHED) if isinstance(parameter, _GradientAccess | ShardValues) else None
    return None if found is None else found()


def name_of(tensor: DTensor) -> str:
    """Return the name of the parameter that `tensor` is, or is derived from; else a description by its shape."""
    found = watched(tensor)
    if found is not None:
        return found.one.name
    return str(vars(tensor).get(_NAME, f"a tensor of shape {tuple(tensor.shape)}"))


@contextlib.contextmanager
def writing(tensors: Sequence[Any]) -> Iterator[None]:
    """Context in which one operation writes into the shards, or shard values, among `tensors`."""
    with contextlib.ExitStack() as every:
        for tensor in tensors:
            found = watched(tensor) if isinstance(tensor, ShardValues) else None
            if found is not None:
                every.enter_context(found.writing_shard())
        yield


def _named(tensor: Any, name: str) -> Any:
    if isinstance(tensor, DTensor):
        vars(tensor)[_NAME] = name
    return tensor


class Adopted(nn.Module):
    """Holder through which a group has parameters of other groups' modules; the group replaces them only here."""


class _GradientAccess:
    """Gradient access that leaf and shard share."""

    @property
    def grad(self) -> Tensor | None:
        """The parameter's gradient, whether the leaf or the shard has it."""
        found = watched(self)
        if found is None or found.reducing:
            return GRADIENT.__get__(self)  # type: ignore[no-any-return]
        return _named(found.gradient(), f"the gradient of {found.one.name}")  # type: ignore[no-any-return]

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        found = watched(self)
        if found is None or found.reducing:
            GRADIENT.__set__(self, value)
        else:
            # Modes by which the user's code reads shards would take what is computed here for the user's.
            with compat.without_function_modes():
                found.set_gradient(value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    @property
    def requires_grad(self) -> bool:
        """Return whether the parameter is trained."""
        return TRAINED.__get__(self)  # type: ignore[no-any-return]

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        found = watched(self)
        if found is None:
            TRAINED.__set__(self, trained)
        else:
            found.train(trained)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or unfreeze the parameter."""
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _plain(self, copied=True)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(_plain(self), protocol)


def _reduced(tensor: Any, protocol: Any) -> Any:
    return tensor.__reduce_ex__(protocol)


def _plain(parameter: Any, *, copied: bool = False) -> Tensor:
    """Return a parameter of the user's class with the same values, or with a copy of them and of the gradient."""
    values = Tensor.detach(parameter)
    made = nn.Parameter(values.clone() if copied else values, requires_grad=TRAINED.__get__(parameter))
    if isinstance(parameter, GatheredParameter):
        made.__class__ = parameter.kind
    if copied and parameter.grad is not None:
        made.grad = parameter.grad.detach().clone()
    return made


class _Leaf(_GradientAccess):
    """The autograd leaf that is in place while a group is unsharded."""

    @property
    def data(self) -> Tensor:
        """The leaf's values."""
        found = watched(self)
        return DATA.__get__(self) if found is None else found.leaf_data()

    @data.setter
    def data(self, value: Tensor) -> None:
        found = watched(self)
        if found is None:
            DATA.__set__(self, value)
        else:
            found.assign_leaf(value)

    def detach(self) -> Tensor:
        """Return the leaf's values."""
        return Tensor.detach(_exposed(self))

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Return the leaf's values as an array."""
        return Tensor.numpy(_exposed(self), *args, **kwargs)


def _exposed(leaf: Any) -> Any:
    found = watched(leaf)
    if found is not None:
        found.expose()
    return leaf


class GatheredParameter(_Leaf, nn.Parameter):
    """The leaf of an unsharded parameter.

    Attributes:
        kind: the user's class of the parameter.
    """

    kind: type[nn.Parameter] = nn.Parameter


@functools.cache
def gathered_class(kind: type[nn.Parameter]) -> type[GatheredParameter]:
    """Return the leaf class for parameters of the user's class `kind`."""
    return GatheredParameter if kind is nn.Parameter else type(kind.__name__, (GatheredParameter, kind), {"kind": kind})


@contextlib.contextmanager
def plain_leaves(module: nn.Module) -> Iterator[None]:
    """Context in which leaves of `module` have the user's classes: torch.compile traces no others."""
    leaves = [(one, type(one)) for one in module.parameters() if isinstance(one, GatheredParameter)]
    try:
        for leaf, _ in leaves:
            leaf.__class__ = leaf.kind  # type: ignore[assignment]
        yield
    finally:
        for leaf, gathered in leaves:
            leaf.__class__ = gathered


class GatheredShard(_Leaf, DTensor):
    """The leaf of a parameter that stays sharded by tensor parallelism when its group is unsharded."""


class ShardValues(DTensor):
    """Values of a shard; writes into them take the values of the full parameter."""

    def __setitem__(self, index: Any, value: Any) -> None:
        found = watched(self)
        if found is None:
            super().__setitem__(index, value)
        else:
            write_item(found, self, index, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), Tensor.detach(self).clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(Tensor.detach(self), protocol)


class ShardParameter(_GradientAccess, ShardValues):
    """The shard of a parameter."""

    @property
    def data(self) -> Tensor:
        """The shard's values."""
        found, values = watched(self), DATA.__get__(self)
        return values if found is None else found.hand_out(values, data=True)

    @data.setter
    def data(self, value: Tensor) -> None:
        found = watched(self)
        if found is None:
            DATA.__set__(self, value)
        else:
            found.assign_shard(value)

    def detach(self) -> Any:
        """Return the shard's values."""
        found, values = watched(self), Tensor.detach(self)
        return values if found is None else found.hand_out(values, data=False)


def _drawing(method: str) -> Callable[..., Any]:
    def draw(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = watched(self)
        if found is None:
            return getattr(super(ShardValues, self), method)(*args, **kwargs)
        fill_randomly(found, method, self, *args, **kwargs)
        return self

    return draw


def _writing(method: str) -> Callable[..., Any]:
    function = getattr(DTensor, method)

    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = watched(self)
        return (
            function(self, *args, **kwargs) if found is None else write_in_place(found, function, self, *args, **kwargs)
        )

    return write


_NO_WRITES = {"requires_grad_", "detach_", "share_memory_", "resize_", "resize_as_", "set_", "rename_"}
for _name in dir(Tensor):
    _in_place = _name.endswith("_") and not _name.startswith("_")
    if _name in _DRAWS:
        setattr(ShardValues, _name, _drawing(_name))
    elif (_in_place and _name not in _NO_WRITES) or _name in ("__iadd__", "__isub__", "__imul__", "__itruediv__"):
        setattr(ShardValues, _name, _writing(_name))
