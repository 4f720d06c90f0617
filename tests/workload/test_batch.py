import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from workload.families import Pair, Sample, Wrapped

from lightning_largescale.workload import Workload
from lightning_largescale.workload.batch import batch_bytes, batch_samples, digest_of, first_samples, tensors_in


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


@pytest.mark.parametrize("lengths", [(6, 5, 4), (4, 6, 5)])
def test_packed_sequences_are_samples(lengths):
    packed = pack_sequence([torch.zeros(length, 8) for length in lengths], enforce_sorted=lengths[0] == 6)
    batch = (torch.zeros(7), packed, torch.zeros(3))
    assert batch_samples(batch) == 3
    _, cut, targets = first_samples(batch, 2)
    assert [len(one) for one in unpack_sequence(cut)] == list(lengths[:2])
    assert (cut.sorted_indices is None, targets.shape) == (packed.sorted_indices is None, (2,))
    module = Wrapped(nn.GRU(8, 4), loss=lambda model, batch: model(batch[1])[1].mean())
    work = Workload.trace(module, batch, precisions=("32-true",))
    (why,) = work.approximate
    assert "measured on 1 and 2 of the 3 samples" in why
    assert work.steps["32-true"].forward_flops > 0


def test_a_digest_is_of_all_data():
    class Own:
        def __init__(self, values, name):
            self.values, self.name, self.itself = values, name, self

    def pair(first, second):
        return digest_of(first) == digest_of(second)

    sparse = torch.eye(3).to_sparse()
    assert pair([sparse, "a", {"b": 1}], [sparse.clone(), "a", {"b": 1}])
    assert not pair(sparse, 2 * sparse)
    assert not pair(["a"], ["b"])
    assert not pair({"a": np.zeros(2)}, {"a": np.ones(2)})
    assert pair(Own(torch.ones(2), "on rank 0"), Own(torch.ones(2), "on rank 1"))
    assert not pair(Own(torch.ones(2), ""), Own(torch.zeros(2), ""))
    assert pair(torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj())
    assert digest_of([None, Own(None, "")]) == ""
