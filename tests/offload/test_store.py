from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounting import mounted_ext4, mounted_tmpfs

from lightning_largescale.errors import PlanError
from lightning_largescale.offload.direct import DirectFile
from lightning_largescale.offload.store import Store, StoreError
from lightning_largescale.tiers import ALIGNMENT_BYTES, REQUEST_BYTES, REQUESTS

pytestmark = pytest.mark.filterwarnings("ignore:.*without O_DIRECT")

PAGE = ALIGNMENT_BYTES


def pages(count: int, seed: int = 0) -> memoryview:
    """Bytes that are aligned and, from seed to seed, different."""
    memory = memoryview(mmap.mmap(-1, count * PAGE))
    if seed:
        memory[:] = bytes((seed * 31 + i * 7) % 251 for i in range(PAGE + count))[:PAGE] * count
        for page in range(count):
            memory[page * PAGE] = (seed + page) % 251
    return memory


def failing(number: int, *, reading: bool = True, writing: bool = True) -> type[DirectFile]:
    class Failing(DirectFile):
        def read_at(self, memory, offset):
            if reading and offset:
                raise OSError(number, os.strerror(number))
            return super().read_at(memory, offset)

        def write_at(self, memory, offset):
            if writing and offset:
                raise OSError(number, os.strerror(number))
            return super().write_at(memory, offset)

    return Failing


@contextlib.contextmanager
def recorded():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


