"""Functions of torch on tensor-parallel shards: used to run tensor parallelism, and to find what can be sharded."""

from lightning_largescale.workload.parts.engine import (
    SEQUENCE,
    CannotDivideError,
    OnParts,
    Ranks,
    Rule,
    Shapes,
    any_part,
    called,
    sequence_in,
)
from lightning_largescale.workload.parts.part import Part, as_part, cut, global_shape, join, part_of, share

__all__ = [
    "SEQUENCE",
    "CannotDivideError",
    "OnParts",
    "Part",
    "Ranks",
    "Rule",
    "Shapes",
    "any_part",
    "as_part",
    "called",
    "cut",
    "global_shape",
    "join",
    "part_of",
    "sequence_in",
    "share",
]
