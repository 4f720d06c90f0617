"""Price of gradient release: gradients that are freed in backward, and the optimizer's temporaries there.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources", section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.paging import temporaries
from lightning_largescale.planner.price import Fields, Moment, Price, Terms
from lightning_largescale.planner.remedy import Assigned, Remedy, Removable, WorstMoment

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.offload_search import Offloading
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload


class ReleaseRemedy(Remedy):
    """Gradients that are freed in backward."""

    name = "release"
    frees_gradients = True

    @override
    def may_help(self, plan: Plan, search: Offloading) -> bool:
        replicas = plan.dp > 1 and not plan.shards
        alone = search.accumulate == 1 and len(search.workload.optimizers) == 1
        trains = search.workload.stage == "fit" and search.may_release
        return trains and alone and not plan.scales_gradients and not replicas

    @override
    def fields(self, sizes: Sizes, assigned: Assigned) -> Fields:
        return {"release_gradients": True}

    @override
    def fields_of_all(self, workload: Workload, tier: str) -> Fields:
        return {"release_gradients": True}

    @override
    def removable(self, worst: WorstMoment) -> Removable:
        return worst.terms.get("gradients", 0) * worst.holes, 0.0, 0.0


class GradientReleasePrice(Price):
    """Blocks that are stepped on in backward."""

    passing_terms = ("optimizer temporaries",)
    remedies = (ReleaseRemedy(),)

    @override
    def place(self, sizes: Sizes) -> None:
        sizes.releases = sizes.plan.release_gradients

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        if not sizes.plan.release_gradients or moment not in ("backward", "gradient reduction"):
            return {}
        return {"optimizer temporaries": [_temporaries(sizes, index) for index in range(len(sizes.blocks))]}


def _temporaries(sizes: Sizes, index: int) -> int:
    """Return the temporaries of the blocks that are stepped on during one segment's backward."""
    # A block is stepped on when the first gradient of the next block arrives.
    ends = (sizes.blocks[index],) if sizes.kind == "cpu" else ()
    stepped = [name for name in (*ends, sizes.block_beside(index, 1)) if name is not None]
    return max((temporaries(sizes, [name]) for name in stepped), default=0)
