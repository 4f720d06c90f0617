"""Checkpoints that do not know the plan: written under one, read under any other and by stock Lightning."""

from lightning_largescale.checkpoint.directory import check_writable, load_directory, save_directory
from lightning_largescale.checkpoint.files import is_mappable, is_remote, load_file
from lightning_largescale.checkpoint.load import consolidate, load_checkpoint
from lightning_largescale.checkpoint.optimizers import (
    indexed_optimizer_state,
    load_optimizer_state,
    named_optimizer_state,
)
from lightning_largescale.checkpoint.whole import (
    full_module_state,
    full_optimizer_state,
    whole_everywhere,
)

__all__ = [
    "check_writable",
    "consolidate",
    "full_module_state",
    "full_optimizer_state",
    "indexed_optimizer_state",
    "is_mappable",
    "is_remote",
    "load_checkpoint",
    "load_directory",
    "load_file",
    "load_optimizer_state",
    "named_optimizer_state",
    "save_directory",
    "whole_everywhere",
]
