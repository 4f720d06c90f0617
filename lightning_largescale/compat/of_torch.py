"""Private APIs of torch, but for torch.distributed."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Base class of what sees every operation below autograd, in `__torch_dispatch__`. Replaced by a public name for it.
DispatchMode = TorchDispatchMode


def compiled_module(module: Any) -> Any:
    """The module inside what `torch.compile(module)` returned; `module` itself when it is none such.

    Replaced by a public way from an OptimizedModule to the module it wraps.
    """
    from torch import nn

    inner = dict(all_children(module)).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module


def assert_async(condition: Any, message: str) -> None:
    """Have the device stop, when it comes to it, unless `condition` is true.

    Replaced by a public name for it.
    """
    import torch

    torch._assert_async(condition, message)


def is_compiled(module: Any) -> bool:
    """Whether `torch.compile(module)` made `module`, or `module.compile()` was called; of a LightningModule also
    whether a Trainer was given what `torch.compile(module)` made.

    Replaced by a public way to ask.
    """
    of_trainer = vars(module).get("_compiler_ctx") is not None
    return compiled_module(module) is not module or module._compiled_call_impl is not None or of_trainer


def has_full_backward_hooks(module: Any) -> bool:
    """Whether `register_full_backward_hook`, or its `pre`, was called of a part of `module`, or of all modules.

    Replaced by a public way to ask a module for its hooks.
    """
    from torch.nn.modules import module as torch_module

    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return True
    return any(part._backward_hooks or part._backward_pre_hooks for part in module.modules() if part is not module)


def all_children(module: Any) -> list[tuple[str, Any]]:
    """The children of `module` by name, one object as often as it stands there.

    Replaced by `named_children(remove_duplicate=False)`.
    """
    return [(name, child) for name, child in module._modules.items() if child is not None]


def fake_tensor_mode() -> Any:
    """A mode under which operations compute shapes and types only; tensors from outside may enter it.

    Replaced by a public FakeTensorMode; imported here since the import takes a second.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def silent_fakes() -> Iterator[None]:
    """Within, an operation that fails on fakes only raises; torch would log where in its own code it did.

    Replaced by a public name for that logger.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_fake(tensor: Any) -> bool:
    """Whether `tensor` has a shape and no data.

    Replaced by a public `torch.is_fake`.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """What a fake tensor raises where an operation needs data: a value, or a shape that follows from values.

    Replaced by public names of these exceptions.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return DataDependentOutputException, DynamicOutputShapeException


def without_function_modes() -> Any:
    """A context in which no torch function mode is active.

    Replaced by a public context; used where a mode's own code runs beside the code that the mode is for.
    """
    import torch

    return torch._C.DisableTorchFunction()


def without_dispatch_modes() -> Any:
    """A context in which no dispatch mode is active, so that operations on plain tensors give plain tensors.

    Replaced by a public context; used where a value is read from a tensor that was made outside the modes.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def sequence_number() -> int:
    """The number that the next autograd node made on this thread gets.

    Replaced by a public way to tell which forward code made a node.
    """
    return int(torch._C._autograd._get_sequence_nr())


def current_node_sequence() -> int | None:
    """The number of the autograd node that is running on this thread; None outside backward.

    Replaced by a public `torch.autograd.graph.current_node()` whose order can be asked.
    """
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def mutated_arguments(function: Any) -> tuple[str | int, ...]:
    """Positions, or names of those by keyword only, of the arguments that an operator writes into.

    Replaced by a public `OpOverload.schema`.
    """
    arguments = function._schema.arguments
    return tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def argument(function: Any, name: str, args: Any, kwargs: Any, without: Any) -> Any:
    """What a call of an operator has as its argument `name`; `without` where it has no such argument.

    Replaced by a public `OpOverload.schema`.
    """
    for place, known in enumerate(function._schema.arguments):
        if known.name == name:
            return args[place] if place < len(args) else kwargs.get(name, known.default_value)
    return without


