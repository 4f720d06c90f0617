"""Failures as ranks tell them to each other; the ranks here are threads, the process group is of one."""

import socket
import threading

import pytest
import torch.distributed as dist

from lightning_largescale.failures import PeerFailures, tell_in_one_line, told_in_one_line
from lightning_largescale.hub import LOST, Hub


@pytest.fixture
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(ranks, describe=lambda rank: None):
    hub = Hub("127.0.0.1", ranks, describe)
    hub.start()
    peers = [PeerFailures() for _ in range(ranks)]
    for rank, peer in enumerate(peers):
        peer.connect(rank, hub.endpoint)
    return hub, peers


def vanish(peer):
    """Do what the system does for a process that it kills; this one lives on, so its watcher is told."""
    peer._over.set()
    peer._lines.close()


def broken_connection():
    return RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


def test_the_first_failure_is_told_in_place_of_those_that_follow(group):
    hub, (zero, one) = meet(2)
    error, follows = ValueError("boom"), broken_connection()
    one.report(error)
    zero.report(follows)
    assert told_in_one_line(error) is None
    assert told_in_one_line(follows) == "rank 0 stops: rank 1 failed first, with ValueError: boom"
    assert not dist.is_initialized()
    hub.join()


def test_ranks_that_fail_alike_stay_connected(group):
    hub, (zero, one) = meet(2)
    errors = [ValueError("boom"), ValueError("boom")]
    threads = [
        threading.Thread(target=peer.report, args=(error,)) for peer, error in zip((zero, one), errors, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [told_in_one_line(error) is None for error in errors].count(True) == 1
    assert dist.is_initialized()
    hub.join()


@pytest.mark.parametrize("known", ["was killed by signal 9 (SIGKILL)", None])
def test_a_rank_that_is_gone_is_named(known):
    hub, (zero, one) = meet(2, lambda rank: known)
    vanish(one)
    follows = broken_connection()
    zero.report(follows)
    assert told_in_one_line(follows) == f"rank 0 stops: rank 1 {known or LOST}"
    hub.join()


def test_a_connection_that_nobody_explains_keeps_its_traceback():
    hub, (zero, one) = meet(2)
    follows = broken_connection()
    zero.report(follows)
    assert told_in_one_line(follows) is None
    one.report(error := broken_connection())
    assert "rank 0" in told_in_one_line(error)
    hub.join()


def test_a_rank_that_finished_may_go():
    hub, (zero, one) = meet(2)
    one.finish()
    zero.report(error := ValueError("boom"))
    assert told_in_one_line(error) is None
    hub.join()


def test_rank_zero_that_is_gone_is_named():
    hub, (zero, one) = meet(2)
    vanish(zero)
    one.report(error := broken_connection())
    assert told_in_one_line(error) == f"rank 1 stops: rank 0 {LOST}"
    hub.join()


def test_strangers_are_not_heard():
    hub, (zero,) = meet(1)
    stranger = socket.create_connection(hub.endpoint[:2])
    stranger.sendall(b'{"rank": 0, "token": "guess"}\n{"failed": {"rank": 1, "what": "lie"}}\n')
    zero.report(error := ValueError("boom"))
    assert told_in_one_line(error) is None
    stranger.close()
    hub.join()


def test_without_a_hub_nothing_is_said():
    peer = PeerFailures()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    peer.connect(1, ("127.0.0.1", port, ""))
    peer.report(error := ValueError("boom"))
    assert told_in_one_line(error) is None


def test_what_is_raised_meanwhile_is_told_alike():
    error = broken_connection()
    tell_in_one_line(error, "line")
    later = OSError("in a handler")
    later.__context__ = error
    assert told_in_one_line(later) == "line"
    assert told_in_one_line(None) is None
