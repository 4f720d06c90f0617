"""How long do a 70B and a 405B Llama take through setup, for 1,024 ranks that are not there?

One process and torch's fake process group: the model on the meta device, its step traced, what 8 ranks divide of its
blocks found, their forwards replaced and their parameters divided by tensor parallelism and among 128 shards (FSDP2).

    python benchmarks/large_models.py --out benchmarks/results/large-models_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_largescale import Plan, Workload
from lightning_largescale.parallel.mesh import build_mesh, tensor_mesh
from lightning_largescale.parallel.shard import shard_groups
from lightning_largescale.parallel.tensor import compute_on_parts
from lightning_largescale.techniques.tensor_parallel.price import division_words
from lightning_largescale.workload import find_blocks

SIZES = {
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    },
}


def setup(size: str) -> dict[str, float | str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1024)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, use_cache=False, **SIZES[size]))
    plan = Plan(tp=8, dp_shard=128)
    began = time.perf_counter()
    tokens = torch.zeros(1, 4096, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}
    plain = Workload.trace(model, batch, step="forward", precisions=("32-true",))
    traced = time.perf_counter()
    workload = Workload.trace(model, batch, step="forward", precisions=("32-true",), tp_sizes=(8,))
    found = time.perf_counter()
    mesh, blocks = build_mesh(plan, "cpu"), find_blocks(model)
    parts = {name: divided.parts for name, divided in workload.divisions[8].items()}
    for name in blocks:
        compute_on_parts(blocks[name], parts[name], tensor_mesh(mesh))
    shard_groups(model, plan, mesh, torch.device("meta"), parts=parts)
    done = time.perf_counter()
    return {
        "billions": plain.numel / 1e9,
        "trace": traced - began,
        "found": found - traced - (traced - began),
        "divide": done - found,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "words": division_words(workload, 8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=SIZES, help="one model, for the processes that this script starts")
    options = parser.parse_args()
    if options.one:
        print("FOUND " + json.dumps(setup(options.one)), flush=True)
        return
    lines = [
        "# Llamas through setup for 1,024 ranks (tp=8, dp_shard=128)\n",
        f"One CPU process, torch {torch.__version__}, meta device, fake process group; sequences of 4096.\n",
        "| model | parameters | trace s | find what is divided s | divide s | most memory GiB | divided |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for size in SIZES:
        done = subprocess.run([sys.executable, __file__, "--one", size], capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        if not found:
            sys.exit(f"{size} did not finish:\n{done.stderr[-3000:]}")
        row = json.loads(found[0].removeprefix("FOUND "))
        lines.append(
            f"| {size} | {row['billions']:.1f}B | {row['trace']:.1f} | {max(0, row['found']):.1f} | {row['divide']:.1f}"
            f" | {row['gib']:.2f} | {row['words']} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
