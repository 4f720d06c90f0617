"""What does it cost to keep activations on a disk, and what does it save?

One process, a GPT. A plain step, a step whose blocks' activations leave, and the same bytes written and read by the
store alone take turns; the figure is the step's time over the longer of the plain step's and the transfer's, which is
what perfect overlap would take. With `--limit`, the disk is slowed down to so many bytes a second. Peaks are of steps
in processes of their own.

    python benchmarks/activations.py --folder /scratch --out benchmarks/results/activations_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import families
import torch
import torch.nn.functional as F
from pairs import arguments, row, say
from torch import nn

from lightning_largescale.hardware.usage import peak_bytes, release_free_memory, start_peak
from lightning_largescale.offload.activations import offload_activations
from lightning_largescale.offload.direct import DirectFile
from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.store import Store
from lightning_largescale.parallel.heap import map_from
from lightning_largescale.plan import Plan
from lightning_largescale.tiers import REQUEST_BYTES
from lightning_largescale.units import format_bytes, parse_bytes

CPU, NVME = torch.device("cpu"), Plan(offload_activations="nvme")


def limited(rate: float) -> type[DirectFile]:
    """Files that read and write no more than `rate` bytes a second, together."""
    lock, due = threading.Lock(), [0.0]

    def pause(nbytes: int) -> int:
        with lock:
            due[0] = max(due[0], time.perf_counter()) + nbytes / rate
            left = due[0] - time.perf_counter()
        time.sleep(max(0.0, left))
        return nbytes

    class Limited(DirectFile):
        def read_at(self, memory: memoryview, offset: int) -> int:
            return pause(super().read_at(memory, offset))

        def write_at(self, memory: memoryview, offset: int) -> int:
            return pause(super().write_at(memory, offset))

    return Limited


def step(model: nn.Module, tokens: torch.Tensor) -> float:
    """Seconds of a forward and a backward."""
    began = time.perf_counter()
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    seconds = time.perf_counter() - began
    model.zero_grad()
    return seconds


def raw(store: Store, written: int, read: int) -> float:
    """Seconds that the store needs for so many bytes, in the order of a step."""
    memory = Memory(8 * REQUEST_BYTES)
    extent = store.reserve("raw", memory.nbytes)
    began = time.perf_counter()
    for transfer, nbytes in ((store.write, written), (store.read, read)):
        for start in range(0, nbytes, memory.nbytes):
            transfer(extent, memory.view(0, min(memory.nbytes, nbytes - start) // 4096 * 4096)).wait()
    return time.perf_counter() - began


def peak(options: argparse.Namespace) -> None:
    """Print what a step holds at most, above what was held before it."""
    # Else what is freed stays with the process as holes, under either.
    map_from(0)
    model, tokens = families.GPT(options.width, options.layers), data(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.peak == "nvme":
            offload_activations(model, NVME, Store(folder), CPU)
        step(model, tokens)
        release_free_memory()
        start_peak("cpu")
        before = peak_bytes("cpu")
        step(model, tokens)
        print("PEAK", peak_bytes("cpu") - before)


def data(options: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(families.VOCABULARY, (options.batch, options.length))


def main() -> None:
    parser = arguments(__doc__, pairs=8)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk")
    parser.add_argument("--limit", default=None, help="bytes a second of the disk, as 250MB")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peak", choices=("plain", "nvme"), help="for the processes that this script starts")
    options = parser.parse_args()
    if options.peak:
        return peak(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Store(Path(folder), file=limited(parse_bytes(options.limit)) if options.limit else DirectFile)
        return measure(options, store)


def measure(options: argparse.Namespace, store: Store) -> None:
    tokens = data(options)
    plain = families.GPT(options.width, options.layers)
    ours = copy.deepcopy(plain)
    offload_activations(ours, NVME, store, CPU)
    found: dict[str, list[float]] = {"plain": [], "nvme": [], "raw": [], "written": [], "read": []}
    for pair in range(options.pairs + 1):
        counts = store.written_bytes, store.read_bytes
        seconds = {"nvme": step(ours, tokens)}
        moved = store.written_bytes - counts[0], store.read_bytes - counts[1]
        seconds["plain"], seconds["raw"] = step(plain, tokens), raw(store, *moved)
        print(pair, seconds, moved, flush=True)
        if pair:
            # The first sets space on the disk aside.
            for name, value in {**seconds, "written": moved[0], "read": moved[1]}.items():
                found[name].append(value)
    ratios = [
        took / max(computed, moved)
        for took, computed, moved in zip(found["nvme"], found["plain"], found["raw"], strict=True)
    ]
    peaks = {way: peak_apart(way) for way in ("plain", "nvme")}
    moved = [format_bytes(median(found[way])) for way in ("written", "read")]
    say(
        options,
        "Activations on a disk against a plain step",
        f"{options.layers}-layer GPT, width {options.width}, batch {options.batch} x {options.length}, one process,"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}; the disk"
        f" {f'slowed to {options.limit} a second' if options.limit else 'as it is'}; {options.pairs} turns.",
        [
            row("step time / longer of plain step and transfer", ratios),
            row("step time / plain", [a / b for a, b in zip(found["nvme"], found["plain"], strict=True)]),
            row("transfer alone / plain step", [a / b for a, b in zip(found["raw"], found["plain"], strict=True)]),
            row("plain step, s", found["plain"]),
        ],
        f"Of a step {moved[0]} were written and {moved[1]} read. A step held {format_bytes(peaks['plain'])} above what"
        f" was held before it, and {format_bytes(peaks['nvme'])} with activations on the disk, allocations mapped.",
    )


def peak_apart(way: str) -> int:
    done = subprocess.run([sys.executable, *sys.argv, "--peak", way], capture_output=True, text=True, check=True)
    return int(done.stdout.split("PEAK ")[1])


if __name__ == "__main__":
    main()
