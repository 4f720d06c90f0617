"""Reports that a change of the planner's structure must not change by a byte: what each is of, and how it is written.

`PYTHONPATH=.:tests python -m planner.golden_reports` writes all anew, with `workloads` behind it the workloads as well:
for a change that is meant to change them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning_largescale.hardware import Disk, Hardware, Link
from lightning_largescale.hardware.hardware import Rates
from lightning_largescale.plan import Plan
from lightning_largescale.planner import find_plans
from lightning_largescale.planner.report import Report
from lightning_largescale.workload import Workload

FOLDER = Path(__file__).parent / "golden"
GIB = 2**30
LOSSY = ("bf16-mixed",)
# Candidates that a reader can compare line by line.
_IN_FULL = 6


class Case(NamedTuple):
    """A search: of which workload, on which hardware, with which options."""

    workload: str
    hardware: str
    options: Mapping[str, Any] = MappingProxyType({})


def _cpu(ranks: int) -> Hardware:
    link = Link(latency_seconds=1e-4, bandwidth=1e9) if ranks > 1 else None
    rates = Rates(
        matmul={"float32": 1e11, "bfloat16": 3e11},
        memory_bandwidth=2e10,
        fresh_memory=2e9,
        all_gather=link,
        reduce_scatter=link,
        all_reduce=link,
        disk_read=1e9,
        disk_write=5e8,
    )
    return Hardware(
        kind="cpu",
        name="a processor",
        ranks_per_node=ranks,
        memory_bytes=24 * GIB // ranks,
        memory_free_bytes=20 * GIB // ranks,
        cores=8,
        dram_bytes=24 * GIB // ranks,
        dram_available_bytes=20 * GIB // ranks,
        disks=(Disk(path="/scratch", filesystem="ext4", free_bytes=800 * GIB),),
        rates=rates,
    )


HARDWARE = {
    "1 processor": lambda: _cpu(1),
    "2 ranks": lambda: _cpu(2),
    "4 ranks": lambda: _cpu(4),
    "RTX4090-24GB": lambda: Hardware.named("RTX4090-24GB"),
    "2xRTX3090-24GB": lambda: Hardware.named("2xRTX3090-24GB"),
    "8xA100-40GB": lambda: Hardware.named("8xA100-40GB"),
    "8xH100-80GB": lambda: Hardware.named("8xH100-80GB"),
    "4 x 8xH100-80GB": lambda: Hardware.named("8xH100-80GB", nodes=4),
    "H200-141GB": lambda: Hardware.named("H200-141GB"),
}

CASES = [
    *(Case("language", name) for name in HARDWARE),
    *(Case("language", name, {"allow": LOSSY}) for name in ("1 processor", "RTX4090-24GB", "4 x 8xH100-80GB")),
    Case("language", "1 processor", {"memory_budget": "3GiB", "baseline_bytes": GIB // 4}),
    Case("language", "1 processor", {"memory_budget": "1GiB", "baseline_bytes": GIB // 4}),
    Case("language", "1 processor", {"memory_budget": "400MiB", "baseline_bytes": GIB // 4}),
    Case("language", "2 ranks", {"memory_budget": "2GiB", "may_release": True}),
    Case("language", "RTX4090-24GB", {"memory_budget": "6GiB", "accumulate_grad_batches": 4}),
    Case("language", "RTX4090-24GB", {"memory_budget": "2GiB", "may_release": True, "built": False}),
    Case("language", "8xA100-40GB", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
    *(Case("images", name) for name in ("1 processor", "2 ranks", "8xA100-40GB")),
    Case("images", "1 processor", {"memory_budget": "1GiB"}),
    Case("images", "RTX4090-24GB", {"allow": LOSSY, "memory_budget": "1GiB"}),
    *(Case("adapters", name) for name in ("1 processor", "4 ranks", "8xH100-80GB")),
    Case("adapters", "2 ranks", {"memory_budget": "1GiB"}),
    Case("clicks", "1 processor"),
    Case("clicks", "4 ranks"),
    Case("clicks", "4 ranks", {"memory_budget": "600MiB"}),
    Case("clicks", "8xH100-80GB", {"allow": LOSSY}),
    Case("evaluated", "2 ranks"),
    Case("evaluated", "RTX4090-24GB", {"memory_budget": "1GiB"}),
    Case("guessed", "2 ranks"),
    Case("guessed", "1 processor", {"memory_budget": "1GiB"}),
]


def workload(name: str) -> Workload:
    """As it was traced when the reports were written: what another torch would trace is not what is asked here."""
    return Workload.from_dict(json.loads((FOLDER / f"{name}.workload.json").read_text()))


def report(case: Case) -> Report:
    """The search's."""
    return find_plans(workload(case.workload), HARDWARE[case.hardware](), **case.options)


def name_of(case: Case) -> str:
    """Of its file."""
    words = [case.workload, case.hardware, *(f"{name}={value}" for name, value in case.options.items())]
    kept = "".join(letter if letter.isalnum() or letter in "=.-" else "_" for letter in "_".join(words))
    return f"{kept}.json"


def text_of(found: Report) -> str:
    """Everything that is decided and predicted, of the first candidates in full and of the others a digest; rounded
    where the order of a sum may show, and without the fields of plans that are as in the plain run.
    """
    fields = _rounded(found.to_dict())
    del fields["hardware"], fields["model"]
    plain = _rounded(dataclasses.asdict(Plan()))
    for holder, key in ((fields, "best"), *((candidate, "plan") for candidate in fields["candidates"])):
        if holder[key] is not None:
            holder[key] = {name: value for name, value in holder[key].items() if value != plain[name]}
    others = [json.dumps(candidate, sort_keys=True) for candidate in fields["candidates"][_IN_FULL:]]
    fields["candidates"][_IN_FULL:] = [f"{len(others)} others: {hashlib.sha256(''.join(others).encode()).hexdigest()}"]
    return json.dumps(fields, indent=1) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    if "workloads" in sys.argv:
        from planner.golden_workloads import TRACE

        for kind, trace in TRACE.items():
            (FOLDER / f"{kind}.workload.json").write_text(json.dumps(trace().to_dict(), indent=None) + "\n")
    for one in CASES:
        (FOLDER / name_of(one)).write_text(text_of(report(one)))
