"""Sharded copies of a sharded module, such as the averages of its weights that callbacks keep.

A copy has the module's own class, and each rank's shards as parameters, which suffice for averaging and swapping. Its
forward, for example of a teacher, unshards all of them while it runs. It loads full tensors as the module does: each
rank takes its slice. Submodules, such as an encoder, may be copied like the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.parallel.chunks import empty_part
from lightning_largescale.parallel.equal import equal_weights
from lightning_largescale.parallel.order import as_ordered, as_whole, divided, full, order_of, whole_of
from lightning_largescale.parallel.rows import global_shape, own_rows, rows_of
from lightning_largescale.parallel.sharded import gathering_attributes, reshard, sharded_state
from lightning_largescale.parallel.stored import Stored

# Approximate bytes of copies that are moved to the rank's device at a time: not all of them may fit.
_BATCH_BYTES = 16 * 2**20
# Placeholder in a copy for objects that are not copied, until it is removed.
_LEFT_OUT = object()


def find_copies(holders: Iterable[object], module: nn.Module) -> Iterator[nn.Module]:
    """Yield modules with the parameters of `module` that `holders` have as an attribute, or in an AveragedModel.

    Args:
        holders: objects such as callbacks.
        module: the module, sharded or not; neither it nor its submodules are copies.
    """
    shapes, own = _shapes(module), {*module.modules()}
    for holder in holders:
        for value in vars(holder).values():
            inner = value.module if isinstance(value, AveragedModel) else value
            if isinstance(inner, nn.Module) and inner not in own and shapes and _shapes(inner) == shapes:
                yield inner


def equal_copies(copies: Iterable[nn.Module], device: torch.device, *, buffers_only: bool = False) -> None:
    """Broadcast rank 0's values of the unsharded tensors of `copies` to all ranks; a collective.

    Args:
        copies: the copies, as many on every rank, on any device.
        device: this rank's device.
        buffers_only: whether to leave out parameters.
    """
    batch: list[Tensor] = []
    for one in copies:
        for tensor in (*(() if buffers_only else one.parameters()), *one.buffers()):
            batch.append(tensor)
            if sum(waiting.nbytes for waiting in batch) >= _BATCH_BYTES:
                _equal(batch, device)
                batch.clear()
    _equal(batch, device)


def shard_copies(copies: Iterable[nn.Module], module: nn.Module) -> None:
    """Shard `copies` of the sharded `module` as the module is; a collective.

    Ranks get slices of rank 0's values, on the copy's device. Copies that are sharded already do not change.
    """
    targets = dict(module.named_parameters(remove_duplicate=False))
    for one in copies:
        if not any(isinstance(parameter, DTensor) for parameter in one.parameters()):
            _replace(one, lambda name, parameter: _slice(parameter, targets[name]))
            _equip(one)


def whole_copies(copies: Iterable[nn.Module]) -> None:
    """Replace the shards of `copies` by full plain parameters on the same device; a collective."""
    for one in copies:
        _replace(one, lambda _, parameter: _whole(parameter))
        _remove_hooks(one, _gathers)


def average_shards(holders: Iterable[object]) -> None:
    """Make AveragedModels that `holders` have as an attribute average both shards and plain tensors.

    torch averages lists of tensors in one operation, which does not accept a mixture of both.
    """
    for holder in holders:
        for value in vars(holder).values():
            if isinstance(value, AveragedModel) and value.avg_fn is None:
                average = value.multi_avg_fn or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
                value.multi_avg_fn = average if isinstance(average, _OnShards) else _OnShards(average)


def enable_copies(module: nn.Module) -> None:
    """Make `copy.deepcopy` copy the sharded `module` and its submodules, and `load_state_dict` accept full tensors."""
    state = sharded_state(module)
    assert state is not None
    for part in module.modules():
        # Python looks it up on the object first; that of FSDP's class raises.
        vars(part)["__deepcopy__"] = partial(_deepcopy, module, part)
    state.hooks += exchange_states(module)


def disable_copies(module: nn.Module) -> None:
    """Undo `enable_copies` except for its hooks, which are removed with those that unshard."""
    for part in module.modules():
        # The module may have new submodules since it was sharded.
        vars(part).pop("__deepcopy__", None)


def exchange_states(module: nn.Module) -> list[RemovableHandle]:
    """Make `module.load_state_dict` accept full tensors for shards, and `module.state_dict` mark the element order.

    Both work without communication.

    Returns:
        The handles of the hooks.
    """
    tells = [part.register_state_dict_post_hook(_tell_order) for part in module.modules()]  # type: ignore[no-untyped-call]
    return [module.register_load_state_dict_pre_hook(_divide), *tells]  # type: ignore[no-untyped-call]


def divided_like(value: Any, target: Any) -> Any:
    """Return `value` sharded as `target`, without communication, if it is the full tensor of `target`; else `value`."""
    if not isinstance(target, Tensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    rows = rows_of(target)
    if rows is not None and value.shape == global_shape(target):
        if not isinstance(value, Stored):
            return own_rows(value, rows).to(target.device)
        own = empty_part(target, dtype=value.dtype)
        value.read(own)
        return own
    if not isinstance(target, DTensor):
        return value
    # A stored tensor is read when it is copied, and only as far as needed.
    if value.shape != target.shape or isinstance(value, Stored):
        return value
    return divided(value.to(target.device), target, order_of(target))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _equal(tensors: Iterable[Tensor], device: torch.device) -> None:
    plain = [tensor.detach() for tensor in tensors if not isinstance(tensor, DTensor)]
    on_device = [tensor.to(device) for tensor in plain]
    equal_weights(on_device)
    for tensor, equal in zip(plain, on_device, strict=True):
        tensor.copy_(equal)


def _replace(module: nn.Module, by: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter by the result of `by`, called with its name and the parameter; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        own, _ = compat.own_tensors(part)
        for name, parameter in [(name, kept) for name, kept in own.items() if kept is not None]:
            if parameter not in made:
                made[parameter] = by(f"{prefix}.{name}" if prefix else name, parameter)
            own[name] = made[parameter]


def _equip(one: nn.Module) -> None:
    """Make the forward of `one`, a sharded copy, unshard it, and its `load_state_dict` accept full tensors."""
    _remove_hooks(one, _gathers)
    exchange_states(one)
    for part in _outermost_callable(one):
        _Gathering(part)


def _outermost_callable(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `module`, or the members of a list or dict of modules that has no forward of its own."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
        for child in module.children():
            yield from _outermost_callable(child)
    else:
        yield module


class _Gathering:
    """Hooks that give a copy full parameters while its forward runs; a collective."""

    def __init__(self, one: nn.Module) -> None:
        self._shards: list[dict[nn.Parameter, nn.Parameter]] = []
        one.register_forward_pre_hook(self._before)
        one.register_forward_hook(self._after, always_call=True)

    def _before(self, one: nn.Module, args: Any) -> None:
        shards: dict[nn.Parameter, nn.Parameter] = {}

        def gather(_: str, shard: nn.Parameter) -> nn.Parameter:
            whole = _whole(shard)
            shards[whole] = shard
            return whole

        _replace(one, gather)
        self._shards.append(shards)

    def _after(self, one: nn.Module, args: Any, output: Any) -> None:
        shards = self._shards.pop()
        _replace(one, lambda _, whole: shards.get(whole, whole))


def _slice(parameter: nn.Parameter, target: nn.Parameter) -> nn.Parameter:
    _equal([parameter], target.device)
    # A view would keep the full tensor in memory.
    shard = divided_like(parameter.detach(), target).to(parameter.device).clone()
    return _as_told(nn.Parameter(shard, requires_grad=parameter.requires_grad), target)


def _as_told(shard: nn.Parameter, like: nn.Parameter) -> nn.Parameter:
    """Mark `shard` with the element order and full parameter of `like`; return it."""
    return as_whole(as_ordered(shard, order_of(like)), whole_of(like))


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    on_device: Any = parameter.detach().to(parameter.device_mesh.device_type)
    whole = full(on_device, order_of(parameter)).to(parameter.device).clone()
    return whole_of(parameter).parameter(whole, parameter)


class _OnShards:
    """An average of lists of tensors that uses each rank's shards."""

    def __init__(self, average: Callable[..., Any]) -> None:
        self._average = average

    def __call__(self, averaged: Iterable[Tensor], current: Iterable[Tensor], number: Tensor | int) -> Any:
        return self._average([*map(local_of, averaged)], [*map(local_of, current)], number)


