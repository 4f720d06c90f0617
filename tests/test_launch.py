"""Launching: which way ranks start, and what a user sees of runs that work, fail and are interrupted."""

import os
import signal
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from faults.runs import END_SECONDS, TRAIN, Run, train
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from lightning_largescale.errors import PlanError
from lightning_largescale.fork import ForkLauncher
from lightning_largescale.launch import ScriptLauncher, check_start_method, choose_start_method, configure_launcher

TORCHRUN = ("python", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")


def strategy(devices=2, environment=None):
    cpus = [torch.device("cpu")] * devices
    return DDPStrategy(parallel_devices=cpus, cluster_environment=environment or LightningEnvironment())


# Which way.


def test_under_pytest_ranks_are_forks():
    assert choose_start_method() == "fork"


@pytest.mark.parametrize(
    ("argument", "spec", "method"),
    [
        ("train.py", None, "popen"),
        ("train.py", ModuleSpec("package.train", None), "popen"),
        ("missing.py", None, "fork"),
        ("-c", None, "fork"),
        ("", None, "fork"),
        ("-", None, "fork"),
        ("pytest", None, "fork"),
        ("pytest/__main__.py", None, "fork"),
        ("train.py", ModuleSpec("pytest.__main__", None), "fork"),
        ("train.py", ModuleSpec("unittest.__main__", None), "fork"),
        ("folder", ModuleSpec("__main__", None), "fork"),
    ],
)
def test_what_can_be_run_again_is(monkeypatch, tmp_path, argument, spec, method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytest").mkdir()
    for name in ("train.py", "pytest/__main__.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "argv", [argument])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert choose_start_method() == method


def test_an_interactive_python_forks(monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert choose_start_method() == "popen"
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert choose_start_method() == "fork"


def test_one_process_needs_no_launcher():
    assert configure_launcher(strategy(devices=1)) is None


def test_a_clusters_processes_are_used(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    launcher = configure_launcher(strategy(environment=TorchElasticEnvironment()))
    assert isinstance(launcher, ScriptLauncher)
    assert launcher.launch(lambda: os.getpid()) == os.getpid()
    assert launcher.procs == []


@pytest.mark.parametrize(
    ("method", "kind"), [("popen", ScriptLauncher), ("fork", ForkLauncher), ("spawn", ForkLauncher)]
)
def test_a_start_method_can_be_forced(monkeypatch, method, kind):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launcher = configure_launcher(strategy(), method)
    assert isinstance(launcher, kind)
    assert launcher.is_interactive_compatible == (method == "fork")


def test_an_unknown_start_method():
    with pytest.raises(
        PlanError, match="start_method='forks' is no way to start ranks; accepted: 'popen', 'fork', 'spawn'"
    ):
        check_start_method("forks")


# Runs that work.


def check_done(ended, ranks, fits=1):
    done = sorted(line for line in ended.out.splitlines() if line.startswith("DONE"))
    assert done == sorted(f"DONE rank={rank} moved=True loss=True" for rank in ranks for _ in range(fits)), ended
    assert ended.status == 0, ended
    assert not ended.orphans


@pytest.mark.slow
def test_a_script_fits_twice_on_every_rank(tmp_path):
    run = train(tmp_path, "--fits", "2")
    run.wait_for("DONE", 4)
    ended = run.end()
    # Full tensors are the parent's; a rank of a sharded plan keeps its shard.
    assert ended.out.count("DONE rank=0") == ended.out.count("DONE rank=1") == 2, ended
    assert ended.status == 0
    assert not ended.orphans


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_what_is_no_file_forks_and_gets_the_weights(tmp_path, how):
    code = TRAIN.read_text()
    command = ["python", "-c", code] if how == "-c" else ["python", "-"]
    run = Run(tmp_path, [*command, "--configure-model"], stdin=code)
    run.wait_for("DONE")
    check_done(run.end(), ranks=[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-m", "torchrun"])
def test_modules_and_torchrun(tmp_path, how):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(TRAIN.read_text())
    run = Run(tmp_path, ["python", "-m", "package.train"]) if how == "-m" else train(tmp_path, prefix=TORCHRUN)
    run.wait_for("DONE", 2)
    ended = run.end()
    assert ended.out.count("DONE rank=0") == ended.out.count("DONE rank=1") == 1, ended
    assert ended.status == 0
    assert not ended.orphans


# Starts a kernel as a notebook does, and has it run cells.
NOTEBOOK = """
import sys
from jupyter_client.manager import start_new_kernel

def show(message):
    content = message["content"]
    shown = content.get("data", {}).get("text/plain")  # what rich shows in a notebook
    print(content.get("text") or shown or content.get("traceback") or "", end="", flush=True)

manager, client = start_new_kernel(kernel_name="python3")
try:
    for cell in ("from lightning.pytorch import Trainer", open(sys.argv[1]).read()):
        reply = client.execute_interactive(cell, timeout=120, output_hook=show)
        assert reply["content"]["status"] == "ok", reply
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""
CELL = """
from lightning.pytorch.demos.boring_classes import BoringModel
model = BoringModel()
before = model.layer.weight.detach().clone()
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
trainer = Trainer(strategy="largescale_auto", accelerator="cpu", devices=2, max_steps=2, limit_val_batches=0, **quiet)
trainer.fit(model)
trained = bool((model.layer.weight != before).any())
print("PLAN", trainer.strategy.plan.world_size, trainer.strategy.report.fits, trained)
"""


@pytest.mark.slow
def test_a_notebook_kernel(tmp_path):
    (tmp_path / "drive.py").write_text(NOTEBOOK)
    (tmp_path / "cell.py").write_text(CELL)
    ended = Run(tmp_path, ["python", "drive.py", "cell.py"]).end(150)
    assert ended.status == 0, ended
    # The panel of the ranks, and the parent that knows the plan and has the trained weights.
    assert "peak memory" in ended.out
    assert "PLAN 2 True True" in ended.out


@pytest.mark.slow
def test_a_test_session(tmp_path):
    run_it = f"    sys.argv[1:] = []\n    runpy.run_path({str(TRAIN)!r})\n"
    test = f"import runpy, sys\ndef test_fit():\n{run_it}"
    (tmp_path / "test_it.py").write_text(test)
    run = Run(tmp_path, ["python", "-m", "pytest", "-s", "-p", "no:cacheprovider", "test_it.py"])
    run.wait_for("DONE")
    ended = run.end()
    assert ended.status == 0, ended
    assert "1 passed" in ended.out
    assert ended.out.count("DONE rank=0") == 1


@pytest.mark.slow
def test_spawned_ranks_give_the_weights_back(tmp_path):
    guarded = TRAIN.read_text().replace("for _ in range", "for _ in () if __name__ != '__main__' else range")
    (tmp_path / "train.py").write_text(guarded)
    run = Run(tmp_path, ["python", "train.py", "--start-method", "spawn"])
    run.wait_for("DONE")
    check_done(run.end(), ranks=[0])


# Runs that fail. Each ends within END_SECONDS of the fault, with a status that says so, and leaves nothing behind.


def check_first_failure(ended, follower):
    """The failing rank's traceback is there once, and the other rank has at most a line to say."""
    assert ended.status not in (0, None), ended
    assert not ended.orphans, ended
    assert "boom" in ended.err, ended
    for line in ended.err.splitlines():
        assert "gloo/transport" not in line, ended
        assert not line.startswith(f"[rank{follower}]: Traceback"), ended
    assert ended.err.count(f"rank {follower} stops: ") <= 1, ended


def fail(folder, *arguments, prefix=("python",)):
    run = train(folder, *arguments, prefix=prefix)
    run.wait_for("FAULT")
    return run.end(END_SECONDS)


@pytest.mark.slow
def test_a_script_whose_other_rank_raises(tmp_path):
    check_first_failure(fail(tmp_path, "--fault", "raise", "--rank", "1"), follower=0)


@pytest.mark.slow
def test_a_script_whose_other_rank_is_killed(tmp_path):
    ended = fail(tmp_path, "--fault", "kill", "--rank", "1", "--other", "compute")
    assert ended.status == 1, ended
    assert not ended.orphans
    assert (
        "rank 0 stops: rank 1 was killed by signal 9 (SIGKILL); running out of memory is the usual cause" in ended.err
    )
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("start", ["popen", "fork", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["init", "prepare_data", "setup", "step", "loader"])
def test_a_rank_raises(tmp_path, start, rank, where):
    if (where == "prepare_data" and rank == 1) or (where == "init" and start == "fork"):
        pytest.skip("does not happen: prepare_data is rank 0's, and forks find the model made")
    prefix, arguments = (TORCHRUN, ()) if start == "torchrun" else (("python",), ("--start-method", start))
    ended = fail(tmp_path, "--fault", "raise", "--rank", str(rank), "--where", where, *arguments, prefix=prefix)
    check_first_failure(ended, follower=1 - rank)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "kill"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("other", ["compute", "loader"])
def test_a_rank_fails_while_the_other_is_busy(tmp_path, fault, rank, other):
    ended = fail(tmp_path, "--fault", fault, "--rank", str(rank), "--other", other)
    assert ended.status != 0
    assert not ended.orphans
    assert ("boom" if fault == "raise" else "memory is the usual cause") in ended.err


# Hooks that a rank is in while the other is in a collective, at an end of its own, or gone.
@pytest.mark.slow
@pytest.mark.parametrize("start", ["popen", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "where", ["on_after_backward", "optimizer_step", "on_train_epoch_end", "on_fit_end", "teardown"]
)
def test_a_hook_of_one_rank_raises(tmp_path, start, rank, where):
    prefix = TORCHRUN if start == "torchrun" else ("python",)
    ended = fail(tmp_path, "--fault", "raise", "--rank", str(rank), "--where", where, prefix=prefix)
    check_first_failure(ended, follower=1 - rank)


@pytest.mark.slow
@pytest.mark.parametrize(("statuses", "status"), [((3, 3), 3), ((0, 4), 4), ((5, 0), 5)])
def test_the_status_of_a_script_is_that_of_any_rank_that_failed(tmp_path, statuses, status):
    run = train(tmp_path, "--exit", *map(str, statuses))
    run.wait_for("DONE", 2)
    ended = run.end(END_SECONDS)
    assert ended.status == status, ended
    assert not ended.orphans


# Processes as the launcher has them, the second of which fails.
BEHIND = """
import subprocess, sys, threading
from lightning_largescale.launch import _Children
lives = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
fails = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
_Children().adopt([lives, fails], 0)
threading.Event().wait()
"""


@pytest.mark.slow
def test_a_rank_that_fails_is_seen_behind_one_that_lives(start_python):
    process = start_python(BEHIND)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 0 stops: rank 2 ended with exit status 3" in err


@pytest.mark.slow
def test_spawned_ranks_fail_alike(tmp_path):
    guarded = TRAIN.read_text().replace("for _ in range", "for _ in () if __name__ != '__main__' else range")
    (tmp_path / "train.py").write_text(guarded)
    run = Run(tmp_path, ["python", "train.py", "--start-method", "spawn", "--fault", "raise", "--rank", "1"])
    run.wait_for("FAULT")
    check_first_failure(run.end(), follower=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_catches_its_error_holds_nobody_up(tmp_path, rank):
    ended = fail(tmp_path, "--fault", "raise", "--rank", str(rank), "--catch")
    assert "CAUGHT" in ended.out
    assert not ended.orphans
    assert f"rank {1 - rank} stops: rank {rank} failed first, with ValueError: boom" in ended.err


# Ctrl-C.


def check_interrupted(ended):
    assert ended.status not in (0, None), ended
    assert not ended.orphans, ended
    assert "Traceback" not in ended.err, ended


def interrupt(folder, *arguments, everyone, prefix=("python",)):
    run = train(folder, "--fault", "wait", *arguments, prefix=prefix)
    run.wait_for("FAULT", 2 if "2" in arguments else 1)
    run.interrupt(everyone=everyone)
    return run.end(END_SECONDS)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path):
    check_interrupted(interrupt(tmp_path, "--rank", "2", everyone=True))


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("start", ["popen", "fork"])
def test_ctrl_c_while_a_rank_waits_in_a_collective(tmp_path, everyone, rank, start):
    check_interrupted(interrupt(tmp_path, "--rank", str(rank), "--start-method", start, everyone=everyone))


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False])
def test_ctrl_c_under_torchrun(tmp_path, everyone):
    ended = interrupt(tmp_path, "--rank", "1", everyone=everyone, prefix=TORCHRUN)
    assert ended.status != 0
    assert not ended.orphans


# SIGTERM, of which Lightning tells every rank and which ends training after the step, by `SystemExit` without a code.


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize(("start", "status"), [("popen", 0), ("fork", -signal.SIGTERM), ("torchrun", 1)])
def test_sigterm(tmp_path, start, status, everyone):
    prefix, arguments = (TORCHRUN, ()) if start == "torchrun" else (("python",), ("--start-method", start))
    run = train(tmp_path, "--fault", "endless", "--rank", "2", *arguments, prefix=prefix)
    run.wait_for("FAULT", 6)
    run.interrupt(everyone=everyone, by=signal.SIGTERM)
    # torchrun gives its workers 30 s.
    ended = run.end(45)
    assert ended.status == status, ended
    assert not ended.orphans
