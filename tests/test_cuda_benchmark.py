"""The benchmark for a CUDA device, tried with models of a few megabytes before it is given one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_parts_find_something(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "on_cuda.py"
    command = [sys.executable, str(script), "--small", "--minutes", "10", "--out", str(tmp_path / "found")]
    subprocess.run(command, check=True, timeout=900)
    found = json.loads((tmp_path / "found.json").read_text())
    errors = [row for part in found if part != "machine" for row in found[part] if "error" in row]
    assert errors == []
    assert {part: len(rows) for part, rows in found.items() if part != "machine"} == {
        "plans": 23,
        "utilisation": 3,
        "link": 1,
        "larger": 1,
    }
    assert found["larger"][0]["peak_bytes"] <= found["larger"][0]["limit_bytes"]
    text = (tmp_path / "found.md").read_text()
    assert text.count("| gpt") + text.count("| llama") == 23
