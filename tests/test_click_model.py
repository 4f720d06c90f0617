"""The example of row-sharded tables runs, and learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "click_model.py"


@pytest.mark.slow
def test_loss_falls(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--devices", "2", "--accelerator", "cpu", "--max-steps", "200"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", run.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.02
    assert list(tmp_path.iterdir()) == []
