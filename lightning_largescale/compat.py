"""Every use of a private torch or Lightning API, one function each, with what would replace it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_unflatten

# The launchers that Lightning's own DDPStrategy uses, as base classes of ours: names rather than functions, since a
# class cannot derive from what a function returns and keep its types. Replaced by public launcher classes.
MultiProcessingLauncher = _MultiProcessingLauncher
SubprocessScriptLauncher = _SubprocessScriptLauncher

# How Lightning's Tuner ends a run once it has found what it searched for. Replaced by a public name for it.
TunerExit = _TunerExitException

# Base class of what sees every operation below autograd, in `__torch_dispatch__`. Replaced by a public name for it.
DispatchMode = TorchDispatchMode


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

    instance = source.instance

    class KeptSource(_DataLoaderSource):
        def dataloader(self) -> Any:
            loop._data_source = source
            if self.instance is instance:
                return loaders
            # The run that these were asked for failed before it took them, and this one has others.
            source.instance = self.instance
            return source.dataloader()

    loop._data_source = KeptSource(source.instance, source.name)


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


def fake_process_group() -> None:
    """Put a group of as many ranks in the place of this process's groups, whose collectives return at once.

    For a fork, which has the connections of the process that it came from and may not use them. Replaced by a public
    way to leave a process group without a word to the others.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, size = dist.get_rank(), dist.get_world_size()
    # Kept, since the end of a group would be told to the others.
    _left.append(distributed_c10d._world)
    distributed_c10d._world = distributed_c10d._World()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


_left: list[Any] = []


def abort_process_groups() -> None:
    """Close all nccl communicators of this process without waiting for the collectives under way.

    Replaced by a public `torch.distributed.abort_process_group`; the public `destroy_process_group` waits.
    """
    from torch.distributed.distributed_c10d import _abort_process_group

    _abort_process_group()


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


def compiled_module(module: Any) -> Any:
    """The module inside what `torch.compile(module)` returned; `module` itself when it is none such.

    Replaced by a public way from an OptimizedModule to the module it wraps.
    """
    from torch import nn

    inner = dict(all_children(module)).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module


def all_children(module: Any) -> list[tuple[str, Any]]:
    """The children of `module` by name, one object as often as it stands there.

    Replaced by `named_children(remove_duplicate=False)`.
    """
    return [(name, child) for name, child in module._modules.items() if child is not None]


def all_gather_tensor(output: Any, tensor: Any) -> None:
    """Gather every rank's `tensor` into `output`, one after the other, over the default process group.

    Replaced by `torch.distributed.all_gather_single` alone once the oldest supported torch has it; torch 2.13 warns of
    the name that torch 2.11 has.
    """
    import torch.distributed as dist

    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, tensor)


def reduce_scatter_tensor(output: Any, tensor: Any) -> None:
    """Sum `tensor` over the ranks of the default process group, each keeping its part in `output`.

    Replaced by `torch.distributed.reduce_scatter_single` alone, as `all_gather_tensor`.
    """
    import torch.distributed as dist

    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(output, tensor)


def fake_tensor_mode() -> Any:
    """A mode under which operations compute shapes and types only; tensors from outside may enter it.

    Replaced by a public FakeTensorMode; imported here since the import takes a second.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def silent_fakes() -> Iterator[None]:
    """Within, an operation that fails on fakes only raises; torch would log where in its own code it did.

    Replaced by a public name for that logger.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_fake(tensor: Any) -> bool:
    """Whether `tensor` has a shape and no data.

    Replaced by a public `torch.is_fake`.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """What a fake tensor raises where an operation needs data: a value, or a shape that follows from values.

    Replaced by public names of these exceptions.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return DataDependentOutputException, DynamicOutputShapeException


def without_dispatch_modes() -> Any:
    """A context in which no dispatch mode is active, so that operations on plain tensors give plain tensors.

    Replaced by a public context; used where a value is read from a tensor that was made outside the modes.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def sequence_number() -> int:
    """The number that the next autograd node made on this thread gets.

    Replaced by a public way to tell which forward code made a node.
    """
    return int(torch._C._autograd._get_sequence_nr())


def current_node_sequence() -> int | None:
    """The number of the autograd node that is running on this thread; None outside backward.

    Replaced by a public `torch.autograd.graph.current_node()` whose order can be asked.
    """
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def mutated_arguments(function: Any) -> tuple[str | int, ...]:
    """Positions, or names of those by keyword only, of the arguments that an operator writes into.

    Replaced by a public `OpOverload.schema`.
    """
    arguments = function._schema.arguments
    return tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def dense_parts(tensor: Any) -> list[Any]:
    """The dense tensors that hold the data of `tensor`: itself; indices and values of a sparse one; else none.

    Replaced by `Tensor.indices` and `Tensor.values`, were they to accept a sparse tensor that is not coalesced.
    """
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def own_tensors(module: Any) -> tuple[MutableMapping[str, Any], MutableMapping[str, Any]]:
    """The parameters and the buffers that `module` itself holds, by name; writing into these replaces them.

    Replaced by `setattr`, were it to accept any tensor as a parameter and leave subclasses' own `__setattr__` alone.
    """
    return module._parameters, module._buffers


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


def init_process_group(environment: Any, backend: str | None, device: Any, timeout: Any) -> str:
    """Connect this process to the others of the cluster `environment`, if it is not yet; the backend that is used.

    Replaced by a public function of Lightning; its strategies call this one.
    """
    from lightning.fabric.utilities.distributed import (
        _get_default_process_group_backend_for_device,
        _init_dist_connection,
    )

    backend = backend or _get_default_process_group_backend_for_device(device)
    device_id = None if device.type == "cpu" else device
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)
    return backend


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


def forget_forward(module: Any) -> None:
    """Let FSDP2 not take the `forward` of `module`, which `fully_shard` was applied to, for its forward any more.

    Replaced by a public way to name the methods that count; `register_fsdp_forward_method` only adds one.
    """
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(module)  # type: ignore[attr-defined]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def undo_sharding(module: Any) -> None:
    """Make `module`, which `fully_shard` was applied to, one that it was not applied to; parameters stay as they are.

    Replaced by a public inverse of `fully_shard`.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(module)  # type: ignore[attr-defined]
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]:
        if group is not None:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
    for handle in handles:
        handle.remove()
    del _module_state_mapping[module]
    for key in (STATE_KEY, REGISTRY_KEY):
        vars(module).pop(key, None)
    module.__class__ = type(module).__mro__[2]
    for part in module.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(part).pop(name, None)


