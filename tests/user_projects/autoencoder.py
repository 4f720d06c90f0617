"""An autoencoder of points on a curve; what it encodes is predicted, and a checkpoint is loaded to decode again."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Curve(Dataset):
    """Points on a closed curve in 16 dimensions."""

    def __init__(self, points):
        self.angles = torch.linspace(0, 2 * torch.pi, points + 1)[:-1]

    def __len__(self):
        return len(self.angles)

    def __getitem__(self, index):
        return torch.sin(self.angles[index] * torch.arange(1, 5).repeat(4) + torch.arange(16))


class AutoEncoder(LightningModule):
    def __init__(self, size=16, hidden=64, code=4, lr=3e-3, batch_size=64):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        # Not through forward, as Lightning's first example has it.
        loss = F.mse_loss(self.decoder(self.encoder(batch)), batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self.decoder(self(batch)), batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        # The global batch is divided, so that a step is the same on any number of devices.
        data, world = Curve(512), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, seed=1)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.sampler.set_epoch(self.current_epoch)

    def val_dataloader(self):
        return DataLoader(Curve(100), batch_size=10)


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    checkpoint = ModelCheckpoint(dirpath=folder, monitor="val_loss")
    options = {"strategy": strategy, "accelerator": accelerator, "devices": devices, "logger": False}
    trainer = Trainer(**options, max_epochs=20, callbacks=[checkpoint], use_distributed_sampler=False)
    model = AutoEncoder()
    trainer.fit(model)
    codes = torch.cat(trainer.predict(model, DataLoader(Curve(8), batch_size=4)))
    # Every process loads the checkpoint and decodes by itself.
    best = AutoEncoder.load_from_checkpoint(checkpoint.best_model_path)
    with torch.no_grad():
        error = F.mse_loss(best.decoder(codes), torch.stack([*Curve(8)])).item()
    trainer.print(f"reconstruction error of codes: {error:.4f}")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
