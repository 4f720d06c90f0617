"""Checkpoints that are directories: read by torch alone, replaced, and refused where they are not whole."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import zlib

import fsspec
import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from models import DIM, GLOBAL_BATCH, VOCAB, Language, read_checkpoint, trainer
from ranks import mesh_of, quiet
from torch import nn

from lightning_largescale.checkpoint.directory import load_directory, save_directory
from lightning_largescale.checkpoint.files import stored_weights
from lightning_largescale.checkpoint.load import consolidate
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import held_bytes, let_rest, peak_bytes, release_free_memory, start_peak
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.store import Store
from lightning_largescale.parallel.stored import Stored
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet
STEPS = 2


class Noted(Language):
    def __init__(self, **options):
        super().__init__(samples=STEPS * GLOBAL_BATCH, **options)
        self.normal = nn.BatchNorm1d(DIM)
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, tokens):
        return self.normal(super().forward(tokens).transpose(1, 2)).transpose(1, 2)

    def get_extra_state(self):
        return {"note": "kept", 3: {}, "list": [1, {}, (2,)]}

    def set_extra_state(self, state):
        self.note = state


def write(path, plan=None, **options):
    """The state of a module that has trained for some steps and was saved, whole."""
    made = trainer(LargeScaleStrategy(plan or Plan(dp_shard=2), **options), devices=2, max_steps=STEPS)
    model = Noted()
    made.fit(model)
    made.save_checkpoint(path)
    with made.strategy.full_parameters():
        return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def written(two, tmp_path_factory):
    """A checkpoint, not to be changed, and what is in it."""
    path = tmp_path_factory.mktemp("written") / "a.ckpt"
    return path, two.run(write, path)[0]


SCRIPT = """
import sys, torch, torch.distributed.checkpoint as dcp
from torch import nn
state = {"state_dict": {"head.weight": torch.zeros(VOCAB, DIM), "blocks.0.up.weight": torch.zeros(3 * DIM, DIM)}}
state["optimizer_0"] = {"state": {"head.weight": {"exp_avg": torch.zeros(VOCAB, DIM), "step": torch.tensor(0.0)}}}
dcp.load(state, checkpoint_id=sys.argv[1])
assert not [name for name in sys.modules if name.startswith("lightning")]
torch.save(state, sys.argv[2])
"""


def test_torch_alone_reads_it(written, tmp_path):
    path, expected = written
    script = SCRIPT.replace("VOCAB", str(VOCAB)).replace("DIM", str(DIM))
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found")
    for name, value in found["state_dict"].items():
        assert torch.equal(value, expected[name]), name
    state = found["optimizer_0"]["state"]["head.weight"]
    assert state["step"] == STEPS
    assert state["exp_avg"].abs().sum() > 0


def test_what_is_in_it(written):
    path, expected = written
    found = load_directory(path, weights_only=True)
    assert found["state_dict"].pop("_extra_state") == {"note": "kept", 3: {}, "list": [1, {}, (2,)]}
    assert list(found["state_dict"]) == [*expected]
    for name, value in expected.items():
        assert type(found["state_dict"][name]) is Stored
        assert torch.equal(found["state_dict"][name].whole(), value), name
    [optimizer] = found["optimizer_states"]
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    assert optimizer["param_groups"][0]["params"] == list(optimizer["state"])
    assert found["global_step"] == STEPS


def test_consolidated_it_is_a_file_of_stock_lightning(written, tmp_path):
    path, expected = written
    consolidate(path, tmp_path / "whole.ckpt")
    model = Noted(seed=3)
    made = trainer(max_steps=STEPS + 1)
    made.fit(model, ckpt_path=tmp_path / "whole.ckpt")
    assert made.global_step == STEPS + 1
    again = Noted.load_from_checkpoint(path)
    assert again.note == {"note": "kept", 3: {}, "list": [1, {}, (2,)]}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in expected.items())
    with pytest.raises(PlanError, match="is there already"):
        consolidate(path, tmp_path / "whole.ckpt")
    with pytest.raises(PlanError, match="is no directory; give a checkpoint that is one"):
        consolidate(tmp_path / "whole.ckpt", tmp_path / "again.ckpt")
    assert [one.name for one in tmp_path.iterdir()] == ["whole.ckpt"]


def test_its_weights_are_weights(written):
    path, expected = written
    found = stored_weights(path)
    assert all(torch.equal(found[name].whole(), value) for name, value in expected.items())


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_its_description_runs_nothing(written, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "made"))
    path = tmp_path / "a.ckpt"
    shutil.copytree(written[0], path)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(PlanError, match=r"names posix\.mkdir, which tells of no tensor"):
        load_directory(path)
    assert not (tmp_path / "made").exists()


class Unpicklable(Noted):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["function"] = lambda: None


def save_unpicklable(path):
    made = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS)
    made.fit(Unpicklable())
    try:
        made.save_checkpoint(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_what_cannot_be_written_is_told_on_all_ranks(two, tmp_path):
    first, second = two.run(save_unpicklable, tmp_path / "a.ckpt")
    assert "lambda" in first
    assert second.startswith("PlanError: rank 0 could not write the checkpoint (")
    assert not [*tmp_path.iterdir()]


def overwrite(path):
    """Written several times, in the place of a file first."""
    made = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS)
    made.fit(Noted())
    for _ in range(2):
        made.save_checkpoint(path)


def test_it_replaces_what_was_there(two, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("a file")
    two.run(overwrite, path)
    assert read_checkpoint(path)["global_step"] == STEPS
    # What a run leaves that was ended while it wrote.
    left = tmp_path / f".unfinished-{zlib.crc32(b'a.ckpt'):08x}"
    shutil.copytree(path, left)
    two.run(overwrite, path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.ckpt"]
    # A link, as ModelCheckpoint makes of the last, is replaced and what it leads to stays.
    (tmp_path / "last.ckpt").symlink_to(path)
    two.run(overwrite, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert read_checkpoint(path)["global_step"] == STEPS


def save_in_place_of(path):
    try:
        write(path)
    except PlanError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_file_takes_the_place_of_a_directory(tmp_path, monkeypatch):
    """Lightning's own move would put it into the directory, of which the next run would read the rest."""

    def fail(*args, **options):
        raise OSError("the disk is full")

    path = tmp_path / "last.ckpt"
    save_directory({"state_dict": {"weight": torch.ones(2)}}, path)
    run = trainer(LargeScaleStrategy(Plan()), max_steps=1)
    run.fit(Language())
    with monkeypatch.context() as patched:
        patched.setattr(TorchCheckpointIO, "save_checkpoint", fail)
        with pytest.raises(OSError, match="the disk is full"):
            run.save_checkpoint(path)
    assert [*load_directory(path)["state_dict"]] == ["weight"]
    run.save_checkpoint(path)
    assert path.is_file()
    assert [*tmp_path.iterdir()] == [path]


