from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from offload.optimizers import (
    BUILDERS,
    SMALL_PAGE,
    Based,
    Failing,
    Lion,
    difference,
    failing,
    model,
    of,
    ordinary_bytes,
    output,
    paged,
    train,
)
from torch import nn

from lightning_largescale.errors import PlanError
from lightning_largescale.offload import pages
from lightning_largescale.offload.buffers import Allowance
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.places import HostPlaces, Places
from lightning_largescale.offload.store import StoreError
from lightning_largescale.optimizers.fused import vectorized
from lightning_largescale.tiers import PAGE_BUFFERS

pytestmark = pytest.mark.filterwarnings("ignore:.*without O_DIRECT")
MIB = 2**20


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", SMALL_PAGE)


def scheduled(build, folder=None, resident=None, steps=7, **options):
    """Losses, values, state and the learning rates of a run; resident for `resident` None and no folder."""
    module = model()
    optimizer = build(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    losses = []

    def run():
        for step in range(steps):
            losses.extend(train(module, optimizer, 1, step))
            scheduler.step()
        return losses, list(module.parameters()), copy.deepcopy(optimizer.state_dict())

    if resident is None:
        return run()
    with paged(optimizer, folder, resident=resident, **options):
        return run()


@pytest.mark.parametrize("tier", ["nvme", "cpu", "part"])
@pytest.mark.parametrize("name", BUILDERS)
def test_steps_as_on_all_at_once(name, tier, tmp_path):
    folder, resident = (None if tier == "cpu" else tmp_path), 300_000 if tier == "part" else 0
    assert not difference(scheduled(BUILDERS[name], folder, resident), scheduled(BUILDERS[name]))


def beside_a_device(build, folder, by_host=False, resident=0, dram=0):
    """As `scheduled`, of an optimizer whose parameters are on a device that DRAM is not the memory of."""
    lanes = Lanes(torch.device("cpu"))
    places = HostPlaces(lanes, Places()) if by_host else Places()
    return scheduled(build, folder, resident, lanes=lanes, places=places, dram=Allowance(dram))


# One of each way to keep state, and those of torch's that have one kernel on the CPU.
SOME = ["Adam amsgrad maximize", "AdamW", "AdamW fused", "AdamW lr tensor", "SGD", "SGD nesterov", "Adagrad"]
SOME += ["own counting", "bitsandbytes AdamW8bit", "Adafactor"]


@pytest.mark.parametrize("tier", ["nvme", "cpu", "part"])
@pytest.mark.parametrize("name", SOME)
def test_state_is_brought_to_the_device_and_back(name, tier, tmp_path):
    folder = None if tier == "cpu" else tmp_path
    amounts = {"resident": 300_000, "dram": 2 * SMALL_PAGE} if tier == "part" else {}
    assert not difference(beside_a_device(BUILDERS[name], folder, **amounts), scheduled(BUILDERS[name]))


def fused(name):
    """Builds the optimizer of that name, with the kernel that the host takes where the user has left that open."""

    def build(module):
        made = BUILDERS[name](module)
        for group in made.param_groups:
            group.update(vectorized(made, group))
        return made

    return build


def without_choices(result):
    losses, values, state = result
    groups = [{**group, "foreach": None, "fused": None} for group in state["param_groups"]]
    return losses, values, {**state, "param_groups": groups}


@pytest.mark.parametrize("tier", ["nvme", "part"])
@pytest.mark.parametrize("name", SOME)
def test_the_host_steps_with_one_kernel_where_there_is_one(name, tier, tmp_path):
    amounts = {"dram": 2 * SMALL_PAGE} if tier == "part" else {}
    found = beside_a_device(BUILDERS[name], tmp_path, by_host=True, **amounts)
    assert not difference(without_choices(found), without_choices(scheduled(fused(name))))
    groups, plain = found[2]["param_groups"], scheduled(BUILDERS[name])[2]["param_groups"]
    assert [group.get("fused") for group in groups] == [group.get("fused") for group in plain]


def without_closure(build, folder, dtype=torch.float32, change=lambda module: None, **options):
    """Values and state after steps that are called as loops call them, paged for a folder."""
    module = model(dtype)
    change(module)
    optimizer = build(module)

    def steps():
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            output(module, step).square().mean().backward()
            optimizer.step()
        return list(module.parameters()), optimizer.state_dict()

    if folder is None:
        return steps()
    with paged(optimizer, folder, **options):
        return copy.deepcopy(steps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD nesterov", "own", "Adafactor"])
def test_other_dtypes(name, dtype, tmp_path):
    expected = without_closure(BUILDERS[name], None, dtype)
    assert not difference(without_closure(BUILDERS[name], tmp_path, dtype), expected)


def unusual(module):
    """Parameters without elements, without dimensions, frozen, and of other memory formats."""
    module[0].weight = nn.Parameter(torch.randn(100, 300, generator=torch.Generator().manual_seed(1)).t())
    module[2].weight.requires_grad_(False)
    module.register_parameter("scale", nn.Parameter(torch.ones(())))
    image = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
    module.register_parameter("image", nn.Parameter(image))
    # Some of a larger tensor.
    module.register_parameter("part", nn.Parameter(torch.ones(60, 200)[::2, ::2]))
    for parameter in (module.scale, module.image, module.part):
        module[4].weight.register_hook(lambda _, one=parameter: note(one))
    module[4].bias.requires_grad_(False)


def note(parameter):
    parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
    if parameter.dim() == 4:
        parameter.grad = parameter.grad.to(memory_format=torch.channels_last)


def unfused(name):
    """Builds the optimizer of that name, which takes no other kernels on the host."""

    def build(module):
        made = BUILDERS[name](module)
        for group in made.param_groups:
            group.update({"fused": group["fused"] or False} if "fused" in group else {})
        return made

    return build


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "AdamW foreach", "SGD nesterov", "own", "Adafactor"])
def test_parameters_of_any_form(name, tmp_path):
    expected = without_closure(BUILDERS[name], None, change=unusual)
    assert not difference(without_closure(BUILDERS[name], tmp_path, change=unusual), expected)
    assert not difference(without_closure(BUILDERS[name], tmp_path, change=unusual, resident=300_000), expected)
    lanes = Lanes(torch.device("cpu"))
    # torch's one kernel takes a tensor with gaps for one without; a copy has none.
    for places in (Places(), *([HostPlaces(lanes, Places())] if name != "AdamW fused" else [])):
        found = without_closure(unfused(name), tmp_path, change=unusual, lanes=lanes, places=places)
        assert not difference(found[0], expected[0])
        assert not difference(found[1]["state"], expected[1]["state"])


