"""What a CUDA device alone can answer: are memory and seconds predicted, what does the Trainer cost, does offload reach
the rate of the link, does a model of three times the device's memory train?

    python benchmarks/on_cuda.py --out benchmarks/results/cuda_DATE [--small] [--minutes 6]

Each part is a process of its own and ends with its share of the minutes: what was found until then is told. Writes
DATE.json with all figures and DATE.md with the tables. `--small` takes models of a few megabytes, to try the script.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import families
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from memory import Pinned
from pairs import StepTimes
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lightning_largescale as ls
from lightning_largescale.hardware.usage import peak_bytes
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.planner.runtime import step_time

GIB = 2**30
# FLOP/s of dense bfloat16 products, as NVIDIA's data sheets have them (H100 SXM, H200 SXM, A100).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# The share of the minutes that each part may take.
SHARES = {"plans": 0.55, "utilisation": 0.15, "link": 0.1, "larger": 0.2}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model by its family's name, width, layers, and the batch that it is trained on."""

    family: str
    width: int
    layers: int
    batch: int
    length: int

    def shrunk(self) -> Size:
        """The same, of a few megabytes."""
        return dataclasses.replace(self, width=128, layers=4, batch=2, length=64)


GPT, LLAMA = Size("gpt", 2048, 20, 4, 1024), Size("llama-plain", 2048, 22, 4, 1024)
# Of 3 and of 8 billion parameters.
LARGE_GPT, LARGE_LLAMA = Size("gpt", 3072, 26, 2, 1024), Size("llama-plain", 4096, 36, 1, 1024)
FULL = {"activation_checkpointing": "full"}
CHEAP = FULL | {"checkpointed_operations": "cheap"}
MIXED, HALF, RELEASE = {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"release_gradients": True}
STATE, PARAMETERS, SAVED = ({f"offload_{name}": "cpu"} for name in ("optimizer", "parameters", "activations"))
DISK_STATE, DISK_PARAMETERS = ({f"offload_{name}": "nvme"} for name in ("optimizer", "parameters"))
HOST = {"cpu_optimizer_step": True}
# By what they tell, the most first: what comes after the last minute is left out.
PLANS: list[tuple[Size, dict[str, Any]]] = [
    (GPT, MIXED),
    (LLAMA, MIXED),
    (GPT, MIXED | FULL),
    (LLAMA, MIXED | CHEAP),
    (GPT, MIXED | STATE),
    (LLAMA, MIXED | STATE | HOST),
    (GPT, MIXED | PARAMETERS),
    (LLAMA, MIXED | SAVED),
    (GPT, {}),
    (LLAMA, {}),
    (GPT, MIXED | RELEASE),
    (LLAMA, MIXED | RELEASE | FULL),
    (GPT, HALF),
    (LLAMA, HALF | FULL),
    (GPT, {"precision": "16-mixed"}),
    (LLAMA, MIXED | PARAMETERS | STATE),
    (LARGE_GPT, MIXED | FULL),
    (LARGE_LLAMA, HALF | FULL),
    (LARGE_LLAMA, HALF | FULL | STATE),
    (GPT, MIXED | DISK_STATE),
    (LLAMA, MIXED | DISK_PARAMETERS),
    (GPT, MIXED | SAVED | FULL),
    (LARGE_GPT, MIXED | FULL | STATE | HOST),
]


class Built(LightningModule):
    """A model that is made where Lightning asks for it, and trained on random tokens."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, self.inner = size, None

    def configure_model(self) -> None:
        if self.inner is None:
            made = {"gpt": families.gpt, "llama-plain": families.llama_plain}[self.size.family]
            self.inner = made(self.size.width, self.size.layers)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.inner.training_step(batch, index)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def fit(size: Size, strategy: Any, steps: int, *callbacks: Any, precision: Any = None) -> Trainer:
    """Train a model of this size for some steps."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cuda",
        devices=1,
        precision=precision,
        max_steps=steps,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Built(size), families.batches(size.family, size.batch, steps, length=size.length))
    return trainer


class Synchronized(StepTimes):
    """Seconds of each step, until the device is done with it."""

    def on_train_batch_start(self, *args: Any) -> None:
        torch.cuda.synchronize()
        super().on_train_batch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.synchronize()
        super().on_train_batch_end(*args)


