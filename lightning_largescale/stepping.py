"""SteppingStrategy: steps and backward of a module that may be sharded or replicated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import HeapTrimmer
from lightning_largescale.parallel.alike import check_equal_batch
from lightning_largescale.parallel.copies import equal_copies, find_copies
from lightning_largescale.parallel.embedding import (
    check_embeddings,
    check_no_copies,
    row_sharded,
    shard_embeddings,
)
from lightning_largescale.parallel.equal import equal_weights
from lightning_largescale.parallel.full_reads import FullReads
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.lookups import Lookups
from lightning_largescale.parallel.numbers import WholeNumbers
from lightning_largescale.parallel.replicate import Replica, told_of_reentry
from lightning_largescale.parallel.sharded import meet, note_read, reshard, sharded_state
from lightning_largescale.parallel.sharded_step import (
    begin_backward,
    end_backward,
    forget_step,
    is_of_shards,
    no_reduction,
    optimizing,
    run_step,
    sharded_in_place,
)
from lightning_largescale.parallel.uneven import UnevenSteps, any_rank, check_not_empty, equal_batches, joined_look_ups
from lightning_largescale.plan import Plan
from lightning_largescale.requeue import Requeue
from lightning_largescale.stateful import StatefulStrategy

_CONTEXTS = {
    "training_step": "train_step_context",
    "validation_step": "val_step_context",
    "test_step": "test_step_context",
    "predict_step": "predict_step_context",
}


class SteppingStrategy(StatefulStrategy):
    """Strategy that runs the module's steps with unsharded parameters (sharded) or reduced gradients (replicated)."""

    # Set by setup; None if the module is not replicated, or the plan does not trim the heap.
    _replica: Replica | None = None
    _trim_heap: HeapTrimmer | None = None
    _uneven: UnevenSteps | None = None
    # None if no cluster requeues the job.
    _requeue: Requeue | None = None
    _known: KnownParameters | None = None
    _lookups: Lookups | None = None
    # Mesh of the ranks that compute the same samples; None if there are none.
    _tensor_mesh: DeviceMesh | None = None
    # Names of the steps whose first batch was compared over `_tensor_mesh`.
    _compared: frozenset[str] = frozenset()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Function modes active around the user's code, the innermost last.
        self._reads: list[FullReads] = []
        # Contexts of the current optimizer step in which scalars of sharded gradients are full.
        self._numbers_of_step: contextlib.ExitStack | None = None

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Return the loader; in training, one that yields the same number of batches on every rank.

        Seed loader workers by data-parallel rank, so that ranks that compute the same samples draw the same numbers.
        """
        seeded = self._tensor_mesh is not None and int(os.environ.get("PL_SEED_WORKERS", 0))
        if seeded and isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None:
            rank = self.distributed_sampler_kwargs["rank"]
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=rank)
        if not (self.is_distributed and self._module().trainer.training):
            return dataloader
        return equal_batches(dataloader, self.root_device)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step, through the DDP replica if the module is replicated.

        Raises:
            PlanError: the module's trainable parameters are not those that it had at setup.
        """
        module = self._module()
        if self._known is not None:
            self._known.check()
        with self._reading(in_step=True):
            if self._replica is not None:
                step = partial(module.training_step, *args, **kwargs)
                with self.precision_plugin.train_step_context(), joined_look_ups(module):
                    return self._replica.run(step)
            result = self._step("training_step", *args, **kwargs)
        if not module.automatic_optimization or compat.skips_backward(module.trainer):
            reshard(module)
        return result

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's validation step with its parameters unsharded."""
        with self._reading(in_step=True):
            return self._step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's test step with its parameters unsharded."""
        with self._reading(in_step=True):
            return self._step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's predict step with its parameters unsharded."""
        with self._reading(in_step=True):
            return self._step("predict_step", *args, **kwargs)

    def _step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if self._uneven is not None:
            self._uneven.start()
        if self._tensor_mesh is not None and name not in self._compared:
            self._compared |= {name}
            check_equal_batch(args, self._tensor_mesh)
        context = getattr(self.precision_plugin, _CONTEXTS[name])
        with context(), joined_look_ups(module):
            return run_step(module, name, *args, **kwargs)

    @override
    def _meet_peers(self) -> None:
        if self.lightning_module is not None:
            meet(self.lightning_module)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare gradient reduction for the backward of `closure_loss`, also one that a manual step runs."""
        module = self._module()
        if self._lookups is not None:
            if not module.automatic_optimization:
                self._lookups.join()
            # Pending row gradients would be attributed to this backward.
            self._lookups.check_sent()
            compat.call_after_backward(closure_loss, partial(self._send_rows, self._lookups))
        if self._replica is not None:
            self._replica.prepare(closure_loss)
        elif not module.automatic_optimization and sharded_state(module):
            begin_backward(module, closure_loss)

    def _send_rows(self, lookups: Lookups) -> None:
        """Send gradients of embedding rows to the ranks that own them, after all ranks have met."""
        if lookups.synchronize:
            meet(self._module())
        lookups.end_backward()

    def _adapt_backward(self) -> None:
        """Make `_own_backward` this strategy's `backward` until teardown, if the module is replicated or sharded.

        Otherwise Lightning's own method stays, which may be wrapped on its class.
        """
        if self._replica is not None or self._is_divided():
            self.backward = self._own_backward  # type: ignore[method-assign]
            self._undo.callback(delattr, self, "backward")

    def _own_backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module's backward with the `FullReads` mode of the surrounding hook or step suspended.

        Raises:
            PlanError: the backward is reentrant, which could not be detected earlier, or the step created trainable
                parameters.
        """
        with self._not_reading():
            if self._replica is None:
                return super().backward(closure_loss, optimizer, *args, **kwargs)
            with told_of_reentry():
                return self._reduced_backward(self._replica, closure_loss, optimizer, *args, **kwargs)

    def _reduced_backward(
        self, replica: Replica, loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run Lightning's backward sequence, and average the gradients before the hooks that follow read them."""
        module, precision = self._module(), self.precision_plugin
        self.pre_backward(loss)
        if is_overridden("backward", module) and loss.requires_grad:
            compat.call_after_backward(loss, replica.finish_within)
        loss = precision.pre_backward(loss, module)
        precision.backward(loss, module, optimizer, *args, **kwargs)
        if self._known is not None:
            self._known.check()
        replica.finish()
        loss = precision.post_backward(loss, module)
        self.post_backward(loss)
        return loss

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """End the backward that `pre_backward` began."""
        end_backward(self._module())

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the replica find out again, once per epoch, which parameters are trained."""
        super().on_train_batch_start(batch, batch_idx)
        if self._replica is not None and batch_idx == 0:
            self._replica.look_again()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the optimizer's step, then return free heap memory to the system if the plan says so.

        Code that scales or clips gradients before the step, and hooks after it, read full scalars of sharded gradients.

        Raises:
            PlanError: the gradients are local to this rank: they were not reduced.
        """
        if not self._module().automatic_optimization:
            self._check_reduced(optimizer)
        with self._not_reading(), self._optimizer_steps(), optimizing(self._module()) as in_step:

            def run() -> Any:
                self._leave_numbers()
                result = in_step(closure)
                self._check_reduced(optimizer)
                self._enter_numbers()
                return result

            result = super().optimizer_step(optimizer, run, *args, **kwargs)
        if self._trim_heap is not None:
            self._trim_heap()
        return result

    def _check_reduced(self, optimizer: Optimizer) -> None:
        if self._replica is not None and self._replica.unreduced:
            raise PlanError(
                f"{type(optimizer).__name__}.step was called with gradients of loss.backward(), which are each rank's"
                " own; run one backward of one loss in a `backward` of your own, or, under manual optimization, call"
                " self.manual_backward(loss), which averages them over the ranks."
            )

    @contextlib.contextmanager
    def _optimizer_steps(self) -> Generator[None, None, None]:
        """Context in which `_enter_numbers` and `_leave_numbers` toggle full scalars of sharded gradients."""
        before = self._numbers_of_step
        with contextlib.ExitStack() as self._numbers_of_step:
            try:
                yield
            finally:
                self._numbers_of_step = before

    def _enter_numbers(self) -> None:
        """Make scalars of sharded gradients full until `_leave_numbers` or the end of the step."""
        if self._numbers_of_step is not None and self._is_divided():
            self._numbers_of_step.enter_context(self._numbers())

    def _leave_numbers(self) -> None:
        """End `_enter_numbers`, so that the optimizer and its paging compute with the sharded tensors themselves."""
        if self._numbers_of_step is not None:
            self._numbers_of_step.close()

    def _numbers(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which scalars of sharded gradients are full."""
        return WholeNumbers()

    @contextlib.contextmanager
    def _reading(self, *, in_step: bool = False) -> Generator[None, None, None]:
        """Context in which the user's code reads sharded tensors as if they were full."""
        if not self._is_divided():
            yield
            return
        module = self._module()
        reading = FullReads(in_step=in_step, losses=not module.automatic_optimization, note=partial(note_read, module))
        with self._not_reading(), reading as reads:
            self._reads.append(reads)
            try:
                yield
            finally:
                self._reads.remove(reads)

    @contextlib.contextmanager
    def _not_reading(self) -> Generator[None, None, None]:
        """Context that suspends `_reading` while the strategy itself computes inside user code."""
        reads = self._reads[-1] if self._reads else None
        if reads is None or reads.suspended:
            yield
            return
        reads.suspended = True
        try:
            yield
        finally:
            reads.suspended = False

    @contextlib.contextmanager
    def _around_hook(self, name: str) -> Generator[None, None, None]:
        """Context of a user's hook, which reads sharded tensors as if they were full.

        In training, other than before a backward, the module's parameters are the shards that hold the gradients, also
        where they are unsharded at the time.

        Raises:
            PlanError: the hook called a function that torch does not support on sharded tensors.
        """
        module = self.lightning_module
        # Lightning's own hook only runs the step.
        runs_step = name == "optimizer_step" and module is not None and not is_overridden(name, module)
        if module is None or runs_step or not self._is_divided():
            yield
            return
        if name == "on_after_backward":
            end_backward(module)
        with contextlib.ExitStack() as hook:
            # Before a backward, the parameters are those that the loss was computed with.
            if module.trainer.training and name not in ("optimizer_step", "on_before_backward"):
                hook.enter_context(sharded_in_place(module))
            hook.enter_context(self._reading())
            try:
                yield
            except RuntimeError as error:
                if not is_of_shards(error):
                    raise
                raise PlanError(
                    f"{name} computed with sharded tensors what torch does not compute of them; do it in `with"
                    f" trainer.strategy.full_parameters():` on all ranks, or with their to_local() ({error})."
                ) from error

    def forget_step(self) -> None:
        """Reset all state of a step that ended halfway on all ranks, and drop its gradients."""
        module = self._module()
        self._uneven = None
        for adapted in self._adapted:
            adapted.forget_step()
        if self._lookups is not None:
            self._lookups.forget()
        if self._replica is not None:
            self._replica.forget_step()
        elif sharded_state(module):
            forget_step(module)
        module.zero_grad()

    def _shard_tables(self, module: LightningModule, plan: Plan) -> None:
        """Shard the embedding tables that the plan names by rows, after unsharding those of a different earlier plan.

        Raises:
            PlanError: a table cannot be sharded, or a callback keeps a copy of the module.
        """
        lookups, names = row_sharded(module), plan.row_sharded_embeddings
        if lookups is not None and not lookups.serves(names, self.world_size):
            self.make_whole()
            lookups = None
        if lookups is None and names:
            check_embeddings(module, names, plan.world_size, plan.wrapped_modules)
            if plan.world_size > 1:
                check_no_copies(find_copies(callbacks_of(module.trainer), module), names)
                lookups = shard_embeddings(module, names, self.root_device)
        self._lookups = lookups
        self._undo.callback(setattr, self, "_lookups", None)

    def on_search_end(self) -> None:
        """Hook called at the end of a batch size search."""

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Context in which backward does not reduce gradients.

        It still reduces those of a sharded module if hooks read them after backward, or if its parameters are
        offloaded: unreduced gradients would be unsharded on the device.
        """
        module = self._module()
        blocked: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._replica is not None:
            blocked = self._replica.no_reduction()
        elif sharded_state(module) and self.plan.offload_parameters is None and not _looks_after_backward(module):
            blocked = no_reduction(module)
        if self._lookups is not None:
            self._lookups.synchronize = False
        try:
            with blocked:
                yield
        finally:
            if self._lookups is not None:
                self._lookups.synchronize = True

    def _heed_requeue_signal(self, trainer: Trainer) -> None:
        """Save and requeue the job on SLURM's signal, once all ranks are between two steps, until teardown."""
        environment = self.cluster_environment
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            return
        self._requeue = Requeue(
            trainer,
            environment,
            self.root_device,
            has_peers=self.has_peers,
            before_save=partial(reshard, self._module()),
        )
        self._undo.callback(setattr, self, "_requeue", None)
        self._undo.callback(self._requeue.undo)

    @override
    def on_train_end(self) -> None:
        """Handle a requeue signal that came with the last batch."""
        if self._requeue is not None:
            self._requeue.meet()

    @override
    def on_validation_start(self) -> None:
        """Prepare an evaluation in which ranks may have different numbers of batches."""
        self._start_logged_evaluation()

    @override
    def on_test_start(self) -> None:
        """Prepare an evaluation in which ranks may have different numbers of batches."""
        self._start_logged_evaluation()

    @override
    def on_predict_start(self) -> None:
        """Prepare an evaluation in which ranks may have different numbers of batches."""
        self._start_evaluation()

    @override
    def on_validation_end(self) -> None:
        """Reshard the parameters that evaluation unsharded."""
        self._end_evaluation()

    @override
    def on_test_end(self) -> None:
        """Reshard the parameters that evaluation unsharded."""
        self._end_evaluation()

    @override
    def on_predict_end(self) -> None:
        """Reshard the parameters that evaluation unsharded."""
        self._end_evaluation()

    def _start_logged_evaluation(self) -> None:
        if self.has_peers:
            check_not_empty(compat.evaluation_is_empty(self._module().trainer), self.root_device)
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        module = self._module()
        if self.has_peers:
            # Buffers such as running statistics differ between ranks in training; rank 0's are saved.
            equal_weights(module.buffers())
            copies = find_copies(callbacks_of(module.trainer), module)
            equal_copies(copies, self.root_device, buffers_only=True)
        if self._is_divided() or self._requeue is not None:
            meet = partial(any_rank, device=self.root_device) if self._requeue is None else self._requeue.meet
            self._uneven = UnevenSteps(module, meet)
            compat.call_when_exhausted(module.trainer, self._end_steps)

    def _end_steps(self) -> None:
        """Reshard the parameters that evaluation unsharded, before callbacks read or change the shards."""
        if self._uneven is not None:
            self._uneven.end()
            reshard(self._module())

    def _end_evaluation(self) -> None:
        self._uneven = None
        if self._requeue is not None:
            self._requeue.meet()
        if self.lightning_module is not None:
            reshard(self.lightning_module)


def _looks_after_backward(module: LightningModule) -> bool:
    """Return whether an `on_after_backward` hook runs after a backward of automatic optimization.

    The shards would have no gradients for it if they were not reduced.
    """
    name = "on_after_backward"
    return module.automatic_optimization and (
        is_overridden(name, module) or any(is_overridden(name, one, Callback) for one in callbacks_of(module.trainer))
    )
