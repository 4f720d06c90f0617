"""What is kept in other tiers trains as if it were not: numbers, checkpoints, evaluation, errors, and what is left."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from models import DIM, Language, Lion, SaveLast, trainer
from ranks import quiet
from torch import nn, optim
from torch.distributed.tensor import DTensor

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import at_rest, held_bytes, peak_bytes, release_free_memory
from lightning_largescale.offload import pages
from lightning_largescale.offload.direct import DirectFile
from lightning_largescale.offload.store import Store, StoreError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


def bitsandbytes_adamw(groups):
    # To import it begins with CUDA, after which no ranks can be forked.
    import bitsandbytes

    return bitsandbytes.optim.AdamW(groups, 1e-3)


OPTIMIZERS = {
    "Adam": lambda groups: optim.Adam(groups, 1e-3, amsgrad=True),
    "AdamW": lambda groups: optim.AdamW(groups, 1e-3, fused=True),
    "SGD": lambda groups: optim.SGD(groups, 1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda groups: optim.Adagrad(groups, 1e-2),
    "RMSprop": lambda groups: optim.RMSprop(groups, 1e-3, centered=True),
    "NAdam": lambda groups: optim.NAdam(groups, 1e-3),
    "Lion-like": lambda groups: Lion(groups, 1e-4),
    "bitsandbytes": bitsandbytes_adamw,
}
RUNS = {
    "clipping": {"gradient_clip_val": 0.3},
    "accumulation": {"accumulate_grad_batches": 2},
    "groups": {},
    "schedule": {},
}
TIERS = {
    "optimizer": {"offload_optimizer": "nvme"},
    # On the CPU the host is the device.
    "optimizer in DRAM": {"offload_optimizer": "cpu", "cpu_optimizer_step": True},
    "in part": {"offload_optimizer": "nvme", "resident_optimizer_bytes": 20000},
    "parameters": {"offload_parameters": "nvme"},
    "parameters in part": {"offload_parameters": "nvme", "resident_parameter_bytes": 8000},
    "both": {"offload_parameters": "nvme", "offload_optimizer": "nvme"},
    "activations": {"offload_activations": "nvme"},
    "all": {"offload_parameters": "nvme", "offload_optimizer": "nvme", "offload_activations": "nvme"},
}
RELEASED = {
    "gradients": {"release_gradients": True},
    "gradients and state": {"release_gradients": True, "offload_optimizer": "nvme"},
    "everything": {"release_gradients": True, **TIERS["all"], "activation_checkpointing": "full"},
}


class Model(Language):
    """A language model with an optimizer of the test's."""

    def __init__(self, kind="AdamW", run="groups", **options):
        super().__init__(**options)
        self.kind, self.run = kind, run

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [{"params": parameters}]
        if self.run == "groups":
            groups = [
                {"params": [one for one in parameters if one.dim() > 1]},
                {"params": [one for one in parameters if one.dim() < 2], "lr": 3e-3},
            ]
        made = OPTIMIZERS[self.kind](groups)
        if self.run != "schedule":
            return made
        return [made], [{"scheduler": optim.lr_scheduler.StepLR(made, 2, 0.7), "interval": "step"}]


def trained(plan, kind, run, *, devices=1, steps=6, accelerator="cpu", **options):
    """Losses, this rank's parameters, and the state of the optimizer after some steps; bytes that went to a disk."""
    pages.PAGE_BYTES = 16 * 1024
    model = Model(kind, run, **options)
    given = {"devices": devices, "max_steps": steps, "accelerator": accelerator, **RUNS[run]}
    fitted = trainer(LargeScaleStrategy(plan), callbacks=[Kept()], **given)
    fitted.fit(model)
    kept = next(one for one in fitted.callbacks if isinstance(one, Kept))
    return model.losses, kept.parameters, kept.state, kept.written


