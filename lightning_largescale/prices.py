"""Prices of all techniques, one line each: what the planner knows of them.

The order is that of the search, whose first options change last, of what moves most often between tiers, which goes to
DRAM first, and of the step, which the first change first.
"""

from __future__ import annotations

from lightning_largescale.planner.price import Price
from lightning_largescale.techniques.activation_checkpoint.price import ActivationCheckpointPrice
from lightning_largescale.techniques.activation_offload.price import ActivationOffloadPrice
from lightning_largescale.techniques.fully_shard.price import FullyShardPrice
from lightning_largescale.techniques.gradient_release.price import GradientReleasePrice
from lightning_largescale.techniques.malloc_policy.price import MallocPolicyPrice
from lightning_largescale.techniques.paged_optimizer.price import PagedOptimizerPrice
from lightning_largescale.techniques.parameter_offload.price import ParameterOffloadPrice
from lightning_largescale.techniques.precision.price import PrecisionPrice
from lightning_largescale.techniques.replicate.price import ReplicatePrice
from lightning_largescale.techniques.row_wise_embedding.price import RowWiseEmbeddingPrice
from lightning_largescale.techniques.tensor_parallel.price import TensorParallelPrice

PRICES: tuple[Price, ...] = (
    PrecisionPrice(),
    ActivationCheckpointPrice(),
    TensorParallelPrice(),
    FullyShardPrice(),
    ReplicatePrice(),
    RowWiseEmbeddingPrice(),
    ParameterOffloadPrice(),
    ActivationOffloadPrice(),
    PagedOptimizerPrice(),
    GradientReleasePrice(),
    MallocPolicyPrice(),
)
