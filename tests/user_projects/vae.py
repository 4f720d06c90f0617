"""A variational autoencoder of small images, its learning rate lowered on a plateau, its KL term warmed up."""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def bars(samples):
    """8 x 8 images, each of one bright row and one bright column."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randint(8, (2, samples), generator=generator)
    images = torch.zeros(samples, 8, 8)
    images[torch.arange(samples), rows] = 1
    images[torch.arange(samples), :, columns] = 1
    return TensorDataset(images.flatten(1))


class VAE(LightningModule):
    def __init__(self, latent=8, hidden=128, lr=3e-3, kl_warmup=50):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.mean = nn.Linear(hidden, latent)
        self.log_variance = nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 64))
        self.register_buffer("origin", torch.zeros(latent))

    def forward(self, x):
        hidden = self.encoder(x)
        return self.mean(hidden), self.log_variance(hidden)

    def losses(self, batch):
        [x] = batch
        mean, log_variance = self(x)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") / len(x)
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        return reconstruction, kl

    def training_step(self, batch, batch_idx):
        reconstruction, kl = self.losses(batch)
        weight = min(1.0, self.global_step / self.hparams.kl_warmup)
        self.log_dict({"reconstruction": reconstruction, "kl": kl, "kl_weight": weight}, on_epoch=True, sync_dist=True)
        return reconstruction + weight * kl

    def validation_step(self, batch, batch_idx):
        reconstruction, kl = self.losses(batch)
        self.log("val_elbo", -reconstruction - kl, prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self):
        # All processes decode; one writes.
        sample = self.decoder(self.origin + torch.randn(4, len(self.origin))).sigmoid()
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            torch.save(sample, Path(self.trainer.default_root_dir) / f"sample-{self.current_epoch}.pt")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_elbo"}}


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    checkpoint = ModelCheckpoint(monitor="val_elbo", mode="max", save_last=True)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=15,
        log_every_n_steps=5,
        gradient_clip_val=10.0,
        default_root_dir=folder,
        logger=CSVLogger(folder),
        callbacks=[checkpoint],
    )
    train = DataLoader(bars(1024), batch_size=64 // devices, shuffle=True)
    trainer.fit(VAE(), train, DataLoader(bars(128), batch_size=32))
    elbo = checkpoint.best_model_score.item()
    trainer.print(f"best evidence lower bound: {elbo:.2f} nats")
    return elbo


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