class Kept(Callback):
    """What there is at the end of training, while it is as it was trained."""

    def on_train_end(self, fitted, module):
        def local(value):
            return value.to_local().clone() if isinstance(value, DTensor) else value

        names = {parameter: name for name, parameter in module.named_parameters()}
        self.parameters = {name: local(parameter.detach()).clone() for parameter, name in names.items()}
        state = fitted.optimizers[0].state
        self.state = {
            names[parameter]: {key: local(value) for key, value in values.items()}
            for parameter, values in state.items()
        }
        store = fitted.strategy._run.store
        self.written = 0 if store is None else store.written_bytes


def check_same(found, expected):
    losses, parameters, state, _ = found
    assert losses == expected[0]
    assert parameters.keys() == expected[1].keys()
    for name, value in parameters.items():
        assert torch.equal(value, expected[1][name]), name
    assert state.keys() == expected[2].keys()
    for name, values in state.items():
        assert list(values) == list(expected[2][name]), name
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[2][name][key])), (name, key)


def cases(*often):
    """Those in `often` each day, for a few steps; every optimizer in every run now and then, for many."""
    for kind, run in itertools.product(OPTIMIZERS, RUNS):
        yield pytest.param(kind, run, 50, marks=pytest.mark.slow, id=f"{kind}-{run}-long")
        if f"{kind}-{run}" in often:
            yield pytest.param(kind, run, 4, id=f"{kind}-{run}")


