"""Models with every kind of tensor among their parameters and buffers, and runs of them under a plan."""

from __future__ import annotations

import contextlib
import warnings

import torch
from lightning.pytorch import LightningModule
from models import GLOBAL_BATCH, SaveLast, divided_loader, read_checkpoint, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.stored import Stored
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

DIM, STEPS = 4, 3


class Rows(Dataset):
    def __len__(self):
        return 8 * GLOBAL_BATCH

    def __getitem__(self, index):
        return torch.randn(DIM, generator=torch.Generator().manual_seed(index))


class Block(nn.Module):
    """A matrix and one tensor of a kind, which is made and used as a function of this module says."""

    def __init__(self, kind):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 8), nn.Linear(8, DIM)
        self.kind = kind
        MAKE[kind](self)

    def forward(self, x):
        return x + USE[self.kind](self, self.down(self.up(x).tanh()))


class Model(LightningModule):
    """The kind in two blocks, and in the module itself where `outside`."""

    def __init__(self, kind, *, outside=False):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.outside = kind, outside
        self.first = nn.Linear(DIM, DIM)
        if outside:
            self.blocks = nn.ModuleList(Block("plain") for _ in range(2))
            MAKE[kind](self)
        else:
            self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
        self.losses = []

    def training_step(self, batch, index):
        x = self.first(batch)
        for block in self.blocks:
            x = block(x)
        if self.outside:
            x = x + USE[self.kind](self, x)
        loss = x.square().mean()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        doubled = [parameter for parameter in trained if getattr(parameter, "doubled", False)]
        rest = [parameter for parameter in trained if not getattr(parameter, "doubled", False)]
        groups = [{"params": doubled, "lr": 0.04}, {"params": rest}]
        return torch.optim.SGD([group for group in groups if group["params"]], 0.02, momentum=0.9)

    def train_dataloader(self):
        return divided_loader(self.trainer, Rows())


MAKE, USE = {}, {}


def kind(use):
    """Register what makes a tensor of a kind; `use` computes with it."""

    def register(make):
        name = make.__name__
        MAKE[name], USE[name] = make, use
        return make

    return register


@kind(lambda block, x: x)
def plain(block):
    pass


@kind(lambda block, x: x + F.linear(x, block.none).sum())
def no_elements(block):
    block.none = nn.Parameter(torch.zeros(0, DIM))


@kind(lambda block, x: x + block.none.sum())
def no_elements_in_rows(block):
    block.none = nn.Parameter(torch.zeros(3, 0))


@kind(lambda block, x: x * block.scale)
def scalar(block):
    block.scale = nn.Parameter(torch.tensor(1.5))


@kind(lambda block, x: x * block.row)
def one_row(block):
    block.row = nn.Parameter(torch.randn(1, DIM))


@kind(lambda block, x: x + block.one)
def one_element(block):
    block.one = nn.Parameter(torch.randn(1))


def convolve(block, x):
    image = x[:, :, None, None].expand(-1, -1, 3, 3).contiguous(memory_format=torch.channels_last)
    assert not block.conv.weight.is_contiguous()
    return block.conv(image).mean((2, 3))


@kind(convolve)
def channels_last(block):
    block.conv = nn.Conv2d(DIM, DIM, 3, padding=1).to(memory_format=torch.channels_last)


def volume(block, x):
    image = x[:, :, None, None, None].expand(-1, -1, 3, 3, 3)
    assert not block.conv.weight.is_contiguous()
    return block.conv(image.contiguous(memory_format=torch.channels_last_3d)).mean((2, 3, 4))


@kind(volume)
def channels_last_3d(block):
    block.conv = nn.Conv3d(DIM, DIM, 3, padding=1).to(memory_format=torch.channels_last_3d)


@kind(lambda block, x: F.linear(x, block.turned.t().view(DIM, DIM)))
def transposed(block):
    block.turned = nn.Parameter(torch.randn(DIM, DIM).t())


@kind(lambda block, x: x)
def transposed_matrix(block):
    block.up = nn.Linear(DIM, 8)
    block.up.weight = nn.Parameter(block.up.weight.detach().t().contiguous().t())


@kind(lambda block, x: F.linear(x, block.turned.permute(2, 0, 1).reshape(-1)[: DIM * DIM].view(DIM, DIM)))
def permuted(block):
    block.turned = nn.Parameter(torch.randn(2, 3, DIM).permute(1, 2, 0))


@kind(lambda block, x: F.linear(x, block.slice))
def sliced(block):
    block.slice = nn.Parameter(torch.randn(DIM, 2 * DIM)[:, ::2])


@kind(lambda block, x: x * block.same[0])
def expanded_frozen(block):
    block.same = nn.Parameter(torch.randn(1, DIM).expand(3, DIM), requires_grad=False)


@kind(lambda block, x: x * block.same[0])
def expanded(block):
    block.same = nn.Parameter(torch.randn(1, DIM).expand(3, DIM))


@kind(lambda block, x: F.linear(x, block.a) + F.linear(x, block.b))
def same_memory(block):
    block.a = nn.Parameter(torch.randn(DIM, DIM))
    block.b = nn.Parameter(block.a.data.t())


