"""Modules that come to be in parts: built without values, their weights read by slices; with a plain run's numbers."""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from families import FAMILIES, Family, Samples
from lightning.pytorch import LightningModule
from models import DIM, VOCAB, Block, Language, SaveLast, Tokens, divided_loader, trainer
from ranks import quiet
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

SEED = 11
PLANS = [Plan(), Plan(dp_replicate=2), Plan(dp_shard=2), Plan(tp=2)]
NAMES = ["plain", "replicated", "sharded", "divided"]
# Built in configure_model every day, and in __init__.
LATE = [True, pytest.param(False, marks=pytest.mark.slow)]


class Late(Family):
    """A family's model, built where Lightning asks for it."""

    def __init__(self, name):
        LightningModule.__init__(self)
        self.name, self.model = name, None
        self.losses = []

    def configure_model(self):
        if self.model is None:
            self.model = FAMILIES[self.name]()

    def on_fit_start(self):
        # As it was built, before anything is trained.
        self.divided = [name for name, one in self.named_parameters() if isinstance(one, DTensor)]
        with self.trainer.strategy.full_parameters() if self.divided else contextlib.nullcontext():
            self.built = [*self.model.state_dict().items(), *self.model.named_buffers()]
            self.built = {name: value.detach().clone() for name, value in self.built}
        self.drawn = torch.rand(3)


class Watched(LargeScaleStrategy):
    """Counts what has no values when it is set up."""

    def setup(self, trainer):
        self.without = sum(one.is_meta for one in self.lightning_module.parameters())
        super().setup(trainer)


def built(name, plan, devices):
    """Values of a model as it was built, what the generator drew next, names of what was divided, and the losses."""
    torch.manual_seed(SEED)
    model = Late(name)
    made = trainer(Watched(plan) if plan else "auto", devices=devices, max_steps=1)
    made.fit(model)
    if plan is not None:
        assert made.strategy.without == len(list(model.parameters()))
    return model.built, model.drawn, model.divided, model.losses


def assert_built_alike(found, expected):
    values, drawn, _, losses = found
    assert list(values) == list(expected[0])
    for name, value in expected[0].items():
        assert torch.equal(values[name], value), name
    assert torch.equal(drawn, expected[1])
    assert losses == pytest.approx(expected[3], rel=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one == "gpt2" else pytest.mark.slow) for one in FAMILIES]
)
def test_numbers_of_a_plain_construction(two, name):
    expected = built(name, None, 1)
    for plan in (Plan(dp_shard=2), Plan(tp=2)):
        for found in two.run(built, name, plan, 2):
            assert_built_alike(found, expected)
            assert found[2]


def chosen(budget):
    """The same under a plan that was chosen, and whether that divides."""
    torch.manual_seed(SEED)
    model = Late("gpt2")
    strategy = LargeScaleAutoStrategy(memory_budget=budget)
    trainer(strategy, devices=2, max_steps=1).fit(model)
    return (model.built, model.drawn, model.divided, model.losses), strategy.plan.shards


def test_a_plan_that_is_chosen_when_all_is_known(two):
    expected = built("gpt2", None, 1)
    for found, shards in two.run(chosen, None):
        assert_built_alike(found, expected)
        assert bool(found[2]) == shards


class FromData(Late):
    """Takes sizes and values from data, and draws by other generators."""

    def configure_model(self):
        super().configure_model()
        sample = Samples(self.name)[0]["input_ids"]
        self.scale = nn.Parameter(torch.from_numpy(np.full(int(sample.max()), 0.5, dtype=np.float32)))
        self.drawn_elsewhere = random.random(), float(np.random.rand())
        self.first = nn.Parameter(sample.float(), requires_grad=False)


def from_data(plan, devices):
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    model = FromData("gpt2")
    made = trainer(Watched(plan) if plan else "auto", devices=devices, max_steps=1)
    made.fit(model)
    assert plan is None or made.strategy.without
    return model.built, model.drawn_elsewhere, (random.random(), float(np.random.rand()))


def test_a_construction_that_reads_data(two):
    expected = from_data(None, 1)
    for found in two.run(from_data, Plan(dp_shard=2), 2):
        assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
        assert found[1:] == expected[1:]


