"""Which steps data-parallel ranks follow without exchange."""

from lightning_largescale.parallel.rounds import Entry, EntryKind
from lightning_largescale.parallel.step_pattern import StepEntries, StepPattern

FIRST, SECOND = Entry(EntryKind.UNSHARD, 0), Entry(EntryKind.UNSHARD, 1)


def run(pattern, *entries, same=True):
    """Whether the step followed the one before to its end."""
    step = StepEntries(pattern)
    for entry in entries:
        step.own.append(entry)
        if step.has_next(entry):
            step.advance()
        elif step.followed is not None:
            step.depart()
    step.same &= same
    step.end()
    return step.followed is not None


def test_a_step_that_all_ranks_agreed_on_is_followed():
    pattern = StepPattern()
    assert [run(pattern, FIRST, SECOND) for _ in range(3)] == [False, True, True]


def test_a_step_that_differed_between_ranks_is_not():
    pattern = StepPattern()
    assert [run(pattern, FIRST, same=same) for same in (False, False, True, True)] == [False, False, False, True]


def test_each_departure_doubles_the_agreed_steps_before_one_is_followed():
    pattern = StepPattern()
    run(pattern, FIRST)
    waits = []
    for _ in range(8):
        assert not run(pattern, SECOND)
        agreed = 0
        while not run(pattern, FIRST):
            agreed += 1
        waits.append(agreed)
    assert waits == [2, 4, 8, 16, 32, 64, 64, 64]


def test_no_step_runs_outside_of_steps():
    step = StepEntries()
    assert not step.is_running
    assert not step.has_next(FIRST)
    step.end()
