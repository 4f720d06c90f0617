"""Private APIs of Lightning: the data loaders of a loop, and the searches that read them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils._pytree import tree_unflatten


def loader_source(loop: Any) -> Any:
    """Return the source of a loop's loaders; None if the user passed none, or if the loop has its loaders already.

    Replaced by a public way to get the loaders of a loop before it runs.
    """
    if loop._combined_loader is not None or loop._data_source.instance is None or not loop._data_source.is_defined():
        return None
    return loop._data_source


def request_loaders(source: Any) -> Any:
    """Return the loaders of `source`, requested as Lightning does, so that it can replace their samplers later.

    Replaced by a public `Trainer.request_dataloader`; this one records the arguments of the loaders.
    """
    from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader

    return _request_dataloader(source)


def keep_loaders(loop: Any, source: Any, loaders: Any) -> None:
    """Give loaders to a loop when it next requests them, and the result of the user's hook from then on.

    Replaced by a public setter of a loop's loaders.

    Args:
        loop: The loop.
        source: The source of its loaders.
        loaders: What `request_loaders` returned for this source.
    """
    from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource

    # Loaders that were kept before are dropped.
    source = getattr(source, "original", source)
    instance = source.instance

    class KeptSource(_DataLoaderSource):
        original = source

        def dataloader(self) -> Any:
            loop._data_source = source
            if self.instance is instance:
                return loaders
            # The run that these were requested for failed before it took them, and this one has others.
            source.instance = self.instance
            return source.dataloader()

    loop._data_source = KeptSource(source.instance, source.name)


def drop_kept_loaders(loop: Any) -> None:
    """Undo `keep_loaders`, so that the loop calls the user's hook again.

    Replaced by a public setter of a loop's loaders.
    """
    loop._data_source = getattr(loop._data_source, "original", loop._data_source)


def combine_batches(combined: Any, batches: list[Any]) -> Any:
    """Return one batch of each of `combined`'s loaders in the structure that the training step receives.

    Replaced by a public peek of CombinedLoader.
    """
    if combined._mode == "sequential":
        return batches[0]
    return tree_unflatten(batches, combined._spec)


def before_transfer(module: Any, batch: Any) -> Any:
    """Return `batch` after `on_before_batch_transfer` of the module or its datamodule.

    Replaced by a public method of the strategy, as `Strategy.batch_to_device` is for the hooks that follow.
    """
    return module._on_before_batch_transfer(batch)


def asked_by_batch_size_finder() -> bool:
    """Return whether Lightning calls the property that calls this in order to refuse a search of the batch size.

    Two functions of Lightning refuse the search if loaders are to be sharded among ranks; no other caller of the
    property may receive another answer. Replaced by a way for a strategy to say that the search works with it.
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
    """Have the batch size finder take `length(own)` for the number of samples of `loop`, whose loaders exist.

    Replaced by a finder that asks all ranks.
    """
    loader = loop._combined_loader
    if loader is not None and "_dataset_length" not in vars(loader):
        loader._dataset_length = partial(length, loader._dataset_length)


def searched_attribute(finder: Any, module: Any) -> str | None:
    """Return the attribute of `module`, its hparams or its datamodule that a finder of Lightning sets; None for none.

    Replaced by public names in BatchSizeFinder and LearningRateFinder.
    """
    from lightning.pytorch.callbacks import BatchSizeFinder
    from lightning.pytorch.tuner.lr_finder import _determine_lr_attr_name

    if isinstance(finder, BatchSizeFinder):
        return finder._batch_arg_name
    return _determine_lr_attr_name(module, finder._attr_name) if finder._update_attr else None
