import torch
import torchmetrics
from torch import nn

from lightning_largescale import compat
from lightning_largescale.workload.metrics import forgive_metrics
from lightning_largescale.workload.snapshot import Snapshot


def test_a_metric_that_needs_values_is_passed_over_and_said():
    class Distinct(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, x):
            self.seen += len(torch.unique(x))

        def compute(self):
            return self.seen

    holder = nn.ModuleDict({"distinct": Distinct(), "mean": torchmetrics.MeanMetric(nan_strategy="ignore")})
    with Snapshot(holder).untouched():
        notes = forgive_metrics(holder)
        with compat.fake_tensor_mode():
            holder["distinct"](torch.zeros(4))
            assert holder["mean"](torch.zeros(4)).shape == ()
    assert notes[0] == "Distinct needs values, so its own memory is left out"
    assert holder["distinct"].update_count == 0
    holder["distinct"].update(torch.arange(3))
    assert holder["distinct"].compute() == 3
