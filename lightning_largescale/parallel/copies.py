"""Copies of a sharded module, such as the averages of its weights that callbacks keep: divided as the module is.

A copy has the module's own class and each rank's shards as parameters, which is all that averaging and swapping need.
Its forward, as of a teacher, gathers all of them for as long as it takes. Full tensors are loaded into it as into the
module, each rank taking its part. A copy of a part of the module, such as its encoder, is as one of the whole.
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
from lightning_largescale.parallel.chunks import empty_part
from lightning_largescale.parallel.equal import equal_weights
from lightning_largescale.parallel.gather import gathering_attributes, reshard, sharded_state
from lightning_largescale.parallel.order import as_ordered, as_whole, divided, full, order_of, whole_of
from lightning_largescale.parallel.rows import global_shape, own_rows, rows_of
from lightning_largescale.parallel.stored import Stored

# Tensors of copies are moved to the rank's device about as many bytes at a time: all of them need not fit there.
_BATCH_BYTES = 16 * 2**20
# Stands in a copy for what is not copied, until it is taken out.
_LEFT_OUT = object()


def find_copies(holders: Iterable[object], module: nn.Module) -> Iterator[nn.Module]:
    """Modules that `holders` have as an attribute, or inside an AveragedModel, with the parameters of `module`.

    Args:
        holders: objects such as callbacks.
        module: whole or sharded; neither it nor a part of it is a copy.
    """
    shapes, own = _shapes(module), {*module.modules()}
    for holder in holders:
        for value in vars(holder).values():
            inner = value.module if isinstance(value, AveragedModel) else value
            if isinstance(inner, nn.Module) and inner not in own and shapes and _shapes(inner) == shapes:
                yield inner


def equal_copies(copies: Iterable[nn.Module], device: torch.device, *, buffers_only: bool = False) -> None:
    """Give every rank rank 0's values of what `copies` hold whole: a collective.

    Args:
        copies: as many on every rank, on any device, each made from what the rank had drawn.
        device: of this rank.
        buffers_only: leave parameters alone.
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
    """Divide whole `copies` of `module`, which is sharded, as it is: a collective.

    Ranks get slices of rank 0's values, on the device where the copy was. What is divided already is left alone.
    """
    targets = dict(module.named_parameters(remove_duplicate=False))
    for one in copies:
        if not any(isinstance(parameter, DTensor) for parameter in one.parameters()):
            _replace(one, lambda name, parameter: _slice(parameter, targets[name]))
            _equip(one)


def whole_copies(copies: Iterable[nn.Module]) -> None:
    """Give divided `copies` full plain parameters, where they are: a collective."""
    for one in copies:
        _replace(one, lambda _, parameter: _whole(parameter))
        _remove_hooks(one, _gathers)


def average_shards(holders: Iterable[object]) -> None:
    """Let AveragedModels that `holders` have as an attribute average what is sharded beside what is whole.

    torch averages lists of tensors in one operation, which does not take both.
    """
    for holder in holders:
        for value in vars(holder).values():
            if isinstance(value, AveragedModel) and value.avg_fn is None:
                average = value.multi_avg_fn or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
                value.multi_avg_fn = average if isinstance(average, _OnShards) else _OnShards(average)


def enable_copies(module: nn.Module) -> None:
    """Let `copy.deepcopy` copy `module`, just sharded, and parts of it, and `load_state_dict` take full tensors."""
    state = sharded_state(module)
    assert state is not None
    for part in module.modules():
        # Python looks a copier up on the object, and finds this one before the refusal that is FSDP's.
        vars(part)["__deepcopy__"] = partial(_deepcopy, module, part)
    state.hooks += exchange_states(module)


def disable_copies(module: nn.Module) -> None:
    """Undo `enable_copies`, but for its hook, which goes with those that gather."""
    for part in module.modules():
        # The module may have parts by now that it had not when it was sharded.
        vars(part).pop("__deepcopy__", None)


def exchange_states(module: nn.Module) -> list[RemovableHandle]:
    """Let `module.load_state_dict` take full tensors for parameters that are divided, without communication, and
    `module.state_dict` tell the order of what it gives.
    """
    tells = [part.register_state_dict_post_hook(_tell_order) for part in module.modules()]  # type: ignore[no-untyped-call]
    return [module.register_load_state_dict_pre_hook(_divide), *tells]  # type: ignore[no-untyped-call]


