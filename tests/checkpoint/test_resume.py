"""Checkpoints: written under one plan, read under any other and by stock Lightning, going on to the same losses."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from models import DIM, GLOBAL_BATCH, Language, Lion, SaveLast, ScheduleFree, read_checkpoint, trainer
from ranks import in_own_group, quiet
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_largescale.errors import PlanError
from lightning_largescale.offload import pages
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

STEPS = 4


class Scheduled(Language):
    """With a scheduler, weights tied to each other, a buffer, and hooks that see the checkpoint."""

    def __init__(self, **options):
        # An epoch a stretch: loaders of the test cannot go on inside one.
        super().__init__(tied=True, samples=STEPS * GLOBAL_BATCH, **options)
        self.register_buffer("seen", torch.zeros(2))

    def on_train_batch_start(self, batch, index):
        self.seen += 1

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = "saved"

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["note"] == "saved"

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def go_on(plan, devices, steps, path=None, save=None, *, kind=Scheduled, **options):
    """Train until step `steps`, from `path`, write `save`; the losses of these steps."""
    model = kind(seed=int(os.environ.get("RANK", 0)) + (7 if path else 0))
    strategy = LargeScaleStrategy(plan, **options) if plan else "auto"
    # A file written at the end of an epoch, which one written after fit is not quite to Lightning.
    callbacks = [SaveLast(save)] if save else []
    epochs = steps // STEPS
    run = trainer(
        strategy, devices=devices, max_steps=-1, max_epochs=epochs, gradient_clip_val=0.1, callbacks=callbacks
    )
    run.fit(model, ckpt_path=path, weights_only=False)
    assert model.seen.tolist() == [steps, steps]
    return model.losses


@pytest.fixture(scope="module")
def uninterrupted():
    return go_on(None, 1, 5 * STEPS)


def test_resumes_under_every_plan_and_stock_lightning(two, four, uninterrupted, tmp_path):
    files = [str(tmp_path / f"{number}.ckpt") for number in range(5)]
    losses = two.run(go_on, Plan(dp_replicate=2), 2, STEPS, None, files[0])[0]
    losses += two.run(go_on, Plan(dp_shard=2), 2, 2 * STEPS, files[0], files[1])[0]
    losses += go_on(None, 1, 3 * STEPS, files[1], files[2])
    losses += four.run(go_on, Plan(dp_replicate=2, dp_shard=2), 4, 4 * STEPS, files[2], files[3])[0]
    losses += go_on(Plan(), 1, 5 * STEPS, files[3], files[4])
    assert losses == pytest.approx(uninterrupted, rel=1e-5)


class Fused(nn.Module):
    """A block whose query, key and value stand side by side in one matrix."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attending(Scheduled):
    """With matrices whose parts are of several stretches, parameter groups, and an odd number of rows."""

    def __init__(self, **options):
        super().__init__(**options)
        self.blocks = nn.ModuleList(Fused() for _ in range(2))
        self.odd = nn.Parameter(torch.randn(5, DIM) * 0.02)

    def forward(self, tokens):
        return super().forward(tokens) + self.odd.sum(0)

    def configure_optimizers(self):
        matrices = [one for one in self.parameters() if one.dim() > 1]
        vectors = [one for one in self.parameters() if one.dim() < 2]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 5e-3}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


PLANS = {
    "stock": (None, 1),
    "replicated": (Plan(dp_replicate=2), 2),
    "sharded": (Plan(dp_shard=2), 2),
    "hybrid": (Plan(dp_replicate=2, dp_shard=2), 4),
    "divided": (Plan(tp=2), 2),
    "2d": (Plan(dp_shard=2, tp=2), 4),
}


def run_on(ranks_of, name, *args, **options):
    plan, devices = PLANS[name]
    if devices == 1:
        return go_on(plan, 1, *args, **options)
    return ranks_of[devices].run(go_on, plan, devices, *args, **options)[0]