def test_other_folders_are_not_replaced(two, tmp_path):
    (tmp_path / "mine").write_text("text")
    for told in two.run(save_in_place_of, tmp_path):
        assert "is a folder that is no checkpoint; give the checkpoint a path of its own" in told


def drop(name):
    return lambda path: (path / name).unlink()


def shorten(path):
    shard = path / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-10])


def damage(path):
    (path / ".metadata").write_bytes(b"nothing")


BAD = {
    "metadata": (drop(".metadata"), "is half-written or none: it has no '.metadata'"),
    "rest": (drop("meta.pt"), "is half-written or none: it has no 'meta.pt'"),
    "a part": (drop("__0_0.distcp"), "is not whole: '__0_0.distcp' has 0 bytes of"),
    "an end": (shorten, "is not whole: '__1_0.distcp' has"),
    "damaged": (damage, "has a damaged '.metadata'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_directory_that_is_not_whole(written, tmp_path, case):
    spoil, words = BAD[case]
    path = tmp_path / "a.ckpt"
    shutil.copytree(written[0], path)
    spoil(path)
    with pytest.raises(PlanError) as told:
        load_directory(path)
    assert words in str(told.value)
    assert "resume from another one" in str(told.value)


def resume(path, width):
    model = Language(seed=1, layers=width)
    made = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS)
    try:
        made.fit(model, ckpt_path=path)
    except RuntimeError as error:
        return str(error)
    return None


def test_of_another_model(two, written):
    for told in two.run(resume, written[0], 4):
        assert 'Missing key(s) in state_dict: "blocks.3.norm.weight"' in told
        assert 'Unexpected key(s) in state_dict: "_extra_state", "nothing", "normal.weight"' in told


class Momentum(Noted):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def resume_with_another_optimizer(path):
    model = Momentum()
    try:
        trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS).fit(model, ckpt_path=path)
    except PlanError as error:
        return str(error)
    return None