def hooked(kind, folder):
    """What hooks of a user see at each of two steps."""
    module = model()
    optimizer = of(kind, momentum=0.9)(module)
    seen = []

    def note(name):
        return lambda one, args, kwargs: seen.append((name, float(module[0].bias.detach().sum()), len(one.state)))

    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    if folder is None:
        optimizer.register_step_post_hook(note("last"))
        train(module, optimizer, 2)
        return seen
    with paged(optimizer, folder):
        optimizer.register_step_post_hook(note("last"))
        train(module, optimizer, 2)
    return seen


def test_hooks_of_the_user_are_called_once_a_step_and_see_what_they_would(tmp_path):
    seen = hooked(torch.optim.SGD, tmp_path)
    assert [name for name, _, _ in seen] == ["before", "after", "last"] * 2
    assert seen == hooked(torch.optim.SGD, None)


def test_hooks_of_the_user_are_called_as_often_where_a_step_calls_another(tmp_path):
    names = [name for name, _, _ in hooked(Based, tmp_path)]
    assert names == [name for name, _, _ in hooked(Based, None)]


def scaled(build, folder):
    """Values, state and scales of steps, of which the third and the fourth find an infinite gradient."""
    module = model()
    optimizer = build(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []

    def steps():
        for step in range(6):
            optimizer.zero_grad()
            loss = output(module, step).square().mean() * (torch.inf if step in (2, 3) else 1.0)
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_value_(module.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, list(module.parameters()), copy.deepcopy(optimizer.state_dict())

    if folder is None:
        return steps()
    with paged(optimizer, folder):
        return steps()


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD fused", "own"])
def test_a_step_with_an_infinite_gradient_is_skipped(name, tmp_path):
    found = scaled(BUILDERS[name], tmp_path)
    assert not difference(found, scaled(BUILDERS[name], None))
    assert found[0][1] > found[0][3]


def grown(folder, build):
    """Of a run to which a group is added, and state is brought that another had."""
    module, other = model(), model()
    given = build(other)
    train(other, given, 2)
    optimizer = build(module)

    def steps():
        losses = train(module, optimizer, 2)
        more = nn.Parameter(torch.ones(300, 150))
        more.grad = torch.full_like(more, 0.1)
        optimizer.add_param_group({"params": [more], "lr": 1e-2, "betas": (0.8, 0.9)})
        optimizer.step()
        losses += train(module, optimizer, 2, 2)
        state = copy.deepcopy(optimizer.state_dict())
        del optimizer.param_groups[2]
        optimizer.state.pop(more)
        optimizer.load_state_dict(given.state_dict())
        losses += train(module, optimizer, 3, 4)
        return losses, more, list(module.parameters()), state, copy.deepcopy(optimizer.state_dict())

    if folder is None:
        return steps()
    with paged(optimizer, folder):
        return steps()


@pytest.mark.parametrize("name", ["AdamW", "SGD nesterov", "own"])
def test_groups_are_added_and_state_is_loaded_in_mid_run(name, tmp_path):
    assert not difference(grown(tmp_path, BUILDERS[name]), grown(None, BUILDERS[name]))


@pytest.mark.parametrize("place", ["before", "between"])
def test_state_that_was_there_is_taken_over(place, tmp_path):
    module, expected = model(), model()
    optimizer, resident = of(torch.optim.AdamW)(module), of(torch.optim.AdamW)(expected)
    train(expected, resident, 5)
    train(module, optimizer, 2)
    with paged(optimizer, tmp_path):
        train(module, optimizer, 1, 2)
    # It is where the store was, whose file is still mapped, and goes on from there, paged again or not.
    if place == "between":
        train(module, optimizer, 2, 3)
    else:
        with paged(optimizer, tmp_path / ".."):
            train(module, optimizer, 2, 3)
    assert not difference(list(module.parameters()), list(expected.parameters()))
    assert not difference(optimizer.state_dict(), resident.state_dict())


def test_state_between_steps_is_ordinary_tensors(tmp_path):
    module, expected = model(), model()
    optimizer, resident = of(torch.optim.AdamW)(module), of(torch.optim.AdamW)(expected)
    with paged(optimizer, tmp_path):
        for step in range(2):
            train(module, optimizer, 1, step)
            train(expected, resident, 1, step)
            assert list(optimizer.state) == [one for one in module.parameters() if one in optimizer.state]
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            assert not difference(torch.load(file), resident.state_dict())
            assert not difference(pickle.loads(pickle.dumps(optimizer.state_dict())), resident.state_dict())
            for one, other in zip(module.parameters(), expected.parameters(), strict=True):
                # What is changed there counts in the next step.
                if one in optimizer.state:
                    optimizer.state[one]["exp_avg"].mul_(0.5)
                    resident.state[other]["exp_avg"].mul_(0.5)
        train(module, optimizer, 1, 2)
        train(expected, resident, 1, 2)
        assert not difference(optimizer.state_dict(), resident.state_dict())


def held(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("calls", [3, 7])
@pytest.mark.parametrize("step", [1, 2])
def test_after_a_step_that_raised_all_is_the_users_again(step, calls, tmp_path):
    module = model()
    optimizer = of(Failing)(module)
    before = held(optimizer)
    with paged(optimizer, tmp_path) as made:
        train(module, optimizer, step)
        optimizer.calls, optimizer.failing_at = 0, calls
        with pytest.raises(MemoryError):
            train(module, optimizer, 1)
        made.forget_step()
        assert all(one is other for one, other in zip(held(optimizer), before, strict=True))
        assert set(optimizer.state) <= set(before)
        optimizer.state_dict()
        optimizer.failing_at = None
        # The buffers are back: there are few, and each step takes all.
        for number in range(3):
            train(module, optimizer, 1, number)
        assert set(optimizer.state) == set(before[:-1])


@pytest.mark.parametrize("by_host", [False, True])
@pytest.mark.parametrize("tier", ["nvme", "cpu"])
def test_beside_a_device_what_was_stepped_on_before_a_failure_is_whole(tier, by_host, tmp_path):
    module = model()
    optimizer = of(Failing)(module)
    lanes = Lanes(torch.device("cpu"))
    places = HostPlaces(lanes, Places()) if by_host else Places()
    with paged(optimizer, tmp_path if tier == "nvme" else None, lanes=lanes, places=places):
        train(module, optimizer, 1)

        def values():
            found = [(one, *optimizer.state[one].values()) for one in held(optimizer) if one in optimizer.state]
            return [[tensor.detach().clone() for tensor in tensors] for tensors in found]

        before = values()
        optimizer.calls, optimizer.failing_at = 0, 4
        with pytest.raises(MemoryError):
            train(module, optimizer, 1)
        optimizer.failing_at = None
        changed = [
            [not torch.equal(one, other) for one, other in zip(*pair, strict=True)]
            for pair in zip(values(), before, strict=True)
        ]
        assert [True, True] in changed
        assert [False, False] in changed
        assert all(parameter == state for parameter, state in changed)


@pytest.mark.parametrize("reading", [True, False])
def test_a_store_that_fails_is_told_of_and_nothing_waits(reading, tmp_path):
    module = model()
    optimizer = of(torch.optim.AdamW)(module)
    before = held(optimizer)
    file = failing(after=4, reading=reading)
    with paged(optimizer, tmp_path, file=file) as made:
        with pytest.raises(StoreError, match=r"the optimizer state of .* parameters \(AdamW\) at offset"):
            train(module, optimizer, 2)
        made.forget_step()
        assert all(one is other for one, other in zip(held(optimizer), before, strict=True))
        assert set(optimizer.state) <= set(before)
        file.broken = False
        for step in range(2, 2 + PAGE_BUFFERS):
            train(module, optimizer, 1, step)


def test_sparse_gradients_are_refused(tmp_path):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    with paged(optimizer, tmp_path) as made:
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(PlanError, match=r"the gradient of a parameter of shape \(10, 4\) is sparse, and optimizer"):
            optimizer.step()
        made.forget_step()
        assert held(optimizer) == [table.weight]


def test_some_parameters_are_stepped_on_alone(tmp_path):
    module, expected = model(), model()
    optimizer, resident = of(torch.optim.AdamW)(module), of(torch.optim.AdamW)(expected)
    blocks = {parameter: str(number // 2) for number, parameter in enumerate(module.parameters())}
    with paged(optimizer, tmp_path, label_of=blocks.__getitem__) as made:
        for step in range(3):
            for one in (module, expected):
                one.zero_grad()
                output(one, step).square().mean().backward()
            for label in sorted({*blocks.values()}, reverse=True):
                own = [one for one in module.parameters() if blocks[one] == label and one.grad is not None]
                made.step_on({*own})
                for parameter in own:
                    parameter.grad = None
            optimizer.step()
            resident.step()
        assert not difference(list(module.parameters()), list(expected.parameters()))
        found, wanted = optimizer.state_dict(), resident.state_dict()
        assert not difference(dict(sorted(found["state"].items())), wanted["state"])
        assert not difference(found["param_groups"], wanted["param_groups"])


def test_after_undo_it_steps_as_before_on_the_state_that_it_has(tmp_path):
    module, expected = model(), model()
    optimizer, resident = of(Lion)(module), of(Lion)(expected)
    with paged(optimizer, tmp_path) as made:
        train(module, optimizer, 2)
        made.undo()
        turned = []
        optimizer.register_step_pre_hook(lambda one, args, kwargs: turned.append(held(one)))
        train(module, optimizer, 2, 2)
        assert [len(one) for one in turned] == [9, 9]
    train(expected, resident, 4)
    assert not difference(optimizer.state_dict(), resident.state_dict())
    assert not difference(list(module.parameters()), list(expected.parameters()))


def test_state_of_is_memory_that_the_next_step_finds(tmp_path):
    module, expected = model(), model()
    optimizer, resident = of(torch.optim.AdamW)(module), of(torch.optim.AdamW)(expected)
    train(expected, resident, 2)
    module.load_state_dict(expected.state_dict())
    with paged(optimizer, tmp_path) as made:
        for one, other in zip(module.parameters(), expected.parameters(), strict=True):
            for key, value in resident.state.get(other, {}).items():
                memory = made.state_of(one, key)
                assert (memory is None) == (key == "step")
                optimizer.state[one][key] = value.clone() if memory is None else memory.copy_(value)
        assert made.state_of(module[0].weight, "unknown") is None
        assert made.state_of(nn.Parameter(torch.ones(1)), "exp_avg") is None
        train(module, optimizer, 2, 2)
        train(expected, resident, 2, 2)
        assert not difference(optimizer.state_dict(), resident.state_dict())


class Watched(Lion):
    """Notes how much ordinary memory there is while it steps."""

    most = 0

    def update(self, parameter, state, group):
        super().update(parameter, state, group)
        self.most = max(self.most, ordinary_bytes())


def growth(elements, folder):
    """Bytes that the process grows by as it steps, at most and in the end, and those of the state."""
    parameter = nn.Parameter(torch.zeros(elements))
    parameter.grad = torch.ones_like(parameter)
    optimizer = Watched([parameter])
    before = ordinary_bytes()
    with paged(optimizer, folder):
        for _ in range(3):
            optimizer.step()
        return optimizer.most - before, ordinary_bytes() - before, optimizer.state[parameter]["mean"].nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_state_is_in_memory_only_where_it_is_kept_there(on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", MIB)
    folder = tmp_path if on_disk else None
    # What a process holds from its first step on is no state.
    growth(4 * MIB, folder)
    most, after, state = growth(16 * MIB, folder)
    assert state == 64 * MIB
    assert (most < 16 * MIB) == on_disk
    assert (after < 16 * MIB) == on_disk


def with_nothing(name, folder):
    """A run of an optimizer with parameters without elements, one of them in a group of its own."""
    module = model()
    optimizer = BUILDERS[name](module)
    more = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(0))]
    optimizer.add_param_group({"params": more[:1]})
    optimizer.param_groups[0]["params"].append(more[1])

    def steps():
        for step in range(3):
            optimizer.zero_grad()
            output(module, step).square().mean().backward()
            for parameter in more if step else ():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        return list(module.parameters()), copy.deepcopy(optimizer.state_dict())

    if folder is None:
        return steps()
    with paged(optimizer, folder):
        return steps()


@pytest.mark.parametrize("name", ["AdamW", "AdamW foreach", "Adagrad", "SGD nesterov", "own"])
def test_parameters_without_elements(name, tmp_path):
    found, expected = with_nothing(name, tmp_path), with_nothing(name, None)
    for (values, state), (wanted_values, wanted) in [(found, expected)]:
        assert not difference(values, wanted_values)
        assert not difference(dict(sorted(state["state"].items())), dict(sorted(wanted["state"].items())))
        assert not difference(state["param_groups"], wanted["param_groups"])


def test_nothing_to_step_on_is_a_step(tmp_path):
    module = model()
    optimizer = BUILDERS["AdamW"](module)
    with paged(optimizer, tmp_path):
        optimizer.step()
        assert not optimizer.state
        train(module, optimizer, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["nvme", "cpu", "part"])
@pytest.mark.parametrize("name", ["Adam amsgrad maximize", "AdamW fused", "SGD nesterov", "Adagrad", "own counting"])
def test_state_that_is_loaded_goes_to_where_it_is_kept(name, tier, tmp_path):
    (module, optimizer), (expected, plain) = ((one, BUILDERS[name](one)) for one in (model().cuda(), model().cuda()))
    with torch.device("cuda"):
        train(expected, plain, 2)
    module.load_state_dict(expected.state_dict())
    saved = copy.deepcopy(plain.state_dict())
    for values in saved["state"].values():
        values.update({key: value.cpu() for key, value in values.items() if torch.is_tensor(value)})
    resident = 300_000 if tier == "part" else 0
    with paged(optimizer, None if tier == "cpu" else tmp_path, resident=resident, lanes=Lanes(torch.device("cuda"))):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.load_state_dict(saved)
        assert torch.cuda.max_memory_allocated() - before <= resident + 16 * 512
        with torch.device("cuda"):
            train(module, optimizer, 2, 2)
    with torch.device("cuda"):
        train(expected, plain, 2, 2)
    torch.testing.assert_close(list(module.parameters()), list(expected.parameters()))


class Transforming(Lion):
    """Loads as it likes, without the help of its base class."""

    def load_state_dict(self, state_dict):
        parameters = (one for group in self.param_groups for one in group["params"])
        for index, parameter in enumerate(parameters):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value * 2


def test_state_that_an_optimizer_loads_by_itself_goes_to_where_it_is_kept(tmp_path):
    module = model()
    optimizer = of(Transforming)(module)
    train(module, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    with paged(optimizer, tmp_path) as made:
        optimizer.load_state_dict(saved)
        for parameter, values in optimizer.state.items():
            assert made.state_of(parameter, "mean").data_ptr() == values["mean"].data_ptr()
    for index, parameter in enumerate(module.parameters()):
        if index in saved["state"]:
            assert optimizer.state[parameter]["mean"].equal(2 * saved["state"][index]["mean"])
    optimizer.load_state_dict(saved)
    assert optimizer.state[module[0].weight]["mean"].equal(2 * saved["state"][0]["mean"])


class Copying(torch.optim.AdamW):
    """Loads a deep copy of what it is given, and scales a part of that."""

    def load_state_dict(self, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for values in state_dict["state"].values():
            values["exp_avg"].mul_(2)
        super().load_state_dict(state_dict)


def copying_hook(module):
    optimizer = of(torch.optim.AdamW)(module)
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: copy.deepcopy(state_dict))
    return optimizer


COPYING = {
    "own": of(Copying),
    "fused": of(Copying, fused=True),
    "hook": copying_hook,
    "bitsandbytes": BUILDERS["bitsandbytes AdamW"],
}


@pytest.mark.parametrize("tier", ["nvme", "cpu"])
@pytest.mark.parametrize("build", COPYING.values(), ids=COPYING)
def test_a_copy_of_state_that_is_loaded_goes_to_where_it_is_kept(build, tier, tmp_path):
    (module, optimizer), (expected, plain) = ((one, build(one)) for one in (model(), model()))
    train(expected, plain, 2)
    module.load_state_dict(expected.state_dict())
    saved = copy.deepcopy(plain.state_dict())
    plain.load_state_dict(saved)
    with paged(optimizer, tmp_path if tier == "nvme" else None) as made:
        optimizer.load_state_dict(saved)
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                kept = made.state_of(parameter, key)
                assert kept is None or kept.data_ptr() == value.data_ptr()
        train(module, optimizer, 2, 2)
        train(expected, plain, 2, 2)
        assert not difference(list(module.parameters()), list(expected.parameters()))
        assert not difference(optimizer.state_dict(), plain.state_dict())


class Taking(Transforming):
    """Takes what it is given as it is; refuses to step before `trains` is set."""

    trains = False

    def load_state_dict(self, state_dict):
        for index, parameter in enumerate(one for group in self.param_groups for one in group["params"]):
            self.state[parameter] = dict(state_dict["state"].get(index, {}))

    def update(self, parameter, state, group):
        if not self.trains:
            raise RuntimeError("set trains first")
        super().update(parameter, state, group)


def test_state_that_is_taken_as_it_is_can_be_saved(tmp_path):
    module = model()
    given, optimizer = of(Lion)(module), of(Taking)(module)
    train(module, given, 1)
    with paged(optimizer, tmp_path):
        optimizer.load_state_dict(given.state_dict())
        file = io.BytesIO()
        torch.save(optimizer.state_dict()["state"], file)
        file.seek(0)
        found = {index: values for index, values in torch.load(file).items() if values}
        assert found
        assert not difference(found, given.state_dict()["state"])
        assert not any(vars(one) for values in optimizer.state.values() for one in values.values())


class Moded(torch.optim.AdamW):
    """Steps once `train()` was called, as schedule-free ones."""

    trains = False

    def train(self):
        self.trains = True

    def step(self, closure=None):
        if not self.trains:
            raise RuntimeError("call train() first")
        return super().step(closure)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [0, 2**30])
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True, "foreach": False}, {}], ids=str)
def test_the_steps_that_are_loaded_are_where_the_optimizer_counts_them(options, resident, tmp_path):
    build = of(Moded, **options)
    (module, optimizer), (expected, plain) = ((one, build(one)) for one in (model().cuda(), model().cuda()))
    plain.train()
    with torch.device("cuda"):
        train(expected, plain, 2)
    module.load_state_dict(expected.state_dict())
    with paged(optimizer, tmp_path, resident=resident, lanes=Lanes(torch.device("cuda"))):
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        on_device = {values["step"].device.type for values in optimizer.state.values()}
        assert on_device == {values["step"].device.type for values in plain.state.values()}
        optimizer.train()
        with torch.device("cuda"):
            train(module, optimizer, 2, 2)
            train(expected, plain, 2, 2)
        torch.testing.assert_close(list(module.parameters()), list(expected.parameters()))
