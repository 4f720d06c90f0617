"""What the code of users does to parameters and gradients, hook by hook, under any plan."""

from __future__ import annotations

import contextlib
import copy

import torch
from lightning.pytorch import Callback, LightningModule
from models import trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from lightning_largescale import LargeScaleStrategy

STEPS = 3
# Not a multiple of the ranks: shards are of several sizes.
WIDTH = 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inside = None

    def forward(self, x):
        if self.inside is not None:
            self.inside(self)
        return x + self.down(self.up(x).tanh())


class Model(LightningModule):
    """Blocks, parameters outside of them, frozen copies of both, and a buffer.

    Args:
        action: given the module, or in "forward" a block of it, in each step.
        hook: where; names of Lightning's, or "forward", "early" and "late" in the training step, "callback".
    """

    def __init__(self, action, hook):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(WIDTH, WIDTH)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.slow_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.action, self.hook = action, hook
        self.automatic_optimization = hook != "manual"
        self.losses = []

    def at(self, hook, *args):
        if hook == self.hook:
            self.action(self, *args)

    def loss(self, batch, *, tilted=True):
        fast = self.head(self.net(batch))
        loss = (fast * self.scale - self.slow_head(self.slow(batch))).square().mean() + 0.01 * fast.sum()
        return loss + self.tilt(fast.square().mean()) if tilted else loss

    def tilt(self, value):
        """Zero, with a gradient of each rank's own, which is zero on average."""
        data = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return (data["rank"] - (data["num_replicas"] - 1) / 2) * (value - value.detach())

    def training_step(self, batch, index):
        for name, block in self.named_modules():
            if isinstance(block, Block) and self.hook == "forward" and name.endswith(".1"):
                block.inside = self.action
        if not self.automatic_optimization:
            loss = self.action(self, batch)
        else:
            self.at("early")
            loss = self.loss(batch)
            self.at("late")
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, index):
        self.at("validation_step")
        self.losses.append(float(self.loss(batch).detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        torch.manual_seed(2)
        return DataLoader(torch.randn(2 * STEPS, WIDTH), batch_size=2)

    val_dataloader = train_dataloader

    def configure_gradient_clipping(self, optimizer, *_, **__):
        self.at("configure_gradient_clipping")


HOOKS = [
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


def _add_hook(name):
    def run(self, *args, **kwargs):
        self.at(name)

    setattr(Model, name, run)


for _name in HOOKS:
    _add_hook(_name)


class AtBatchEnd(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.at("callback")


def targets(module):
    """Some of all kinds, as they are where the code runs."""
    if isinstance(module, Block):
        return [module.up.weight, module.down.bias]
    return [module.head.weight, module.net[0].up.weight, module.net[1].down.bias, module.slow[1].up.weight]


def trained(module):
    return [one for one in targets(module) if one.requires_grad]


WRITES, GRADIENTS, BY_HAND = {}, {}, {}


def among(table):
    def add(function):
        table[function.__name__] = function
        return function

    return add


@among(WRITES)
@torch.no_grad()
def normalises(module):
    for one in targets(module):
        one.copy_(normalize(one, dim=-1))


@among(WRITES)
@torch.no_grad()
def decays(module):
    for one in targets(module):
        one.mul_(0.9)


@among(WRITES)
@torch.no_grad()
def scales_what_backward_needs(module):
    if isinstance(module, Block):
        module.down.weight.mul_(0.9)
    else:
        module.net[1].up.weight.mul_(0.9)
        module.net[2].down.weight[0] *= 0.9


@among(WRITES)
@torch.no_grad()
def clamps(module):
    for one in targets(module):
        one.clamp_(-0.2, 0.2)


@among(WRITES)
def assigns_data(module):
    for one in targets(module):
        one.data = one.data * 0.9


@among(WRITES)
def assigns_fresh_data(module):
    for one in targets(module):
        one.data = torch.full(one.shape, 0.1)


@among(WRITES)
def writes_through_data(module):
    for one in targets(module):
        one.data.mul_(0.9)


@among(WRITES)
def writes_through_detach(module):
    for one in targets(module):
        one.detach().mul_(0.9)


@among(WRITES)
def writes_through_numpy(module):
    for one in targets(module):
        one.detach().numpy()[...] *= 0.9


@among(WRITES)
def writes_by_alias(module):
    """As kept from an earlier step."""
    found = targets(module)
    aliases = vars(module).setdefault("aliases", [one.data for one in found])
    for alias, _ in zip(aliases, found, strict=True):
        alias.mul_(0.9)


@among(WRITES)
@torch.no_grad()
def writes_rows(module):
    for one in targets(module):
        one[0] = 0.1


@among(WRITES)
def writes_elements_of_data(module):
    for one in targets(module):
        one.data[..., 1] = 0.1


@among(WRITES)
def copies_fresh(module):
    for one in targets(module):
        one.data.copy_(torch.full(one.shape, 0.1))


@among(WRITES)
@torch.no_grad()
def adds_fresh(module):
    for one in targets(module):
        one.add_(torch.arange(one.numel()).view(one.shape) * 0.01)


@among(WRITES)
@torch.no_grad()
def centres(module):
    for one in targets(module):
        one.sub_(one.mean())


@among(WRITES)
@torch.no_grad()
def initialises(module):
    for one in targets(module):
        nn.init.constant_(one, 0.1)


@among(WRITES)
def draws(module):
    torch.manual_seed(3)
    for one in targets(module):
        nn.init.normal_(one, std=0.1)


@among(WRITES)
def momentum_by_data(module):
    if isinstance(module, Block):
        return
    for fast, slow in [*zip(module.net.parameters(), module.slow.parameters(), strict=True)]:
        slow.data = slow.data * 0.9 + fast.data * 0.1
    module.slow_head.weight.data = module.slow_head.weight.data * 0.9 + module.head.weight.data * 0.1


@among(WRITES)
@torch.no_grad()
def momentum_in_place(module):
    if isinstance(module, Block):
        return
    for fast, slow in [*zip(module.net.parameters(), module.slow.parameters(), strict=True)]:
        slow.mul_(0.9).add_(fast, alpha=0.1)
    module.slow_head.weight.lerp_(module.head.weight, 0.1)


@among(WRITES)
@torch.no_grad()
def of_lists(module):
    torch._foreach_mul_([one.data for one in targets(module)], 0.9)


@among(WRITES)
def swaps_and_swaps_back(module):
    for one in targets(module):
        before = one.data
        one.data = before * 0
        one.data = before


@among(WRITES)
def swaps_with_a_shadow(module):
    for index, one in enumerate(targets(module)):
        shadows = vars(module).setdefault("shadows", {})
        shadow = shadows.get(index)
        shadows[index] = one.data.clone()
        if shadow is not None:
            one.data = shadow


@among(WRITES)
def points_to_another(module):
    found = targets(module)
    if not isinstance(module, Block):
        found[-1].data = found[1].data


@among(WRITES)
def replaces(module):
    owner = module.up if isinstance(module, Block) else module.head
    owner.weight = nn.Parameter(owner.weight.detach() * 0.5)


@among(WRITES)
def replaces_in_a_block(module):
    owner = module.up if isinstance(module, Block) else module.net[0].up
    owner.weight = nn.Parameter(owner.weight.detach() * 0.5)


@among(WRITES)
def freezes(module):
    for one in trained(module)[:1]:
        one.requires_grad_(False)


@among(WRITES)
def writes_buffers(module):
    if not isinstance(module, Block):
        module.scale.mul_(0.9)
        module.scale.data = module.scale.data + 0.1
        module.scale = module.scale * 0.9


def of_the_optimizer(module):
    """Parameters as it has them."""
    return [] if isinstance(module, Block) else module.trainer.optimizers[0].param_groups[0]["params"][::3]


@among(WRITES)
@torch.no_grad()
def writes_into_the_optimizers(module):
    for one in of_the_optimizer(module):
        one.data.mul_(0.9)
        one.data.add_(0.01)


@among(WRITES)
def assigns_to_the_optimizers(module):
    for one in of_the_optimizer(module):
        one.data = one.data * 0.9


@among(WRITES)
@torch.no_grad()
def writes_into_both(module):
    for one in [*targets(module), *of_the_optimizer(module)]:
        one.data.mul_(0.9)


@among(WRITES)
@torch.no_grad()
def reads_norms(module):
    total = sum(float(one.norm()) for one in targets(module))
    if not isinstance(module, Block):
        module.scale.fill_(total / 10)


@among(GRADIENTS)
def scales_gradients(module):
    for one in trained(module):
        if one.grad is not None:
            one.grad.mul_(0.5)


@among(GRADIENTS)
def adds_to_gradients(module):
    for one in trained(module):
        if one.grad is not None:
            one.grad.add_(one.detach(), alpha=0.1)


@among(GRADIENTS)
def assigns_gradients(module):
    for one in trained(module):
        if one.grad is not None:
            one.grad = one.grad * 0.5 + 0.01


@among(GRADIENTS)
def assigns_fresh_gradients(module):
    for one in trained(module):
        one.grad = torch.arange(one.numel()).view(one.shape) * 0.01


@among(GRADIENTS)
def assigns_like_gradients(module):
    for one in trained(module):
        one.grad = torch.ones_like(one)


@among(GRADIENTS)
def drops_gradients(module):
    for one in trained(module)[:1]:
        one.grad = None


@among(GRADIENTS)
def clamps_data_of_gradients(module):
    for one in trained(module):
        if one.grad is not None:
            one.grad.data.clamp_(-0.01, 0.01)


@among(GRADIENTS)
def clips_norms(module):
    nn.utils.clip_grad_norm_(module.parameters(), 0.01)


@among(GRADIENTS)
def copies_into_gradients(module):
    for one in trained(module):
        if one.grad is not None:
            one.grad.copy_(torch.full(one.shape, 0.01))


def _manual(function):
    """A training step by hand, in which `function` sets gradients of the loss."""

    def step(module, batch):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        loss = function(module, batch)
        optimizer.step()
        return loss

    step.__name__ = function.__name__
    return step


def by_hand(function):
    BY_HAND[function.__name__] = _manual(function)
    return function


def every(module):
    return [one for one in module.parameters() if one.requires_grad]


@by_hand
def backward(module, batch):
    loss = module.loss(batch)
    module.manual_backward(loss)
    return loss


@by_hand
def sets_gradients(module, batch):
    loss = module.loss(batch)
    for one, gradient in zip(every(module), torch.autograd.grad(loss, every(module)), strict=True):
        one.grad = gradient
    return loss


@by_hand
def sets_gradients_of_unused_too(module, batch):
    parameters = every(module)
    loss = module.loss(batch)
    for one, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        one.grad = gradient
    return loss


@by_hand
def projects_conflicts(module, batch):
    """Yu et al. 2020, PCGrad, of two losses."""
    parameters = every(module)
    output = module.net(batch)
    losses = module.head(output).square().mean(), (output - 1).abs().mean()
    sets = [
        [
            torch.zeros_like(one) if found is None else found
            for one, found in zip(
                parameters,
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
        for loss in losses
    ]
    first, second = (torch.cat([one.flatten() for one in gradients]) for gradients in sets)
    product = first @ second
    first = first - product.clamp(max=0) / second.square().sum() * second
    start = 0
    for one, other in zip(parameters, sets[1], strict=True):
        one.grad = first[start : start + one.numel()].view(one.shape) + other
        start += one.numel()
    return sum(losses)


@by_hand
def adds_to_gradients_of_backward(module, batch):
    loss = module.loss(batch)
    module.manual_backward(loss)
    for one in every(module):
        one.grad.add_(one.detach(), alpha=0.1)
    return loss


@by_hand
def sets_after_backward(module, batch):
    loss = module.loss(batch)
    module.manual_backward(loss)
    for one in every(module):
        one.grad = one.grad * 0.5
    return loss


@by_hand
def sets_after_backward_what_was_kept(module, batch):
    parameters = every(module)
    loss = module.loss(batch)
    module.manual_backward(loss)
    for one in parameters:
        one.grad = torch.full(one.shape, 0.01)
    return loss


@by_hand
def backward_of_two_in_turn(module, batch):
    parameters = every(module)
    loss = module.loss(batch)
    module.manual_backward(loss, retain_graph=True)
    kept = [one.grad.clone() for one in parameters]
    for one in parameters:
        one.grad = None
    module.manual_backward(loss.square())
    for one, other in zip(parameters, kept, strict=True):
        one.grad = one.grad + other
    return loss


@by_hand
def zeroes_by_module(module, batch):
    module.zero_grad()
    loss = module.loss(batch)
    module.manual_backward(loss)
    return loss


@by_hand
def of_one_layer(module, batch):
    """As GradNorm weighs losses by the gradients of the last layer."""
    loss = module.loss(batch)
    (norm,) = torch.autograd.grad(loss, [module.head.weight], retain_graph=True)
    loss = loss * norm.norm().detach()
    module.manual_backward(loss)
    return loss


@by_hand
def of_a_layer_in_a_block(module, batch):
    loss = module.loss(batch)
    (norm,) = torch.autograd.grad(loss, [module.net[1].up.weight], retain_graph=True)
    loss = loss * norm.norm().detach()
    module.manual_backward(loss)
    return loss


@by_hand
def penalty(module, batch):
    # Gradients that are differentiated are each rank's own.
    loss = module.loss(batch, tilted=False)
    gradients = torch.autograd.grad(loss, every(module), create_graph=True)
    loss = loss + sum(one.square().sum() for one in gradients)
    module.manual_backward(loss)
    return loss


@by_hand
def functional(module, batch):
    fast = {name: one * 0.5 for name, one in module.head.named_parameters()}
    loss = functional_call(module.head, fast, (module.net(batch),)).square().mean()
    module.manual_backward(loss)
    return loss


@by_hand
def functional_of_a_block(module, batch):
    fast = {name: one * 0.5 for name, one in module.net[0].named_parameters()}
    loss = functional_call(module.net[0], fast, (batch,)).square().mean()
    module.manual_backward(loss)
    return loss


@by_hand
def functional_of_all(module, batch):
    fast = {name: one * 0.5 for name, one in module.net.named_parameters()}
    loss = functional_call(module.net, fast, (batch,)).square().mean()
    module.manual_backward(loss)
    return loss


@by_hand
def gradients_by_func(module, batch):
    parameters = dict(module.head.named_parameters())
    hidden = module.net(batch).detach()
    found = torch.func.grad(lambda given: functional_call(module.head, given, (hidden,)).square().mean())(parameters)
    for name, one in module.head.named_parameters():
        one.grad = found[name]
    return hidden.sum()


@by_hand
def gradients_by_func_of_a_block(module, batch):
    parameters = dict(module.net[0].named_parameters())
    found = torch.func.grad(lambda given: functional_call(module.net[0], given, (batch,)).square().mean())(parameters)
    for name, one in module.net[0].named_parameters():
        one.grad = found[name]
    return batch.sum()


@by_hand
def writes_before_the_step(module, batch):
    loss = module.loss(batch)
    module.manual_backward(loss)
    with torch.no_grad():
        for one in targets(module):
            one.mul_(0.9)
    return loss


@by_hand
def writes_between_two_backwards(module, batch):
    module.manual_backward(module.loss(batch))
    for one in targets(module):
        one.data.mul_(0.9)
    loss = module.loss(batch)
    module.manual_backward(loss)
    return loss


ACTIONS = {**WRITES, **GRADIENTS, **BY_HAND}
WRITE_HOOKS = ["forward", "early", "late", "validation_step", "callback", *HOOKS]
GRADIENT_HOOKS = ["on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"]
CELLS = [
    *((action, hook) for action in WRITES for hook in WRITE_HOOKS),
    *((action, hook) for action in GRADIENTS for hook in GRADIENT_HOOKS),
    *((action, "manual") for action in BY_HAND),
]


def outcome(plan, devices, action, hook, **options):
    """All tensors of the model after some steps, and its losses; what was raised where something was."""
    torch.manual_seed(0)
    model = Model(ACTIONS[action], hook)
    strategy = LargeScaleStrategy(plan) if plan is not None else "auto"
    fitting = trainer(
        strategy,
        devices=devices,
        max_epochs=1,
        max_steps=-1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[AtBatchEnd()],
        **options,
    )
    try:
        fitting.fit(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if fitting.interrupted:
        return "interrupted"
    tensors = {name: _full(one) for name, one in model.state_dict(keep_vars=True).items()}
    return tensors, model.losses


def _full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def outcomes(plan, devices, cells, **options):
    """Of each cell."""
    return [outcome(plan, devices, *cell, **options) for cell in cells]


def verdict(found, plain):
    """In a word: "equal", "error", or what differs."""
    if isinstance(plain, str):
        return "error" if isinstance(found, str) else f"one process: {plain}"
    if isinstance(found, str):
        return f"error: {found}"
    with contextlib.suppress(AssertionError):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
        return "equal"
    names = [name for name, one in found[0].items() if not torch.allclose(one, plain[0][name], rtol=1e-5, atol=1e-6)]
    return f"differs: {names}, {found[1]} for {plain[1]}"
