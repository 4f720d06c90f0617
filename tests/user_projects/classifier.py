"""Handwritten-like digits: accuracy, the best checkpoint, early stopping, a test at the end.

python classifier.py
python classifier.py --strategy auto --devices 1
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


def digits(samples):
    """Ten 12 x 12 glyphs under noise."""
    generator = torch.Generator().manual_seed(0)
    glyphs = torch.rand(10, 1, 12, 12, generator=generator).round()
    labels = torch.randint(10, (samples,), generator=generator)
    return TensorDataset(glyphs[labels] + torch.randn(samples, 1, 12, 12, generator=generator), labels)


class Classifier(LightningModule):
    def __init__(self, width=16, lr=5e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(2 * width * 9, 10),
        )
        self.train_accuracy = MulticlassAccuracy(10)
        self.val_accuracy = MulticlassAccuracy(10)
        self.test_accuracy = MulticlassAccuracy(10)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)]


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1, workers=True)
    train, val, test = random_split(digits(1280), [768, 256, 256])
    model = Classifier()
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=6,
        log_every_n_steps=5,
        logger=CSVLogger(folder, name="classifier"),
        callbacks=[
            ModelCheckpoint(monitor="val_accuracy", mode="max", filename="{epoch}-{val_accuracy:.2f}"),
            EarlyStopping("val_loss", patience=2),
            LearningRateMonitor(),
        ],
    )
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=64))
    [metrics] = trainer.test(model, DataLoader(test, batch_size=64), ckpt_path="best", verbose=False)
    trainer.print(f"test accuracy: {metrics['test_accuracy']:.3f}")
    return metrics["test_accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
