"""A plan in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan


def describe(plan: Plan) -> str:
    """One line: `"ZeRO-3 over 4 devices, optimizer state on nvme, full activation checkpointing, 32-true"`."""
    parts = [_layout(plan), _groups(plan), _tables(plan), *_offload(plan), _recompute(plan)]
    return ", ".join([*filter(None, parts), plan.precision])


def _layout(plan: Plan) -> str:
    stage = "ZeRO-3" if plan.reshard_after_forward else "ZeRO-2"
    if plan.dp_shard > 1 and plan.dp_replicate > 1:
        layout = f"HSDP: {plan.dp_replicate} replicas, each {stage} over {plan.dp_shard} devices"
    elif plan.dp_shard > 1:
        layout = f"{stage} over {plan.dp_shard} devices"
    elif plan.dp_replicate > 1:
        layout = f"replicated on {plan.dp_replicate} devices"
    elif plan.tp > 1:
        layout = ""
    else:
        layout = "one device" if plan.offloads or plan.release_gradients else "plain, one device"
    if plan.tp == 1:
        return layout
    among = f"tensor{' and sequence' if plan.sequence_parallel else ''} parallel over {plan.tp} devices"
    return f"{layout}, each {among}" if layout else among


def _groups(plan: Plan) -> str:
    count = len(plan.wrapped_modules) if plan.dp_shard > 1 or plan.offload_parameters else 0
    by = "s gathered by themselves" if count > 1 else " gathered by itself"
    return f"{count} more module{by}" if count else ""


def _tables(plan: Plan) -> str:
    count = len(plan.row_sharded_embeddings) if plan.world_size > 1 else 0
    return _counted(count, "row-sharded table") if count else ""


def _offload(plan: Plan) -> list[str]:
    words = []
    for name, tier, in_part in (
        ("parameters", plan.offload_parameters, plan.resident_parameter_bytes),
        ("optimizer state", plan.offload_optimizer, plan.resident_optimizer_bytes),
    ):
        if tier is not None:
            words.append(f"{'part of ' if in_part else ''}{name} on {tier}")
    if plan.host_optimizer_step:
        words.append("stepped on by the host")
    if plan.offload_activations is not None:
        blocks = f" of {_counted(len(plan.offloaded_blocks), 'block')}" if plan.offloaded_blocks else ""
        words.append(f"activations{blocks} on {plan.offload_activations}")
    if plan.release_gradients:
        words.append("gradients released")
    return words


def _recompute(plan: Plan) -> str:
    if plan.activation_checkpointing == "none":
        return ""
    words = "full activation checkpointing"
    if plan.activation_checkpointing == "selective":
        words = f"activation checkpointing of {_counted(len(plan.checkpointed_blocks or ()), 'block')}"
    return words + (" but for products" if plan.checkpointed_operations == "cheap" else "")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"
