"""Tensor parallelism: shard a block's matrices over ranks, as `workload.shardable` found possible.

The block's own code runs on local tensors, and each rank computes its shard of the values between the matrices. The
code sees the full sizes, so that, for example, its number of heads keeps its meaning.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lightning_largescale import compat
from lightning_largescale.forward import Forward
from lightning_largescale.parallel.order import as_ordered
from lightning_largescale.parallel.tensor_ranks import MeshRanks
from lightning_largescale.workload.batch import map_tensors
from lightning_largescale.workload.blocks import find_blocks
from lightning_largescale.workload.parts import SEQUENCE, OnParts, Part, as_part, cut, sequence_in
from lightning_largescale.workload.workload import Divided


def divide_over(block: nn.Module, parts: Mapping[str, Part], mesh: DeviceMesh) -> None:
    """Shard parameters of `block` over `mesh`; `compute_on_parts` makes its forward compute with the shards.

    Each rank keeps its shard of the values that it has. Sharded parameters become DTensors, whose element order may
    differ from the user's (`parallel.order`); the others are not changed. Names and `state_dict` keys stay.

    Args:
        block: the block, its parameters equal on all ranks and on the mesh's device.
        parts: the division of its parameters by name in the block.
        mesh: a one-dimensional mesh of the tensor-parallel ranks.

    Source: the module's docstring.
    """
    ranks = MeshRanks(mesh)
    # A tied parameter stays tied.
    made = {
        id(parameter): _divided(parameter, parts[name], ranks, mesh)
        for name, parameter in block.named_parameters()
        if name in parts
    }
    for module in block.modules():
        own, _ = compat.own_tensors(module)
        own.update({name: made[id(parameter)] for name, parameter in own.items() if id(parameter) in made})


def compute_on_parts(
    block: nn.Module, parts: Mapping[str, Part], mesh: DeviceMesh, *, share_sequence: bool = False
) -> None:
    """Make the forward of `block` compute with tensor-parallel shards of its sharded parameters.

    The inputs of the forward must be plain tensors, equal on all ranks, and so are its outputs.

    Args:
        block: as for `divide_over`.
        parts: as for `divide_over`; the block is not changed if there are none.
        mesh: as for `divide_over`.
        share_sequence: whether each rank computes a shard of the sequence where ranks would repeat the same
            computation, in calls whose sequence can be sharded.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
    """
    if parts:
        _TensorParallelForward(block, _places(block, parts), MeshRanks(mesh), share_sequence=share_sequence).replace()


def compute_divided(
    module: nn.Module,
    divided: Mapping[str, Divided],
    mesh: DeviceMesh,
    *,
    share_sequence: bool,
    wraps: Sequence[str] = (),
) -> Callable[[Callable[[], Any]], Any] | None:
    """Make the blocks of `module` compute with tensor-parallel shards; return the result of `step_on_parts`.

    Args:
        module: the module.
        divided: the division of each block by name; "" is the rest of the module.
        mesh: as for `compute_on_parts`.
        share_sequence: as for `compute_on_parts`, in blocks that support it.
        wraps: modules whose parameters are in place only while they run.
    """
    blocks = find_blocks(module)
    for name, found in divided.items():
        if name:
            shared = share_sequence and found.sequence is not None
            compute_on_parts(blocks[name], found.parts, mesh, share_sequence=shared)
    return step_on_parts(module, divided[""].parts if "" in divided else {}, mesh, wraps=wraps)


def step_on_parts(
    module: nn.Module, parts: Mapping[str, Part], mesh: DeviceMesh, *, wraps: Sequence[str] = ()
) -> Callable[[Callable[[], Any]], Any] | None:
    """Return a runner of steps of `module` with tensor-parallel shards outside of its blocks; None without `parts`.

    Modules that own such parameters also compute with their shards when they are called outside of a step.

    Args:
        module: the module.
        parts: the tensor-parallel parts of its parameters, by name.
        mesh: as for `compute_on_parts`.
        wraps: as for `compute_divided`.
    """
    if not parts:
        return None
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        names = [name for name, _ in owner.named_parameters(recurse=False) if prefix + name in parts]
        if path:
            compute_on_parts(owner, {name: parts[prefix + name] for name in names}, mesh)
    always = {name: part for name, part in parts.items() if not name.startswith(tuple(f"{wrap}." for wrap in wraps))}
    return _StepOnParts(_places(module, always), MeshRanks(mesh))


def compute_plainly(module: nn.Module) -> None:
    """Undo `compute_on_parts`: restore every block's forward."""
    _TensorParallelForward.restore(module)


