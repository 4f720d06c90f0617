"""A recorded construction gives what the plain one gives, bit for bit, and holds little of it at a time."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import math
import pickle
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from ranks import mesh_of
from recorded import Built, assert_same_bits, assert_same_construction, tensors_of, values_of
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from lightning_largescale.parallel.deferred import DeferredError, Recording, active_recording, carry, portions
from lightning_largescale.parallel.materialize import find_unmade
from lightning_largescale.parallel.order import full
from lightning_largescale.parallel.rows import Rows, mark_rows

EVERYDAY = ("gpt2", "t5", "torch", "attention")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in EVERYDAY]


@pytest.mark.parametrize("name", [*EVERYDAY, *SLOW])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_families(name):
    assert_same_construction(FAMILIES[name])


@pytest.mark.parametrize("name", [*EVERYDAY, *SLOW])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_of_families_is_left_out(name):
    with (recording := Recording()).record():
        module = FAMILIES[name]()
    unmade = find_unmade(module, [recording])
    assert not recording.left_out([*unmade.tensors.values(), *unmade.others])


def gpt_by_apply(module):
    module.blocks = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)
    )
    module.embedding, module.head = nn.Embedding(11, 8, padding_idx=2), nn.Linear(8, 11, bias=False)
    module.embedding.weight = module.head.weight

    def init(part):
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, 0.0, 0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)

    module.apply(init)
    for name, parameter in module.named_parameters():
        if name.endswith("3.weight"):
            nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(6))


def initializers(module):
    for name in ("orthogonal_", "xavier_uniform_", "kaiming_normal_", "trunc_normal_", "eye_"):
        for number, size in enumerate([(5, 3), (3, 5)]):
            weight = nn.Parameter(getattr(nn.init, name)(torch.empty(size)))
            module.register_parameter(f"{name}{number}", weight)
    module.sparse = nn.Parameter(nn.init.sparse_(torch.empty(10, 4), 0.3))
    module.dirac = nn.Parameter(nn.init.dirac_(torch.empty(3, 3, 2)))
    module.brain = nn.Parameter(nn.init.trunc_normal_(torch.empty(4, 4, dtype=torch.bfloat16), a=-0.5, b=0.5))


def parametrized(module):
    module.normed = parametrizations.weight_norm(nn.Linear(4, 3))
    module.spectral = parametrizations.spectral_norm(nn.Linear(5, 3))
    module.orthogonal = parametrizations.orthogonal(nn.Linear(4, 4))
    module.cayley = parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley")
    given = nn.Linear(4, 4)
    nn.init.orthogonal_(given.weight)
    module.kept = parametrizations.orthogonal(given)
    module.after = nn.Linear(3, 3)


def copied_layers(module):
    module.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    module.steps = torch.arange(6.0)
    module.middle = module.steps[2:4]
    module.copied = copy.deepcopy(nn.ModuleDict({"own": Built(aliased)}))
    module.copied["own"].whole.mul_(3)


def aliased(module):
    module.whole = torch.arange(6.0)
    module.part = module.whole[2:4]


def recurrent(module):
    module.lstm = nn.LSTM(4, 5, 2, bidirectional=True, proj_size=2)
    module.gru, module.cell = nn.GRU(3, 3), nn.LSTMCell(3, 3)


def buffers(module):
    table = torch.zeros(10, 6)
    places = torch.arange(10).float().unsqueeze(1)
    rates = torch.exp(torch.arange(0, 6, 2).float() * (-math.log(1e4) / 6))
    table[:, 0::2], table[:, 1::2] = torch.sin(places * rates), torch.cos(places * rates)
    module.register_buffer("table", table[None], persistent=False)
    module.mask = torch.tril(torch.ones(5, 5)).bool()
    module.chosen = torch.arange(4)[torch.tensor([True, False, True, True])]
    module.norm = nn.BatchNorm2d(3)


def read_values(module):
    module.rates = nn.ModuleList(nn.Dropout(rate.item()) for rate in torch.linspace(0, 0.1, 6))
    module.first = nn.Linear(4, 4)
    deviation = module.first.weight.std().item()
    module.second = nn.Linear(4, 4)
    module.second.weight.data.mul_(deviation)
    for place in range(3):
        module.second.bias.data[place] = module.second.weight[place, 0].item() * 2
    module.table = torch.tensor(module.second.weight.tolist())
    module.doubled = nn.Parameter(torch.tensor(module.first.bias.detach().numpy() * 2))
    if bool((module.first.weight > 0).any()) and torch.allclose(module.first.weight, module.first.weight):
        module.third = nn.Linear(2, 2)
    module.text = torch.tensor([float(f"{module.first.weight[0, 0].item():.3f}"), len(repr(module.first.weight))])
    module.positive = module.first.weight.data[module.first.weight > 0]


def looks(module):
    weight = nn.Linear(2, 2).weight
    assert (weight.device.type, weight.is_cpu, weight.is_meta) == ("cpu", True, False)
    assert weight.data.to("cpu").type() == "torch.FloatTensor"
    assert weight.data.cpu().data is not None
    moved = weight.data.to("cpu")
    moved.zero_()
    module.weight = weight
    module.like = torch.ones(2, device=weight.device).type_as(weight.double())
    module.new = weight.new_tensor([1.0, 2.0])
    module.old = weight.data.new(2).zero_()
    module.same = torch.as_tensor(weight.data).add_(1)


def from_arrays(module):
    array = np.random.RandomState(0).rand(4, 3).astype("f")
    module.embedding = nn.Embedding(4, 3)
    module.embedding.weight.data.copy_(torch.from_numpy(array))
    module.shared = torch.as_tensor(array)
    array[:] = 0
    module.drawn = torch.from_numpy(np.ones(5, dtype="f")).normal_()
    module.given = nn.Linear(3, 4)
    module.given.weight.data = torch.from_numpy(np.ones((4, 3), dtype="f"))
    nn.init.zeros_(module.given.weight)
    module.after = nn.Linear(3, 3)


def from_a_file(module):
    file = io.BytesIO(WEIGHTS)
    module.copied, module.assigned = nn.Linear(3, 2), nn.Linear(3, 2)
    module.copied.load_state_dict(torch.load(file))
    file.seek(0)
    module.assigned.load_state_dict(torch.load(file), assign=True)
    module.after = nn.Linear(2, 2)


def from_safetensors(module):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.safetensors")
        file.write_bytes(SAFETENSORS)
        module.loaded = nn.Linear(3, 2)
        module.loaded.load_state_dict(load_file(file))
    module.after = nn.Linear(2, 2)


def _weights():
    torch.save(nn.Linear(3, 2).state_dict(), file := io.BytesIO())
    return file.getvalue()


WEIGHTS = _weights()
SAFETENSORS = save({"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)})


def placed_elements(module):
    module.table = torch.randn(4, 5)
    module.table[0], module.table[1, 2], module.table[[0, 2]] = 3, 2.5, 1.0
    module.table[:, [1, 3]] = torch.rand(4, 2)
    module.table[module.table > 1] = 0
    module.table[np.array([0, 1])] = 7
    module.rows, module.column = module.table[[0, 1]], module.table[:, np.array([2])]
    module.one = module.table[torch.tensor(1)]
    module.none, module.some, module.pairs = module.table[[]], module.table[range(2)], module.table[[0, 1], (0, 2)]
    module.nested = module.table[:2, [[0, 1], [2, 3]]]
    module.table[range(1, 3), 2:4] = 4
    module.table[[]] = 5
    module.inverse = torch.linalg.pinv(module.table)


def on_meta(module):
    with torch.device("meta"):
        module.shapes = [tuple(nn.Linear(3, 4).weight.shape)]
    module.filled = nn.Linear(3, 4, device="meta").to_empty(device="cpu")
    for parameter in module.filled.parameters():
        nn.init.ones_(parameter)


def seeded(module):
    module.first = nn.Linear(3, 3)
    torch.manual_seed(7)
    module.second = nn.Linear(3, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module.aside = nn.Linear(2, 2)
    state = torch.get_rng_state()
    module.third = nn.Linear(2, 2)
    torch.set_rng_state(state)
    module.again = nn.Linear(2, 2)


def own_generator(module):
    generator = torch.Generator().manual_seed(5)
    module.first = torch.randn(3, generator=generator)
    module.order = torch.randperm(7, generator=generator)
    module.second = nn.Linear(3, 3)
    module.usual = torch.rand(4, generator=torch.default_generator)
    module.scale = torch.full((2,), torch.randn(2, generator=generator).sum().item())
    module.last = torch.rand(3, generator=generator)


def dtypes(module):
    torch.set_default_dtype(torch.bfloat16)
    try:
        module.brain, module.third = nn.Linear(4, 4), torch.arange(4) / 3
    finally:
        torch.set_default_dtype(torch.float32)
    module.short, module.long = nn.Linear(3, 3).to(torch.float16), nn.Linear(3, 3).double()
    module.complex = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))
    torch.view_as_real(module.complex.data).mul_(2)
    module.conjugate = module.complex.data.conj()
    module.imaginary = module.conjugate.imag
    module.polar = torch.polar(torch.ones(3, 2), torch.outer(torch.arange(3.0), torch.rand(2)))


def forwards(module):
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
    width = convolutions(torch.randn(2, 3, 8, 8)).flatten(1).shape[1]
    module.convolutions, module.head = convolutions, nn.Linear(width, 2)
    module.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module.encoded = module.layer(torch.randn(2, 3, 8)).detach()
    module.attention = nn.MultiheadAttention(8, 2)
    module.averages = module.attention(*torch.randn(3, 5, 2, 8))[1].detach()
    module.lstm = nn.LSTM(3, 4)
    module.remembered = module.lstm(torch.randn(5, 2, 3))[0].detach()
    module.attended = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    module.lazy = nn.LazyLinear(4)
    module.lazy(torch.randn(2, 5))
    module.weight = nn.Parameter(torch.rand(3))
    (module.weight * torch.rand(3)).sum().backward()
    module.gradient = module.weight.grad


def other_draws(module):
    module.whole = torch.randint(0, 9, (4,))
    module.picked = torch.multinomial(torch.ones(5), 3)
    module.normal = torch.normal(torch.zeros(3), torch.ones(3))
    module.beta = torch.distributions.Beta(torch.tensor(2.0), torch.tensor(3.0)).sample()
    module.poisson = torch.poisson(torch.ones(4) * 3)
    module.exponential = torch.empty(5).exponential_()
    module.halves = torch.randn(4, 4)
    module.halves[:, :2].normal_()
    module.halves[2:].uniform_()
    module.turned = torch.randn(4, 4).t().normal_()


def spectra(module):
    module.matrix = torch.randn(5, 5)
    module.left = module.matrix.svd()[0]
    module.values, module.own = torch.linalg.svdvals(module.matrix), torch.linalg.eigvalsh(module.matrix)
    module.nuclear, module.condition = module.matrix.norm(p="nuc"), torch.linalg.cond(module.matrix)
    module.spectral = torch.linalg.matrix_norm(module.matrix, 2)
    module.complex = torch.linalg.eig(module.matrix)[1]
    module.frequencies = torch.fft.rfft2(module.matrix)
    module.normed = nn.BatchNorm1d(5).eval()(module.matrix).detach()


def products(module):
    for rows in (2, 5, 7):
        many, one = torch.randn(rows, 3, 5), torch.randn(1, 5, 7)
        module.register_buffer(f"by_function{rows}", torch.matmul(many, one))
        module.register_buffer(f"by_method{rows}", many.matmul(one.transpose(1, 2).contiguous().mT))
        module.register_buffer(f"by_sign{rows}", many @ one + one.mT.__rmatmul__(torch.ones(5, 7)).sum())
        module.register_buffer(f"by_algebra{rows}", torch.linalg.matmul(one.mT, many.mT))
        module.register_buffer(f"by_vector{rows}", torch.randn(rows, 2, 3, 5) @ torch.randn(5))
        array = torch.from_numpy(np.random.RandomState(0).rand(rows, 3, 5).astype("f"))
        module.register_buffer(f"of_values{rows}", array @ array[:1].mT)
    module.weight = nn.Parameter(torch.rand(1, 5, 5))
    (torch.rand(4, 5, 5) @ module.weight).sum().backward()
    module.gradient = module.weight.grad


def channels_last(module):
    images = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    module.of_images = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    module.features = module.of_images(images).detach()
    module.changed = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    module.made = module.changed(torch.randn(2, 4, 8, 8)).detach()
    module.normed = nn.BatchNorm2d(4).eval()(images).detach()
    module.unpooled = F.max_unpool2d(*F.max_pool2d(images, 2, return_indices=True), 2)
    module.back = torch.fft.irfft2(torch.fft.rfft2(torch.randn(3, 6, 6)))
    module.places = torch.nonzero_static(torch.randn(5, 3) > 0, size=4)
    module.after = torch.randn(3)


def settings(module):
    query = torch.randn(1, 2, 8, 8)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            module.register_buffer(backend.name, F.scaled_dot_product_attention(query, query, query))
    layer = nn.Conv2d(3, 8, 3)
    with torch.backends.mkldnn.flags(enabled=False, deterministic=True):
        module.convolved = layer(torch.randn(2, 3, 16, 16)).detach()
    module.usually = layer(torch.randn(2, 3, 16, 16)).detach()
    with deterministic():
        module.nothing, module.whole_numbers = torch.empty(3), torch.empty(4, dtype=torch.int64)
        module.partly = module.whole_numbers.new_empty(4)
        module.partly[1:3].random_()


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONSTRUCTIONS = (gpt_by_apply, initializers, parametrized, copied_layers, recurrent, buffers, read_values, looks)
CONSTRUCTIONS += (from_a_file, from_safetensors, placed_elements, on_meta, from_arrays, seeded)
CONSTRUCTIONS += (own_generator, dtypes, forwards, other_draws, spectra, products, settings, channels_last)


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize(
    "fill",
    CONSTRUCTIONS,
    ids=[fill.__name__ for fill in CONSTRUCTIONS],
)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_same_bits(fill, random):
    assert_same_construction(lambda: Built(fill), random=random)


def test_tied_parameters_are_one():
    with (recording := Recording()).record():
        module = Built(gpt_by_apply)
    values = values_of(recording, tensors_of(module))
    tied = values["embedding.weight"], values["head.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_modules_imported_while_recording_are_as_ever(tmp_path, monkeypatch):
    tmp_path.joinpath("imported_late.py").write_text("import torch\nTABLE = torch.arange(3.0)\n")
    tmp_path.joinpath("drawing_late.py").write_text("import torch\nTABLE = torch.rand(3000)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with (recording := Recording()).record():
        table = importlib.import_module("imported_late").TABLE
        doubled = table * torch.full((3,), 2.0)
    assert table.tolist() == [0, 1, 2]
    assert values_of(recording, {"": doubled})[""].tolist() == [0, 2, 4]
    with pytest.raises(DeferredError, match="drawn from by another thread"), Recording().record():
        importlib.import_module("drawing_late")


def test_what_is_left_out():
    with (recording := Recording()).record():
        layer = nn.Linear(2, 2)
        computed = layer(torch.randn(1, 2)).detach() + torch.from_numpy(np.ones(2, dtype="f"))
        closure = [torch.randn(2)].copy
    taken = [layer.weight, layer.bias, computed]
    assert recording.left_out(taken)
    assert not recording.left_out([*taken, *closure()])
    closure = {layer.weight.data[0]}
    assert recording.left_out(taken)
    # A tensor in a cycle.
    closure = [layer.weight.data]
    closure.append(closure)
    del closure
    assert not recording.left_out(taken)
    with recording.record():
        layer(torch.ones(1, 2)).sum().backward()
    assert recording.left_out(taken)
    assert not recording.left_out([*taken, layer.weight.grad, layer.bias.grad])


def test_a_later_recording_converts():
    torch.manual_seed(0)
    plain = Built(gpt_by_apply).to(torch.bfloat16)
    torch.manual_seed(0)
    recording = Recording()
    with recording.record():
        module = Built(gpt_by_apply)
    with recording.record():
        module.to(torch.bfloat16)
    values = values_of(recording, tensors_of(module))
    for name, one in tensors_of(plain).items():
        assert_same_bits(values[name], one, name)


def test_settings_are_those_of_the_construction():
    with deterministic():
        plain = torch.empty(3, dtype=torch.int64)
        with (recording := Recording()).record():
            tensor = torch.empty(3, dtype=torch.int64)
    assert_same_bits(values_of(recording, {"": tensor})[""], plain)
    assert not torch.are_deterministic_algorithms_enabled()
    with (recording := Recording()).record():
        zeros = torch.zeros(3)
    seen = []
    with deterministic():
        recording.replay([(zeros, lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))])
        assert torch.are_deterministic_algorithms_enabled()
    assert seen == [False]


class Alive:
    """Bytes of the tensors that takers were given and that still live, as storages are counted."""

    def __init__(self):
        self.now = self.peak = self.given = 0

    def take(self, value):
        storage = value.untyped_storage()
        size = storage.nbytes()
        self.given += size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.now -= size


def twice_initialized():
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(50)))
    for layer in layers:
        nn.init.normal_(layer.weight)
    return layers


def test_one_value_lives_at_a_time(monkeypatch):
    with (recording := Recording()).record():
        module = twice_initialized()
    alive, made = Alive(), []
    original = torch.empty

    def counted(*size, **options):
        tensor = original(*size, **options)
        if tensor.nbytes >= 64 * 64 * 4 and tensor.device.type == "cpu":
            alive.take(tensor)
            made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    taken = []
    recording.replay([(weight, lambda value: taken.append(float(value.sum()))) for weight in module.parameters()])
    # Each weight is drawn twice, the first time into memory that is dropped.
    assert (len(made), len(taken)) == (100, 50)
    assert alive.peak == 64 * 64 * 4
    assert alive.now == 0


def test_values_come_as_soon_as_they_are_final():
    with (recording := Recording()).record():
        first, second = torch.randn(3), torch.zeros(2)
        second.add_(first[:2])
        third = torch.randn(2)
        first.mul_(2)
    order = []
    recording.replay([(one, lambda _, n=n: order.append(n)) for n, one in enumerate([first, second, third])])
    assert order == [1, 2, 0]


class Given:
    """A source of ones, that counts how often it is read."""

    def __init__(self):
        self.reads = 0

    def read(self, out):
        self.reads += 1
        out.fill_(1)


def test_assigned_values():
    recording = Recording()
    with recording.record():
        layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    source, another = Given(), Given()
    recording.assign(layer.weight, source)
    recording.assign(other.weight[1:], another)
    with recording.record():
        doubled = layer.weight.data * 2
    taken = {}
    tensors = {"layer": layer.weight, "doubled": doubled, "other": other.weight}
    recording.replay([(one, lambda value, name=name: taken.update({name: value})) for name, one in tensors.items()])
    assert taken["layer"] is source
    assert (source.reads, another.reads) == (1, 1)
    assert taken["doubled"].tolist() == torch.full((3, 3), 2.0).tolist()
    assert taken["other"][1:].tolist() == torch.ones(2, 3).tolist()
    with pytest.raises(ValueError, match="target has values already"):
        recording.assign(torch.zeros(2), source)


def test_a_source_that_nobody_computes_with_is_not_read():
    with (recording := Recording()).record():
        layer = nn.Linear(3, 3)
    recording.assign(layer.weight, source := Given())
    state = torch.get_rng_state()
    taken = []
    recording.replay([(layer.weight, taken.append)], random=False)
    assert (taken, source.reads) == ([source], 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_random_no_more_is_drawn_than_matters():
    with (recording := Recording()).record():
        wanted = torch.randn(2)
        torch.poisson(torch.full((3,), -2.0))
    taken = []
    recording.replay([(wanted, taken.append)], random=False)
    assert len(taken) == 1
    with pytest.raises(RuntimeError, match="Poisson rate"):
        recording.replay([(wanted, taken.append)])


def test_another_rank_s_state():
    torch.manual_seed(1)
    plain = nn.Linear(3, 3)
    torch.manual_seed(1)
    theirs = torch.get_rng_state()
    torch.manual_seed(2)
    own = torch.get_rng_state()
    with (recording := Recording()).record():
        layer = nn.Linear(3, 3)
    assert torch.equal(recording.random_state, own)
    recording.random_state = theirs
    values = values_of(recording, tensors_of(layer))
    assert_same_bits(values["weight"], plain.weight)
    assert torch.equal(torch.get_rng_state(), own)


def test_a_value_read_keeps_the_state():
    with (recording := Recording()).record():
        torch.randn(2).sum().item()
    recording.random_state = recording.random_state
    with pytest.raises(DeferredError, match="random values were read while recording"):
        recording.random_state = torch.Generator().manual_seed(123).get_state()


def test_a_generator_that_moved_on_is_left_alone():
    with (recording := Recording()).record():
        layer = nn.Linear(3, 3)
    torch.rand(1)
    state = torch.get_rng_state()
    values_of(recording, tensors_of(layer))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DeferredError, match="changed between two recordings"), recording.record():
        torch.rand(1)


def recorded_digest(build, seed=0):
    torch.manual_seed(seed)
    with (recording := Recording()).record():
        build()
    return recording.digest()


def test_digest():
    builds = [lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 3, bias=False)]
    builds += [lambda: torch.full((3,), 2.0), lambda: torch.full((3,), 2.5), lambda: torch.tensor([1.0, 2.0])]
    builds += [lambda: torch.tensor([1.0, 3.0]), lambda: torch.manual_seed(5) and torch.rand(2)]
    builds += [lambda: torch.manual_seed(6) and torch.rand(2), lambda: torch.rand(2), lambda: torch.rand(2).mul_(2)]
    builds += [lambda seed=seed: torch.rand(2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    digests = [recorded_digest(build) for build in builds]
    assert len(set(digests)) == len(builds)
    assert [recorded_digest(build, seed=1) for build in builds] == digests


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (lambda: nn.Linear(2, 2).weight.data_ptr(), "data_ptr asks for the memory"),
        (lambda: nn.Linear(2, 2).weight.untyped_storage().data_ptr(), "untyped_storage asks for the memory"),
        (lambda: nn.Linear(2, 2).to("meta"), "a tensor is moved to meta"),
        (lambda: torch.rand(2) + torch.ones(2, device="meta"), "on the meta device that were made without values"),
        (lambda: torch.eye(2).to_sparse(), "not dense"),
        (lambda: nn.MultiheadAttention(4, 1).eval()(*torch.ones(3, 1, 1, 4)), "fast path"),
        (lambda: torch.rand(2).resize_(9), "changes the size of a tensor's storage"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "not dense"),
        (lambda: nn.GroupNorm(1, 2)(torch.rand(1, 3, 3, 2).permute(0, 3, 1, 2)), "not contiguous"),
        (lambda: torch.rand(3, 3)[[[0, 1], [1, 2]]], "by a list of more than numbers"),
        (lambda: torch.rand(2) + torch.get_rng_state().sum(), "state is looked into"),
        (lambda: torch.rand(2) + int(torch.get_rng_state().numpy()[0]), "state is looked into"),
        (lambda: pickle.dumps(nn.Linear(2, 2)), "asks for the memory"),
        (lambda: nn.Linear(2, 2)(torch.ones(3)), "the code fails without values"),
        (lambda: torch.linalg.svdvals(torch.eye(2), out=torch.empty(2)), "puts its result into a tensor"),
        (lambda: torch.rand(2).share_memory_(), "share_memory_ asks for the memory"),
    ],
)
def test_what_cannot_be_deferred(code, message):
    state = torch.get_rng_state()
    recording = Recording()
    with pytest.raises(DeferredError, match=message), recording.record():
        code()
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DeferredError, match=message):
        recording.replay([])


def test_a_failure_that_code_catches_is_not_lost():
    def build():
        try:
            torch.rand(2).data_ptr()
        except RuntimeError:
            torch.rand(3)

    with pytest.raises(DeferredError, match="data_ptr"), Recording().record():
        build()


def test_draws_past_the_recording_are_found():
    thread = threading.Thread(target=torch.rand, args=(1000,))

    def build():
        torch.rand(2)
        thread.start()
        thread.join()
        return torch.rand(2)

    state = torch.get_rng_state()
    with pytest.raises(DeferredError, match="another thread"), Recording().record():
        build()
    assert torch.equal(torch.get_rng_state(), state)


def by_a_pool(layers):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda layer: layer.weight.data.copy_(torch.eye(3)), layers))


class Own(threading.Thread):
    """A class of threads with a `run` of its own."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def run(self):
        nn.init.zeros_(self.layers[0].bias)


