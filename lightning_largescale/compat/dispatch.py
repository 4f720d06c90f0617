"""Private APIs of operators and of the modes that intercept them: dispatch modes, function modes, fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Base class of modes that intercept every operation below autograd, in `__torch_dispatch__`. Replaced by a public name.
DispatchMode = TorchDispatchMode


def without_function_modes() -> Any:
    """Return a context in which no torch function mode is active.

    Replaced by a public context; the code of a mode runs in it beside the code that the mode intercepts.
    """
    return torch._C.DisableTorchFunction()


def without_dispatch_modes() -> Any:
    """Return a context in which no dispatch mode is active, so that operations on plain tensors give plain tensors.

    Replaced by a public context; the values of a tensor that was made outside the modes are read in it.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def call_as_tensor(function: Any, args: Any, kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`, called without `__torch_function__` of tensor subclasses.

    Replaced by a public name for it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def function_getter(name: str) -> Any:
    """Return the function that a torch function mode receives when code reads the attribute `name` of a tensor.

    Replaced by a public name for it, other than in `torch.overrides.get_testing_overrides`.
    """
    return getattr(torch._C.TensorBase, name).__get__


def function_setter(name: str) -> Any:
    """Return the function that a torch function mode receives when code sets the attribute `name` of a tensor.

    Replaced as `function_getter`.
    """
    return getattr(torch._C.TensorBase, name).__set__


def view_base_getter() -> Any:
    """Return the function that a torch function mode receives when code asks of which tensor another is a view.

    Replaced as `view_base`.
    """
    return function_getter("_base")


def fake_tensor_mode() -> Any:
    """Return a mode in which operations compute shapes and dtypes only; real tensors may enter it.

    Replaced by a public FakeTensorMode; imported here since the import takes a second.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def silent_fakes() -> Iterator[None]:
    """Context in which an operation that fails on fake tensors raises and logs nothing of torch's own code.

    Replaced by a public name for that logger.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_fake(tensor: Any) -> bool:
    """Return whether `tensor` has a shape and no data.

    Replaced by a public `torch.is_fake`.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a fake tensor for an operation that needs values, or a shape that depends on values.

    Replaced by public names of these exceptions.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return DataDependentOutputException, DynamicOutputShapeException


def is_operator(function: Any) -> bool:
    """Return whether `function`, as a dispatch mode receives it, is an operator with a schema, not a higher-order one.

    Replaced by a public name of the class of operators.
    """
    return isinstance(function, torch._ops.OpOverload)


def mutated_arguments(function: Any) -> tuple[str | int, ...]:
    """Return the positions of the arguments that an operator writes into; the names of keyword-only ones.

    Replaced by a public `OpOverload.schema`.
    """
    arguments = function._schema.arguments
    return tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def argument(function: Any, name: str, args: Any, kwargs: Any, without: Any) -> Any:
    """Return an argument of a call of an operator.

    Replaced by a public `OpOverload.schema`.

    Args:
        function: The operator.
        name: The name of the argument.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        without: The result if the operator has no such argument.
    """
    for place, known in enumerate(function._schema.arguments):
        if known.name == name:
            return args[place] if place < len(args) else kwargs.get(name, known.default_value)
    return without


def returns_tensors(function: Any) -> bool:
    """Return whether a call of an operator may return a tensor.

    Replaced by a public `OpOverload.schema`.
    """
    return any("Tensor" in str(result.type) for result in function._schema.returns)


def returns_views(function: Any) -> bool:
    """Return whether an operator returns a view of an argument that it does not write into.

    Replaced by a public `OpOverload.schema`.
    """
    results = function._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in results)


def foreach_kind(function: Any) -> str | None:
    """Return what a function does to the list of tensors that is its first argument: "norms", "unscale" (as a
    GradScaler does) or "in place"; None for a function that is none of these.

    Replaced by public names of `torch._foreach_norm` and the like, which torch.nn.utils and torch.amp call.
    """
    return _FOREACH_KINDS.get(function)


# Made once: every function of a step is looked up.
_FOREACH_KINDS = {
    getattr(torch, name): "in place" for name in dir(torch) if name.startswith("_foreach_") and name.endswith("_")
} | {torch._foreach_norm: "norms", torch._amp_foreach_non_finite_check_and_unscale_: "unscale"}


def assert_async(condition: Any, message: str) -> None:
    """Stop the device, when it reaches this point, unless `condition` is true.

    Replaced by a public name for it.
    """
    torch._assert_async(condition, message)