@kind(lambda block, x: F.linear(x, block.a) + F.linear(x, block.b))
def one_storage(block):
    both = torch.randn(2 * DIM, DIM)
    block.a, block.b = nn.Parameter(both[:DIM]), nn.Parameter(both[DIM:])


@kind(lambda block, x: F.linear(x.double(), block.wide).float())
def float64(block):
    block.wide = nn.Parameter(torch.randn(DIM, DIM, dtype=torch.float64))


@kind(lambda block, x: F.linear(x.bfloat16(), block.low).float())
def bfloat16(block):
    block.low = nn.Parameter(torch.randn(DIM, DIM, dtype=torch.bfloat16))


@kind(lambda block, x: (F.linear(x.bfloat16(), block.low) * block.scale.bfloat16()).float())
def bfloat16_and_scales(block):
    block.low = nn.Parameter(torch.randn(DIM, DIM, dtype=torch.bfloat16))
    block.scale = nn.Parameter(torch.randn(DIM, dtype=torch.float16))


@kind(lambda block, x: (x.to(torch.complex64) @ block.wave).real)
def complex64(block):
    block.wave = nn.Parameter(torch.randn(DIM, DIM, dtype=torch.complex64))


@kind(lambda block, x: (x.to(torch.complex64) @ block.wave).real)
def complex_most(block):
    block.wave = nn.Parameter(torch.randn(DIM, 8 * DIM, dtype=torch.complex64)[:, :DIM].contiguous())
    block.more = nn.Parameter(torch.randn(DIM, 8 * DIM, dtype=torch.complex64))


@kind(lambda block, x: x * block.mask)
def boolean_parameter(block):
    block.mask = nn.Parameter(torch.tensor([True, False, True, True]), requires_grad=False)


@kind(lambda block, x: F.linear(x, block.codes.float() / 64))
def integer_parameter(block):
    block.codes = nn.Parameter(torch.arange(DIM * DIM, dtype=torch.int8).view(DIM, DIM), requires_grad=False)


@kind(lambda block, x: F.linear(x, block.tiny.float()))
def float8_parameter(block):
    block.tiny = nn.Parameter(torch.randn(DIM, DIM).to(torch.float8_e4m3fn), requires_grad=False)


@kind(lambda block, x: F.linear(x, block.tiny.float()))
def float8_buffer(block):
    block.register_buffer("tiny", torch.randn(DIM, DIM).to(torch.float8_e4m3fn))


@kind(lambda block, x: (x.to(torch.complex64) @ block.wave).real)
def complex_buffer(block):
    block.register_buffer("wave", torch.randn(DIM, DIM, dtype=torch.complex64).conj())


@kind(lambda block, x: torch.sparse.mm(block.graph, x.t()).t())
def coo_buffer(block):
    block.register_buffer("graph", torch.eye(DIM).roll(1, 0).to_sparse())


@kind(lambda block, x: torch.sparse.mm(block.graph, x.t()).t())
def uncoalesced_buffer(block):
    places = torch.tensor([[0, 0, 2], [1, 1, 3]])
    block.register_buffer("graph", torch.sparse_coo_tensor(places, torch.randn(3), (DIM, DIM)))


@kind(lambda block, x: (block.graph @ x.t()).t())
def csr_buffer(block):
    block.register_buffer("graph", torch.eye(DIM).roll(1, 0).to_sparse_csr())


@kind(lambda block, x: (block.graph.to_dense() @ x.t()).t())
def bsr_buffer(block):
    block.register_buffer("graph", torch.eye(DIM).roll(1, 0).to_sparse_bsr(2))


@kind(lambda block, x: (block.graph.to_dense() @ x.t()).t())
def csc_buffer(block):
    block.register_buffer("graph", torch.eye(DIM).roll(1, 0).to_sparse_csc())


@kind(lambda block, x: (block.graph.to_dense() @ x.t()).t())
def unsaved_coo_buffer(block):
    block.register_buffer("graph", torch.eye(DIM).roll(1, 0).to_sparse(), persistent=False)


@kind(lambda block, x: torch.sparse.mm(block.graph, x.t()).t())
def coo_parameter(block):
    block.graph = nn.Parameter(torch.eye(DIM).roll(1, 0).to_sparse(), requires_grad=False)


@kind(lambda block, x: torch.sparse.mm(block.graph, x.t()).t())
def trained_coo_parameter(block):
    block.graph = nn.Parameter(torch.eye(DIM).roll(1, 0).to_sparse())


@kind(lambda block, x: x + block.ragged.to_padded_tensor(0.0).sum())
def nested_buffer(block):
    ragged = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])
    # torch loads no nested tensors.
    block.register_buffer("ragged", ragged, persistent=False)


@kind(lambda block, x: x + block.ragged.values().sum())
def jagged_buffer(block):
    ragged = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)
    block.register_buffer("ragged", ragged, persistent=False)