class Body(nn.Module):
    """With what modules have beside matrices."""

    def __init__(self, lazy=False, turned=True):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        for number, block in enumerate(self.blocks):
            block.register_buffer("scale", torch.linspace(0.5, 1, DIM) / (number + 1), persistent=False)
            block.register_buffer("seen", torch.zeros(2))
            block.table = torch.arange(4.0)
            block.parts = [torch.ones(2) * number, {"x": torch.rand(2)}]
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM))
        self.turned = nn.Linear(DIM, DIM, bias=False)
        if turned:
            # Which reads what it makes.
            nn.utils.parametrizations.orthogonal(self.turned)
        self.waves = nn.Parameter(torch.randn(3, DIM, dtype=torch.complex64), requires_grad=False)
        self.coarse = nn.Parameter(torch.randn(4, DIM).to(torch.bfloat16), requires_grad=False)
        self.blocks[0].up.weight.requires_grad_(False)
        if lazy:
            self.unknown = nn.LazyLinear(3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x) * block.scale + block.table.sum() + block.parts[1]["x"].sum()
        x = self.turned(self.normed(x)) + self.waves.real.sum() + self.coarse.float().sum()
        return self.head(x)


class Kinds(LightningModule):
    """Built where Lightning asks for it, or before; remembers its weights as they are when training starts."""

    def __init__(self, *, late=True, lazy=False):
        super().__init__()
        self.lazy, self.losses = lazy, []
        self.body = None if late else Body(lazy)

    def configure_model(self):
        self.body = self.body or Body(self.lazy)

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.body(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)

    def train_dataloader(self):
        return divided_loader(self.trainer, Tokens(16))

    def on_fit_start(self):
        with self.trainer.strategy.full_parameters() if sharded_state(self) else contextlib.nullcontext():
            self.first = {name: value.detach().clone() for name, value in self.state_dict().items()}
        blocks = self.body.blocks
        self.kept = [(block.scale, block.table, block.parts[0], block.parts[1]["x"]) for block in blocks]
        self.tied = self.body.head.weight is self.body.embedding.weight


def kinds(plan, devices, late, path=None, save=None):
    torch.manual_seed(SEED + (1 if path else 0))
    model = Kinds(late=late)
    made = trainer(
        LargeScaleStrategy(plan) if plan else "auto",
        devices=devices,
        max_steps=-1,
        max_epochs=2 if path else 1,
        callbacks=[SaveLast(save)] if save else [],
    )
    made.fit(model, ckpt_path=path, weights_only=False)
    return model.first, model.kept, model.tied, model.losses