def _divide(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    reshard(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if prefix + name in state:
            state[prefix + name] = divided_like(state[prefix + name], parameter)


def _tell_order(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(state.get(prefix + name), DTensor):
            as_ordered(state[prefix + name], order_of(parameter))


def _deepcopy(root: nn.Module, module: nn.Module, memo: dict[int, Any]) -> Any:
    """Return a copy of `module`, the sharded `root` or one of its submodules; called by `copy.deepcopy`."""
    copied = _copied_group if isinstance(module, FSDPModule) else _copied_part
    if id(_LEFT_OUT) in memo:
        return copied(module, memo)
    memo[id(_LEFT_OUT)] = _LEFT_OUT
    reshard(root)
    _remember_shards(module, memo)
    made = copied(module, memo)
    del memo[id(_LEFT_OUT)]
    _remove_hooks(made, lambda hook: hook is _LEFT_OUT)
    for part in made.modules():
        for name in compat.sharding_attributes():
            vars(part).pop(name, None)
    _equip(made)
    return made


def _copied_group(group: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of `group`, of the class that it had before it was sharded."""
    plain = next(kind for kind in type(group).__mro__ if not issubclass(kind, FSDPModule))
    made: Any = plain.__new__(plain)
    memo[id(group)] = made
    # The class chooses what to copy: a LightningModule leaves its Trainer out. Python 3.10's object has no such method.
    state = getattr(group, "__getstate__", lambda: vars(group))()
    left_out = {"__deepcopy__", *gathering_attributes(), *compat.sharding_attributes()}
    made.__setstate__({key: copy.deepcopy(value, memo) for key, value in state.items() if key not in left_out})
    copied: nn.Module = made
    return copied


def _copied_part(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of `part`, which is not an FSDP group, as its class makes it."""
    copier = vars(part).pop("__deepcopy__")
    try:
        return copy.deepcopy(part, memo)
    finally:
        vars(part)["__deepcopy__"] = copier


def _remember_shards(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put new shards into `memo`, the results of a deep copy by id, and placeholders for hooks that unshard."""
    for part in module.modules():
        memo |= {id(hook): _LEFT_OUT for hooks in compat.hook_tables(part) for hook in hooks.values() if _gathers(hook)}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            shard = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            memo.setdefault(id(parameter), _as_told(shard, parameter))


def _remove_hooks(module: nn.Module, which: Callable[[Any], bool]) -> None:
    for part in module.modules():
        keys = [key for hooks in compat.hook_tables(part) for key, hook in hooks.items() if which(hook)]
        # Keys are unique among hooks; the options of a hook's registration have the hook's key in other dictionaries.
        for hooks in compat.hook_tables(part):
            for key in keys:
                hooks.pop(key, None)


def _gathers(hook: Any) -> bool:
    """Return whether FSDP or this package has registered `hook`."""
    function = hook.hook if hasattr(hook, "hook") else hook
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__module__", "")).startswith(("torch.distributed.", "lightning_largescale."))
