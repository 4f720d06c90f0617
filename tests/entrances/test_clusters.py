"""Ranks that a cluster or torchrun started are used as they are: its variables simulated, a process for each rank."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from faults.runs import START_SECONDS, Run
from models import Language, trainer
from ranks import quiet

pytestmark = [*quiet, pytest.mark.slow]

SCRIPT = str(Path(__file__).parent / "cluster.py")
TORCHRUN = ("python", "-m", "torch.distributed.run")


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def check(runs, environment, nodes=1):
    """All runs end well, and the ranks trained as one plain process does."""
    ended = [run.end(START_SECONDS) for run in runs]
    lines = [line for one in ended for line in one.out.splitlines() if line.startswith("DONE ")]
    found = sorted((json.loads(line.removeprefix("DONE ")) for line in lines), key=lambda one: one["rank"])
    assert [one.status for one in ended] == [0] * len(runs), ended
    assert [one["rank"] for one in found] == [0, 1], ended
    assert {(one["environment"], one["world"], one["plan"]) for one in found} == {(environment, 2, 2)}
    assert [(one["node"], one["local"]) for one in found] == ([(0, 0), (0, 1)] if nodes == 1 else [(0, 0), (1, 0)])
    model = Language()
    trainer(max_steps=3).fit(model)
    for one in found:
        assert one["losses"] == pytest.approx(model.losses, rel=1e-5)


def tasks(folder, port, *arguments, **variables):
    """Both tasks of a job of SLURM."""
    job = {
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "MASTER_PORT": port,
        **variables,
    }
    command = ["python", SCRIPT, *arguments]
    return [Run(folder, command, SLURM_PROCID=rank, SLURM_LOCALID=rank, **job) for rank in "01"]


@pytest.mark.parametrize("plugin", [True, False], ids=["given", "found"])
def test_slurm(tmp_path, port, plugin):
    arguments = ["--plugin", "slurm"] if plugin else ["--strategy", "largescale_auto"]
    check(tasks(tmp_path, port, *arguments), "SLURMEnvironment")


@pytest.mark.parametrize("signalled", [[0, 1], [1]], ids=["both", "one"])
def test_slurm_says_that_time_is_up(tmp_path, port, signalled):
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    runs = tasks(tmp_path, port, "--plugin", "requeueing slurm", PATH=path)
    for run in runs:
        run.wait_for("STEP", 2)
    for index in signalled:
        runs[index].interrupt(everyone=False, by=signal.SIGUSR1)
    ended = [run.end(START_SECONDS) for run in runs]
    assert [one.status for one in ended] == [0, 0], ended
    assert not any(one.orphans for one in ended)
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt" / ".metadata").exists()


def test_lsf(tmp_path, port):
    here = socket.gethostname()
    # The first line is the node that the job was sent from.
    (tmp_path / "hosts").write_text(f"launch\n{here}\n{here}\n")

    def rank(number):
        variables = {
            "LSB_JOBID": "12345",
            "LSB_DJOB_RANKFILE": str(tmp_path / "hosts"),
            "JSM_NAMESPACE_SIZE": "2",
            "JSM_NAMESPACE_RANK": str(number),
            "JSM_NAMESPACE_LOCAL_RANK": str(number),
            "MASTER_PORT": port,
        }
        return Run(tmp_path, ["python", SCRIPT, "--plugin", "lsf"], **variables)

    check([rank(0), rank(1)], "LSFEnvironment")


def test_torchrun_on_one_node(tmp_path):
    command = [*TORCHRUN, "--nproc-per-node=2", "--standalone", SCRIPT, "--plugin", "torchelastic"]
    check([Run(tmp_path, command)], "TorchElasticEnvironment")


@pytest.mark.parametrize("strategy", ["fixed", "largescale_auto"])
def test_torchrun_on_two_nodes(tmp_path, port, strategy):
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1")
    script = (SCRIPT, "--devices=1", "--nodes=2", f"--strategy={strategy}")
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *meeting, *script]
    check([Run(tmp_path, command), Run(tmp_path, command)], "TorchElasticEnvironment", nodes=2)
