"""Checks of the values of a plan's fields."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan

# Fields that are amounts of bytes, each with the offload field that it needs and the accepted tiers of that field.
AMOUNTS = {
    "resident_parameter_bytes": ("offload_parameters", ("cpu", "nvme")),
    "resident_optimizer_bytes": ("offload_optimizer", ("cpu", "nvme")),
    "cpu_parameter_bytes": ("offload_parameters", ("nvme",)),
    "cpu_optimizer_bytes": ("offload_optimizer", ("nvme",)),
}


def check_count(name: str, value: object, of: str) -> None:
    """Check that `value` is a whole number, 1 or more.

    Args:
        name: the field's name.
        value: the field's value.
        of: the things that it counts, for the error: "devices".

    Raises:
        PlanError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name}={value!r} is not accepted; give a whole number of {of}, 1 or more.")


def check_flag(name: str, value: object) -> None:
    """Raise PlanError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise PlanError(f"{name}={value!r} is not accepted; give True or False.")


def check_choice(name: str, value: object, accepted: Sequence[str | None]) -> None:
    """Check that `value` is one of `accepted`.

    Args:
        name: the field's name.
        value: the field's value.
        accepted: the accepted values, two or more.

    Raises:
        PlanError: it is not.
    """
    if value not in accepted:
        *others, last = map(repr, accepted)
        raise PlanError(f"{name}={value!r} is not accepted; give {', '.join(others)} or {last}.")


def check_path(name: str, value: object) -> str:
    """Return the path `value` as text.

    Raises:
        PlanError: `value` is not a path, or is empty.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise PlanError(f"{name}={value!r} is not accepted; give the path of a folder.")
    return str(os.fspath(value))


def check_recomputation(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    """Return `checkpointed_blocks` as a tuple of names, by field; empty unless some blocks are selected.

    Raises:
        PlanError: the fields of activation checkpointing contradict one another, or the value is not a list of names.
    """
    mode, blocks = plan.activation_checkpointing, plan.checkpointed_blocks
    if mode == "none" and plan.checkpointed_operations != "all":
        raise PlanError(
            f"checkpointed_operations={plan.checkpointed_operations!r} contradicts activation_checkpointing='none';"
            " give 'full' or 'selective', or 'all' operations."
        )
    if mode != "selective":
        if blocks is not None:
            raise PlanError(
                f"checkpointed_blocks={blocks!r} contradicts activation_checkpointing={mode!r}; give 'selective', or no"
                " blocks."
            )
        return {}
    if not _are_names(blocks) or not blocks:
        raise PlanError(
            f"checkpointed_blocks={blocks!r} is not accepted with activation_checkpointing='selective';"
            " give the names of the blocks, at least one and each once."
        )
    return {"checkpointed_blocks": tuple(blocks)}


def check_names(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    """Return `wrapped_modules` and `row_sharded_embeddings` as tuples of names, by field.

    Raises:
        PlanError: a value is not a list of names, or a field cannot be combined with row-sharded embeddings.
    """
    found: dict[str, tuple[str, ...]] = {}
    for field in ("wrapped_modules", "row_sharded_embeddings"):
        names = getattr(plan, field)
        if not _are_names(names):
            raise PlanError(f"{field}={names!r} is not accepted; give the names of modules, each once, or none.")
        found[field] = tuple(names)
    tables = found["row_sharded_embeddings"]
    for field, refused in (
        ("tp", plan.tp > 1),
        ("precision", plan.precision == "16-mixed"),
        ("offload_optimizer", plan.offload_optimizer is not None),
        ("offload_parameters", plan.offload_parameters is not None),
        ("release_gradients", plan.release_gradients),
    ):
        if tables and refused:
            raise PlanError(
                f"row_sharded_embeddings={tables!r} cannot be combined with {field}={getattr(plan, field)!r}; leave one"
                " of them out."
            )
    return found


def check_offload(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    """Return `offloaded_blocks` as a tuple of names, by field; empty if it is None.

    Raises:
        PlanError: the offload fields contradict one another, an amount is not a number of bytes, or `offloaded_blocks`
            is not a list of names.
    """
    for name, (field, tiers) in AMOUNTS.items():
        value, tier = getattr(plan, name), getattr(plan, field)
        if value is None:
            continue
        _check_bytes(name, value)
        if tier not in tiers:
            raise PlanError(
                f"{name}={value!r} contradicts {field}={tier!r}; give {' or '.join(map(repr, tiers))} there, or leave"
                " it out."
            )
    if plan.host_optimizer_step and plan.offload_optimizer is None:
        raise PlanError(
            "host_optimizer_step=True contradicts offload_optimizer=None; give 'cpu' or 'nvme' there, or leave it out."
        )
    if plan.host_optimizer_step and plan.precision == "16-mixed":
        raise PlanError(
            "host_optimizer_step=True cannot be combined with precision='16-mixed', whose scaler is on the device;"
            " leave one of them out."
        )
    replicas = plan.dp_replicate > 1 and not plan.shards
    for field, refused in (("precision", plan.precision == "16-mixed"), ("dp_replicate", replicas)):
        if plan.release_gradients and refused:
            raise PlanError(
                f"release_gradients=True cannot be combined with {field}={getattr(plan, field)!r}, which needs all"
                " gradients at once; leave one of them out."
            )
    blocks = plan.offloaded_blocks
    if blocks is None:
        return {}
    if plan.offload_activations is None:
        raise PlanError(
            f"offloaded_blocks={blocks!r} contradicts offload_activations=None; give 'cpu' or 'nvme' there, or no"
            " blocks."
        )
    if not _are_names(blocks) or not blocks:
        raise PlanError(
            f"offloaded_blocks={blocks!r} is not accepted; give the names of the blocks, at least one and each once, or"
            " None for all."
        )
    return {"offloaded_blocks": tuple(blocks)}


def _are_names(value: object) -> bool:
    """Return whether `value` is a list or tuple of distinct strings."""
    named = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return named and len(set(value)) == len(value)  # type: ignore[arg-type, call-overload]


def _check_bytes(name: str, value: object) -> None:
    """Raise PlanError unless `value` is a whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"{name}={value!r} is not accepted; give a whole number of bytes, 0 or more.")
