"""Private APIs of Lightning: launchers, process group, and what a rank inherits from the process that starts it."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

# The exception by which Lightning's Tuner ends a run once it has found what it searched for. Replaced by a public name.
TunerExit = _TunerExitException


class SubprocessScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of ranks that run the script again.

    Replaced by a public launcher class with these methods.
    """

    def start_children(self) -> None:
        """Start the script once for every other rank of this node."""
        self._call_children_scripts()


class MultiProcessingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher of ranks that are forked or spawned.

    Replaced by a public launcher class with these attributes and methods.
    """

    @property
    def strategy(self) -> ParallelStrategy:
        """The strategy that is launched."""
        return self._strategy

    @property
    def start_method(self) -> str:
        """The start method: "fork", "spawn" or "forkserver"."""
        return self._start_method

    @property
    def already_fit(self) -> bool:
        """Return whether a Trainer has fitted with this launcher."""
        return self._already_fit

    @already_fit.setter
    def already_fit(self, fitted: bool) -> None:
        self._already_fit = fitted

    def run_rank(self, process_idx: int, trainer: Any, function: Callable[..., Any], *args: Any) -> None:
        """Run `function` in this process as local rank `process_idx`, and send rank 0's results to the parent."""
        self._wrapping_function(process_idx, trainer, function, *args)

    def collect_results(self, trainer: Any, results: Any) -> Any:
        """Return `results` with the state that the parent needs, weights included; None on ranks other than 0."""
        return super()._collect_rank_zero_results(trainer, results)

    @override
    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        return self.collect_results(trainer, results)

    def recover_results(self, output: Any, trainer: Any) -> None:
        """Load the weights and the state that rank 0 sent, in the parent."""
        self._recover_results_in_main_process(output, trainer)


def check_main_guard() -> None:
    """Raise if a spawned child starts processes itself, because its script lacks `if __name__ == "__main__"`.

    Replaced by a public check in Lightning.
    """
    from lightning.fabric.strategies.launchers.multiprocessing import _check_missing_main_guard

    _check_missing_main_guard()


def global_states() -> Any:
    """Return the random number generators and determinism flags of this process, to be restored in a spawned one.

    Replaced by a public snapshot in Lightning; its launcher restores what it receives.
    """
    from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot

    return _GlobalStateSnapshot.capture()


def share_threads(num_processes: int) -> None:
    """Give torch in this process its share of the node's cores as threads, unless OMP_NUM_THREADS is set.

    Replaced by a public function of Lightning; its launchers call this one.
    """
    _set_num_threads_if_needed(num_processes=num_processes)


def init_process_group(environment: Any, backend: str, device: Any, timeout: Any, store: Any = None) -> None:
    """Create the default process group if there is none.

    Replaced by a public function of Lightning; its strategies call these.

    Args:
        environment: The cluster environment, which knows the ranks and where they meet.
        backend: The backend, or one for each device type, as `"cpu:gloo,cuda:nccl"`.
        device: This rank's device.
        timeout: The timeout of collectives, a timedelta.
        store: The store through which ranks find each other; None for one at the environment's address.
    """
    from lightning.fabric.utilities.distributed import _destroy_dist_connection, _init_dist_connection

    # Bound to a device, groups are split from the first one, which those of several backends cannot be (torch 2.13).
    device_id = device if device.type != "cpu" and ":" not in backend else None
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id, store=store)
    if "nccl" in backend and backend != "nccl":
        # Lightning does this for a backend of nccl alone.
        atexit.register(_destroy_dist_connection)


def reduce_tensor(tensor: Any, group: Any, reduce_op: Any) -> Any:
    """Return a tensor reduced in place over ranks; unchanged if there is no process group.

    Replaced by a public function of Lightning that knows its names of operations, such as "mean".

    Args:
        tensor: The tensor.
        group: The process group; None is the default one.
        reduce_op: The operation, as a ReduceOp or by Lightning's name.
    """
    from lightning.fabric.utilities.distributed import _sync_ddp_if_available

    return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)


def set_rank_zero(rank: int) -> int:
    """Set the rank that `rank_zero_only` and the functions built on it know; return the one that they knew before.

    Replaced by a public setter in Lightning.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
    from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only

    before = int(rank_zero_only.rank)  # type: ignore[attr-defined]
    rank_zero_only.rank = utils_rank_zero_only.rank = rank  # type: ignore[attr-defined]
    return before
