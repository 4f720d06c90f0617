"""Price of a technique: what the planner asks each one, of which it names none.

`techniques/<name>/price.py` has a subclass of `Price` for each technique, and `prices.py` lists them. A step
of a plan is a sum over these: the planner adds the bytes of each moment by term, the seconds of each term, and walks
the options of the search.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.planner.remedy import Remedy
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Step, Workload

# The moments of a step at which live bytes are summed; "forward", "backward" and "gradient reduction" have one for each
# segment.
Moment = Literal["setup", "forward", "backward", "gradient reduction", "optimizer step"]
Fields = Mapping[str, Any]
# Bytes by term; a sequence has one item for each segment.
Terms = Mapping[str, int | Sequence[int]]


class Overlap(NamedTuple):
    """Seconds of communication that may overlap with compute: of a forward, of a backward, and of the last backward."""

    forward: float = 0.0
    backward: float = 0.0
    last_backward: float = 0.0


class Price:
    """One technique as the planner sees it; the defaults are those of a technique that costs and saves nothing.

    Attributes:
        lossy: names that a user's `allow` may have, of uses of the technique that change numerics.
        passing_terms: terms of memory whose bytes come and go in a step, and so fragment the memory.
        remedies: ways in which the technique makes a plan fit that does not, for the offload solver.
    """

    lossy: tuple[str, ...] = ()
    passing_terms: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()

    # The search.

    def options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        """Return the plan fields of each admissible use of the technique, on any ranks, simplest first."""
        return ({},)

    def rank_options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        """Return the plan fields of each admissible number of ranks, beside the ranks that `plan` takes."""
        return ({},)

    def options_on_ranks(self, workload: Workload, plan: Plan) -> Iterable[Fields]:
        """Return the plan fields of each admissible use of the technique on the ranks of `plan`."""
        return ({},)

    def gathered_options(self, workload: Workload) -> Iterable[Fields]:
        """Return the plan fields that make a difference to a plan which gathers offloaded parameters on one rank."""
        return ({},)

    def in_part(
        self,
        workload: Workload,
        plan: Plan,
        sizes_of: Callable[[Plan], Sizes],
        first_excess: Callable[[Sizes, frozenset[str]], tuple[int, int] | None],
    ) -> Iterable[Plan]:
        """Return plans that use the technique just as much as makes `plan` fit, which does not use it.

        Args:
            workload: the traced step.
            plan: a plan that does not fit.
            sizes_of: returns the sizes of a plan.
            first_excess: returns the first moment at which a plan that recomputes these blocks exceeds the budget.
        """
        return ()

    def is_in_part(self, plan: Plan) -> bool:
        """Return whether `plan` is one that `in_part` returns."""
        return False

    def impossible(self, workload: Workload, hardware: Hardware) -> Iterable[tuple[Fields, str]]:
        """Return the plan fields of a use that is ruled out, and why, for each reason."""
        return ()

    def lossy_in(self, plan: Plan) -> Collection[str]:
        """Return those of `lossy` that `plan` uses."""
        return ()

    def refusal(self, plan: Plan, allowed: Collection[str], *, fixed: bool) -> str:
        """Return why the user has not allowed `plan`; empty if they have.

        Args:
            plan: the plan.
            allowed: names that the user allows.
            fixed: whether the user asked for one of them.
        """
        return ""

    def thrift(self, plan: Plan) -> int:
        """Return a sort key that mostly puts the uses of the technique first that save most memory."""
        return 0

    # Sizes: what the technique makes of the model and of the step, in terms that all techniques share.

    def lay_out(self, sizes: GroupSizes) -> None:
        """Set the quantities of `sizes` that say which bytes a rank holds and computes with."""

    def run(self, sizes: GroupSizes, step: Step) -> Step:
        """Return the traced `step` as a rank runs it under the technique."""
        return step

    def place(self, sizes: Sizes) -> None:
        """Set the quantities of `sizes` that say what leaves the device, and when."""

    # Memory, in bytes.

    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        """Return the bytes that the technique adds at a moment, by term.

        Args:
            sizes: the sizes of the plan.
            moment: the moment.
            built: whether the model is materialized before setup.
        """
        return {}

    def staging(self, sizes: Sizes) -> int:
        """Return the bytes of staging buffers in DRAM beside a CUDA device: for disk transfers and the host's step."""
        return 0

    def fragmentation(self, plan: Plan, kind: str) -> float:
        """Return the bytes lost to fragmentation for each byte that comes and goes in a step."""
        return 0.0

    # Time, in seconds.

    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        """Return the seconds that the technique adds to an optimizer step, by term."""
        return {}

    def overlap(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Overlap:
        """Return which seconds of communication may overlap with compute."""
        return Overlap()

    def fresh_bytes(self, sizes: Sizes) -> tuple[int, int]:
        """Return the bytes of large buffers that are allocated, in each micro-batch and once a step."""
        return 0, 0

    # Words.

    def panel_rows(self, workload: Workload, plan: Plan) -> Iterable[tuple[str, str]]:
        """Return rows of the panel at setup: a title, and words."""
        return ()
