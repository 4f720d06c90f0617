"""Few labels and many unlabelled samples in one step, a teacher that averages the student, two validation sets."""

import argparse
import copy

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def moons(samples, seed):
    """Two half circles that interlock."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    angle = torch.rand(samples, generator=generator) * torch.pi
    x = torch.stack([angle.cos() + labels - 0.5, (angle.sin() - 0.25) * (1 - 2 * labels)], dim=1)
    return x + 0.08 * torch.randn(samples, 2, generator=generator), labels


class MeanTeacher(LightningModule):
    def __init__(self, width=64, lr=1e-2, decay=0.9, consistency=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.student = nn.Sequential(
            nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.teacher(x)

    def training_step(self, batch, batch_idx):
        x, labels = batch["labelled"]
        [unlabelled] = batch["unlabelled"]
        supervised = F.cross_entropy(self.student(x), labels)
        with torch.no_grad():
            target = self.teacher(unlabelled + 0.05 * torch.randn_like(unlabelled)).softmax(-1)
        guess = self.student(unlabelled + 0.05 * torch.randn_like(unlabelled)).softmax(-1)
        consistent = F.mse_loss(guess, target)
        self.log_dict({"supervised": supervised, "consistent": consistent}, prog_bar=True)
        return supervised + self.hparams.consistency * consistent

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.hparams.decay)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, labels = batch
        name = ("clean", "noisy")[dataloader_idx]
        accuracy = (self(x).argmax(-1) == labels).float().mean()
        self.log(f"{name}_accuracy", accuracy, add_dataloader_idx=False, sync_dist=True, batch_size=len(x))
        self.log("loss", F.cross_entropy(self(x), labels), sync_dist=True, batch_size=len(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=self.hparams.lr * 10, momentum=0.9, nesterov=True)


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    unlabelled, _ = moons(1024, seed=0)
    train = {
        "labelled": DataLoader(TensorDataset(*moons(64, seed=1)), batch_size=16, shuffle=True),
        "unlabelled": DataLoader(TensorDataset(unlabelled), batch_size=32, shuffle=True),
    }
    x, labels = moons(256, seed=2)
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    val = [DataLoader(TensorDataset(x, labels), batch_size=64), DataLoader(TensorDataset(noisy, labels), batch_size=64)]
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=6,
        log_every_n_steps=5,
        logger=False,
        callbacks=[ModelCheckpoint(folder, monitor="clean_accuracy", mode="max", save_last="link")],
    )
    trainer.fit(MeanTeacher(), CombinedLoader(train, "max_size_cycle"), val)
    first, second = trainer.validate(ckpt_path="best", dataloaders=val, verbose=False)
    trainer.print(f"accuracy: {first['clean_accuracy']:.3f}, on noisy points {second['noisy_accuracy']:.3f}")
    return first["clean_accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
