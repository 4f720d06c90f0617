"""Workloads and hardware with round numbers, for tests that check arithmetic by hand."""

import dataclasses

from lightning_largescale.hardware import Disk, Hardware, Link, Rates
from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import _moments, peak_memory
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.workload import OptimizerNeeds, Parameter, Segment, Step, Workload

MIB = 2**20
# Bytes of `workload()`.
MODEL = 8 * MIB + 4 * 16 * MIB


def parameter(name, block, rows=1024, columns=1024, **changes):
    fields = {
        "name": name,
        "shape": (rows, columns),
        "dtype": "float32",
        "bytes": 4 * rows * columns,
        "trainable": True,
        "used": True,
        "block": block,
        "aliases": (),
        "embedding": False,
    }
    return Parameter(**{**fields, **changes})


def segment(block, *, saved, entry, peak, exit_, backward_peak, input_bytes=0, flops=10**9):
    return Segment(
        block=block,
        forward_flops=flops,
        backward_flops=2 * flops,
        forward_moved_bytes=saved,
        backward_moved_bytes=2 * saved,
        input_bytes=input_bytes,
        saved_bytes=saved,
        forward_entry_bytes=entry,
        forward_peak_bytes=peak,
        forward_exit_bytes=exit_,
        backward_entry_bytes=exit_,
        backward_peak_bytes=backward_peak,
        backward_exit_bytes=entry,
    )


def step(precision="32-true", *, blocks=4, saved=64 * MIB, head=32 * MIB, scale=1.0, flops=10**9):
    """Blocks that save `saved` bytes each, an eighth of it their input, then a head that needs `head` for a while."""
    saved, head = int(saved * scale), int(head * scale)
    rows, live = [], 0
    for index in range(blocks):
        rows.append(
            segment(
                f"blocks.{index}",
                saved=saved,
                entry=live,
                peak=live + saved + saved // 4,
                exit_=live + saved,
                backward_peak=live + saved + saved // 2,
                input_bytes=saved // 8,
                flops=flops,
            )
        )
        live += saved
    rows.append(
        segment(None, saved=head, entry=live, peak=live + 2 * head, exit_=live + head, backward_peak=live + 3 * head)
    )
    return Step(
        precision=precision,
        segments=tuple(rows),
        largest_temporary_bytes=head,
        loss_peak_bytes=live + 2 * head,
        output_bytes=4,
    )


def workload(*, blocks=4, precisions=("32-true",), batch_samples=8, stage="fit", **changes):
    """A model of `blocks` blocks of 16 MiB each and a root of 8 MiB, trained by an optimizer with two states."""
    parameters = [parameter("embedding", None, rows=2048)]
    for index in range(blocks):
        parameters += [parameter(f"blocks.{index}.{name}", f"blocks.{index}", rows=2048) for name in ("up", "down")]
    fields = {
        "name": "Net",
        "parameters": tuple(parameters),
        "buffer_bytes": 0,
        "optimizers": (
            OptimizerNeeds(
                class_name="AdamW",
                state_bytes={p.name: 2 * p.bytes for p in parameters},
                step_temporary_largest=2.0,
                step_temporary_total=0.0,
                moved_bytes=10 * sum(p.bytes for p in parameters),
            ),
        ),
        "steps": {name: step(name, blocks=blocks, scale=1.0 if name == "32-true" else 0.5) for name in precisions},
        "batch_samples": batch_samples,
        "batch_bytes": 1024,
        "blocks": tuple(f"blocks.{index}" for index in range(blocks)),
        "stage": stage,
        "approximate": (),
    }
    return Workload(**{**fields, **changes})


def hardware(world=2, *, kind="cpu", free=8 * 2**30, bf16=1e9, fp32=40e9, **changes):
    link = Link(latency_seconds=1e-4, bandwidth=1e9)
    rates = Rates(
        matmul={"float32": fp32, "bfloat16": bf16},
        memory_bandwidth=10e9,
        all_gather=link,
        reduce_scatter=link,
        all_reduce=link,
        host_to_device=None,
        device_to_host=None,
        disk_read=1e9,
        disk_write=1e9,
    )
    fields = {
        "kind": kind,
        "name": "test",
        "memory_bytes": free,
        "memory_free_bytes": free,
        "nodes": 1,
        "ranks_per_node": world,
        "cores": world,
        "dram_bytes": free,
        "dram_available_bytes": free,
        "disks": (),
        "interconnect": None,
        "rates": rates,
        "origin": "detected",
    }
    return Hardware(**{**fields, **changes})


def tiered(world=1, *, kind="cpu", disk=100 * 2**30, dram=None, **changes):
    """Hardware with a disk of so many free bytes, and on CUDA DRAM behind a link."""
    machine = hardware(world, kind=kind, **changes)
    disks = (Disk(path="/scratch", filesystem="ext4", free_bytes=disk),) if disk else ()
    link = Link(latency_seconds=0, bandwidth=4e9) if kind == "cuda" else None
    host = 2e9 if kind == "cuda" else None
    rates = dataclasses.replace(machine.rates, host_memory_bandwidth=host, host_to_device=link, device_to_host=link)
    available = machine.dram_available_bytes if dram is None else dram
    return dataclasses.replace(machine, disks=disks, rates=rates, dram_available_bytes=available)


def sizes(kind="cpu", accumulate=1, work=None, **fields):
    """Of a plan of these fields."""
    return Sizes(work or workload(), Plan(**fields), kind, accumulate)


def mib(count):
    return count // MIB if count % MIB == 0 else count / MIB


def terms_at(moment, found, *, built=True):
    """MiB by term of one of the moments of a step: its name, and the index of its segment."""
    terms = next(terms for name, index, terms in _moments(found, 0, built) if (name, index) == moment)
    return {name: mib(size) for name, size in terms.items()}


def peak_of(plan=None, *, work=None, world=1, **changes):
    return peak_memory(work or workload(), plan or Plan(), hardware(world), **changes)