def by_a_class(layers):
    thread = Own(layers)
    thread.start()
    thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("change", [by_a_pool, by_a_class])
def test_writes_by_other_threads_are_found(change):
    with pytest.raises(DeferredError, match="another thread works on tensors"), Recording().record():
        change([nn.Linear(3, 3), nn.Linear(3, 3)])


def test_other_threads_may_make_tensors_of_their_own():
    def build(module):
        with ThreadPoolExecutor(2) as pool:
            ones = list(pool.map(lambda size: torch.ones(size) * 2, (2, 3)))
        module.weight = torch.randn(2) + ones[0]

    assert_same_construction(lambda: Built(build))


def test_a_thread_that_outlives_the_recording_is_let_alone():
    with ThreadPoolExecutor(1) as pool:
        with Recording().record():
            pool.submit(int).result()
            layer = nn.Linear(3, 3)
        assert pool.submit(lambda: layer.weight.shape).result() == (3, 3)


def drawn_by(make):
    """A draw by a generator that `make` gives the state of another one, itself drawn from."""

    def build():
        first = torch.Generator().manual_seed(2)
        torch.rand(2), torch.rand(2, generator=first)
        return torch.rand(2, generator=make(first))

    return build


def in_another(state):
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def in_one_drawn_from(state):
    generator = torch.Generator().manual_seed(0)
    torch.rand(2, generator=generator)
    generator.set_state(state)
    return generator


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: in_another(torch.get_rng_state()), "given the state of another one"),
        (lambda first: in_another(first.get_state()), "given the state of another one"),
        (lambda first: first.clone_state(), "given the state of another one"),
        (lambda first: copy.deepcopy(first), "state is looked into"),
        (lambda _: torch.default_generator.clone_state(), "given the state of another one"),
        (lambda _: in_one_drawn_from(torch.get_rng_state()), "or by another thread"),
    ],
)
def test_a_generator_with_the_state_of_another_is_refused(make, message):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(DeferredError, match=message), Recording().record():
        drawn_by(make)()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_state_is_any_generator_s():
    def build(module):
        state = torch.get_rng_state()
        module.usual, module.other = torch.rand(2), torch.rand(2, generator=in_another(state))
        del state

    assert_same_construction(lambda: Built(build))