def plans(small: bool) -> Iterator[dict[str, Any]]:
    """Predicted and measured memory and seconds of plans."""
    for full_size, fields in PLANS:
        size = full_size.shrunk() if small else full_size
        plan = ls.Plan(**fields)
        row: dict[str, Any] = {"model": dataclasses.asdict(size), "plan": plan.describe()}
        strategy, times = Pinned(plan), Synchronized()
        try:
            fit(size, strategy, 4, times, precision=plan.precision)
        except (RuntimeError, ls.PlanError) as error:
            # Out of memory among them: the next plan is told all the same.
            yield row | {"error": str(error)[:300]}
        else:
            report = strategy.report
            memory = peak_memory(report.workload, plan, report.hardware)
            seconds = step_time(report.workload, plan, report.hardware).step_seconds
            yield row | {
                "predicted_bytes": memory.measured_bytes,
                "measured_bytes": strategy.measured,
                "predicted_seconds": seconds,
                "measured_seconds": median(times.seconds[1:]),
            }
        del strategy
        gc.collect()
        torch.cuda.empty_cache()


def utilisation(small: bool) -> Iterator[dict[str, Any]]:
    """Of the device's peak what a hand-written FSDP2 loop and the Trainer reach, in turns."""
    size = GPT.shrunk() if small else dataclasses.replace(GPT, batch=8)
    steps, name = 6, torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    for turn in range(3):
        ways: list[tuple[str, Callable[[], float]]] = [
            ("hand-written", lambda: by_hand(size, steps)),
            ("plan", lambda: by_plan(size, steps)),
        ]
        found = {way: run() for way, run in ways[:: 1 - 2 * (turn % 2)]}
        flops = flops_of_step(size)
        reached = {} if peak is None else {f"{way} MFU": flops / seconds / peak for way, seconds in found.items()}
        yield {"seconds": found, "ratio": found["plan"] / found["hand-written"], **reached}


def flops_of_step(size: Size) -> float:
    """Of a step's products as its model has them, those of recomputation left out.

    Source: Chowdhery et al. 2022, "PaLM", appendix B (6 N + 12 L H Q T a token; attention counted whole).
    """
    with torch.device("meta"):
        inner = families.gpt(size.width, size.layers)
    multiplied = sum(one.numel() for one in inner.parameters()) - inner.model.token.weight.numel()
    tokens = size.batch * size.length
    return tokens * (6 * multiplied + 12 * size.layers * size.width * size.length)


def by_hand(size: Size, steps: int) -> float:
    """Median seconds of a step of a loop in plain torch."""
    seed_everything(0, verbose=False)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    module = families.gpt(size.width, size.layers).cuda()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in module.model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(module.model, mp_policy=policy)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    seconds = []
    for index, (tokens,) in enumerate(families.batches("gpt", size.batch, steps, length=size.length)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = module.training_step((tokens.cuda(),), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()
    del module, optimizer, loss, block
    gc.collect()
    torch.cuda.empty_cache()
    return median(seconds[2:])


def by_plan(size: Size, steps: int) -> float:
    """Median seconds of a step under the Trainer."""
    times = Synchronized()
    fit(size, ls.LargeScaleStrategy(ls.Plan(precision="bf16-mixed")), steps, times)
    gc.collect()
    torch.cuda.empty_cache()
    return median(times.seconds[2:])


def link(small: bool) -> Iterator[dict[str, Any]]:
    """The rate at which an optimizer's state comes from DRAM and goes back, against copies that do nothing else."""
    size = GPT.shrunk() if small else GPT
    rates = ls.Hardware.detect(accelerator="cuda", ranks_per_node=1).calibrate().rates
    both = [rates.host_to_device.bandwidth, rates.device_to_host.bandwidth]
    found = {}
    for way, fields in (("resident", {}), ("in DRAM", STATE)):
        times = Synchronized()
        fit(size, ls.LargeScaleStrategy(ls.Plan(precision="bf16-mixed", **fields)), 5, times)
        found[way] = median(times.seconds[2:])
        gc.collect()
        torch.cuda.empty_cache()
    with torch.device("meta"):
        moved = 8 * sum(one.numel() for one in families.gpt(size.width, size.layers).parameters())
    added = found["in DRAM"] - found["resident"]
    yield {"seconds": found, "link_bytes_per_second": both, "moved_bytes_each_way": moved, "added_seconds": added}


def larger(small: bool) -> Iterator[dict[str, Any]]:
    """A model whose parameters, gradients and state are three times what the device may have."""
    limit = (128 * 2**20 if small else 24 * GIB) + torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    size = Size("gpt", 512, 4, 1, 64) if small else Size("gpt", 4096, 23, 2, 1024)
    while 16 * parameters_of(size) < 3 * limit:
        size = dataclasses.replace(size, layers=size.layers + 1)
    strategy, times = ls.LargeScaleAutoStrategy(memory_budget=limit, allow=("bf16-mixed",)), Synchronized()
    fit(size, strategy, 3, times)
    yield {
        "limit_bytes": limit,
        "state_bytes": 16 * parameters_of(size),
        "plan": strategy.plan.describe(),
        "peak_bytes": peak_bytes("cuda"),
        "seconds": times.seconds,
    }


def parameters_of(size: Size) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in families.gpt(size.width, size.layers).parameters())


PARTS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    part.__name__: part for part in (plans, utilisation, link, larger)
}


