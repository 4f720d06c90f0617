"""Failures in words; how the hub tells them is in test_failures.py, by ranks that talk to it."""

import signal

import pytest
import torch.distributed as dist

from lightning_largescale.hub import Failure, describe_exit, is_connection_loss


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (dist.DistBackendError("nccl"), True),
        (ConnectionResetError(), True),
        (RuntimeError("shapes differ"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_is_connection_loss(error, loss):
    assert is_connection_loss(error) is loss


def test_a_failure_keeps_its_traceback():
    try:
        raise ValueError("boom")
    except ValueError as error:
        failure = Failure.of(3, error)
    assert (failure.rank, failure.what, failure.lost) == (3, "ValueError: boom", False)
    assert "test_a_failure_keeps_its_traceback" in failure.trace


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, None),
        (0, None),
        (3, "ended with exit status 3; its own error is above"),
        (-signal.SIGKILL, "was killed by signal 9 (SIGKILL); running out of memory is the usual cause"),
        (-signal.SIGSEGV, "was killed by signal 11 (SIGSEGV)"),
    ],
)
def test_describe_exit(code, words):
    assert describe_exit(code) == words
