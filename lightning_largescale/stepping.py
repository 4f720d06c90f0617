"""SteppingStrategy: the steps of a module that may be divided or replicated, and their backward."""

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
from lightning_largescale.parallel.gather import (
    begin_backward,
    end_backward,
    forget_step,
    is_of_shards,
    meet,
    no_reduction,
    note_read,
    optimizing,
    reshard,
    run_step,
    sharded_in_place,
    sharded_state,
)
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.lookups import Lookups
from lightning_largescale.parallel.numbers import WholeNumbers
from lightning_largescale.parallel.replicate import Replica, told_of_reentry
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
    """Runs the module's steps with its parameters gathered, or its gradients reduced, as the module was set up."""

    # What setup has found the module to need; None where it is not replicated, or the heap is left alone.
    _replica: Replica | None = None
    _trim_heap: HeapTrimmer | None = None
    _uneven: UnevenSteps | None = None
    # None where no cluster requeues the job.
    _requeue: Requeue | None = None
    _known: KnownParameters | None = None
    _lookups: Lookups | None = None
    # Of the ranks that compute the same samples; None where there are no such.
    _tensor_mesh: DeviceMesh | None = None
    # Steps whose first batch was compared among them.
    _compared: frozenset[str] = frozenset()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # What reads for the user's code that is under way, the innermost last.
        self._reads: list[FullReads] = []
        # Those of the optimizer's step that is under way, where they are whole.
        self._numbers_of_step: contextlib.ExitStack | None = None

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """The loader; to train from, one that has as many batches on every rank.

        Workers that Lightning seeds by rank draw the same where ranks compute the same samples.
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
        """The module's, through what reduces its gradients.

        Raises:
            PlanError: the module has other parameters to train than when it was set up.
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
        """The module's, with its parameters gathered."""
        with self._reading(in_step=True):
            return self._step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with its parameters gathered."""
        with self._reading(in_step=True):
            return self._step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with its parameters gathered."""
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
        """Let a backward that the user runs inside the step begin as one that the step's output began."""
        module = self._module()
        if self._lookups is not None:
            if not module.automatic_optimization:
                self._lookups.join()
            # What is pending would be taken for this one's.
            self._lookups.check_sent()
            compat.call_after_backward(closure_loss, partial(self._send_rows, self._lookups))
        if self._replica is not None:
            self._replica.prepare(closure_loss)
        elif not module.automatic_optimization and sharded_state(module):
            begin_backward(module, closure_loss)

    def _send_rows(self, lookups: Lookups) -> None:
        """Send gradients of rows to their ranks, when none has others to compute."""
        if lookups.synchronize:
            meet(self._module())
        lookups.end_backward()

    def _adapt_backward(self) -> None:
        """Make `_own_backward` this strategy's `backward` until teardown, where Lightning's is not enough.

        Elsewhere Lightning's own stays, which may be wrapped on its class.
        """
        if self._replica is not None or self._is_divided():
            self.backward = self._own_backward  # type: ignore[method-assign]
            self._undo.callback(delattr, self, "backward")

    def _own_backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module's backward, apart from the reads in hooks and steps around it.

        Raises:
            PlanError: it reenters itself where that was not to be seen before, or the step has made parameters that are
                to be trained.
        """
        with self._not_reading():
            if self._replica is None:
                return super().backward(closure_loss, optimizer, *args, **kwargs)
            with told_of_reentry():
                return self._reduced_backward(self._replica, closure_loss, optimizer, *args, **kwargs)

    def _reduced_backward(
        self, replica: Replica, loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Lightning's sequence, with gradients averaged before the hooks that follow backward look at them."""
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
        """The end of what `pre_backward` began."""
        end_backward(self._module())

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Learn in each epoch which parameters are trained."""
        super().on_train_batch_start(batch, batch_idx)
        if self._replica is not None and batch_idx == 0:
            self._replica.look_again()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """The optimizer's; what scales or clips gradients before it, and hooks after it, find numbers whole. Then holes
        in the heap are given back, where the plan has them given back.

        Raises:
            PlanError: the gradients are this rank's alone.
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
        """Within, `_enter_numbers` and `_leave_numbers` say where numbers about gradients are whole."""
        before = self._numbers_of_step
        with contextlib.ExitStack() as self._numbers_of_step:
            try:
                yield
            finally:
                self._numbers_of_step = before

    def _enter_numbers(self) -> None:
        """Numbers about gradients that are divided are whole from now on, until they are left or the step ends."""
        if self._numbers_of_step is not None and self._is_divided():
            self._numbers_of_step.enter_context(self._numbers())

    def _leave_numbers(self) -> None:
        """What the optimizer computes, and what pages its state, is computed with the tensors as they are."""
        if self._numbers_of_step is not None:
            self._numbers_of_step.close()

    def _numbers(self) -> contextlib.AbstractContextManager[Any]:
        """Within, numbers about gradients that are divided are whole."""
        return WholeNumbers()

    @contextlib.contextmanager
    def _reading(self, *, in_step: bool = False) -> Generator[None, None, None]:
        """Within, the user's code reads what is divided as it would read it whole."""
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
        """Within, what the strategy itself computes is not taken for the code that it runs inside of."""
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
        """A hook of the user's: it reads what is divided as it would read it whole, and between a step and its end
        finds the parameters that have the gradients, also where they are gathered.
        """
        module = self.lightning_module
        # Lightning's own does nothing but run the step.
        runs_step = name == "optimizer_step" and module is not None and not is_overridden(name, module)
        if module is None or runs_step or not self._is_divided():
            yield
            return
        if name == "on_after_backward":
            end_backward(module)
        with contextlib.ExitStack() as hook:
            # Before a backward its parameters are those that the loss was computed with.
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
        """Make good what a step, ended halfway on all ranks, left behind; its gradients are dropped."""
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
        """Divide the tables that the plan names, those that an earlier plan named being whole before.

        Raises:
            PlanError: one of them cannot be divided, or a callback keeps a copy of the module.
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
        """Called when a batch size has been searched for."""

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Within, backward does not communicate gradients, unless hooks look at those of a sharded module after it, or
        its parameters are in another tier: unreduced, its gradients would be whole on the device.
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
        """Until teardown, save and requeue at SLURM's signal where all ranks are between two steps."""
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
        """Heed a signal that came with the last batch."""
        if self._requeue is not None:
            self._requeue.meet()

    @override
    def on_validation_start(self) -> None:
        """Learn how many batches each rank has."""
        self._start_logged_evaluation()

    @override
    def on_test_start(self) -> None:
        """Learn how many batches each rank has."""
        self._start_logged_evaluation()

    @override
    def on_predict_start(self) -> None:
        """Learn how many batches each rank has."""
        self._start_evaluation()

    @override
    def on_validation_end(self) -> None:
        """Drop what evaluation gathered."""
        self._end_evaluation()

    @override
    def on_test_end(self) -> None:
        """Drop what evaluation gathered."""
        self._end_evaluation()

    @override
    def on_predict_end(self) -> None:
        """Drop what evaluation gathered."""
        self._end_evaluation()

    def _start_logged_evaluation(self) -> None:
        if self.has_peers:
            check_not_empty(compat.evaluation_is_empty(self._module().trainer), self.root_device)
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        module = self._module()
        if self.has_peers:
            # Buffers such as running statistics are each rank's own in training; what is saved is rank 0's.
            equal_weights(module.buffers())
            copies = find_copies(callbacks_of(module.trainer), module)
            equal_copies(copies, self.root_device, buffers_only=True)
        if self._is_divided() or self._requeue is not None:
            meet = partial(any_rank, device=self.root_device) if self._requeue is None else self._requeue.meet
            self._uneven = UnevenSteps(module, meet)
            compat.call_when_exhausted(module.trainer, self._end_steps)

    def _end_steps(self) -> None:
        """Drop what evaluation gathered before callbacks come that read or change the shards."""
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
    """Whether a hook is called between a backward that Lightning runs and the next, where gradients that are not
    reduced would be nowhere.
    """
    name = "on_after_backward"
    return module.automatic_optimization and (
        is_overridden(name, module) or any(is_overridden(name, one, Callback) for one in callbacks_of(module.trainer))
    )
