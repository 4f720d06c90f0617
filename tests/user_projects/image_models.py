"""ViT and ConvNeXt, built from their configs by transformers, tell coloured textures apart."""

import argparse

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, Timer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForImageClassification, ConvNextConfig, ViTConfig

CONFIGS = {
    "vit": lambda: ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=4,
    ),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16, 32], depths=[1, 2, 1], num_stages=3, num_labels=4),
}


class Textures(LightningDataModule):
    """Horizontal, vertical and diagonal stripes, and checks."""

    def __init__(self, images=384, batch_size=32):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        patterns = torch.stack([y % 4 < 2, x % 4 < 2, (x + y) % 4 < 2, (x % 4 < 2) ^ (y % 4 < 2)]).float()
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (self.hparams.images,), generator=generator)
        colours = torch.rand(len(labels), 3, 1, 1, generator=generator) + 0.5
        images = patterns[labels].unsqueeze(1) * colours + 0.3 * torch.randn(
            len(labels), 3, 16, 16, generator=generator
        )
        self.train, self.val = TensorDataset(images[:-128], labels[:-128]), TensorDataset(images[-128:], labels[-128:])

    def loader(self, data, shuffle):
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=shuffle)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    def train_dataloader(self):
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self):
        return self.loader(self.val, shuffle=False)


class ImageClassifier(LightningModule):
    def __init__(self, config, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForImageClassification.from_config(CONFIGS[config]())
        self.accuracy, self.mean_loss = MulticlassAccuracy(4), MeanMetric()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.model(pixel_values=images, labels=labels).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        output = self.model(pixel_values=images, labels=labels)
        self.accuracy(output.logits, labels)
        self.mean_loss(output.loss, weight=len(labels))
        self.log_dict({"val_accuracy": self.accuracy, "val_loss": self.mean_loss}, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [5])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs", config="vit"):
    seed_everything(1)
    checkpoint = ModelCheckpoint(monitor="val_loss", filename=config, auto_insert_metric_name=False)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=5,
        log_every_n_steps=4,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=CSVLogger(folder, name=config, version=0),
        callbacks=[checkpoint, LearningRateMonitor("step"), ModelSummary(max_depth=2), Timer()],
    )
    trainer.fit(ImageClassifier(config), datamodule=Textures())
    trainer.print(f"{config}: validation accuracy {trainer.callback_metrics['val_accuracy']:.3f}")
    return checkpoint.best_model_score.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--config", choices=CONFIGS, default="vit")
    main(**vars(parser.parse_args()))
