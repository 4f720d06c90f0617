"""Private APIs of Lightning."""

from __future__ import annotations

import atexit
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch.utils._pytree import tree_unflatten

# The launchers that Lightning's own DDPStrategy uses, as base classes of ours: names rather than functions, since a
# class cannot derive from what a function returns and keep its types. Replaced by public launcher classes.
MultiProcessingLauncher = _MultiProcessingLauncher
SubprocessScriptLauncher = _SubprocessScriptLauncher

# How Lightning's Tuner ends a run once it has found what it searched for. Replaced by a public name for it.
TunerExit = _TunerExitException


def loader_source(loop: Any) -> Any:
    """Where a loop gets its loaders from; None when the user gave none, or the loop has them already.

    Replaced by a public way to ask a loop for its loaders before it runs.
    """
    if loop._combined_loader is not None or loop._data_source.instance is None or not loop._data_source.is_defined():
        return None
    return loop._data_source


def request_loaders(source: Any) -> Any:
    """The loaders of `source`, asked as Lightning asks, so that it can inject its samplers later.

    Replaced by a public `Trainer.request_dataloader`; the context inside captures the loader's arguments for that
    injection.
    """
    from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader

    return _request_dataloader(source)


def keep_loaders(loop: Any, source: Any, loaders: Any) -> None:
    """Give `loaders` to the loop when it next asks `source`, and what the user's hook returns from then on.

    Replaced by a public setter of a loop's loaders.
    """
    from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource

    # What was kept before is given no more.
    source = getattr(source, "original", source)
    instance = source.instance

    class KeptSource(_DataLoaderSource):
        original = source

        def dataloader(self) -> Any:
            loop._data_source = source
            if self.instance is instance:
                return loaders
            # The run that these were asked for failed before it took them, and this one has others.
            source.instance = self.instance
            return source.dataloader()

    loop._data_source = KeptSource(source.instance, source.name)


def drop_kept_loaders(loop: Any) -> None:
    """Let the loop ask the user's hook again where `keep_loaders` has given it what the hook returned before.

    Replaced by a public setter of a loop's loaders.
    """
    loop._data_source = getattr(loop._data_source, "original", loop._data_source)


def combine_batches(combined: Any, batches: list[Any]) -> Any:
    """One batch of each of `combined`'s loaders, in the structure that the training step receives.

    Replaced by a public peek of CombinedLoader.
    """
    if combined._mode == "sequential":
        return batches[0]
    return tree_unflatten(batches, combined._spec)


def share_threads(num_processes: int) -> None:
    """Give this process its share of the node's cores as torch threads, unless OMP_NUM_THREADS says otherwise.

    Replaced by a public function of Lightning; its launchers call this one.
    """
    _set_num_threads_if_needed(num_processes=num_processes)


def check_main_guard() -> None:
    """Raise where a spawned child came to start processes itself, its script lacking `if __name__ == "__main__"`.

    Replaced by a public check in Lightning.
    """
    from lightning.fabric.strategies.launchers.multiprocessing import _check_missing_main_guard

    _check_missing_main_guard()


def global_states() -> Any:
    """Random number generators and determinism flags of this process, to be restored in a spawned one.

    Replaced by a public snapshot in Lightning; its launcher restores what it is given.
    """
    from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot

    return _GlobalStateSnapshot.capture()


def attach_trainer(module: Any, trainer: Any) -> None:
    """Make `module.trainer` be `trainer`, of any type, and no Fabric; the attributes are plain and can be put back.

    Replaced by `LightningModule.trainer`'s setter, were it to leave submodules alone.
    """
    module.__dict__["_trainer"] = trainer
    module.__dict__["_fabric"] = None


def attached_trainer(module: Any) -> Any:
    """The trainer that `module` belongs to, or None.

    Replaced by `LightningModule.trainer`, were it to return None instead of raising.
    """
    return module.__dict__.get("_trainer")


def init_process_group(environment: Any, backend: str, device: Any, timeout: Any, store: Any = None) -> None:
    """Connect this process to the others of the cluster `environment`, if it is not yet, through `store` or its own.

    Replaced by a public function of Lightning; its strategies call these.
    """
    from lightning.fabric.utilities.distributed import _destroy_dist_connection, _init_dist_connection

    # Bound to a device, groups are split from the first one, which those of several backends cannot be (torch 2.13).
    device_id = device if device.type != "cpu" and ":" not in backend else None
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id, store=store)
    if "nccl" in backend and backend != "nccl":
        # Which it does for nccl alone.
        atexit.register(_destroy_dist_connection)


