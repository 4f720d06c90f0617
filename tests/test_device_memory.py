"""What plans are predicted to take of a device, and of pinned DRAM beside it, is what the allocators give out.

They train with little more.
"""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from planner.builders import MIB, hardware
from ranks import quiet
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_largescale import tiers
from lightning_largescale.hardware.usage import peak_bytes, start_peak
from lightning_largescale.offload import pages
from lightning_largescale.plan import Plan
from lightning_largescale.planner import paging, placement
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.workload import Workload

pytestmark = [
    *quiet,
    pytest.mark.gpu,
    # Workspaces of libraries, and the context, are those of a real device.
    pytest.mark.skipif(torch.version.cuda is not None, reason="is about a pretended device"),
]
WIDTH, HEADS, LAYERS, VOCAB, BATCH, LENGTH = 256, 4, 4, 2048, 4, 64


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = Norm(), Norm()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        split = self.qkv(self.before(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2)).float() / (WIDTH // HEADS) ** 0.5
        attended = torch.softmax(scores, -1).to(value.dtype) @ value
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Text(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))


class Model(LightningModule):
    """A small GPT: of its bytes those of parameters, state and activations are alike many."""

    def __init__(self, optimizer, layers=LAYERS):
        super().__init__()
        self.optimizer = optimizer
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        # Of what needs a parameter as a whole one that is larger than what its backward leaves room for.
        self.matrix = nn.Parameter(torch.zeros(8 * VOCAB, WIDTH)) if optimizer in ("Adafactor", *WHOLE) else None
        self.steps = 0

    def forward(self, x):
        x = self.token(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch, index):
        self.steps += 1
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        return loss if self.matrix is None else loss + self.matrix.mean()

    def configure_optimizers(self):
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), 1e-4)
        if self.optimizer == "Adafactor":
            return torch.optim.Adafactor(self.parameters(), 1e-4)
        if self.optimizer == "Muon":
            return torch.optim.Muon([one for one in self.parameters() if one.dim() == 2], 1e-4)
        if self.optimizer == "AdamW8bit":
            # To import it begins with CUDA.
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(self.parameters(), 1e-4)
        if self.optimizer in WHOLE:
            return WHOLE[self.optimizer](self.parameters(), 1e-4)
        return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9 if self.optimizer == "momentum" else 0.0)

    def train_dataloader(self):
        return DataLoader(Text(), batch_size=BATCH)


class Normalized(torch.optim.Optimizer):
    """Momentum as long as the parameter's elements are many: a step that needs all of it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    mean = self.state[one].setdefault("mean", torch.zeros_like(one)).mul_(0.9).add_(one.grad)
                    one.sub_(mean / mean.norm() * one.numel() ** 0.5, alpha=group["lr"])
        return loss


class Factored(Normalized):
    """The same, beside a matrix for the columns of each."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None and one.dim() == 2:
                    columns = one.grad.T @ one.grad
                    self.state[one].setdefault("columns", torch.zeros_like(columns)).lerp_(columns, 0.1)
        return loss


WHOLE = {"normalized": Normalized, "factored": Factored}


class Case(NamedTuple):
    """What is trained: fields of a plan, an optimizer, micro-batches in a step, bytes of a page, and layers."""

    plan: dict[str, Any]
    optimizer: str = "AdamW"
    accumulate: int = 1
    page_bytes: int = 4 * MIB
    layers: int = LAYERS

    def module(self) -> Model:
        return Model(self.optimizer, self.layers)


