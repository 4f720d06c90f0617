import os
import signal

import pytest
import torch

from lightning_largescale.hardware.probe import survives


def die(number):
    os.kill(os.getpid(), number)
    signal.pause()


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGKILL])
def test_death_by_signal_is_told_and_costs_nothing(number, capfd):
    assert survives(lambda: die(number)) is False
    assert capfd.readouterr() == ("", "")


def test_an_exception_or_a_hang_is_no_survival():
    assert survives(lambda: 1 / 0) is False
    assert survives(signal.pause, seconds=0.05) is False


def test_what_runs_survives_also_after_the_parent_used_its_threads():
    a = torch.ones(512, 512)
    for _ in range(5):
        assert (a @ a).sum() == 512**3  # a thread pool that the child does not have
        assert survives(lambda: a @ a)
    threads = torch.get_num_threads()
    assert survives(lambda: torch.ones(3).sum())
    assert torch.get_num_threads() == threads