def reduce_tensor(tensor: Any, group: Any, reduce_op: Any) -> Any:
    """`tensor` reduced over the ranks of `group`, in place; itself where there is no process group.

    Replaced by a public function of Lightning that understands its names of operations, as "mean".
    """
    from lightning.fabric.utilities.distributed import _sync_ddp_if_available

    return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)


def set_rank_zero(rank: int) -> int:
    """Let `rank_zero_only` and what is built on it know the rank of this process; the one that it knew before.

    Replaced by a public setter in Lightning.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
    from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only

    before = int(rank_zero_only.rank)  # type: ignore[attr-defined]
    rank_zero_only.rank = utils_rank_zero_only.rank = rank  # type: ignore[attr-defined]
    return before


def flag_sigterm_only(trainer: Any) -> None:
    """Let SIGTERM set the flag that ends training after the step, pass it to processes of this one, and no more.

    Lightning's own handler broadcasts as well, in the midst of whatever collective the signal met, and ranks that got
    it at different places wait for each other for good; its training loop tells all of rank 0's flag before each
    batch. To be called before a stage registers its handlers. Replaced by a handler that leaves collectives alone.
    """
    from lightning.pytorch.trainer.connectors.signal_connector import log
    from lightning_utilities.core.rank_zero import rank_prefixed_message

    connector = trainer._signal_connector

    def flag(number: int, _: Any) -> None:
        log.info(rank_prefixed_message(f"Received SIGTERM: {number}", trainer.local_rank))
        if not connector.received_sigterm and (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)
        connector.received_sigterm = True

    connector._sigterm_notifier_fn = flag


def set_received_sigterm(trainer: Any, received: bool) -> None:
    """Let training end after the step, or not, as where SIGTERM was received.

    Replaced by a public setter of `Trainer.received_sigterm`.
    """
    trainer._signal_connector.received_sigterm = received


@contextmanager
def requeue_signal_counted(trainer: Any, count: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Within, let the signal that SLURM requeues a job by call `count`, and no more.

    To be entered before a stage registers its handlers. Gives a function that does what Lightning's own handler does:
    it saves, which is a collective, and rank 0 requeues. Replaced by a handler that leaves collectives alone.
    """
    connector = trainer._signal_connector
    handle = connector._slurm_sigusr_handler_fn
    connector._slurm_sigusr_handler_fn = lambda number, frame: count()
    try:
        yield lambda: handle(trainer._accelerator_connector.cluster_environment.requeue_signal, None)
    finally:
        del connector._slurm_sigusr_handler_fn


@contextmanager
def called_before_batches(trainer: Any, function: Callable[[], Any]) -> Iterator[None]:
    """Within, call `function` before each batch that is trained on is fetched, when the last one is all done with.

    Replaced by a hook of Strategy before the next batch is asked for.
    """
    loop = trainer.fit_loop.epoch_loop
    advance = loop.advance

    def advance_after(fetcher: Any) -> None:
        # Resumed where a validation is due by the number of batches, the loop counts the last one twice for loggers.
        timed = getattr(trainer, "_val_check_time_interval", None) is not None
        counted_twice = not timed and loop._should_check_val_fx(fetcher)
        loop._batches_that_stepped -= counted_twice
        function()
        loop._batches_that_stepped += counted_twice
        advance(fetcher)

    loop.advance = advance_after
    try:
        yield
    finally:
        del loop.advance


def evaluation_is_empty(trainer: Any) -> bool:
    """Whether the evaluation that is about to begin is known to have no batch, if only by looking for one.

    Replaced by a public property of the Trainer for its active loop.
    """
    fetcher = trainer._active_loop._data_fetcher
    return fetcher.length == 0 or (fetcher.length is None and not getattr(fetcher, "batches", True))


