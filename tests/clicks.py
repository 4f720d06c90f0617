"""A small model of clicks with two tables and a dense tower, its data, and how tests of its tables run it."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from models import divided_loader
from ranks import mesh_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

USERS, WORDS, DIM = 101, 30, 4

NAMES = ("users", "words")

STEPS = 20

REPLICATED, SHARDED = Plan(dp_replicate=2, row_sharded_embeddings=NAMES), Plan(dp_shard=2, row_sharded_embeddings=NAMES)


class Clicks(Dataset):
    """A user, seven words of which the last two are padding or a repetition, and whether there was a click."""

    def __init__(self, samples=160):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        user = torch.randint(USERS, (), generator=generator)
        words = torch.randint(WORDS, (7,), generator=generator)
        words[5:] = words[4] if index % 2 else 0
        return user, words, torch.rand((), generator=generator).round()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2 * DIM, 8), nn.Linear(8, 2 * DIM)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Recommender(LightningModule):
    """Two tables and a dense tower with blocks."""

    def __init__(self, optimizer="SGD", mode="mean", seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.users = nn.Embedding(USERS, DIM, sparse=True)
        self.words = nn.EmbeddingBag(WORDS, DIM, mode=mode, sparse=True, padding_idx=0)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(2 * DIM, 1)
        self.optimizer, self.options = optimizer, options
        self.automatic_optimization = optimizer != "SparseAdam"
        self.losses, self.evaluated, self.norms = [], [], []

    def forward(self, user, words):
        return self.head(self.blocks(torch.cat([self.users(user), self.words(words)], -1))).squeeze(-1)

    def loss(self, batch):
        user, words, click = batch
        return F.binary_cross_entropy_with_logits(self(user, words), click)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        assert self.users.weight.grad.is_sparse

    def validation_step(self, batch, index):
        self.evaluated.append(float(self.loss(batch)))

    def configure_optimizers(self):
        if self.optimizer != "SparseAdam":
            kind = getattr(torch.optim, self.optimizer)
            return kind(self.parameters(), lr=0.5, **self.options)
        tables = [self.users.weight, self.words.weight]
        dense = [p for p in self.parameters() if all(p is not table for table in tables)]
        return [torch.optim.SparseAdam(tables, lr=0.05), torch.optim.AdamW(dense, lr=0.01)]

    def train_dataloader(self):
        return divided_loader(self.trainer, Clicks())

    val_dataloader = train_dataloader


class Dense(Recommender):
    """With gradients that stock Lightning can clip."""

    def __init__(self, **options):
        super().__init__(**options)
        self.users.sparse = self.words.sparse = False

    def on_before_optimizer_step(self, optimizer):
        pass


class Holder(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table


def strategy_of(plan):
    return LargeScaleStrategy(plan) if plan else "auto"


def connected(function, *args):
    """On a rank, connected from then on."""
    mesh_of()
    return function(*args)


def ids_of(rank, *shape, dtype=torch.int64):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)
