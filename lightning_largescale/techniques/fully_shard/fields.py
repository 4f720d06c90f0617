"""Fields of sharding over ranks (FSDP2).

Source: Rajbhandari et al. 2020, "ZeRO", section 5 (stages); Zhao et al. 2023, "PyTorch FSDP", section 3.2 (hybrid
    sharding).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import PlanFields, check_count, check_flag, check_modules

if TYPE_CHECKING:
    from lightning_largescale.workload import Workload


@dataclass(frozen=True, kw_only=True)
class FullyShardFields(PlanFields):
    """Shards of parameters, gradients and optimizer state.

    Attributes:
        dp_shard: number of devices that the parameters, gradients and optimizer state are sharded over.
        reshard_after_forward: whether to reshard parameters after a block's forward and all-gather them again in
            backward (ZeRO-3); False keeps them unsharded until after backward (ZeRO-2). Ignored with `dp_shard=1`.
        extra_fsdp_modules: names of modules outside of repeated blocks (large embeddings and heads) that are FSDP
            groups of their own, as blocks are; all other parameters stay unsharded for the whole step. Ignored if
            parameters are neither sharded nor offloaded.
    """

    __slots__ = ()
    _heap = "mapped"
    dp_shard: int = 1
    reshard_after_forward: bool = True
    extra_fsdp_modules: tuple[str, ...] = ()

    @property
    def gathers_again(self) -> bool:
        """Return whether groups of parameters are gathered again in backward."""
        return self.reshard_after_forward

    def _in_use(self) -> bool:
        return self.dp_shard > 1

    def _check_values(self) -> Mapping[str, object]:
        check_count(self, "dp_shard", "devices")
        check_flag(self, "reshard_after_forward")
        return check_modules(self, "extra_fsdp_modules")

    def _check_workload(self, workload: Workload) -> None:
        for name in self.extra_fsdp_modules:
            if name not in workload.wraps:
                accepted = f"accepted are {', '.join(map(repr, workload.wraps))}" if workload.wraps else "there is none"
                raise PlanError(
                    f"extra_fsdp_modules has {name!r}, which is no module of {workload.name} that is large, outside of"
                    f" its repeated blocks, and alone in reading its parameters; {accepted}."
                )

    def _layout_words(self, inner: str) -> str:
        stage = "ZeRO-3" if self.reshard_after_forward else "ZeRO-2"
        return f"{stage} over {self.dp_shard} devices" if self.dp_shard > 1 else inner

    def _words(self) -> Iterable[str]:
        count = len(self.extra_fsdp_modules) if self.dp_shard > 1 or self._plan.offload_parameters else 0
        by = "s gathered by themselves" if count > 1 else " gathered by itself"
        return (f"{count} more module{by}",) if count else ()
