"""Memory and reads of building, loading, saving and resuming, at a size that shows."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.large_run import run, write_weights

pytestmark = pytest.mark.slow

PLANS = {"sharded": {"dp_shard": 2}, "divided": {"tp": 2}}
# What a process takes beside the tensors that are counted: buffers of the allocator and of the connection.
SLACK = 32 * 2**20


@pytest.mark.parametrize("plan", PLANS)
def test_building_takes_the_shards_and_two_blocks(tmp_path, plan):
    for found in run("build", PLANS[plan], tmp_path):
        assert found["shards"] < 0.51 * found["all"]
        assert found["setup"] <= found["shards"] + found["two blocks"] + SLACK


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders by kind of file."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("safetensors", "torch")}
    for kind, folder in folders.items():
        write_weights(folder, kind)
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
