"""The pretended device itself: what is said of it in the README."""

import subprocess
import sys

import pytest
import torch

import pretend_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(pretend_cuda.installed() is None, reason="no device is pretended"),
]
LARGE = 1 << 20


@pytest.fixture
def device():
    """The extension, whose reports are the test's own, on its first device."""
    extension = pretend_cuda.installed()
    torch.cuda.synchronize()
    extension.set_report_file("")
    extension.clear_reports()
    yield extension
    torch.cuda.synchronize()
    extension.clear_reports()
    extension.set_report_file(pretend_cuda.report_file())


@pytest.fixture
def limited(device):
    torch.cuda.empty_cache()
    own = device.stats(0)
    device.set_limit(0, own["context"] + own["reserved"] + 8 * LARGE)
    yield device
    torch.cuda.empty_cache()
    device.set_limit(0, own["limit"])


def test_memory_is_limited(limited):
    held = torch.empty(6 * LARGE, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 4 MiB"):
        torch.empty(4 * LARGE, dtype=torch.uint8, device="cuda")
    del held
    # What is kept for reuse is given up for what does not fit otherwise.
    assert torch.empty(7 * LARGE, dtype=torch.uint8, device="cuda").nbytes == 7 * LARGE


def test_memory_is_counted(device):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one = torch.empty(LARGE, dtype=torch.uint8, device="cuda")
    other = torch.empty(3, device="cuda")
    assert torch.cuda.memory_allocated() - before == LARGE + 512
    del one, other
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == LARGE + 512


def test_freed_memory_has_no_old_values(device):
    address = torch.ones(LARGE, device="cuda").data_ptr()
    again = torch.empty(LARGE, device="cuda")
    assert again.data_ptr() == address
    assert again.isnan().all()


def test_pinned_copies_are_late(device):
    target = torch.empty(8, pin_memory=True)
    target.copy_(torch.ones(8, device="cuda"), non_blocking=True)
    assert target.isnan().all()
    torch.cuda.synchronize()
    assert target.eq(1).all()


def test_pinned_sources_are_read_late(device):
    source = torch.ones(8).pin_memory()
    copied = source.to("cuda", non_blocking=True)
    source.fill_(2)
    assert copied.sum().item() == 16


def test_kernels_are_late(device):
    def raw(tensor):
        from ctypes import c_float

        return c_float.from_address(tensor.data_ptr()).value

    made = torch.ones(4, device="cuda") * 3
    changed = torch.ones(4, device="cuda").mul_(5)
    assert raw(made) != 3
    assert raw(changed) != 5
    torch.cuda.synchronize()
    assert (raw(made), raw(changed)) == (3, 5)


def test_layers_are_normalized_in_half_precision(device):
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.rand(8, dtype=torch.bfloat16)

    def gradients(where):
        inputs = [one.to(where).requires_grad_() for one in (x, weight)]
        torch.nn.functional.layer_norm(inputs[0], (8,), inputs[1]).float().square().sum().backward()
        return [one.grad.cpu() for one in inputs]

    # They round at other places.
    torch.testing.assert_close(gradients("cuda"), gradients("cpu"), rtol=2e-2, atol=5e-2)


def test_pinned_memory_is_taken_in_powers_of_two(device):
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in (4096, 5000)]
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] - before == 4096 + 8192
    del held
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before


def test_pageable_copies_are_at_once_and_told_of(device):
    source = torch.ones(LARGE)
    copied = source.to("cuda", non_blocking=True)
    source.fill_(2)
    assert copied.sum().item() == LARGE
    (report,) = device.reports()
    assert report.startswith(f"pageable: copy to device of {4 * LARGE} bytes is called asynchronous")
    assert "test_device.py" in report


def test_a_read_beside_a_write_is_told_of(device):
    side = torch.cuda.Stream()
    written = torch.zeros(LARGE, device="cuda")
    with torch.cuda.stream(side):
        written + 1
    (report,) = device.reports()
    assert report.startswith("race: aten::add reads on cuda:0 stream")
    assert "test_device.py" in report


