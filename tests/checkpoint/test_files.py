"""Weights in files: of safetensors and of torch, several and with an index, read by slices; and bad ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_largescale.checkpoint.files import is_mappable, is_remote, is_truncated, load_file, stored_weights
from lightning_largescale.checkpoint.weights import check_weights, read_weights
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.chunks import Chunk
from lightning_largescale.parallel.stored import Stored


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=generator),
        "a.bias": torch.randn(7, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(3),
        "none": torch.empty(0, 4),
    }


def write(folder, kind):
    values = tensors()
    if kind == "safetensors":
        save_file(values, folder / "a.safetensors")
        return folder / "a.safetensors"
    if kind == "torch":
        torch.save(values, folder / "a.bin")
        return folder / "a.bin"
    if kind == "checkpoint":
        torch.save({"state_dict": values, "epoch": 3}, folder / "a.ckpt")
        return folder / "a.ckpt"
    names = list(values)
    files = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    for file, own in files.items():
        save_file({name: values[name] for name in own}, folder / file)
    if kind == "folder":
        return folder
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in files.items() for name in own}}))
    return folder if kind == "folder with index" else index


KINDS = ("safetensors", "torch", "checkpoint", "folder", "folder with index", "index")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path, kind):
    found = stored_weights(write(tmp_path, kind))
    assert list(found) == list(tensors()) or kind.startswith(("safe", "folder"))
    for name, expected in tensors().items():
        assert type(found[name]) is Stored
        assert (found[name].shape, found[name].dtype) == (expected.shape, expected.dtype)
        assert torch.equal(found[name].whole(), expected)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_slices_of_any_part(tmp_path, kind):
    one, expected = stored_weights(write(tmp_path, kind))["a.weight"], tensors()["a.weight"]
    out = torch.zeros(7, 5)
    one._read([Chunk((2, 1), out[2:5, 1:4]), Chunk((6, 0), out[6:, :2])])
    assert torch.equal(out[2:5, 1:4], expected[2:5, 1:4])
    assert torch.equal(out[6, :2], expected[6, :2])
    assert out.count_nonzero() == 11


def test_what_torch_saves_beside_tensors(tmp_path):
    sparse = torch.eye(3).to_sparse()
    torch.save(
        {"epoch": 3, "nested": [{"x": torch.ones(2)}], "sparse": sparse, "view": torch.ones(3, 4).t()}, tmp_path / "a"
    )
    found = load_file(tmp_path / "a")
    assert found["epoch"] == 3
    assert type(found["nested"][0]["x"]) is Stored
    assert torch.equal(found["view"].whole(), torch.ones(4, 3))
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))


def test_what_can_be_mapped(tmp_path):
    torch.save(tensors(), tmp_path / "new")
    torch.save(tensors(), tmp_path / "old", _use_new_zipfile_serialization=False)
    assert [is_mappable(tmp_path / name) for name in ("new", "old", "none")] == [True, False, False]
    assert not is_mappable(object())
    (tmp_path / "cut").write_bytes((tmp_path / "new").read_bytes()[:-50])
    assert [is_truncated(tmp_path / name) for name in ("new", "old", "none", "cut")] == [False, False, False, True]
    assert (is_remote(tmp_path), is_remote("memory://there")) == (False, True)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])
    return path


def other(path, text):
    path.write_text(text)
    return path


BAD = {
    "missing": (lambda folder: folder / "none.safetensors", "is not there; give the path of a file or folder"),
    "empty folder": (lambda folder: folder, "is a folder with 0 indices and 0 files of safetensors"),
    "truncated": (lambda folder: cut(write(folder, "safetensors")), "is truncated or not a file of safetensors"),
    "text": (lambda folder: other(folder / "a.safetensors", "weights"), "is truncated or not a file of safetensors"),
    "truncated torch": (
        lambda folder: cut(write(folder, "torch")),
        "is not a file of safetensors, and torch.load does not",
    ),
    "torch text": (
        lambda folder: other(folder / "a.bin", "weights"),
        "is not a file of safetensors, and torch.load does not",
    ),
    "index": (lambda folder: other(folder / "a.index.json", "{}"), "is not an index of weights"),
    "index of lists": (lambda folder: other(folder / "a.index.json", "[]"), "is not an index of weights"),
    "index of nothing": (
        lambda folder: other(folder / "a.index.json", '{"weight_map": {"a": "none.safetensors"}}'),
        "names 'none.safetensors', which is not there",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    make, words = BAD[case]
    with pytest.raises(PlanError) as told:
        stored_weights(make(tmp_path))
    assert words in str(told.value)


def test_an_index_whose_files_lack_a_tensor(tmp_path):
    path = write(tmp_path, "index")
    names = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**names, "other": "one.safetensors"}}))
    with pytest.raises(PlanError, match="names 'other' and its files do not have them"):
        stored_weights(path)


def test_a_folder_with_a_tensor_twice(tmp_path):
    write(tmp_path, "folder")
    save_file({"steps": torch.tensor(1)}, tmp_path / "three.safetensors")
    with pytest.raises(PlanError, match="has 'steps', which another file of that folder has too"):
        stored_weights(tmp_path)


def test_a_file_of_parameters(tmp_path):
    model = Model(layers=1)
    torch.save(dict(model.named_parameters()), tmp_path / "a.bin")
    found = stored_weights(tmp_path / "a.bin")
    assert all(type(one) is Stored for one in found.values())
    assert torch.equal(found["body.0.weight"].whole(), model.body[0].weight)


def test_a_file_of_objects(tmp_path):
    torch.save({"state_dict": tensors(), "hyper_parameters": {"folder": tmp_path}}, tmp_path / "a.ckpt")
    with pytest.raises(PlanError, match=r"holds objects beside tensors.*save the state_dict by itself"):
        stored_weights(tmp_path / "a.ckpt")


def test_an_index_that_leads_elsewhere(tmp_path):
    path = write(tmp_path, "index")
    path.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(PlanError, match=r"names '\.\./one\.safetensors', which is no file beside it"):
        stored_weights(path)


def test_values_that_do_not_lie_as_torch_has_them(tmp_path):
    """A file may begin its values anywhere."""
    values = {"bytes": torch.tensor([1], dtype=torch.uint8), "one": torch.tensor(2.0), "two": torch.ones(3, 2)}
    header = {"bytes": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["one"] = {"dtype": "F32", "shape": [], "data_offsets": [1, 5]}
    header["two"] = {"dtype": "F32", "shape": [3, 2], "data_offsets": [5, 29]}
    head = json.dumps(header).encode()
    data = b"".join(one.numpy().tobytes() for one in values.values())
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    found = stored_weights(tmp_path / "a.safetensors")
    for name, value in values.items():
        assert torch.equal(found[name].whole(), value)


def test_a_file_of_no_tensors(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.bin")
    with pytest.raises(PlanError, match="does not hold tensors by name"):
        stored_weights(tmp_path / "a.bin")


class Model(nn.Module):
    def __init__(self, width=4, layers=12):
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.embedding = nn.Embedding(6, width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("places", torch.arange(3), persistent=False)


def test_tied_weights_need_one_name(tmp_path):
    values = {name: one.clone() for name, one in Model().state_dict().items() if name != "head.weight"}
    save_file(values, tmp_path / "a.safetensors")
    found = read_weights(Model(), tmp_path / "a.safetensors")
    assert found.keys() == {*values}
    values["head.weight"] = values.pop("embedding.weight")
    save_file(values, tmp_path / "a.safetensors")
    assert "embedding.weight" in read_weights(Model(), tmp_path / "a.safetensors")


def test_parts_of_a_model(tmp_path):
    model = Model(layers=1)
    save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, tmp_path / "a.safetensors")
    found = read_weights(model, {"body.0": str(tmp_path / "a.safetensors")})
    assert list(found) == ["body.0.weight", "body.0.bias"]
    with pytest.raises(PlanError, match="weights has 'tail' and Model has no such module"):
        read_weights(model, {"tail": str(tmp_path / "a.safetensors")})
    assert read_weights(model, None) == {}


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    values = {name: one.clone() for name, one in Model(width=5).state_dict().items() if "embedding" not in name}
    values |= {f"other.{number}": torch.ones(1) for number in range(13)}
    save_file({name: one for name, one in values.items() if "body.3" not in name}, tmp_path / "a.safetensors")
    with pytest.raises(PlanError) as told:
        read_weights(Model(), tmp_path / "a.safetensors")
    assert "2 missing ('body.3.weight', 'body.3.bias')" in str(told.value)
    assert "13 unexpected ('other.0'" in str(told.value)
    assert "and 3 more)" in str(told.value)
    assert "23 of another shape ('body.0.weight' is (5, 5) and should be (4, 4)" in str(told.value)
    with pytest.raises(PlanError, match="does not fit Model: 23 of another shape"):
        read_weights(Model(), tmp_path / "a.safetensors", strict=False)


def test_weights_that_name_no_files():
    check_weights(None)
    check_weights({"model": "a.safetensors"})
    for bad in (3, {"model": 3}, {1: "a"}):
        with pytest.raises(PlanError, match="names no files; give a path, or paths by names"):
            check_weights(bad)