@contextmanager
def without_gathering(module: Any) -> Iterator[None]:
    """Within, a forward of `module`, which `fully_shard` was applied to, uses the parameters that it finds there.

    Replaced by a public switch of FSDP2 for a block of code, as FSDP1 had `summon_full_params`.
    """
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(module)  # type: ignore[attr-defined]
    before = [
        (state._pre_forward_hook_handle.id, module._forward_pre_hooks, dict(module._forward_pre_hooks)),
        (state._post_forward_hook_handle.id, module._forward_hooks, dict(module._forward_hooks)),
    ]
    for handle, hooks, _ in before:
        hooks.pop(handle, None)
    try:
        yield
    finally:
        for _, hooks, ordered in before:
            added = {key: hook for key, hook in hooks.items() if key not in ordered}
            hooks.clear()
            hooks.update(ordered)
            hooks.update(added)


def sharding_attributes() -> set[str]:
    """Names of what `fully_shard` puts among a module's attributes.

    Replaced by a public way to take the sharding off a module or its copy.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return {STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"}


def before_transfer(module: Any, batch: Any) -> Any:
    """`batch` as the module's, or its datamodule's, `on_before_batch_transfer` makes it.

    Replaced by a public method of the strategy, as `Strategy.batch_to_device` is for the hooks that follow.
    """
    return module._on_before_batch_transfer(batch)


def version(tensor: Any) -> int:
    """A number that grows with the operations that write into `tensor`.

    Replaced by a public `torch.Tensor.version`; to compare values would make a device wait.
    """
    return int(tensor._version)


def leaves(tree: Any) -> list[Any]:
    """What `tree`, of nested containers, holds that is none, as FSDP2 finds the tensors of a forward's output.

    Replaced by a public name for `torch.utils._pytree.tree_leaves`.
    """
    from torch.utils._pytree import tree_leaves

    return list(tree_leaves(tree))


def hook_nearest(optimizer: Any, before: Any, after: Any) -> Any:
    """Call `before` as the last before a step of `optimizer` and `after` as the first after it; what removes both.

    Replaced by a `prepend` argument of `Optimizer.register_step_post_hook`.
    """
    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    optimizer._optimizer_step_post_hooks.move_to_end(handles[1].id, last=False)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def logs_hparams(owner: Any) -> bool:
    """Whether a module or datamodule has hyper-parameters that Lightning logs: those of `save_hyperparameters()`.

    Replaced by a public property of HyperparametersMixin.
    """
    return bool(owner._log_hyperparams)


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


def forget_sharded_step(module: Any) -> None:
    """Let FSDP2 forget the step of `module`, the root, that was under way: gradients not yet reduced are dropped.

    Replaced by `FSDPModule.reset_iter_state` alone, were it to drop gradients of gathered parameters; torch 2.11 has
    no such method.
    """
    from torch.distributed.fsdp import fully_shard

    root = fully_shard.state(module)  # type: ignore[attr-defined]
    states = root._state_ctx.all_states
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    for group in groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
        return
    root._device_handle.synchronize()
    idle = type(root._training_state).IDLE
    for group in groups:
        if group._all_gather_result is not None and group._all_gather_result.all_gather_work is not None:
            group._all_gather_result.all_gather_work.wait()
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = group._partial_reduce_output = None
        group._post_forward_indices.clear()
        group._training_state = idle
        group._to_sharded()
    for state in states:
        state._training_state = idle
    root._comm_ctx.all_gather_state = root._comm_ctx.reduce_scatter_state = None
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


def foreach_kind(function: Any) -> str | None:
    """What a function of torch does to the list of tensors that it takes first: "norms" of each, "unscale" them as a
    GradScaler does, or change them "in place"; None for every other function.

    Replaced by public names of `torch._foreach_norm` and the like, which torch.nn.utils and torch.amp call.
    """
    name = getattr(function, "__name__", "")
    if name == "_amp_foreach_non_finite_check_and_unscale_":
        return "unscale"
    if name == "_foreach_norm":
        return "norms"
    return "in place" if name.startswith("_foreach_") and name.endswith("_") else None
