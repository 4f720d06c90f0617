"""Which group goes to which tier, and what a rank's shard of a parameter takes."""

import pytest

from lightning_largescale.plan import Plan
from lightning_largescale.tiers import group_tiers, shard_bytes

SIZES = {"a": 16, "b": 4, "c": 16, "d": 8}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"offload_parameters": "cpu"}, dict.fromkeys("abcd", "cpu")),
        ({"offload_parameters": "nvme"}, dict.fromkeys("abcd", "nvme")),
        ({"offload_parameters": "cpu", "resident_parameter_bytes": 7}, dict.fromkeys("abcd", "cpu")),
        ({"offload_parameters": "cpu", "resident_parameter_bytes": 8}, dict.fromkeys("abc", "cpu")),
        # The next is too large, and those before it stay with it.
        ({"offload_parameters": "nvme", "resident_parameter_bytes": 23}, dict.fromkeys("abc", "nvme")),
        ({"offload_parameters": "nvme", "resident_parameter_bytes": 2**40}, {}),
        (
            {"offload_parameters": "nvme", "resident_parameter_bytes": 8, "cpu_parameter_bytes": 20},
            {"a": "nvme", "b": "cpu", "c": "cpu"},
        ),
        ({"offload_parameters": "nvme", "cpu_parameter_bytes": 2**40}, dict.fromkeys("abcd", "cpu")),
    ],
)
def test_the_last_stay_then_go_to_dram(fields, expected):
    assert group_tiers(Plan(**fields), SIZES) == expected


def test_shards_are_padded_to_the_largest():
    assert shard_bytes((6, 4), 96, 1) == 96
    assert shard_bytes((6, 4), 96, 4) == 2 * 16
    # Of two ranks of tensor parallelism each has three rows, of which a rank of two has two.
    assert shard_bytes((6, 4), 96, 2, 2, 0) == 2 * 16
    assert shard_bytes((6, 4), 96, 2, 2, 1) == 3 * 8
    assert shard_bytes((), 4, 4) == 4
    assert shard_bytes((0, 4), 0, 4) == 0