@pytest.fixture(scope="module")
def attending(tmp_path_factory):
    """Losses of an uninterrupted run, and a folder."""
    return go_on(None, 1, 2 * STEPS, kind=Attending), tmp_path_factory.mktemp("attending")


def check_resumes(ranks_of, attending, writer, reader):
    losses, folder = attending
    path = folder / f"{writer}.ckpt"
    if not path.exists():
        assert run_on(ranks_of, writer, STEPS, None, path, kind=Attending) == pytest.approx(losses[:STEPS], rel=1e-5)
    assert path.is_dir() == (writer not in ("stock", "replicated"))
    assert run_on(ranks_of, reader, 2 * STEPS, path, kind=Attending) == pytest.approx(losses[STEPS:], rel=1e-5)


@pytest.mark.parametrize(("writer", "reader"), [*zip(PLANS, [*PLANS][3:] + [*PLANS][:3], strict=True)])
def test_goes_on_under_another_plan(two, four, attending, writer, reader):
    check_resumes({2: two, 4: four}, attending, writer, reader)


@pytest.mark.slow
@pytest.mark.parametrize("reader", PLANS)
@pytest.mark.parametrize("writer", PLANS)
def test_goes_on_under_every_plan(two, four, attending, writer, reader):
    check_resumes({2: two, 4: four}, attending, writer, reader)


class Computed(Attending):
    """Puts into checkpoints what it computes of weights, under their names and others."""

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {name: one.double() for name, one in checkpoint["state_dict"].items()}
        checkpoint["part"] = {name: one * 2 for name, one in self.blocks.state_dict().items()}
        checkpoint["average"] = {name: one.detach().clone() for name, one in self.named_parameters()}


class Lost(Attending):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["lost"] = [self.blocks[0].qkv.weight.detach() * 2]


