"""A transformer forecasts series: a data module, quantile loss, a checkpoint loaded, predictions written by all."""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

PAST, FUTURE, QUANTILES = 24, 6, (0.1, 0.5, 0.9)


class Waves(Dataset):
    def __init__(self, series):
        self.series = series

    def __len__(self):
        return len(self.series) - PAST - FUTURE

    def __getitem__(self, index):
        window = self.series[index : index + PAST + FUTURE]
        return window[:PAST], window[PAST:]


class Series(LightningDataModule):
    def __init__(self, folder, batch_size=32):
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self):
        time = torch.arange(600.0)
        noise = 0.1 * torch.randn(600, generator=torch.Generator().manual_seed(0))
        Path(self.hparams.folder).mkdir(parents=True, exist_ok=True)
        torch.save((time / 3).sin() + 0.5 * (time / 7).cos() + noise, Path(self.hparams.folder) / "series.pt")

    def setup(self, stage):
        series = torch.load(Path(self.hparams.folder) / "series.pt")
        self.train, self.val = Waves(series[:482]), Waves(series[442:])

    def loader(self, data, shuffle=False):
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=shuffle)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    def train_dataloader(self):
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self):
        return self.loader(self.val)

    test_dataloader = predict_dataloader = val_dataloader


class Forecaster(LightningModule):
    def __init__(self, width=32, layers=2, heads=4, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.input = nn.Linear(1, width)
        self.position = nn.Parameter(torch.randn(PAST, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, FUTURE * len(QUANTILES))

    def forward(self, past):
        hidden = self.encoder(self.input(past.unsqueeze(-1)) + self.position)
        return self.head(hidden[:, -1]).unflatten(1, (FUTURE, -1))

    def quantile_loss(self, batch):
        past, future = batch
        error = future.unsqueeze(-1) - self(past)
        quantile = torch.tensor(QUANTILES, device=self.device)
        return torch.maximum(quantile * error, (quantile - 1) * error).mean()

    def training_step(self, batch, batch_idx):
        loss = self.quantile_loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.quantile_loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.quantile_loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Writer(BasePredictionWriter):
    def __init__(self, folder):
        super().__init__("epoch")
        self.folder = Path(folder)

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        indices = [index for batch in batch_indices[0] for index in batch]
        written = {"predictions": torch.cat(predictions), "indices": indices}
        torch.save(written, self.folder / f"predictions-{trainer.global_rank}.pt")


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    options = {"strategy": strategy, "accelerator": accelerator, "devices": devices, "logger": False}
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", filename="forecaster-{epoch}")
    trainer = Trainer(**options, max_epochs=5, use_distributed_sampler=False, callbacks=[checkpoint])
    data = Series(folder)
    trainer.fit(Forecaster(), datamodule=data)

    best = Forecaster.load_from_checkpoint(checkpoint.best_model_path)
    user = Trainer(**options, use_distributed_sampler=False, callbacks=[Writer(folder)])
    [metrics] = user.test(best, datamodule=data, verbose=False)
    user.predict(best, datamodule=data, return_predictions=False)
    user.strategy.barrier()
    written = [torch.load(path) for path in sorted(Path(folder).glob("predictions-*.pt"))]
    forecasts = torch.cat([part["predictions"] for part in written])
    inside = (forecasts[..., 0] <= forecasts[..., 2]).float().mean()
    user.print(f"{len(forecasts)} forecasts, {inside:.2f} of intervals in order, test loss {metrics['test_loss']:.4f}")
    return metrics["test_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
