"""torch.compile by the strategy, by the user of parts, and by the user of the whole: the numbers of the eager run."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Block, Language, trainer
from ranks import quiet
from torch import nn

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.compile import compile_blocks, is_compiled_block
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.techniques.activation_checkpoint.recompute import apply_recompute, remove_recompute

pytestmark = quiet

EAGER = {"backend": "aot_eager"}
PLANS = [
    Plan(dp_replicate=2),
    Plan(dp_shard=2, activation_checkpointing="full"),
    Plan(dp_shard=2, reshard_after_forward=False),
]


class Silent(Language):
    """Logs nothing within its step, where torch.compile of the whole fails to trace Lightning's `log`."""

    def training_step(self, batch, index):
        return self.loss(batch)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(float(self.all_gather(outputs["loss"]).mean()))


class Manual(Language):
    """Has its backward inside of its step, and clips there."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()


class Assigns(Language):
    """Sets gradients that are not shards, which are there while the next micro-batch is computed."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = self.loss(batch)
        optimizer, parameters = self.optimizers(), [*self.parameters()]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))


def parts(model):
    model.blocks[0] = torch.compile(model.blocks[0], **EAGER)
    model.head.compile(**EAGER)
    return model


GIVEN = {"parts": parts, "whole": lambda model: torch.compile(model, **EAGER), "eager": lambda model: model}


def fit(plan, devices, given="eager", compile=False, **options):
    torch.compiler.reset()
    model = Silent(**options)
    names = [*model.state_dict()]
    run = trainer(LargeScaleStrategy(plan, compile=compile) if plan else "auto", devices=devices, max_steps=4)
    run.fit(GIVEN[given](model))
    if given == "eager":
        assert [*model.state_dict()] == names
        assert not any("forward" in vars(module) for module in model.modules())
    return model.losses