def save_computed(path, full, kind):
    made = trainer(LargeScaleStrategy(Plan(tp=2), save_full=full), devices=2, max_steps=STEPS)
    model = kind()
    made.fit(model)
    try:
        made.save_checkpoint(path)
    except PlanError as error:
        return str(error)
    with made.strategy.full_parameters():
        return {name: one.detach().clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("full", [False, True])
def test_what_hooks_compute_of_weights_is_in_the_users_order(two, tmp_path, full):
    path = tmp_path / "a.ckpt"
    expected = two.run(save_computed, path, full, Computed)[0]
    found = read_checkpoint(path)
    for name, value in expected.items():
        assert torch.equal(found["state_dict"][name], value.double()), name
    for name, value in found["average"].items():
        assert torch.equal(value, expected[name]), name
    for name, value in found["part"].items():
        assert torch.equal(value, expected[f"blocks.{name}"] * 2), name


def test_what_stands_in_an_unknown_order_is_refused(two, tmp_path):
    for told in two.run(save_computed, tmp_path / "a.ckpt", False, Lost):
        assert "'lost.0' in the checkpoint is divided as 'blocks.0.qkv.weight' is, whose elements stand in an" in told


def test_full_file_is_a_stock_one(two, tmp_path):
    plain, ours = tmp_path / "plain.ckpt", tmp_path / "ours.ckpt"
    go_on(None, 1, STEPS, None, plain)
    two.run(go_on, Plan(dp_shard=2), 2, STEPS, None, ours, save_full=True)
    expected, found = (torch.load(path, weights_only=False) for path in (plain, ours))
    assert list(found) == list(expected)
    assert list(found["state_dict"]) == list(expected["state_dict"])
    assert (
        found["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        == expected["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    )
    assert_same_tensors(found["state_dict"], expected["state_dict"])
    assert_same_tensors(found["optimizer_states"], expected["optimizer_states"])
    weights = found["state_dict"]
    assert weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr()
    assert b"FSDP" not in ours.read_bytes()
    assert not list(tmp_path.glob("*.part"))
    assert ours.stat().st_size == pytest.approx(plain.stat().st_size, rel=0.02)


def assert_same_tensors(found, expected):
    if isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same_tensors(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same_tensors(one, other)
    else:
        assert found == expected


class Twice(Language):
    """Two optimizers, stepped in turns."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        optimizer = self.optimizers()[index % 2]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        parts = list(self.blocks.parameters()), list(self.head.parameters())
        return [torch.optim.AdamW(part, lr=1e-2) for part in parts]


def interrupted(plan, devices, folder, resume):
    """Losses of the first steps of an epoch, kept by a ModelCheckpoint in `folder`, or of those that follow."""
    model = Twice(seed=int(os.environ.get("RANK", 0)) + (7 if resume else 0))
    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    options = {"max_steps": 8 if resume else 4, "callbacks": [keeps], "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with|Checkpoint directory|.*not resumable")
        trainer(strategy, devices=devices, **options).fit(model, ckpt_path=f"{folder}/step=4.ckpt" if resume else None)
    return model.losses


def test_a_model_checkpoint_inside_an_epoch_with_several_optimizers(two, tmp_path):
    stock, ours = str(tmp_path / "stock"), str(tmp_path / "ours")
    before = interrupted(None, 1, stock, False)
    assert two.run(interrupted, Plan(dp_shard=2), 2, ours, False)[0] == pytest.approx(before, rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    after = interrupted(None, 1, stock, True)
    assert interrupted(None, 1, ours, True) == pytest.approx(after, rel=1e-5)
    zero2 = Plan(dp_shard=2, reshard_after_forward=False)
    for folder in (stock, ours):
        assert two.run(interrupted, zero2, 2, folder, True)[0] == pytest.approx(after, rel=1e-5)


def local_state_bytes(path):
    """Bytes of storage that optimizer state keeps alive after a load, and those of the rank's own part."""
    model = Scheduled()
    run = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS)
    run.fit(model, ckpt_path=path, weights_only=False)
    held, own = 0, 0
    for state in run.optimizers[0].state.values():
        for value in state.values():
            if isinstance(value, DTensor):
                held += value.to_local().untyped_storage().nbytes()
                own += value.to_local().nbytes
    return held, own


def test_loading_keeps_no_full_copy_alive(two, tmp_path):
    path = str(tmp_path / "a.ckpt")
    go_on(None, 1, STEPS, None, path)
    for held, own in two.run(local_state_bytes, path):
        assert held == own


def load_wrong(path, strict):
    model = Language(layers=2)
    model.strict_loading = strict
    run = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS)
    try:
        run.validate(model, ckpt_path=path, verbose=False, weights_only=False)
    except RuntimeError as error:
        return str(error)
    return ""


def test_missing_keys_are_told_unless_loading_is_not_strict(two, tmp_path):
    path = str(tmp_path / "a.ckpt")
    model = Language(layers=3)
    run = trainer(max_steps=1)
    run.fit(model)
    run.save_checkpoint(path)
    assert all("blocks.2.norm.weight" in told for told in two.run(load_wrong, path, True))
    assert two.run(load_wrong, path, False) == ["", ""]


class Unfreezing(BaseFinetuning):
    """Trains one more block in each epoch, its parameters added to the optimizer."""

    def freeze_before_training(self, module):
        self.freeze(module.blocks[1:])

    def finetune_function(self, module, epoch, optimizer):
        if 0 < epoch < len(module.blocks):
            self.unfreeze_and_add_param_group(module.blocks[epoch], optimizer)


def unfreeze_and_resume(plan, devices, path):
    losses = []
    for epochs, checkpoint in ((2, None), (3, path)):
        model = Language(samples=24)
        strategy = LargeScaleStrategy(plan) if plan else "auto"
        run = trainer(strategy, devices=devices, max_steps=-1, max_epochs=epochs, callbacks=[Unfreezing()])
        run.fit(model, ckpt_path=checkpoint)
        run.save_checkpoint(path)
        losses += model.losses
    return losses


@pytest.mark.parametrize("plan", [Plan(dp_shard=2), Plan(dp_replicate=2)])
def test_callbacks_have_their_state_before_fit_starts(two, tmp_path, plan):
    plain = unfreeze_and_resume(None, 1, tmp_path / "plain.ckpt")
    for losses in two.run(unfreeze_and_resume, plan, 2, tmp_path / "ours.ckpt"):
        assert losses == pytest.approx(plain, rel=1e-5)


WIDE = 256


class Wide(Language):
    """Of 1 MiB, in blocks, with twice as much of state."""

    def __init__(self, kind):
        super().__init__(layers=0, samples=24)
        self.kind = kind
        self.wide = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(4))

    def loss(self, batch):
        x = torch.ones(2, WIDE, device=batch.device)
        for block in self.wide:
            x = x + block(x) / 8
        return super().loss(batch) + x.square().mean() / 64

    def configure_optimizers(self):
        return self.kind(self.parameters())

    def on_train_epoch_start(self):
        if self.kind is ScheduleFree:
            self.trainer.optimizers[0].train()