def is_transformed(tensor: Any) -> bool:
    """Whether `tensor` is what torch.func hands to a function that it transforms: it has no storage.

    Replaced by a public name of torch.func's, which has none.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_operator(function: Any) -> bool:
    """Whether `function`, as a dispatch mode is given it, is an operator with a schema, and not one of higher order.

    Replaced by a public name of the class of operators.
    """
    return isinstance(function, torch._ops.OpOverload)


def alias(tensor: Any) -> Any:
    """A tensor with the data of `tensor` and without its graph, made inside a dispatch mode; a write into either counts
    as a version of both.

    Replaced by `Tensor.detach`, were it to share versions below autograd, as torch.utils.checkpoint needs it too.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def call_after_backward(tensor: Any, function: Any) -> None:
    """Call `function`, without arguments, at the end of each backward that goes through `tensor`.

    Replaced by a public `queue_callback` of the autograd engine, which FSDP2 and DistributedDataParallel use as well.
    """
    from torch.autograd import Variable

    tensor.register_hook(lambda _: Variable._execution_engine.queue_callback(function))


def dense_parts(tensor: Any) -> list[Any]:
    """The dense tensors that hold the data of `tensor`, to read and to write: itself; indices and values of a sparse
    one; the members of a nested one; the codes of a quantised one, as bytes; what a wrapper subclass holds; else none.

    Replaced by `Tensor.indices` and `Tensor.values`, were they to accept a sparse tensor that is not coalesced, and by
    public names for what the others hold.
    """
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in dense_parts(getattr(tensor, name))]
    if tensor.is_nested:
        return [part for member in tensor.unbind() for part in dense_parts(member)]
    if tensor.is_quantized:
        codes = tensor.untyped_storage()
        return [torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(codes)]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def is_wrapper(tensor: Any) -> bool:
    """Whether `tensor` is of a class, other than DTensor, that holds other tensors and has no data itself.

    Replaced by a public name for it.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or hasattr(tensor, "device_mesh"):
        return False
    return is_traceable_wrapper_subclass(tensor)


def own_tensors(module: Any) -> tuple[MutableMapping[str, Any], MutableMapping[str, Any]]:
    """The parameters and the buffers that `module` itself holds, by name; writing into these replaces them.

    Replaced by `setattr`, were it to accept any tensor as a parameter and leave subclasses' own `__setattr__` alone.
    """
    return module._parameters, module._buffers


def version(tensor: Any) -> int:
    """A number that grows with the operations that write into `tensor`.

    Replaced by a public `torch.Tensor.version`; to compare values would make a device wait.
    """
    return int(tensor._version)


def leaves(tree: Any) -> list[Any]:
    """What `tree`, of nested containers and dataclasses, holds that is none, as FSDP2 finds a forward's tensors.

    Replaced by a public name for `torch.utils._pytree.tree_leaves`.
    """
    from torch.utils._pytree import tree_leaves

    found: list[Any] = []
    for leaf in tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, one.name) for one in dataclasses.fields(leaf) if hasattr(leaf, one.name)])
        else:
            found.append(leaf)
    return found


def hook_nearest(optimizer: Any, before: Any, after: Any) -> Any:
    """Call `before` as the last before a step of `optimizer` and `after` as the first after it; what removes both.

    Replaced by a `prepend` argument of `Optimizer.register_step_post_hook`.
    """
    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    optimizer._optimizer_step_post_hooks.move_to_end(handles[1].id, last=False)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def without_step_hooks(optimizer: Any) -> Iterator[None]:
    """Within, no hooks around its step are called for `optimizer`, also by a step that calls its base class's.

    Replaced by a public way to step without them.
    """
    before = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before


def foreach_kind(function: Any) -> str | None:
    """What a function of torch does to the list of tensors that it takes first: "norms" of each, "unscale" them as a
    GradScaler does, or change them "in place"; None for every other function.

    Replaced by public names of `torch._foreach_norm` and the like, which torch.nn.utils and torch.amp call.
    """
    return _FOREACH_KINDS.get(function)


# Made once: every function of a step is looked up.
_FOREACH_KINDS = {
    getattr(torch, name): "in place" for name in dir(torch) if name.startswith("_foreach_") and name.endswith("_")
} | {torch._foreach_norm: "norms", torch._amp_foreach_non_finite_check_and_unscale_: "unscale"}


def tensor_without_values(kind: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of the class `kind`, which dispatches by itself, and without storage.

    Replaced by a public way to make a wrapper subclass of Tensor.
    """
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def call_as_tensor(function: Any, args: Any, kwargs: Any) -> Any:
    """`function(*args, **kwargs)` without asking what classes of tensors have to say to it above autograd.

    Replaced by a public name for it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def function_getter(name: str) -> Any:
    """What a torch function mode is given where code reads the attribute `name` of a tensor.

    Replaced by a public name for it, other than in `torch.overrides.get_testing_overrides`.
    """
    return getattr(torch._C.TensorBase, name).__get__


def function_setter(name: str) -> Any:
    """What a torch function mode is given where code sets the attribute `name` of a tensor.

    Replaced by a public name for it, other than in `torch.overrides.get_testing_overrides`.
    """
    return getattr(torch._C.TensorBase, name).__set__


def returns_tensors(function: Any) -> bool:
    """Whether a call of an operator may return a tensor.

    Replaced by a public `OpOverload.schema`.
    """
    return any("Tensor" in str(result.type) for result in function._schema.returns)


def gradient_hooks(tensor: Any) -> tuple[list[Any], list[Any]]:
    """What was registered with `tensor`, a leaf, by `register_hook`, and by `register_post_accumulate_grad_hook`.

    Replaced by a public way to ask a tensor for its hooks.
    """
    hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    before, after = ([*(one or {}).values()] for one in hooks)
    return before, after


def returns_views(function: Any) -> bool:
    """Whether an operator returns what shares memory with its arguments and is not told to be one of these.

    Replaced by a public `OpOverload.schema`.
    """
    results = function._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in results)


def storage_users(storage: Any) -> int:
    """How many tensors have this storage, of which `storage` is the one that Python holds; a graph's among them.

    Replaced by a public way to ask a storage for it.
    """
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def generator_key(generator: Any) -> int:
    """By which a generator is known, while it lives: operators are given another object for it each time.

    Replaced by `==` of generators, were it to compare them.
    """
    return int(generator._cdata)


# Of the state of a CPU generator: seed, two counters and a position, then the numbers of the Mersenne twister, each of
# four bytes in a place of eight.
_TWISTER_START, _TWISTER_BYTES = 24, 624 * 8
_MARK = b"largescale recording"


def marked_state(state: Any, number: int) -> Any:
    """A state for a CPU generator that says `number`, and has the seed of `state`; what is drawn from it is not random.

    Replaced by a way to be told of draws from a generator, and of its seeds and states that are asked for or set.
    """
    start, end = _TWISTER_START, _TWISTER_START + _TWISTER_BYTES
    content = bytearray(state.numpy().tobytes())
    mark = _MARK + number.to_bytes(8, "little")
    spread = b"".join(mark[place : place + 4] + bytes(4) for place in range(0, len(mark), 4))
    content[start:end] = spread.ljust(_TWISTER_BYTES, b"\0")
    return torch.frombuffer(content, dtype=torch.uint8)


def mark_of(state: Any) -> int | None:
    """The number that `marked_state` wrote into a state; None where it wrote none.

    Replaced with `marked_state`.
    """
    spread = state[_TWISTER_START : _TWISTER_START + 2 * len(_MARK) + 16].numpy().tobytes()
    mark = b"".join(spread[place : place + 4] for place in range(0, len(spread), 8))
    return int.from_bytes(mark[len(_MARK) :], "little") if mark.startswith(_MARK) else None
