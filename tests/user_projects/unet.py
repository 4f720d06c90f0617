"""A U-Net that finds discs in noise: skip connections, batch normalisation, IoU, gradient accumulation."""

import argparse

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryJaccardIndex


class Discs(LightningDataModule):
    def __init__(self, images=192, size=16, batch_size=8):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        images, size = self.hparams.images, self.hparams.size
        centre = torch.rand(images, 2, 1, 1, generator=generator) * size
        radius = 2 + torch.rand(images, 1, 1, generator=generator) * size / 4
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        masks = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2).float().unsqueeze(1)
        noisy = masks + 0.5 * torch.randn(masks.shape, generator=generator)
        self.train = TensorDataset(noisy[:-64], masks[:-64])
        self.val = TensorDataset(noisy[-64:], masks[-64:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=16)


def double(inputs, outputs):
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(LightningModule):
    def __init__(self, widths=(8, 16, 32), lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.down = nn.ModuleList(double(a, b) for a, b in zip((1, *widths), widths, strict=False))
        pairs = [*zip(widths[:0:-1], widths[-2::-1], strict=True)]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(double(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(widths[0], 1, 1)
        self.iou = BinaryJaccardIndex()

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)

    def training_step(self, batch, batch_idx):
        images, masks = batch
        loss = F.binary_cross_entropy_with_logits(self(images), masks)
        self.log("train_loss", loss, prog_bar=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, masks = batch
        self.iou.update(self(images).sigmoid(), masks.int())

    def on_validation_epoch_end(self):
        self.log("val_iou", self.iou, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr * 10, momentum=0.9, weight_decay=1e-4)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs),
        }


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=6,
        accumulate_grad_batches=2 // devices,
        logger=False,
        callbacks=[ModelCheckpoint(folder, monitor="val_iou", mode="max", filename="unet-{val_iou:.2f}")],
    )
    trainer.fit(UNet(), datamodule=Discs())
    [metrics] = trainer.validate(ckpt_path="best", datamodule=trainer.datamodule, verbose=False)
    trainer.print(f"intersection over union: {metrics['val_iou']:.3f}")
    return metrics["val_iou"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
