"""Builds, loads, saves and resumes a model of a size that memory shows, on two ranks; what `large.py` and tests start.

    python benchmarks/large_run.py WHAT PLAN_JSON FOLDER

WHAT is "build", "load" (weights in FOLDER), "save" (a checkpoint into FOLDER) or "resume" (from there). Each rank
prints a line of JSON: the bytes of its shards, its largest blocks, and what memory it took above what it had before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import lightning_largescale as ls
from lightning_largescale.hardware.usage import held_bytes, peak_bytes, release_free_memory, start_peak
from lightning_largescale.workload.blocks import find_blocks

# Parameters: 0.36 and 2.06 billion.
SIZES = {
    "small": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "vocab_size": 16000},
    "large": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 24, "vocab_size": 32000},
}


def build(size: str) -> nn.Module:
    fields = {"num_attention_heads": 16, "tie_word_embeddings": False, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES[size], **fields))


def write_weights(folder: Path, kind: str) -> None:
    """Two billion parameters of bfloat16: three files of safetensors with an index, or one of torch."""
    with torch.device("meta"):
        empty = build("large").state_dict()
    values = {name: (torch.arange(one.numel()) % 251).to(torch.bfloat16).view(one.shape) for name, one in empty.items()}
    if kind == "torch":
        torch.save({"state_dict": values}, folder / "a.ckpt")
        return
    names = list(values)
    files = {f"model-{number}.safetensors": names[number::3] for number in range(3)}
    for file, own in files.items():
        save_file({name: values[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(what: str, plan: dict[str, Any], folder: Path) -> list[dict[str, int]]:
    """What each of two ranks has measured, in processes of their own."""
    command = [sys.executable, __file__, what, json.dumps(plan), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return [json.loads(part) for part in done.stdout.replace("DONE ", "\nDONE ").split("\nDONE ")[1:]]


class Model(LightningModule):
    """A LLaMA that is built where Lightning asks for it."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.size, self.model = size, None

    def configure_model(self):
        if self.model is None:
            self.model = build(self.size)

    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(64, 4, dtype=torch.int64), batch_size=1)


class Measured(ls.LargeScaleStrategy):
    """Notes what memory setup, saving and loading take."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.took: dict[str, int] = {}

    def measured(self, name, function, *args, **options):
        release_free_memory()
        before, read = held_bytes("cpu"), bytes_read()
        start_peak("cpu")
        result = function(*args, **options)
        self.took[name] = peak_bytes("cpu") - before
        self.took[f"{name} read"] = bytes_read() - read
        return result

    def setup(self, trainer):
        # What it looks at the step for is no part of it.
        if self.plan.tp > 1:
            self._divided(trainer, self.plan)
        self.measured("setup", super().setup, trainer)

    def save_checkpoint(self, *args, **options):
        self.measured("save", super().save_checkpoint, *args, **options)

    def load_model_state_dict(self, *args, **options):
        self.measured("load model", super().load_model_state_dict, *args, **options)

    def load_optimizer_state_dict(self, *args):
        self.measured("load optimizer", super().load_optimizer_state_dict, *args)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def forget_files(folder: Path) -> None:
    """Let the system's cache of files forget those of `folder`."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_bytes(module: nn.Module) -> int:
    tensors = [one.to_local() if isinstance(one, DTensor) else one for one in module.parameters()]
    return sum(one.nbytes for one in tensors)


def main() -> None:
    what, plan, folder = sys.argv[1], ls.Plan.of(json.loads(sys.argv[2])), Path(sys.argv[3])
    torch.manual_seed(0)
    size = "large" if what == "load" else "small"
    weights = {"model": next(iter(folder.glob("*.ckpt")), folder)} if what == "load" else None
    if weights is not None:
        forget_files(folder)
    strategy = Measured(plan, weights=weights)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=plan.world_size,
        max_steps=1 if what == "save" else 2 if what == "resume" else 0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Model(size)
    trainer.fit(module, ckpt_path=folder / "a.ckpt" if what == "resume" else None)
    if what == "save":
        trainer.save_checkpoint(folder / "a.ckpt")
    with torch.device("meta"):
        whole = build(size)
    parameter = next(module.parameters())
    blocks = [sum(one.numel() for one in block.parameters()) for block in find_blocks(whole).values()]
    embedding = whole.get_input_embeddings().weight.numel()
    found = {
        "rank": trainer.global_rank,
        "shards": own_bytes(module),
        "states": sum(
            one.to_local().nbytes
            for state in (trainer.optimizers[0].state.values() if trainer.optimizers else ())
            for one in state.values()
            if isinstance(one, DTensor)
        ),
        "all": sum(one.numel() for one in whole.parameters()) * parameter.element_size(),
        "two blocks": sum(sorted([*blocks, embedding, embedding])[-2:]) * parameter.element_size(),
        **strategy.took,
    }
    print("DONE " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
