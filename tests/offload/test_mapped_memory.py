from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import release_free_memory
from lightning_largescale.offload.direct import DirectFile
from lightning_largescale.offload.mapped_memory import Memory, Region, _pin
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.tiers import ALIGNMENT_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:.*without O_DIRECT")

PAGE = ALIGNMENT_BYTES
MIB = 2**20


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def filled(region: Region, value: float = 1.0) -> torch.Tensor:
    """The region as a tensor of floats, saved and in DRAM."""
    region.claim()
    tensor = region.tensor(torch.float32, (region.nbytes // 4,))
    tensor.copy_(torch.arange(len(tensor)) * value)
    region.save().wait()
    return tensor


def resident() -> int:
    """Bytes of ordinary memory that this process has."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, PAGE + 1, 5 * MIB])
def test_memory_is_aligned_and_zero(nbytes):
    memory = Memory(nbytes)
    whole = memory.tensor(torch.uint8, (memory.nbytes,))
    assert memory.nbytes % PAGE == whole.data_ptr() % PAGE == 0
    assert 0 < memory.nbytes - nbytes <= PAGE or memory.nbytes == nbytes
    assert not whole.any()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_tensors_are_views(dtype):
    memory = Memory(2 * PAGE)
    tensor = memory.tensor(dtype, (3, 4), start=PAGE)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 4), dtype, True)
    memory.view(PAGE, PAGE + tensor.nbytes)[:] = bytes([1]) * tensor.nbytes
    assert tensor.view(torch.uint8).eq(1).all()
    assert memory.holds(tensor)
    assert memory.holds(tensor[1])
    assert memory.start_of(tensor) == PAGE
    assert memory.start_of(tensor[1]) == PAGE + 4 * dtype.itemsize
    assert not memory.holds(torch.empty(3))
    assert memory.tensor(dtype, (3, 0)).shape == (3, 0)


@pytest.mark.parametrize("bounds", [(0, 2 * PAGE), (-1, 1), (PAGE, 0)])
def test_bytes_that_are_not_there_are_refused(bounds):
    with pytest.raises(ValueError, match=r"bytes .* of 4096 are asked for"):
        Memory(1).view(*bounds)


def test_tensors_outlive_their_memory_and_then_it_is_gone():
    release_free_memory()
    before = resident()
    memory = Memory(32 * MIB)
    tensor = memory.tensor(torch.float32, (8 * MIB,)).fill_(2)
    row = tensor[5:7]
    del memory, tensor
    gc.collect()
    assert resident() - before > 24 * MIB
    assert row.tolist() == [2, 2]
    del row
    assert resident() - before < 8 * MIB


def test_memory_that_cannot_be_had_is_told_of():
    with pytest.raises(OSError, match=r"mapping \d+ bytes failed: Cannot allocate memory") as told:
        Memory(2**62)
    assert told.value.errno == errno.ENOMEM


def test_huge_pages_are_no_condition(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert Memory(PAGE).tensor(torch.uint8, (PAGE,)).fill_(1).sum() == PAGE


def test_a_region_begins_at_rest_as_zeros(store):
    region = Region(store, "weights", 3 * MIB)
    assert not region.in_dram
    assert not region.tensor(torch.uint8, (3 * MIB,)).any()


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["fetch", "claim", "save", "drop", "read", "write", "set", "part"]), max_size=12))
def test_values_are_where_they_should_be(tmp_path_factory, steps):
    store = Store(tmp_path_factory.mktemp("store"))
    region, other = Region(store, "weights", 3 * PAGE), Memory(3 * PAGE)
    tensor = region.tensor(torch.uint8, (3 * PAGE,))
    address, at = tensor.data_ptr(), slice(PAGE, 2 * PAGE)
    saved, seen = torch.zeros_like(tensor), torch.zeros_like(tensor)
    for value, step in enumerate(steps, 1):
        if step == "fetch":
            region.fetch().wait()
        elif step == "claim":
            seen = seen if region.in_dram else torch.zeros_like(seen)
            region.claim()
        elif step == "save":
            region.save().wait()
            saved = seen.clone()
        elif step == "part":
            region.save(PAGE + 5, 2 * PAGE - 5).wait()
            saved[at] = seen[at]
        elif step == "drop":
            region.drop()
            seen = saved.clone()
        elif step == "set":
            tensor[7 * value] = seen[7 * value] = value
            if not region.in_dram:
                saved = seen.clone()
        elif step == "read":
            region.read_into(other, PAGE, 3 * PAGE, at=0).wait()
            assert torch.equal(other.tensor(torch.uint8, (2 * PAGE,)), seen[PAGE:])
        else:
            other.tensor(torch.uint8, (3 * PAGE,)).fill_(value)
            region.write_from(other, PAGE, 2 * PAGE, at=2 * PAGE).wait()
            seen[at] = saved[at] = value
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, seen)
    store.close()
    assert torch.equal(tensor, seen)


def test_in_place_writes_at_rest_are_fetched(store):
    region = Region(store, "weights", 5 * MIB)
    tensor = filled(region)
    region.drop()
    tensor.mul_(2)
    transfer = region.fetch()
    assert region.in_dram
    transfer.wait()
    assert torch.equal(tensor, torch.arange(len(tensor)) * 2.0)
    # What is changed in DRAM and not saved is not in the file.
    tensor.zero_()
    region.drop()
    assert torch.equal(tensor, torch.arange(len(tensor)) * 2.0)


def test_values_at_rest_are_not_in_dram(store):
    region = Region(store, "weights", 64 * MIB)
    before = resident()
    tensor = filled(region, 0.5)
    assert resident() - before > 56 * MIB
    region.drop()
    # Whatever reads the file leaves pages of the system's, which it takes back when it wants.
    assert tensor[-1] == 0.5 * (len(tensor) - 1)
    assert resident() - before < 8 * MIB
    region.fetch().wait()
    assert resident() - before > 56 * MIB
    assert tensor[-1] == 0.5 * (len(tensor) - 1)


def test_backward_uses_what_is_fetched_again(store):
    region = Region(store, "weight", 16 * 16 * 4)
    filled(region, 0.01)
    weight = torch.nn.Parameter(region.tensor(torch.float32, (16, 16)))
    x = torch.randn(4, 16, requires_grad=True)

    def gradients(weight, between=lambda: None):
        out = torch.nn.functional.linear(x, weight).tanh().sum()
        between()
        return torch.autograd.grad(out, (x, weight))

    expected = gradients(weight.detach().clone().requires_grad_())

    def away_and_back():
        region.drop()
        region.claim()
        assert not weight.detach().any()
        region.drop()
        region.fetch().wait()

    for between in (away_and_back, region.drop):
        for found, wanted in zip(gradients(weight, between), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_second_fetch_is_over_when_the_first_is(tmp_path):
    class Gated(DirectFile):
        go = threading.Event()

        def read_at(self, memory, offset):
            assert self.go.wait(60)
            return super().read_at(memory, offset)

    store = Store(tmp_path, file=Gated)
    region = Region(store, "weights", PAGE)
    tensor = filled(region)
    region.drop()
    region.fetch()
    again = region.fetch()
    assert not again.over
    Gated.go.set()
    again.wait()
    assert torch.equal(tensor, torch.arange(1024.0))
    store.close()


@pytest.mark.parametrize("then", ["drop", "save", "claim"])
def test_what_is_under_way_ends_first(tmp_path, then):
    class Late(DirectFile):
        began = threading.Event()
        order: tuple[str, ...] = ()

        def read_at(self, memory, offset):
            self.began.wait(60)
            count = super().read_at(memory, offset)
            Late.order += ("read",)
            return count

        def write_at(self, memory, offset):
            count = super().write_at(memory, offset)
            Late.order += ("write",)
            return count

    store = Store(tmp_path, file=Late)
    region = Region(store, "weights", PAGE)
    tensor = filled(region)
    region.drop()
    region.fetch()
    timer = threading.Timer(0.05, Late.began.set)
    timer.start()
    getattr(region, then)()
    Late.order += (then,)
    timer.join()
    assert Late.order.index("read") < Late.order.index(then)
    assert torch.equal(tensor, torch.arange(1024.0))
    store.close()


def test_a_save_under_way_ends_before_the_region_is_dropped(tmp_path):
    class Gated(DirectFile):
        go = threading.Event()

        def write_at(self, memory, offset):
            assert self.go.wait(60)
            return super().write_at(memory, offset)

    store = Store(tmp_path, file=Gated)
    region = Region(store, "weights", 3 * PAGE)
    region.claim()
    tensor = region.tensor(torch.float32, (3 * 1024,))
    tensor.copy_(torch.arange(3072.0))
    for page in range(3):
        region.save(page * PAGE, (page + 1) * PAGE)
    timer = threading.Timer(0.05, Gated.go.set)
    timer.start()
    region.drop()
    timer.join()
    assert torch.equal(tensor, torch.arange(3072.0))
    store.close()


def failing_once(method: str) -> type[DirectFile]:
    class Failing(DirectFile):
        failures = 0

        def read_at(self, memory, offset):
            return self._answer("read_at", memory, offset)

        def write_at(self, memory, offset):
            return self._answer("write_at", memory, offset)

        def _answer(self, called, memory, offset):
            if called == method and Failing.failures:
                Failing.failures -= 1
                raise OSError(errno.EIO, "bad")
            return getattr(super(), called)(memory, offset)

    return Failing


@pytest.mark.parametrize("together", [False, True])
def test_a_fetch_that_fails_leaves_the_values_at_rest(tmp_path, together):
    file = failing_once("read_at")
    store = Store(tmp_path, file=file)
    region = Region(store, "layer.weight", PAGE)
    tensor = filled(region)
    region.drop()
    file.failures = 1
    with pytest.raises(StoreError, match=r"reading 4096 bytes of layer.weight at offset 0 .*bad"):
        (Transfer.of([region.fetch(), Transfer()]) if together else region.fetch()).wait()
    assert not region.in_dram
    assert torch.equal(tensor, torch.arange(1024.0))
    region.fetch().wait()
    assert region.in_dram
    assert torch.equal(tensor, torch.arange(1024.0))
    store.close()


def test_what_could_not_be_saved_is_not_dropped(tmp_path):
    file = failing_once("write_at")
    store = Store(tmp_path, file=file)
    region = Region(store, "layer.weight", 2 * PAGE)
    tensor = filled(region)
    tensor.add_(1)
    file.failures = 1
    region.save(0, PAGE)
    region.save(PAGE, 2 * PAGE).wait()
    with pytest.raises(StoreError, match=r"writing 4096 bytes of layer.weight at offset 0 .*bad"):
        region.drop()
    assert region.in_dram
    assert torch.equal(tensor, torch.arange(2048) + 1.0)
    region.save().wait()
    region.drop()
    assert torch.equal(tensor, torch.arange(2048) + 1.0)
    store.close()


@pytest.mark.parametrize("at_rest", [False, True])
def test_a_region_stays_where_it_is_once_its_store_is_closed(tmp_path, at_rest):
    store = Store(tmp_path)
    region, other = Region(store, "weights", PAGE), Memory(PAGE)
    tensor = filled(region)
    if at_rest:
        region.drop()
    descriptor = store.descriptor
    store.close()
    with open(tmp_path / "another", "w+b") as file:
        file.write(bytes(2 * PAGE))
        file.flush()
        # The number that the store's file had is this one's now.
        os.dup2(file.fileno(), descriptor)
        for step in (region.drop, region.fetch, region.save, region.drop):
            step()
            assert region.in_dram is not at_rest
            assert torch.equal(tensor, torch.arange(1024.0))
        region.read_into(other, 0, PAGE).wait()
        assert torch.equal(other.tensor(torch.float32, (1024,)), torch.arange(1024.0))
        other.tensor(torch.float32, (1024,)).fill_(3)
        region.write_from(other, 0, PAGE).wait()
        assert tensor.eq(3).all()
        os.close(descriptor)
    assert (tmp_path / "another").read_bytes() == bytes(2 * PAGE)


@pytest.mark.parametrize("order", [("region", "store"), ("store", "region"), ("close", "region", "store")])
def test_views_outlive_region_and_store(tmp_path, order):
    held = {"store": Store(tmp_path)}
    held["region"] = Region(held["store"], "weights", 2 * PAGE)
    tensor = filled(held["region"])
    held["region"].drop()
    for name in order:
        if name == "close":
            held["store"].close()
        else:
            del held[name]
        gc.collect()
    assert torch.equal(tensor, torch.arange(2048.0))
    tensor.add_(1)
    assert torch.equal(tensor, torch.arange(2048) + 1.0)
    assert not list(tmp_path.iterdir())


def test_a_region_without_a_store_is_always_in_dram():
    region, other = Region(None, "weights", PAGE), Memory(PAGE)
    tensor = region.tensor(torch.float32, (1024,)).fill_(1)
    for step in (region.fetch, region.save, region.drop, region.claim):
        step()
        assert region.in_dram
        assert tensor.eq(1).all()
    region.read_into(other, 0, PAGE).wait()
    copied = other.tensor(torch.float32, (1024,))
    assert copied.eq(1).all()
    copied.fill_(2)
    region.write_from(other, 0, PAGE).wait()
    assert tensor.eq(2).all()


def test_a_region_that_the_disk_has_no_room_for(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(PlanError, match=r"are needed on .* for layer.weight, "):
        Region(store, "layer.weight", 2**46)
    store.close()


def test_a_forked_process_sees_the_values(run_python):
    code = """
import os, torch
torch.set_num_threads(1)  # the threads of torch do not survive a fork
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.store import Store, StoreError
store = Store(".")
regions = [Region(store, str(i), 2**20) for i in range(3)]
tensors = [region.tensor(torch.float32, (2**18,)) for region in regions]
for region, tensor in zip(regions, tensors):
    region.claim()
    tensor.fill_(3)
    region.save().wait()
regions[0].drop()
regions[1].drop()
pid = os.fork()
if pid == 0:
    regions[1].fetch().wait()
    assert all(tensor.eq(3).all() for tensor in tensors)
    tensors[2].fill_(4)
    regions[2].drop()
    assert tensors[2].eq(3).all()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert all(tensor.eq(3).all() for tensor in tensors)
"""
    run_python(code)


def test_the_interpreter_may_end_at_any_moment(run_python, tmp_path):
    code = """
import atexit, torch
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.store import Store, StoreError
def late():
    assert tensor.eq(3).all()
    try:
        region.fetch().wait()
    except StoreError as error:
        print("too late:", error)
    assert tensor.eq(3).all()
store = Store(".")
region = Region(store, "weights", 2**20)
tensor = region.tensor(torch.float32, (2**18,))
region.claim()
tensor.fill_(3)
region.save()
region.drop()
region.fetch()
region.drop()
atexit.register(late)
"""
    assert "too late: a request came too late (cannot schedule new futures after" in run_python(code)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("to_device", [True, False])
def test_pinned_memory_that_goes_waits_for_its_copies(to_device):
    memory = Memory(2**20, pinned=True)
    there, here = torch.ones(2**18, device="cuda"), memory.tensor(torch.float32, (2**18,))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        target = there if to_device else here
        target.copy_(here if to_device else there, non_blocking=True)
    del memory, here, target
    assert there.eq(0 if to_device else 1).all()


@pytest.mark.gpu
def test_memory_is_no_longer_pinned_whatever_became_of_its_copies(monkeypatch):
    class Owner:
        pass

    def fail(device):
        raise RuntimeError("an illegal memory access was encountered")

    told = []
    # Until torch has pinned something itself, it does not ask.
    torch.ones(1).pin_memory()
    tensor, owner = Memory(2**20).tensor(torch.uint8, (2**20,)), Owner()
    _pin(owner, tensor.data_ptr(), tensor.nbytes)
    assert tensor.is_pinned()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", fail)
        patch.setattr(sys, "unraisablehook", lambda error: told.append(str(error.exc_value)))
        del owner
    assert not tensor.is_pinned()
    assert told == ["an illegal memory access was encountered"]
