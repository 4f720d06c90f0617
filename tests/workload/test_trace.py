import copy
import dataclasses
import itertools
import resource

import pytest
import torch
from torch import nn
from workload.check import assert_same, real_step, state_of
from workload.families import FAMILIES, GPT, Pair, Reader, Recurrent, Sample, Wrapped, tokens, two_tensors

from lightning_largescale.arithmetic import lightning_plugin
from lightning_largescale.errors import PlanError
from lightning_largescale.workload import Workload

# Where the real kernel keeps a normalisation's statistics in float32 and its fake in bfloat16: a few bytes a channel.
NEARLY = {("convolutions", "bf16-mixed"), ("bert", "bf16-mixed")}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_fake_step_equals_the_real_one(family, precision):
    module, batch = FAMILIES[family]()
    before = state_of(module)
    traced = Workload.trace(module, batch, precisions=(precision,))
    assert_same(before, state_of(module))
    assert traced.approximate == ()
    real = real_step(module, batch, precision=precision)
    assert_same(before, state_of(module))
    assert {p.name for p in traced.parameters if p.used} == real.used
    if (family, precision) in NEARLY:
        assert traced.steps[precision].peak_bytes == pytest.approx(real.step.peak_bytes, rel=1e-3)
    else:
        assert traced.steps[precision] == real.step


def test_lstm_is_run_for_the_workspace_that_its_fake_leaves_out():
    module, batch = Wrapped(Recurrent(nn.LSTM)), torch.randn(4, 6, 8)
    work = Workload.trace(module, batch, precisions=("32-true",))
    (why,) = work.approximate
    assert "keeps a workspace for backward, of a size that fakes do not know): a real step was measured" in why
    step, real = work.steps["32-true"], real_step(module, batch).step
    assert step.saved_bytes == pytest.approx(real.saved_bytes, rel=0.15)
    samples, length, first, width = 4, 6, 8, 16
    assert step.forward_flops == 2 * samples * length * 4 * width * (first + 3 * width)
    assert step.backward_flops == 2 * step.forward_flops


def test_lstm_in_evaluation_keeps_nothing():
    module = Wrapped(Recurrent(nn.LSTM))
    module.validation_step = module.training_step
    work = Workload.trace(module, torch.randn(4, 6, 8), step="validation_step", precisions=("32-true",))
    assert work.approximate == ()


def test_segments_follow_the_step():
    work = Workload.trace(GPT(layers=2), tokens(), precisions=("32-true",))
    segments = work.steps["32-true"].segments
    assert [s.block for s in segments] == [None, "blocks.0", None, "blocks.1", None] or [s.block for s in segments] == [
        None,
        "blocks.0",
        "blocks.1",
        None,
    ]
    assert segments[0].forward_entry_bytes == 0
    for one, next_one in itertools.pairwise(segments):
        assert one.forward_exit_bytes == next_one.forward_entry_bytes
        assert one.backward_entry_bytes == next_one.backward_exit_bytes
    for one in segments:
        assert one.forward_peak_bytes >= max(one.forward_entry_bytes, one.forward_exit_bytes)
        assert one.backward_peak_bytes >= max(one.backward_entry_bytes, one.backward_exit_bytes)
    assert {name for s in segments for name in s.completed} == {p.name for p in work.parameters if p.used}
    for one in (s for s in segments if s.block):
        assert {name.rpartition(".")[0].startswith(one.block) for name in one.completed} == {True}
        own = sum(p.bytes for p in work.parameters if p.block == one.block)
        assert 0 <= one.backward_gradient_bytes <= own
    first, second = (s for s in segments if s.block)
    assert first.forward_flops == second.forward_flops
    assert first.saved_bytes == second.saved_bytes
    assert first.input_bytes == second.input_bytes == 4 * 16 * 32 * 4


def test_flops_by_hand():
    samples, width, wide = 4, 8, 16
    module = Wrapped(nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, 2)))
    step = Workload.trace(module, torch.randn(samples, width), precisions=("32-true",)).steps["32-true"]
    assert step.forward_flops == 2 * samples * (width * wide + wide * 2)
    # The first layer's input needs no gradient.
    assert step.backward_flops == 2 * step.forward_flops - 2 * samples * width * wide


def test_attention_flops_are_counted_on_cpu():
    plain = Workload.trace(GPT(layers=1), tokens(length=16), precisions=("32-true",)).steps["32-true"]
    b, t, d, v = 4, 16, 32, 64
    matrices = 2 * b * t * (12 * d * d + d * v)
    assert plain.forward_flops == matrices + 2 * 2 * b * t * t * d


def test_block_run_twice_appears_twice():
    module, batch = FAMILIES["shared"]()
    work = Workload.trace(module, batch, precisions=("32-true",))
    assert [s.block for s in work.steps["32-true"].segments if s.block] == ["model.layers.0"] * 4
    assert work.blocks == ("model.layers.0",)


