from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"


def quickstart(folder: Path, *arguments: str) -> str:
    """Run the example in `folder` and give what it printed."""
    run = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert list(folder.iterdir()) == [] or arguments, "the example leaves files behind"
    return run.stdout


def bits_per_byte(told: str) -> tuple[float, float]:
    """The model's and the unigram model's, from the last line."""
    return tuple(map(float, re.findall(r"\d+\.\d\d", told.splitlines()[-1])))


def test_it_does_not_know_the_package():
    assert "import lightning_largescale" not in SCRIPT.read_text()
    assert "from lightning_largescale" not in SCRIPT.read_text()


@pytest.mark.parametrize("strategy", ["largescale_auto", pytest.param("auto", marks=pytest.mark.slow)])
def test_own_text(tmp_path, strategy):
    sentence = b"the cat sat on the mat. "
    text = tmp_path / "text"
    text.write_bytes(sentence * 800)
    sizes = ["--devices", "1", "--max-steps", "10", "--batch-size", "4"]
    told = quickstart(tmp_path, "--data", str(text), "--strategy", strategy, "--accelerator", "cpu", *sizes)
    model, unigram = bits_per_byte(told)
    assert model < 8
    shares = [count / len(sentence) for count in Counter(sentence).values()]
    assert unigram == pytest.approx(-sum(share * math.log2(share) for share in shares), abs=0.05)


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path):
    told = quickstart(tmp_path)
    falling = [float(bits) for bits in re.findall(r"step +\d+: (\d\.\d\d) bits per byte", told)]
    assert len(falling) == 5
    assert falling == sorted(falling, reverse=True)
    model, unigram = bits_per_byte(told)
    assert model == falling[-1] < 3.5 < 4 < unigram
