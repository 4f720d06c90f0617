"""Launchers of a Trainer's ranks: the script run again, forks of this process, or processes that a cluster started.

A script is run again once per rank, so every rank goes on after `fit` and no `if __name__ == "__main__"` is needed.
If there is no script to run again (a notebook, `python -c`, a test session), ranks are forks, and the parent receives
the trained weights. Ranks that the environment started (torchrun, SLURM) are used as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.console import tell
from lightning_largescale.errors import PlanError
from lightning_largescale.failures import GRACE_SECONDS, PeerFailures, end_process, reported, told_in_one_line
from lightning_largescale.fork import ForkLauncher
from lightning_largescale.hub import Failure, Hub, describe_exit

START_METHODS = ("popen", "fork", "spawn")
# Running these again would run the whole session again, in every rank.
_TEST_RUNNERS = ("pytest", "unittest")
_LAUNCHER_PID = "LARGESCALE_LAUNCHER_PID"


def configure_launcher(
    strategy: ParallelStrategy, start_method: str | None = None
) -> ScriptLauncher | ForkLauncher | None:
    """Choose how to start the ranks of `strategy`; for `Strategy._configure_launcher`.

    Args:
        strategy: the strategy, with its cluster environment, devices and `num_nodes` set.
        start_method: "popen" (the script again), "fork" or "spawn" to force one; None chooses.

    Returns:
        None for a single process; if the environment created the processes, a launcher that only reports failures.
    """
    environment = strategy.cluster_environment
    processes, nodes = len(strategy.parallel_devices or ()), getattr(strategy, "num_nodes", 1)
    if environment is None or processes * nodes == strategy.world_size == 1:
        return None
    method = start_method or choose_start_method()
    if method == "popen" or _are_there(environment, processes * nodes):
        return ScriptLauncher(environment, processes, nodes)
    return ForkLauncher(strategy, "fork" if method == "fork" else "spawn")


def _are_there(environment: ClusterEnvironment, asked: int) -> bool:
    """Return whether the `asked` ranks of `environment` exist already."""
    return environment.creates_processes_externally or asked == 1


def check_start_method(start_method: str | None) -> None:
    """Refuse an unknown or unavailable method to start ranks.

    Raises:
        PlanError: `start_method` is none of "popen", "fork", "spawn" and None, or this system does not have it.
    """
    if start_method not in (None, *START_METHODS):
        accepted = ", ".join(map(repr, START_METHODS))
        raise PlanError(
            f"start_method={start_method!r} is no way to start ranks; accepted: {accepted}, or None to choose."
        )
    if start_method not in (None, "popen", *mp.get_all_start_methods()):
        raise PlanError(f"start_method={start_method!r} does not exist on {sys.platform}; use 'popen' or 'spawn'.")


def choose_start_method() -> str:
    """Return "popen" if this program can be run again for each rank, else "fork", or "spawn" if there is no fork."""
    if _can_run_again():
        return "popen"
    return "fork" if "fork" in mp.get_all_start_methods() else "spawn"


def _can_run_again() -> bool:
    """Return whether a new Python with `sys.argv` would reach this same call: True for a script and `python -m`."""
    if hasattr(sys, "ps1") or sys.flags.interactive or _in_ipython():
        return False
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = Path(sys.argv[0] if sys.argv else "")
    if spec is not None:
        # `python folder` and `python file.zip` are modules named "__main__", which `-m` does not find.
        return spec.name != "__main__" and spec.name.partition(".")[0] not in _TEST_RUNNERS
    started_by = (script.stem, script.parent.name) if script.stem == "__main__" else (script.stem,)
    return script.is_file() and not set(started_by) & set(_TEST_RUNNERS)


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def watch_peers(strategy: ParallelStrategy) -> None:
    """Connect this rank to the hub of failures: a collective, to call after `setup_environment`."""
    launcher = strategy.launcher
    if isinstance(launcher, ScriptLauncher | ForkLauncher) and launcher.failures is not None:
        launcher.failures.connect(strategy.global_rank, strategy.broadcast(_open_hub(strategy)))


def _open_hub(strategy: ParallelStrategy) -> tuple[str, int, str]:
    """Start the hub on rank 0 and return its endpoint; other ranks return a placeholder for rank 0's broadcast."""
    if strategy.global_rank != 0 or strategy.cluster_environment is None:
        return ("", 0, "")
    hub = Hub(strategy.cluster_environment.main_address, strategy.world_size, _children.describe)
    hub.start()
    return hub.endpoint