@st.composite
def histories(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        extent = draw(st.integers(0, len(sizes) - 1))
        start = draw(st.integers(0, sizes[extent] - 1))
        steps.append((draw(st.booleans()), extent, start, draw(st.integers(1, sizes[extent] - start))))
    return sizes, steps


@settings(max_examples=40)
@given(histories(), st.booleans())
def test_what_is_read_is_what_was_last_written(tmp_path_factory, history, verify):
    sizes, steps = history
    store = Store(tmp_path_factory.mktemp("store"), verify=verify)
    extents = [store.reserve(f"tensor {i}", size * PAGE) for i, size in enumerate(sizes)]
    expected = [bytearray(size * PAGE) for size in sizes]
    for seed, (writes, extent, start, count) in enumerate(steps, 1):
        memory, span = pages(count, seed), slice(start * PAGE, (start + count) * PAGE)
        if writes:
            store.write(extents[extent], memory, start * PAGE).wait()
            expected[extent][span] = memory
        else:
            store.read(extents[extent], memory, start * PAGE).wait()
            assert memory == expected[extent][span]
    for extent, values in zip(extents, expected, strict=True):
        memory = pages(len(values) // PAGE)
        store.read(extent, memory).wait()
        assert memory == values
    store.close()


def test_several_transfers_under_way_reads_beside_writes(store):
    count = 2 * REQUEST_BYTES // PAGE + 1
    extents = [store.reserve(str(i), count * PAGE) for i in range(6)]
    written = [pages(count, i + 1) for i in range(6)]
    for transfer in reversed([store.write(extents[i], written[i]) for i in range(3)]):
        transfer.wait()
    read = [pages(count) for _ in range(3)]
    writes = [store.write(extents[i], written[i]) for i in range(3, 6)]
    reads = [store.read(extents[i], read[i]) for i in range(3)]
    for transfer in reads + writes:
        transfer.wait()
        assert transfer.over
    assert read == written[:3]
    assert store.read_bytes == 3 * count * PAGE
    assert store.written_bytes == 6 * count * PAGE


def test_requests_run_beside_one_another(tmp_path):
    class Meeting(DirectFile):
        together = threading.Barrier(REQUESTS)

        def read_at(self, memory, offset):
            self.together.wait(60)
            return super().read_at(memory, offset)

    store = Store(tmp_path, file=Meeting)
    extent = store.reserve("weights", REQUESTS * REQUEST_BYTES)
    store.read(extent, pages(REQUESTS * REQUEST_BYTES // PAGE)).wait()
    store.close()


def test_threads_may_reserve_at_once(store):
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            extents = list(pool.map(lambda i: store.reserve(str(i), PAGE * (1 + i % 3)), range(200)))
    finally:
        sys.setswitchinterval(switching)
    ends = 0
    for extent in sorted(extents, key=lambda extent: extent.offset):
        assert extent.offset >= ends
        ends = extent.offset + extent.nbytes


def test_extents_begin_at_pages_also_where_these_are_larger(store, monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 65536)
    extents = [store.reserve(str(i), size) for i, size in enumerate((1, 0, 70000, 4096))]
    assert [(extent.offset, extent.nbytes) for extent in extents] == [
        (0, 4096),
        (65536, 4096),
        (131072, 73728),
        (262144, 4096),
    ]


@pytest.mark.parametrize("by_environment", [False, True])
def test_verification_catches_a_flipped_byte(tmp_path, monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("LARGESCALE_STORE_VERIFY", "1")
    store = Store(tmp_path, verify=None if by_environment else True)
    store.reserve("before", PAGE)
    extent = store.reserve("layer.weight", 4 * PAGE)
    store.write(extent, pages(4, 1)).wait()
    with open(store.path / "tensors", "r+b") as file:
        file.seek(extent.offset + 2 * PAGE + 77)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    # Other bounds than those it was written in do not matter.
    store.read(extent, pages(2)).wait()
    store.read(extent, pages(1), 3 * PAGE).wait()
    message = (
        rf"reading 4096 bytes of layer.weight at offset {3 * PAGE} of '{store.path}/tensors' failed \(these are not"
    )
    with pytest.raises(StoreError, match=message):
        store.read(extent, pages(3), PAGE).wait()
    store.close()


def test_without_verification_a_flipped_byte_is_read(store):
    extent = store.reserve("layer.weight", PAGE)
    store.write(extent, pages(1, 1)).wait()
    (store.path / "tensors").write_bytes(bytes(PAGE))
    memory = pages(1, 2)
    store.read(extent, memory).wait()
    assert memory == bytes(PAGE)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("filesystem", ["tmpfs", "ext4"])
def test_a_full_disk_is_told_of_before_anything_is_written(tmp_path, filesystem):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        mounted_tmpfs(folder, "size=16m")
        if filesystem == "tmpfs"
        else mounted_ext4(folder, tmp_path / "image", 32 * 2**20)
    )
    with mounted:
        store = Store(folder)
        kept = store.reserve("first", 4 * 2**20)
        free = os.statvfs(folder).f_bavail * PAGE
        message = (
            rf"64.0 MiB are needed on '{folder}' for second, beside \d+(\.\d+)? MiB for what came before, and there are"
            r" \d+(\.\d+)? MiB \(No space left on device\); free"
        )
        with pytest.raises(PlanError, match=message):
            store.reserve("second", 64 * 2**20)
        # ext4 keeps what it found before it ran out.
        assert os.statvfs(folder).f_bavail * PAGE == pytest.approx(free, rel=0.01)
        store.write(kept, pages(1, 1)).wait()
        store.write(store.reserve("third", 2**20), pages(1, 1)).wait()
        store.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_no_space_can_be_set_aside_what_is_free_has_to_do(tmp_path, monkeypatch, number):
    def posix_fallocate(descriptor, offset, nbytes):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    store = Store(tmp_path)
    extent = store.reserve("weights", 8 * PAGE)
    memory = pages(8, 1)
    store.read(extent, memory).wait()
    assert memory == bytes(8 * PAGE)
    with pytest.raises(
        PlanError, match=r"1.00 PiB are needed on .* for huge, .* there are .* .No space left on device.; free some"
    ):
        store.reserve("huge", 2**50)
    store.close()


@pytest.mark.parametrize(
    ("number", "doing", "why"),
    [
        (errno.ENOSPC, "writing", "No space left on device"),
        (errno.EIO, "writing", "Input/output error"),
        (errno.EIO, "reading", "Input/output error"),
    ],
)
def test_a_failed_request_names_file_tensor_and_offset(tmp_path, number, doing, why):
    store = Store(tmp_path, file=failing(number, reading=doing == "reading", writing=doing == "writing"))
    good, bad = store.reserve("good", PAGE), store.reserve("layer.weight", 3 * PAGE)
    begin = store.read if doing == "reading" else store.write
    failed, fine = begin(bad, pages(2), PAGE), begin(good, pages(1))
    message = rf"{doing} 8192 bytes of layer.weight at offset 8192 of '{store.path}/tensors' failed \({why}\); what"
    # Who waits again is told again.
    for _ in range(2):
        with pytest.raises(StoreError, match=message):
            failed.wait()
    assert not failed.over
    fine.wait()
    store.close()
    assert not list(tmp_path.iterdir())


def test_all_requests_end_before_a_failure_is_told(tmp_path):
    class FirstFails(DirectFile):
        ended: tuple[int, ...] = ()
        failed = threading.Event()

        def read_at(self, memory, offset):
            if offset == 0:
                self.failed.set()
                raise OSError(errno.EIO, "bad")
            self.failed.wait(60)
            count = super().read_at(memory, offset)
            FirstFails.ended += (offset,)
            return count

    store = Store(tmp_path, file=FirstFails)
    extent = store.reserve("weights", 3 * REQUEST_BYTES)
    with pytest.raises(StoreError, match="bad"):
        store.read(extent, pages(3 * REQUEST_BYTES // PAGE)).wait()
    assert sorted(FirstFails.ended) == [REQUEST_BYTES, 2 * REQUEST_BYTES]
    store.close()


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 2 * PAGE + 100])
def test_short_counts_are_gone_on_from(tmp_path, most):
    class Short(DirectFile):
        def read_at(self, memory, offset):
            return min(most, super().read_at(memory, offset))

        def write_at(self, memory, offset):
            # Of what is cut short here the rest is not written, as if the request were.
            whole = most // PAGE * PAGE
            return min(most, super().write_at(memory[:whole], offset))

    store = Store(tmp_path, file=Short)
    extent, written, read = store.reserve("weights", 8 * PAGE), pages(8, 1), pages(8)
    store.write(extent, written).wait()
    store.read(extent, read).wait()
    assert read == written
    store.close()


@pytest.mark.parametrize("count", [0, 100])
def test_a_request_that_gets_nowhere_fails(tmp_path, count):
    class Stuck(DirectFile):
        def read_at(self, memory, offset):
            return count

        def write_at(self, memory, offset):
            return count

    store = Store(tmp_path, file=Stuck)
    if not store._file.direct:
        pytest.skip("no O_DIRECT, so any count is progress")
    extent = store.reserve("weights", 2 * PAGE)
    with pytest.raises(StoreError, match="nothing was taken"):
        store.write(extent, pages(2)).wait()
    with pytest.raises(StoreError, match="the file ends before"):
        store.read(extent, pages(2)).wait()
    store.close()


@pytest.mark.parametrize("size", [0, 2 * PAGE, 2 * PAGE + 100])
def test_a_file_cut_short_by_others_is_told_of(store, size):
    extent = store.reserve("weights", 8 * PAGE)
    os.truncate(store.path / "tensors", size)
    with pytest.raises(StoreError, match=rf"of weights at offset {size // PAGE * PAGE} .*the file ends before"):
        store.read(extent, pages(8)).wait()


def test_a_file_deleted_by_others_goes_on(store):
    extent, written, read = store.reserve("weights", 8 * PAGE), pages(8, 1), pages(8)
    store.write(extent, written).wait()
    (store.path / "tensors").unlink()
    (store.path / "lock").unlink()
    store.path.rmdir()
    store.read(extent, read).wait()
    assert read == written
    store.write(store.reserve("more", PAGE), pages(1)).wait()
    with pytest.raises(PlanError, match=r"are needed on .* for huge, "):
        store.reserve("huge", 2**50)


@pytest.mark.parametrize("doing", ["read", "write"])
def test_o_direct_refused_at_a_request_is_told_of_once(tmp_path, doing):
    class Refusing(DirectFile):
        together = threading.Barrier(4)

        def read_at(self, memory, offset):
            return self._answer(super().read_at, memory, offset)

        def write_at(self, memory, offset):
            return self._answer(super().write_at, memory, offset)

        def _answer(self, move, memory, offset):
            if self.direct:
                # So that all are refused before one of them is told of.
                self.together.wait(60)
                raise OSError(errno.EINVAL, "Invalid argument")
            return move(memory, offset)

    store = Store(tmp_path, file=Refusing)
    extent, memory = store.reserve("weights", 4 * REQUEST_BYTES), pages(4 * REQUEST_BYTES // PAGE)
    with recorded() as told:
        getattr(store, doing)(extent, memory).wait()
        store.write(extent, pages(3, 1), PAGE).wait()
    (warning,) = told
    assert f"'{store.path}' is on a file system without O_DIRECT" in str(warning.message)
    # From now on the page cache is not passed: requests need no alignment any more.
    assert os.pread(store.descriptor, 3, PAGE + 1) == bytes(pages(3, 1)[1:4])
    store.close()


def test_o_direct_refused_when_opened_is_told_of_once(tmp_path, monkeypatch):
    original = os.open

    def refusing(path, flags, *arguments, **keywords):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refusing)
    with recorded() as told:
        store = Store(tmp_path)
        store.write(store.reserve("weights", PAGE), pages(1)).wait()
    (warning,) = told
    assert "without O_DIRECT" in str(warning.message)
    store.close()


def test_a_request_that_is_not_aligned_or_too_long_is_refused(store):
    extent = store.reserve("weights", 4 * PAGE)
    for start, memory in ((0, pages(5)), (PAGE, pages(4)), (-PAGE, pages(1))):
        with pytest.raises(ValueError, match="weights has 16384 bytes and"):
            store.read(extent, memory, start)
    for start, memory in ((1, pages(1)), (0, pages(1)[:100]), (0, pages(2)[100 : 100 + PAGE])):
        with pytest.raises(ValueError, match=r"weights: .* are not aligned to 4096"):
            store.write(extent, memory, start)
    assert store.read_bytes == store.written_bytes == 0


class Gated(DirectFile):
    def __init__(self, path):
        super().__init__(path)
        self.began, self.go = threading.Event(), threading.Event()

    def write_at(self, memory, offset):
        self.began.set()
        assert self.go.wait(60)
        return super().write_at(memory, offset)


def test_closing_ends_what_is_under_way_and_gives_up_what_has_not_begun(tmp_path):
    store = Store(tmp_path, file=Gated)
    file, extent = store._file, store.reserve("weights", 2 * REQUESTS * PAGE)
    transfers = [store.write(extent, pages(1), i * PAGE) for i in range(2 * REQUESTS)]
    file.began.wait(60)
    closing = threading.Thread(target=store.close)
    closing.start()
    with pytest.raises(StoreError, match="the store was closed before this transfer was over"):
        transfers[-1].wait()
    assert (store.path / "tensors").exists()
    file.go.set()
    closing.join(60)
    transfers[0].wait()
    assert not list(tmp_path.iterdir())


def test_a_closed_store_takes_nothing_more(tmp_path):
    before = os.listdir("/proc/self/fd")
    store = Store(tmp_path)
    extent = store.reserve("weights", PAGE)
    store.write(extent, pages(1)).wait()
    store.close()
    assert store.closed
    assert os.listdir("/proc/self/fd") == before
    with open(os.devnull) as other:
        # The number of its file may be another's now.
        store.close()
        assert os.fstat(other.fileno())
        for call in (lambda: store.read(extent, pages(1)), lambda: store.reserve("more", 1)):
            with pytest.raises(StoreError, match="is closed, and"):
                call()
    assert store.descriptor == -1


def test_a_store_that_is_let_go_of_ends_its_requests_first(tmp_path):
    others = {*threading.enumerate()}
    store = Store(tmp_path, file=Gated)
    file, memory = store._file, pages(1, 1)
    transfer = store.write(store.reserve("weights", PAGE), memory)
    file.began.wait(60)
    threads = {*threading.enumerate()} - others
    del store
    gc.collect()
    # Its own thread is the last to let go of it.
    assert file.descriptor != -1
    file.go.set()
    transfer.wait()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert file.descriptor == -1
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    class Broken(DirectFile):
        def __init__(self, path):
            path.touch()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = os.listdir("/proc/self/fd")
    with pytest.raises(PlanError, match=r"cannot be written to \(Too many open files\)"):
        Store(tmp_path, file=Broken)
    assert not list(tmp_path.iterdir())
    assert os.listdir("/proc/self/fd") == before


def test_a_warning_made_an_error_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    before = os.listdir("/proc/self/fd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="without O_DIRECT"):
            Store(tmp_path)
    assert not list(tmp_path.iterdir())
    assert os.listdir("/proc/self/fd") == before