@pytest.fixture(autouse=True)
def _as_they_were(monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", pages.PAGE_BYTES)


@pytest.mark.parametrize(("kind", "run", "steps"), [*cases("AdamW-clipping", "SGD-groups")])
def test_one_process_trains_as_plainly(tmp_path, kind, run, steps):
    expected = trained(Plan(), kind, run, steps=steps)
    tiers = {**TIERS, **(RELEASED if run in ("groups", "schedule") else {})}
    for name, fields in tiers.items():
        found = trained(Plan(nvme_path=str(tmp_path), **fields), kind, run, steps=steps)
        check_same(found, expected)
        disk = "nvme" in fields.values() and name != "activations"
        assert (found[3] > 0) == disk, name
    assert not [*tmp_path.iterdir()]


BESIDE_CUDA = {
    **TIERS,
    **RELEASED,
    "on the host": {"offload_optimizer": "cpu", "cpu_optimizer_step": True},
    "parameters in DRAM": {"offload_parameters": "cpu", "offload_optimizer": "cpu"},
    "parameters partly in DRAM": {"offload_parameters": "cpu", "resident_parameter_bytes": 8000},
    "activations in DRAM": {"offload_activations": "cpu"},
    "three tiers": {
        "offload_parameters": "nvme",
        "resident_parameter_bytes": 8000,
        "cpu_parameter_bytes": 8000,
        "offload_optimizer": "nvme",
        "resident_optimizer_bytes": 20000,
        "cpu_optimizer_bytes": 40000,
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["AdamW", pytest.param("SGD", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tier", BESIDE_CUDA)
def test_a_cuda_device_trains_as_plainly(tmp_path, tier, kind):
    run = "groups" if "release_gradients" in BESIDE_CUDA[tier] else "clipping"
    expected = trained(Plan(), kind, run, accelerator="cuda")
    found = trained(Plan(nvme_path=str(tmp_path), **BESIDE_CUDA[tier]), kind, run, accelerator="cuda")
    # Some kernels add in any order, and the host steps with others.
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for name, value in found[1].items():
        torch.testing.assert_close(value.cpu(), expected[1][name].cpu(), rtol=1e-3, atol=1e-5)


class Halved(Language):
    """Is evaluated in half precision."""

    def on_validation_start(self):
        self.to(torch.bfloat16)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch).float(), sync_dist=True)


def halved(plan):
    run = trainer(LargeScaleStrategy(plan), devices=plan.world_size, accelerator="cuda", limit_val_batches=2)
    (found,) = run.validate(Halved(), verbose=False)
    return found["val_loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_shard_whose_memory_was_replaced_is_what_is_gathered(two, tmp_path, tier, shards):
    plan = Plan(dp_shard=shards, offload_parameters=tier, nvme_path=str(tmp_path))
    for found in two.run(halved, plan) if shards > 1 else [halved(plan)]:
        assert found == pytest.approx(halved(Plan()), rel=1e-2)


@pytest.mark.parametrize(("kind", "run", "steps"), [*cases("SGD-clipping")])
def test_two_ranks_train_as_when_all_stays(two, tmp_path, kind, run, steps):
    plan = Plan(dp_shard=2, nvme_path=str(tmp_path))
    expected = two.run(trained, plan, kind, run, devices=2, steps=steps)
    tiers = {**TIERS, **(RELEASED if run in ("groups", "schedule") else {})}
    for fields in tiers.values():
        if run == "accumulation" and "offload_parameters" in fields:
            # Reduced in every micro-batch, and so in another order.
            continue
        found = two.run(trained, Plan(dp_shard=2, nvme_path=str(tmp_path), **fields), kind, run, devices=2, steps=steps)
        for own, plain in zip(found, expected, strict=True):
            check_same(own, plain)


def test_two_ranks_accumulate_parameters_elsewhere_but_for_rounding(two, tmp_path):
    expected = two.run(trained, Plan(dp_shard=2), "SGD", "accumulation", devices=2)
    plan = Plan(dp_shard=2, nvme_path=str(tmp_path), **TIERS["both"])
    for own, plain in zip(two.run(trained, plan, "SGD", "accumulation", devices=2), expected, strict=True):
        assert own[0] == pytest.approx(plain[0], rel=1e-6)


@pytest.mark.parametrize("tier", ["optimizer", pytest.param("both", marks=pytest.mark.slow), "all"])
def test_any_plan_reads_what_is_saved_part_by_part(tmp_path, tier):
    disk = tmp_path / "disk"
    disk.mkdir()
    plans = {"plain": Plan(), tier: Plan(nvme_path=str(disk), **TIERS[tier])}
    resumed = {}
    for name, plan in plans.items():
        path = tmp_path / f"{name}.ckpt"
        trainer(LargeScaleStrategy(plan), max_steps=-1, max_epochs=1, callbacks=[SaveLast(path)]).fit(Model(samples=48))
        assert path.is_dir() == (name == tier)
        for other, under in plans.items():
            model = Model(samples=48)
            fitted = trainer(LargeScaleStrategy(under), max_steps=-1, max_epochs=2)
            fitted.fit(model, ckpt_path=path)
            resumed[name, other] = model.losses, [parameter.detach().clone() for parameter in model.parameters()]
    first, *others = resumed.values()
    for losses, parameters in others:
        assert losses == first[0]
        assert all(map(torch.equal, parameters, first[1]))


def test_evaluation_runs_from_what_is_spilled(tmp_path):
    plain, spilled = Model(), Model()
    run = trainer(LargeScaleStrategy(Plan(offload_parameters="nvme", nvme_path=str(tmp_path))), limit_val_batches=2)
    expected = trainer().predict(plain)
    assert all(map(torch.equal, run.predict(spilled), expected))
    trainer(limit_val_batches=2).validate(plain, verbose=False)
    run.validate(spilled, verbose=False)
    assert spilled.evaluated == plain.evaluated


def test_after_fit_the_module_is_plain_and_its_memory_a_file(tmp_path):
    model = Model()
    run = trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **TIERS["both"])), max_steps=2)
    run.fit(model)
    assert not [*tmp_path.iterdir()]
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert at_rest(model.blocks[0].up.weight)
    assert not at_rest(model.embedding.weight)
    # All as of any module: read, written to, trained by hand.
    expected = model.blocks[0].up.weight.clone()
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer = run.optimizers[0]
    assert {*optimizer.param_groups[0]["params"], *optimizer.param_groups[1]["params"]} == {*model.parameters()}
    optimizer.step()
    assert not torch.equal(model.blocks[0].up.weight, expected)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    # Under a plan that keeps it in DRAM it comes back.
    trainer(LargeScaleStrategy(Plan()), max_steps=1).fit(model)
    assert not any(map(at_rest, model.parameters()))


class Wide(Language):
    """Of 100 MiB, built where Lightning asks for it."""

    def __init__(self):
        super().__init__(layers=0, samples=24)
        self.wide = None

    def configure_model(self):
        if self.wide is None:
            torch.manual_seed(1)
            self.inside = nn.Linear(DIM, 1024)
            self.wide = nn.ModuleList(nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(25))
            self.outside = nn.Linear(1024, DIM)

    def forward(self, tokens):
        x = self.inside(super().forward(tokens))
        for block in self.wide:
            x = x + block(x)
        return self.outside(x)


class Peak(Callback):
    """What the steps of a run held at most, and wrote."""

    def on_train_batch_end(self, fitted, module, *given):
        self.bytes, self.written = peak_bytes("cpu"), fitted.strategy._run.store.written_bytes


def test_auto_keeps_on_a_disk_what_does_not_fit(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    release_free_memory()
    # Parameters, gradients and state are of 400 MiB.
    budget = held_bytes("cpu") + 330 * 2**20
    strategy = LargeScaleAutoStrategy(memory_budget=budget, nvme_path=disk, plan_out=tmp_path / "plan.json")
    plain, model = Wide(), Wide()
    told = Peak()
    trainer(strategy, max_steps=3, callbacks=[told]).fit(model)
    assert told.bytes <= budget
    assert told.written > 0
    plan = strategy.plan
    assert "nvme" in (plan.offload_parameters, plan.offload_optimizer)
    assert strategy.report.best_estimate.peak_bytes["nvme"] > 0
    assert Plan.load(tmp_path / "plan.json") == dataclasses.replace(plan, nvme_path=str(disk))
    assert peak_bytes("cpu") <= budget
    trainer(LargeScaleStrategy(Plan()), max_steps=3).fit(plain)
    assert model.losses == plain.losses


@pytest.mark.parametrize("tier", ["optimizer", "both"])
def test_an_optimizer_that_needs_whole_matrices_has_them_on_one_process(tmp_path, tier):
    plain, paged = (with_optimizer(lambda parameters: optim.Adafactor(parameters, 1e-2)) for _ in range(2))
    trainer(LargeScaleStrategy(Plan()), max_steps=4).fit(plain)
    trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **TIERS[tier])), max_steps=4).fit(paged)
    assert paged.losses == plain.losses