def call_when_exhausted(trainer: Any, function: Any) -> None:
    """Call `function` when the evaluation that is about to begin asks for a batch and there is none.

    Replaced by a hook of Strategy between the last batch of an evaluation and what is computed of all.
    """
    fetcher = trainer._active_loop._data_fetcher
    kind: Any = type(fetcher)

    class Fetcher(kind):  # type: ignore[misc]
        def __next__(self) -> Any:
            try:
                return super().__next__()
            except StopIteration:
                function()
                raise

    fetcher.__class__ = Fetcher


def pruning_originals(pruning: Any) -> list[Any]:
    """Copies of layers, as they were at first, that a ModelPruning callback goes back to.

    Replaced by a public property of the callback.
    """
    return [layer["data"] for layer in (pruning._original_layers or {}).values()]


def skips_backward(trainer: Any) -> bool:
    """Whether no backward follows the training step under way, as where averaged weights gather their statistics.

    Replaced by a public property of the fit loop.
    """
    return bool(trainer.fit_loop._skip_backward)


def before_transfer(module: Any, batch: Any) -> Any:
    """`batch` as the module's, or its datamodule's, `on_before_batch_transfer` makes it.

    Replaced by a public method of the strategy, as `Strategy.batch_to_device` is for the hooks that follow.
    """
    return module._on_before_batch_transfer(batch)


def logs_hparams(owner: Any) -> bool:
    """Whether a module or datamodule has hyper-parameters that Lightning logs: those of `save_hyperparameters()`.

    Replaced by a public property of HyperparametersMixin.
    """
    return bool(owner._log_hyperparams)


def logs_checkpoints(logger: Any) -> bool:
    """Whether `logger` takes the files that checkpoint callbacks write, as with `log_model`.

    Replaced by a public property of Logger.
    """
    hook = getattr(type(logger), "after_save_checkpoint", None)
    if hook in (None, Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint):
        return False
    # Neptune's has a name of its own, until Lightning 2.6.1.
    return all(getattr(logger, name, True) is not False for name in ("_log_model", "_log_model_checkpoints"))


def asked_by_batch_size_finder() -> bool:
    """Whether the property that calls this is asked, through the Trainer, by one of Lightning's two refusals to search.

    Replaced by a way for a strategy to say that the batch size finder works with it; what these two ask instead is
    whether loaders are to be divided among ranks, and nobody else may get another answer.
    """
    from lightning.pytorch.callbacks import BatchSizeFinder
    from lightning.pytorch.tuner.tuning import _check_scale_batch_size_configuration

    frame = inspect.currentframe()
    for _ in range(3):
        frame = frame and frame.f_back
    return frame is not None and frame.f_code in (
        BatchSizeFinder.setup.__code__,
        _check_scale_batch_size_configuration.__code__,
    )


def set_dataset_length(loop: Any, length: Callable[[Callable[[], int]], int]) -> None:
    """Let the batch size finder take the data of `loop`, whose loaders are made, to be `length(own)` samples long.

    Replaced by a finder that asks all ranks.
    """
    loader = loop._combined_loader
    if loader is not None and "_dataset_length" not in vars(loader):
        loader._dataset_length = partial(length, loader._dataset_length)


def searched_attribute(finder: Any, module: Any) -> str | None:
    """The attribute of `module`, or of its hparams or datamodule, that a finder of Lightning sets; None for none.

    Replaced by public names in BatchSizeFinder and LearningRateFinder.
    """
    from lightning.pytorch.callbacks import BatchSizeFinder
    from lightning.pytorch.tuner.lr_finder import _determine_lr_attr_name

    if isinstance(finder, BatchSizeFinder):
        return finder._batch_arg_name
    return _determine_lr_attr_name(module, finder._attr_name) if finder._update_attr else None


@contextmanager
def around_hooks(trainer: Any, around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within, every hook of the module, its datamodule and the callbacks that `trainer` calls runs in `around(name)`.

    Replaced by a public way to run code around hooks; Lightning calls each in a section of its profiler by this name.
    """
    profiler = trainer.profiler
    before = vars(profiler).get("profile")
    inner = profiler.profile

    @contextmanager
    def profile(action: str) -> Iterator[Any]:
        user = action.startswith(("[LightningModule]", "[LightningDataModule]", "[Callback]"))
        with inner(action) as section, around(action.rpartition(".")[2]) if user else nullcontext():
            yield section

    profiler.profile = profile
    try:
        yield
    finally:
        del profiler.profile
        if before is not None:
            profiler.profile = before
