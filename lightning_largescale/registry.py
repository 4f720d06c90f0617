"""The strings that `Trainer(strategy=...)` understands, each with a factory that imports what it needs when called."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.strategy import LargeScaleStrategy

# Names that are taken, so that what a user reads is the state of things and not that the name is unknown.
_NOT_YET = {
    "largescale_fsdp_8bit": "sharding with 8-bit optimizer state",
}


def fsdp_plan(hardware: Hardware) -> Plan:
    """The plan of `largescale_fsdp`: parameters, gradients and optimizer state divided among all processes (ZeRO-3).

    Source: Rajbhandari et al. 2020, "ZeRO", section 5.
    """
    return Plan(dp_shard=hardware.world_size)


def tp_plan(hardware: Hardware) -> Plan:
    """The plan of `largescale_tp`: matrices divided among the processes of a node, and a replica on each node.

    Source: Shoeybi et al. 2019, "Megatron-LM", section 3; Narayanan et al. 2021, "Efficient Large-Scale Language Model
        Training on GPU Clusters", section 3.2 (tensor parallelism within a node).
    """
    return Plan(tp=hardware.ranks_per_node, dp_replicate=hardware.nodes)


def fsdp_tp_plan(hardware: Hardware) -> Plan:
    """The plan of `largescale_fsdp_tp`: matrices divided among the processes of a node, and their parts among nodes.

    On a single node, in as few parts as divide its processes, and these among the rest.

    Source: as of `tp_plan`.
    """
    ranks = hardware.ranks_per_node
    tp = ranks if hardware.nodes > 1 else next((size for size in range(2, ranks + 1) if ranks % size == 0), 1)
    return Plan(tp=tp, dp_shard=hardware.world_size // tp)


def fsdp_cpu_offload_plan(hardware: Hardware) -> Plan:
    """The plan of `largescale_fsdp_cpu_offload`: ZeRO-3, with the shards of blocks and the optimizer's state in DRAM.

    Source: Ren et al. 2021, "ZeRO-Offload", section 4.
    """
    return Plan(dp_shard=hardware.world_size, offload_parameters="cpu", offload_optimizer="cpu")


def fsdp_nvme_offload_plan(hardware: Hardware) -> Plan:
    """The plan of `largescale_fsdp_nvme_offload`: ZeRO-3, with the shards of blocks, their gradients and the state of
    optimizers on the disk with the most free bytes.

    Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.
    """
    return Plan(dp_shard=hardware.world_size, offload_parameters="nvme", offload_optimizer="nvme")


def register_strategies(registry: Any) -> None:
    """Add our names to the `StrategyRegistry` of `lightning.pytorch.strategies`; doing it twice is doing it once.

    Args:
        registry: the registry, changed in place. Its type is private to Lightning; the methods used are public.
    """
    for name, (factory, description) in _strategies().items():
        registry.register(name, factory, description=description, override=True)
    # The Trainer answers an unknown name with a few examples; the registry answers with every name it knows. So that a
    # misspelt name of ours gets the second answer, the Trainer is let through to it.
    registry.available_strategies = lambda: _Names(registry)


def refuse_other_package(registry: Any) -> None:
    """Have the `StrategyRegistry` of `pytorch_lightning.strategies` answer our names and objects: which import to use.

    Args:
        registry: the registry, changed in place.
    """
    _answer(
        registry,
        "is for the Trainer of the package lightning and this one is pytorch_lightning's;"
        " use `from lightning.pytorch import Trainer`.",
    )


def refuse_fabric(registry: Any) -> None:
    """Have Fabric's `STRATEGY_REGISTRY` answer our names and objects: the Trainer is supported, Fabric is not yet.

    Args:
        registry: the registry, changed in place.
    """
    _answer(
        registry,
        "is for the Trainer and Fabric is not supported yet;"
        " train a LightningModule by `from lightning.pytorch import Trainer`.",
    )


def read_directories(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load`, by which Lightning reads checkpoints for `load_from_checkpoint` and for strategies other than ours,
    reading also those that are directories, and by slices where a module is built without values.

    Args:
        load: takes a path or file, `map_location` and `weights_only`.
    """
    if hasattr(load, "reads_directories"):
        return load

    @wraps(load)
    def read(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        from lightning_largescale.checkpoint import load_checkpoint

        return load_checkpoint(load, path_or_url, map_location=map_location, weights_only=weights_only)

    read.reads_directories = True  # type: ignore[attr-defined]
    return read


def _answer(registry: Any, reason: str) -> None:
    """Let `registry` answer our names and objects with a PlanError that ends in `reason`."""
    for name, (_, description) in _strategies().items():
        registry.register(name, partial(_refuse_use, repr(name), reason), description=description, override=True)
    # An object is looked for among the names before it is refused for its class, in a sentence that would not say why.
    registry.available_strategies = lambda: _NamesThatRefuse(registry, reason)


class _Names(list[str]):
    """The registered names, which a name close to one of ours passes for."""

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        return isinstance(name, str) and bool(difflib.get_close_matches(name, _strategies()))


class _NamesThatRefuse(list[str]):
    """Names registered where our objects cannot be used; to look for one of them is the user's mistake."""

    def __init__(self, names: Iterable[str], reason: str) -> None:
        super().__init__(names)
        self._reason = reason

    def __contains__(self, name: object) -> bool:
        if any(cls.__module__.startswith("lightning_largescale.") for cls in type(name).__mro__):
            _refuse_use(f"{type(name).__name__}(...)", self._reason)
        return super().__contains__(name)


def _strategies() -> dict[str, tuple[Callable[[], LargeScaleStrategy], str]]:
    accepted: dict[str, tuple[Callable[[], LargeScaleStrategy], str]] = {
        "largescale_auto": (_auto, "Chooses a plan for the hardware and the traced step, and carries it out"),
        "largescale_fsdp": (
            partial(_planned, fsdp_plan),
            "Divides parameters, gradients and optimizer state among all devices (ZeRO-3)",
        ),
        "largescale_tp": (
            partial(_planned, tp_plan),
            "Divides the matrices of blocks among the devices of a node (tensor parallelism)",
        ),
        "largescale_fsdp_tp": (
            partial(_planned, fsdp_tp_plan),
            "Divides matrices among the devices of a node, and what each has of them among nodes (2D)",
        ),
        "largescale_fsdp_cpu_offload": (
            partial(_planned, fsdp_cpu_offload_plan),
            "Divides the model among all devices, and keeps parameters and optimizer state in DRAM",
        ),
        "largescale_fsdp_nvme_offload": (
            partial(_planned, fsdp_nvme_offload_plan),
            "Divides the model among all devices, and keeps parameters, gradients and optimizer state on a disk",
        ),
    }
    refused = {name: (partial(_refuse, name), f"Reserved for {what}") for name, what in _NOT_YET.items()}
    return {**accepted, **refused}


def _auto() -> LargeScaleStrategy:
    from lightning_largescale.auto import LargeScaleAutoStrategy

    return LargeScaleAutoStrategy()


def _planned(plan: Callable[[Hardware], Plan]) -> LargeScaleStrategy:
    from lightning_largescale.strategy import LargeScaleStrategy

    return LargeScaleStrategy(plan)


def _refuse(name: str) -> LargeScaleStrategy:
    raise PlanError(
        f"strategy={name!r} asks for {_NOT_YET[name]}, which this release does not carry out;"
        f" accepted are {', '.join(repr(one) for one in _strategies() if one not in _NOT_YET)}."
    )


def _refuse_use(strategy: str, reason: str) -> LargeScaleStrategy:
    raise PlanError(f"strategy={strategy} {reason}")
