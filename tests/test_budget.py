"""The choice follows the budget, and what is chosen survives under an enforced limit of that size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

CONTROLLER = Path("/sys/fs/cgroup/memory")
RUN = Path(__file__).with_name("budget_run.py")


@pytest.fixture
def cgroup():
    if not os.access(CONTROLLER / "cgroup.procs", os.W_OK):
        pytest.skip("needs a writable cgroup v1 memory controller")
    folder = CONTROLLER / f"largescale-{uuid.uuid4().hex}"
    folder.mkdir()
    yield folder
    for group in (*folder.glob("rank*"), folder):
        group.rmdir()


def run(devices, budget, cgroup):
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // devices)}
    command = [sys.executable, str(RUN), str(devices), str(budget), str(cgroup)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def outcome(done):
    lines = [line for line in done.stdout.splitlines() if line.startswith("DONE ")]
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("DONE "))


@pytest.mark.slow
def test_some_blocks_recompute_where_not_all_need_to(cgroup):
    peaks = {name: peak for name, peak, _ in outcome(run(1, 0, cgroup))["rows"]}
    none, full = peaks["plain, one device, 32-true"], peaks["plain, one device, full activation checkpointing, 32-true"]
    counts = []
    for share in (0.75, 0.5, 0.25):
        found = outcome(run(1, int(full + share * (none - full)), cgroup))
        assert found["steps"] == 4
        counts.append(int(re.search(r"activation checkpointing of (\d+) blocks?", found["plan"])[1]))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_each_plan_down_the_budgets_survives_its_limit(devices, cgroup):
    rows = outcome(run(devices, 0, cgroup))["rows"]
    chosen = []
    # Budgets at which the choice changes: a little above the peak of each plan that is the fastest that fits there.
    for _, peak, _ in sorted(rows, key=lambda row: -row[1]):
        fastest = min((row for row in rows if row[1] <= peak), key=lambda row: row[2])
        if fastest[1] != peak:
            continue
        found = outcome(run(devices, int(1.04 * peak), cgroup))
        assert found["steps"] == 4
        chosen.append(found["plan"])
    assert "activation checkpointing" not in chosen[0]
    assert "activation checkpointing" in chosen[-1]
    assert ("over 2 devices" in chosen[-1]) == (devices == 2)
    assert len(set(chosen)) >= 2
    least = min(peak for _, peak, _ in rows)
    refused = run(devices, int(0.8 * least), cgroup)
    assert refused.returncode != 0
    assert "no plan fits" in refused.stderr
    assert "give a budget of" in refused.stderr