FULL = {"activation_checkpointing": "full"}
CHEAP = {**FULL, "checkpointed_operations": "cheap"}
SOME = {"activation_checkpointing": "selective", "checkpointed_blocks": ("blocks.0", "blocks.2")}
MIXED, HALF = {"precision": "bf16-mixed"}, {"precision": "bf16-true"}
RELEASE, HOST = {"release_gradients": True}, {"cpu_optimizer_step": True}
STATE, PARAMETERS, SAVED = ({f"offload_{name}": "cpu"} for name in ("optimizer", "parameters", "activations"))
DISK_STATE, DISK_PARAMETERS, DISK_SAVED = (
    {f"offload_{name}": "nvme"} for name in ("optimizer", "parameters", "activations")
)
ZERO2, ZERO3 = {"dp_shard": 2, "reshard_after_forward": False}, {"dp_shard": 2}
REPLICAS, TABLES = {"dp_replicate": 2}, {"row_sharded_embeddings": ("token",)}
WRAPS, AHEAD = {"extra_fsdp_modules": ("token", "head")}, {"prefetched_blocks": 2}
ONE_RANK = {
    "plain": Case({}),
    "plain, SGD": Case({}, "SGD"),
    "plain, momentum": Case({}, "momentum"),
    "accumulation": Case({}, accumulate=2),
    "recompute": Case(FULL),
    "recompute what is cheap": Case(CHEAP),
    "recompute some": Case(SOME),
    "bf16-mixed": Case(MIXED),
    "16-mixed": Case({"precision": "16-mixed"}),
    "bf16-true": Case(HALF),
    "release": Case(RELEASE),
    "release, recompute": Case({**RELEASE, **FULL}),
    "state in DRAM": Case(STATE),
    "state on a disk": Case(DISK_STATE),
    "state in part": Case({**STATE, "resident_optimizer_bytes": 12 * MIB}),
    "state in DRAM, momentum": Case(STATE, "momentum"),
    "state in DRAM, recompute": Case({**STATE, **FULL}),
    "plain, Adafactor": Case({}, "Adafactor"),
    "state in DRAM, Adafactor": Case(STATE, "Adafactor", page_bytes=MIB // 4),
    "state in DRAM, whole matrices": Case(STATE, "normalized", page_bytes=MIB // 4),
    "state in part, whole matrices": Case({**STATE, "resident_optimizer_bytes": 4 * MIB}, "normalized", 1, MIB // 4),
    "state on a disk, whole matrices": Case(DISK_STATE, "normalized", page_bytes=MIB // 4),
    "state, release, whole matrices": Case({**STATE, **RELEASE}, "normalized", page_bytes=MIB // 4),
    "state in DRAM, and some that no page has": Case(STATE, "factored", page_bytes=MIB // 4),
    "state in DRAM, Muon": Case(STATE, "Muon", page_bytes=MIB // 4),
    # Its kernels for the device are not pretended.
    "host step, bitsandbytes": Case({**STATE, **HOST}, "AdamW8bit", page_bytes=MIB // 4),
    "host step": Case({**STATE, **HOST}),
    "host step from a disk": Case({**DISK_STATE, **HOST}),
    "parameters in DRAM": Case(PARAMETERS),
    "parameters in DRAM, SGD": Case(PARAMETERS, "SGD"),
    "parameters in DRAM, accumulation": Case(PARAMETERS, accumulate=2),
    "parameters in DRAM, bf16-mixed": Case({**PARAMETERS, **MIXED}),
    "parameters in part": Case({**PARAMETERS, "resident_parameter_bytes": 7 * MIB}),
    "parameters on a disk": Case(DISK_PARAMETERS),
    "parameters and state in DRAM": Case({**PARAMETERS, **STATE}),
    "activations in DRAM": Case(SAVED),
    "activations on a disk": Case(DISK_SAVED),
    "activations in DRAM, recompute": Case({**SAVED, **FULL}),
    "state, release": Case({**STATE, **RELEASE}),
    "all in DRAM": Case({**STATE, **PARAMETERS, **SAVED}),
    "all in DRAM, release, recompute": Case({**STATE, **PARAMETERS, **SAVED, **RELEASE, **FULL}),
    "activations in DRAM, two ahead": Case({**SAVED, **AHEAD}),
    "activations on a disk, two ahead": Case({**DISK_SAVED, **AHEAD}, layers=6),
    "all in DRAM, two ahead": Case({**STATE, **PARAMETERS, **SAVED, **AHEAD}, layers=8),
    "parameters on a disk, two ahead": Case({**DISK_PARAMETERS, **AHEAD}),
}
TWO_RANKS = {
    "replicate": Case(REPLICAS),
    "replicate, accumulation": Case(REPLICAS, accumulate=2),
    "replicate, recompute": Case({**REPLICAS, **FULL}),
    "replicate, state in DRAM": Case({**REPLICAS, **STATE}),
    "replicate, tables": Case({**REPLICAS, **TABLES}, "SGD"),
    "ZeRO-2": Case(ZERO2),
    "ZeRO-3": Case(ZERO3),
    "ZeRO-3, wraps": Case({**ZERO3, **WRAPS}),
    "ZeRO-3, momentum": Case(ZERO3, "momentum"),
    "ZeRO-3, recompute": Case({**ZERO3, **FULL}),
    "ZeRO-3, accumulation": Case(ZERO3, accumulate=2),
    "ZeRO-3, bf16-mixed": Case({**ZERO3, **MIXED}),
    "ZeRO-3, 16-mixed": Case({**ZERO3, "precision": "16-mixed"}),
    "ZeRO-3, release": Case({**ZERO3, **RELEASE}),
    "ZeRO-3, tables": Case({**ZERO3, **TABLES}, "SGD"),
    "ZeRO-3, state in DRAM": Case({**ZERO3, **STATE}),
    "ZeRO-3, host step": Case({**ZERO3, **STATE, **HOST}),
    "ZeRO-3, parameters in DRAM": Case({**ZERO3, **PARAMETERS}),
    "ZeRO-3, parameters in DRAM, accumulation": Case({**ZERO3, **PARAMETERS}, accumulate=2),
    "ZeRO-3, parameters on a disk": Case({**ZERO3, **DISK_PARAMETERS}),
    "ZeRO-3, activations in DRAM": Case({**ZERO3, **SAVED}),
    "ZeRO-3, all in DRAM": Case({**ZERO3, **STATE, **PARAMETERS, **SAVED}),
}


class Bytes(NamedTuple):
    """Bytes of the device's allocator, and of pinned DRAM."""

    device: int
    pinned: int


def predicted(case: Case) -> Bytes:
    """What a plan takes, without what libraries take of a real device."""
    plan = Plan(**case.plan)
    module = case.module().to(torch.bfloat16 if plan.precision == "bf16-true" else torch.float32)
    batch = next(iter(module.train_dataloader()))
    work = Workload.trace(module, batch, precisions=(plan.precision,), device_type="cuda")
    machine = hardware(plan.world_size, kind="cuda")
    estimate = peak_memory(work, plan, machine, accumulate_grad_batches=case.accumulate)
    return Bytes(estimate.measured_bytes - estimate.terms["runtime"], estimate.elsewhere.get("cpu", 0))


def train(case: Case, folder: str, page_bytes: int) -> tuple[Bytes, Bytes]:
    """Predicted and measured bytes of a training, whose device has 3% more than was predicted."""
    for module in (tiers, pages, paging, placement):
        module.PAGE_BYTES = page_bytes
    # DistributedDataParallel made its nodes on another stream, as it asks to.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
    seed_everything(0, verbose=False)
    estimate = predicted(case)
    gc.collect()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    start_peak("cuda")
    torch.cuda.reset_peak_host_memory_stats()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    plan = Plan(**case.plan, nvme_path=folder if "nvme" in case.plan.values() else None)
    backend = "cpu:gloo,cuda:nccl" if plan.world_size > 1 else None
    trainer = Trainer(
        strategy=LargeScaleStrategy(plan, process_group_backend=backend),
        accelerator="cuda",
        devices=plan.world_size,
        max_steps=3,
        accumulate_grad_batches=case.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = case.module()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((before + 1.03 * estimate.device) / torch.cuda.mem_get_info()[1])
    try:
        trainer.fit(module)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert module.steps == 3 * case.accumulate
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"] - pinned
    return estimate, Bytes((peak_bytes("cuda") or 0) - held, pinned)


def check(predicted: Bytes, measured: Bytes, *, slack: int = MIB // 4) -> None:
    # Of pinned memory: vectors are aligned, and loaders pin their batches.
    for where, one, other in zip(Bytes._fields, predicted, measured, strict=True):
        words = f"{where}: predicted {one / MIB:.2f} MiB, measured {other / MIB:.2f} MiB"
        print(words)
        more = 0 if where == "device" else slack
        assert 0.98 * other - more <= one <= 1.1 * other + more, words


@pytest.fixture(autouse=True)
def _pages_as_they_were(monkeypatch):
    for module in (tiers, pages, paging, placement):
        monkeypatch.setattr(module, "PAGE_BYTES", module.PAGE_BYTES)


def cases(found: dict[str, Case], *often: str) -> list[Any]:
    return [
        pytest.param(case, id=name, marks=() if name in often else pytest.mark.slow) for name, case in found.items()
    ]


@pytest.mark.parametrize("case", cases(ONE_RANK, "plain", "state in DRAM", "parameters in DRAM", "all in DRAM"))
def test_one_rank_takes_what_was_predicted(tmp_path, case):
    check(*train(case, str(tmp_path), case.page_bytes))


@pytest.mark.parametrize("case", cases(TWO_RANKS, "ZeRO-3"))
def test_two_ranks_take_what_was_predicted(tmp_path, two, case):
    found = two.run(train, case, str(tmp_path), 4 * MIB)
    check(found[0][0], Bytes(*(max(sizes) for sizes in zip(*(measured for _, measured in found), strict=True))))


def test_what_a_disk_gives_back_late_is_within_what_was_predicted(tmp_path):
    # When a read lands decides how much of it is there at once, and that is the disk's affair.
    estimate, measured = train(Case({**DISK_STATE, **DISK_PARAMETERS, **DISK_SAVED}), str(tmp_path), 4 * MIB)
    assert measured.device <= 1.02 * estimate.device
    assert measured.pinned <= 1.02 * estimate.pinned


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state in DRAM", "state on a disk", "state, release", "parameters and state in DRAM"])
def test_pages_of_their_usual_size_are_counted(tmp_path, name):
    # How full the fullest page is depends on the parameters that share it.
    check(*train(ONE_RANK[name], str(tmp_path), tiers.PAGE_BYTES), slack=tiers.PAGE_BYTES // 4)
