"""No run ends for what it says: whatever standard output and error are."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from models import trainer
from ranks import quiet
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from lightning_largescale.console import Bars, as_text, error_console, show, tell
from lightning_largescale.failures import end_process

pytestmark = quiet


class Größe(LightningModule):
    """Of a name that not all encodings have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.losses: list[float] = []

    def training_step(self, batch, index):
        loss = self.net(batch).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(8, 8), batch_size=4)


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def closed():
    stream = encoded("utf-8")
    stream.close()
    return stream


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def full():
    return open("/dev/full", "w", encoding="utf-8")


class Strange:
    """Not much of a stream."""

    def write(self, text):
        raise RuntimeError("of its own")


STREAMS = {
    "ascii": lambda: encoded("ascii"),
    "latin-1": lambda: encoded("latin-1"),
    "closed": closed,
    "broken pipe": broken_pipe,
    "full": full,
    "none": lambda: None,
    "strange": Strange,
}


@contextlib.contextmanager
def standard(monkeypatch, name, made):
    """Within, `made` is a standard stream; what the buffer of a file keeps is not written at its end."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, made)
        yield
    with contextlib.suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), made.fileno())
        made.close()


@pytest.mark.parametrize("name", STREAMS)
def test_a_run_trains_whatever_standard_output_is(name, monkeypatch):
    if name == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    plain, module = Größe(), Größe()
    trainer(max_steps=2).fit(plain)
    with standard(monkeypatch, "stdout", STREAMS[name]()):
        # Lightning's own summary is not for every stream.
        made = trainer("largescale_auto", max_steps=2, enable_model_summary=True)
        made.callbacks = [one for one in made.callbacks if "Summary" not in type(one).__name__]
        monkeypatch.setattr("lightning_largescale.auto.shows_summary", lambda trainer: True)
        made.fit(module)
        stream = sys.stdout
        said = stream.buffer.getvalue().decode(stream.encoding) if name in ("ascii", "latin-1") else None
    assert module.losses == plain.losses
    if said is not None:
        assert "+- lightning_largescale -" in said
        assert "#..." in said
        assert ("Gr??e" if name == "ascii" else "Größe") in said
        assert said.splitlines()[-1].startswith("lightning_largescale: peak memory predicted")


@pytest.mark.parametrize("name", STREAMS)
def test_lines_and_bars_are_for_any_stream(name, monkeypatch):
    if name == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with standard(monkeypatch, "stderr", STREAMS[name]()):
        tell("größer")
        error_console().print("größer")
    with standard(monkeypatch, "stdout", STREAMS[name]()):
        show("größer")
        assert as_text("größer", width=20).strip() in ("größer", "gr??er")


def test_bars_are_blocks_where_there_are_blocks():
    def drawn(stream):
        Console(file=stream, color_system=None).print(Bars(3, "cyan", 2))
        return stream

    assert drawn(io.StringIO()).getvalue() == "███░░\n"
    stream = drawn(encoded("ascii"))
    stream.flush()
    assert stream.buffer.getvalue() == b"###..\n"


def test_what_nobody_reads_is_not_left_in_the_buffer(run_python):
    code = (
        "import os, sys; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1);"
        "from lightning_largescale.console import show; show('said')"
    )
    # What Python cannot write as it ends makes it end with another status than 0.
    assert run_python(code) == ""


def end(name):
    sys.stdout = sys.stderr = STREAMS[name]()
    end_process("rank 0 stops", lambda: None, status=3)


@pytest.mark.parametrize("name", STREAMS)
def test_a_process_ends_when_it_has_to(name):
    process = multiprocessing.get_context("fork").Process(target=end, args=(name,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join(60)
    assert process.exitcode == 3
