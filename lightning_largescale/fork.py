"""Launcher that forks (or spawns) the ranks from one process, which waits and receives the trained weights."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.apart import forks_differentiate, no_collection
from lightning_largescale.errors import PlanError
from lightning_largescale.failures import GRACE_SECONDS, PeerFailures, reported, told_in_one_line
from lightning_largescale.hub import describe_exit
from lightning_largescale.tuning import found, give_found


class ForkLauncher(compat.MultiProcessingLauncher):
    """Launcher that starts every rank as a fork (or spawn) of this process, which receives the trained weights."""

    failures: PeerFailures | None = None
    # A Tuner searched, and nothing was trained.
    _only_tuned = False
    # Whether this process collects garbage.
    _collects = True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run `function` in every rank.

        Returns:
            The result of rank 0 of the node.

        Raises:
            PlanError: ranks are to be forked, and CUDA is initialised here or autograd has threads, which a fork cannot
                use.
            torch.multiprocessing.ProcessRaisedException: a rank failed; with the traceback of the first to fail.
        """
        if self.start_method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise PlanError(
                "start_method='fork' cannot give the ranks CUDA, which this process has initialised; do not touch"
                " torch.cuda before fit (restart a notebook's kernel), or run a script with start_method='popen'."
            )
        if self.start_method == "fork" and not forks_differentiate():
            raise PlanError(
                "start_method='fork' cannot give the ranks autograd, whose threads this process has started; run no"
                " backward and no Workload.trace before fit where there are CUDA devices (restart a notebook's kernel),"
                " or run a script with start_method='popen'."
            )
        if self.start_method == "spawn":
            compat.check_main_guard()
        if self.already_fit and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            raise NotImplementedError(
                f"A Trainer whose ranks are started by {self.start_method} fits once, since loops and optimizers stay"
                " in the ranks; make a new Trainer, with fit(ckpt_path=...) to go on from a checkpoint."
            )
        assert self.strategy.cluster_environment is not None
        os.environ["MASTER_PORT"] = str(self.strategy.cluster_environment.main_port)
        queue = mp.get_context(self.start_method).SimpleQueue()
        states = compat.global_states() if self.start_method == "spawn" else None
        self._collects = gc.isenabled()
        # A fork that drops a process group of this process would wait for threads that it lacks.
        compat.forget_cached_meshes()
        with no_collection() if self.start_method == "fork" else contextlib.nullcontext():
            context = start_processes(  # type: ignore[no-untyped-call]
                self.run_rank,
                args=(trainer, function, args, kwargs, queue, states),
                nprocs=len(self.strategy.parallel_devices or ()),
                start_method=self.start_method,
                join=False,
            )
        self.procs = context.processes
        join(context)
        output = queue.get()
        if trainer is None:
            return output
        self.recover_results(output, trainer)
        self.already_fit |= trainer.state.fn == TrainerFn.FITTING and not self._only_tuned
        return output.trainer_results

    @override
    def run_rank(self, process_idx: int, trainer: Trainer | None, function: Callable[..., Any], *args: Any) -> None:
        """Run local rank `process_idx` as Lightning does, and report its failure to the other ranks."""
        if self.start_method == "fork":
            # The parent collects garbage from before the fork: the end of a process group waits for its threads.
            gc.freeze()
            if self._collects:
                gc.enable()
            # GNU OpenMP's threads do not survive a fork but its record of them does: where the parent has computed with
            # two threads, the first two-thread computation of a fork waits for ever. One thread asks for no others.
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
        self.failures = PeerFailures(parent=os.getppid())
        try:
            with reported(self.failures):
                super().run_rank(process_idx, trainer, partial(self._until_tuned, function), *args)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BaseException as error:
            if told_in_one_line(error) is None:
                raise
            # Without an error file the parent knows that this rank was not the first to fail.
            sys.exit(1)

    def _until_tuned(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of `function`; None if a Tuner ends it, so that the parent gets the finders' results."""
        try:
            return function(*args, **kwargs)
        except compat.TunerExit:
            self._only_tuned = True
            return None

    @override
    def collect_results(self, trainer: Trainer, results: Any) -> Any:
        """Send full tensors to the parent, whatever the plan; a collective of all ranks."""
        if trainer.state.fn != TrainerFn.FITTING:
            return super().collect_results(trainer, results)
        strategy: Any = trainer.strategy
        module, full = trainer.lightning_module, strategy.full_module_state()
        # Lightning asks the module, which holds this rank's shards.
        module.state_dict = lambda *args, **kwargs: full  # type: ignore[method-assign]
        try:
            return super().collect_results(trainer, results)
        finally:
            del module.state_dict

    @override
    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        """Return further results for the parent: the strategy's decisions in the ranks, and the finders' results."""
        names = getattr(self.strategy, "decided_at_setup", ())
        decided = {name: getattr(self.strategy, name) for name in names}
        # As bytes, since Lightning looks for tensors in what it sends, and refuses frozen dataclasses.
        return {
            **super().get_extra_results(trainer),
            "decided": pickle.dumps((decided, found(trainer), self._only_tuned)),
        }

    @override
    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        """Set the results of `get_extra_results` on the parent's strategy, finders and module."""
        super().update_main_process_results(trainer, extra)
        decided, values, self._only_tuned = pickle.loads(extra["decided"])
        for name, value in decided.items():
            setattr(self.strategy, name, value)
        give_found(trainer, values)

    @override
    def recover_results(self, output: Any, trainer: Trainer) -> None:
        """Load rank 0's weights, after building a model that `configure_model` builds."""
        if output.weights_path is not None and is_overridden("configure_model", trainer.lightning_module):
            trainer.lightning_module.configure_model()
        strategy: Any = trainer.strategy
        # Tensors without values before the fork have none here either.
        if output.weights_path is not None:
            strategy.make_all()
        super().recover_results(output, trainer)


def join(context: ProcessContext) -> None:
    """Wait for all processes of `context`; when one fails, give the others time to end, then end them.

    torch's own `join` raises the error of the process that ended first, which need not be the one that failed first,
    and waits 30 s for processes that ignore SIGTERM.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process raised; with the traceback of the first to fail.
        torch.multiprocessing.ProcessExitedException: a process was killed, or exited without an exception.
    """
    try:
        failed = _failed_processes(context)
    finally:
        _end(context)
    if not failed:
        return
    index = min(failed, key=lambda i: (not os.path.exists(context.error_files[i]), _exit_code(context, i) > 0))
    pid, code = int(context.processes[index].pid), _exit_code(context, index)
    if os.path.exists(context.error_files[index]):
        trace = pickle.loads(Path(context.error_files[index]).read_bytes())
        raise ProcessRaisedException(
            f"\n\n-- Process {index} terminated with the following error:\n{trace}", index, pid
        )
    raise ProcessExitedException(f"Rank {index} of this node {describe_exit(code)}.", index, pid, code)


def _exit_code(context: ProcessContext, index: int) -> int:
    return int(context.processes[index].exitcode or 0)


def _failed_processes(context: ProcessContext) -> list[int]:
    """Wait until all processes have ended or had time to; return those that failed by themselves, in order of end."""
    pending = {process.sentinel: index for index, process in enumerate(context.processes)}
    failed: list[int] = []
    deadline: float | None = None
    while pending:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(pending), timeout=left)
        if not ready:
            break
        for sentinel in ready:
            index = pending.pop(sentinel)
            context.processes[index].join()
            if context.processes[index].exitcode:
                failed.append(index)
                # Its peers' watchers end them in GRACE_SECONDS; one second more, and they are ended here.
                deadline = deadline or time.monotonic() + GRACE_SECONDS + 1
    return failed


def _end(context: ProcessContext) -> None:
    """End the remaining processes, of a failed or interrupted run."""
    deadline = time.monotonic() + 1
    try:
        # After Ctrl-C in a terminal they receive the signal too, and close their files and loggers.
        for process in context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