def test_parameters():
    work = Workload.trace(GPT(tied=True, layers=2), tokens(), precisions=("32-true",))
    by_name = {p.name: p for p in work.parameters}
    tied = by_name["tokens.weight"]
    assert tied.aliases == ("head.weight",)
    assert tied.embedding
    assert tied.block is None
    assert tied.shape == (64, 32)
    assert tied.bytes == 64 * 32 * 4
    assert by_name["blocks.1.qkv.weight"].block == "blocks.1"
    assert work.numel == sum(p.numel() for p in GPT(tied=True, layers=2).parameters())
    assert work.parameter_bytes == work.trainable_bytes == 4 * work.numel


def test_frozen_parameters_have_no_gradient_and_no_state():
    work = Workload.trace(GPT(frozen=True), tokens(), precisions=("32-true",))
    frozen = {p.name for p in work.parameters if not p.trainable}
    assert "tokens.weight" in frozen
    assert not any(p.used for p in work.parameters if p.name in frozen)
    assert not frozen & set(work.optimizers[0].state_bytes)
    assert 0 < work.trainable_bytes < work.parameter_bytes


def test_bfloat16_saves_less():
    steps = Workload.trace(GPT(), tokens()).steps
    assert steps["bf16-mixed"].saved_bytes < steps["32-true"].saved_bytes
    assert steps["bf16-mixed"].forward_flops == steps["32-true"].forward_flops


def test_copies_of_what_blocks_own_are_told_apart():
    batch = tokens(samples=1, length=4)
    work = Workload.trace(GPT(layers=2, length=4), batch)
    matrices = {p.block: 0 for p in work.parameters}
    for p in work.parameters:
        matrices[p.block] += p.numel if len(p.shape) > 1 else 0
    for segment in work.steps["bf16-mixed"].segments:
        own = matrices[segment.block] if segment.block else 0
        # Two bytes an element are written, four were read.
        assert (segment.saved_copy_bytes, segment.moved_copy_bytes) == (2 * own, 6 * own)
        assert segment.forward_copy_bytes <= segment.forward_peak_bytes
    assert all(s.saved_copy_bytes == s.forward_copy_bytes == 0 for s in work.steps["32-true"].segments)


@pytest.mark.parametrize(
    ("step", "stage"), [("validation_step", "validate"), ("test_step", "test"), ("predict_step", "predict")]
)
def test_evaluation_has_no_backward(step, stage):
    module = GPT(dropout=0.1)
    module.test_step = module.validation_step
    work = Workload.trace(module, tokens(), step=step, precisions=("32-true",))
    assert work.stage == stage
    assert work.approximate == ()
    assert work.optimizers == ()
    traced = work.steps["32-true"]
    assert traced.saved_bytes == traced.backward_flops == 0
    assert traced.forward_flops > 0
    assert traced.output_bytes == (4 * 16 * 64 * 4 if step == "predict_step" else 4)
    assert module.training


def test_forward_on_example_input():
    work = Workload.trace(GPT(), (tokens()[0],), step="forward", precisions=("32-true",))
    assert work.stage == "fit"
    assert work.optimizers
    assert work.approximate == ()
    assert work.steps["32-true"].backward_flops > 0


def test_plain_module():
    work = Workload.trace(nn.Linear(8, 2), torch.randn(4, 8))
    assert (work.name, work.blocks, work.optimizers, work.approximate) == ("Linear", (), (), ())
    assert all(p.used for p in work.parameters)


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda: {"x": two_tensors()[0], "y": two_tensors()[1], "name": ["a"] * 4}, lambda b: (b["x"], b["y"])),
        (lambda: [*two_tensors()], lambda b: b),
        (lambda: Sample(*two_tensors()), lambda b: (b.x, b.y)),
        (lambda: Pair(*two_tensors()), lambda b: (b.x, b.y)),
        (
            lambda: {"in": [{"x": two_tensors()[0]}, None], "out": (two_tensors()[1], 3)},
            lambda b: (b["in"][0]["x"], b["out"][0]),
        ),
    ],
    ids=["dict", "list", "dataclass", "namedtuple", "nested"],
)
def test_batches(make, read):
    batch = make()
    work = Workload.trace(Reader(read), batch, precisions=("32-true",))
    assert work.approximate == ()
    assert (work.batch_samples, work.batch_bytes) == (4, 4 * 8 * 4 + 4 * 8)


def test_batches_of_transformers():
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    x, y = two_tensors()
    encoding = BatchEncoding({"x": x, "y": y})
    assert Workload.trace(Reader(lambda b: (b["x"], b.y)), encoding, precisions=("32-true",)).approximate == ()
    output = BaseModelOutput(last_hidden_state=x, attentions=(y,))
    work = Workload.trace(Reader(lambda b: (b.last_hidden_state, b.attentions[0])), output, precisions=("32-true",))
    assert work.approximate == ()


# torch.compile's own import warns of torch.jit.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_parts_run_eagerly():
    module = GPT(layers=2)
    for index, block in enumerate(module.blocks):
        module.blocks[index] = torch.compile(block)
    work = Workload.trace(module, tokens(), precisions=("32-true",))
    plain = Workload.trace(GPT(layers=2), tokens(), precisions=("32-true",))
    assert work.approximate == ()
    assert work.blocks == ("blocks.0", "blocks.1")
    step = work.steps["32-true"]
    # The names of parameters tell of the compilation, and nothing else does.
    segments = tuple(
        dataclasses.replace(one, completed=tuple(name.replace("._orig_mod", "") for name in one.completed))
        for one in step.segments
    )
    assert {"32-true": dataclasses.replace(step, segments=segments)} == plain.steps