class _Children:
    """The child processes that run the other ranks of this node; later Trainers of the script use them too."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first_rank = 0
        self._handled = threading.Event()
        self._failed = False

    def adopt(self, processes: list[subprocess.Popen[bytes]], first_rank: int) -> None:
        """Watch `processes`, global ranks `first_rank` + 1 and up, until they or this process end."""
        self._processes, self._first_rank = processes, first_rank
        # One thread per process: not every system can wait for the first of several processes.
        for process in processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True, name="largescale-child").start()

    def handled(self) -> None:
        """Note that an exception is on its way to the user, so that the watcher does not end this process."""
        self._failed = True
        self._handled.set()

    def launched_again(self) -> None:
        """Refuse a further stage if a rank has ended; else rearm the watcher."""
        for index, process in enumerate(self._processes):
            if process.poll() is not None:
                rank = self._first_rank + 1 + index
                raise RuntimeError(
                    f"Rank {rank} {self.describe(rank)}, so no further stage can run; start the program again."
                )
        self._failed = False
        self._handled.clear()

    def describe(self, rank: int) -> str | None:
        """Return how the process of `rank` ended; None if it runs, exited with 0 or is not a child of this process."""
        index = rank - self._first_rank - 1
        code = self._processes[index].poll() if 0 <= index < len(self._processes) else None
        return describe_exit(code)

    def end(self, failure: Failure | None = None) -> None:
        """Wait for the children, then kill those that are left if this process failed or `failure` is given."""
        self.wait()
        for index, process in enumerate(self._processes):
            if process.poll() is None and (self._failed or failure is not None):
                if failure is not None and failure.rank == self._first_rank + 1 + index:
                    tell(failure.trace)
                process.kill()
                process.wait()

    def wait(self) -> None:
        """Wait for the children to end, for at most the time that a failure takes to reach them."""
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def end_with_script(self) -> None:
        """Exit handler of the script: wait for the children, and fail if one of them failed."""
        self.end()
        # An error of this process sets its own exit status, which may be the one that all ranks exit with.
        ended_well = not self._failed and getattr(sys, "last_value", None) is None
        if ended_well and (failure := self._failure()) is not None:
            code = self._processes[failure.rank - self._first_rank - 1].returncode
            end_process(f"rank {self._first_rank} stops: {failure}", lambda: None, status=max(code, 1))

    def _failure(self) -> Failure | None:
        """Return the failure of the lowest rank whose process ended with a status other than 0; None if none did."""
        codes = [process.poll() for process in self._processes]
        for rank, code in enumerate(codes, self._first_rank + 1):
            if code:
                return Failure(rank=rank, what=self.describe(rank) or "", lost=True)
        return None

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() == 0:
            return
        failure = self._failure()
        if failure is not None and not self._handled.wait(GRACE_SECONDS):
            end_process(f"rank {self._first_rank} stops: {failure}", lambda: self.end(failure))


_children = _Children()
# Exit handlers run in reverse order: registered early, so that the handlers of the script's libraries run before.
atexit.register(_children.end_with_script)


@functools.cache
def _show_first_failure_only() -> None:
    """Make an uncaught error that another rank's error caused print one line, after that rank's output. Runs once."""
    previous = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _children.handled()
        line = told_in_one_line(error)
        if line is None:
            previous(kind, error, trace)
        else:
            _children.wait()
            tell(line)

    sys.excepthook = show


class ScriptLauncher(compat.SubprocessScriptLauncher):
    """Launcher that runs the script again for every other rank of the node, or uses the environment's processes."""

    failures: PeerFailures | None = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run `function` in this process as one of the ranks, after starting the others if they do not exist yet.

        Lightning's own `launch` is not called: its observer kills this process, and loses its output, if a child fails.
        """
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if _are_there(environment, self.num_processes * self.num_nodes):
            _children.launched_again()
        else:
            os.environ[_LAUNCHER_PID] = str(os.getpid())
            self.start_children()
            _children.adopt(self.procs, environment.node_rank() * self.num_processes)
        compat.share_threads(self.num_processes)
        _show_first_failure_only()
        parent = os.getppid()
        started_by_ours = os.environ.get(_LAUNCHER_PID) == str(parent)
        self.failures = PeerFailures(parent=parent if started_by_ours else None, before_exit=_children.end)
        try:
            with reported(self.failures):
                return function(*args, **kwargs)
        except compat.TunerExit:
            raise
        except BaseException:
            _children.handled()
            raise
        finally:
            self.failures = None
