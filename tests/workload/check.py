"""The step for real, and whether a module is as it was."""

import random
import warnings

import numpy
import torch

from lightning_largescale.workload.measured_step import trace_for_real
from lightning_largescale.workload.snapshot import Snapshot
from lightning_largescale.workload.steps import TraceRequest


def real_step(module, batch, step="training_step", precision="32-true"):
    request = TraceRequest(
        module=module,
        batch=batch,
        step=step,
        precision=precision,
        batch_idx=0,
        device_type="cpu",
        snapshot=Snapshot(module, batch),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace_for_real(request)


def state_of(module):
    """Everything that a trace must leave as it was; tensors by identity and by content."""
    attributes = {}
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            content = list(value.items()) if isinstance(value, dict) else list(value) if type(value) is list else value
            attributes[name, key] = (id(value), content if not isinstance(value, torch.Tensor) else value.clone())
    tensors = {name: (id(t), t.clone(), t.grad) for name, t in module.state_dict(keep_vars=True).items()}
    return attributes, tensors, torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()


def assert_same(before, after):
    for (attributes, tensors, rng, *others), (attributes2, tensors2, rng2, *others2) in [(before, after)]:
        assert list(attributes) == list(attributes2)
        for key, (identity, content) in attributes.items():
            assert attributes2[key][0] == identity, key
            if isinstance(content, list):
                assert list(map(id, attributes2[key][1])) == list(map(id, content)) or attributes2[key][1] == content
        assert list(tensors) == list(tensors2)
        for name, (identity, content, grad) in tensors.items():
            assert tensors2[name][0] == identity
            assert torch.equal(tensors2[name][1], content), name
            assert tensors2[name][2] is grad
        assert torch.equal(rng, rng2)
        assert others == others2