def _divided(parameter: nn.Parameter, part: Part, ranks: MeshRanks, mesh: DeviceMesh) -> nn.Parameter:
    # A copy, since a view would keep the full tensor in memory.
    local = cut(parameter.detach(), part, ranks.rank, ranks.size).clone()
    placed = DTensor.from_local(
        local, mesh, [Shard(part.dim)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return as_ordered(nn.Parameter(placed, parameter.requires_grad), part)


_Places = list[tuple[nn.Module, str, Part]]


def _places(block: nn.Module, parts: Mapping[str, Part]) -> _Places:
    """Return the modules and names under which `block` has the sharded parameters."""
    by_id = {id(parameter): parts[name] for name, parameter in block.named_parameters() if name in parts}
    return [
        (module, name, by_id[id(parameter)])
        for module in block.modules()
        for name, parameter in compat.own_tensors(module)[0].items()
        if id(parameter) in by_id
    ]


@contextmanager
def _parts(places: _Places) -> Iterator[None]:
    """Context in which modules have local shards in place of sharded parameters; full parameters stay in place."""
    local: dict[int, Tensor] = {}
    before: list[tuple[MutableMapping[str, Any], str, Any]] = []
    try:
        for module, name, part in places:
            own, _ = compat.own_tensors(module)
            parameter = own[name]
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in local:
                local[id(parameter)] = as_part(parameter.to_local(), part)
            before.append((own, name, parameter))
            own[name] = local[id(parameter)]
        yield
    finally:
        for own, name, parameter in before:
            own[name] = parameter


class _StepOnParts:
    """Runs steps of a module with tensor-parallel shards, and returns full tensors."""

    def __init__(self, places: _Places, ranks: MeshRanks) -> None:
        self._places, self._ranks = places, ranks

    def __call__(self, step: Callable[[], Any]) -> Any:
        with _parts(self._places), _engine(self._ranks) as engine:
            return _whole(engine, step())


class _TensorParallelForward(Forward):
    """A block's forward with tensor-parallel shards of its parameters and full outputs."""

    def __init__(self, block: nn.Module, places: _Places, ranks: MeshRanks, *, share_sequence: bool) -> None:
        super().__init__(block)
        self._places, self._ranks, self._share_sequence = places, ranks, share_sequence

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outermost = _running.engine is None
        with _parts(self._places), _engine(self._ranks) as engine:
            hidden = sequence_in((args, kwargs), self._ranks.size) if self._share_sequence else None
            if hidden is None:
                with engine.scope(None):
                    output = self.original(*args, **kwargs)
                # Within a step later code may compute with shards as well.
                return _whole(engine, output) if outermost else output
            length = hidden.shape[1]
            part = Part(1, (length,), SEQUENCE)
            with compat.without_function_modes():
                own = as_part(self._ranks.own(hidden, part), part)
            args, kwargs = map_tensors((args, kwargs), lambda one: own if one is hidden else one)
            with engine.scope(length):
                output = self.original(*args, **kwargs)
            return _whole(engine, output)


def _whole(engine: OnParts, output: Any) -> Any:
    """Return `output` with full tensors in place of shards."""
    with compat.without_function_modes():
        return map_tensors(output, engine.whole)


class _Running(threading.local):
    engine: _Engine | None = None


_running = _Running()


class _Engine(OnParts):
    """The engine of this thread; code that torch calls back, such as forwards in a backward, starts its own engine."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before, _running.engine = _running.engine, None
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            _running.engine = before


@contextmanager
def _engine(ranks: MeshRanks) -> Iterator[OnParts]:
    """Context with the engine that runs on this thread, or with a new one until the context ends."""
    if _running.engine is not None:
        yield _running.engine
        return
    _running.engine = _Engine(ranks)
    try:
        with _running.engine:
            yield _running.engine
    finally:
        _running.engine = None