@pytest.mark.parametrize(
    "plan", [Plan(dp_shard=2), Plan(tp=2), Plan(dp_replicate=2)], ids=["sharded", "divided", "replicated"]
)
@pytest.mark.parametrize("late", LATE)
def test_all_that_modules_have_is_right_when_built_and_saved_and_loaded(two, tmp_path, plan, late):
    path = tmp_path / "a.ckpt"
    first, kept, _, losses = kinds(None, 1, True)
    for values, attributes, tied, found in two.run(kinds, plan, 2, late, None, path):
        assert list(values) == list(first)
        for name, value in first.items():
            assert torch.equal(values[name], value), name
        for ours, theirs in zip(attributes, kept, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert tied
        assert found == pytest.approx(losses, rel=1e-4)
    second = kinds(None, 1, True, path)[3]
    for found in two.run(kinds, plan, 2, late, path):
        assert found[3] == pytest.approx(second, rel=1e-4)


def lazily(plan):
    try:
        trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(Kinds(lazy=True))
    except PlanError as error:
        return str(error)
    return None


def test_lazy_modules_are_refused(two):
    for told in two.run(lazily, Plan(dp_shard=2)):
        assert told.startswith("'body.unknown.weight' is of a lazy module, so it has no shape to plan with; call the")


def with_weights(plan, devices, late, weights, path=None):
    made = trainer(Watched(plan, weights=weights), devices=devices, max_steps=1)
    model = Kinds(late=late)
    made.fit(model, ckpt_path=path, weights_only=False)
    return model.first


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_weights_of_files(two, tmp_path, plan, late):
    model = Kinds(late=False)
    expected = {
        name: torch.randn(value.shape).to(value.dtype)
        for name, value in model.state_dict().items()
        if name != "body.head.weight"
    }
    save_file(expected, tmp_path / "a.safetensors")
    args = with_weights, plan, plan.world_size, late, str(tmp_path / "a.safetensors")
    for found in two.run(*args) if plan.world_size > 1 else [args[0](*args[1:])]:
        assert torch.equal(found["body.head.weight"], found["body.embedding.weight"])
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_a_checkpoint_counts_more_than_weights(two, tmp_path):
    model = Kinds(late=False)
    ones = {name: torch.ones(value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}
    save_file(ones, tmp_path / "a.safetensors")
    made = trainer(max_steps=0)
    made.fit(model)
    made.save_checkpoint(tmp_path / "a.ckpt")
    for late in (True, False):
        weights, path = str(tmp_path / "a.safetensors"), str(tmp_path / "a.ckpt")
        for found in two.run(with_weights, Plan(dp_shard=2), 2, late, weights, path):
            assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def other_weights(plan, path):
    try:
        with_weights(plan, 2, True, path)
    except PlanError as error:
        return str(error)
    return None


def test_weights_of_another_model_are_refused_on_all_ranks(two, tmp_path):
    save_file({"other": torch.ones(1)}, tmp_path / "a.safetensors")
    for told in two.run(other_weights, Plan(dp_shard=2), str(tmp_path / "a.safetensors")):
        assert "does not fit Kinds: " in told
        assert "1 unexpected ('other')" in told


class Simple(Language):
    """All of which a checkpoint has."""

    def __init__(self):
        super().__init__(seed=None, tied=True)
        self.register_buffer("seen", torch.zeros(2))

    def on_fit_start(self):
        with self.trainer.strategy.full_parameters():
            self.first = {name: value.detach().clone() for name, value in self.state_dict().items()}


class Loaded(Kinds):
    def __init__(self):
        super().__init__(late=False)


def write(kind, path, full):
    made = trainer(LargeScaleStrategy(Plan(dp_shard=2), save_full=full), devices=2, max_steps=1)
    model = kind()
    made.fit(model)
    made.save_checkpoint(path)
    with made.strategy.full_parameters():
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def load(kind, how, path):
    made = trainer(Watched(Plan(dp_shard=2)), devices=2, max_steps=1)
    with torch.device("meta") if how == "meta" else made.init_module(empty_init=True):
        model = kind.load_from_checkpoint(path)
    try:
        made.fit(model)
    except PlanError as error:
        return str(error)
    return made.strategy.without, model.first


CASES = [(Simple, "meta"), (Simple, "init_module"), (Loaded, "init_module")]


@pytest.mark.parametrize(
    ("full", "kind", "how"),
    [
        pytest.param(full, *case, marks=() if full == (case[1] == "meta") else pytest.mark.slow)
        for full in (False, True)
        for case in CASES
    ],
)
def test_a_checkpoint_loaded_into_a_module_without_values(two, tmp_path, kind, how, full):
    path = tmp_path / "a.ckpt"
    expected = two.run(write, kind, path, full)[0]
    assert path.is_file() == full
    for without, found in two.run(load, kind, how, path):
        assert without
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class BuiltLate(LightningModule):
    """A language model that is made where Lightning asks for it."""

    def __init__(self):
        super().__init__()
        self.inner = None

    def configure_model(self):
        if self.inner is None:
            self.inner = Language()

    def training_step(self, batch, index):
        return self.inner.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Tokens(), batch_size=8)


def test_what_the_root_gathers_of_blocks_is_built(tmp_path):
    plan = Plan(offload_parameters="nvme", precision="bf16-mixed", nvme_path=str(tmp_path))
    model = BuiltLate()
    trainer(LargeScaleStrategy(plan), max_steps=3).fit(model)
    plain = BuiltLate()
    trainer("auto", max_steps=3, precision="bf16-mixed").fit(plain)
    for name, parameter in plain.inner.named_parameters():
        found = model.inner.get_parameter(name)
        full = found.full_tensor() if isinstance(found, DTensor) else found
        torch.testing.assert_close(full, parameter, rtol=1e-2, atol=1e-4)


class Table(Simple):
    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.arange(3), persistent=False)


def test_a_buffer_whose_values_nobody_knows_is_refused(two, tmp_path):
    path = tmp_path / "a.ckpt"
    two.run(write, Table, path, False)
    for told in two.run(load, Table, "meta", path):
        assert told.startswith("'places' is on the meta device, so it has no values; build the module with its values")
    assert all(without for without, _ in two.run(load, Table, "init_module", path))