@kind(lambda block, x: F.linear(x, block.codes.dequantize()))
def quantized_buffer(block):
    block.register_buffer("codes", torch.quantize_per_tensor(torch.randn(DIM, DIM), 0.1, 0, torch.qint8))


@kind(lambda block, x: F.linear(x, block.codes.dequantize()))
def channel_quantized_buffer(block):
    scales, zeros = torch.rand(DIM) + 0.1, torch.zeros(DIM, dtype=torch.int64)
    block.register_buffer("codes", torch.quantize_per_channel(torch.randn(DIM, DIM), scales, zeros, 0, torch.qint8))


class Loud(torch.Tensor):
    """A subclass that computes otherwise than its data."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2 if function is F.linear else result


class Marked(nn.Parameter):
    """A subclass that says something and computes as its data."""


@kind(lambda block, x: F.linear(x, block.loud).as_subclass(torch.Tensor))
def subclass_parameter(block):
    block.loud = nn.Parameter(torch.randn(DIM, DIM).as_subclass(Loud))


@kind(lambda block, x: F.linear(x, block.loud).as_subclass(torch.Tensor))
def subclass_buffer(block):
    block.register_buffer("loud", torch.randn(DIM, DIM).as_subclass(Loud))


def by_class(block, x):
    assert isinstance(block.marked, Marked)
    return F.linear(x, block.marked)


@kind(by_class)
def parameter_class(block):
    block.marked = Marked(torch.randn(DIM, DIM))


def by_attribute(block, x):
    assert block.wide.doubled
    return F.linear(x, block.wide)


@kind(by_attribute)
def attributes(block):
    block.wide = nn.Parameter(torch.randn(DIM, DIM))
    block.wide.doubled = True


@kind(lambda block, x: F.linear(x, block.void) if not block.void.is_meta else x)
def meta_buffer(block):
    block.register_buffer("void", torch.empty(DIM, DIM, device="meta"))


@kind(lambda block, x: F.linear(x, block.void) if not block.void.is_meta else x)
def meta_parameter(block):
    block.void = nn.Parameter(torch.empty(DIM, DIM, device="meta"))


@kind(lambda block, x: block.lazy(x))
def lazy(block):
    block.lazy = nn.LazyLinear(DIM)


@kind(lambda block, x: block.lazy(x))
def lazy_buffers(block):
    block.lazy = nn.LazyBatchNorm1d(track_running_stats=True, affine=False)


PLANS = {
    "plain": Plan(),
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
    "tp": Plan(tp=2),
    "HSDP": Plan(dp_replicate=2, dp_shard=2),
    "cpu": Plan(offload_parameters="cpu"),
    "nvme": Plan(offload_parameters="nvme", offload_optimizer="nvme"),
    "ZeRO-3 cpu": Plan(dp_shard=2, offload_parameters="cpu"),
    "ZeRO-3 nvme": Plan(dp_shard=2, offload_parameters="nvme", offload_optimizer="nvme"),
    "optimizer": Plan(offload_optimizer="cpu"),
}


def plain_values(state):
    return {name: dense(value) for name, value in state.items()}


def dense(value):
    if value.is_meta:
        return torch.zeros(())
    if value.is_quantized:
        return value.dequantize()
    if value.is_nested:
        return torch.cat([one.reshape(-1) for one in value.unbind()])
    if value.layout is not torch.strided:
        return value.to_dense()
    value = value.detach().as_subclass(torch.Tensor)
    return value.float() if value.dtype == torch.float8_e4m3fn else value.clone()


def run(kind, strategy, folder, *, devices=1, outside=False, resume=None):
    """Losses, values by name, and the checkpoint of a fit of an epoch, or of another from `resume`; or the PlanError
    that setup raised.
    """
    warnings.simplefilter("ignore")
    model, epochs = Model(kind, outside=outside), 1 if resume is None else 2
    path = folder / f"{epochs}.ckpt"
    begun = []
    model.on_train_start = lambda: begun.append(True)
    limits = {"max_steps": -1, "max_epochs": epochs, "limit_train_batches": STEPS}
    fit = trainer(strategy, devices=devices, callbacks=[SaveLast(path)], **limits)
    try:
        fit.fit(model, ckpt_path=resume, weights_only=False)
    except PlanError as error:
        if begun:
            raise
        return str(error)
    whole = getattr(fit.strategy, "full_parameters", contextlib.nullcontext)
    with whole():
        state = plain_values(model.state_dict())
    return model.losses, state, path


def round_trip(kind, plan, folder, outside, resumes):
    """What two fits under `plan` give, the second from the first's checkpoint, and the values in that; or why it is
    refused.
    """
    found = run(kind, LargeScaleStrategy(plan), folder, devices=plan.world_size, outside=outside)
    if isinstance(found, str):
        return found
    losses, state, path = found
    saved = read_checkpoint(path)["state_dict"]
    saved = plain_values({name: one.whole() if isinstance(one, Stored) else one for name, one in saved.items()})
    if not resumes:
        return losses, state, saved
    resumed = run(kind, LargeScaleStrategy(plan), folder, devices=plan.world_size, outside=outside, resume=path)
    return losses, state, saved, *resumed[:2]
