"""Materialize a module that was built on the meta device; each rank makes or reads only its own shards.

The module is sharded while its parameters are on the meta device. Then the recorded construction is replayed, one
tensor at a time, and each rank keeps its shard. The values equal those of a plain construction on the CPU.

Source: torch.distributed.fsdp.fully_shard, which takes modules on the meta device; `parallel.deferred`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_largescale import comm, compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import let_rest, trim_heap
from lightning_largescale.parallel.chunks import empty_part, write_part
from lightning_largescale.parallel.deferred import Recording
from lightning_largescale.parallel.order import as_ordered, order_of
from lightning_largescale.parallel.stored import Stored, forget_stored, stored_for
from lightning_largescale.workload.batch import map_tensors, tensors_in

# Bytes of full tensors to free before memory is returned to the system: each return walks the heap.
_RELEASE_BYTES = 64 * 2**20


@dataclass(eq=False, kw_only=True)
class Unmade:
    """The tensors of a module that have no values yet.

    Attributes:
        recordings: the recordings of its construction.
        tensors: parameters and buffers by name, as recorded; tied ones under their first name.
        others: tensors in plain attributes of its submodules, or in lists, tuples and dicts there.
    """

    recordings: list[Recording]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: list[Tensor] = field(default_factory=list)


def find_unmade(module: nn.Module, recordings: Iterable[Recording]) -> Unmade | None:
    """Return the tensors of `module` that are recorded or stored in files and not made yet; None if all have values.

    Raises:
        PlanError: a parameter or buffer is on the meta device, and neither a recording nor a file has its values.
    """
    every = [*recordings]

    def known(tensor: Tensor) -> bool:
        stored = tensor.is_meta and stored_for(tensor) is not None
        return stored or any(recording.holds(tensor) for recording in every)

    tensors = {name: tensor for name, tensor in _named_tensors(module) if known(tensor)}
    others = {id(one): one for _, _, value in _attributes(module) for one in tensors_in(value) if known(one)}
    for name, tensor in _named_tensors(module):
        if tensor.is_meta and name not in tensors:
            raise PlanError(
                f"{name!r} is on the meta device, so it has no values; build the module with its values, or, where each"
                " process is to make its part alone, in configure_model or in Trainer.init_module(empty_init=True)."
            )
    if not tensors and not others:
        return None
    found = [*tensors.values(), *others.values()]
    used = [recording for recording in every if any(recording.holds(one) for one in found)]
    return Unmade(recordings=used, tensors=tensors, others=[*others.values()])


def agree_on_values(unmade: Unmade | None) -> bool:
    """Set rank 0's random state on all ranks if their recordings are equal; return whether they are. A collective."""
    recordings = [] if unmade is None else unmade.recordings
    own = [(recording.digest(), recording.random_state) for recording in recordings]
    told = comm.all_gather_object((unmade is None, own))
    digests = [(nothing, [digest for digest, _ in states]) for nothing, states in told]
    if any(one != digests[0] for one in digests):
        return False
    for recording, (_, state) in zip(recordings, told[0][1], strict=True):
        recording.random_state = state
    return True


def materialize(
    module: nn.Module,
    unmade: Unmade,
    device: torch.device,
    *,
    given: Collection[str] = (),
    random: bool = True,
    memory_of: Callable[[Tensor], Tensor | None] = lambda target: None,
) -> None:
    """Materialize `module` on `device`; sharded tensors get this rank's shard.

    Args:
        module: the module, unsharded or sharded on the meta device.
        unmade: the tensors without values, found before `module` was sharded.
        device: this rank's device.
        given: names of tensors to allocate only, since their values come from elsewhere.
        random: whether to make all draws, so that the generator ends as after a plain construction.
        memory_of: returns the memory for this rank's shard of a parameter; None to allocate it.
    """
    current = dict(_named_tensors(module))
    made = _Made(device, memory_of)
    takers: list[tuple[Tensor, Callable[[Any], None]]] = []
    for name, recorded in unmade.tensors.items():
        take = partial(made.take, current[name])
        if name in given or stored_for(recorded) is not None:
            take(None if name in given else stored_for(recorded))
        else:
            takers.append((recorded, take))
    # Plain attributes are made on the CPU, where the code that uses them expects them.
    takers += [(one, partial(made.take_all, one)) for one in unmade.others]
    for recording in unmade.recordings:
        recording.replay([(one, take) for one, take in takers if recording.holds(one)], random=random)
    _replace(module, made.tensors)
    # Freed draws leave holes in the heap.
    trim_heap()