def test_of_another_optimizer(two, written):
    for told in two.run(resume_with_another_optimizer, written[0]):
        assert (
            "the checkpoint's optimizer is AdamW and this is SGD; make one of the same class in configure_optim" in told
        )


def resume_truncated(path):
    try:
        trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS).fit(Noted(), ckpt_path=path)
    except PlanError as error:
        return str(error)
    return None


def test_a_truncated_file(two, tmp_path):
    torch.save({"state_dict": Noted().state_dict()}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-100])
    for told in two.run(resume_truncated, tmp_path / "a.ckpt"):
        assert "is truncated: it has a beginning and no end; resume from another one" in told


def write_remotely(plan):
    write("memory://folder/a.ckpt", plan)
    files = fsspec.filesystem("memory").find("/folder")
    found = None
    if files:
        with fsspec.open("memory://folder/a.ckpt", "rb") as file:
            found = torch.load(file, weights_only=False)
    return found


def test_to_where_no_directories_are_a_whole_file_goes(two, written):
    expected = read_checkpoint(written[0])
    first, second = two.run(write_remotely, Plan(dp_shard=2))
    assert second is None
    for name, value in expected["state_dict"].items():
        assert name == "_extra_state" or torch.equal(first["state_dict"][name], value)
    assert list(first["optimizer_states"][0]["state"]) == list(expected["optimizer_states"][0]["state"])


class OwnIO(TorchCheckpointIO):
    """A user's own way to write."""


def write_by_plugin(path):
    made = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=STEPS, plugins=[OwnIO()])
    made.fit(Noted())
    made.save_checkpoint(path)


def test_a_plugin_of_the_trainer_is_given_whole_tensors(two, written, tmp_path):
    path = tmp_path / "a.ckpt"
    two.run(write_by_plugin, path)
    assert path.is_file()
    expected = read_checkpoint(written[0])["state_dict"]
    found = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "_extra_state")


def memory_of_saving(folder):
    """Resident memory that saving 512 MiB, which are at rest in a file, takes on this rank; rank 0 writes them."""
    mesh_of()
    own = folder / os.environ["RANK"]
    own.mkdir()
    store = Store(own)
    weights = Region(store, "weights", 512 * 2**20).tensor(torch.float32, (8, 2**24))
    for row in weights:
        row.fill_(1.0)
        let_rest(row)
    release_free_memory()
    start_peak("cpu")
    before = held_bytes("cpu")
    save_directory({"state_dict": {"weights": weights}}, folder / "saved")
    store.close()
    return peak_bytes("cpu") - before


def test_what_is_at_rest_on_a_disk_is_never_whole_in_memory_when_it_is_saved(two, tmp_path):
    first, second = two.run(memory_of_saving, tmp_path)
    # A box of 64 MiB, where it maps the file and as it is written, and the one before it.
    assert first < 224 * 2**20
    assert second < 32 * 2**20
