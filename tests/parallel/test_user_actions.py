"""What the code of users does to parameters and gradients: under every plan as in one process, or an error there."""

from __future__ import annotations

import pytest
import user_actions
from ranks import quiet
from user_actions import BY_HAND, CELLS, GRADIENTS, WRITES, outcomes, verdict

from lightning_largescale import Plan

pytestmark = quiet

PLANS = {
    "ZeRO-3": (2, {"dp_shard": 2}),
    "ZeRO-2": (2, {"dp_shard": 2, "reshard_after_forward": False}),
    "tp": (2, {"tp": 2}),
    "HSDP": (4, {"dp_replicate": 2, "dp_shard": 2}),
    "DDP": (2, {"dp_replicate": 2}),
    "offload": (1, {"offload_parameters": "nvme"}),
    "offload on two": (2, {"dp_shard": 2, "offload_parameters": "nvme"}),
}
# What may be refused under every plan: parameters that are others, memory in common with others, or with numpy; and
# plain tensors in one list, or one operation, with gradients that are shards.
REFUSED = {
    "replaces",
    "replaces_in_a_block",
    "functional_of_a_block",
    "functional_of_all",
    "gradients_by_func_of_a_block",
    "points_to_another",
    "writes_through_numpy",
    "of_lists",
    "copies_into_gradients",
}
BETWEEN = {
    (action, hook)
    for action in (
        "assigns_data",
        "assigns_fresh_data",
        "assigns_to_the_optimizers",
        "swaps_and_swaps_back",
        "swaps_with_a_shadow",
    )
    for hook in ("late", "on_before_backward", "on_before_zero_grad")
}
# And under some: a parameter between its forward and its backward is no longer gathered; shards on a disk stay at one
# place, and a forward has parts that are no leaves under tp.
REFUSED_BY = {
    "ZeRO-3": BETWEEN,
    # Assigned twice, the first time for the backward that is to come.
    "ZeRO-2": {("swaps_and_swaps_back", "on_before_zero_grad")},
    "HSDP": BETWEEN,
    "offload": {("swaps_and_swaps_back", None), *BETWEEN},
    "offload on two": {("swaps_and_swaps_back", None), *BETWEEN},
    "tp": {
        *BETWEEN,
        ("clips_norms", "on_after_backward"),
        *(
            (action, "forward")
            for action in (
                "writes_through_data",
                "writes_by_alias",
                "writes_elements_of_data",
                "copies_fresh",
                "freezes",
                "writes_into_both",
            )
        ),
    },
}
# What torch.autograd.grad gives is each rank's own under a replicated plan, as under DistributedDataParallel.
OF_EACH_RANK = {
    "DDP": {
        "sets_gradients",
        "sets_gradients_of_unused_too",
        "of_one_layer",
        "of_a_layer_in_a_block",
    }
}
# Every plan has some of each kind each day.
DAILY = {
    "ZeRO-3": [
        ("decays", "forward"),
        ("assigns_data", "early"),
        ("momentum_by_data", "early"),
        ("momentum_by_data", "callback"),
        ("writes_through_data", "validation_step"),
        ("writes_by_alias", "forward"),
        ("swaps_and_swaps_back", "on_validation_start"),
        ("assigns_to_the_optimizers", "early"),
        ("writes_into_both", "late"),
        ("replaces_in_a_block", "early"),
        ("assigns_fresh_gradients", "on_after_backward"),
        ("projects_conflicts", "manual"),
        ("sets_gradients_of_unused_too", "manual"),
        ("functional_of_a_block", "manual"),
        ("scales_what_backward_needs", "on_before_zero_grad"),
        ("clamps", "on_before_zero_grad"),
        ("writes_through_detach", "on_before_zero_grad"),
        ("of_lists", "on_before_zero_grad"),
        ("writes_through_numpy", "callback"),
        ("replaces", "early"),
        ("replaces", "validation_step"),
    ],
    "ZeRO-2": [
        ("normalises", "forward"),
        ("decays", "on_before_backward"),
        ("writes_into_the_optimizers", "on_after_backward"),
        ("sets_gradients", "manual"),
    ],
    "tp": [("normalises", "forward"), ("assigns_data", "early")],
    "HSDP": [("momentum_by_data", "early"), ("sets_gradients", "manual")],
    "DDP": [
        ("clips_norms", "on_after_backward"),
        ("assigns_gradients", "on_after_backward"),
        ("clamps_data_of_gradients", "on_before_optimizer_step"),
        ("sets_after_backward", "manual"),
    ],
    "offload": [("clamps", "forward"), ("momentum_by_data", "late"), ("sets_gradients", "manual")],
    "offload on two": [("momentum_in_place", "early")],
}


def run(request, plan, cells, folder):
    """The verdicts on cells: one for each rank."""
    ranks, fields = PLANS[plan]
    if "offload_parameters" in fields:
        fields = {**fields, "nvme_path": str(folder)}
    if ranks == 1:
        found = [outcomes(Plan(**fields), 1, cells)]
    else:
        found = request.getfixturevalue({2: "two", 4: "four"}[ranks]).run(outcomes, Plan(**fields), ranks, cells)
    plain = outcomes(None, 1, cells)
    return [[verdict(one, expected) for one in of_ranks] for *of_ranks, expected in zip(*found, plain, strict=True)]


def failures(plan, cells, verdicts):
    """Cells that are silent, or refused though they are listed as supported."""
    found = {}
    for (action, hook), of_ranks in zip(cells, verdicts, strict=True):
        may_fail = action in REFUSED or not REFUSED_BY.get(plan, set()).isdisjoint({(action, None), (action, hook)})
        fine = [one in ("equal", "error") or (may_fail and one.startswith("error: ")) for one in of_ranks]
        if not all(fine):
            found[action, hook] = of_ranks
    return found


@pytest.mark.parametrize("plan", ["ZeRO-3", "tp", "offload"])
def test_some_actions_are_those_of_one_process(request, tmp_path, plan):
    cells = DAILY[plan]
    assert failures(plan, cells, run(request, plan, cells, tmp_path)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("action", [*WRITES, *GRADIENTS])
@pytest.mark.parametrize("plan", PLANS)
def test_actions_in_every_hook(request, tmp_path, plan, action):
    cells = [cell for cell in CELLS if cell[0] == action]
    assert failures(plan, cells, run(request, plan, cells, tmp_path)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_by_hand(request, tmp_path, plan):
    cells = [(action, "manual") for action in BY_HAND if action not in OF_EACH_RANK.get(plan, set())]
    assert failures(plan, cells, run(request, plan, cells, tmp_path)) == {}


def test_there_are_cells_enough():
    assert len(CELLS) * len(PLANS) > 200
    assert {hook for _, hook in CELLS} >= {"manual", "forward", *user_actions.HOOKS}
