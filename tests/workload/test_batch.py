import pytest
import torch
from workload.families import Pair, Sample

from lightning_largescale.workload.batch import batch_bytes, batch_samples, first_samples, tensors_in


def test_samples_and_bytes():
    batch = {"scale": torch.tensor(2.0), "x": [torch.zeros(4, 3)], "y": (torch.zeros(4, dtype=torch.long), "text")}
    assert (batch_samples(batch), batch_bytes(batch)) == (4, 4 + 48 + 32)
    assert (batch_samples(None), batch_bytes(None), batch_samples("text")) == (1, 0, 1)


# Compressed layouts say that they are new.
@pytest.mark.filterwarnings("ignore:Sparse")
def test_bytes_of_sparse_tensors_are_those_of_their_elements():
    matrix = torch.eye(100)
    assert batch_bytes(matrix.to_sparse()) == 100 * (4 + 2 * 8)
    assert batch_bytes([matrix.to_sparse_csr()]) == 100 * (4 + 8) + 101 * 8


def test_first_samples_cut_what_has_the_batch_dimension():
    table = torch.zeros(7, 4)
    cut = first_samples({"x": torch.zeros(4, 3), "pair": Pair(torch.zeros(4), table), "name": ["a"]}, 2)
    assert [t.shape[0] for t in tensors_in(cut)] == [2, 2, 7]
    assert isinstance(cut["pair"], Pair)
    sample = first_samples(Sample(torch.zeros(4), torch.zeros(4)), 1)
    assert (sample.x.shape, sample.name) == ((1,), "sample")
