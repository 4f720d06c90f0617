from __future__ import annotations

import contextlib

import pytest
import torch
from offload.optimizers import SMALL_PAGE, difference, failing
from offload.test_offloaded_parameters import batch, sharded, whole
from ranks import quiet
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.hardware.usage import at_rest
from lightning_largescale.offload import pages
from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.gradients import SpilledGradients
from lightning_largescale.offload.offloaded_parameters import SpilledParameters
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.store import Store, StoreError

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*without O_DIRECT")]


class Spilling:
    """A sharded module whose blocks' gradients leave, and its optimizer steps page by page."""

    def __init__(self, world, folder, *, norms=True, parameters=True, file=None):
        self.module, self.blocks = sharded(world)
        self.store = Store(folder, **({"file": file} if file else {}))
        self.places = SpilledParameters(self.blocks if parameters else {}, self.store, ahead=1)
        self.places.take_over()
        members = {name: [one for one, _ in compat.shards_of(block)] for name, block in self.blocks.items()}
        self.gradients = self.places.gradients = SpilledGradients(members, self.store, norms=norms)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.paged = PagedOptimizer(self.optimizer, store=self.store, buffers=PageBuffers(), places=self.places)

    def backward(self, step, scale=1.0):
        (self.module(batch(step)).square().mean() * scale).backward()
        self.gradients.end_backward()
        self.places.settle()

    def step(self):
        self.optimizer.step()
        self.gradients.forget()
        self.optimizer.zero_grad()

    def close(self):
        self.paged.undo()
        self.gradients.stop()
        self.places.stop()
        self.store.close()


class Resident:
    def __init__(self, world):
        self.module, self.blocks = sharded(world)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)

    def backward(self, step, scale=1.0):
        (self.module(batch(step)).square().mean() * scale).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def gradients_of(module):
    return [None if one.grad is None else local_of(one.grad).clone() for one in module.parameters()]


def read_between(world, folder, norms):
    torch.set_num_threads(1)
    ours, resident = Spilling(world, folder, norms=norms), Resident(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PAGE_BYTES", SMALL_PAGE)
        for step in range(3):
            # Two backwards, whose gradients add up.
            for one in (ours, resident):
                one.backward(2 * step)
                one.backward(2 * step + 1)
            assert not difference(gradients_of(ours.module), gradients_of(resident.module))
            for block in ours.blocks.values():
                for parameter, _ in compat.shards_of(block):
                    if parameter.requires_grad and local_of(parameter).numel():
                        assert at_rest(local_of(parameter.grad))
            for one in (ours, resident):
                # What is changed by hand counts too.
                if step == 1:
                    for parameter in one.module.parameters():
                        if parameter.grad is not None:
                            local_of(parameter.grad).mul_(0.5)
                one.step()
            assert not difference(whole(ours.module), whole(resident.module))
    ours.close()
    ours.backward_after = ours.module(batch(9)).sum().backward()
    assert not any(at_rest(local_of(one.grad)) for one in ours.module.parameters() if one.grad is not None)
    return True


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("norms", [True, False])
def test_gradients_that_left_are_read_where_they_are_and_add_up(two, world, norms, tmp_path):
    assert all(two.run(read_between, world, tmp_path, norms))


def clipped(world, folder, kind, foreach, norms):
    torch.set_num_threads(1)
    ours, resident = Spilling(world, folder, norms=norms), Resident(world)
    norms_found = []

    def clip(module):
        parameters = [one for one in module.parameters() if one.grad is not None]
        if kind == "value":
            clip_grad_value_(parameters, 1e-2, foreach=foreach)
            return torch.zeros(())
        norm = clip_grad_norm_(parameters, 1e-2, foreach=foreach)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    for step in range(3):
        ours.backward(step)
        resident.backward(step)
        read = ours.store.read_bytes
        with ours.gradients.clipping():
            found = clip(ours.module)
        assert ours.store.read_bytes == read
        norms_found.append(torch.equal(found, clip(resident.module)))
        ours.step()
        resident.step()
        norms_found.append(not difference(whole(ours.module), whole(resident.module)))
    ours.close()
    return norms_found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_is_that_of_the_gradients_themselves(two, world, kind, foreach, tmp_path):
    for found in two.run(clipped, world, tmp_path, kind, foreach, True):
        assert found == [True] * 6


def test_clipping_where_no_norms_were_taken(two, tmp_path):
    for found in two.run(clipped, 2, tmp_path, "norm", None, False):
        assert found == [True] * 6


def failed_save(folder):
    file = failing(after=10**9, reading=False)
    ours = Spilling(1, folder, file=file)
    ours.backward(0)
    ours.step()
    file.count = 10**9
    with pytest.raises(StoreError, match=r"writing .* bytes of the gradients of blocks\.\d at offset"):
        ours.backward(1)
    file.broken = False
    ours.gradients.forget()
    ours.paged.forget_step()
    compat.forget_sharded_step(ours.module)
    ours.optimizer.zero_grad()
    ours.places.settle()
    ours.backward(2)
    ours.step()
    ours.close()
    return True


def test_a_gradient_that_cannot_leave_is_told_of(two, tmp_path):
    assert all(two.run(failed_save, tmp_path))


@pytest.mark.parametrize("told", [True, False])
def test_what_is_added_to_a_gradient_while_it_leaves_counts(told, tmp_path):
    first, second = (torch.nn.Parameter(torch.ones(2000)) for _ in range(2))
    with contextlib.closing(Store(tmp_path)) as store:
        gradients = SpilledGradients({"first": [first], "second": [second]}, store, norms=True)
        first.sum().backward()
        second.sum().backward()
        if told:
            (2 * first).sum().backward()
        else:
            # As another rank's part is added, for which this one has no backward.
            first.grad.add_(2)
        gradients.end_backward()
        assert torch.equal(first.grad, torch.full((2000,), 3.0))
        with gradients.clipping():
            assert torch.nn.utils.get_total_norm([first.grad]) == torch.full((2000,), 3.0).norm()
        gradients.stop()