def evaluate_after(plan, path, devices):
    with torch.device("meta"):
        model = Simple.load_from_checkpoint(path)
    made = trainer(LargeScaleStrategy(plan), devices=devices, max_steps=2)
    made.fit(model)
    before = model.head.weight.detach().clone()
    made.validate(model, verbose=False)
    kept = torch.equal(model.head.weight, before)
    trainer(LargeScaleStrategy(plan), devices=devices, max_steps=1).fit(model)
    return kept, torch.equal(model.head.weight, before), model.losses


@pytest.mark.parametrize("plan", [Plan(), Plan(dp_replicate=2)])
def test_a_module_that_was_made_is_not_read_again(two, tmp_path, plan):
    made = trainer(LargeScaleStrategy(Plan()), max_steps=0)
    made.fit(Simple())
    made.save_checkpoint(tmp_path / "a.ckpt")
    args = evaluate_after, plan, tmp_path / "a.ckpt", plan.world_size
    for kept, same, losses in two.run(*args) if plan.world_size > 1 else [args[0](*args[1:])]:
        assert (kept, same) == (True, False)
        assert losses[2] < losses[0]


def noted_load(path):
    with capture_info() as told:
        result = load(Table, "init_module", path)
    return result[0], told


@contextlib.contextmanager
def capture_info():
    """What Lightning's rank 0 logs."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    other = logging.getLogger("lightning_utilities.core.rank_zero")
    for one in (logger, other):
        one.addHandler(handler)
    try:
        yield told
    finally:
        for one in (logger, other):
            one.removeHandler(handler)


def test_what_is_loaded_without_values_is_read_in_part(two, tmp_path):
    path = tmp_path / "a.ckpt"
    two.run(write, Table, path, False)
    for without, told in two.run(noted_load, path):
        assert without
        assert not [one for one in told if "lightning_largescale:" in one]


class OnOneRank(Kinds):
    def configure_model(self):
        super().configure_model()
        if self.global_rank == 1:
            pickle.dumps(self.body.head.weight)


def first_values(kind):
    """Of a sharded module, as training starts."""
    torch.manual_seed(SEED)
    model = kind()
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=1).fit(model)
    return model.first


def test_where_one_rank_cannot_record_all_build(two):
    torch.manual_seed(SEED)
    expected = Kinds(late=False).state_dict()
    for found in two.run(first_values, OnOneRank):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class Appends(Kinds):
    """Adds to what __init__ has made."""

    def __init__(self):
        super().__init__(late=False)

    def configure_model(self):
        self.body.blocks.append(Block())
        self.body.blocks[-1].scale = self.body.blocks[-1].table = torch.ones(1)
        self.body.blocks[-1].parts = [torch.ones(1), {"x": torch.zeros(1)}]
        pickle.dumps(self.body.blocks[-1].up.weight)


def test_what_a_failed_recording_added_is_taken_back(two):
    torch.manual_seed(SEED)
    model = Appends()
    model.configure_model()
    for found in two.run(first_values, Appends):
        assert list(found) == list(model.state_dict())
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


class Adapter(LightningModule):
    """A frozen base of files, and an adapter that alone is saved."""

    def __init__(self, late=True):
        super().__init__()
        self.late, self.strict_loading = late, False
        if not late:
            self.make()

    def make(self):
        self.base, self.adapter = nn.Linear(4, 4), nn.Linear(4, 4)
        self.base.requires_grad_(False)

    def configure_model(self):
        if self.late:
            self.make()

    def training_step(self, batch, index):
        return self.adapter(self.base(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.adapter.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: one for name, one in state.items() if name.startswith("adapter")}


def adapt(plan, late, weights, path, resume):
    model = Adapter(late)
    made = trainer(LargeScaleStrategy(plan, weights=weights), devices=plan.world_size, max_steps=2 if resume else 1)
    made.fit(model, ckpt_path=path if resume else None)
    if not resume:
        made.save_checkpoint(path)
    with made.strategy.full_parameters():
        return {name: one.detach().clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("plan", [Plan(), Plan(dp_shard=2)])
def test_a_base_of_files_and_an_adapter_of_a_checkpoint(two, tmp_path, plan, late):
    weights = {"base.weight": torch.full((4, 4), 3.0), "base.bias": torch.full((4,), 2.0)}
    save_file(weights, tmp_path / "base.safetensors")

    def run(resume):
        args = adapt, plan, late, tmp_path / "base.safetensors", tmp_path / "a.ckpt", resume
        return two.run(*args) if plan.world_size > 1 else [args[0](*args[1:])]

    run(False)
    for found in run(True):
        assert all(torch.equal(found[name], value) for name, value in weights.items())


class Hooked(Adapter):
    """With hooks on gradients."""

    def make(self):
        super().make()
        self.adapter.bias.register_hook(lambda gradient: gradient * 0)
        self.adapter.weight.register_post_accumulate_grad_hook(halve)


def halve(weight):
    weight.grad *= 0.5


def hooked(strategy, devices, late):
    torch.manual_seed(SEED)
    model = Hooked(late)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = trainer(strategy(), devices=devices, max_steps=2)
        made.fit(model)
    words = [str(one.message) for one in told if "has a hook on its gradient" in str(one.message)]
    return model.adapter.bias.detach() if devices == 1 or not made.strategy.plan.shards else None, words


def sharded():
    return LargeScaleStrategy(Plan(dp_shard=2))


@pytest.mark.parametrize("late", LATE)
def test_hooks_of_parameters(two, late):
    expected, _ = hooked(lambda: "auto", 1, late)
    # Under a plan that is decided late, what configure_model builds has no values at first.
    for found, words in two.run(hooked, LargeScaleAutoStrategy, 2, late):
        assert not words
        assert torch.equal(found, expected)
    (_, first), _ = two.run(hooked, sharded, 2, late)
    assert first[0].startswith("Parameter 'adapter.weight' has a hook on its gradient, which the shards that take")


class Keeps(Kinds):
    """Leaves out of a state what it does not want."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        wanted = {name: one for name, one in state_dict.items() if ".up." not in name}
        return super().load_state_dict(wanted, strict=False, assign=assign)


