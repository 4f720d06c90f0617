"""How near does a step on paged optimizer state come to what the disk gives for the same reads and writes?

    python benchmarks/optimizer_paging.py FOLDER [--millions 192] [--rounds 9]

Steps of AdamW on state in a file of FOLDER, and a raw loop that reads and writes the same bytes of the same file, in
the same requests and through as many buffers, without a step; one after the other in one process, medians. The step's
own arithmetic, state resident, is the third row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.store import Store, Transfer
from lightning_largescale.tiers import PAGE_BUFFERS

_AHEAD = 3


def raw(paged: PagedOptimizer, memories: Sequence[Memory]) -> None:
    """The bytes of all pages read and written, as far ahead as a step does."""
    free, coming, leaving = [*memories], deque(), deque()
    ahead = iter(paged.paged.pages)

    def begin() -> None:
        page = next(ahead, None)
        if page is None:
            return
        if free:
            memory = free.pop()
        else:
            memory, written = leaving.popleft()
            written.wait()
        coming.append((page, memory, paged.paged.read(page, memory)))

    for _ in range(_AHEAD):
        begin()
    while coming:
        page, memory, read = coming.popleft()
        read.wait()
        leaving.append((memory, paged.paged.write(page, memory)))
        begin()
    Transfer.of([written for _, written in leaving]).wait()


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def parameters_of(millions: int) -> list[nn.Parameter]:
    """Matrices of four million elements, with gradients."""
    made = [nn.Parameter(torch.zeros(4096, 1024)) for _ in range(millions // 4)]
    for parameter in made:
        parameter.grad = torch.full_like(parameter, 1e-3)
    return made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--millions", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    parameters = parameters_of(options.millions)
    optimizer, resident = (torch.optim.AdamW(parameters, fused=True) for _ in range(2))
    store, buffers = Store(options.folder), PageBuffers()
    paged = PagedOptimizer(optimizer, store=store, buffers=buffers)
    memories = [Memory(max(page.state_bytes for page in paged.paged.pages)) for _ in range(PAGE_BUFFERS)]
    runs: dict[str, Callable[[], object]] = {
        "paged step": optimizer.step,
        "raw reads and writes": lambda: raw(paged, memories),
        "resident step": resident.step,
    }
    for run in runs.values():
        run()
    found = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            found[name].append(seconds_of(run))
    store.close()
    numel = sum(parameter.numel() for parameter in parameters)
    best = statistics.median(found["raw reads and writes"])
    print("| | s | M parameters/s | GB/s | raw / this |")
    print("|---|--:|--:|--:|--:|")
    for name, taken in found.items():
        seconds = statistics.median(taken)
        moved = "-" if name == "resident step" else f"{16 * numel / 1e9 / seconds:.2f}"
        span = f"{min(taken):.3f}-{max(taken):.3f}"
        print(f"| {name} | {seconds:.3f} ({span}) | {numel / 1e6 / seconds:.0f} | {moved} | {best / seconds:.3f} |")


if __name__ == "__main__":
    main()
