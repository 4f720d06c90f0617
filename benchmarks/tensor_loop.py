"""What does a tensor parallel plan under the Trainer cost against a hand-written parallelize_module?

Two processes. A loop in plain torch (parallelize_module with a plan written for the model, embedding and head divided
by their vocabulary, loss_parallel, AdamW) and a Trainer with `LargeScaleStrategy(Plan(tp=2))`, told nothing of the
model, take turns in one run, each launched anew with the same weights and batches; the figure is the ratio of the
median step times, pair by pair. Collectives of one step are counted.

    python benchmarks/tensor_loop.py --out benchmarks/results/tensor-loop_2xcpu_DATE.md
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import families
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from pairs import compare_apart, fit, row, say
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_largescale as ls

WIDTH, LAYERS, BATCH, LENGTH = 512, 12, 4, 128


class Block(nn.Module):
    """As hand-written plans need it: q, k and v apart, and no number of heads in a view."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        y_BTD = self.norm1(x_BTD)
        q, k, v = (one(y_BTD).view(B, T, -1, 64).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BHTE.transpose(1, 2).reshape(B, T, -1))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


def gpt() -> LightningModule:
    module = families.gpt(WIDTH, LAYERS)
    module.model.blocks = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))
    return module


class Collectives(TorchDispatchMode):
    """Counts collectives as torch's CommDebugMode does, which hooks modules and so changes what runs in them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with local tensors comes by as well
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Counted(Callback):
    """Counts the collectives of the last step, forward and backward and the optimizer's."""

    def __init__(self, last: int) -> None:
        self.last, self.mode = last, Collectives()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if index == self.last:
            self.mode.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, result: Any, batch: Any, index: int
    ) -> None:
        if index == self.last:
            self.mode.__exit__(None, None, None)


def by_hand(steps: int) -> list[Any]:
    module = gpt()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("out", "down")}
    plan |= {"token": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(use_local_output=False)}
    parallelize_module(module.model, mesh, plan)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=False)
    seconds, counted = [], Collectives()
    for index, batch in enumerate(families.batches("gpt", BATCH, steps + 1, length=LENGTH)):
        began = time.perf_counter()
        with counted if index == steps else nullcontext():
            with loss_parallel():
                # In the order of Lightning's closure: gradients are cleared between forward and backward.
                loss = module.training_step(batch, index)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - began)
    return [median(seconds[2:-1]), counted.count]


def by_plan(steps: int) -> list[Any]:
    counted, strategy = Counted(steps), ls.LargeScaleStrategy(ls.Plan(tp=2))
    batches = families.batches("gpt", BATCH, steps + 1, length=LENGTH)
    seconds = fit(gpt(), strategy, batches, devices=2, callback=counted)
    return [median(seconds[2:-1]), counted.mode.count]


def main() -> None:
    options, ratios, found = compare_apart(__doc__, {"hand": by_hand, "plan": by_plan}, processes=2)
    counts = {name: count for name, (_, count) in found[-1].items()}
    say(
        options,
        "A tensor parallel plan under the Trainer against a hand-written parallelize_module",
        f"{LAYERS}-layer GPT, width {WIDTH}, batch {BATCH} x {LENGTH}, tp=2: 2 processes of 1 thread, gloo,"
        f" torch {torch.__version__}; {options.pairs} interleaved pairs of {options.steps} steps, each loop in"
        " processes of its own, the first two steps left out.",
        [row("step time, plan / hand-written", ratios)],
        f"Collectives in a step: {counts['plan']} of the plan, {counts['hand']} written by hand.",
    )


if __name__ == "__main__":
    main()
