"""Does the store reach the disk's own rate, and what would page-cache reads of a mapped file reach?

Requests of one size on as many threads, from and to the same buffers and blocks of the disk: once through `Store`, once
by a raw loop of preadv and pwritev on the store's own file. Reads, writes, and as many of one as of the other at once;
the ways take turns in one process, and the figure is the ratio of their rates, turn by turn. What is mapped is read by
copying it into the same buffers, on as many threads, with the file's pages out of the cache before and asked for in
order.

    python benchmarks/store.py --folder /scratch --out benchmarks/results/store_cpu_DATE.md
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.store import Extent, Store, Transfer
from lightning_largescale.tiers import PAGE_BUFFERS, PAGE_BYTES, REQUEST_BYTES, REQUESTS

MIXES = {"read": ("read",), "write": ("write",), "read and write": ("read", "write")}


class Bench:
    """A store, the descriptor of its file, and buffers for both."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.pages = nbytes // PAGE_BYTES
        self.store = Store(folder)
        self.extents = [self.store.reserve(f"page {i}", PAGE_BYTES) for i in range(self.pages)]
        self.buffers = [Memory(PAGE_BYTES) for _ in range(PAGE_BUFFERS)]
        for buffer in self.buffers:
            # No zeros: some file systems would store none of them.
            buffer.tensor(torch.int64, (PAGE_BYTES // 8,)).random_()
        # Two files lie elsewhere on the disk, and have differed by more than the ways of writing to them do.
        self.raw = self.store.descriptor

    def through_store(self, mix: tuple[str, ...]) -> float:
        """Seconds of moving every page once, as many under way as there are buffers."""
        began = time.perf_counter()
        under_way: deque[Transfer] = deque()
        for page, extent in enumerate(self.extents):
            if len(under_way) == PAGE_BUFFERS:
                under_way.popleft().wait()
            under_way.append(self._begin(mix[page % len(mix)], extent, page))
        for transfer in under_way:
            transfer.wait()
        return time.perf_counter() - began

    def _begin(self, way: str, extent: Extent, page: int) -> Transfer:
        view = self.buffers[page % PAGE_BUFFERS].view()
        return self.store.read(extent, view) if way == "read" else self.store.write(extent, view)

    def by_hand(self, mix: tuple[str, ...]) -> float:
        """The same, each thread taking the next request until there is none."""
        views = [buffer.view() for buffer in self.buffers]

        def move(offset: int) -> None:
            page, within = divmod(offset, PAGE_BYTES)
            part = views[page % PAGE_BUFFERS][within : within + REQUEST_BYTES]
            call = os.preadv if mix[page % len(mix)] == "read" else os.pwritev
            assert call(self.raw, [part], offset) == REQUEST_BYTES

        return self._on_threads(move)

    def mapped(self, _: tuple[str, ...]) -> float:
        """The same bytes copied out of a mapping of the file, which is not in the page cache when it begins."""
        os.posix_fadvise(self.raw, 0, 0, os.POSIX_FADV_DONTNEED)
        views = [torch.frombuffer(buffer.view(), dtype=torch.uint8) for buffer in self.buffers]
        # A tensor wants memory that can be written to; what is never written is the file's own page all the same.
        file = mmap.mmap(self.raw, self.pages * PAGE_BYTES, access=mmap.ACCESS_COPY)
        file.madvise(mmap.MADV_SEQUENTIAL)
        source = torch.frombuffer(file, dtype=torch.uint8)

        def move(offset: int) -> None:
            page, within = divmod(offset, PAGE_BYTES)
            part = views[page % PAGE_BUFFERS][within : within + REQUEST_BYTES]
            part.copy_(source[offset : offset + REQUEST_BYTES])

        return self._on_threads(move)

    def _on_threads(self, move: Callable[[int], None]) -> float:
        offsets = iter(range(0, self.pages * PAGE_BYTES, REQUEST_BYTES))
        lock = threading.Lock()

        def run() -> None:
            torch.set_num_threads(1)
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                move(offset)

        threads = [threading.Thread(target=run) for _ in range(REQUESTS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.folder, int(options.gib * 2**30))
    table = [
        "| what | store GB/s | raw GB/s | store / raw | least | most |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    nbytes = bench.pages * PAGE_BYTES
    for mix in MIXES.values():
        bench.through_store(mix)
        bench.by_hand(mix)
    for name, mix in MIXES.items():
        turns = []
        for turn in range(options.rounds):
            ways = {"store": bench.through_store, "raw": bench.by_hand}
            # Who is first changes, so that neither profits from what the other leaves.
            order = list(ways) if turn % 2 == 0 else list(reversed(ways))
            turns.append({way: nbytes / ways[way](mix) for way in order})
        table.append(_row(name, turns, "raw"))
    turns = [{"store": nbytes / bench.through_store(("read",)), "mapped": nbytes / bench.mapped(())} for _ in range(5)]
    table.append(_row("read, against a mapped file in place of raw", turns, "mapped"))
    bench.store.close()
    text = "\n".join(table) + "\n"
    print(text)
    if options.out:
        options.out.write_text(f"# The store against the disk's own rate\n\n{text}")


def _row(name: str, turns: list[dict[str, float]], other: str) -> str:
    ratios = [turn["store"] / turn[other] for turn in turns]
    rates = [median(turn[way] for turn in turns) / 1e9 for way in ("store", other)]
    return (
        f"| {name} | {rates[0]:.2f} | {rates[1]:.2f} | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"
    )


if __name__ == "__main__":
    main()