class Global(optim.SGD):
    """Divides by the norm of all gradients within its step."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        members = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        norm = torch.stack([one.grad.norm() for one in members]).norm()
        for one in members:
            one.sub_(one.grad / norm, alpha=1e-3)
        return loss


class Sparse(Model):
    def __init__(self):
        super().__init__()
        self.embedding.sparse = True


class Clipping(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


def with_optimizer(make):
    model = Model()
    model.configure_optimizers = lambda: make(model.parameters())
    return model


class Watching(Callback):
    def on_before_optimizer_step(self, fitted, module, optimizer):
        pass


class Flat(Model):
    def __init__(self):
        super().__init__(layers=0)


REFUSED = [
    (
        {"offload_parameters": "nvme"},
        Flat,
        {},
        "offload_parameters='nvme' needs repeated blocks, or extra_fsdp",
    ),
    ({"offload_optimizer": "nvme"}, lambda: with_optimizer(optim.LBFGS), {}, "LBFGS cannot be paged: it evaluates"),
    ({"offload_parameters": "nvme"}, lambda: with_optimizer(optim.LBFGS), {}, "LBFGS cannot be paged: it evaluates"),
    (
        {"offload_optimizer": "nvme"},
        lambda: with_optimizer(lambda parameters: Global(parameters, 1e-3)),
        {},
        "Global cannot be paged: its step on one parameter after the other is not that on all of them",
    ),
    ({"offload_optimizer": "nvme"}, Sparse, {}, "the Embedding 'embedding' has sparse=True, and what is offloaded"),
    ({"release_gradients": True}, Model, {"gradient_clip_val": 1.0}, "gradient_clip_val, which clips by norm, needs"),
    ({"release_gradients": True}, Model, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 needs them"),
    ({"release_gradients": True}, Model, {"callbacks": [Watching()]}, "Watching.on_before_optimizer_step needs them"),
    (
        {"release_gradients": True},
        Model,
        {"callbacks": [GradientAccumulationScheduler({1: 2})]},
        "GradientAccumulationScheduler needs them",
    ),
    ({"release_gradients": True}, Clipping, {}, "Clipping.configure_gradient_clipping needs them after it"),
]


@pytest.mark.parametrize(("fields", "make", "options", "message"), REFUSED)
def test_what_cannot_be_done_is_said_before_the_first_step(tmp_path, fields, make, options, message):
    model = make()
    with pytest.raises(PlanError, match=message):
        trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **fields)), **options).fit(model)
    assert model.losses == []
    assert not [*tmp_path.iterdir()]


class Scaled(Model):
    """Changes its gradients when they are complete."""

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


class ScaledLate(Model):
    """Changes them before they are clipped."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