def divided_like(value: Any, target: Any) -> Any:
    """`value` divided as `target` is, without communication, where both are the same tensor but for that."""
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
    # What is in a file is read when it is copied, and no more of it than is asked for.
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
    """Put what `by` makes of a name and a parameter in its place, once of those that are tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        own, _ = compat.own_tensors(part)
        for name, parameter in [(name, kept) for name, kept in own.items() if kept is not None]:
            if parameter not in made:
                made[parameter] = by(f"{prefix}.{name}" if prefix else name, parameter)
            own[name] = made[parameter]


def _equip(one: nn.Module) -> None:
    """Let `one`, a divided copy, compute and take full tensors."""
    _remove_hooks(one, _gathers)
    exchange_states(one)
    for part in _outermost_callable(one):
        _Gathering(part)


def _outermost_callable(module: nn.Module) -> Iterator[nn.Module]:
    """`module`, or what is called of a mere list or dict of modules."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
        for child in module.children():
            yield from _outermost_callable(child)
    else:
        yield module


class _Gathering:
    """Full parameters for a copy while its forward runs: a collective."""

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
    # Or the whole would stay in memory behind the slice.
    shard = divided_like(parameter.detach(), target).to(parameter.device).clone()
    return _as_told(nn.Parameter(shard, requires_grad=parameter.requires_grad), target)


def _as_told(shard: nn.Parameter, like: nn.Parameter) -> nn.Parameter:
    """`shard` told of its whole what `like` is told."""
    return as_whole(as_ordered(shard, order_of(like)), whole_of(like))


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    on_device: Any = parameter.detach().to(parameter.device_mesh.device_type)
    whole = full(on_device, order_of(parameter)).to(parameter.device).clone()
    return whole_of(parameter).parameter(whole, parameter)


class _OnShards:
    """An average of lists of tensors, taken of each rank's shards."""

    def __init__(self, average: Callable[..., Any]) -> None:
        self._average = average

    def __call__(self, averaged: Iterable[Tensor], current: Iterable[Tensor], number: Tensor | int) -> Any:
        return self._average([_local(tensor) for tensor in averaged], [_local(tensor) for tensor in current], number)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    """A copy of `module`, a part of the sharded `root` or itself, as `copy.deepcopy` asks for it."""
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
    """A copy of `group`, of the class that it had before it was sharded."""
    plain = next(kind for kind in type(group).__mro__ if not issubclass(kind, FSDPModule))
    made: Any = plain.__new__(plain)
    memo[id(group)] = made
    # What the class says is to be copied: a LightningModule leaves its Trainer out. Python 3.10 has no such method.
    state = getattr(group, "__getstate__", lambda: vars(group))()
    left_out = {"__deepcopy__", *gathering_attributes(), *compat.sharding_attributes()}
    made.__setstate__({key: copy.deepcopy(value, memo) for key, value in state.items() if key not in left_out})
    copied: nn.Module = made
    return copied


def _copied_part(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of `part`, no group, made as its class says."""
    copier = vars(part).pop("__deepcopy__")
    try:
        return copy.deepcopy(part, memo)
    finally:
        vars(part)["__deepcopy__"] = copier


def _remember_shards(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a copier find in its memo, which says what objects become, shards of its own, and no hooks that gather."""
    for part in module.modules():
        memo |= {id(hook): _LEFT_OUT for hooks in compat.hook_tables(part) for hook in hooks.values() if _gathers(hook)}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            shard = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            memo.setdefault(id(parameter), _as_told(shard, parameter))


def _remove_hooks(module: nn.Module, which: Callable[[Any], bool]) -> None:
    for part in module.modules():
        keys = [key for hooks in compat.hook_tables(part) for key, hook in hooks.items() if which(hook)]
        # Under a hook's key, which no other hook has, stand also the options that it was registered with.
        for hooks in compat.hook_tables(part):
            for key in keys:
                hooks.pop(key, None)


def _gathers(hook: Any) -> bool:
    """Whether FSDP or this package has registered `hook`."""
    function = hook.hook if hasattr(hook, "hook") else hook
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__module__", "")).startswith(("torch.distributed.", "lightning_largescale."))
