"""Two encoders learn which views belong together: negatives from all processes, a learned temperature."""

import argparse
import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def pairs(samples):
    """Two noisy linear views of the same hidden cause."""
    generator = torch.Generator().manual_seed(0)
    cause = torch.randn(samples, 6, generator=generator)
    views = [cause @ torch.randn(6, size, generator=generator) for size in (24, 16)]
    return TensorDataset(*(view + 0.1 * torch.randn(view.shape, generator=generator) for view in views))


class Encoder(nn.Module):
    def __init__(self, inputs, width=32, blocks=2):
        super().__init__()
        self.input = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(blocks))

    def forward(self, x):
        x = self.input(x)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return F.normalize(x, dim=-1)


class Contrastive(LightningModule):
    def __init__(self, lr=3e-3, batch_size=64):
        super().__init__()
        self.save_hyperparameters()
        self.left, self.right = Encoder(24), Encoder(16)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def similarities(self, batch):
        left, right = self.left(batch[0]), self.right(batch[1])
        # Processes come first: (processes, batch, width).
        left, right = (self.all_gather(x, sync_grads=True).reshape(-1, x.shape[-1]) for x in (left, right))
        return left @ right.T * self.log_scale.exp()

    def training_step(self, batch, batch_idx):
        logits = self.similarities(batch)
        targets = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        self.log_dict({"train_loss": loss, "scale": self.log_scale.exp()}, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(100))

    def validation_step(self, batch, batch_idx):
        logits = self.similarities(batch)
        found = logits.argmax(1) == torch.arange(len(logits), device=self.device)
        self.log("top1", found.float().mean(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    def loader(self):
        data, world = pairs(512), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    train_dataloader = val_dataloader = loader


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=6,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[ModelCheckpoint(folder, monitor="top1", mode="max", filename="contrastive")],
    )
    trainer.fit(Contrastive())
    metrics = trainer.callback_metrics
    trainer.print(f"scale {metrics['scale']:.2f}, pairs found among 64: {metrics['top1']:.3f}")
    return metrics["train_loss"].item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