class Logged(Model):
    """Looks at its gradients after they were clipped, and clips them once more."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.3, "norm")
        found = [parameter.grad for parameter in self.parameters()]
        self.losses += [float(nn.utils.get_total_norm(found)), *(float(one.abs().sum()) for one in found)]
        nn.utils.clip_grad_norm_(self.parameters(), 0.2)
        self.losses += [float(one.norm()) for one in found]


class ByHand(Model):
    """Adds to its gradients after they were clipped, and has two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        parameters = [*self.parameters()]
        return [optim.SGD(parameters[::2], 0.1, momentum=0.9), optim.SGD(parameters[1::2], 0.1, momentum=0.9)]

    def training_step(self, batch, index):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        if index % 2:
            for parameter in self.parameters():
                parameter.grad.add_(0.01)
        first.step()
        second.step()


@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("kind", [Scaled, ScaledLate, Logged, ByHand])
def test_gradients_on_a_disk_are_those_that_hooks_and_steps_make_of_them(tmp_path, kind, clip):
    options = {"max_steps": 8 if kind is ByHand else 4, "gradient_clip_val": None if kind is ByHand else clip}
    plain, spilled = kind(), kind()
    trainer(LargeScaleStrategy(Plan()), **options).fit(plain)
    trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **TIERS["both"])), **options).fit(spilled)
    assert spilled.losses == plain.losses
    for found, expected in zip(spilled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)
        # As they are left after a fit.
        assert torch.equal(found.grad, expected.grad)


class Regrouped(Model):
    """Moves parameters to another group of its optimizer in mid-run, and takes some out."""

    def on_train_batch_start(self, batch, index):
        first, second = self.optimizers().optimizer.param_groups
        if index == 2:
            second["params"] = [*second["params"], *first["params"][:3]]
            first["params"] = first["params"][3:]
        if index == 4:
            second["params"] = second["params"][2:]


@pytest.mark.parametrize("tier", ["optimizer", "both"])
def test_an_optimizer_whose_groups_change_in_mid_run(tmp_path, tier):
    plain, moved = Regrouped(), Regrouped()
    trainer(LargeScaleStrategy(Plan()), max_steps=7).fit(plain)
    trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **TIERS[tier])), max_steps=7).fit(moved)
    assert moved.losses == plain.losses


def test_a_parameter_that_is_moved_to_where_other_state_is_kept_of_it_is_refused(tmp_path):
    class Kept(Regrouped):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            made.param_groups[1]["amsgrad"] = True
            return made

    with pytest.raises(PlanError, match=r"a parameter of shape \(.*\) was moved to group 1 of AdamW, by which other"):
        trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **TIERS["optimizer"]))).fit(Kept())


class Grown(Model):
    """Gets the parameters of a block in mid-run."""

    def configure_optimizers(self):
        members = [one for name, one in self.named_parameters() if not name.startswith("blocks.1.")]
        return optim.AdamW(members, 1e-3)

    def on_train_batch_start(self, batch, index):
        if index == 2:
            self.optimizers().optimizer.add_param_group({"params": [*self.blocks[1].parameters()]})