@pytest.mark.parametrize("given", ["parts", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", PLANS)
def test_what_the_user_compiled(two, given, plan):
    expected = fit(None, 1)
    for losses in two.run(fit, plan, 2, given):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_blocks_that_the_strategy_compiles(two, plan):
    expected = fit(None, 1)
    for losses in two.run(fit, plan, 2, compile=EAGER):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_one_process_trains_as_uncompiled(checkpointing):
    plan = Plan(activation_checkpointing=checkpointing)
    assert fit(plan, 1, compile=EAGER, dropout=0.1) == pytest.approx(fit(plan, 1, dropout=0.1), rel=1e-6)


def test_blocks_whose_activations_are_offloaded_too(tmp_path):
    fields = dict.fromkeys(("offload_activations", "offload_parameters"), "nvme")
    plan = Plan(nvme_path=str(tmp_path), **fields)
    assert fit(plan, 1, compile=EAGER) == pytest.approx(fit(None, 1), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Plan(), *PLANS])
def test_inductor(two, plan):
    expected = fit(None, 1)
    for losses in two.run(fit, plan, 2, compile=True) if plan.world_size == 2 else [fit(plan, 1, compile=True)]:
        assert losses == pytest.approx(expected, rel=1e-4)


def test_another_plan_after_it():
    torch.compiler.reset()
    model = Silent()
    for strategy in (
        LargeScaleStrategy(Plan(activation_checkpointing="full"), compile=EAGER),
        LargeScaleStrategy(Plan()),
        LargeScaleAutoStrategy(compile=EAGER),
    ):
        trainer(strategy, max_steps=2).fit(model)
        assert not any("forward" in vars(module) for module in model.modules())
    plain = Silent()
    for _ in range(3):
        trainer(max_steps=2).fit(plain)
    assert model.losses == pytest.approx(plain.losses, rel=1e-6)


def test_one_graph_serves_all_blocks():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = Language()
    undo = compile_blocks(model, {"backend": backend, "fullgraph": True})
    tokens = torch.zeros(2, 8, dtype=torch.long)
    compiled = model(tokens)
    assert len(graphs) == 1
    undo()
    torch.testing.assert_close(model(tokens), compiled, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_copy_computes_with_its_own_weights(checkpointing):
    torch.compiler.reset()
    model, tokens = Language(), torch.zeros(2, 8, dtype=torch.long)
    apply_recompute(model, Plan(activation_checkpointing=checkpointing))
    compile_blocks(model, EAGER)
    before = model(tokens)
    copied, plain = copy.deepcopy(model), Language()
    for one in (copied, plain):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(2)
        one(tokens).square().sum().backward()
    torch.testing.assert_close(copied(tokens), plain(tokens))
    for ours, expected in zip(copied.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)


def manual_graphs(plan):
    """The number of graphs in a manual optimisation, which break nowhere; its losses."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = Manual()
    strategy = LargeScaleStrategy(plan, compile={"backend": backend, "fullgraph": True})
    trainer(strategy, devices=plan.world_size, max_steps=4).fit(model)
    return len(graphs), model.losses


def test_one_graph_where_a_step_has_its_backward_inside(two):
    plain = Manual()
    trainer(max_steps=4).fit(plain)
    for graphs, losses in two.run(manual_graphs, Plan(dp_shard=2)):
        assert graphs == 1
        assert losses == pytest.approx(plain.losses, rel=1e-5)


def assigned(plan, given="eager", **options):
    torch.compiler.reset()
    model = Assigns()
    trainer(LargeScaleStrategy(plan, **options), devices=plan.world_size, max_steps=4).fit(GIVEN[given](model))
    return model.losses


def plain_losses():
    model = Assigns()
    trainer(max_steps=4).fit(model)
    return model.losses


@pytest.mark.parametrize("plan", PLANS[1:])
def test_gradients_set_by_hand(two, plan):
    for losses in two.run(assigned, plan, compile=EAGER):
        assert losses == pytest.approx(plain_losses(), rel=1e-5)


def test_gradients_set_by_hand_of_parameters_on_disk(tmp_path):
    plan = Plan(offload_parameters="nvme", nvme_path=str(tmp_path))
    assert assigned(plan, compile=EAGER) == pytest.approx(plain_losses(), rel=1e-5)


def refused(plan, given):
    with pytest.raises(PlanError) as error:
        assigned(plan, given)
    return str(error.value)


@pytest.mark.parametrize("given", ["parts", "whole"])
@pytest.mark.parametrize("plan", PLANS[1:])
def test_derivatives_of_what_the_user_compiled_are_refused(two, plan, given):
    for found in two.run(refused, plan, given):
        assert found == (
            "torch.autograd.grad is taken of a sharded parameter of a module that torch.compile was called on, which"
            " averages no gradients; leave torch.compile out and give the strategy compile=True, or call"
            " `manual_backward(loss)`."
        )


def test_blocks_that_are_all_compiled_are_left():
    model = Language()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **EAGER)
    undo = compile_blocks(model, EAGER)
    assert not any("forward" in vars(block._orig_mod) for block in model.blocks)
    undo()


def test_nothing_to_compile():
    with pytest.raises(PlanError, match=r"compile needs repeated blocks and Linear has none; leave it out, and give"):
        compile_blocks(nn.Linear(2, 2), {})


def test_what_compile_takes():
    with pytest.raises(PlanError, match="compile='inductor' is not accepted; give True, False, or the arguments of"):
        LargeScaleStrategy(Plan(), compile="inductor")


def outputs_of(block):
    block.zero_grad()
    x = torch.ones(2, 3, 16, requires_grad=True)
    output = block(x).sum()
    output.backward()
    return [output.item(), x.grad.tolist()]


@pytest.mark.parametrize("first", ["recompute", "compile"])
def test_recompute_and_compile_are_undone_in_any_order(first):
    torch.compiler.reset()
    model = nn.Sequential(Block(), Block())
    expected = outputs_of(model[0])
    apply_recompute(model, Plan(activation_checkpointing="full"))
    compile_blocks(model, EAGER)
    undos = {"recompute": lambda: remove_recompute(model), "compile": compile_blocks(model, EAGER)}
    assert outputs_of(model[0]) == expected
    undos.pop(first)()
    assert outputs_of(model[0]) == expected
    for undo in undos.values():
        undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(map(is_compiled_block, model))


def test_a_compiled_block_that_another_technique_wraps_is_known():
    model = nn.Sequential(Block(), Block())
    undo = compile_blocks(model, EAGER)
    apply_recompute(model, Plan(activation_checkpointing="full"))
    assert all(map(is_compiled_block, model))
    undo()
    assert not any(map(is_compiled_block, model))
