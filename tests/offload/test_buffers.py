from __future__ import annotations

from concurrent.futures import Future

import pytest

from lightning_largescale.offload.buffers import Allowance, Buffers
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


def all_of(buffers):
    return [buffers.take() for _ in range(PAGE_BUFFERS)]


def test_there_are_no_more_than_so_many_and_those_on_their_way_out_come_first():
    buffers = Buffers()
    buffers.make_room(5000)
    taken = all_of(buffers)
    assert len({id(memory) for memory in taken}) == PAGE_BUFFERS
    assert {memory.nbytes for memory in taken} == {8192}
    for memory in taken:
        buffers.give_back(memory, over())
    assert all_of(buffers) == taken


def test_what_is_given_back_is_taken_again_once_it_is_through():
    buffers = Buffers()
    buffers.make_room(1)
    memory = buffers.take()
    buffers.give_back(memory, over())
    assert buffers.take() is not memory
    buffers.drain()
    assert buffers.take() is memory


def test_more_room_makes_others():
    buffers = Buffers()
    buffers.make_room(4096)
    small = buffers.take()
    buffers.give_back(small, over())
    buffers.make_room(4095)
    buffers.drain()
    assert buffers.take() is small
    buffers.give_back(small, over())
    buffers.make_room(4097)
    others = all_of(buffers)
    assert small not in others
    assert {memory.nbytes for memory in others} == {8192}


def test_all_are_back_after_transfers_that_failed_and_the_first_failure_is_told():
    buffers = Buffers()
    buffers.make_room(1)
    taken = all_of(buffers)
    transfers = [over(StoreError("one")), over(), over(StoreError("other")), *[over()] * (PAGE_BUFFERS - 3)]
    for memory, transfer in zip(taken, transfers, strict=True):
        buffers.give_back(memory, transfer)
    with pytest.raises(StoreError, match="one"):
        buffers.take()
    with pytest.raises(StoreError, match="one"):
        buffers.drain()
    buffers.drain()
    assert {id(memory) for memory in all_of(buffers)} == {id(memory) for memory in taken}
