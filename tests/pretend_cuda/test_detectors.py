"""Each synchronisation of the package, broken: the pretended device sees it, by a report or by other numbers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_largescale
import pretend_cuda
from pretend_cuda import breaking
from pretend_cuda.breaking import BREAKS, SCENARIOS, Break

PACKAGE = Path(lightning_largescale.__file__).parent
Run = Callable[[str, Path], dict[str, Any]]

SYNCHRONISES = re.compile(
    r"\.(wait_stream|wait_event|record_event|record_stream)\(|cuda\.stream\(|\.synchronize\(|_event\.query\("
)
# Lines that are not in the list, and why not.
OTHERS = {
    ("hardware/hops.py", "torch.cuda.synchronize(there)"): "what is timed, not what is computed",
    ("hardware/measure.py", "torch.cuda.synchronize(device)"): "what is timed, not what is computed",
    ("offload/saved.py", "event.synchronize()"): "how many buffers there are, not an order",
    ("parallel/replicate.py", "stream = torch.cuda.stream"): "which stream's pool the buckets are from, not an order",
    ("compat/fsdp.py", "root._device_handle.synchronize()"): "of torch versions without reset_iter_state",
}


def test_all_that_synchronises_is_in_the_list():
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = str(path.relative_to(PACKAGE)), path.read_text()
        listed = [line for one in BREAKS if one.file == name for line in one.old.splitlines()]
        for line in text.splitlines():
            known = any(one.strip() and one.strip() in line for one in listed)
            exempt = any(file == name and text in line for file, text in OTHERS)
            if SYNCHRONISES.search(line) and not known and not exempt:
                missing.append(f"{name}: {line.strip()}")
    assert not missing


def test_the_list_is_of_this_package(tmp_path):
    assert len(BREAKS) >= 25
    assert {one.scenario for one in BREAKS} == {*SCENARIOS}
    for number, one in enumerate(BREAKS):
        breaking.write_broken(PACKAGE, tmp_path / str(number), one)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a scenario on the package below a folder."""
    with contextlib.suppress(pretend_cuda.CannotBuild):
        pretend_cuda.build.built()
        yield from _served(tmp_path_factory)
        return
    pytest.skip("nothing here compiles a pretended device")


def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    environment = {
        **os.environ,
        **pretend_cuda.environment(),
        "LARGESCALE_AUTOLOAD": "0",  # torch would import the package as it is
        "OMP_NUM_THREADS": "1",
    }
    pipe = subprocess.PIPE
    command = [sys.executable, breaking.__file__]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def run(scenario: str, root: Path) -> dict[str, Any]:
            request = {"scenario": scenario, "root": str(root), "folder": str(tmp_path_factory.mktemp("run"))}
            print(json.dumps(request), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def expected(run: Run) -> dict[str, dict[str, Any]]:
    """Of each scenario, what comes of the package as it is."""
    found = {name: run(name, PACKAGE.parent) for name in SCENARIOS}
    for name, one in found.items():
        # Not all reports come each time.
        again = run(name, PACKAGE.parent)
        assert not one["error"]
        assert not one["reports"]
        assert one == again
    return found


@pytest.mark.slow
@pytest.mark.parametrize("change", [pytest.param(one, id=f"{one.name}-{one.scenario}") for one in BREAKS])
def test_what_is_broken_is_seen(run, expected, tmp_path, change: Break):
    breaking.write_broken(PACKAGE, tmp_path, change)
    found = run(change.scenario, tmp_path)
    assert found["error"] or found["reports"] or found["values"] != expected[change.scenario]["values"]
