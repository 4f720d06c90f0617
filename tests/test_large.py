"""Memory and reads of building, loading, saving and resuming, at a size that shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from large_run import build
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "large_run.py"
PLANS = {"sharded": {"dp_shard": 2}, "divided": {"tp": 2}}
# What a process takes beside the tensors that are counted: buffers of the allocator and of the connection.
SLACK = 32 * 2**20


def run(what, plan, folder):
    """What each rank has measured."""
    command = [sys.executable, str(SCRIPT), what, json.dumps(plan), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(part) for part in done.stdout.replace("DONE ", "\nDONE ").split("\nDONE ")[1:]]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_building_takes_the_shards_and_two_blocks(tmp_path, plan):
    for found in run("build", PLANS[plan], tmp_path):
        assert found["shards"] < 0.51 * found["all"]
        assert found["setup"] <= found["shards"] + found["two blocks"] + SLACK


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two billion parameters of bfloat16 by kind of file: three of safetensors with an index, and one of torch."""
    with torch.device("meta"):
        empty = build("large").state_dict()
    values = {name: (torch.arange(one.numel()) % 251).to(torch.bfloat16).view(one.shape) for name, one in empty.items()}
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("safetensors", "torch")}
    names = list(values)
    files = {f"model-{number}.safetensors": names[number::3] for number in range(3)}
    for file, own in files.items():
        save_file({name: values[name] for name in own}, folders["safetensors"] / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folders["safetensors"] / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"state_dict": values}, folders["torch"] / "a.ckpt")
    del values
    yield folders
    # Or pytest would keep gigabytes.
    for folder in folders.values():
        shutil.rmtree(folder)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_loading_takes_the_shards_and_reads_them_once(weights, kind, plan):
    for found in run("load", {**PLANS[plan], "precision": "bf16-true"}, weights[kind]):
        assert found["shards"] < 0.51 * found["all"]
        assert found["setup"] <= found["shards"] + 2**30
        if plan == "sharded":
            assert 0 < found["setup read"] <= 1.05 * found["shards"]


def test_saving_and_resuming_take_little_beside_the_shards(tmp_path):
    for found in run("save", PLANS["sharded"], tmp_path):
        assert found["states"] == 2 * found["shards"]
        assert found["save"] <= 512 * 2**20
    for found in run("resume", PLANS["sharded"], tmp_path):
        assert found["load optimizer"] <= found["states"] + 512 * 2**20
        assert found["setup"] <= found["shards"] + 512 * 2**20
