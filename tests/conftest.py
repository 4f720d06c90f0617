"""What all tests share: a cache of their own, Python processes of their own, CUDA tests where there is CUDA or where it
is pretended.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from ranks import Ranks


_WITHOUT_CUDA = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretend-cuda", action="store_true", help="have the gpu tests run on a pretended device")


def pytest_configure(config: pytest.Config) -> None:
    # A session started in the background of a script ignores Ctrl-C, and so would every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # No test is about time: on a busy machine an example may take any.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    config.stash[_WITHOUT_CUDA] = "no CUDA device"
    if config.getoption("--pretend-cuda"):
        # Before test modules ask for a device, and before ranks are forked.
        from pretend_cuda import plugin

        config.stash[_WITHOUT_CUDA] = plugin.load(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    for item in wanted:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=config.stash[_WITHOUT_CUDA]))
        elif torch.version.cuda is None and any(mark.kwargs.get("real") for mark in item.iter_markers("gpu")):
            item.add_marker(pytest.mark.skip(reason="measures a real CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calibration is neither read from the user's cache nor written there; processes started by tests inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LARGESCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _given_rates() -> Iterator[None]:
    """Auto strategies, of ranks and forks too, plan by the same rates on every machine, however busy it is."""
    from rates import give_rates

    from lightning_largescale.hardware import Hardware

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hardware, "calibrate", give_rates)
        yield


@pytest.fixture(scope="session", autouse=True)
def _all_ranks(request: pytest.FixtureRequest, _own_cache: None, _given_rates: None) -> Iterator[dict[int, Ranks]]:
    """Ranks for all tests, started before any test: what is forked from a process that has differentiated cannot do so
    itself where torch is built for CUDA.
    """
    # Tests that ask for them by name only when they run have imported what makes them.
    if "ranks" not in sys.modules and not any(
        {"two", "four"} & set(item.fixturenames) for item in request.session.items
    ):
        yield {}
        return
    from ranks import ranks

    # All test modules are imported by now: what they hold is passed over by each collection of a fit from here on, in
    # forks too.
    gc.collect()
    gc.freeze()
    with ranks(2) as two, ranks(4) as four:
        yield {2: two, 4: four}


@pytest.fixture(scope="session")
def two(_all_ranks: dict[int, Ranks]) -> Ranks:
    """Two processes that run functions as ranks."""
    return _all_ranks[2]


@pytest.fixture(scope="session")
def four(_all_ranks: dict[int, Ranks]) -> Ranks:
    """Four processes that run functions as ranks."""
    return _all_ranks[4]


@pytest.fixture
def start_python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -c code` in an empty folder, `environment` added to ours; it is killed if the test leaves it."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, **environment: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run_python(start_python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Run `python -c code` to its end and give what it printed; the test fails with its traceback where it fails."""

    def run(code: str, **environment: str) -> str:
        process = start_python(code, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out + err

    return run
