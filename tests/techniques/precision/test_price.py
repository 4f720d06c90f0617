"""The step that was traced in a precision, as it runs."""

import dataclasses

from planner.builders import MIB, step

from lightning_largescale.techniques.precision.price import without_copies


def test_copies_are_missing_from_where_they_are_made_on():
    usual = step("bf16-mixed")
    copies = {"saved_copy_bytes": 4 * MIB, "forward_copy_bytes": 3 * MIB, "moved_copy_bytes": MIB}
    first, *others = usual.segments
    run = without_copies(dataclasses.replace(usual, segments=(dataclasses.replace(first, **copies), *others)))
    assert run.segments[0].saved_bytes == first.saved_bytes - 4 * MIB
    assert run.segments[0].forward_peak_bytes == first.forward_peak_bytes - 3 * MIB
    assert run.segments[0].forward_moved_bytes == first.forward_moved_bytes - MIB
    assert run.segments[0].forward_entry_bytes == first.forward_entry_bytes
    assert run.segments[1].forward_entry_bytes == others[0].forward_entry_bytes - 4 * MIB
    assert run.loss_peak_bytes == usual.loss_peak_bytes - 4 * MIB