def make_again(module: nn.Module, unmade: Unmade, names: Collection[str]) -> None:
    """Write the constructed values into tensors of `module` that `materialize` only allocated."""
    current = dict(_named_tensors(module))
    for recording in unmade.recordings:
        recording.replay(
            [
                (one, partial(_write, current[name]))
                for name, one in unmade.tensors.items()
                if name in names and recording.holds(one)
            ],
            random=False,
        )


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write full tensors, stored or not, into parameters and buffers of `module` by name, each rank its shard."""
    current = dict(_named_tensors(module))
    for name, value in values.items():
        _write(current[name], value)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move `module` to `device`, except meta tensors and shards, which are already on their device."""
    stays = [tensor.is_meta or isinstance(tensor, DTensor) for _, tensor in _named_tensors(module)]
    if device.type == "meta" or not any(stays):
        module.to(device)
        return
    for (_, tensor), stay in zip(_named_tensors(module), stays, strict=True):
        if not stay:
            tensor.data = tensor.data.to(device)


class _Made:
    """Materialized tensors by the id of the meta tensor that they replace."""

    def __init__(self, device: torch.device, memory_of: Callable[[Tensor], Tensor | None]) -> None:
        self.tensors: dict[int, Tensor] = {}
        self._device, self._memory_of = device, memory_of
        # Bytes of full tensors freed since memory was last returned to the system.
        self._gone = 0

    def take(self, target: Tensor, values: Any) -> None:
        """Materialize the meta tensor `target` from its full values, or from a source that reads them."""
        if self._gone >= _RELEASE_BYTES:
            self._gone = 0
            trim_heap()
        tensor = empty_part(target, device=self._device, own=self._memory_of(target))
        if values is not None:
            _write(tensor, values)
            self._gone += values.nbytes if isinstance(values, Tensor) else 0
        if isinstance(target, nn.Parameter):
            parameter = nn.Parameter(tensor, requires_grad=target.requires_grad)
            forget_stored(target)
            vars(parameter).update(vars(target))
            before, after = compat.gradient_hooks(target)
            for hook in before:
                parameter.register_hook(hook)  # type: ignore[no-untyped-call]
            for hook in after:
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            tensor = as_ordered(parameter, order_of(target))
        self.tensors[id(target)] = tensor

    def take_all(self, target: Tensor, values: Any) -> None:
        """Materialize `target`, which is no parameter or buffer, in full on the CPU."""
        whole = empty_part(target, device=torch.device("cpu"))
        _write(whole, values)
        self.tensors[id(target)] = whole


def _write(tensor: Tensor, values: Any) -> None:
    """Write a full tensor, or a source that reads one, into this rank's shard."""
    if not isinstance(values, Tensor) or isinstance(values, Stored):
        values.read(tensor)
    else:
        write_part(tensor, values)
    let_rest(local_of(tensor))


def _replace(module: nn.Module, made: Mapping[int, Tensor]) -> None:
    """Put the materialized tensors in all places of the tensors that they replace."""
    for part in module.modules():
        for own in compat.own_tensors(part):
            own.update({name: made[id(tensor)] for name, tensor in own.items() if id(tensor) in made})
    for holder, key, value in _attributes(module):
        if any(id(one) in made for one in tensors_in(value)):
            holder[key] = map_tensors(value, lambda one: made.get(id(one), one))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, except uninitialized ones of lazy modules."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if not is_lazy(tensor):
            yield name, tensor


def _attributes(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str, Any]]:
    """Yield the attributes of submodules that may be or hold tensors and are neither parameters nor buffers."""
    for part in module.modules():
        registered = [id(own) for own in compat.own_tensors(part)]
        for key, value in [*vars(part).items()]:
            if isinstance(value, Tensor | list | tuple | dict) and id(value) not in registered:
                yield vars(part), key, value
