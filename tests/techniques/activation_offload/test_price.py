"""Offloaded activations, by hand: four blocks that save 64 MiB each."""

from planner.builders import mib, sizes

from lightning_largescale.techniques.activation_offload.price import activations_in_flight


def test_saved_bytes_of_two_blocks_are_on_their_way_out_and_of_one_back():
    found = sizes(offload_activations="nvme")
    assert [*map(mib, activations_in_flight(found, backward=False))] == [0, 64, 128, 128, 128]
    assert [*map(mib, activations_in_flight(found, backward=True))] == [0, 64, 64, 64, 64]
    assert [*map(mib, found.dropped)] == [0, 64, 128, 192, 256]
    ahead = sizes(offload_activations="nvme", prefetched_blocks=2)
    assert [*map(mib, activations_in_flight(ahead, backward=True))] == [0, 64, 128, 128, 128]
    again = sizes(offload_activations="nvme", activation_checkpointing="full", offloaded_blocks=("blocks.0",))
    assert [*map(mib, activations_in_flight(again, backward=False))] == [0, 8, 8, 0, 0]
    assert [*map(mib, again.dropped)] == [0, 64, 64 + 56, 64 + 2 * 56, 64 + 3 * 56]
    # What is already in DRAM gains nothing by going there.
    assert sizes(offload_activations="cpu").dropped == [0] * 5


def test_on_cuda_what_has_left_makes_room_before_a_block_is_at_its_worst():
    found = sizes("cuda", offload_activations="cpu")
    # A block's own rise is more than what the last but one saved; what follows the last block has both.
    assert [*map(mib, activations_in_flight(found, backward=False))] == [0, 64, 64, 64, 128]
    assert [*map(mib, activations_in_flight(found, backward=True))] == [0, 64, 64, 64, 64]