@pytest.mark.parametrize("tier", ["both", "released"])
def test_an_optimizer_that_gets_parameters_in_mid_run(tmp_path, tier):
    fields = {**TIERS["both"], "release_gradients": tier == "released"}
    plain, moved = Grown(), Grown()
    trainer(LargeScaleStrategy(Plan()), max_steps=5).fit(plain)
    trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **fields)), max_steps=5).fit(moved)
    assert moved.losses == plain.losses


def test_values_are_clipped_when_gradients_are_released(tmp_path):
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "max_steps": 4}
    plain, released = Model("SGD"), Model("SGD")
    trainer(LargeScaleStrategy(Plan()), **options).fit(plain)
    trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **RELEASED["everything"])), **options).fit(released)
    assert released.losses == plain.losses


class Failing(DirectFile):
    """Fails at a number of requests, as a disk would."""

    left = 200

    def read_at(self, memory, offset):
        Failing.left -= 1
        if Failing.left < 0:
            raise OSError(5, os.strerror(5))
        return super().read_at(memory, offset)


@pytest.mark.parametrize("tier", ["optimizer", "both"])
def test_a_disk_that_fails_in_mid_run_ends_it_with_its_own_error(tmp_path, monkeypatch, tier):
    monkeypatch.setattr("lightning_largescale.run.Store", lambda folder: Store(folder, file=Failing))
    monkeypatch.setattr(Failing, "left", 200)
    monkeypatch.setattr(pages, "PAGE_BYTES", 16 * 1024)
    model = Model()
    with pytest.raises(
        StoreError, match=r"reading \d+ bytes of the .* at offset \d+ of .* failed \(Input/output error\)"
    ):
        trainer(LargeScaleStrategy(Plan(nvme_path=str(tmp_path), **TIERS[tier])), max_steps=40).fit(model)
    assert not [*tmp_path.iterdir()]
    # The module is as usable as after any run that failed.
    trainer(LargeScaleStrategy(Plan()), max_steps=1).fit(model)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from models import DIM, Language, trainer
from lightning.pytorch import Callback
from lightning_largescale import LargeScaleStrategy, Plan
class Told(Callback):
    def on_train_batch_end(self, *given):
        print("step", flush=True)
plan = Plan(offload_optimizer="nvme", offload_parameters="nvme", nvme_path={disk!r})
trainer(LargeScaleStrategy(plan), max_steps=10000, callbacks=[Told()]).fit(Language(samples=100000))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_leaves_nothing_to_the_next(tmp_path, number):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = SCRIPT.format(tests=str(Path(__file__).parent), disk=str(disk))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for _ in range(3):
            while "step" not in run.stdout.readline():
                pass
        assert len([*disk.iterdir()]) == 1
        run.send_signal(number)
    model = Model()
    trainer(LargeScaleStrategy(Plan(offload_optimizer="nvme", nvme_path=str(disk))), max_steps=1).fit(model)
    assert not [*disk.iterdir()]


CGROUPS = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").is_dir() else "/sys/fs/cgroup")


@pytest.mark.slow
@pytest.mark.skipif(not os.access(CGROUPS, os.W_OK), reason="needs a memory cgroup of its own, so root")
def test_a_model_larger_than_memory_trains_where_the_plain_run_is_killed(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks/larger_than_memory.py"
    size = ["--width", "1024", "--layers", "12", "--limit", "2.2GiB", "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}

    def run(*options):
        command = [sys.executable, str(script), *size, *options]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)

    assert run("--plain").stdout.endswith("ended with -9: killed by the kernel, for its memory\n")
    done = run()
    assert done.stdout.endswith("ended with 0\n"), done.stdout + done.stderr
    made = float(done.stdout.split("peak while they were made ")[1].split()[0])
    # The whole model has 0.76 GiB, and the process 0.35 before it.
    assert made < 0.75
