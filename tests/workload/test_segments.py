import torch
from torch import nn

from lightning_largescale.workload.tracker import Tracker


def rows(step, blocks):
    tracker = Tracker()
    with tracker.watching(blocks, [p for block in blocks.values() for p in block.parameters()]):
        step()
    tracker.finish()
    return tracker.log.finished()


def test_segments_of_frozen_blocks_have_the_live_bytes_of_their_neighbours_in_backward():
    frozen, trained, x = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4), torch.ones(2, 4)
    found = rows(lambda: trained(torch.tanh(frozen(x))).sum().backward(), {"frozen": frozen, "trained": trained})
    assert [row.block for row in found] == ["frozen", None, "trained", None]
    assert found[0].backward_flops == 0
    assert found[0].backward_entry_bytes == found[0].backward_exit_bytes == found[1].backward_exit_bytes


def test_gradients_are_there_from_the_backward_that_makes_them_and_count_beside_the_worst_moment():
    layer, x = nn.Linear(64, 64, bias=False), torch.ones(2, 64)

    def step(after):
        tracker = Tracker()
        with tracker.watching({"layer": layer}, layer.parameters()):
            # What is made once the gradient is there, or before it.
            after(layer(x * torch.ones(2, 1, requires_grad=True))).sum().backward()
        tracker.finish()
        return tracker.log.finished({id(layer.weight): "weight"})

    rows = step(torch.tanh)
    (own,) = (row for row in rows if row.block)
    assert own.completed == ("weight",)
    assert all(row.completed == () for row in rows if not row.block)
    # The gradient counts as live until it is in `.grad`, and beside that from then on: never twice.
    assert own.backward_peak_bytes >= layer.weight.nbytes
    assert own.backward_gradient_bytes < layer.weight.nbytes


def test_nothing_between_two_blocks_makes_no_segment():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    found = rows(lambda: second(first(torch.ones(2, 4))), {"first": first, "second": second})
    assert [row.block for row in found] == [None, "first", "second"]


def test_two_backwards_belong_to_their_own_forwards():
    layer = nn.Linear(4, 4)

    def step():
        for scale in (1.0, 2.0):
            (layer(torch.ones(2, 4)) * scale).sum().backward()

    found = [row for row in rows(step, {"layer": layer}) if row.block]
    assert len(found) == 2
    assert all(row.backward_flops == 2 * 2 * 4 * 4 for row in found)
