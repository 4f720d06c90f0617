"""Checkpoints that are independent of the plan: written under one, read under any other and by stock Lightning."""

from lightning_largescale.checkpoint.directory import load_directory, save_directory
from lightning_largescale.checkpoint.files import is_mappable, is_remote, is_truncated, load_file
from lightning_largescale.checkpoint.full_state import (
    full_module_state,
    full_optimizer_state,
    whole_everywhere,
)
from lightning_largescale.checkpoint.load import consolidate, load_checkpoint
from lightning_largescale.checkpoint.logged import warn_of_left_out
from lightning_largescale.checkpoint.optimizers import (
    StateMemory,
    indexed_optimizer_state,
    kinds_of,
    load_optimizer_state,
    named_optimizer_state,
    saved_kinds,
)
from lightning_largescale.checkpoint.orders import tell_orders

__all__ = [
    "StateMemory",
    "consolidate",
    "full_module_state",
    "full_optimizer_state",
    "indexed_optimizer_state",
    "is_mappable",
    "is_remote",
    "is_truncated",
    "kinds_of",
    "load_checkpoint",
    "load_directory",
    "load_file",
    "load_optimizer_state",
    "named_optimizer_state",
    "save_directory",
    "saved_kinds",
    "tell_orders",
    "warn_of_left_out",
    "whole_everywhere",
]
