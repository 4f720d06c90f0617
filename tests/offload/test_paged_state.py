from __future__ import annotations

import pytest
import torch
from offload.optimizers import BUILDERS, SMALL_PAGE, model, output
from ranks import mesh_of, quiet
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import at_rest
from lightning_largescale.offload import pages
from lightning_largescale.offload.buffers import Allowance, PageBuffers
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.paged_state import PagedState, as_divided
from lightning_largescale.offload.places import HostPlaces, Places
from lightning_largescale.offload.store import Store

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*without O_DIRECT")]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", SMALL_PAGE)
    store = Store(tmp_path)
    yield store
    store.close()


def state_of(optimizer, store, resident=0, **options):
    made = PagedState(
        optimizer,
        store=store,
        resident=Allowance(resident),
        **{
            "dram": Allowance(0),
            "places": Places(),
            "lanes": None,
            "buffers": PageBuffers(),
            "label_of": lambda parameter: "",
            **options,
        },
    )
    made.lay_out()
    return made


@pytest.mark.parametrize("resident", [0, 2 * SMALL_PAGE, 2**30])
def test_pages_stay_as_far_as_they_are_let(store, resident):
    made = state_of(BUILDERS["AdamW"](model()), store, resident)
    kept = sum(page.state_bytes for page in made.pages if not made.moves(page))
    moved = [page.state_bytes for page in made.pages if made.moves(page)]
    assert kept <= resident
    assert not moved or kept + min(moved) > resident


def test_in_dram_all_stay():
    made = state_of(BUILDERS["AdamW"](model()), None)
    assert not any(map(made.moves, made.pages))


def test_beside_a_device_what_leaves_it_stays_in_dram_as_far_as_it_may(store):
    lanes = Lanes(torch.device("cpu"))
    made = state_of(BUILDERS["AdamW"](model()), store, 300_000, dram=Allowance(2 * SMALL_PAGE), lanes=lanes)
    # Parameters as a whole stay on the device, pages of others are in DRAM.
    stay = [entry.local.numel() * 8 for entry in made.entries.values() if not entry.spec.dtypes]
    assert sum(stay) <= 300_000 < sum(stay) + 300 * 150 * 8
    in_dram = [page for page in made.pages if made.crosses(page) and not made.moves(page)]
    assert sum(page.state_bytes for page in in_dram) <= 2 * SMALL_PAGE < sum(page.state_bytes for page in made.pages)
    assert len(in_dram) > 1
    assert all(made.crosses(page) == bool(page.bundle.dtypes) for page in made.pages)


def test_what_the_host_steps_on_does_not_cross(store):
    lanes = Lanes(torch.device("cpu"))
    made = state_of(BUILDERS["AdamW"](model()), None, places=HostPlaces(lanes, Places()), lanes=lanes)
    assert all(made.moves(page) and made.by_host(page) and not made.crosses(page) for page in made.pages)
    alone = state_of(BUILDERS["AdamW"](model()), None)
    assert not any(alone.crosses(page) or alone.by_host(page) for page in alone.pages)


def test_what_the_optimizer_has_made_already_moves(store):
    module = model()
    optimizer = BUILDERS["Adagrad"](module)
    before = {parameter: state["sum"].clone() for parameter, state in optimizer.state.items()}
    made = state_of(optimizer, store)
    assert len(before) == len(made.entries) == 9
    for parameter, state in optimizer.state.items():
        assert at_rest(state["sum"])
        assert not at_rest(state["step"])
        assert torch.equal(state["sum"], before[parameter])
        assert made.is_here(made.entries[parameter], "sum")
        state["sum"] = state["sum"].clone()
        assert not made.is_here(made.entries[parameter], "sum")


def test_what_is_read_is_what_was_written(store):
    module = model()
    optimizer, buffers = BUILDERS["AdamW"](module), PageBuffers()
    output(module, 0).sum().backward()
    made = state_of(optimizer, store, buffers=buffers)
    for parameter, entry in made.entries.items():
        optimizer.state[parameter] = {key: made.view(entry, key) for key in entry.spec.dtypes}
    for value in (1, 2):
        for page in made.pages:
            buffer = buffers.take()
            made.read(page, buffer).wait()
            for span, values, gradient in made.values(page, buffer):
                assert values.shape == (span.entry.local.shape if span.whole else (span.stop - span.start,))
                assert (gradient is None) == (span.entry.parameter.grad is None)
                for number, slot in enumerate(made.slots(page, span, buffer).values()):
                    assert slot.eq(number if value == 2 else 0).all()
                    slot.fill_(number if value == 1 else -number)
            buffers.give_back(buffer, made.write(page, buffer))
        buffers.drain()
        for entry in made.entries.values():
            found = [made.view(entry, key).unique().tolist() for key in entry.spec.dtypes]
            assert found == ([[0.0], [1.0]] if value == 1 else [[0.0], [-1.0]])


def divided():
    parameter = nn.Parameter(distribute_tensor(torch.ones(5, 4), mesh_of((2,)), [Shard(0)]))
    state = torch.zeros_like(parameter.to_local().detach())
    whole = as_divided(parameter, state)
    number = torch.zeros(())
    return (
        isinstance(whole, DTensor) and whole.shape == (5, 4) and whole.placements == parameter.placements,
        local_of(whole).data_ptr() == state.data_ptr() or not state.numel(),
        as_divided(parameter, number) is number,
        as_divided(nn.Parameter(torch.ones(2)), number) is number,
    )


def test_state_of_a_part_is_a_part_of_the_state(two):
    assert two.run(divided) == [(True,) * 4] * 2


def whole_needed():
    parameter = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh_of((2,)), [Shard(0)]))
    told = None
    try:
        state_of(torch.optim.Muon([parameter], lr=1e-3), None)
    except PlanError as error:
        told = str(error)
    state_of(torch.optim.AdamW([parameter], lr=1e-3), None)
    alone = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh_of((2, 1))["tp"], [Shard(0)]))
    state_of(torch.optim.Muon([alone], lr=1e-3), None)
    return told


def test_an_optimizer_that_needs_whole_parameters_is_refused_where_ranks_have_parts(two):
    assert (
        two.run(whole_needed)
        == [
            "Muon needs a parameter as a whole, of which ranks have parts, so its state cannot be paged; leave out"
            " offload_optimizer and release_gradients, or give dp_shard=1."
        ]
        * 2
    )
