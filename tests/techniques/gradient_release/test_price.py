"""Released gradients, by hand: a root of 8 MiB, four blocks of 16."""

from planner.builders import MIB, mib, sizes, terms_at


def test_gradients_pass_where_they_are_released_or_leave():
    assert mib(sizes(release_gradients=True).gradients_passing(["blocks.0", "blocks.1", None])) == 32
    assert sizes().gradients_passing(["blocks.0"]) == 0
    partly = sizes(offload_parameters="nvme", resident_parameter_bytes=16 * MIB)
    assert mib(partly.gradients_passing(["blocks.2", "blocks.3"])) == 16


def test_a_release_keeps_the_gradients_of_two_groups_and_of_the_root():
    found = sizes(release_gradients=True)
    assert terms_at(("backward", 1), found)["gradients"] == 8 + 2 * 16
    assert terms_at(("backward", 3), found)["gradients"] == 8 + 16
    assert terms_at(("forward", 0), found)["gradients"] == 8
    assert terms_at(("optimizer step", None), found)["optimizer temporaries"] == 16
    # Shards: the whole gradients of one group, and the shard of the one before.
    found = sizes(release_gradients=True, dp_shard=2)
    assert terms_at(("backward", 1), found)["gradients"] == 8
    assert terms_at(("backward", 1), found)["unreduced gradients"] == 8 + 16
