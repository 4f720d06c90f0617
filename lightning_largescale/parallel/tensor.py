"""Tensor parallelism: a block's matrices divided among ranks, as `workload.shardable` found that they can be.

The block's own code runs, on local tensors, each rank computing its part of what lies between the matrices; sizes are
those of the whole, so that a number of heads that the code holds means what it meant.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lightning_largescale import compat
from lightning_largescale.parallel.order import as_ordered
from lightning_largescale.parallel.tensor_ranks import MeshRanks
from lightning_largescale.workload.batch import map_tensors
from lightning_largescale.workload.parts import OnParts, Part, as_part, cut, part_of


def divide_over(block: nn.Module, parts: Mapping[str, Part], mesh: DeviceMesh) -> None:
    """Divide parameters of `block` over `mesh`, of one dimension, and let its forward compute with the parts.

    Outside of its forward tensors are plain: what it is given must be equal on all ranks, and so is what it returns.
    Each rank takes its part of the values that it has. Divided parameters are DTensors from now on, whose elements may
    stand in another order than the user's (`parallel.order`); the others stay as they are. Names and `state_dict` keys
    stay.

    Args:
        block: its parameters equal on all ranks, on the device of the mesh.
        parts: by name in the block. Without any the block is left as it is.
        mesh: of the ranks that it is divided among.

    Source: the module's docstring.
    """
    if not parts:
        return
    ranks = MeshRanks(mesh)
    made: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, Part]] = []
    for path, module in block.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = parts.get(f"{path}.{name}" if path else name)
            if part is not None:
                # By its first name; one that stands in several places stays one.
                made[id(parameter)] = _divided(parameter, part, ranks, mesh)
    by_id = {id(parameter): parts[name] for name, parameter in block.named_parameters() if name in parts}
    for module in block.modules():
        own, _ = compat.own_tensors(module)
        for name, parameter in list(own.items()):
            if id(parameter) in made:
                places.append((module, name, by_id[id(parameter)]))
                own[name] = made[id(parameter)]
    # The bound method is replaced, not the module: state_dict keys and isinstance checks stay the user's.
    block.forward = _OnRanks(block.forward, places, ranks)


def undo_division(module: nn.Module) -> None:
    """Give every block of `module` the forward it had before `divide_over`; its parameters are left as they are."""
    for block in module.modules():
        forward = vars(block).get("forward")
        if isinstance(forward, _OnRanks):
            del block.forward
            if getattr(block.forward, "__func__", None) is not getattr(forward.original, "__func__", None):
                block.forward = forward.original


def _divided(parameter: nn.Parameter, part: Part, ranks: MeshRanks, mesh: DeviceMesh) -> nn.Parameter:
    # A copy, or the whole would stay in memory behind its part.
    local = cut(parameter.detach(), part, ranks.rank, ranks.size).clone()
    placed = DTensor.from_local(
        local, mesh, [Shard(part.dim)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return as_ordered(nn.Parameter(placed, parameter.requires_grad), part)


class _OnRanks:
    """A block's forward, its divided parameters being parts, and what comes out of it whole."""

    def __init__(
        self, original: Callable[..., Any], places: list[tuple[nn.Module, str, Part]], ranks: MeshRanks
    ) -> None:
        self.original = original
        self._places, self._ranks = places, ranks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._parts(), _engine(self._ranks) as engine:
            output = self.original(*args, **kwargs)
            return map_tensors(output, engine.whole)

    @contextmanager
    def _parts(self) -> Iterator[None]:
        """Within, the modules have parts in the place of what is divided; where it is gathered, they have that."""
        local: dict[int, Tensor] = {}
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module, name, part in self._places:
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


class _Running(threading.local):
    engine: OnParts | None = None


_running = _Running()


@contextmanager
def _engine(ranks: MeshRanks) -> Iterator[OnParts]:
    """The engine that runs on this thread, or else a new one for the time being."""
    if _running.engine is not None:
        yield _running.engine
        return
    _running.engine = OnParts(ranks)
    try:
        with _running.engine:
            yield _running.engine
    finally:
        _running.engine = None