class Held(Callback):
    """Bytes of the device at most until training starts, and in its first steps."""

    def on_train_start(self, trainer, module):
        self.before = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer, module):
        self.after = torch.cuda.max_memory_allocated()


def on_cuda(plan, kind, epochs, path=None, save=None, devices=1):
    model, held = Wide(kind), Held()
    callbacks = [held, *([SaveLast(save)] if save else [])]
    options = {"accelerator": "cuda", "max_steps": -1, "max_epochs": epochs, "callbacks": callbacks}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer(LargeScaleStrategy(plan), devices=devices, **options).fit(model, ckpt_path=path)
    return model.losses, held.before, held.after


STATE_ELSEWHERE = {
    "DRAM": {"offload_optimizer": "cpu"},
    "DRAM, stepped on there": {"offload_optimizer": "cpu", "cpu_optimizer_step": True},
    "disk": {"offload_optimizer": "nvme"},
    "disk, in part": {"offload_optimizer": "nvme", "resident_optimizer_bytes": 2**20},
    "DRAM, with released gradients": {"offload_optimizer": "cpu", "release_gradients": True},
    "disk, with parameters in DRAM": {"offload_optimizer": "nvme", "offload_parameters": "cpu"},
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tier", "kind", "written"),
    [
        *((tier, torch.optim.AdamW, Plan()) for tier in STATE_ELSEWHERE),
        ("disk", torch.optim.AdamW, None),
        ("DRAM", torch.optim.Adagrad, Plan()),
        ("DRAM", Lion, Plan()),
        # What it keeps is only known once it trains.
        ("DRAM", ScheduleFree, Plan()),
        ("disk, in part", ScheduleFree, None),
    ],
)
def test_state_that_is_kept_elsewhere_never_comes_to_the_device(tmp_path, monkeypatch, tier, kind, written):
    monkeypatch.setattr(pages, "PAGE_BYTES", 2**18)
    plan = Plan(nvme_path=str(tmp_path), **STATE_ELSEWHERE[tier])
    path = tmp_path / "saved"
    on_cuda(written or plan, kind, 1, save=path)
    assert path.is_dir() == (written is None)
    expected, *_ = on_cuda(Plan(), kind, 2, path)
    _, before, after = on_cuda(plan, kind, 1)
    losses, *held = on_cuda(plan, kind, 2, path)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert held[0] <= before + 2**17
    assert held[1] <= after + 2**17


@pytest.mark.gpu
@pytest.mark.slow
def test_each_ranks_state_that_is_kept_elsewhere_never_comes_to_its_device(two, tmp_path):
    kind, path = torch.optim.AdamW, tmp_path / "saved"
    on_cuda(Plan(), kind, 1, save=path / "file")
    two.run(in_own_group, on_cuda, Plan(dp_shard=2), kind, 1, save=path / "directory", devices=2)
    plan = Plan(dp_shard=2, offload_optimizer="cpu")
    fresh = two.run(in_own_group, on_cuda, plan, kind, 1, devices=2)
    for saved in path.iterdir():
        for found, (_, before, _) in zip(
            two.run(in_own_group, on_cuda, plan, kind, 2, saved, devices=2), fresh, strict=True
        ):
            assert found[1] <= before + 2**17