def test_lazy_modules_are_refused():
    module = Wrapped(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(PlanError, match=r"'model.0.weight' is of a lazy module, so it has no shape to plan with"):
        Workload.trace(module, torch.randn(4, 8))


def test_a_module_on_meta_is_traced():
    with torch.device("meta"):
        module = GPT()
    meta = Workload.trace(module, tokens(), precisions=("32-true",))
    assert meta.approximate == ()
    assert meta.steps == Workload.trace(GPT(), tokens(), precisions=("32-true",)).steps
    assert all(p.is_meta for p in module.parameters())


def test_no_loss_traces_the_forward_only():
    class Skipping(Wrapped):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    work = Workload.trace(Skipping(nn.Linear(8, 8)), torch.randn(4, 8), precisions=("32-true",))
    assert work.approximate == ("training_step returned None, so only its forward was traced",)
    assert work.steps["32-true"].backward_flops == 0
    assert work.steps["32-true"].forward_flops > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "fit"}, "step='fit' cannot be traced; give one of 'training_step'"),
        ({"precisions": ()}, "precisions is empty; give one or more of '32-true', 'bf16-mixed', "),
        ({"precisions": ("fp8",)}, "precision='fp8' cannot be traced; give one of '32-true', 'bf16-mixed', "),
        (
            {"precisions": ("64-true",)},
            r"'64-true' is traced on a module of float64 parameters and Linear has none; convert it first, with",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(PlanError, match=message):
        Workload.trace(nn.Linear(2, 2), torch.randn(1, 2), **arguments)


@pytest.mark.parametrize(("precision", "share"), [("bf16-true", 0.5), ("16-true", 0.5), ("64-true", 2)])
def test_a_true_precision_is_traced_as_the_module_is_stored(precision, share):
    class Floats(Wrapped):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    batch, whole = torch.randn(4, 8), Floats(nn.Linear(8, 8, bias=False))
    full = Workload.trace(whole, batch, precisions=("32-true",))
    converted = lightning_plugin(precision, "cpu").convert_module(whole)
    work = Workload.trace(converted, batch, precisions=(precision,))
    assert work.approximate == ()
    assert work.parameter_bytes == full.parameter_bytes * share
    assert work.steps[precision].largest_temporary_bytes == full.steps["32-true"].largest_temporary_bytes * share
    states = [sum(one.optimizers[0].state_bytes.values()) for one in (full, work)]
    # Beside the moments Adam counts its steps, in four bytes.
    assert states[1] - states[0] == (share - 1) * 2 * full.parameter_bytes


class ThroughNumpy(Wrapped):
    """Takes its loss through NumPy, which has no bfloat16."""

    def training_step(self, batch, batch_idx):
        out = self.model(batch)
        out.detach().numpy()
        return out.mean()


def test_a_precision_that_cannot_run_is_left_out():
    work = Workload.trace(ThroughNumpy(nn.Linear(8, 8)), torch.randn(4, 8))
    assert list(work.steps) == ["32-true"]
    measured, left_out = work.approximate
    assert measured.endswith("a real step was measured on 1 and 2 of the 4 samples and drawn out to all")
    assert left_out.startswith("bf16-mixed is left out, since training_step cannot run on fake tensors (")
    assert left_out.endswith("nor on one sample (TypeError: Got unsupported ScalarType BFloat16)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_traced_by_the_kernels_that_there_are():
    here, there = (Workload.trace(GPT(), tokens(), device_type=device) for device in ("cpu", "cuda"))
    assert there.steps == here.steps
    assert there.approximate == ("there is no CUDA here: CPU kernels were traced",)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("edges", torch.eye(16).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.edges, self.layer(x))


def test_sparse_tensors_are_traced_as_dense_ones():
    module, batch = Wrapped(Graph()), torch.randn(16, 8)
    work = Workload.trace(module, batch, precisions=("32-true",))
    assert work.approximate == ("sparse tensors were traced as dense ones, whose operations need more",)
    assert work.buffer_bytes == 16 * (4 + 2 * 8)
    step, real = work.steps["32-true"], real_step(module, batch).step
    assert step.saved_bytes >= real.saved_bytes


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return torch.nn.functional.grouped_mm(x, self.table, offs=torch.tensor([2, 4], dtype=torch.int32))


def test_what_fails_on_fakes_is_not_logged(caplog, capfd):
    Workload.trace(Wrapped(Experts()), torch.randn(4, 8), precisions=("32-true",))
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_nothing_is_allocated():
    module = GPT(vocabulary=8192, width=512, heads=8, layers=12, length=256)
    Workload.trace(GPT(), tokens())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = Workload.trace(copy.copy(module), tokens(32, 256, 8192), precisions=("32-true",))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert work.steps["32-true"].peak_bytes > 2 * 10**9
    assert grown < 50 * 2**20
