"""Does a model whose state is several times larger than memory train, at which rate, and within its budget?

    python benchmarks/larger_than_memory.py [--width 2048] [--layers 24] [--limit 6GiB] [--steps 4]
        [--plan JSON | --plain]

A GPT-2 of that width and depth, in fp32 with AdamW, trains on bytes of Python's standard library in a process of its
own, which the kernel ends if it takes more than the limit (a memory cgroup; needs root). By default under
`largescale_auto` with the limit, less what the kernel keeps for a process, as its budget. `--plain` shows that the
limit ends the plain run. Prints a row of a table a step, and the panel.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

import lightning_largescale as ls
from lightning_largescale.hardware.usage import held_bytes, peak_bytes, start_peak
from lightning_largescale.units import parse_bytes

CONTEXT, VOCABULARY = 256, 50257
# What the kernel counts to a process beside its resident memory: page tables, and pages of files on their way.
KERNEL_BYTES = 256 * 2**20


class GPT(LightningModule):
    """GPT-2 of a width and depth, without dropout, built where Lightning asks for it."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.layers, self.model = width, layers, None

    def configure_model(self):
        if self.model is None:
            fields = {"n_embd": self.width, "n_layer": self.layers, "n_head": 16, "vocab_size": VOCABULARY}
            none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
            config = transformers.GPT2Config(**fields, **none, use_cache=False, loss_type="ForCausalLM")
            self.model = transformers.GPT2LMHeadModel(config)

    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-5, fused=True)


class Rows(Callback):
    """Prints what each step took and moved."""

    def on_fit_start(self, trainer, module):
        numel = sum(parameter.numel() for parameter in module.parameters())
        print(f"{numel / 1e9:.2f} billion parameters; peak while they were made {self.peak()}")
        print("| | loss | s | read GB | written GB | GB/s | peak |")
        print("|---|--:|--:|--:|--:|--:|--:|", flush=True)

    def on_train_batch_start(self, trainer, module, batch, index):
        self.began, self.moved = time.perf_counter(), self.bytes_of(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        seconds = time.perf_counter() - self.began
        read, written = ((now - then) / 1e9 for now, then in zip(self.bytes_of(trainer), self.moved, strict=True))
        print(
            f"| step {index} | {outputs['loss'].item():.3f} | {seconds:.1f} | {read:.1f} | {written:.1f}"
            f" | {(read + written) / seconds:.2f} | {self.peak()} |",
            flush=True,
        )

    def bytes_of(self, trainer):
        store = trainer.strategy._run.store
        return (0, 0) if store is None else (store.read_bytes, store.written_bytes)

    def peak(self):
        return f"{(peak_bytes('cpu') or 0) / 2**30:.2f} GiB"


def train(options: argparse.Namespace) -> None:
    """In the process that is limited."""
    seed_everything(0, verbose=False)
    files = sorted(glob.glob(sysconfig.get_path("stdlib") + "/*.py"))[:30]
    text = b"".join(Path(file).read_bytes() for file in files)
    samples = torch.tensor([*text[: CONTEXT * (len(text) // CONTEXT)]]).view(-1, CONTEXT)[:200]
    start_peak("cpu")
    print(f"before: {held_bytes('cpu') / 2**30:.2f} GiB")
    strategy: Any = ls.LargeScaleStrategy(ls.Plan(**json.loads(options.plan or "{}")))
    if not options.plan and not options.plain:
        budget = parse_bytes(options.limit, name="limit") - KERNEL_BYTES
        strategy = ls.LargeScaleAutoStrategy(memory_budget=budget, plan_out=options.plan_out)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Rows()],
    )
    trainer.fit(GPT(options.width, options.layers), DataLoader(samples, batch_size=1))


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """The file into which a process writes its number to be limited, until all in it are gone."""
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    group = Path(tempfile.mkdtemp(prefix="largescale-", dir=old if old.is_dir() else root))
    (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit_bytes))
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def main() -> int:
    """Run this script again, limited."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--limit", default="6GiB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plan")
    parser.add_argument("--plan-out", dest="plan_out")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        Path(options.inside).write_text(str(os.getpid()))
        train(options)
        return 0
    with limited(parse_bytes(options.limit, name="limit")) as procs:
        code = subprocess.run([sys.executable, *sys.argv, "--inside", str(procs)], check=False).returncode
    print(f"ended with {code}" + (": killed by the kernel, for its memory" if code == -9 else ""))
    return code


if __name__ == "__main__":
    sys.exit(main())
