"""A pytest plugin: `Trainer(strategy="auto")`, which is the default, means "largescale_auto".

Lightning's own tests are in its repository, under `tests/`, at the tag of the installed version:

    cd pytorch-lightning/tests
    PYTHONPATH=.:/path/to/benchmarks python -m pytest -p lightning_tests tests_pytorch/trainer tests_pytorch/loops

`LARGESCALE_TESTED=auto` leaves the default as it is, to see which tests pass on this machine at all.
"""

from __future__ import annotations

import functools
import os
from typing import Any

STRATEGY = os.environ.get("LARGESCALE_TESTED", "largescale_auto")


def pytest_configure() -> None:
    # Every Trainer makes one of these, whatever the test replaces of the Trainer itself.
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    make = _AcceleratorConnector.__init__

    @functools.wraps(make)
    def make_ours(self: Any, *args: Any, **options: Any) -> None:
        if options.get("strategy") == "auto":
            options["strategy"] = STRATEGY
        make(self, *args, **options)

    _AcceleratorConnector.__init__ = make_ours  # type: ignore[method-assign]
