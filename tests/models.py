"""Small models and their data, for tests that train."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_largescale.checkpoint import load_checkpoint

VOCAB, DIM, CONTEXT = 32, 16, 8
GLOBAL_BATCH = 8


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Tokens(Dataset):
    """Made-up text: each sample follows from its index."""

    def __init__(self, samples: int = 160):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return torch.randint(VOCAB, (CONTEXT + 1,), generator=torch.Generator().manual_seed(index))


class Language(LightningModule):
    """A language model with what models have: a parameter of its own, blocks, a head that is used outside of forward.

    Args:
        tied: the head is the embedding.
        frozen: the embedding and a part of each block are not trained.
        seed: None draws the weights from the rank's own state.
    """

    def __init__(self, *, layers=3, tied=False, frozen=False, seed: int | None = 0, lr=1e-2, samples=160, dropout=0.0):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.position = nn.Parameter(torch.randn(CONTEXT, DIM) * 0.02)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if frozen:
            for parameter in (self.embedding.weight, *(block.up.weight for block in self.blocks)):
                parameter.requires_grad_(False)
        self.lr, self.samples = lr, samples
        self.losses: list[float] = []
        self.evaluated: list[float] = []

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, batch):
        # The head is used outside of the module's own forward, as losses in chunks do.
        logits = self.head(self(batch[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        loss = self.loss(batch)
        self.evaluated.append(float(self.all_gather(loss).mean()))
        self.log("val_loss", loss, sync_dist=True)

    def test_step(self, batch, index):
        self.validation_step(batch, index)

    def predict_step(self, batch, index):
        return self.head(self(batch[:, :-1])).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)

    def loader(self):
        return divided_loader(self.trainer, Tokens(self.samples))

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Lion(torch.optim.Optimizer):
    """As others write theirs: a momentum, and a step of its own for each tensor."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], group)
        return loss

    def update(self, parameter, state, group):
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        parameter.sub_(mean.lerp(parameter.grad, 0.1).sign(), alpha=group["lr"])
        mean.lerp_(parameter.grad, 0.01)


class ScheduleFree(torch.optim.Optimizer):
    """Evaluates at an average of its iterates and trains between the two: `train()` comes before a step.

    Source: Defazio et al. 2024, "The Road Less Scheduled", equations 5 to 7.
    """

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0, "training": False})

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training):
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["training"]:
            raise RuntimeError("call train() before step()")
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["steps"] += 1
            share = 1 / group["steps"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    z = self.state[parameter].setdefault("z", parameter.clone())
                    parameter.lerp_(z, share)
                    parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                    z.sub_(parameter.grad, alpha=group["lr"])
        return loss


class SaveLast(Callback):
    """Writes a checkpoint at the end of the last epoch, which one written after fit is not quite to Lightning."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == trainer.max_epochs - 1:
            trainer.save_checkpoint(self.path)


def read_checkpoint(path):
    """All of a checkpoint, of a file or of a directory."""
    return load_checkpoint(torch.load, path, weights_only=False)


def divided_loader(trainer, data):
    """The global batch divided among ranks: the same samples in a step whatever the number of processes."""
    if trainer.world_size == 1:
        return DataLoader(data, batch_size=GLOBAL_BATCH)
    among = trainer.distributed_sampler_kwargs
    sampler = DistributedSampler(data, shuffle=False, **among)
    return DataLoader(data, batch_size=GLOBAL_BATCH // among["num_replicas"], sampler=sampler)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def trainer(strategy="auto", *, devices=1, max_steps=20, **options) -> Trainer:
    """A Trainer that says nothing, for `max_steps` steps without validation unless asked for."""
    given = {
        "accelerator": "cpu",
        "devices": devices,
        "max_steps": max_steps,
        "limit_val_batches": 0,
        **QUIET,
        **options,
    }
    return Trainer(strategy=strategy, **given)