def test_reads_beside_reads_and_other_bytes_are_not_told_of(device):
    side = torch.cuda.Stream()
    written = torch.zeros(LARGE, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    written[: LARGE // 2].add_(1)
    with torch.cuda.stream(side):
        written[LARGE // 2 :].add_(1)
        written[LARGE // 2 :].sum()
    torch.cuda.current_stream().wait_stream(side)
    assert written.sum().item() == LARGE
    assert device.reports() == []


@pytest.mark.parametrize("wait", ["stream", "event", "synchronize", "device"])
def test_whoever_waits_is_not_told_of(device, wait):
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    written = torch.zeros(LARGE, device="cuda").add_(1)
    if wait == "stream":
        side.wait_stream(current)
    elif wait == "event":
        side.wait_event(current.record_event())
    elif wait == "synchronize":
        current.synchronize()
    else:
        torch.cuda.synchronize()
    with torch.cuda.stream(side):
        found = written * 2
    side.synchronize()
    assert found.cpu().eq(2).all()
    assert device.reports() == []


@pytest.mark.parametrize("told", [True, False])
def test_memory_that_another_stream_uses_is_reused_only_when_told(device, told):
    side = torch.cuda.Stream()
    host = torch.empty(LARGE, pin_memory=True)
    source = torch.ones(LARGE, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(source, non_blocking=True)
        if told:
            source.record_stream(side)
    del source
    torch.zeros(LARGE, device="cuda")
    torch.cuda.synchronize()
    assert host.eq(1).all() == told
    assert [report.split(":")[0] for report in device.reports()] == ([] if told else ["reuse"])


def test_memory_is_registered_until_its_copies_are_over(device):
    runtime = torch.cuda.cudart()
    target, source = torch.empty(LARGE), torch.ones(LARGE, device="cuda")
    for waits in (True, False):
        runtime.cudaHostRegister(target.data_ptr(), target.nbytes, 0)
        assert target.is_pinned()
        target.copy_(source, non_blocking=True)
        if waits:
            torch.cuda.synchronize()
        runtime.cudaHostUnregister(target.data_ptr())
        assert not target.is_pinned()
        assert [report.split(":")[0] for report in device.reports()] == ([] if waits else ["pinned"])


def test_tensors_of_two_devices_do_not_meet(device):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_numbers_are_drawn_as_seeded(device):
    torch.manual_seed(1)
    one = torch.randn(4, device="cuda")
    on_cpu = torch.randn(4)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(4), on_cpu)
    assert torch.equal(torch.randn(4, device="cuda"), one)


def test_sparse_gradients(device):
    def trained(where):
        torch.manual_seed(0)
        table = torch.nn.Embedding(10, 4, sparse=True).to(where)
        table.weight.data.copy_(torch.arange(40.0).view(10, 4))
        optimizer = torch.optim.SparseAdam(table.parameters(), 0.1)
        for _ in range(2):
            table(torch.tensor([1, 3, 1], device=where)).pow(2).sum().backward()
            optimizer.step()
        assert table.weight.grad.is_sparse
        return table.weight.detach().cpu(), table.weight.grad.coalesce().values().cpu()

    for one, other in zip(trained("cuda"), trained("cpu"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", ["cuda", "cuda:1", None])
def test_files_are_loaded_onto_it(device, tmp_path, place):
    torch.save({"a": torch.arange(4.0, device="cuda:0"), "b": torch.ones(2)}, tmp_path / "saved")
    loaded = torch.load(tmp_path / "saved", map_location=place)
    assert loaded["a"].device == torch.device(place if place == "cuda:1" else "cuda:0")
    assert loaded["a"].sum().item() == 6
    assert loaded["b"].is_cuda == (place is not None)


CONTEXT = """
import torch, pretend_cuda
device = pretend_cuda.installed()
assert device is not None and not device.contexts()
{begin}
print(device.contexts(), device.reports())
"""


@pytest.mark.parametrize(
    ("begin", "opened", "kinds"),
    [
        ("torch.cuda.set_device(1); torch.ones(2, device='cuda')", [1], []),
        ("torch.ones(2, device='cuda:0')", [0], ["context"]),
        ("torch.ones(2).pin_memory()", [0], ["context"]),
        ("torch.ones(2, device='cuda:1'); torch.ones(2).pin_memory()", [1], []),
    ],
)
def test_a_rank_has_a_context_on_its_own_device(begin, opened, kinds, monkeypatch, tmp_path):
    environment = pretend_cuda.environment(reports=str(tmp_path / "reports"))
    for name, value in {**environment, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    out = subprocess.run(
        [sys.executable, "-c", CONTEXT.format(begin=begin)], capture_output=True, text=True, check=True
    )
    assert [int(word) for word in "01" if f"{word}: '" in out.stdout] == opened
    lines = (tmp_path / "reports").read_text().splitlines() if kinds else []
    assert [line.split(":")[0] for line in lines] == kinds


def test_a_fork_of_a_process_that_has_begun_cannot(run_python):
    code = """
import os, torch
if {begins}: torch.ones(2, device="cuda")
child = os.fork()
if child == 0:
    try:
        torch.ones(2, device="cuda")
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert "Cannot re-initialize CUDA in forked subprocess" in run_python(code.format(begins=True))
    assert run_python(code.format(begins=False)) == ""
