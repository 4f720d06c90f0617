"""Workers of Ray Train are the ranks of a Trainer in each of them: a real job, where ray is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from faults.runs import Run
from models import Language, trainer
from ranks import quiet

pytestmark = [
    *quiet,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'ray[train]' (520 MB)"
    ),
]
# Ray starts half a dozen processes before the workers.
JOB_SECONDS = 540


def test_two_workers_train_as_one_process_does(tmp_path):
    model = Language()
    trainer(max_steps=3).fit(model)
    ended = Run(tmp_path, ["python", str(Path(__file__).parent / "ray_job.py")]).end(JOB_SECONDS)
    assert ended.status == 0, ended
    found = [json.loads(line.removeprefix("DONE ")) for line in ended.out.splitlines() if line.startswith("DONE ")]
    assert len(found) == 2
    for rank, fits in enumerate(found):
        assert [(fit["rank"], fit["world"]) for fit in fits] == [(rank, 2)] * 2
        for fit in fits:
            assert fit["losses"] == pytest.approx(model.losses, rel=1e-5)