def keeps(path):
    torch.manual_seed(SEED)
    model = Keeps()
    made = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS + 1)
    made.fit(model, ckpt_path=path)
    return model.first


STEPS = 2


def test_what_a_module_does_not_load_is_as_it_is_built(two, tmp_path):
    made = trainer(max_steps=STEPS)
    made.fit(loaded := Kinds(late=False))
    made.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(SEED)
    fresh = Kinds(late=False).state_dict()
    for found in two.run(keeps, tmp_path / "a.ckpt"):
        for name, value in loaded.state_dict().items():
            assert torch.equal(found[name], fresh[name] if ".up." in name else value), name


class Unusual(Kinds):
    """Moves to a device that is not there when it is built for the first time."""

    calls = 0

    def configure_model(self):
        Unusual.calls += 1
        super().configure_model()
        if Unusual.calls == 1:
            self.body.to("cuda")


def unusual():
    Unusual.calls = 0
    made = trainer(Watched(Plan(dp_shard=2)), devices=2, max_steps=1)
    torch.manual_seed(SEED)
    model = Unusual()
    made.fit(model)
    return Unusual.calls, made.strategy.without, model.first


def test_what_cannot_be_recorded_is_built_with_its_values(two):
    torch.manual_seed(SEED)
    expected = Kinds(late=False).state_dict()
    for calls, without, found in two.run(unusual):
        assert (calls, without) == (2, 0)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class Holder:
    """No module, nor anything else in which a module's tensors are looked for."""

    def __init__(self):
        self.table = torch.randn(4)


class Holding(Kinds):
    """Has a tensor in an object of a class of its own."""

    calls = 0

    def configure_model(self):
        Holding.calls += 1
        super().configure_model()
        self.holder = Holder()

    def training_step(self, batch, index):
        return super().training_step(batch, index) * self.holder.table.sum()


def holding(devices):
    Holding.calls = 0
    torch.manual_seed(SEED)
    model = Holding()
    made = trainer(Watched(Plan(dp_shard=2)) if devices > 1 else "auto", devices=devices, max_steps=1)
    made.fit(model)
    return Holding.calls, model.first, model.holder.table


def test_tensors_that_no_module_has_are_built_with_their_values(two):
    _, expected, table = holding(1)
    for calls, first, found in two.run(holding, 2):
        assert calls == 2
        assert torch.equal(found, table)
        assert all(torch.equal(first[name], value) for name, value in expected.items())


@pytest.mark.gpu
def test_on_a_device_a_refusal_before_there_are_values_is_what_is_raised(two):
    two.run(refused_before_values)


def refused_before_values():
    strategy = LargeScaleStrategy(Plan(tp=2), compile=True)
    with pytest.raises(PlanError, match="cannot be combined with tp=2"):
        trainer(strategy, devices=2, accelerator="cuda", max_steps=1).fit(Late("llama"))
