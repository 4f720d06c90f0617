"""Runs of several processes that a test starts, watches and ends for certain."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

# Within these seconds of a fault every process of the run must have ended.
END_SECONDS = 15
# A launch imports torch and lightning twice, for 6 s on an idle machine; those that test are busy.
START_SECONDS = 240
TRAIN = Path(__file__).parent / "train.py"
# Set by Lightning or a cluster in this process; a run under test is to find out by itself.
_INHERITED = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LARGESCALE_LAUNCHER_PID")


@dataclass
class Ended:
    status: int
    out: str
    err: str
    orphans: list[str]


class Run:
    """A command in a session of its own, its output in files, found again by a marker in its environment.

    Args:
        folder: where the output goes.
        command: what to run; "python" stands for this interpreter.
        stdin: text for standard input.
        variables: of the environment, as a cluster sets them.
    """

    def __init__(self, folder: Path, command: list[str], stdin: str = "", **variables: str) -> None:
        self._marker = uuid.uuid4().hex
        self._out, self._err = folder / f"{self._marker}.out", folder / f"{self._marker}.err"
        environment = {name: value for name, value in os.environ.items() if name not in _INHERITED}
        root = str(Path(__file__).parents[2])
        environment |= {
            "RUN_MARKER": self._marker,
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            **variables,
        }
        (folder / "stdin").write_text(stdin)
        with self._out.open("w") as out, self._err.open("w") as err, (folder / "stdin").open() as stdin_file:
            command = [sys.executable if word == "python" else word for word in command]
            self._process = subprocess.Popen(
                command, stdin=stdin_file, stdout=out, stderr=err, env=environment, cwd=folder, start_new_session=True
            )

    def wait_for(self, mark: str, count: int = 1) -> None:
        """Return when `mark` stands `count` times in the output; fail when the run ends before, or time is up."""
        deadline = time.monotonic() + START_SECONDS
        ended = False
        while self._out.read_text().count(mark) < count:
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no {mark}: {self.kill()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
                ended = True

    def interrupt(self, *, everyone: bool, by: signal.Signals = signal.SIGINT) -> None:
        """Send what Ctrl-C sends: to every process of the run, as a terminal does, or to the first alone."""
        (os.killpg if everyone else os.kill)(self._process.pid, by)

    def end(self, seconds: float = END_SECONDS) -> Ended:
        """Wait for the end of all its processes; what is left after `seconds` is killed and named among the orphans."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        _, alive = psutil.wait_procs(self._processes(), max(0.0, deadline - time.monotonic()))
        return self.kill([f"{process.pid} {process.name()}" for process in alive])

    def kill(self, orphans: list[str] | None = None) -> Ended:
        """Kill what is left of the run and return what it said."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return Ended(self._process.wait(END_SECONDS), self._out.read_text(), self._err.read_text(), orphans or [])

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("RUN_MARKER") == self._marker:
                    found.append(process)
        return found


def train(folder: Path, *arguments: str, prefix: tuple[str, ...] = ("python",)) -> Run:
    """Start train.py with `arguments` by `prefix`, such as the interpreter or torchrun."""
    return Run(folder, [*prefix, str(TRAIN), *arguments])