def measured(part: str, seconds: float, small: bool) -> list[dict[str, Any]]:
    """What a part found in these seconds, in a process of its own."""
    command = [sys.executable, __file__, "--part", part, *(["--small"] if small else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        rows = [json.loads(line.removeprefix("FOUND ")) for line in process.stdout if line.startswith("FOUND ")]
        timer.cancel()
    if process.returncode > 0:
        rows.append({"error": f"{part} ended with {process.returncode}"})
    return rows


def machine() -> dict[str, Any]:
    """What was measured on."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.mem_get_info()[1],
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def compared(predicted: float, measured: float) -> str:
    """Both, and by how much the prediction is off."""
    return f"{predicted:.3f} | {measured:.3f} | {100 * (predicted / measured - 1):+.1f}%"


def tables(found: dict[str, Any]) -> str:
    """All figures as Markdown."""
    about, lines = found["machine"], []
    lines.append(f"# On {about['device']}, {about['date']}\n")
    lines.append(
        f"torch {about['torch']}, CUDA {about['cuda']}, driver {about['driver']}, Python {about['python']},"
        f" {about['memory_bytes'] / GIB:.0f} GiB.\n"
    )
    lines.append("## Memory and seconds of plans, predicted and measured\n")
    lines.append("| model | plan | GiB | measured | error | s a step | measured | error |")
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for row in found["plans"]:
        if "error" in row:
            lines.append(f"| | {row.get('plan', '')} | {row['error']} ||||||")
            continue
        size = row["model"]
        lines.append(
            f"| {size['family']} {size['width']} x {size['layers']} | {row['plan']}"
            f" | {compared(row['predicted_bytes'] / GIB, row['measured_bytes'] / GIB)}"
            f" | {compared(row['predicted_seconds'], row['measured_seconds'])} |"
        )
    for part, title in (
        ("utilisation", "A hand-written FSDP2 loop and a plan under the Trainer, in turns"),
        ("link", "State in DRAM, against the link"),
        ("larger", "A model of three times the memory"),
    ):
        lines.append(f"\n## {title}\n")
        lines += [f"- {name}: {value}" for row in found[part] for name, value in row.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write, without an ending")
    parser.add_argument("--small", action="store_true", help="models of a few megabytes")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all of it")
    parser.add_argument("--part", choices=tuple(PARTS), help="one part, for the processes that this script starts")
    options = parser.parse_args()
    if options.part:
        for row in PARTS[options.part](options.small):
            print("FOUND " + json.dumps(row), flush=True)
        return
    found: dict[str, Any] = {"machine": machine()}
    for part, share in SHARES.items():
        found[part] = measured(part, 60 * options.minutes * share, options.small)
        print(part, *found[part], sep="\n", flush=True)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
        options.out.with_suffix(".md").write_text(tables(found))


if __name__ == "__main__":
    main()
