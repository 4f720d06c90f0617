"""Private APIs of Lightning: the Trainer, its loops, callbacks and loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import LayerSync


def attach_trainer(module: Any, trainer: Any) -> None:
    """Make `module.trainer` be `trainer`, of any type, without a Fabric; the attributes are plain and can be restored.

    Replaced by `LightningModule.trainer`'s setter, if it did not change submodules.
    """
    module.__dict__["_trainer"] = trainer
    module.__dict__["_fabric"] = None


def attached_trainer(module: Any) -> Any:
    """Return the trainer of `module`, or None.

    Replaced by `LightningModule.trainer`, if it returned None instead of raising.
    """
    return module.__dict__.get("_trainer")


def layer_sync(strategy: Any) -> LayerSync | None:
    """Return the plugin of `Trainer(sync_batchnorm=True)`, which replaces layers of a module; None without it.

    Replaced by a public attribute of Strategy.
    """
    found: LayerSync | None = strategy._layer_sync
    return found


def flag_sigterm_only(trainer: Any) -> None:
    """Have SIGTERM only set the flag that ends training after the step, and signal the processes of this one.

    Lightning's own handler also broadcasts, in the middle of any collective that the signal interrupted, so that ranks
    that receive it at different places wait for each other forever; its training loop broadcasts rank 0's flag before
    each batch. To be called before a stage registers its handlers. Replaced by a handler without collectives.
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
    """Set whether training ends after the step, as it does after SIGTERM.

    Replaced by a public setter of `Trainer.received_sigterm`.
    """
    trainer._signal_connector.received_sigterm = received


@contextmanager
def requeue_signal_counted(trainer: Any, count: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Context in which the signal by which SLURM requeues a job calls `count`, and nothing else.

    To be entered before a stage registers its handlers. Yields a function that runs Lightning's own handler: it saves,
    which is a collective, and rank 0 requeues. Replaced by a handler without collectives.
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
    """Context in which `function` is called before each training batch is fetched, after all work on the last one.

    Replaced by a hook of Strategy before the next batch is fetched.
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
    """Return whether the evaluation that is about to begin has no batch, as far as its fetcher knows.

    Replaced by a public property of the Trainer for its active loop.
    """
    fetcher = trainer._active_loop._data_fetcher
    return fetcher.length == 0 or (fetcher.length is None and not getattr(fetcher, "batches", True))


def call_when_exhausted(trainer: Any, function: Any) -> None:
    """Call `function` when the evaluation that is about to begin fetches a batch and there is none.

    Replaced by a hook of Strategy between the last batch of an evaluation and the computation of its results.
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


def skips_backward(trainer: Any) -> bool:
    """Return whether no backward follows the current training step, as when averaged weights gather statistics.

    Replaced by a public property of the fit loop.
    """
    return bool(trainer.fit_loop._skip_backward)


def pruning_originals(pruning: Any) -> list[Any]:
    """Return the copies of the initial layers that a ModelPruning callback keeps.

    Replaced by a public property of the callback.
    """
    return [layer["data"] for layer in (pruning._original_layers or {}).values()]


def logged_hparams(owner: Any) -> Mapping[str, Any]:
    """Return the hyper-parameters of a module or datamodule that Lightning logs; empty if it logs none.

    Replaced by a public property of HyperparametersMixin, and of LightningCLI for the entry that it adds.
    """
    if not owner._log_hyperparams:
        return {}
    return {name: value for name, value in owner.hparams_initial.items() if name != "_class_path"}


def logs_checkpoints(logger: Any) -> bool:
    """Return whether `logger` uploads the files that checkpoint callbacks write, as with `log_model`.

    Replaced by a public property of Logger.
    """
    hook = getattr(type(logger), "after_save_checkpoint", None)
    if hook in (None, Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint):
        return False
    # Neptune's attribute has a name of its own, until Lightning 2.6.1.
    return all(getattr(logger, name, True) is not False for name in ("_log_model", "_log_model_checkpoints"))


@contextmanager
def around_hooks(trainer: Any, around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Context in which every hook of the module, its datamodule and callbacks that `trainer` calls runs in
    `around(name)`.

    Replaced by a public way to run code around hooks; Lightning runs each in a section of its profiler of this name.
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
