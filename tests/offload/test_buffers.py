from __future__ import annotations

from concurrent.futures import Future

import pytest

from lightning_largescale.offload.buffers import Allowance, PageBuffers
from lightning_largescale.offload.store import StoreError, Transfer
from lightning_largescale.tiers import PAGE_BUFFERS


def over(error=None):
    """A transfer that is over, or failed."""
    request = Future()
    request.set_exception(error) if error else request.set_result(None)
    return Transfer([request])


def test_an_allowance_is_taken_off_until_it_does_not_suffice():
    allowance = Allowance(10)
    assert [allowance.take(nbytes) for nbytes in (4, 7, 6, 0, 1)] == [True, False, True, True, False]


def test_there_are_no_more_than_so_many_and_those_on_their_way_out_come_first():
    buffers = PageBuffers()
    buffers.make_room(5000)
    taken = [buffers.take() for _ in range(PAGE_BUFFERS)]
    assert len({id(memory) for memory in taken}) == PAGE_BUFFERS
    assert {memory.nbytes for memory in taken} == {8192}
    for memory in taken:
        buffers.give_back(memory, over())
    assert [buffers.take() for _ in taken] == taken


def test_what_is_drained_is_taken_again():
    buffers = PageBuffers()
    buffers.make_room(1)
    memory = buffers.take()
    buffers.give_back(memory, over())
    buffers.drain()
    assert buffers.take() is memory


def test_more_room_makes_others():
    buffers = PageBuffers()
    buffers.make_room(4096)
    small = buffers.take()
    buffers.give_back(small, over())
    buffers.drain()
    buffers.make_room(4095)
    assert buffers.take() is small
    buffers.give_back(small, over())
    buffers.make_room(4097)
    others = [buffers.take() for _ in range(PAGE_BUFFERS)]
    assert small not in others
    assert {memory.nbytes for memory in others} == {8192}


def test_all_are_back_after_a_transfer_that_failed_and_the_first_failure_is_told():
    buffers = PageBuffers()
    buffers.make_room(1)
    taken = [buffers.take() for _ in range(PAGE_BUFFERS)]
    transfers = [over(), over(StoreError("one")), over(StoreError("other")), *[over()] * (PAGE_BUFFERS - 3)]
    for memory, transfer in zip(taken, transfers, strict=True):
        buffers.give_back(memory, transfer)
    with pytest.raises(StoreError, match="one"):
        buffers.drain()
    assert {id(buffers.take()) for _ in taken} == {id(memory) for memory in taken}


def test_one_whose_transfer_failed_is_not_handed_out():
    buffers = PageBuffers()
    buffers.make_room(1)
    for memory in [buffers.take() for _ in range(PAGE_BUFFERS)]:
        buffers.give_back(memory, over(StoreError("failed")))
    with pytest.raises(StoreError, match="failed"):
        buffers.take()
