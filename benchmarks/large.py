"""What memory do building, loading, saving and resuming take beside a rank's own part, and what do they read?

A LLaMA of 0.37 billion parameters is built, trained for a step, saved and resumed; one of 2.06 billion is loaded from
files of bfloat16, of safetensors and of torch; on two ranks, sharded and tensor-parallel. Figures are of the rank
that took more, above what its process had before, in MiB.

    python benchmarks/large.py --out benchmarks/results/large_2xcpu_DATE.md
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from large_run import run, write_weights

PLANS: dict[str, dict[str, Any]] = {"dp_shard=2": {"dp_shard": 2}, "tp=2": {"tp": 2}}
HEADER = """| what | plan | model | rank's part | peak | beside the part | bytes read / part |
|---|---|--:|--:|--:|--:|--:|
"""


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def row(what: str, plan: str, found: list[dict[str, int]], *, key: str, part: str = "shards") -> str:
    most = max(found, key=lambda one: one[key])
    read = most[f"{key} read"] / most["shards"]
    told = f"{read:.3f}" if read > 0.01 else ""
    beside = most[key] - (most[part] if part else 0)
    own = most[part] if part else most["shards"] + most["states"]
    return f"| {what} | {plan} | {mib(most['all'])} | {mib(own)} | {mib(most[key])} | {mib(beside)} | {told} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    table = HEADER
    folder = Path(mkdtemp())
    try:
        for name, plan in PLANS.items():
            table += row("build", name, run("build", plan, folder), key="setup")
        for name, plan in PLANS.items():
            table += row("save", name, run("save", plan, folder), key="save", part="")
            found = run("resume", plan, folder)
            table += row("resume: model", name, found, key="setup")
            table += row("resume: optimizer", name, found, key="load optimizer", part="states")
            shutil.rmtree(folder / "a.ckpt")
        for kind in ("safetensors", "torch"):
            write_weights(folder, kind)
            for name, plan in PLANS.items():
                found = run("load", {**plan, "precision": "bf16-true"}, folder)
                table += row(f"load, {kind}", name, found, key="setup")
            for path in folder.iterdir():
                path.unlink()
    finally:
        shutil.rmtree(folder)
    text = f"""# Building, loading, saving and resuming, on two ranks

torch {torch.__version__}; two processes of one thread; MiB, of the rank that took more, above what it had before.

{table}"""
    print(text)
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
