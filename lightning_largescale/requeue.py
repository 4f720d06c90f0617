"""The signal by which SLURM says that time is up, heeded where all ranks are at the same place.

Lightning's handler saves a checkpoint at once, wherever the signal meets a rank. Saving is a collective, and ranks that
are told at different places of their steps would wait for one another for good; in the midst of an optimizer's step
weights are half old, half new. Here the signal is counted, and ranks compare their counts before each step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from lightning_largescale import comm, compat


class Requeue:
    """Saves a checkpoint and requeues the job, once for each signal, however many ranks it reaches.

    Args:
        trainer: about to register its handlers of signals, on SLURM.
        environment: of SLURM.
        device: of this rank.
        has_peers: whether there are other ranks, with which this one is to agree.
        before_save: called on all ranks before the checkpoint is made.
    """

    def __init__(
        self,
        trainer: Trainer,
        environment: SLURMEnvironment,
        device: torch.device,
        *,
        has_peers: bool,
        before_save: Callable[[], None],
    ) -> None:
        self._trainer, self._device, self._has_peers = trainer, device, has_peers
        self._before_save = before_save
        self._signal = environment.requeue_signal
        self._received = self._heeded = 0
        self._undo = contextlib.ExitStack()
        self._save_and_requeue = self._undo.enter_context(compat.requeue_signal_counted(trainer, self._receive))
        self._undo.enter_context(compat.called_before_batches(trainer, self.meet))

    def undo(self) -> None:
        """Let the trainer's next stage run as Lightning has it."""
        self._undo.close()

    def meet(self, going: bool = True) -> bool:
        """Save and requeue if any rank was signalled since it was done last: a collective where there are peers.

        Args:
            going: whether this rank is where it may stop; where one may not, a signal waits for the next meeting.

        Returns:
            Whether any rank is `going`.
        """
        received, any_going, any_not = self._received, going, not going
        if self._has_peers:
            numbers = torch.tensor([received, going, not going], device=self._device)
            comm.all_reduce(numbers, dist.ReduceOp.MAX)
            received, any_going, any_not = numbers.tolist()
        # Resumed from a sanity check, the loops would take it for a validation of the epoch.
        if received > self._heeded and not any_not and not self._trainer.sanity_checking:
            self._heeded = received
            self._before_save()
            self._save_and_requeue()
            if self._signal == signal.SIGTERM:
                compat.set_received_sigterm(self._trainer, True)
        return bool(any_going)

    def _receive(self) -> None:
        self._received += 1
        if self._signal == signal.SIGTERM:
            # It ends training too: on all ranks at once, and not before the checkpoint is made.
            compat.set_received_sigterm(self._trainer, False)