def test_a_state_that_is_kept_is_refused():
    kept = []

    def build():
        torch.rand(2)
        kept.append({"state": torch.get_rng_state()})
        torch.rand(2)

    with Recording().record():
        kept.append(torch.get_rng_state())
        torch.rand(2)
    assert torch.equal(kept[0], torch.get_rng_state())
    with pytest.raises(DeferredError, match="state is kept"), Recording().record():
        build()


def test_an_array_and_its_tensor_do_not_part():
    def build(*, keeps):
        tensor = torch.ones(2)
        array = tensor.numpy() if keeps else tensor.numpy().copy()
        tensor.add_(1)
        return array

    with Recording().record():
        build(keeps=False)
    with pytest.raises(DeferredError, match="whose values were given away"), Recording().record():
        build(keeps=True)
    with pytest.raises(DeferredError, match="read-only"), Recording().record():
        torch.ones(2).numpy()[0] = 2


def test_autocast_is_not_deferred():
    with (
        pytest.raises(DeferredError, match="under autocast"),
        Recording().record(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        torch.ones(2, 2) @ torch.ones(2, 2)


def test_wrong_calls():
    recording = Recording()
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        recording.replay([])
    with pytest.raises(DeferredError, match=r"entered already$"), recording.record(), recording.record():
        pass
    with pytest.raises(DeferredError, match="already by another"), Recording().record(), Recording().record():
        pass
    assert not recording.holds(torch.ones(2))
    with (other := Recording()).record():
        torch.ones(2)
    with pytest.raises(ValueError, match="takers has a tensor that has values already"):
        other.replay([(torch.ones(2), print)])


def test_a_recording_within_one_leaves_it_the_active_one():
    recording = Recording()

    def build():
        with pytest.raises(RuntimeError, match="entered already"), Recording().record():
            pass
        return active_recording()

    with recording.record():
        found = build()
    assert found is recording
    assert active_recording() is None


def test_reads_in_a_loop_are_not_made_of_all_before(monkeypatch):
    calls = []
    original = carry.map_arguments

    def counted(tree, kind, change):
        calls.append(tree)
        return original(tree, kind, change)

    monkeypatch.setattr(carry, "map_arguments", counted)
    with Recording().record():
        value = torch.ones(3)
        for _ in range(100):
            value = value * 0.5
            value.add_(1)
            assert value.max().item() > 1
    # The first, and three a turn; arguments by place and by keyword.
    assert len([call for call in calls if isinstance(call, tuple)]) < 1000


class Packed:
    def __init__(self, tensor):
        self.tensor = tensor


def test_no_graphs_are_kept():
    saved = []

    def pack(tensor):
        packed = Packed(tensor)
        saved.append(weakref.ref(packed))
        return packed

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor)
    with (recording := Recording()).record(), hooks:
        weight = nn.Parameter(torch.ones(3))
        product = weight * weight
        assert all(reference() for reference in saved)
        del product
    assert [reference() for reference in saved] == [None, None]
    assert recording.holds(weight)


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(portions, "LARGE_BYTES", 1000)
    monkeypatch.setattr(portions, "PORTION", 64)


def large(kind, shape, dtype=torch.float32):
    """A module with a large draw, one that is of no use any more, and a small one."""
    module = nn.Module()
    values = torch.empty(shape, dtype=dtype)
    module.first = nn.Parameter(values.normal_(1, 2) if kind == "normal" else values.uniform_(-1, 3))
    module.again = torch.randn(999)
    module.again.normal_()
    module.then = torch.rand(3)
    return module


def recorded_large(*args):
    torch.manual_seed(7)
    recording = Recording()
    with recording.record():
        return recording, large(*args)


CASES = [((37, 11), torch.float32), ((400,), torch.float64), ((8, 4, 16), torch.float32), ((401, 2), torch.float32)]


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_large_draws_in_portions(kind, shape, dtype):
    torch.manual_seed(7)
    plain = large(kind, shape, dtype)
    after = torch.get_rng_state()
    whole = torch.empty(shape, dtype=dtype)
    some = mark_rows(torch.empty(shape[0] - 5, *shape[1:], dtype=dtype), Rows(shape[0], 5))
    for out in (whole, some, None):
        recording, module = recorded_large(kind, shape, dtype)
        given, then = [], []

        def take(values, given=given, out=out):
            given.append(values)
            if out is not None:
                values.read(out)

        recording.replay([(module.first, take), (module.then, lambda value, then=then: then.append(value.clone()))])
        assert isinstance(given[0], portions.Portions)
        assert torch.equal(then[0], plain.then)
        assert torch.equal(torch.get_rng_state(), after)
    assert_same_bits(whole, plain.first)
    assert_same_bits(some, plain.first[5:])


def columns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portions, "LARGE_BYTES", 1000)
        patch.setattr(portions, "PORTION", 64)
        return drawn_columns()


def drawn_columns():
    recording, module = recorded_large("normal", (30, 24))
    part = DTensor.from_local(torch.empty(30, 12), mesh_of((2,)), [Shard(1)], shape=(30, 24), stride=(24, 1))
    recording.replay([(module.first, lambda values: values.read(part))])
    torch.manual_seed(7)
    return torch.equal(full(part), large("normal", (30, 24)).first)


def test_large_draws_of_which_ranks_keep_columns(two):
    assert two.run(columns) == [True, True]


@pytest.mark.usefixtures("small_portions")
def test_what_is_used_again_is_drawn_whole():
    def build():
        module = nn.Linear(40, 20)
        nn.init.normal_(module.weight)
        module.scaled = module.weight.detach() * 2
        module.other = nn.Parameter(torch.randn(500))
        module.tied = module.other
        return module

    assert_same_construction(build)
